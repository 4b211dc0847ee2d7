"""Fields of a file to a dataclass: what is not of its type is named."""

import dataclasses
from typing import Literal

import pytest

from spotlight_jax.config.hashing import HashConfig, NetworkConfig, TransformConfig
from spotlight_jax.errors import InputError
from spotlight_jax.fields import read_dataclass


@dataclasses.dataclass(frozen=True)
class Inner:
    """A part."""

    sizes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    """A whole."""

    count: int
    rate: float = 0.5
    kind: Literal["a", "b", 2] = "a"
    name: str | None = None
    is_on: bool = False
    inner: Inner = Inner()


def test_fields_of_their_types_make_the_dataclass():
    fields = {"count": 3, "rate": 1, "kind": 2, "name": "x", "is_on": True, "inner": {"sizes": [1, 2]}}
    assert read_dataclass(Outer, fields) == Outer(3, 1.0, 2, "x", True, Inner((1, 2)))
    assert read_dataclass(Outer, {"count": 3, "name": None}) == Outer(3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([1], r"\[1\] is not an object with the fields of Outer"),
        ({}, "field count is missing"),
        ({"count": 1, "colour": 2}, "Outer has no field 'colour'; it has count, rate"),
        ({"count": "3"}, "field count is '3' instead of int"),
        ({"count": True}, "field count is True instead of int"),
        ({"count": 3.0}, "field count is 3.0 instead of int"),
        ({"count": 1, "rate": float("nan")}, "field rate is nan instead of float"),
        ({"count": 1, "rate": 10**400}, "field rate is 1000.* instead of float"),
        ({"count": 1, "rate": True}, "field rate is True instead of float"),
        ({"count": 1, "kind": "c"}, "field kind is 'c' instead of Literal"),
        ({"count": 1, "kind": True}, "field kind is True"),
        ({"count": 1, "name": 3}, "field name is 3"),
        ({"count": 1, "is_on": 1}, "field is_on is 1 instead of bool"),
        ({"count": 1, "inner": {"sizes": [1, "2"]}}, "field sizes is '2' instead of int"),
        ({"count": 1, "inner": 3}, "3 is not an object with the fields of Inner"),
    ],
)
def test_what_is_not_of_its_type_is_named(fields, message):
    with pytest.raises(InputError, match=message) as error:
        read_dataclass(Outer, fields)
    assert len(str(error.value)) < 200


def test_a_selectors_config_of_before_there_were_two_classes_is_read():
    """Files then held the fields of all forms."""
    old = {"code_bits": 64, "sums": 2, "skip": "rotation", "hidden": 128, "code_heads": "kv", "centre": True}
    assert read_dataclass(HashConfig, old | {"form": "transform"}) == TransformConfig(code_bits=64)
    assert read_dataclass(HashConfig, old | {"form": "symmetric"}) == NetworkConfig("symmetric", 64)
    with pytest.raises(InputError, match="form is 'other'"):
        read_dataclass(HashConfig, old | {"form": "other"})
    with pytest.raises(InputError, match="no field 'more'"):
        read_dataclass(HashConfig, old | {"form": "transform", "more": 1})
