"""Whatever clients send, or stop sending, the server lives, tells them in OpenAI's format, and keeps nothing."""

import http.client
import json
import random
import socket
import time

import openai
import pytest

from tests.serve.running import serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def server():
    with serving(body_seconds=0.5, body_bytes=20_000) as running:
        yield running


def is_error(body):
    """OpenAI's format, on one line and without what only we may see."""
    error = body["error"]
    assert set(body) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and "Traceback" not in json.dumps(body) and "/spotlight_jax/" not in str(body)
    return True


def alive(server):
    status, _, body = server.ask(COMPLETIONS, {"model": "tiny", "prompt": "abc", "max_tokens": 2, "temperature": 0})
    assert status == 200 and body["choices"][0]["finish_reason"] in ("stop", "length")
    return True


DAMAGED = [
    b"", b"{", b"[]", b"null", b"1", b'"text"', b"{}", b"\xff\xfe", b'{"model": "tiny", "prompt": "\xc3"}',
    b"[" * 19_000, b'{"a":' * 3_000, b'{"model": NaN}', b'{"seed": Infinity}', b'{"n": 1e400}',
    b'{"n": ' + b"9" * 10_000 + b"}", b'{"model": "tiny", "prompt": "\\ud800"}', b"{'model': 1}",
    b'{"model": "tiny", "prompt": "x", "max_tokens": -1}', b'{"model": "tiny", "prompt": "x", "seed": 4294967296}',
    b'{"model": "tiny", "prompt": [999999]}', b'{"model": "tiny", "prompt": [[]]}', b'{"model": "tiny", "prompt": ""}',
    b'{"model": "tiny", "prompt": [true]}', b'{"model": "tiny", "prompt": "x", "stop": [["x"]]}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "\\udfff"}]}',
    b'{"model": "\\ud800", "prompt": "x"}', b'{"\\ud800": 1, "model": "tiny"}',
    b'{"model": "tiny\\u0000", "prompt": 1}',
    b'{"model": "tiny", "prompt": "x", "temperature": 1e-9}', b'{"model": "tiny", "prompt": "x", "stop": "\\ud800"}',
]  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_damaged_bodies_are_refused(server, path):
    for raw in DAMAGED:
        status, _, body = server.ask(path, raw)
        assert 400 <= status < 500 and is_error(body), (raw[:80], status, body)
    assert alive(server)


GOOD = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    COMPLETIONS: {"model": "tiny", "prompt": "x", "max_tokens": 2, "temperature": 0},
}
ODD = [None, True, -1, 0, 2**70, 1.5, 1e308, "", "x", "\ud800", [], [[]], {}, {"a": {"b": [1]}}, [None], "x" * 999]
FIELDS = [
    "model", "prompt", "messages", "stream", "stream_options", "stop", "seed", "temperature", "top_p", "top_k", "n",
    "max_tokens", "dense", "user", "logprobs", "max_completion_tokens", "tools", "logit_bias", "response_format",
    "role", "content", "best_of", "echo", "store", "metadata",
]  # fmt: skip


