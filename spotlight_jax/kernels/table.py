"""All ops: how each is called, its shapes of real models, its implementations: what tests check and `eval` times."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, get_args

from spotlight_jax.kernels import hash_append, match_score, pair_cost, score_select, select_top, sparse_attention
from spotlight_jax.kernels.hash_append.cases import CASES as HASH_APPEND
from spotlight_jax.kernels.match_score.cases import CASES as MATCH_SCORE
from spotlight_jax.kernels.pair_cost.cases import CASES as PAIR_COST
from spotlight_jax.kernels.score_select.cases import CASES as SCORE_SELECT
from spotlight_jax.kernels.select_top.cases import CASES as SELECT_TOP
from spotlight_jax.kernels.sparse_attention.cases import CASES as SPARSE_ATTENTION
from spotlight_jax.kernels.sparse_attention.cases import ESTIMATED_CASES


@dataclasses.dataclass(frozen=True)
class Op:
    """One op; `run(*arrays, impl=..., **static)` with what a case's `draw` gives."""

    run: Callable[..., Any]
    cases: Sequence[Any]
    impl: Any  # the type of `impl`: a Literal of all names
    choose: Callable[[Any], str]  # what `auto` takes for a case

    @property
    def plain(self) -> tuple[str, ...]:
        """Implementations other than the reference that run on any device."""
        return tuple(name for name in get_args(self.impl) if name not in ("auto", "reference", "pallas_triton"))

    def implementations(self, case: Any) -> tuple[str, ...]:
        """Return the plain implementations of a case, and what `auto` takes for it here."""
        return tuple(dict.fromkeys((*self.plain, self.choose(case))))


OPS: dict[str, Op] = {
    "match_score": Op(
        match_score.match_score,
        MATCH_SCORE,
        match_score.MatchScoreImpl,
        lambda case: match_score.choose_impl(case.q_len),
    ),
    "select_top": Op(
        select_top.select_top, SELECT_TOP, select_top.SelectTopImpl, lambda case: select_top.choose_impl()
    ),
    "score_select": Op(
        score_select.score_select,
        SCORE_SELECT,
        score_select.ScoreSelectImpl,
        lambda case: score_select.choose_impl(case.bounds),
    ),
    "sparse_attention": Op(
        sparse_attention.sparse_attention,
        SPARSE_ATTENTION,
        sparse_attention.SparseAttentionImpl,
        lambda case: sparse_attention.choose_impl(),
    ),
    "estimated_attention": Op(
        sparse_attention.estimated_attention,
        ESTIMATED_CASES,
        sparse_attention.SparseAttentionImpl,
        lambda case: sparse_attention.choose_estimated_impl(),
    ),
    "hash_append": Op(
        hash_append.hash_append, HASH_APPEND, hash_append.HashAppendImpl, lambda case: hash_append.choose_impl()
    ),
    "pair_cost": Op(pair_cost.pair_sums, PAIR_COST, pair_cost.PairCostImpl, lambda case: pair_cost.choose_impl()),
}
