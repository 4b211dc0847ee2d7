"""What a decoder is: its sizes and switches, read from the fields of a Hugging Face `config.json`.

What a config asks for and the decoder does not do is refused by name: no model ever runs as something it is not.
"""

import dataclasses
import difflib
import math
from typing import Any, Literal

from spotlight_jax.errors import InputError

# The largest size that a decoder may have of each kind: far above any model's, so that a damaged file ends in a line
# and not in an allocation. Positions are int32.
_LARGEST = {
    "vocab": 2**24, "embed": 2**17, "layers": 2**11, "q_heads": 2**11, "kv_heads": 2**11, "head_dim": 2**12,
    "mlp": 2**21, "max_len": 2**31 - 1,
}  # fmt: skip

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding and how it is stretched past the trained length."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    trained_len: int = 0  # tokens the model was trained on before stretching (dynamic, llama3, yarn)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: from `factor`
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole pairs
    divisors: tuple[float, ...] | None = None  # GGUF's rope_freqs: one per pair, applied to the frequencies

    def __post_init__(self) -> None:
        """Raise InputError on values that no rotation can use."""
        if self.kind not in ROPE_KINDS:
            raise InputError(f"RoPE scaling {self.kind!r} is not supported{nearest(self.kind, ROPE_KINDS)}")
        if not 1 < self.theta <= 1e20 or not 0 < self.factor <= 1e6:
            raise InputError(
                f"RoPE theta {self.theta} must be above 1 (at most 1e20) and factor {self.factor} above 0 (at most 1e6)"
            )
        if self.kind in ("dynamic", "llama3", "yarn") and self.trained_len < 1:
            raise InputError(f"RoPE scaling {self.kind!r} needs the trained length (original_max_position_embeddings)")
        if self.trained_len > _LARGEST["max_len"]:
            raise InputError(f"RoPE's trained length is {self.trained_len}; at most {_LARGEST['max_len']} is supported")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise InputError(
                f"RoPE's low_freq_factor {self.low_freq_factor} must be above 0 and below high_freq_factor "
                f"{self.high_freq_factor}"
            )
        positive = [self.beta_fast, self.beta_slow, self.attention_factor, *(self.divisors or ())]
        if not all(0 < value < math.inf for value in positive if value is not None):
            raise InputError("RoPE's beta_fast, beta_slow, attention_factor and divisors must be finite and above 0")
        if not all(math.isfinite(value or 0) for value in (self.mscale, self.mscale_all_dim)):
            raise InputError(f"RoPE's mscale {self.mscale} and mscale_all_dim {self.mscale_all_dim} must be finite")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a LLaMA/Qwen decoder; hashable, static under jit."""

    vocab: int
    embed: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    mlp: int  # width of the MLP's hidden layer
    max_len: int  # tokens the model is meant for
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim before RoPE (Qwen3)
    tied: bool = False  # the head is the embedding table
    stop_tokens: tuple[int, ...] = ()  # ids that end a text or a turn, as the model's files name them

    def __post_init__(self) -> None:
        """Raise InputError on sizes that cannot form a decoder."""
        for name, most in _LARGEST.items():
            if getattr(self, name) < 1:
                raise InputError(f"the model's {name} is {getattr(self, name)}; it must be at least 1")
            if getattr(self, name) > most:
                raise InputError(f"the model's {name} is {getattr(self, name)}; at most {most} is supported")
        if self.q_heads % self.kv_heads:
            raise InputError(f"{self.q_heads} query heads are not a multiple of {self.kv_heads} KV heads")
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd; RoPE turns pairs")
        if self.head_dim == 2 and self.rope.kind == "dynamic":
            raise InputError("dynamic RoPE scaling needs a head_dim above 2")
        if not 0 <= self.norm_eps < math.inf:
            raise InputError(f"the norm's epsilon is {self.norm_eps}; it must be finite and at least 0")
        if self.rope.divisors is not None and len(self.rope.divisors) != self.head_dim // 2:
            raise InputError(f"{len(self.rope.divisors)} RoPE divisors for {self.head_dim // 2} pairs")

    @property
    def group(self) -> int:
        """Query heads that read one KV head."""
        return self.q_heads // self.kv_heads

    @property
    def max_context(self) -> int:
        """Most tokens of a sequence: `max_len`, stretched only by the config's own RoPE scaling."""
        if self.rope.kind in ("linear", "dynamic"):
            return int(self.max_len * self.rope.factor)
        if self.rope.kind in ("yarn", "llama3"):
            return max(self.max_len, int(self.rope.trained_len * self.rope.factor))
        return self.max_len


