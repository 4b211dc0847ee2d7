import base64
import io
import json
import pathlib

import huggingface_hub
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from spotlight_jax.errors import InputError
from spotlight_jax.models import load, tokenizer
from spotlight_jax.models.gguf_file import open_gguf
from spotlight_jax.models.hf import hf_name, load_hf_config, read_hf_weights
from spotlight_jax.models.load import load_config, load_model
from spotlight_jax.models.params import fill_params
from spotlight_jax.models.runner import forward
from spotlight_jax.models.tokenizer import tokenizer_from_gguf
from tests.models import golden, tiny
from tests.models.tiny_gguf import write_gguf

CONFIG = tiny.CASES["qwen2"]


def read_params(folder: pathlib.Path, dtype=jnp.float32):
    cfg = load_hf_config(folder)
    return cfg, fill_params(read_hf_weights(folder), hf_name, cfg, dtype, str(folder))


def write_complete(folder: pathlib.Path) -> pathlib.Path:
    """A model folder with a tokenizer."""
    tiny.write_folder(folder, CONFIG, shards=3)
    source = write_gguf(folder.parent / "tokenizer.gguf", CONFIG)
    tokenizer_from_gguf(open_gguf(source)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_folder_gives_the_logits_that_transformers_gave(shards: int, tmp_path: pathlib.Path) -> None:
    tiny.write_folder(tmp_path, CONFIG, shards)
    cfg, params = read_params(tmp_path)
    ours = forward(params, jnp.asarray(tiny.tokens()), cfg)
    np.testing.assert_allclose(ours[:, list(tiny.KEPT_POSITIONS)], golden.read_tiny("qwen2"), atol=1e-4)


def test_load_model_reads_a_folder_with_its_tokenizer(tmp_path: pathlib.Path) -> None:
    folder = write_complete(tmp_path / "model")
    model = load_model(str(folder))
    assert load_config(str(folder)) == model.cfg
    assert model.tokenizer.decode(model.tokenizer("hello world")["input_ids"]) == "hello world"


def test_generation_config_names_more_ends_of_a_text(tmp_path: pathlib.Path) -> None:
    """As LLaMA 3's: its tokenizer ends a text, and its assistant a turn."""
    tiny.write_folder(tmp_path, CONFIG | {"eos_token_id": 3})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 9]}')
    assert load_config(str(tmp_path)).stop_tokens == (3, 9)
    (tmp_path / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"generation_config.json: not valid JSON"):
        load_config(str(tmp_path))


def test_bfloat16_is_kept(tmp_path: pathlib.Path) -> None:
    cfg = tiny.write_folder(tmp_path, CONFIG)
    stored = {name: value.astype(ml_dtypes.bfloat16) for name, value in tiny.hf_weights(cfg).items()}
    save_file(stored, tmp_path / "model.safetensors")
    assert {value.dtype for _, value in read_hf_weights(tmp_path)} == {np.dtype(ml_dtypes.bfloat16)}
    _, params = read_params(tmp_path, jnp.bfloat16)
    np.testing.assert_array_equal(params["layer_1"]["q"]["kernel"], stored[hf_name(("layer_1", "q", "kernel"))].T)


def test_the_head_of_a_tied_model_may_be_stored_and_is_not_used(tmp_path: pathlib.Path) -> None:
    cfg = tiny.write_folder(tmp_path, tiny.CASES["smollm2"])
    save_file(tiny.hf_weights(cfg) | {"lm_head.weight": np.zeros((2, 2))}, tmp_path / "model.safetensors")
    _, params = read_params(tmp_path)
    assert "head" not in params


