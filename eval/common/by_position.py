"""Quality by position in the sequence: buckets of positions, and means over the queries that lie in each."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from spotlight_jax.errors import InputError

WIDEST = 4096  # positions in a bucket
FEWEST = 4  # whole buckets of a sequence, where it has as many positions

Row = dict[str, Any]
Bucket = dict[str, Any]  # {"from": first position, "to": the one after the last, "queries": how many, NAME: mean, ...}


def bucket_width(length: int) -> int:
    """Return the positions in a bucket: the largest power of two that a sequence has `FEWEST` of, at most `WIDEST`."""
    return min(WIDEST, 1 << (max(length // FEWEST, 1).bit_length() - 1))


def mean_by_position(
    values: Mapping[str, Float[np.ndarray, " queries"]], positions: Int[np.ndarray, " queries"], length: int
) -> list[Bucket]:
    """Return means over the queries in each bucket of `length` tokens; buckets without a query are left out."""
    width = bucket_width(length)
    numbers = np.asarray(positions) // width
    buckets = []
    for number in np.unique(numbers):
        is_inside = numbers == number
        means = {name: float(np.mean(array[is_inside], dtype=np.float64)) for name, array in values.items()}
        ends = {"from": int(number) * width, "to": min((int(number) + 1) * width, length)}
        buckets.append({**ends, "queries": int(is_inside.sum()), **means})
    return buckets


def buckets_of(row: Row) -> list[Bucket]:
    """Return a row's `by_position`; raises InputError where a resumed run was measured before there was one."""
    if "by_position" not in row:
        raise InputError("an older version began this run and measured nothing by position; give another --out")
    return row["by_position"]


def combine_buckets(
    rows: Sequence[Sequence[Bucket]], names: Sequence[str], weights: Sequence[float] | None = None
) -> list[Bucket]:
    """Combine the buckets of several sequences or texts.

    Args:
        names: of the means.
        weights: of each row; None: in each bucket, its number of queries.
    """
    found: dict[tuple[int, int], list[tuple[float, Bucket]]] = {}
    for number, buckets in enumerate(rows):
        for bucket in buckets:
            weight = bucket["queries"] if weights is None else weights[number]
            found.setdefault((bucket["from"], bucket["to"]), []).append((weight, bucket))
    combined = []
    for (start, end), group in sorted(found.items()):
        shares = [weight for weight, _ in group]
        means = {name: float(np.average([bucket[name] for _, bucket in group], weights=shares)) for name in names}
        combined.append({"from": start, "to": end, "queries": sum(bucket["queries"] for _, bucket in group), **means})
    return combined
