"""A server over the tiny model in a thread of the test's process, and plain HTTP to it."""

import contextlib
import http.client
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from spotlight_jax.serve.app import Limits, Service, make_app
from spotlight_jax.serve.metrics import Metrics
from spotlight_jax.serve.run import Server, listen
from spotlight_jax.serve.scheduler import Scheduler
from spotlight_jax.serve.translate import Translator
from tests.byte_tokenizer import byte_tokenizer
from tests.serve.world import make_scheduler


class Running:
    """Where the server is, and what is behind it."""

    def __init__(self, scheduler: Scheduler, server: Server, port: int) -> None:
        self.scheduler, self.server, self.port = scheduler, server, port
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path, body=None, headers=None, method=None):
        """Status, headers and JSON (or bytes) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = {} if raw is None else {"Content-Type": "application/json"}
        connection.request(method or ("GET" if raw is None else "POST"), path, raw, {**kind, **(headers or {})})
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        is_json = reply.headers.get("content-type", "").startswith("application/json")
        return reply.status, reply.headers, json.loads(content) if is_json else content

    def wait_until_idle(self, seconds=30.0):
        """Until no request is left."""
        end = time.monotonic() + seconds
        while not (self.scheduler.is_idle and self.scheduler.slots.is_done.all()):
            assert time.monotonic() < end, "requests are left over"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(is_sparse=True, api_key=None, body_bytes=100_000, body_seconds=5.0, seconds=60.0, drain=5.0, **options):
    """A server while the block runs."""
    metrics = Metrics()
    scheduler = make_scheduler(is_sparse, observer=metrics, **options)
    metrics.watch(scheduler)
    translator = Translator(byte_tokenizer(), scheduler.slots, "tiny", seconds, "demo")
    service = Service(scheduler, translator, metrics, Limits(body_bytes, body_seconds))
    listener = listen("127.0.0.1", 0)
    server = Server(make_app(service, api_key), scheduler, drain)
    scheduler.start()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Running(scheduler, server, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
        scheduler.join(30.0)
        listener.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def serving_process(model: Path, *flags: str):
    """`spotlight serve` as a process, its URL in `url`, while the block runs; killed after it."""
    command = [sys.executable, "-m", "spotlight_jax.cli", "serve", "--model", str(model), "--port", "0", *flags]
    root = Path(__file__).parent.parent.parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root) as process:
        shown = []
        for line in process.stderr:
            shown.append(line)
            if found := re.search(r"serving on (http://\S+)", line):
                process.url = found[1]
                break
        else:
            raise AssertionError("".join(shown))
        try:
            yield process
        finally:
            process.kill()
