"""Every method beside NumPy written from its paper, and laws that all of them keep."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.methods import METHODS
from eval.methods.magicpig import MagicPig
from eval.methods.opening import open_method
from spotlight_jax.config.hashing import TransformConfig
from spotlight_jax.config.selection import SelectionConfig
from spotlight_jax.errors import InputError
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.checkpoint import Selector, save_selector
from tests.hash_params import draw_params

BATCH, N, KV_HEADS, GROUP, HEAD_DIM, KV_LEN = 1, 9, 2, 3, 16, 131
Q_HEADS = KV_HEADS * GROUP
SHAPE = HeadShape(layers=2, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
POSITIONS = np.array([[0, 3, 15, 16, 40, 79, 100, 128, 130]], np.int32)
BARE = SelectionConfig(keep=0.2, min_tokens=5, dense_layers=(0,))
SINKS = dataclasses.replace(BARE, sink_tokens=4, recent_tokens=24)
# methods that choose at most a given number of tokens one by one
COUNTED = [name for name in METHODS if name not in ("dense", "quest", "magicpig")]


def draw(seed=0):
    """Queries that look at some keys much more than at others, and keys off their centre."""
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(BATCH, N, Q_HEADS, HEAD_DIM)) * 2
    keys = rng.normal(size=(BATCH, KV_LEN, KV_HEADS, HEAD_DIM)) + rng.normal(size=(KV_HEADS, HEAD_DIM))
    return queries.astype(np.float32), keys.astype(np.float32)


@functools.cache
def selector():
    cfg = TransformConfig(code_bits=64)
    return Selector(SHAPE, draw_params(cfg, SHAPE), "tiny", {})


def open_layer(name, selection=BARE, layer=1, **changes):
    method = open_method(name, selector(), selection, SHAPE, seed=3)
    return method.replace(**changes).layer(layer)


@jax.jit
def read(method, queries, keys, positions, budgets):
    index = method.index(keys, jnp.full((keys.shape[0],), keys.shape[1], jnp.int32))
    reading = method.select(queries, keys, index, positions, budgets)
    return reading.mask, reading.index_bytes, reading.log_weights


@pytest.mark.parametrize(("most", "own"), [(KV_LEN, 0), (KV_LEN - 1, 1)])
def test_spotlight_reads_by_the_set_for_the_sequences_length(most, own):
    short = draw_params(selector().cfg, SHAPE, seed=9)
    both = dataclasses.replace(selector(), positions=10**6, shorter=((most, short),))
    alone = dataclasses.replace(selector(), params=both.sets[own])
    args = (*draw(), POSITIONS, budgets_of(0.3))
    masks = [read(open_method("spotlight", one, BARE, SHAPE).layer(1), *args)[0] for one in (both, alone, selector())]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert np.array_equal(masks[0], masks[2]) == (own == 1)


def budgets_of(share, least=1):
    return np.maximum(np.minimum(POSITIONS + 1, least), np.ceil(share * (POSITIONS + 1))).astype(np.int32)


def visible():
    return (np.arange(KV_LEN) <= POSITIONS[:, :, None])[:, :, None]


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
@pytest.mark.parametrize("name", COUNTED)
def test_a_budget_is_used_up_on_tokens_up_to_the_query_itself_included(name, per):
    budgets = budgets_of(0.3)
    mask = np.asarray(read(open_layer(name, dataclasses.replace(BARE, per=per)), *draw(), POSITIONS, budgets)[0])
    heads = {"oracle-query": Q_HEADS}.get(name, KV_HEADS if per == "kv_head" else Q_HEADS)
    assert mask.shape == (BATCH, N, heads, KV_LEN)
    assert (mask.sum(-1) == budgets[:, :, None]).all()
    assert not (mask & ~visible()).any()
    assert np.take_along_axis(mask, POSITIONS[:, :, None, None], axis=3).all()


@pytest.mark.parametrize("name", [*COUNTED, "quest"])
def test_a_full_budget_reads_everything(name):
    for selection in (BARE, SINKS):
        mask = np.asarray(read(open_layer(name, selection), *draw(), POSITIONS, POSITIONS + 1)[0])
        np.testing.assert_array_equal(mask, np.broadcast_to(visible(), mask.shape))


@pytest.mark.parametrize("name", COUNTED)
def test_sinks_and_recent_tokens_are_always_read(name):
    mask = np.asarray(read(open_layer(name, SINKS), *draw(), POSITIONS, np.minimum(POSITIONS + 1, 30))[0])
    places = np.arange(KV_LEN)
    always = (places < 4) | (places > POSITIONS[:, :, None] - 24)
    assert mask[np.broadcast_to((always[:, :, None] & visible()), mask.shape)].all()


@pytest.mark.parametrize("name", [name for name in COUNTED if "centred" not in name and name != "binary"] + ["quest"])
def test_what_comes_later_changes_no_choice(name):
    """Methods that take statistics of all keys are left out: those are of the whole sequence, as published."""
    queries, keys = draw()
    chosen = read(open_layer(name), queries, keys, POSITIONS, budgets_of(0.3))[0]
    for place in range(N):
        later = keys.copy()
        later[:, POSITIONS[0, place] + 1 :] = 50.0
        again = read(open_layer(name), queries, later, POSITIONS, budgets_of(0.3))[0]
        np.testing.assert_array_equal(again[:, place], chosen[:, place])


def test_layers_have_params_of_their_own():
    for name in ("lsh", "random", "binary", "spotlight", "magicpig"):
        one, other = (read(open_layer(name, layer=layer), *draw(), POSITIONS, budgets_of(0.3))[0] for layer in (0, 1))
        assert (np.asarray(one) != np.asarray(other)).any(), name


def test_window_reads_four_sinks_and_the_newest():
    budgets = np.minimum(POSITIONS + 1, 10).astype(np.int32)
    mask = np.asarray(read(open_layer("window"), *draw(), POSITIONS, budgets)[0])[0, :, 0]
    for place, position in enumerate(POSITIONS[0]):
        expected = sorted({0, 1, 2, 3} & set(range(position + 1)) | set(range(max(0, position - 5), position + 1)))
        if position + 1 <= 10:
            expected = list(range(position + 1))
        assert np.flatnonzero(mask[place]).tolist() == expected


def best(scores, budget):
    """Positions of the highest scores, newest first among equals; the last one, the query's own, always."""
    last = len(scores) - 1
    order = sorted(range(last), key=lambda place: (-scores[place], -place))
    return sorted([last, *order[: budget - 1]])


