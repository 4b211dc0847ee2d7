"""Damage: bytes that are cut, flipped and overwritten; JSON values that are replaced by others of any type."""

import copy
import json
from typing import Any

import numpy as np

Rng = np.random.Generator

_NUMBERS = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
STRANGE_TEXTS = (
    "", " ", "\x00", "a\nb", "\u2028", "\x1b[31mred", "\ud800", "\udc80x", "e\u0301", "\U0001f600" * 9, "x" * 5000,
    "../up", "/etc/passwd", "{{", "%s", "nan", "true", "1e999", "-1", "llama",
)  # fmt: skip


def damage_bytes(rng: Rng, data: bytes) -> bytes:
    """A copy with one to four damages, each anywhere, but the first 4,096 bytes more often than their share."""
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        size = len(damaged)
        if not size:
            break
        at = int(rng.integers(0, size if rng.random() < 0.5 else min(size, 4096)))
        match int(rng.integers(0, 7)):
            case 0:
                damaged[at] ^= 1 << int(rng.integers(0, 8))
            case 1:
                damaged[at] = int(rng.integers(0, 256))
            case 2:
                width = int(rng.choice([1, 2, 4, 8]))
                value = int(_NUMBERS[rng.integers(0, len(_NUMBERS))]) % (1 << 8 * width)
                damaged[at : at + width] = value.to_bytes(width, "little")
            case 3:
                del damaged[at : at + int(rng.integers(1, 33))]
            case 4:
                damaged[at:at] = rng.bytes(int(rng.integers(1, 17)))
            case 5:
                start = int(rng.integers(0, size))
                damaged[at:at] = damaged[start : start + int(rng.integers(1, 65))]
            case 6:
                del damaged[at:]
    return bytes(damaged)


def strange_value(rng: Rng, deep: bool = True) -> Any:
    """A JSON value that nobody expects."""
    match int(rng.integers(0, 9 if deep else 7)):
        case 0:
            return STRANGE_TEXTS[rng.integers(0, len(STRANGE_TEXTS))]
        case 1:
            return int(_NUMBERS[rng.integers(0, len(_NUMBERS))]) * int(rng.choice([1, -1]))
        case 2:
            return float(rng.choice([float("nan"), float("inf"), -float("inf"), -0.0, 1e308, 1e-308, 0.5, -1.5]))
        case 3:
            return bool(rng.integers(0, 2))
        case 4:
            return None
        case 5:
            return 10 ** int(rng.integers(1, 4000))
        case 6:
            return [] if rng.random() < 0.5 else {}
        case 7:
            return [strange_value(rng, deep=False) for _ in range(int(rng.integers(1, 5)))]
        case _:
            names = STRANGE_TEXTS[: int(rng.integers(1, 5))]
            return {name: strange_value(rng, deep=False) for name in names}


def damage_json(rng: Rng, value: Any) -> Any:
    """A copy in which one to three values, at any depth, are replaced, removed or added."""
    damaged = copy.deepcopy(value)
    for _ in range(int(rng.integers(1, 4))):
        holder: Any = damaged
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = keys[int(rng.integers(0, len(keys)))]
            inner = holder[key]
            if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
                holder = inner
                continue
            action = rng.random()
            if action < 0.75:
                holder[key] = strange_value(rng)
            elif action < 0.9:
                del holder[key]
            elif isinstance(holder, dict):
                holder[STRANGE_TEXTS[rng.integers(0, len(STRANGE_TEXTS))]] = strange_value(rng)
            else:
                holder.insert(key, strange_value(rng))
            break
    return damaged


def json_bytes(rng: Rng, value: Any) -> bytes:
    """A JSON file of a damaged value; sometimes its bytes are damaged too, or it is nested without end."""
    draw = rng.random()
    if draw < 0.02:
        return b"[" * 200_000
    if draw < 0.04:
        return b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    data = json.dumps(damage_json(rng, value) if draw < 0.85 else value).encode()
    return damage_bytes(rng, data) if draw > 0.75 else data
