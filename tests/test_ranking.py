"""The ranking losses beside numpy: pairs, samples, the mass that a cut leaves out, and the memory they take."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.config.hashing import NetworkConfig, TransformConfig
from spotlight_jax.config.ranking import MassLoss, PairLoss
from spotlight_jax.errors import InputError
from spotlight_jax.kernels import pair_cost
from spotlight_jax.kernels.hash_append import reference as transform
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.forms import init_functions
from spotlight_jax.selector.losses import mass, pairs, targets
from spotlight_jax.selector.losses.ranking import ranking_loss
from tests.hash_params import draw_params
from tests.tolerances import tolerance

Q_LEN, KV_HEADS, GROUP, HEAD_DIM, KV_LEN = 4, 2, 3, 16, 60
Q_HEADS = KV_HEADS * GROUP
POSITIONS = np.array([2, 17, 40, 59], np.int32)
# a top set of 6 keys at most; the first query sees 3
CFG = PairLoss(
    top_share=0.1, min_top=5, queries=4, tops=4, others=20, always_top=2, queries_at_once=4, weighting="attention"
)
HASHES = {
    "paper": NetworkConfig(form="symmetric", skip="none", code_bits=32, hidden=24, code_heads="query", centre=False),
    "shared code": NetworkConfig(form="symmetric", skip="rotation", code_bits=32, hidden=24),
    "asymmetric": NetworkConfig(form="asymmetric", code_bits=32, hidden=24),
    "transform": TransformConfig(code_bits=32),
}

top_counts = jax.jit(targets.top_counts, static_argnums=(1, 2))


def sample_pairs(key, queries, positions, keys, cfg):
    """Pairs of the only target that the config has."""
    logits = targets.true_scores(queries, keys, positions) / HEAD_DIM**0.5
    scores = targets.target_scores(logits, KV_HEADS, cfg.target)
    return pairs.sample_pairs(key, scores, positions, cfg)


hash_keys = jax.jit(lambda params, x: params.hash_keys(x))
hash_queries = jax.jit(lambda params, x: params.hash_queries(x))
jitted_pairs = jax.jit(sample_pairs, static_argnums=4)


def draw(seed=0, q_len=Q_LEN, kv_len=KV_LEN):
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(q_len, Q_HEADS, HEAD_DIM)).astype(np.float32)
    return queries, rng.normal(size=(kv_len, KV_HEADS, HEAD_DIM)).astype(np.float32)


@functools.cache
def random_params(cfg, seed=0):
    shape = HeadShape(layers=1, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    if cfg.form == "transform":
        return draw_params(cfg, shape).layer(0)
    params = init_functions(jax.random.key(0), cfg, shape).layer(0)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    drawn = jax.tree.unflatten(structure, [jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32) for x in leaves])
    return drawn.replace(stats=drawn.stats.replace(scale=jnp.abs(drawn.stats.scale) + 0.5))


def score_loops(queries, keys):
    """True scores [q_heads, q_len, kv_len] in float64, masked or not."""
    scores = np.zeros((Q_HEADS, queries.shape[0], keys.shape[0]))
    for head, t in np.ndindex(scores.shape[:2]):
        scores[head, t] = keys[:, head // GROUP].astype(np.float64) @ queries[t, head]
    return scores


def learned_scores(params, queries, keys, gamma, cfg, per_kv_head=False):
    """What is learned, [heads, q_len, kv_len] in float64; hash outputs are those of test_hashing.py."""
    hashed, asked = (np.asarray(x, np.float64) for x in (hash_keys(params, keys), hash_queries(params, queries)))
    codes = np.sign(hashed) if cfg.form == "transform" else gamma * hashed / (1 + gamma * np.abs(hashed))
    if cfg.form == "symmetric":
        asked = gamma * asked / (1 + gamma * np.abs(asked))
    groups = [asked[:, k * GROUP : (k + 1) * GROUP] for k in range(KV_HEADS)]
    if not per_kv_head:
        sums = [[asked[:, head]] for head in range(Q_HEADS)]
    elif cfg.form == "transform":
        sums = [
            [group[:, side > 0].sum(1) for side in params.stats.head_assignment[k]] for k, group in enumerate(groups)
        ]
    else:
        sums = [[group.sum(1)] for group in groups]
    found = np.zeros((len(sums), queries.shape[0], keys.shape[0]))
    for head, t in np.ndindex(found.shape[:2]):
        rows = np.array([each[t] for each in sums[head]])
        if cfg.form == "transform":
            rows *= transform.SPREAD / np.linalg.norm(rows, axis=1, keepdims=True)
        found[head, t] = (rows @ codes[:, head * codes.shape[1] // len(sums)].T).max(0)
    return found


def count_of(position, kv_len, cfg):
    base = position + 1 if cfg.top_rule == "prefix" else kv_len
    return min(max(base - int((1 - cfg.top_share) * base), cfg.min_top), position + 1)


def top_sets(queries, keys, positions, cfg):
    """Positions of each head's and query's top set, most probable first, by sorting."""
    scores = score_loops(queries, keys)
    return {
        (head, t): np.argsort(-scores[head, t, : position + 1])[: count_of(position, keys.shape[0], cfg)].tolist()
        for head in range(Q_HEADS)
        for t, position in enumerate(positions.tolist())
    }


@pytest.mark.parametrize(
    ("rule", "expected"),
    # 2 %: n - int(0.98 n), at least 20 and at most what is seen
    [("prefix", [1, 10, 20, 20, 21, 40, 82]), ("total", [1, 10, 20, 82, 82, 82, 82])],
)
def test_top_counts_are_those_counted_by_hand(rule, expected):
    positions = np.array([0, 9, 19, 999, 1000, 1999, 4095], np.int32)
    cfg = PairLoss(top_rule=rule)
    assert top_counts(positions, 4096, cfg).tolist() == expected


def test_true_scores_are_dot_products_of_what_is_visible():
    queries, keys = draw()
    found = np.asarray(jax.jit(targets.true_scores)(queries, keys, POSITIONS))
    expected = score_loops(queries, keys)
    for t, position in enumerate(POSITIONS.tolist()):
        np.testing.assert_allclose(found[:, t, : position + 1], expected[:, t, : position + 1], **tolerance("float32"))
        assert np.isneginf(found[:, t, position + 1 :]).all()


@pytest.fixture(params=["cpu", "gpu"])
def traced(request, monkeypatch):
    """Traces a function anew, with the way of finding and scoring tops that this device would take."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    monkeypatch.setattr(pair_cost, "choose_impl", lambda: "xla")  # the kernel itself runs on a GPU alone
    return lambda function, *static: jax.jit(lambda *arrays: function(*arrays, *static))


