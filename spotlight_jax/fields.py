"""Fields that a file holds, to a frozen dataclass: every name and type is checked before anything is made of them."""

import dataclasses
import types
import typing
from typing import Any, TypeVar

from spotlight_jax.errors import InputError

Config = TypeVar("Config")


def read_dataclass(kind: type[Config] | types.UnionType, fields: object) -> Config:
    """Read a dataclass, one of several, from the fields of a JSON or YAML object; lists stand for tuples.

    Raises InputError naming a field that is unknown, missing, or not of its type. The class checks its own ranges.
    """
    chosen, fields = pick_class(kind, fields)
    if not isinstance(fields, dict):
        raise InputError(f"{_quote(fields)} is not an object with the fields of {chosen.__name__}")
    known = {field.name: field for field in dataclasses.fields(chosen)}
    if unknown := [name for name in fields if name not in known]:
        raise InputError(f"{chosen.__name__} has no field {_quote(unknown[0])}; it has {', '.join(known)}")
    hints = typing.get_type_hints(chosen)
    required = [name for name, field in known.items() if field.default is field.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in fields]:
        raise InputError(f"field {missing[0]} is missing")
    return chosen(**{name: _read(value, hints[name], name) for name, value in fields.items()})


def classes_of(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union; a type alone is the only one of its own."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def is_config(kind: Any) -> bool:
    """Whether a field's type is a dataclass, or a union of dataclasses."""
    return all(map(dataclasses.is_dataclass, classes_of(kind)))


def pick_class(kind: Any, fields: Any) -> tuple[Any, Any]:
    """Return the class of a union that an object is of, and the object without what belongs to the others alone.

    A field whose Literal differs from class to class says which; among several, it is the largest whose fields are all
    there, or else the first. Files of before there was the union hold the fields of all of its classes.
    """
    classes = classes_of(kind)
    if len(classes) == 1 or not isinstance(fields, dict):
        return classes[0], fields
    hints = [typing.get_type_hints(each) for each in classes]
    names = [{field.name for field in dataclasses.fields(each)} for each in classes]
    tags = [name for name in set.intersection(*names) if any(own[name] != hints[0][name] for own in hints)]
    fit = [at for at, own in enumerate(hints) if all(fields.get(tag) in typing.get_args(own[tag]) for tag in tags)]
    whole = [at for at in fit if names[at] <= set(fields)]
    chosen = max(whole, key=lambda at: len(names[at])) if whole else (fit or [0])[0]
    others = set().union(*names) - names[chosen]
    return classes[chosen], {name: value for name, value in fields.items() if name not in others}


def _read(value: object, kind: Any, name: str) -> Any:
    """Return a value as its field's type wants it; raises InputError naming the field."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if len(inner) and inner == classes_of(kind):
        for option in inner:
            try:
                return _read(value, option, name)
            except InputError:
                continue
    elif origin is typing.Literal:
        if any(value == option and type(value) is type(option) for option in inner):
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(_read(entry, inner[0], name) for entry in value)
    elif dataclasses.is_dataclass(kind):
        return read_dataclass(typing.cast(type, kind), value)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300:
        return float(value)
    elif isinstance(kind, type) and type(value) is kind and kind is not float:
        return value
    wanted = getattr(kind, "__name__", None) if origin is None else str(kind).replace("typing.", "")
    raise InputError(f"field {name} is {_quote(value)} instead of {wanted}")


def _quote(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} ..."
