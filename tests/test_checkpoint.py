"""Selectors on disk: what is saved is what is loaded, and every broken folder is one clear line."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from spotlight_jax.config.hashing import NetworkConfig, TransformConfig
from spotlight_jax.errors import InputError
from spotlight_jax.selector import checkpoint
from spotlight_jax.selector.base import HeadShape
from spotlight_jax.selector.checkpoint import Selector, choose_model, describe_range, load_selector, save_selector
from spotlight_jax.selector.forms import init_functions

SHAPE = HeadShape(layers=2, q_heads=6, kv_heads=3, head_dim=32)
PAPER = NetworkConfig(form="symmetric", skip="none", code_bits=64, hidden=24, code_heads="query", centre=False)
FORMS = {
    "paper": PAPER,
    "released": dataclasses.replace(PAPER, skip="layers", code_bits=32, hidden=32),
    "shared code": dataclasses.replace(PAPER, skip="rotation", code_heads="kv", centre=True),
    "asymmetric": NetworkConfig("asymmetric", code_bits=64, hidden=24),
    "transform": TransformConfig(code_bits=64),
}


def make_selector(cfg):
    drawn, structure = jax.tree.flatten(init_functions(jax.random.key(0), cfg, SHAPE))
    rng = np.random.default_rng(0)  # every leaf different, so that two exchanged ones show
    leaves = [jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in drawn]
    return Selector(SHAPE, jax.tree.unflatten(structure, leaves), "maker/model", {"steps": 7, "iou": [0.5, 0.25]})


def assert_equal(first, second):
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One selector, written once; tests that break it work on a copy."""
    selector, folder = make_selector(FORMS["transform"]), tmp_path_factory.mktemp("saved") / "selector"
    save_selector(folder, selector, "# A card\n")
    return selector, folder


@pytest.fixture
def copy(saved, tmp_path):
    """The files that loading reads."""
    folder = tmp_path / "selector"
    folder.mkdir()
    for name in ("config.json", "selector.safetensors"):
        (folder / name).write_bytes((saved[1] / name).read_bytes())
    return folder


def test_positions_covered_are_kept_and_old_selectors_cover_those_of_their_windows(copy):
    file = copy / "config.json"
    config = json.loads(file.read_text())

    def positions_of(**fields):
        file.write_text(json.dumps({name: config[name] for name in config if name != "positions"} | fields))
        return load_selector(copy).positions

    assert positions_of(positions=5000) == 5000
    assert positions_of(recipe={"data": {"window": 2048}}) == 2048  # from before the field
    assert positions_of() is None


def test_sets_for_shorter_sequences_are_kept_and_chosen_by_length(saved, tmp_path):
    sets = [jax.tree.map(lambda leaf, add=add: leaf + add, saved[0].params) for add in (1, 2)]
    selector = dataclasses.replace(saved[0], positions=5000, shorter=((100, sets[0]), (1000, sets[1])))
    save_selector(tmp_path / "selector", selector, "# A card\n")
    loaded = load_selector(tmp_path / "selector")
    assert [most for most, _ in loaded.shorter] == [100, 1000]
    for own, wanted in zip(loaded.sets, [*sets, saved[0].params], strict=True):
        assert_equal(own, wanted)
    assert [loaded.set_of(tokens) for tokens in (1, 100, 101, 1000, 1001, 10**6)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("shorter", [7, "ab", [0], [True], [2.5], [300, 200], [200, 200], [5000], [1] * 17, {"a": 1}])
def test_lengths_that_are_none_are_refused(shorter, copy):
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"positions": 5000, "shorter": shorter}))
    assert "shorter" in refusal(copy)


def test_only_a_sequence_beyond_the_positions_covered_gets_a_line(saved):
    selector = dataclasses.replace(saved[0], positions=5000)
    assert describe_range(selector, 5000) is None and describe_range(saved[0], 10**6) is None
    assert "up to 5,000" in describe_range(selector, 5001) and "--length 5001" in describe_range(selector, 5001)


