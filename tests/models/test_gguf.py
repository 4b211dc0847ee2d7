import pathlib
import struct

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from spotlight_jax.errors import InputError
from spotlight_jax.models.gguf_file import open_gguf
from spotlight_jax.models.gguf_model import config_from_gguf, gguf_name, read_gguf_weights
from spotlight_jax.models.load import load_model
from spotlight_jax.models.params import fill_params
from spotlight_jax.models.rope import rope_frequencies
from spotlight_jax.models.runner import forward
from tests.models import golden, tiny
from tests.models.tiny_gguf import gguf_tensors, write_gguf


def logits_of(path: pathlib.Path) -> np.ndarray:
    file = open_gguf(path)
    cfg = config_from_gguf(file)
    params = fill_params(read_gguf_weights(file, cfg), gguf_name, cfg, jnp.float32, path.name)
    return np.asarray(forward(params, jnp.asarray(tiny.tokens()), cfg))[:, list(tiny.KEPT_POSITIONS)]


@pytest.mark.parametrize("case", ["llama2", "llama3", "llama_biases", "smollm2", "qwen2", "qwen25_tied", "qwen3"])
def test_gguf_of_every_architecture_gives_the_logits_of_its_folder(case: str, tmp_path: pathlib.Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny.CASES[case])
    np.testing.assert_allclose(logits_of(path), golden.read_tiny(case), atol=1e-4)


