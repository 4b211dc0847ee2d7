"""Shapes of real models, for benchmarks and tests with random weights (`init_params`)."""

from spotlight_jax.models.config import DecoderConfig, RopeConfig

RANDOM = "random:"  # before a shape's name: that model with random weights, for benchmarks and dry runs

PRESETS: dict[str, DecoderConfig] = {
    "tiny": DecoderConfig(
        vocab=320, embed=48, layers=3, q_heads=6, kv_heads=2, head_dim=16, mlp=80, max_len=512, tied=True
    ),
    "smollm2-135m": DecoderConfig(
        vocab=49152, embed=576, layers=30, q_heads=9, kv_heads=3, head_dim=64, mlp=1536, max_len=8192,
        rope=RopeConfig(theta=100000.0), norm_eps=1e-5, tied=True,
    ),
    "llama3-8b": DecoderConfig(
        vocab=128256, embed=4096, layers=32, q_heads=32, kv_heads=8, head_dim=128, mlp=14336, max_len=8192,
        rope=RopeConfig(theta=500000.0), norm_eps=1e-5,
    ),
    "qwen2.5-7b": DecoderConfig(
        vocab=152064, embed=3584, layers=28, q_heads=28, kv_heads=4, head_dim=128, mlp=18944, max_len=32768,
        rope=RopeConfig(theta=1000000.0), norm_eps=1e-6, qkv_bias=True,
    ),
    "qwen2.5-7b-128k": DecoderConfig(
        vocab=152064, embed=3584, layers=28, q_heads=28, kv_heads=4, head_dim=128, mlp=18944, max_len=32768,
        rope=RopeConfig("yarn", 1000000.0, factor=4.0, trained_len=32768), norm_eps=1e-6, qkv_bias=True,
    ),
    "qwen2.5-14b": DecoderConfig(
        vocab=152064, embed=5120, layers=48, q_heads=40, kv_heads=8, head_dim=128, mlp=13824, max_len=32768,
        rope=RopeConfig(theta=1000000.0), norm_eps=1e-6, qkv_bias=True,
    ),
    "qwen2.5-32b": DecoderConfig(
        vocab=152064, embed=5120, layers=64, q_heads=40, kv_heads=8, head_dim=128, mlp=27648, max_len=32768,
        rope=RopeConfig(theta=1000000.0), norm_eps=1e-6, qkv_bias=True,
    ),
    "qwen2.5-72b": DecoderConfig(
        vocab=152064, embed=8192, layers=80, q_heads=64, kv_heads=8, head_dim=128, mlp=29568, max_len=32768,
        rope=RopeConfig(theta=1000000.0), norm_eps=1e-6, qkv_bias=True,
    ),
    "llama3-70b": DecoderConfig(
        vocab=128256, embed=8192, layers=80, q_heads=64, kv_heads=8, head_dim=128, mlp=28672, max_len=8192,
        rope=RopeConfig(theta=500000.0), norm_eps=1e-5,
    ),
}  # fmt: skip