def refusal(folder, shape=None):
    """The one line that loading says."""
    with pytest.raises(InputError) as caught:
        load_selector(folder, shape)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_loaded_selectors_are_equal(form, tmp_path):
    selector = make_selector(FORMS[form])
    save_selector(tmp_path / "deep" / "selector", selector, "# Card\n")
    loaded = load_selector(tmp_path / "deep" / "selector", SHAPE)
    assert (loaded.cfg, loaded.shape, loaded.base_model, loaded.info) == (
        selector.cfg,
        SHAPE,
        "maker/model",
        {"steps": 7, "iou": [0.5, 0.25]},
    )
    assert jax.tree.structure(loaded.params) == jax.tree.structure(selector.params)
    assert_equal(loaded.params, selector.params)
    assert (tmp_path / "deep" / "selector" / "README.md").read_text() == "# Card\n"


def test_the_orbax_copy_equals_the_safetensors_copy(saved):
    with ocp.StandardCheckpointer() as checkpointer:
        through_orbax = checkpointer.restore((saved[1] / "orbax").absolute())
    arrays = safetensors.numpy.load_file(saved[1] / "selector.safetensors")
    assert set(through_orbax) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(through_orbax[name], array)


def test_arrays_have_the_names_of_the_tree(saved):
    params = saved[0].params
    arrays = checkpoint.flatten(params)
    assert arrays["weights.decode"] is params.weights.bit_weights
    assert arrays["stats.members"] is params.stats.head_assignment
    assert len(arrays) == 2 + 4
    params = make_selector(FORMS["asymmetric"]).params
    arrays = checkpoint.flatten(params)
    assert arrays["weights.keys.hidden_kernel"] is params.weights.keys.hidden_kernel
    assert arrays["weights.queries.rotation"] is params.weights.queries.rotation
    assert arrays["stats.scale"] is params.stats.scale
    assert len(arrays) == 5 + 5 + 1 + 2


def test_a_selector_can_be_saved_over(tmp_path):
    selector = make_selector(FORMS["transform"])
    save_selector(tmp_path, selector, "old\n")
    newer = dataclasses.replace(selector, params=jax.tree.map(lambda x: x + 1, selector.params))
    save_selector(tmp_path, newer, "new\n")
    assert_equal(load_selector(tmp_path).params, newer.params)


def test_a_run_folder_stands_for_the_selector_in_it(copy):
    (copy.parent / "config.yaml").write_text("a: 1\n")
    assert_equal(load_selector(copy.parent).params, load_selector(str(copy)).params)


def test_a_local_base_model_is_found_from_every_folder(tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    local = dataclasses.replace(make_selector(FORMS["transform"]), base_model="models/tiny")
    save_selector(tmp_path / "selector", local, "card")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = load_selector(tmp_path / "selector")
    assert loaded.base_model == str(tmp_path / "models" / "tiny")
    assert choose_model(None, {"s": loaded}) == (loaded.base_model, [])


def test_an_old_selector_of_a_name_that_may_be_a_path_needs_the_model(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["base_model_is_lasting"]
    (copy / "config.json").write_text(json.dumps(config))
    old = load_selector(copy)
    with pytest.raises(InputError, match=r"trained for 'maker/model', which may be a hub id or a folder .* --model"):
        choose_model(None, {"old": old})
    assert choose_model("maker/model", {"old": old}) == ("maker/model", [])
    (copy.parent / "maker" / "model").mkdir(parents=True)
    (copy.parent / "maker" / "model" / "config.json").write_text("{}")
    assert choose_model(None, {"old": load_selector(copy)}) == (str(copy.parent / "maker" / "model"), [])


def test_the_model_is_the_given_one_or_the_selectors_own_or_the_default(saved):
    own = saved[0]
    other = dataclasses.replace(own, base_model="random:tiny")
    assert choose_model(None, {}) == ("smollm2-135m", [])
    assert choose_model(None, {"a": own, "b": own}) == ("maker/model", [])
    assert choose_model("maker/model", {"a": own}) == ("maker/model", [])
    told = ["selector 'b' was trained for random:tiny, and is used with maker/model"]
    assert choose_model("maker/model", {"a": own, "b": other}) == ("maker/model", told)
    with pytest.raises(InputError, match="different models: 'a' for maker/model and 'b' for random:tiny; give --model"):
        choose_model(None, {"a": own, "b": other})


def test_a_wrong_base_model_is_named_size_by_size(copy):
    message = refusal(copy, HeadShape(layers=4, q_heads=6, kv_heads=2, head_dim=64))
    for part in ("maker/model", "layers 2 instead of 4", "kv_heads 3 instead of 2", "head_dim 32 instead of 64"):
        assert part in message
    assert "q_heads" not in message


def test_a_folder_without_a_selector_says_what_it_lacks(tmp_path):
    assert "no config.json" in refusal(tmp_path)
    assert "no config.json" in refusal(tmp_path / "missing")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1, 2]", "format 2"),
        (b'{"model_type": "llama"}', "format 2"),
        (b'{"format": 1}', "format 2"),
        (b'{"format": 2}', "not a selector's config"),
        (b'{"format": 2, "hash": {"colour": 3}, "shape": {}}', "not a selector's config"),
        (b'{"format": 2, "hash": 5, "shape": {}}', "not a selector's config"),
    ],
)
def test_broken_and_foreign_configs_are_one_line(content, says, copy):
    (copy / "config.json").write_bytes(content)
    assert says in refusal(copy)