# What the `model_type` (or the class in `architectures`) fixes without a field of its own in config.json.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"class": "LlamaForCausalLM", "qkv_bias": False, "qk_norm": False, "max_len": 2048},
    "qwen2": {"class": "Qwen2ForCausalLM", "qkv_bias": True, "qk_norm": False, "max_len": 32768},
    "qwen3": {"class": "Qwen3ForCausalLM", "qkv_bias": False, "qk_norm": True, "max_len": 32768},
}
# Fields that change the computation, with the values that mean "not used".
_REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "no_rope_layers": (None, []),
    "clip_qkv": (None,),
    "alibi": (None, False),
    "use_dual_chunk_attention": (None, False),
    "dual_chunk_attention_config": (None,),
}


def nearest(name: object, known: tuple[str, ...] | list[str] | dict[str, Any]) -> str:
    """Return the end of an error line: the closest known name, if one is close, and all of them."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} supported: {', '.join(known)}"


def config_from_hf(config: dict[str, Any], generation: dict[str, Any] | None = None) -> DecoderConfig:
    """Return the decoder that a Hugging Face `config.json` describes.

    Reads both spellings of RoPE scaling: `rope_scaling` with `rope_theta`, and transformers 5's `rope_parameters`.

    Args:
        config: the fields of `config.json`.
        generation: those of `generation_config.json`, which may name more ids that end a text.

    Raises:
        InputError: an unknown architecture, a missing or malformed field, or a feature that is not implemented.
    """
    family = _FAMILIES[_family_name(config)]
    _refuse_unsupported(config)
    max_len = _integer(config, "max_position_embeddings", default=family["max_len"])
    embed = _integer(config, "hidden_size")
    q_heads = _integer(config, "num_attention_heads")
    # Qwen2 has biases on q, k and v whatever its config says; the others have them on o as well, by a field
    biased = not family["qkv_bias"] and _switch(config, "attention_bias")
    vocab = _integer(config, "vocab_size")
    return DecoderConfig(
        vocab=vocab,
        embed=embed,
        layers=_integer(config, "num_hidden_layers"),
        q_heads=q_heads,
        kv_heads=_integer(config, "num_key_value_heads", default=q_heads),
        head_dim=_integer(config, "head_dim", default=128 if family["qk_norm"] else embed // max(q_heads, 1)),
        mlp=_integer(config, "intermediate_size"),
        max_len=max_len,
        rope=_rope_from_hf(config, max_len),
        norm_eps=_number(config, "rms_norm_eps", default=1e-6),
        qkv_bias=family["qkv_bias"] or biased,
        o_bias=biased,
        mlp_bias=family["class"] == "LlamaForCausalLM" and _switch(config, "mlp_bias"),
        qk_norm=family["qk_norm"],
        tied=_switch(config, "tie_word_embeddings"),
        stop_tokens=stop_tokens([*_eos_ids(config), *_eos_ids(generation or {})], vocab),
    )


def stop_tokens(ids: list[int], vocab: int) -> tuple[int, ...]:
    """Return the ids that end a text, sorted, each once, without those that the model cannot choose."""
    return tuple(sorted({index for index in ids if 0 <= index < vocab}))


def _eos_ids(fields: dict[str, Any]) -> list[int]:
    """Return the ids in `eos_token_id`, which is one, a list of them, or nothing."""
    value = fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in ids):
        raise InputError(f"config field eos_token_id = {_short(value)} is neither a token id nor a list of them")
    return ids


def _family_name(config: dict[str, Any]) -> str:
    """Return `llama`, `qwen2` or `qwen3`, from `architectures` (which decides) or `model_type`."""
    classes = config.get("architectures")
    if classes:
        for name, family in _FAMILIES.items():
            if classes == [family["class"]]:
                return name
        names = [family["class"] for family in _FAMILIES.values()]
        label = classes[0] if isinstance(classes, list) and len(classes) == 1 else classes
        raise InputError(f"architecture {_short(label)} is not supported{nearest(label, names)}")
    kind = config.get("model_type")
    if kind is None:
        raise InputError("config.json names no architecture (neither 'architectures' nor 'model_type')")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise InputError(f"model_type {_short(kind)} is not supported{nearest(kind, _FAMILIES)}")
    return kind


def _refuse_unsupported(config: dict[str, Any]) -> None:
    """Raise InputError for the first feature in use that the decoder does not have."""
    for name, unused in _REFUSED.items():
        if config.get(name) not in unused:
            value = config[name]
            if name == "quantization_config" and isinstance(value, dict):
                value = value.get("quant_method", value)
            raise InputError(f"config field {name} = {_short(value)} is not implemented; use a model without it")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise InputError(f"activation hidden_act = {_short(activation)} is not implemented; supported: silu")
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list):
        raise InputError(f"config field layer_types = {_short(kinds)} is not a list")
    other = sorted({str(kind) for kind in kinds} - {"full_attention"})
    if other:
        raise InputError(f"layer_types holds {', '.join(other)}, which is not implemented; supported: full_attention")
    if kinds:
        return
    windowed = _switch(config, "use_sliding_window") and config.get("sliding_window", 4096) is not None
    # Qwen slides only in layers from max_window_layers on (28 by default)
    if windowed and _integer(config, "num_hidden_layers") > _integer(config, "max_window_layers", default=28):
        raise InputError("use_sliding_window = true is not implemented; use a model with full attention in all layers")


def _rope_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return RoPE's fields, from the two places where a config may have them; what both name must be the same.

    `rope_parameters` is transformers 5's, nested by kind of layer where kinds differ; `rope_scaling` beside
    `rope_theta` is older, and is what model cards say to add by hand.
    """
    places = {name: config.get(name) or {} for name in ("rope_parameters", "rope_scaling")}
    for name, fields in places.items():
        if not isinstance(fields, dict):
            raise InputError(f"config field {name} = {_short(fields)} is not an object with fields")
        if fields and all(isinstance(value, dict | None) for value in fields.values()):
            if not fields.get("full_attention"):
                raise InputError(f"config field {name} has RoPE for {', '.join(fields)}, and none for full_attention")
            places[name] = fields["full_attention"]
    merged: dict[str, tuple[str, Any]] = {}
    theta = {"rope_theta": config.get("rope_theta")}
    for name, fields in (("rope_theta", theta), *places.items()):
        own = {"rope_type" if key == "type" else key: value for key, value in fields.items() if value is not None}
        if own.get("rope_type") == "default":
            del own["rope_type"]  # says that this place asks for no scaling; another one may
        for key, value in own.items():
            other, known = merged.setdefault(key, (name, value))
            if known != value:
                raise InputError(
                    f"config fields {other} and {name} differ in {key}: {_short(known)} and {_short(value)}; keep one "
                    "of the two (rope_parameters is transformers 5's name)"
                )
    return {key: value for key, (_, value) in merged.items()}