def test_a_tied_model_may_store_its_table_as_its_head_alone(tmp_path: pathlib.Path) -> None:
    """safetensors' own `save_model` keeps one name of two that share memory, the first by the alphabet."""
    cfg = tiny.write_folder(tmp_path, tiny.CASES["smollm2"])
    _, usual = read_params(tmp_path)
    weights = tiny.hf_weights(cfg)
    table = weights.pop("model.embed_tokens.weight")
    save_file(weights | {"lm_head.weight": table}, tmp_path / "model.safetensors")
    _, params = read_params(tmp_path)
    assert "head" not in params
    np.testing.assert_array_equal(params["embed"]["table"], usual["embed"]["table"])
    save_file(weights | {"lm_head.weight": table[:-1]}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head.weight has shape \(60, 36\), the config wants \(61, 36\)"):
        read_params(tmp_path)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, jnp.float32, r"model.norm.weight holds NaN or Inf as float32 \(1 of"),
        (-np.inf, jnp.bfloat16, "model.norm.weight holds NaN or Inf as bfloat16"),
        (1e6, jnp.float16, "model.norm.weight holds NaN or Inf as float16"),  # finite in the file, too large for it
    ],
)
def test_weights_that_are_not_finite_are_named(value: float, dtype, message: str, tmp_path: pathlib.Path) -> None:
    cfg = tiny.write_folder(tmp_path, CONFIG)
    weights = tiny.hf_weights(cfg)
    weights["model.norm.weight"][3] = value
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        read_params(tmp_path, dtype)


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -1])
def test_truncated_safetensors_is_named(size: int, tmp_path: pathlib.Path) -> None:
    tiny.write_folder(tmp_path, CONFIG, shards=3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(InputError, match=r"model-00002-of-00003.safetensors: truncated or corrupt") as error:
        read_params(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, np.int8])
def test_quantised_tensors_without_their_scales_are_named(dtype, tmp_path: pathlib.Path) -> None:
    cfg = tiny.write_folder(tmp_path, CONFIG)
    weights = tiny.hf_weights(cfg)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].astype(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=rf"{name} is stored as (F8_E4M3|I8), .* use a model in one of F64, F32"):
        read_params(tmp_path)


def test_one_file_that_holds_all_counts_beside_the_index_of_shards_that_are_gone(tmp_path: pathlib.Path) -> None:
    tiny.write_folder(tmp_path, CONFIG, shards=3)
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    cfg = tiny.write_folder(tmp_path, CONFIG)
    assert read_params(tmp_path)[0] == cfg


def test_missing_shard_is_named(tmp_path: pathlib.Path) -> None:
    tiny.write_folder(tmp_path, CONFIG, shards=3)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00003-of-00003.safetensors: no such file"):
        read_params(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", '{"architectures": [', r"config.json: not valid JSON"),
        ("config.json", "[1, 2]", r"config.json: .*holds a list"),
        ("config.json", None, r"config.json: no such file"),
        ("config.json", '{"architectures": ["BertModel"]}', r"config.json: architecture 'BertModel' is not supported"),
        ("model.safetensors.index.json", "{}", r"index.json: holds no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}', r"'../b' is not a file of the folder"),
        ("model.safetensors.index.json", None, r"holds neither model.safetensors nor"),
    ],
)
def test_broken_json_is_named(file: str, text: str | None, message: str, tmp_path: pathlib.Path) -> None:
    tiny.write_folder(tmp_path, CONFIG, shards=2)
    (tmp_path / file).unlink()
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=message):
        read_params(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "tensors missing: model.norm.weight; the model is incomplete"),
        ({"model.layers.0.extra.weight": np.ones(2)}, "tensor model.layers.0.extra.weight is unexpected"),
        ({"model.norm.weight": np.ones(3)}, r"model.norm.weight has shape \(3,\), the config wants \(42,\)"),
    ],
)
def test_missing_unexpected_and_misshapen_tensors_are_named(change: dict, message: str, tmp_path: pathlib.Path) -> None:
    tiny.write_folder(tmp_path, CONFIG)
    tensors = {**load_file(tmp_path / "model.safetensors"), **change}
    save_file({name: value for name, value in tensors.items() if value is not None}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        read_params(tmp_path)


def test_folder_without_tokenizer_is_named(tmp_path: pathlib.Path) -> None:
    tiny.write_folder(tmp_path, CONFIG)
    with pytest.raises(InputError, match=r"holds no tokenizer \(none of tokenizer.json"):
        load_model(str(tmp_path))


def test_broken_tokenizer_is_named(tmp_path: pathlib.Path) -> None:
    tiny.write_folder(tmp_path, CONFIG)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0",')
    with pytest.raises(InputError, match="its tokenizer cannot be loaded") as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)


# BPE of 512 pieces with bytes for what they lack, as LLaMA 2's, trained by sentencepiece on this project's docs
SENTENCEPIECE = pathlib.Path(__file__).with_name("sentencepiece.model")