def check_against_scores(name, scores, heads, selection=BARE):
    """`scores(head, key_position, query)` by NumPy gives the same choice."""
    queries, keys = draw()
    budgets = budgets_of(0.3)
    mask = np.asarray(read(open_layer(name, selection), queries, keys, POSITIONS, budgets)[0])
    for t, head in np.ndindex(N, heads):
        seen = POSITIONS[0, t] + 1
        expected = best(
            scores(queries[0, t].astype(np.float64), keys[0].astype(np.float64), head)[:seen], budgets[0, t]
        )
        assert np.flatnonzero(mask[0, t, head]).tolist() == expected


def test_the_oracle_reads_the_highest_dot_products():
    def per_query(queries, keys, head):
        return keys[:, head // GROUP] @ queries[head]

    def per_group(queries, keys, head):
        return keys[:, head] @ queries[head * GROUP : (head + 1) * GROUP].sum(0)

    check_against_scores("oracle-query", per_query, Q_HEADS)
    check_against_scores("oracle-scores", per_group, KV_HEADS)


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_the_oracle_by_mass_reads_the_highest_probabilities_of_its_heads_together(per):
    (queries, keys), budgets = draw(), budgets_of(0.3)
    mask = np.asarray(
        read(open_layer("oracle-mass", dataclasses.replace(BARE, per=per)), *draw(), POSITIONS, budgets)[0]
    )
    together = GROUP if per == "kv_head" else 1
    for t, head in np.ndindex(N, mask.shape[2]):
        shares = 0.0
        for query_head in range(head * together, (head + 1) * together):
            own = keys[0, : POSITIONS[0, t] + 1, query_head // GROUP].astype(np.float64)
            exps = np.exp(own @ queries[0, t, query_head] / np.sqrt(HEAD_DIM))
            shares = shares + exps / exps.sum()
        assert np.flatnonzero(mask[0, t, head]).tolist() == best(shares, budgets[0, t])


def test_spotlight_weighs_digits_of_fitted_coordinates_by_the_higher_of_two_sums():
    params = open_layer("spotlight").params
    decode, gains = (
        np.asarray(leaf, np.float64) for leaf in (params.weights.bit_weights, jnp.exp(params.weights.log_head_scale))
    )
    quantizer = {name: np.asarray(leaf, np.float64) for name, leaf in vars(params.stats).items()}

    def weighed(queries, keys, head):
        places = quantizer["levels"][head] * ((keys[:, head] - quantizer["mean"][head]) @ quantizer["axes"][head] + 0.5)
        bits = np.clip(np.floor(places), 0, quantizer["levels"][head] - 1) % 2
        own = slice(head * GROUP, (head + 1) * GROUP)
        real = quantizer["head_assignment"][head] @ (gains[own, None] * queries[own] @ decode[head])
        real /= np.linalg.norm(real, axis=1, keepdims=True)
        weights = np.round(real * min(127 / np.abs(real).max(), (1020 - 32) / np.abs(real).sum(1).max()))
        return (bits @ weights.T - weights.sum(1) // 2).max(1)

    check_against_scores("spotlight", weighed, KV_HEADS)


@pytest.mark.parametrize("name", ["lsh", "lsh-gaussian", "lsh-centred", "lsh-gaussian-centred"])
def test_lsh_counts_equal_signs(name):
    planes = np.asarray(open_layer(name).params.weights.keys.rotation, np.float64)  # [kv_heads, head_dim, bits]
    if "gaussian" not in name:  # blocks of orthogonal planes
        block = planes[0][:, :HEAD_DIM]
        np.testing.assert_allclose(block.T @ block, np.eye(HEAD_DIM), atol=1e-5)

    def equal_signs(queries, keys, head):
        own = keys[:, head // GROUP]
        if "centred" in name:
            own = own - own.mean(0)
        mine, theirs = queries[head] @ planes[head // GROUP] > 0, own @ planes[head // GROUP] > 0
        return (mine == theirs).sum(-1)

    check_against_scores(name, equal_signs, Q_HEADS, dataclasses.replace(BARE, per="query_head"))


def test_binary_weighs_signs_of_standardised_keys_by_the_rotated_query():
    weights = open_layer("binary").params.weights
    planes = np.asarray(weights.keys.rotation, np.float64)
    np.testing.assert_array_equal(weights.queries.rotation[2], weights.keys.rotation[0])  # of the same group

    def weighed(queries, keys, head):
        own = keys[:, head // GROUP]
        mean, spread = own.mean(0), own.std(0)
        group = queries.reshape(KV_HEADS, GROUP, HEAD_DIM)[head // GROUP] * spread
        query = queries[head] * spread / np.sqrt((group**2).mean())
        real = query @ planes[head // GROUP]
        quantised = np.round(real * min(127 / np.abs(real).max(), (1020 - 32) / np.abs(real).sum()))
        return ((own - mean) / spread @ planes[head // GROUP] > 0) @ quantised

    check_against_scores("binary", weighed, Q_HEADS, dataclasses.replace(BARE, per="query_head"))


def quest_by_hand(queries, keys, position, budget, heads, page=16):
    """Tokens that the query heads `heads` of one KV head read together, from the paper: pages by their upper bound."""
    own = position // page
    bounds = []
    for number in range(own):
        least = keys[number * page : (number + 1) * page].min(0)
        greatest = keys[number * page : (number + 1) * page].max(0)
        bounds.append(sum(np.maximum(queries[head] * least, queries[head] * greatest).sum() for head in heads))
    chosen = [own]
    left = budget - (position % page + 1)
    for number in sorted(range(own), key=lambda number: -bounds[number]):
        if left >= page:
            chosen.append(number)
            left -= page
    return sorted(
        token for number in chosen for token in range(number * page, (number + 1) * page) if token <= position
    )


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_quest_reads_the_pages_of_the_highest_bounds_within_the_budget(per):
    queries, keys = draw()
    budgets = np.minimum(POSITIONS + 1, np.array([[9, 9, 20, 20, 30, 40, 50, 66, 70]], np.int32))
    mask, index_bytes, _ = read(
        open_layer("quest", dataclasses.replace(BARE, per=per)), queries, keys, POSITIONS, budgets
    )
    for t, head in np.ndindex(N, mask.shape[2]):
        kv_head = head if per == "kv_head" else head // GROUP
        heads = range(head * GROUP, (head + 1) * GROUP) if per == "kv_head" else [head]
        expected = quest_by_hand(
            queries[0, t].astype(np.float64),
            keys[0, :, kv_head].astype(np.float64),
            POSITIONS[0, t],
            budgets[0, t],
            heads,
        )
        assert np.flatnonzero(np.asarray(mask)[0, t, head]).tolist() == expected
        assert len(expected) <= max(budgets[0, t], POSITIONS[0, t] % 16 + 1)
    pages = POSITIONS[0] // 16 + 1  # a least and a greatest key each, float32, of every KV head
    np.testing.assert_array_equal(index_bytes[0], pages * 2 * HEAD_DIM * 4 * KV_HEADS)


def test_quest_brings_whole_pages_of_sinks_and_recent_tokens_first():
    budgets = np.full((1, N), 16 + 16 + 32, np.int32)
    mask = np.asarray(read(open_layer("quest", SINKS), *draw(), POSITIONS, np.minimum(budgets, POSITIONS + 1))[0])
    chosen = {token // 16 for token in np.flatnonzero(mask[0, 8, 0])}  # position 130: its own page is number 8
    assert {0, 6, 7, 8} <= chosen  # 24 recent tokens reach back to position 107, in page 6


def magicpig_by_hand(planes, queries, keys, position, head, bits, tables):
    """Tokens that a query head reads and what is added to their logits, from the paper's equations in float64."""
    own = keys[:, head // GROUP]
    centred = own - own.mean(0)
    query = queries[head]
    weights = {}
    for token in range(position + 1):
        if token < 4 or token > position - 64:
            weights[token] = 0.0
            continue
        agreed = 0
        for table in range(tables):
            of_table = planes[:, table * bits : (table + 1) * bits]
            agreed += ((query @ of_table > 0) == (centred[token] @ of_table > 0)).all()
        if agreed >= 2:
            cosine = query @ centred[token] / np.linalg.norm(query) / np.linalg.norm(centred[token])
            p = (1 - np.arccos(cosine) / np.pi) ** bits
            weights[token] = -np.log(1 - (1 - p) ** tables - tables * p * (1 - p) ** (tables - 1))
    return weights


@pytest.mark.parametrize(("bits", "tables"), [(4, 20), (2, 7), (3, 150)])
def test_magicpig_draws_by_collisions_in_two_tables_and_weighs_by_their_probability(bits, tables):
    queries, keys = draw()
    published = open_layer("magicpig")
    assert (published.bits, published.tables, published.dense_layers) == (10, 150, (0, 16))
    planes = np.asarray(published.params)[:, : bits * tables]
    method = published.replace(bits=bits, tables=tables, params=jnp.asarray(planes))
    mask, _, log_weights = map(np.asarray, read(method, queries, keys, POSITIONS, budgets_of(0.01)))
    drawn = 0
    for t, head in np.ndindex(N, Q_HEADS):
        args = queries[0, t].astype(np.float64), keys[0].astype(np.float64), POSITIONS[0, t], head
        expected = magicpig_by_hand(planes.astype(np.float64), *args, bits, tables)
        assert np.flatnonzero(mask[0, t, head]).tolist() == sorted(expected)
        found = log_weights[0, t, head]
        np.testing.assert_allclose(found[list(expected)], list(expected.values()), rtol=2e-3, atol=1e-4)
        drawn += sum(value > 0 for value in expected.values())
    assert drawn > 20  # the tables were asked at all


def test_magicpig_reads_as_often_as_its_probability_says():
    """The share of drawn keys is the mean of u, over many draws of planes."""
    rng = np.random.default_rng(0)
    queries = jnp.asarray(rng.normal(size=(1, 1, 2, HEAD_DIM)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(1, 200, 1, HEAD_DIM)), jnp.float32)
    positions = jnp.asarray([[199]], jnp.int32)

    @jax.jit
    def look(key):
        planes = jax.random.normal(key, (HEAD_DIM, 4 * 20))
        method = MagicPig("magicpig", BARE, (), planes, bits=4, tables=20)
        mean, buckets = method.index(keys, jnp.asarray([200], jnp.int32))
        mask = method.select(queries, keys, (mean, buckets), positions, positions).mask
        return mask[0, 0, :, 4:136], jnp.exp(method.log_probability(queries, keys, mean))[0, 0, :, 4:136]

    drawn, probability = jax.lax.map(look, jax.random.split(jax.random.key(0), 400))
    np.testing.assert_allclose(drawn.mean(0), probability[0], atol=0.1)
    np.testing.assert_allclose(drawn.mean(), probability[0].mean(), atol=0.01)


def test_random_draws_anew_for_each_layer_and_position_and_the_same_for_the_same_seed():
    args = (*draw(), POSITIONS, budgets_of(0.3))
    once, again = (np.asarray(read(open_layer("random"), *args)[0]) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert (once[0, 7] != once[0, 8]).any()


def test_codes_cost_their_words_and_exact_scores_nothing():
    reads = {
        name: read(open_layer(name), *draw(), POSITIONS, POSITIONS + 1)[1]
        for name in ("spotlight", "lsh", "oracle-scores")
    }
    for name in ("spotlight", "lsh"):  # 64 bits of each KV head
        np.testing.assert_array_equal(reads[name], (POSITIONS + 1) * KV_HEADS * 8)
    assert not np.asarray(reads["oracle-scores"]).any()


def test_dense_layers_are_the_selections_or_the_papers():
    found = {name: open_method(name, selector(), BARE, SHAPE).dense_layers for name in METHODS}
    assert found.pop("dense") == (0, 1)
    assert found.pop("quest") == (0, 1)
    assert found.pop("magicpig") == (0, 16)
    assert set(found.values()) == {(0,)}


def test_a_folder_behind_the_name_is_another_selector(tmp_path):
    save_selector(tmp_path / "other", selector(), "card")
    own, other = (
        open_method(name, selector(), BARE, SHAPE) for name in ("spotlight", f"spotlight@{tmp_path / 'other'}")
    )
    assert jax.tree.structure(own) == jax.tree.structure(other)  # one compiled layer serves both
    for one, two in zip(jax.tree.leaves(own), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spotligth", "did you mean 'spotlight'"),
        ("spotlight", "--selector"),
        ("spotlight@", "names a selector's folder"),
        ("lsh@runs/x", "only spotlight@FOLDER"),
        ("spotlight@no-such-folder", "no-such-folder"),
    ],
)
def test_a_method_that_cannot_be_opened_is_told(name, message):
    with pytest.raises(InputError, match=message):
        open_method(name, None, BARE, SHAPE)