@pytest.mark.parametrize(
    ("case", "fields"),
    [
        ("llama_linear", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        ("llama_linear", {"rope.scale_linear": 4.0}),
        (
            "llama_yarn",
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
        ),
    ],
)
def test_rope_scaling_in_metadata(case: str, fields: dict, tmp_path: pathlib.Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny.CASES[case], fields=fields)
    np.testing.assert_allclose(logits_of(path), golden.read_tiny(case), atol=1e-4)


def test_rope_freqs_tensor_carries_llama31_scaling(tmp_path: pathlib.Path) -> None:
    config = tiny.CASES["llama31"]
    plain, wanted = (
        rope_frequencies(10, tiny.config_from_hf(c).rope)[0] for c in (config | {"rope_scaling": None}, config)
    )
    tensors = gguf_tensors(config) | {"rope_freqs.weight": plain / wanted}
    path = write_gguf(tmp_path / "model.gguf", config, tensors=tensors)
    np.testing.assert_allclose(logits_of(path), golden.read_tiny("llama31"), atol=1e-4)


def test_load_model_reads_weights_and_tokenizer_of_one_file(tmp_path: pathlib.Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny.CASES["smollm2"])
    model = load_model(str(path), jnp.bfloat16)
    assert model.source == str(path) and model.cfg.q_heads == 9
    assert model.params["layer_1"]["q"]["kernel"].dtype == jnp.bfloat16
    assert model.tokenizer.decode(model.tokenizer("hello world")["input_ids"]) == "hello world"


def test_the_ends_of_a_text_a_turn_and_a_message_all_end_a_text(tmp_path: pathlib.Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny.CASES["smollm2"], ends={"eot": 7, "eom": 9})
    assert config_from_gguf(open_gguf(path)).stop_tokens == (2, 7, 9)  # 2: the tokenizer's own


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_quantised_tensor_is_near_what_was_quantised(kind: str, tmp_path: pathlib.Path) -> None:
    values = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    qtype = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("t", gguf.quants.quantize(values, qtype), raw_dtype=qtype)
    finish(writer)
    ours = open_gguf(tmp_path / "q.gguf").read("t")
    assert ours.dtype == np.float32 and ours.shape == values.shape
    steps = {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.02, "Q5_0": 0.15, "Q5_1": 0.15}
    np.testing.assert_allclose(ours, values, atol=steps.get(kind, 0.3))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_read(kind: str, tmp_path: pathlib.Path) -> None:
    qtype = gguf.GGMLQuantizationType[kind]
    block = np.zeros((3, 2 * gguf.GGML_QUANT_SIZES[qtype][1]), np.uint8)  # zero scales: all values are 0
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("t", block, raw_dtype=qtype)
    finish(writer)
    ours = open_gguf(tmp_path / "q.gguf").read("t")
    np.testing.assert_array_equal(ours, np.zeros((3, 512), np.float32))


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_unsupported_quantisation_is_named(tmp_path: pathlib.Path) -> None:
    qtype = gguf.GGMLQuantizationType.IQ4_NL
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("t", np.zeros((2, gguf.GGML_QUANT_SIZES[qtype][1]), np.uint8), raw_dtype=qtype)
    finish(writer)
    with pytest.raises(InputError, match=r"tensor t is quantised as IQ4_NL.*supported: F32"):
        open_gguf(tmp_path / "q.gguf").read("t")


def test_every_truncation_gives_one_clear_line(tmp_path: pathlib.Path) -> None:
    whole = write_gguf(tmp_path / "model.gguf", tiny.CASES["qwen2"]).read_bytes()
    short = tmp_path / "short.gguf"
    for size in [0, 3, 10, 25, 100, 700, 3000, 6000, 9000, len(whole) // 2, len(whole) - 40]:
        short.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"short.gguf: (truncated or corrupt|not a GGUF file)") as error:
            open_gguf(short)
        assert "\n" not in str(error.value)


def test_corrupt_headers_give_one_clear_line(tmp_path: pathlib.Path) -> None:
    whole = write_gguf(tmp_path / "model.gguf", tiny.CASES["qwen2"]).read_bytes()
    broken = tmp_path / "broken.gguf"
    rng = np.random.default_rng(0)
    for _ in range(200):  # whatever a flipped byte does, it is an InputError or a file that still parses
        data = bytearray(whole)
        data[int(rng.integers(0, 6000))] ^= int(rng.integers(1, 256))
        broken.write_bytes(data)
        try:
            config_from_gguf(open_gguf(broken))
        except InputError as error:
            assert "broken.gguf" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": {"expert_count": 8}}, r"qwen2.expert_count = 8 is not implemented"),
        ({"fields": {"rope.scaling.type": "longrope"}}, r"RoPE scaling 'longrope' is not supported"),
        ({"fields": {"rope.dimension_count": 4}}, r"rope.dimension_count differs from head_dim"),
        ({"tensors": {"other.weight": np.ones((2, 2), np.float32)}}, "token_embd.weight is missing"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change: dict, message: str, tmp_path: pathlib.Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny.CASES["qwen2"], **change)
    with pytest.raises(InputError, match=message):
        config_from_gguf(open_gguf(path))


def test_a_part_of_a_split_model_is_said_to_be_one(tmp_path: pathlib.Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m-00002-of-00004.gguf", "llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 4)
    writer.add_tensor("t", np.ones((2, 2), np.float32))
    finish(writer)
    with pytest.raises(InputError, match=r"m-00002.*: this is part 2 of 4 of a split model; merge the parts"):
        config_from_gguf(open_gguf(tmp_path / "m-00002-of-00004.gguf"))


def _header(field: bytes, tensors: int = 0, fields: int = 1) -> bytes:
    """A GGUF file with one metadata field, whose type and value are given."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + struct.pack("<Q", 1) + b"a" + field


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_header(struct.pack("<II", 9, 9) + struct.pack("<QI", 1, 9) * 5000), "nests arrays more than 4 deep"),
        (_header(struct.pack("<IIQ", 9, 8, 2**60)), "ends within its header"),
        (_header(struct.pack("<IIQ", 9, 0, 2**63)), "ends within its header"),
        (_header(b"", fields=2**62), "ends within its header"),
        (_header(b"", tensors=2**62), "ends within its header"),
    ],
)
def test_counts_without_end_are_refused_at_once(data: bytes, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(InputError, match=message):
        open_gguf(tmp_path / "m.gguf")


def test_other_architecture_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2moe")
    writer.add_tensor("t", np.ones((2, 2), np.float32))
    finish(writer)
    with pytest.raises(InputError, match=r"architecture 'qwen2moe' is not supported; did you mean 'qwen2'"):
        config_from_gguf(open_gguf(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, "tensors missing: blk.1.ffn_up.weight; the model is incomplete"),
        ({"blk.7.ffn_up.weight": np.ones((2, 2), np.float32)}, "tensor blk.7.ffn_up.weight is unexpected"),
        ({"blk.1.ffn_up.weight": np.ones((2, 2), np.float32)}, r"blk.1.ffn_up.weight has shape \(2, 2\), the config"),
        ({"blk.1.attn_q.weight": np.ones((3, 2), np.float32)}, r"blk.1.attn_q.weight has shape \(3, 2\), the config"),
    ],
)
def test_missing_unexpected_and_misshapen_tensors_are_named(change: dict, message: str, tmp_path: pathlib.Path) -> None:
    tensors = {**gguf_tensors(tiny.CASES["llama3"]), **change}
    kept = {name: value for name, value in tensors.items() if value is not None}
    path = write_gguf(tmp_path / "model.gguf", tiny.CASES["llama3"], tensors=kept)
    with pytest.raises(InputError, match=message):
        logits_of(path)
