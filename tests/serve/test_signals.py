"""SIGTERM under load, at random moments: every stream ends in words, and no character is cut."""

import http.client
import json
import random
import signal
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spotlight_jax.serve.run import AFTER_DRAIN
from tests.byte_tokenizer import byte_tokenizer
from tests.models.tiny import write_folder
from tests.serve.running import serving_process
from tests.serve.test_command import CONFIG

TEXT = "é€日😀"  # twelve bytes, no two of them alike, and so twelve tokens that a model can go round and round
STREAMS = 6


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model that writes `TEXT` again and again: its layers add nothing, and its head knows what follows a byte."""
    folder = tmp_path_factory.mktemp("model") / "cycle"
    write_folder(folder, CONFIG)
    (file,) = folder.glob("*.safetensors")
    weights = {name: np.zeros_like(weight) for name, weight in load_file(file).items()}
    raw = TEXT.encode()
    for place, byte in enumerate(raw):
        weights["model.embed_tokens.weight"][byte, place] = 1
        weights["lm_head.weight"][raw[(place + 1) % len(raw)], place] = 1
    weights["model.norm.weight"][:] = 1
    save_file(weights, file)
    byte_tokenizer().save_pretrained(folder)
    return folder


def follow(url, prompt, has_begun, ends, number):
    """Read one stream to its end: the pieces of its text, how it ended, and when."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    body = {"model": "cycle", "prompt": prompt, "max_tokens": 300, "stream": True, "temperature": 0}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    has_begun.release()
    texts, end = [], None
    for event in reply.read().decode("utf-8").split("\n\n"):
        data = event.removeprefix("data: ")
        if not data or data == "[DONE]":
            continue
        found = json.loads(data)
        assert end is None, "nothing follows a stream's end"
        if "error" in found:
            end = found["error"]["code"]
        else:
            (choice,) = found["choices"]
            texts.append(choice["text"])
            end = choice["finish_reason"]
    ends[number] = texts, end, time.monotonic()
    connection.close()


@pytest.mark.parametrize(("drain", "seed"), [(0.1, 0), (0.3, 1), (20.0, 2)])
def test_a_signal_cuts_no_character(model_folder, drain, seed):
    draw, ends, has_begun = random.Random(seed), {}, threading.Semaphore(0)
    with serving_process(model_folder, "--slots", "3", "--context", "400", "--drain", str(drain)) as process:
        prompts = [TEXT * draw.randint(1, 5) + TEXT[: draw.randrange(4)] for _ in range(STREAMS)]
        threads = [
            threading.Thread(target=follow, args=(process.url, prompt, has_begun, ends, number))
            for number, prompt in enumerate(prompts)
        ]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert has_begun.acquire(timeout=60)
        time.sleep(draw.random() / 4)
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        _, errors = process.communicate(timeout=60)
        for thread in threads:
            thread.join(60)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert set(ends) == set(range(STREAMS))
    for number, prompt in enumerate(prompts):
        texts, end, when = ends[number]
        assert when - start < drain + AFTER_DRAIN
        text = "".join(texts)
        for piece in texts:
            assert "\ufffd" not in piece and piece.encode("utf-8").decode("utf-8") == piece
        follows = TEXT[len(prompt) % len(TEXT) :] + TEXT * 300
        assert text == follows[: len(text)]
        assert end in ("length", "stopping")
        assert (end == "length") == (len(text.encode()) == 300)
    if drain < 1:
        assert "stopping" in {end for _, end, _ in ends.values()}
    else:
        assert "length" in {end for _, end, _ in ends.values()}