def test_samples_are_what_they_claim(traced):
    queries, keys = draw(1)
    wanted, sample = top_sets(queries, keys, POSITIONS, CFG), traced(sample_pairs, CFG)
    for seed in range(8):
        pairs = sample(jax.random.key(seed), queries, POSITIONS, keys)
        top, weights, is_other = (np.asarray(x) for x in (pairs.top, pairs.top_weights, pairs.is_other))
        others = np.asarray(pairs.others)
        assert top.shape == (Q_HEADS, Q_LEN, CFG.tops)
        assert len(set(others.tolist())) == CFG.others
        for (head, t), best in wanted.items():
            row = top[head, t][weights[head, t] > 0].tolist()
            assert set(row) <= set(best)
            assert row[: CFG.always_top] == best[: CFG.always_top]
            usable = set(others[is_other[head, t]].tolist())
            assert usable == {s for s in others.tolist() if s <= POSITIONS[t] and s not in best}


def test_a_query_with_fewer_keys_than_always_top_drops_the_missing_ranks(traced):
    queries, keys = draw(2)
    cfg = dataclasses.replace(CFG, tops=5, always_top=5)
    pairs = traced(sample_pairs, cfg)(jax.random.key(0), queries, POSITIONS, keys)
    for head in range(Q_HEADS):
        weights, top = np.asarray(pairs.top_weights[head, 0]), np.asarray(pairs.top[head, 0])
        assert (weights > 0).tolist() == [True, True, True, False, False]  # the query at position 2 sees 3 keys
        assert set(top[:3].tolist()) == {0, 1, 2}
    assert not np.any(pairs.is_other[:, 0])  # all it sees is top


