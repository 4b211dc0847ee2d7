"""Buckets of positions, and the means over the queries in them, beside hand counts."""

import numpy as np
import pytest

from eval.common.by_position import bucket_width, buckets_of, combine_buckets, mean_by_position
from spotlight_jax.errors import InputError


@pytest.mark.parametrize(
    ("length", "width"),
    [(2, 1), (4, 1), (7, 1), (8, 2), (1000, 128), (1024, 256), (2048, 512), (8192, 2048), (16384, 4096),
     (32768, 4096), (131072, 4096)],
)  # fmt: skip
def test_a_bucket_is_a_power_of_two_that_fits_four_times_and_at_most_4096(length, width):
    assert bucket_width(length) == width


def test_means_are_over_the_queries_that_lie_in_a_bucket():
    values = {"a": np.array([1.0, 2.0, 4.0, 8.0]), "b": np.array([0.0, 1.0, 1.0, 0.5])}
    found = mean_by_position(values, np.array([0, 3, 4, 17]), length=18)  # buckets of four; none at 8 to 15
    assert found == [
        {"from": 0, "to": 4, "queries": 2, "a": 1.5, "b": 0.5},
        {"from": 4, "to": 8, "queries": 1, "a": 4.0, "b": 1.0},
        {"from": 16, "to": 18, "queries": 1, "a": 8.0, "b": 0.5},
    ]


def test_buckets_of_several_rows_are_weighed_by_queries_or_by_rows():
    rows = [
        [{"from": 0, "to": 4, "queries": 1, "a": 1.0}, {"from": 4, "to": 8, "queries": 2, "a": 5.0}],
        [{"from": 4, "to": 8, "queries": 6, "a": 1.0}],
    ]
    first = {"from": 0, "to": 4, "queries": 1, "a": 1.0}
    assert combine_buckets(rows, ("a",)) == [first, {"from": 4, "to": 8, "queries": 8, "a": 2.0}]
    assert combine_buckets(rows, ("a",), [1.0, 1.0]) == [first, {"from": 4, "to": 8, "queries": 8, "a": 3.0}]


def test_a_run_of_a_version_without_positions_is_refused():
    with pytest.raises(InputError, match="an older version began this run"):
        buckets_of({"method": "dense"})