def test_a_config_of_impossible_values_names_the_value(copy):
    config = json.loads((copy / "config.json").read_text())
    config["hash"]["code_bits"] = 65
    (copy / "config.json").write_text(json.dumps(config))
    assert "code_bits is 65" in refusal(copy)


def test_missing_arrays_are_one_line(copy):
    (copy / "selector.safetensors").unlink()
    assert "selector.safetensors' is missing" in refusal(copy)


@pytest.mark.parametrize("kept", [0, 4, 100, 2000])
def test_a_file_cut_short_is_one_line(kept, copy):
    file = copy / "selector.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "cut short" in refusal(copy)


def test_bytes_that_are_no_safetensors_are_one_line(copy):
    (copy / "selector.safetensors").write_bytes(b"PK\x03\x04" * 300)
    assert "cannot be read" in refusal(copy)


def test_arrays_of_another_model_are_named(copy):
    file = copy / "selector.safetensors"
    arrays = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({"model.embed_tokens.weight": np.zeros((4, 2), np.float32)}, file)
    assert "holds no 'weights.decode'" in refusal(copy)
    arrays["stats.mean"] = np.ascontiguousarray(arrays["stats.mean"][:, :2])
    safetensors.numpy.save_file(arrays, file)
    message = refusal(copy)
    assert "'stats.mean' is (2, 2, 32)" in message
    assert "(2, 3, 32)" in message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_hash_functions_that_are_no_numbers_are_neither_exported_nor_loaded(value, saved, copy, tmp_path):
    selector = saved[0]
    spoiled = jax.tree.map(lambda leaf: leaf.at[..., -1].set(value), selector.params)
    with pytest.raises(InputError, match="holds NaN or infinite numbers; it is not exported"):
        save_selector(tmp_path / "new", dataclasses.replace(selector, params=spoiled), "# A card\n")
    assert not (tmp_path / "new").exists()
    arrays = {name: np.asarray(array) for name, array in checkpoint.flatten(spoiled).items()}
    safetensors.numpy.save_file(arrays, copy / "selector.safetensors")
    assert "holds NaN or infinite numbers" in refusal(copy)


def test_arrays_of_another_type_are_refused(saved, copy):
    arrays = {name: np.asarray(array) > 0 for name, array in checkpoint.flatten(saved[0].params).items()}
    safetensors.numpy.save_file(arrays, copy / "selector.safetensors")
    assert "is bool instead of float32" in refusal(copy)


@pytest.mark.parametrize("name", ["config.json", "selector.safetensors"])
def test_a_selector_that_is_not_as_it_was_written_is_refused(name, saved, tmp_path):
    folder = tmp_path / "selector"
    shutil.copytree(saved[1], folder)
    (folder / "README.md").write_text("my own words")  # is not read
    load_selector(folder)
    content = bytearray((folder / name).read_bytes())
    at = content.index(b"32") if name == "config.json" else -2  # a digit of a size, a bit of a number
    content[at] ^= 1
    (folder / name).write_bytes(content)
    told = refusal(folder)
    assert f"is damaged: {name} is not what was written" in told and "delete manifest.json" in told