@pytest.mark.parametrize("tops", [6, 50])
def test_as_many_tops_as_the_top_set_holds_are_all_of_it(tops, traced):
    queries, keys = draw(3)
    positions = np.array([9, 30, 45, 59], np.int32)
    cfg = dataclasses.replace(CFG, top_rule="total", tops=tops, always_top=0)
    pairs = traced(sample_pairs, cfg)(jax.random.key(0), queries, positions, keys)
    for (head, t), best in top_sets(queries, keys, positions, cfg).items():
        assert sorted(np.asarray(pairs.top[head, t]).tolist()) == sorted(best)


def test_a_top_set_smaller_than_always_top_can_be_sampled():
    queries, keys = draw(4)
    cfg = dataclasses.replace(CFG, min_top=3, top_share=0.05, tops=8, always_top=8)
    pairs = jitted_pairs(jax.random.key(0), queries, POSITIONS, keys, cfg)
    for (head, t), best in top_sets(queries, keys, POSITIONS, cfg).items():
        assert np.asarray(pairs.top[head, t]).tolist() == best


def test_the_largest_random_number_stays_inside_the_top_set(monkeypatch):
    queries, keys = draw(5)
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, 1 - 2**-23, jnp.float32))
    cfg = dataclasses.replace(CFG, top_rule="total", always_top=0)
    pairs = sample_pairs(jax.random.key(0), *(jnp.asarray(x) for x in (queries, POSITIONS, keys)), cfg)
    assert np.isfinite(pairs.top_weights).all()
    assert (np.asarray(pairs.others) < KV_LEN).all()
    for (head, t), best in top_sets(queries, keys, POSITIONS, cfg).items():
        assert set(np.asarray(pairs.top[head, t]).tolist()) <= set(best)


def test_attention_weights_are_half_uniform_half_probability_among_the_sampled():
    queries, keys = draw(6)
    pairs = jitted_pairs(jax.random.key(0), queries, POSITIONS, keys, CFG)
    uniform = jitted_pairs(jax.random.key(0), queries, POSITIONS, keys, dataclasses.replace(CFG, weighting="uniform"))
    scores = score_loops(queries, keys) / np.sqrt(HEAD_DIM)
    for head, t in np.ndindex(Q_HEADS, Q_LEN):
        seen = np.asarray(uniform.top_weights[head, t])
        assert set(seen.tolist()) <= {0.0, 1.0}
        exps = np.exp(scores[head, t, np.asarray(pairs.top[head, t])]) * seen
        expected = np.where(seen > 0, 0.5 + 0.5 * CFG.tops * exps / exps.sum(), 0)
        np.testing.assert_allclose(pairs.top_weights[head, t], expected, **tolerance("float32"))


