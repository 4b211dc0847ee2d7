"""Ten minutes of requests that come, go and are cut off: the server's memory has no slope. `make soak`."""

import contextlib
import dataclasses
import http.client
import json
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.checkpoint import Selector, save_selector
from spotlight_jax.tail import init_tail
from tests.byte_tokenizer import byte_tokenizer
from tests.hash_params import draw_params
from tests.models.tiny import write_folder
from tests.serve.running import serving_process
from tests.serve.test_command import CONFIG

SECONDS, BETWEEN, CLIENTS = 600.0, 2.0, 6
# A request of which anything stays leaves at least its prompt's ids and its text, 4 KiB: 1 MiB a minute of the 250 that
# a busy machine manages. The error of a fit is a hundredth of that.
MOST_SLOPE = 0.5  # MiB a minute


def slope(times, sizes):
    """Growth per unit of time by a linear fit, and its standard error."""
    times, sizes = np.asarray(times), np.asarray(sizes)
    (rate, _), residuals, *_ = np.linalg.lstsq(np.stack([times, np.ones_like(times)], axis=1), sizes)
    variance = float(residuals[0]) / (len(times) - 2) if len(residuals) else 0.0
    return float(rate), (variance / float(np.sum((times - times.mean()) ** 2))) ** 0.5


@pytest.mark.parametrize("rate", [0.0, 0.3, 3.0])
def test_the_fit_finds_the_slope_of_noisy_memory(rate):
    times = np.linspace(3, 10, 200)
    found, error = slope(times, 300 + rate * times + np.random.default_rng(0).normal(0, 0.5, 200))
    assert abs(found - rate) < 4 * error < 0.2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model, and a selector for it."""
    folder = tmp_path_factory.mktemp("soak")
    cfg = write_folder(folder / "tiny", CONFIG)
    byte_tokenizer().save_pretrained(folder / "tiny")
    shape = HeadShape(cfg.layers, cfg.q_heads, cfg.kv_heads, cfg.head_dim)
    functions = draw_params(TransformConfig(code_bits=64), shape)
    functions = dataclasses.replace(functions, tail=init_tail(cfg.layers, cfg.q_heads))
    save_selector(folder / "selector", Selector(shape, functions, "tiny", {}), "card")
    return folder / "tiny", folder / "selector"


def resident(pid):
    """MiB of memory that a process holds."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def keep_asking(port, seed, has_ended, counts):
    """Requests of all kinds one after the other; of every three streams one is cut off, and some are refused.

    Prompts are token ids: tokenizers remember up to 10,000 words, and a text of random bytes is a new one (4.2 KiB).
    """
    draw = random.Random(seed)
    while not has_ended.is_set():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        body = {
            "model": "tiny", "prompt": [draw.randrange(256) for _ in range(draw.randint(1, 250))],
            "max_tokens": draw.randint(1, 90), "stream": draw.random() < 0.6, "seed": draw.randrange(1000),
            "dense": draw.random() < 0.3, "logprobs": draw.choice([None, 3]), "temperature": draw.choice([0, 1]),
        }  # fmt: skip
        if draw.random() < 0.1:
            body["max_tokens"] = "many"
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        assert reply.status == (400 if body["max_tokens"] == "many" else 200)
        if body["stream"] and draw.random() < 1 / 3:
            reply.read(draw.randint(1, 2_000))
            reply.close()
            counts["cut"] += 1
        else:
            reply.read()
            counts["whole"] += 1
        connection.close()


def read_away(log):
    """What the server logs has to go somewhere."""
    with contextlib.suppress(ValueError):  # closed with the process
        for _ in log:
            pass


@pytest.mark.soak
def test_memory_has_no_slope(folders):
    model, selector = folders
    sparse = "--keep", "0.2", "--min-tokens", "5", "--min-context", "40", "--dense-layers", "0"
    with serving_process(model, "--selector", str(selector), "--slots", "3", "--context", "400", *sparse) as process:
        threading.Thread(target=read_away, args=(process.stderr,), daemon=True).start()
        port, has_ended, counts = int(process.url.rpartition(":")[2]), threading.Event(), {"cut": 0, "whole": 0}
        clients = [
            threading.Thread(target=keep_asking, args=(port, seed, has_ended, counts)) for seed in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        times, sizes, start = [], [], time.monotonic()
        while time.monotonic() - start < SECONDS:
            time.sleep(BETWEEN)
            times.append((time.monotonic() - start) / 60)
            sizes.append(resident(process.pid))
        has_ended.set()
        for client in clients:
            client.join(120)
    first = int(0.3 * len(times))
    rate, error = slope(times[first:], sizes[first:])
    print(
        f"{counts['whole']} whole and {counts['cut']} cut requests; {sizes[0]:.0f} MiB at first, "
        f"{sizes[first]:.0f} after {times[first]:.1f} min, {sizes[-1]:.0f} at the end; "
        f"slope {rate:.3f} +- {error:.3f} MiB/min"
    )
    assert min(counts.values()) > 100
    assert rate < MOST_SLOPE, (rate, error)
