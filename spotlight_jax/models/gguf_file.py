"""Reading a GGUF file: its metadata, and where each tensor's bytes lie.

The header is parsed here rather than by the `gguf` package's reader: that one makes several small arrays for every
vocabulary entry (seconds for a real tokenizer) and does not say that a file is cut short. Layout: the GGUF
specification, versions 2 and 3, little-endian.
"""

import dataclasses
import math
import os
import pathlib
import struct
from typing import Any

import gguf
import numpy as np

from spotlight_jax.errors import InputError

_SCALARS = {
    gguf.GGUFValueType.UINT8: "B",
    gguf.GGUFValueType.INT8: "b",
    gguf.GGUFValueType.UINT16: "H",
    gguf.GGUFValueType.INT16: "h",
    gguf.GGUFValueType.UINT32: "I",
    gguf.GGUFValueType.INT32: "i",
    gguf.GGUFValueType.UINT64: "Q",
    gguf.GGUFValueType.INT64: "q",
    gguf.GGUFValueType.FLOAT32: "f",
    gguf.GGUFValueType.FLOAT64: "d",
    gguf.GGUFValueType.BOOL: "?",
}
_LEAST_BYTES = 8  # of a string, an array, a field or a tensor's header: the length that each begins with
_DEEPEST = 4  # arrays within arrays
# Exact or block formats whose dequantisation is a plain formula; codebook and ternary ones are refused by name.
QUANTISATIONS = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor's place in the file; `shape` is row-major (the reverse of GGUF's order)."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """An opened GGUF file; tensors are read from disk one by one."""

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Read one tensor as float32, or some rows (its first axis) of one, dequantised by the `gguf` package.

        Raises InputError naming the quantisation when it is not one of `QUANTISATIONS`.
        """
        info = self.tensors[name]
        if info.kind.name not in QUANTISATIONS:
            raise InputError(
                f"{self.path}: tensor {name} is quantised as {info.kind.name}, which is not supported; "
                f"supported: {', '.join(QUANTISATIONS)}"
            )
        first, end, _ = rows.indices(info.shape[0]) if len(info.shape) > 1 else (0, 1, 1)
        shape = (end - first, *info.shape[1:]) if len(info.shape) > 1 else info.shape
        row_bytes = info.nbytes // math.prod(info.shape[:-1])
        skipped, size = (count * math.prod(info.shape[1:-1]) * row_bytes for count in (first, end - first))
        data = np.fromfile(self.path, np.uint8, size, offset=info.start + skipped).reshape(*shape[:-1], row_bytes)
        if info.kind == gguf.GGMLQuantizationType.F32:
            return data.view(np.float32)
        if info.kind == gguf.GGMLQuantizationType.F16:
            return data.view(np.float16).astype(np.float32)
        return gguf.quants.dequantize(data, info.kind).reshape(shape)


class _BrokenError(Exception):
    """The header cannot be read; the message says why."""


class _Cursor:
    """Bounds-checked reading of the header."""

    def __init__(self, data: np.memmap) -> None:
        self.data, self.at = data.data, 0

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise _BrokenError("it ends within its header")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        try:
            return bytes(self.take(self.number("Q"))).decode("utf-8")
        except UnicodeDecodeError:
            raise _BrokenError("a string in its header is not UTF-8") from None

    def count(self, least: int) -> int:
        """Read how many items of at least so many bytes follow; no more than the rest of the file has room for."""
        found = self.number("Q")
        if found > (len(self.data) - self.at) // least:
            raise _BrokenError("it ends within its header")
        return found

    def texts(self) -> list[str]:
        """Read an array of strings, such as a vocabulary, of which none costs a call of ours."""
        count, length = self.count(_LEAST_BYTES), struct.Struct("<Q")
        data, at, found = self.data, self.at, []
        try:
            for _ in range(count):
                start = at + length.size
                at = start + length.unpack_from(data, at)[0]
                if at > len(data):
                    raise _BrokenError("it ends within its header")
                found.append(str(data[start:at], "utf-8"))
        except struct.error:
            raise _BrokenError("it ends within its header") from None
        except UnicodeDecodeError:
            raise _BrokenError("a string in its header is not UTF-8") from None
        self.at = at
        return found

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == gguf.GGUFValueType.STRING:
            return self.text()
        if kind == gguf.GGUFValueType.ARRAY:
            inner = self.number("I")
            if inner in _SCALARS:
                code = f"<{_SCALARS[gguf.GGUFValueType(inner)]}"
                count = self.count(struct.calcsize(code))
                return np.frombuffer(self.take(count * struct.calcsize(code)), code).tolist()
            if inner == gguf.GGUFValueType.STRING:
                return self.texts()
            if depth == _DEEPEST:
                raise _BrokenError(f"a metadata field nests arrays more than {_DEEPEST} deep")
            return [self.value(inner, depth + 1) for _ in range(self.count(_LEAST_BYTES))]
        if kind not in _SCALARS:
            raise _BrokenError(f"a metadata field has the unknown type {kind}")
        return self.number(_SCALARS[gguf.GGUFValueType(kind)])


def open_gguf(path: pathlib.Path) -> GgufFile:
    """Parse the header and check that every tensor lies within the file.

    Raises InputError when the file is missing, is not GGUF, or is truncated or corrupt.
    """
    if not os.path.isfile(path):  # also a name too long for a file
        raise InputError(f"{path}: no such file")
    if path.stat().st_size < 24:
        raise InputError(f"{path}: not a GGUF file, or truncated ({path.stat().st_size} bytes); fetch it again")
    data = np.memmap(path, np.uint8, mode="r")
    try:
        return _parse(path, _Cursor(data), data.size)
    except _BrokenError as broken:
        raise InputError(f"{path}: truncated or corrupt GGUF file ({broken}); fetch it again") from None


def _parse(path: pathlib.Path, cursor: _Cursor, size: int) -> GgufFile:
    if bytes(cursor.take(4)) != b"GGUF":
        raise InputError(f"{path}: not a GGUF file (it does not start with 'GGUF')")
    version = cursor.number("I")
    if version not in (2, 3):
        raise InputError(f"{path}: GGUF version {version} is not supported; supported: 2 and 3, little-endian")
    tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
    if max(tensor_count, field_count) > size // _LEAST_BYTES:
        raise _BrokenError("it ends within its header")
    metadata = {}
    for _ in range(field_count):
        name = cursor.text()
        metadata[name] = cursor.value(cursor.number("I"))
    headers = [_tensor_header(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment < 1:
        raise _BrokenError(f"its alignment is {alignment!r}")
    base = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in headers:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise _BrokenError(f"tensor {name} of shape {shape} does not fit blocks of {block}")
        nbytes = math.prod(shape) // block * block_bytes
        if base + offset + nbytes > size:
            raise _BrokenError(f"tensor {name} ends at byte {base + offset + nbytes}, the file at {size}")
        tensors[name] = TensorInfo(name, shape, kind, base + offset, nbytes)
    return GgufFile(path, metadata, tensors)


def _tensor_header(cursor: _Cursor) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
    name, dims = cursor.text(), cursor.number("I")
    if not 1 <= dims <= 4:
        raise _BrokenError(f"tensor {name!r} has {dims} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
    kind = cursor.number("I")
    if 0 in shape:
        raise _BrokenError(f"tensor {name!r} has the empty shape {shape}")
    if kind not in gguf.GGMLQuantizationType._value2member_map_:
        raise _BrokenError(f"tensor {name!r} has the unknown type {kind}")
    return name, shape, gguf.GGMLQuantizationType(kind), cursor.number("Q")