def group_shares(queries, keys, positions, heads=KV_HEADS):
    """Attention probabilities of the query heads of each KV head, or of each query head, in their mean [heads, q_len,
    kv_len], in float64."""
    scores = score_loops(queries, keys) / np.sqrt(HEAD_DIM)
    shares = np.zeros((heads, *scores.shape[1:]))
    for head, t in np.ndindex(scores.shape[:2]):
        exps = np.exp(scores[head, t, : positions[t] + 1])
        shares[head * heads // Q_HEADS, t, : positions[t] + 1] += exps / exps.sum() * heads / Q_HEADS
    return shares


def test_for_a_kv_head_keys_are_ranked_by_its_query_heads_summed_probabilities(traced):
    queries, keys = draw(11)
    cfg = dataclasses.replace(CFG, target="kv_head")
    pairs = traced(sample_pairs, cfg)(jax.random.key(0), queries, POSITIONS, keys)
    shares = group_shares(queries, keys, POSITIONS)
    assert pairs.top.shape == (KV_HEADS, Q_LEN, CFG.tops)
    for head, (t, position) in itertools.product(range(KV_HEADS), enumerate(POSITIONS.tolist())):
        best = np.argsort(-shares[head, t, : position + 1])[: count_of(position, KV_LEN, cfg)].tolist()
        real = np.asarray(pairs.top_weights[head, t]) > 0
        top = np.asarray(pairs.top[head, t])[real].tolist()
        assert set(top) <= set(best) and top[: CFG.always_top] == best[: CFG.always_top]
        found = np.asarray(pairs.top_weights[head, t])[real]
        expected = 0.5 + 0.5 * CFG.tops * shares[head, t, top] / shares[head, t, top].sum()
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("form", ["shared code", "asymmetric", "transform"])
def test_for_a_kv_head_the_loss_ranks_the_sum_of_its_query_heads_scores(form, traced):
    hash_cfg, (queries, keys) = HASHES[form], draw(12)
    params, cfg = random_params(hash_cfg), dataclasses.replace(EVERY, target="kv_head", weighting="uniform")
    arrays = *map(jnp.asarray, (queries, POSITIONS, keys)), jnp.float32(8)
    found = traced(ranking_loss, cfg)(params, jax.random.key(0), *arrays)
    every = learned_scores(params, queries, keys, 8, hash_cfg, per_kv_head=True)
    shares, cost, wrong, count = group_shares(queries, keys, POSITIONS), 0.0, 0, 0
    for head, (t, position) in itertools.product(range(KV_HEADS), enumerate(POSITIONS.tolist())):
        learned = every[head, t]
        order = np.argsort(-shares[head, t, : position + 1])
        tops = count_of(position, KV_LEN, cfg)
        for top, other in itertools.product(order[:tops], order[tops:]):
            cost += np.logaddexp(0, -(learned[top] - learned[other]) + cfg.alpha)
            wrong += learned[top] < learned[other]
            count += 1
    np.testing.assert_allclose(found, (cost / count, wrong / count), rtol=1e-4)


def test_both_targets_have_the_mean_of_their_losses_and_gradients():
    hash_cfg, (queries, keys) = HASHES["asymmetric"], draw(13, q_len=8)
    positions, params = np.array([2, 5, 10, 17, 30, 40, 50, 59], np.int32), random_params(hash_cfg)
    cfg = dataclasses.replace(CFG, queries=8, tops=6)  # two blocks; tops at random, each in its sixth of the ranks

    def measure(target):
        def of_params(params):
            arrays = *map(jnp.asarray, (queries, positions, keys)), jnp.float32(8)
            only = dataclasses.replace(cfg, target=target)
            return ranking_loss(params, jax.random.key(3), *arrays, only)

        return jax.jit(jax.value_and_grad(of_params, has_aux=True))(params)

    per_head, per_group, found = (measure(target) for target in ("query_head", "kv_head", "both"))
    expected = jax.tree.map(lambda one, other: (one + other) / 2, per_head, per_group)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert abs(float(per_head[0][0] / per_group[0][0]) - 1) > 0.05  # neither stands for both


MASS = MassLoss(top_share=0.1, min_top=5, queries=4, queries_at_once=4, softness=0.1)
EVERY = dataclasses.replace(CFG, top_rule="total", tops=6, others=KV_LEN, always_top=0)  # nothing is left to chance


def loss_loops(params, queries, positions, keys, gamma, hash_cfg, cfg):
    """Loss and wrong share over every pair, loop by loop."""
    every = learned_scores(params, queries, keys, gamma, hash_cfg)
    true, cost, wrong, count = score_loops(queries, keys), 0.0, 0, 0
    for (head, t), best in top_sets(queries, keys, positions, cfg).items():
        learned = every[head, t]
        exps = np.exp(true[head, t, best] / np.sqrt(HEAD_DIM))
        for top, share in zip(best, exps / exps.sum(), strict=True):
            weight = 1.0 if cfg.weighting == "uniform" else 0.5 + 0.5 * cfg.tops * share
            for other in set(range(positions[t] + 1)) - set(best):
                cost += weight * np.logaddexp(0, -(cfg.beta * (learned[top] - learned[other]) - cfg.alpha))
                wrong += learned[top] < learned[other]
                count += 1
    return cost / count, wrong / count


@pytest.mark.parametrize(
    ("form", "weighting"),
    [("paper", "uniform"), ("shared code", "attention"), ("asymmetric", "attention"), ("transform", "attention")],
)
def test_the_loss_over_every_pair_is_the_papers_equation(form, weighting, traced):
    cfg = dataclasses.replace(EVERY, weighting=weighting, beta=0.7, alpha=1.5)
    params, (queries, keys) = random_params(HASHES[form]), draw(7)
    gamma = np.float32(8)
    loss = traced(ranking_loss, cfg)
    found = loss(params, jax.random.key(0), queries, POSITIONS, keys, gamma)
    expected = loss_loops(params, queries, POSITIONS, keys, 8.0, HASHES[form], cfg)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("at_once", [1, 4])
def test_working_in_blocks_changes_neither_loss_nor_gradient(at_once):
    hash_cfg, (queries, keys) = HASHES["asymmetric"], draw(8, q_len=8)
    positions = np.array([5, 10, 19, 30, 33, 40, 50, 59], np.int32)
    whole = dataclasses.replace(EVERY, queries=8, queries_at_once=8)
    params = random_params(hash_cfg)

    def loss(cfg):
        def of_params(params):
            return ranking_loss(
                params, jax.random.key(0), *map(jnp.asarray, (queries, positions, keys)), jnp.float32(8), cfg
            )

        return jax.jit(jax.value_and_grad(of_params, has_aux=True))(params)

    close = {"rtol": 1e-4, "atol": 1e-6}
    blocked, expected = (
        jax.tree.leaves(loss(cfg)) for cfg in (dataclasses.replace(whole, queries_at_once=at_once), whole)
    )
    for one, other in zip(blocked, expected, strict=True):
        np.testing.assert_allclose(one, other, **close)


@pytest.mark.slow
def test_both_ways_of_scoring_tops_have_the_same_gradient(monkeypatch):
    hash_cfg, (queries, keys) = HASHES["shared code"], draw(9)
    params = random_params(hash_cfg)

    def gradient():
        def loss(params):
            return ranking_loss(
                params,
                jax.random.key(0),
                *map(jnp.asarray, (queries, POSITIONS, keys)),
                jnp.float32(8),
                EVERY,
            )[0]

        return jax.jit(jax.grad(loss))(params)

    gathered = gradient()
    monkeypatch.setattr(pair_cost, "choose_impl", lambda: "xla")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    every = gradient()
    for one, other in zip(jax.tree.leaves(gathered), jax.tree.leaves(every), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def compiled_bytes(form, queries, at_once, **fields):
    """Temporary memory of the compiled gradient; nothing is run."""
    hash_cfg = HASHES[form]
    kind = PairLoss if "tops" in fields else MassLoss
    cfg = kind(queries=queries, queries_at_once=at_once, min_top=40, **fields)
    shaped = jax.ShapeDtypeStruct

    leaves, structure = jax.tree.flatten(random_params(hash_cfg))

    def loss(leaves, queries, positions, keys):
        params = jax.tree.unflatten(structure, leaves)
        return ranking_loss(params, jax.random.key(0), queries, positions, keys, jnp.float32(8), cfg)

    lowered = jax.jit(jax.grad(loss, has_aux=True)).lower(
        leaves,
        shaped((queries, Q_HEADS, HEAD_DIM), jnp.float32),
        shaped((queries,), jnp.int32),
        shaped((1024, KV_HEADS, HEAD_DIM), jnp.float32),
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_of_pairs_is_bounded_by_the_queries_at_once():
    few, many = (compiled_bytes("asymmetric", count, 16, tops=32, others=256) for count in (32, 256))
    every_pair, slopes = Q_HEADS * 256 * 32 * 256 * 4, Q_HEADS * 256 * (32 + 256) * 4
    assert many < 1.25 * few + slopes
    assert many < 0.3 * every_pair


def test_memory_of_the_mass_loss_is_bounded_by_the_queries_at_once():
    few, many, all_at_once = (
        compiled_bytes("transform", count, at_once, target="kv_head")
        for count, at_once in ((32, 16), (256, 16), (256, 256))
    )
    assert many < 1.25 * few
    assert all_at_once > 4 * many


LOSSES = [*((form, "pairs") for form in HASHES), ("asymmetric", "mass"), ("transform", "mass")]


@pytest.mark.parametrize(("form", "loss"), LOSSES)
def test_the_loss_falls_on_one_batch(form, loss):
    hash_cfg, (queries, keys) = HASHES[form], draw(10)
    params, cfg, rate, floor = random_params(hash_cfg), EVERY, 0.05, 0.0
    if loss == "mass":
        cfg, rate = dataclasses.replace(MASS, target="kv_head", top_rule="total"), 3.0
        shares = np.sort(group_shares(queries, keys, POSITIONS), axis=-1)[:, 1:]  # the first query reads all it sees
        floor = 1 - shares[..., -6:].sum(-1).mean()  # no cut leaves out less

    @jax.jit
    def step(weights, key):
        def loss(weights):
            return ranking_loss(
                params.replace(weights=weights),
                key,
                *map(jnp.asarray, (queries, POSITIONS, keys)),
                jnp.float32(8),
                cfg,
            )

        (cost, wrong), grads = jax.value_and_grad(loss, has_aux=True)(weights)
        return jax.tree.map(lambda w, g: w - rate * g, weights, grads), (cost, wrong)

    weights, seen = params.weights, []
    for key in jax.random.split(jax.random.key(0), 30):
        weights, measured = step(weights, key)
        seen.append([float(x) for x in measured])
    (first_cost, first_wrong), (last_cost, last_wrong) = seen[0], seen[-1]
    assert floor < last_cost < floor + 0.8 * (first_cost - floor)
    assert floor < last_wrong < first_wrong


def cut_of(scores, count, softness):
    """The score that so many reach, and the width of the cut there."""
    cut = np.sort(scores)[-count]
    return cut, softness * np.sqrt(np.mean((scores - cut) ** 2))


def mass_loops(learned, shares, positions, cfg):
    """What soft cuts leave out, and what hard ones do: means over the queries that leave anything out."""
    soft, hard = [], []
    for head, (t, position) in itertools.product(range(len(learned)), enumerate(positions.tolist())):
        scores, share = learned[head, t, : position + 1], shares[head, t, : position + 1]
        if (count := count_of(position, learned.shape[-1], cfg)) == position + 1:
            continue
        cut, width = cut_of(scores, count, cfg.softness)
        soft.append(1 - share @ (1 / (1 + np.exp(-(scores - cut) / width))))
        hard.append(1 - share[scores >= cut].sum())
    return np.mean(soft), np.mean(hard)


@pytest.mark.parametrize("form", HASHES)
@pytest.mark.parametrize("target", ["query_head", "kv_head"])
def test_the_mass_loss_is_what_a_soft_cut_leaves_out(form, target, traced):
    hash_cfg, (queries, keys), is_joint = HASHES[form], draw(14), target == "kv_head"
    if is_joint and hash_cfg.code_heads == "query":
        return  # needs one code per KV head
    params, cfg = random_params(hash_cfg), dataclasses.replace(MASS, target=target)
    arrays = *map(jnp.asarray, (queries, POSITIONS, keys)), jnp.float32(8)
    found = traced(ranking_loss, cfg)(params, jax.random.key(0), *arrays)
    shares = group_shares(queries, keys, POSITIONS, heads=KV_HEADS if is_joint else Q_HEADS)
    learned = learned_scores(params, queries, keys, 8, hash_cfg, is_joint)
    np.testing.assert_allclose(found, mass_loops(learned, shares, POSITIONS, cfg), rtol=1e-4)


def draw_scores(seed, heads=2):
    """Learned scores and true logits of some heads; a query sees what is up to its position."""
    rng = np.random.default_rng(seed)
    learned, logits = rng.normal(size=(2, heads, Q_LEN, KV_LEN)).astype(np.float32)
    is_seen = np.arange(KV_LEN) <= POSITIONS[:, None]
    return learned, np.where(is_seen, 2 * logits, -np.inf)


@functools.partial(jax.jit, static_argnames="cfg")
def mass_cost(learned, logits, cfg):
    """Cost, and gradient by the scores themselves: a bit for each key makes weights scores."""

    def cost_of(learned):
        weights, codes = learned[:, None], jnp.eye(KV_LEN)[None]
        cost, wrong, count = mass.mass_cost(weights, codes, logits, jnp.asarray(POSITIONS), cfg)
        return cost, (wrong, count)

    return jax.value_and_grad(cost_of, has_aux=True)(learned)


def mass_of(scores, share, cut, width):
    """Mass left out where as many keys are read as by a cut, after scores moved: the cut moves until it is so."""
    read = 1 / (1 + np.exp(-(scores[0] - cut) / width))
    least, most = cut - 50 * width, cut + 50 * width
    for _ in range(80):
        middle = (least + most) / 2
        now = 1 / (1 + np.exp(-(scores[1] - middle) / width))
        least, most = (middle, most) if now.sum() > read.sum() else (least, middle)
    return 1 - share @ now


@pytest.mark.parametrize("softness", [0.1, 0.5])
def test_the_mass_losss_gradient_is_that_of_a_cut_that_goes_on_reading_as_many(softness):
    learned, logits = draw_scores(15)
    cfg, step = dataclasses.replace(MASS, softness=softness), 1e-5
    _, gradient = mass_cost(learned, logits, cfg)
    for head, (t, position) in itertools.product(range(2), enumerate(POSITIONS.tolist()[1:], start=1)):
        scores, exps = learned[head, t, : position + 1].astype(np.float64), np.exp(logits[head, t, : position + 1])
        cut, width = cut_of(scores, count_of(position, KV_LEN, cfg), softness)
        expected = []
        for place in range(position + 1):
            moved = [scores + sign * step * (np.arange(position + 1) == place) for sign in (1, -1)]
            ends = [mass_of((scores, each), exps / exps.sum(), cut, width) for each in moved]
            expected.append((ends[0] - ends[1]) / (2 * step))
        found = np.asarray(gradient)[head, t]
        np.testing.assert_allclose(found[: position + 1], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        assert not found[position + 1 :].any()


def test_raising_all_scores_of_a_query_gains_nothing():
    learned, logits = draw_scores(16)
    (cost, (wrong, _)), gradient = mass_cost(learned, logits, MASS)
    gradient = np.asarray(gradient, np.float64)
    assert (np.abs(gradient.sum(-1)) <= 1e-5 * np.abs(gradient).max(-1)).all()
    raised = learned + np.array([3.0, -2, 8, 1], np.float32)[None, :, None]
    np.testing.assert_allclose(mass_cost(raised, logits, MASS)[0][0], cost, rtol=1e-4)
    np.testing.assert_allclose(mass_cost(learned * 7, logits, MASS)[0][0], cost, rtol=1e-4)  # nor does their unit
    assert 0 < wrong < cost * 2


def test_only_keys_near_the_cut_are_learned_from_and_the_probable_ones_pushed_up():
    cfg = dataclasses.replace(MASS, softness=0.05)
    learned, logits = draw_scores(17)
    gradient = np.asarray(mass_cost(learned, logits, cfg)[1])
    far, several = 0, 0
    for head, (t, position) in itertools.product(range(2), enumerate(POSITIONS.tolist()[1:], start=1)):
        scores, exps = learned[head, t, : position + 1], np.exp(logits[head, t, : position + 1])
        cut, width = cut_of(scores, count_of(position, KV_LEN, cfg), cfg.softness)
        distance, found = (scores - cut) / width, gradient[head, t, : position + 1]
        assert np.abs(found[np.abs(distance) > 20]).max() < 1e-6 * np.abs(found).max()
        far += np.count_nonzero(np.abs(distance) > 20)
        near = np.flatnonzero(np.abs(distance) < 8)
        if len(near) > 1:
            assert found[near[exps[near].argmax()]] < 0 < found[near[exps[near].argmin()]]  # a step goes against it
            several += 1
    assert far > 50 and several > 3


@pytest.mark.parametrize("seed", [20, 21, 22])
def test_raising_the_scores_of_the_most_probable_keys_lowers_the_loss(seed):
    learned, logits = draw_scores(seed)
    is_top, least = np.zeros(logits.shape, np.float32), 0.0
    for head, (t, position) in itertools.product(range(2), enumerate(POSITIONS.tolist())):
        best, exps = np.argsort(-logits[head, t])[: count_of(position, KV_LEN, MASS)], np.exp(logits[head, t])
        is_top[head, t, best] = 1
        least += 1 - exps[best].sum() / exps.sum()
    measured = [mass_cost(learned + step * is_top, logits, MASS)[0] for step in np.float32([0, 1, 2, 3, 20])]
    losses, masses = [float(loss) for loss, _ in measured], [float(mass) for _, (mass, _) in measured]
    assert (np.diff(losses[:4]) < -0.05).all() and (np.diff(masses[:4]) < -0.05).all()
    np.testing.assert_allclose(masses[-1], least, rtol=1e-5)  # they are all that is read


def test_queries_that_read_all_they_see_teach_nothing():
    learned, logits = draw_scores(18)
    (cost, (_, count)), gradient = mass_cost(learned, logits, MASS)  # the query at position 2 sees 3 keys
    assert count == 2 * (Q_LEN - 1)
    assert not np.any(gradient[:, 0]) and np.all(np.any(gradient[:, 1:], axis=-1))
    poisoned = learned.copy()
    poisoned[:, 0] = 1e3 * np.arange(KV_LEN)
    np.testing.assert_allclose(mass_cost(poisoned, logits, MASS)[0][0], cost, rtol=1e-6)


def test_the_hard_cuts_mass_is_what_the_highest_scores_leave_out():
    learned, logits = draw_scores(19)
    (_, (wrong, _)), _ = mass_cost(learned, logits, MASS)
    expected = 0.0
    for head, (t, position) in itertools.product(range(2), enumerate(POSITIONS.tolist()[1:], start=1)):
        exps = np.exp(logits[head, t, : position + 1])
        read = np.argsort(-learned[head, t, : position + 1])[: count_of(position, KV_LEN, MASS)]
        expected += 1 - exps[read].sum() / exps.sum()
    np.testing.assert_allclose(wrong, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"top_share": 0.0}, "top_share is 0.0"),
        ({"top_share": 1.0}, "top_share is 1.0"),
        ({"queries": 0}, "queries is 0"),
        ({"tops": 0}, "tops is 0"),
        ({"others": -1}, "others is -1"),
        ({"min_top": 0}, "min_top is 0"),
        ({"queries_at_once": 0}, "queries_at_once is 0"),
        ({"queries": 100, "queries_at_once": 64}, r"queries \(100\) .* queries_at_once \(64\)"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"softness": 0.0}, "softness is 0.0"),
        ({"always_top": 49}, "always_top is 49; give 0 to 48"),
        ({"always_top": -1}, "always_top is -1"),
    ],
)
def test_values_no_loss_can_be_computed_from_are_named(fields, names):
    with pytest.raises(InputError, match=names):
        (MassLoss if "softness" in fields else PairLoss)(**fields)
