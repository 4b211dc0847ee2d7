"""How many devices a model is spread over, and along which axes."""

from collections.abc import Sequence

from spotlight_jax.errors import InputError

# data: sequences of a batch. model: KV heads with their query heads, the MLP's width, the vocabulary.
# context: the cached tokens of each sequence.
AXES = ("data", "model", "context")


def parse_mesh(given: Sequence[str]) -> dict[str, int]:
    """Return the devices along each axis that `--mesh` names, such as `data=2 model=4`; nothing for none.

    Raises: InputError for an unknown axis, one that is named twice, or what is no number of devices.
    """
    sizes: dict[str, int] = {}
    for part in (part for text in given for part in text.split(",")):
        axis, _, count = part.partition("=")
        if axis not in AXES:
            raise InputError(f"--mesh has no axis '{axis}'; give some of {', '.join(AXES)}, such as model=2")
        if axis in sizes:
            raise InputError(f"--mesh names axis '{axis}' twice; give each once")
        if not count.isdecimal() or not 1 <= int(count) <= 2**16:
            raise InputError(f"--mesh {part} names no number of devices; give one of at least 1, such as {axis}=2")
        sizes[axis] = int(count)
    return sizes


def describe_mesh(sizes: dict[str, int]) -> str:
    """Return the axes as the flag names them."""
    return " ".join(f"{axis}={count}" for axis, count in sizes.items())
