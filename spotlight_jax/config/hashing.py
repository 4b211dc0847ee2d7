"""Kinds of hash functions: what is no part of a kind is no flag of it."""

import dataclasses
from typing import ClassVar, Literal

from spotlight_jax.errors import InputError

WORD_BITS = 32  # of a code's words, uint32
_WIDEST = 2**16  # hidden layer of a network


@dataclasses.dataclass(frozen=True)
class _CodeConfig:
    """Settings that all forms share."""

    form: str
    code_bits: int = 128
    """Bits per code, a multiple of 32 from 32 to 256."""
    code_heads: ClassVar[str] = "kv"  # one code per KV head, where there is no choice

    def __post_init__(self) -> None:
        """Refuse what no code can be."""
        if self.code_bits % WORD_BITS or not 32 <= self.code_bits <= 256:
            raise InputError(f"code_bits is {self.code_bits}; give a multiple of 32 from 32 to 256")

    def code_shape(self, q_heads: int, kv_heads: int) -> tuple[int, int]:
        """Return the heads and words of a token's codes in a layer with so many heads."""
        return (kv_heads if self.code_heads == "kv" else q_heads), self.code_bits // WORD_BITS

    def describe(self) -> str:
        """Return what is kept of a token, in words."""
        head = "KV" if self.code_heads == "kv" else "query"
        return f"{self.form} form, {self.code_bits} bits per {head} head and token"


@dataclasses.dataclass(frozen=True)
class TransformConfig(_CodeConfig):
    """Coordinates of keys on fitted axes in fixed point, and linear query weights."""

    form: Literal["transform"] = "transform"
    """transform: coordinates on fitted axes in fixed point, linear query weights; asymmetric: a trained network's bits
    and real query weights; symmetric: queries and keys share a network and both become bits (the paper). Each has
    flags of its own."""
    sums: Literal[1, 2] = 2
    """How a KV head's query heads score a token together: 1: all scores are added up; 2: those of one part of the heads
    are, and those of the rest, and the higher sum counts, so that a few heads are heard among many."""


@dataclasses.dataclass(frozen=True)
class NetworkConfig(_CodeConfig):
    """Signs of a trained network's outputs."""

    form: Literal["asymmetric", "symmetric"] = "asymmetric"
    """asymmetric: a trained network's bits and real query weights; symmetric: queries and keys share a network and both
    become bits (the paper); transform: coordinates on fitted axes in fixed point. Each has flags of its own."""
    skip: Literal["none", "layers", "rotation"] = "rotation"
    """What is added to a network: nothing (the paper), an identity around each of its two layers (the released code),
    or a trained rotation with the network's last layer at zero, so that step 0 is orthogonal LSH."""
    hidden: int = 128
    """Width of a network's hidden layer."""
    code_heads: Literal["kv", "query"] = "kv"  # type: ignore[misc]
    """One key code per KV head, or one per query head (the paper)."""
    centre: bool = True
    """Hash keys relative to their mean, each dimension scaled so that its spread is equal on both sides of the dot
    product (measured on the first training windows), instead of keys and queries as they are."""

    def __post_init__(self) -> None:
        """Refuse what no hash function can be built from."""
        super().__post_init__()
        if not 1 <= self.hidden <= _WIDEST:
            raise InputError(f"hidden is {self.hidden}; give a width from 1 to {_WIDEST}")
        if self.form != "symmetric" and self.code_heads == "query":
            raise InputError(f"the {self.form} form keeps one code per KV head; give --hash.code-heads kv")


HashConfig = TransformConfig | NetworkConfig
FORMS: dict[str, type[HashConfig]] = {
    "transform": TransformConfig,
    "asymmetric": NetworkConfig,
    "symmetric": NetworkConfig,
}