def write_sentencepiece(folder: pathlib.Path, content: bytes) -> str:
    """A LLaMA-2-like folder whose one vocabulary is a tokenizer.model."""
    tiny.write_folder(folder, tiny.CASES["llama2"] | {"vocab_size": 512})
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    (folder / "tokenizer.model").write_bytes(content)
    return str(folder)


def test_a_sentencepiece_file_alone_names_the_packages_that_read_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenizer, "_is_installed", lambda name: False)
    with pytest.raises(InputError, match=r"needs sentencepiece and google.protobuf; run pip install sentencepiece pr"):
        load.open_tokenizer(write_sentencepiece(tmp_path, SENTENCEPIECE.read_bytes()))
    assert capfd.readouterr() == ("", "")  # no word of transformers' beside ours


def test_a_sentencepiece_file_alone_gives_the_ids_that_sentencepiece_gives(tmp_path: pathlib.Path) -> None:
    reference = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(SENTENCEPIECE))
    ours = load.open_tokenizer(write_sentencepiece(tmp_path, SENTENCEPIECE.read_bytes()))
    for text in ("Hello world, this is a test.", "don't stop\n\n日本 é 🙂 12345", "a", ""):
        ids = ours(text)["input_ids"]
        assert ids == [reference.bos_id(), *reference.encode(text)]
        assert ours.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", ["cut", "zeros", "pointer"])
def test_a_damaged_sentencepiece_file_is_one_line(
    kind: str, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sentencepiece")
    whole = SENTENCEPIECE.read_bytes()
    for at in range(1, len(whole), 997):
        content = {
            "cut": whole[:at],
            "zeros": whole[:at] + bytes(len(whole) - at),
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:%d\n" % at,
        }[kind]
        with pytest.raises(InputError, match=r"tokenizer.model is damaged, or no sentencepiece file; fetch it again$"):
            load.open_tokenizer(write_sentencepiece(tmp_path, content))
    assert capfd.readouterr() == ("", "")


def test_a_tiktoken_file_is_not_taken_for_a_sentencepiece_file(tmp_path: pathlib.Path) -> None:
    write_sentencepiece(tmp_path, SENTENCEPIECE.read_bytes())
    assert tokenizer._has_only_sentencepiece(tmp_path)
    ranks = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    write_sentencepiece(tmp_path, ranks)
    assert not tokenizer._has_only_sentencepiece(tmp_path)


def test_hub_model_is_fetched_into_the_hub_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_complete(tmp_path / "model")
    asked = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, "*.safetensors" in allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_config("owner/model") == load_model("owner/model").cfg
    assert asked == [("owner/model", False), ("owner/model", True)]


def test_no_network_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("cannot find the files\non the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(InputError, match="owner/model: cannot be fetched from the hub") as error:
        load_model("owner/model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("smolm2-135m", "no such model; did you mean 'smollm2-135m'"),
        ("nothing-like-it-at-all", "no such model; give a folder"),
        ("./missing/folder", "no such model"),
        ("missing.gguf", "missing.gguf: no such file"),
        ("a/b c", "neither a folder, a .gguf file nor a valid hub id"),
    ],
)
def test_a_source_that_is_nothing_is_named(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(source)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    with pytest.raises(InputError, match=r"neither a folder nor a \.gguf file"):
        load.load_config(str(file))


@pytest.mark.parametrize("carriers", [("config.json",), ("config.json", "tokenizer_config.json")])
def test_code_in_a_model_folder_never_runs_whatever_is_piped_in(
    carriers: tuple[str, ...], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ran = write_complete(tmp_path / "model"), tmp_path / "ran"
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import PretrainedConfig, PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
        "class OwnConfig(PretrainedConfig): model_type = 'own'\n"
    )
    classes = {"AutoTokenizer": [None, "own.Own"], "AutoConfig": "own.OwnConfig"}
    for carrier in carriers:
        fields = json.loads((folder / carrier).read_text()) | {"auto_map": classes, "model_type": "own"}
        (folder / carrier).write_text(json.dumps(fields | {"tokenizer_class": "Own"}))
    piped = io.StringIO("y\n" * 50)
    monkeypatch.setattr("sys.stdin", piped)
    for load_part in (load_model, load.open_tokenizer):
        try:
            load_part(str(folder))
        except InputError as error:  # without its code the folder may be of no use
            assert "needs code of its own (auto_map), which is never run" in str(error)
    assert not ran.exists() and piped.tell() == 0
