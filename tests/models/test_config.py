import pytest

from spotlight_jax.errors import InputError
from spotlight_jax.models.config import DecoderConfig, RopeConfig, config_from_hf
from tests.models import tiny

LLAMA, QWEN2, QWEN3 = (tiny.CASES[name] for name in ("llama2", "qwen2", "qwen3"))


def test_both_spellings_of_rope_scaling_read_the_same() -> None:
    assert config_from_hf(tiny.CASES["llama31"]) == config_from_hf(tiny.CASES["llama31_parameters"])


def test_the_fields_of_qwen25_7b_are_read() -> None:
    cfg = config_from_hf(
        {
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
            "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
            "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
            "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
            "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
        }
    )  # fmt: skip
    assert cfg == DecoderConfig(
        vocab=152064, embed=3584, layers=28, q_heads=28, kv_heads=4, head_dim=128, mlp=18944, max_len=32768,
        rope=RopeConfig(theta=1000000.0), norm_eps=1e-6, qkv_bias=True,
    )  # fmt: skip
    assert cfg.group == 7


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_model_type_stands_in_for_architectures(model_type: str) -> None:
    fields = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}[model_type]
    alone = {name: value for name, value in fields.items() if name != "architectures"}
    assert config_from_hf(alone) == config_from_hf(fields)


def test_a_window_that_no_layer_uses_is_accepted() -> None:
    config_from_hf(QWEN2 | {"use_sliding_window": True, "max_window_layers": 2})
    config_from_hf(QWEN2 | {"sliding_window": 4096, "layer_types": ["full_attention"] * 2})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_a_scaling_block_added_by_hand_beside_rope_parameters_counts() -> None:
    """What Qwen's model card says to add, in a config that transformers 5 wrote."""
    plain = QWEN2 | {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    added = config_from_hf(plain | {"rope_scaling": {"type": "yarn", **YARN}})
    assert added == config_from_hf(plain | {"rope_parameters": {"rope_theta": 1e6, **YARN}})
    assert (added.rope.kind, added.rope.theta, added.rope.factor) == ("yarn", 1e6, 4.0)


def test_rope_by_kind_of_layer_is_that_of_full_attention() -> None:
    nested = {"full_attention": {"rope_theta": 1e6, **YARN}, "sliding_attention": {"rope_theta": 1e4}}
    without = QWEN2 | {"rope_theta": None}
    assert config_from_hf(without | {"rope_parameters": nested}) == config_from_hf(
        without | {"rope_parameters": nested["full_attention"]}
    )


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({}, None, ()),
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": [9, 2]}, {"eos_token_id": 5}, (2, 5, 9)),
        ({"eos_token_id": None}, {"eos_token_id": [5, 5]}, (5,)),
        ({"eos_token_id": [-1, 60, 61]}, {}, (60,)),  # the model has 61 rows
    ],
)
def test_both_files_name_what_ends_a_text(config: dict, generation: dict | None, ends: tuple[int, ...]) -> None:
    assert config_from_hf(QWEN2 | config, generation).stop_tokens == ends


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_parameters": {**YARN, "factor": 2.0}, "rope_scaling": YARN},
            "rope_parameters and rope_scaling differ in f",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
            "rope_theta and rope_parameters differ in rope_theta",
        ),
        ({"rope_parameters": {"sliding_attention": YARN}}, "RoPE for sliding_attention, and none for full_attention"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn' is not an object"),
        ({"eos_token_id": "</s>"}, "eos_token_id = '</s>' is neither a token id nor a list"),
        ({"eos_token_id": [True]}, r"eos_token_id = \[True\] is neither"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan is not a finite number"),
        ({"hidden_size": float("inf")}, "hidden_size = inf is not a finite number"),
        ({"hidden_size": 10**400}, "hidden_size = 1000.* is not a finite number"),
        ({"num_hidden_layers": 10**9}, "layers is 1000000000; at most"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false' is neither true nor false"),
        ({"layer_types": 3}, "layer_types = 3 is not a list"),
        ({"architectures": None, "model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"rope_scaling": {**YARN, "factor": 1e30}}, "factor 1e.30 above 0"),
        ({"rope_scaling": {**YARN, "beta_fast": -1}}, "beta_fast, beta_slow"),
        (
            {"rope_scaling": {**YARN, "rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "low_freq_factor 4.0 must be above 0 and below high_freq_factor",
        ),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "'Qwen2MoeForCausalLM'.*did you mean 'Qwen2ForCausalLM'"),
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported.*LlamaForCausalLM"),
        ({"architectures": None, "model_type": "mistral"}, "model_type 'mistral' is not supported"),
        ({"architectures": None, "model_type": None}, "names no architecture"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds sliding_attention"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = 'gptq'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "RoPE scaling 'longrope'"),
        ({"rope_parameters": {"rope_type": "linaer", "factor": 2.0}}, "did you mean 'linear'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "576"}, "hidden_size = '576' is not a number"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers = 1.5 is not a whole number"),
        ({"num_key_value_heads": 3}, "7 query heads are not a multiple of 3 KV heads"),
        ({"num_attention_heads": 0, "num_key_value_heads": 0}, "q_heads is 0"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        config_from_hf(QWEN2 | fields)
    assert "\n" not in str(error.value)