def damage(draw, body):
    """A good body with a few fields of another kind, or bytes changed."""
    body = json.loads(json.dumps(body))
    for _ in range(draw.randint(1, 3)):
        where = body
        if draw.random() < 0.3 and "messages" in body and body["messages"] and isinstance(body["messages"], list):
            where = body["messages"][0] if isinstance(body["messages"][0], dict) else body
        where[draw.choice(FIELDS)] = draw.choice(ODD)
    raw = bytearray(json.dumps(body).encode())
    if draw.random() < 0.4:
        for _ in range(draw.randint(1, 4)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
    return bytes(raw)


def fuzz(server, count, seed):
    draw = random.Random(seed)
    for _ in range(count):
        path = draw.choice([CHAT, COMPLETIONS])
        raw = damage(draw, GOOD[path])
        status, _, body = server.ask(path, raw)
        assert status == 200 or (400 <= status < 500 and is_error(body)), (raw, status, body)


def test_fuzzed_bodies_are_answered_or_refused(server):
    fuzz(server, 250, 1)
    server.wait_until_idle()
    assert alive(server)


@pytest.mark.soak
def test_two_thousand_fuzzed_bodies_are_answered_or_refused(server):
    fuzz(server, 2_000, 2)
    server.wait_until_idle()
    assert alive(server)


def test_other_paths_methods_and_types_are_refused(server):
    for path, method, raw, headers, wanted in (
        ("/v1/nothing", "GET", None, {}, 404),
        (CHAT, "GET", None, {}, 405),
        ("/v1/models", "POST", b"{}", {}, 405),
        (CHAT, "POST", b"{}", {"Content-Type": "text/plain"}, 415),
        (CHAT, "POST", b"x" * 20_001, {}, 413),
    ):
        status, _, body = server.ask(path, raw, headers, method)
        assert status == wanted and is_error(body)
    assert alive(server)


def test_a_body_that_grows_past_the_limit_without_saying_so_is_refused(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    parts = iter([b'{"model": "' + b"x" * 15_000] * 3)
    connection.request("POST", CHAT, parts, {"Content-Type": "application/json"}, encode_chunked=True)
    reply = connection.getresponse()
    assert reply.status == 413 and is_error(json.loads(reply.read()))
    connection.close()


def send_head(server, length, body=b"", path=CHAT):
    sock = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


def test_a_body_that_never_ends_is_given_up(server):
    with send_head(server, 100, b'{"model"') as sock:
        sock.settimeout(10)
        text = sock.recv(10_000)
        assert text.startswith(b"HTTP/1.1 408") and is_error(json.loads(text.partition(b"\r\n\r\n")[2]))
    assert alive(server)


def test_clients_that_leave_while_they_send_are_forgotten(server):
    for _ in range(20):
        send_head(server, 100, b"{").close()
    assert alive(server)


def test_headers_without_end_are_refused(server):
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.settimeout(10)
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 40_000)
        assert sock.recv(1_000).startswith(b"HTTP/1.1 4")
    assert alive(server)


def ask_to_leave(server, draw):
    """A request that is cut off at a random moment."""
    fields = {"prompt": "x" * draw.randint(1, 200), "max_tokens": draw.randint(20, 90), "stream": draw.random() < 0.7}
    raw = json.dumps({"model": "tiny", **fields}).encode()
    return send_head(server, len(raw), raw, COMPLETIONS), time.monotonic() + draw.random() * 0.5


def test_clients_that_go_away_free_their_slots(server):
    """Sixty requests of which forty are cut off; those that stay get their answers."""
    draw = random.Random(3)
    leaving, staying = [], []
    for number in range(60):
        (leaving if number % 3 else staying).append(ask_to_leave(server, draw))
        time.sleep(0.01)
        for sock, when in leaving:
            if time.monotonic() > when:
                sock.close()
    for sock, _ in leaving:
        sock.close()
    for sock, _ in staying:
        sock.settimeout(60)
        assert sock.recv(20).startswith(b"HTTP/1.1 200")
        sock.close()
    server.wait_until_idle()
    _, _, page = server.ask("/metrics")
    assert b"spotlight_running 0.0" in page and b"spotlight_waiting 0.0" in page
    assert b'spotlight_requests_total{how="cancelled"}' in page
    assert alive(server)


def test_a_client_that_leaves_a_long_stream_frees_its_slot_at_once(server):
    sock, _ = ask_to_leave(server, random.Random(1))
    while not server.scheduler.running:
        time.sleep(0.001)
    sock.close()
    start = time.monotonic()
    server.wait_until_idle()
    assert time.monotonic() - start < 2


def test_a_full_queue_says_when_to_come_again():
    with serving(queue=0) as server:
        body = {"model": "tiny", "prompt": "x" * 20, "max_tokens": 250, "stream": True, "n": 3}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            for _ in range(20):  # the first request may have ended before the second one came
                with client.completions.create(**body) as stream:
                    next(iter(stream))
                    refused = None
                    try:
                        client.completions.create(model="tiny", prompt="x", max_tokens=1)
                    except openai.RateLimitError as error:
                        refused = error
                server.wait_until_idle()
                if refused is not None:
                    break
            assert refused is not None and "the queue is full" in str(refused)
            assert 1 <= int(refused.response.headers["retry-after"]) <= 60
            client.completions.create(model="tiny", prompt="x", max_tokens=1)


def test_a_request_that_takes_too_long_ends_with_an_error():
    with serving(seconds=0.0) as server:
        status, headers, body = server.ask(COMPLETIONS, {"model": "tiny", "prompt": "x", "max_tokens": 250})
        assert status == 504 and is_error(body) and headers["x-should-retry"] == "false"
        server.wait_until_idle()


def test_a_key_is_asked_for_where_there_is_one():
    with serving(api_key="right") as server:
        for given in (None, "Bearer wrong", "Bearer ", "right", "Basic right", "Bearer rightx", "Bearer \xff"):
            headers = {} if given is None else {"Authorization": given}
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                status, _, body = server.ask(path, headers=headers)
                assert status == 401 and is_error(body) and body["error"]["code"] == "invalid_api_key"
        status, _, _ = server.ask("/v1/models", headers={"Authorization": "Bearer right"})
        assert status == 200
        assert [server.ask(path)[0] for path in ("/", "/health", "/ready")] == [200, 200, 200]


def test_requests_have_ids_and_logs_hold_no_prompts(server, caplog):
    caplog.set_level("INFO", "spotlight_jax.serve")
    body = {"model": "tiny", "prompt": "a secret prompt", "max_tokens": 2}
    _, headers, reply = server.ask(COMPLETIONS, body, {"X-Request-ID": "mine-1"})
    assert headers["x-request-id"] == "mine-1" and reply["id"] == "cmpl-mine-1"
    _, headers, _ = server.ask(COMPLETIONS, body, {"X-Request-ID": "bad id\x01"})
    assert len(headers["x-request-id"]) == 32
    time.sleep(0.05)
    assert "mine-1" in caplog.text and "15 prompt tokens" in caplog.text and "secret" not in caplog.text


def test_metrics_count_what_happened():
    with serving() as server:
        body = {"model": "tiny", "prompt": "x" * 100, "max_tokens": 9, "temperature": 0}
        new = sum(server.ask(COMPLETIONS, body)[2]["usage"]["completion_tokens"] for _ in range(2))
        lines = dict(
            line.rsplit(" ", 1) for line in server.ask("/metrics")[2].decode().splitlines() if not line.startswith("#")
        )
        assert float(lines["spotlight_generated_tokens_total"]) == new
        assert float(lines["spotlight_prompt_tokens_total"]) == 200
        assert float(lines["spotlight_prompt_tokens_cached_total"]) == 96
        assert float(lines["spotlight_pages_used"]) == 3
        assert float(lines["spotlight_time_to_first_token_seconds_count"]) == 2
        assert float(lines["spotlight_sequence_steps_total"]) == new - 2
        assert 0 < float(lines["spotlight_tokens_read_total"]) < float(lines["spotlight_tokens_there_total"])