def _rope_from_hf(config: dict[str, Any], max_len: int) -> RopeConfig:
    """Read RoPE from `rope_parameters`, `rope_scaling` and `rope_theta`."""
    fields = _rope_fields(config)
    kind = fields.get("rope_type", "default")
    if kind not in ROPE_KINDS:
        raise InputError(f"RoPE scaling {_short(kind)} is not supported{nearest(kind, ROPE_KINDS)}")
    if fields.get("partial_rotary_factor") not in (None, 1):
        raise InputError("partial_rotary_factor below 1 is not implemented; use a model that rotates the whole head")
    if fields.get("mrope_section"):
        raise InputError("mrope_section (multimodal RoPE) is not implemented; use a text-only model")
    theta = _number(fields, "rope_theta", default=10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    original = _integer(fields, "original_max_position_embeddings", default=max_len)
    original = _integer(config, "original_max_position_embeddings", default=original)
    if kind == "yarn" and fields.get("factor") is None:
        return _yarn(fields, theta, max_len / original, original)
    factor = _number(fields, "factor")
    if kind == "yarn":
        return _yarn(fields, theta, factor, original)
    if kind == "llama3":
        low, high = _number(fields, "low_freq_factor"), _number(fields, "high_freq_factor")
        return RopeConfig(kind, theta, factor, original, low_freq_factor=low, high_freq_factor=high)
    # dynamic scaling starts past max_position_embeddings, whatever an "original" length says
    return RopeConfig(kind, theta, factor, max_len if kind == "dynamic" else 0)


def _yarn(fields: dict[str, Any], theta: float, factor: float, original: int) -> RopeConfig:
    return RopeConfig(
        "yarn",
        theta,
        factor,
        original,
        beta_fast=_number(fields, "beta_fast", default=32.0) or 32.0,
        beta_slow=_number(fields, "beta_slow", default=1.0) or 1.0,
        attention_factor=None if fields.get("attention_factor") is None else _number(fields, "attention_factor"),
        mscale=None if fields.get("mscale") is None else _number(fields, "mscale"),
        mscale_all_dim=None if fields.get("mscale_all_dim") is None else _number(fields, "mscale_all_dim"),
        truncate=_switch(fields, "truncate", default=True),
    )


def _integer(fields: dict[str, Any], name: str, default: int | None = None) -> int:
    """Return a whole number; null counts as absent. Raises InputError naming the field."""
    value = _number(fields, name, default)
    if value != int(value):
        raise InputError(f"config field {name} = {value!r} is not a whole number")
    return int(value)


def _number(fields: dict[str, Any], name: str, default: int | float | None = None) -> float:
    """Return a finite number; null counts as absent. Raises InputError naming the field."""
    value = fields.get(name)
    value = default if value is None else value
    if value is None:
        raise InputError(f"config field {name} is missing; the config is incomplete")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"config field {name} = {_short(value)} is not a number")
    if not abs(value) <= 1e300:
        raise InputError(f"config field {name} = {_short(value)} is not a finite number")
    return float(value)


def _switch(fields: dict[str, Any], name: str, default: bool = False) -> bool:
    """Return a truth value; null counts as absent. Raises InputError naming the field."""
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"config field {name} = {_short(value)} is neither true nor false")
    return default if value is None else value


def _short(value: object) -> str:
    """Return a value as an error line quotes it: not all of what a file may hold."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} ..."
