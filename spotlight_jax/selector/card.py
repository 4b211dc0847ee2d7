"""Model cards of selectors: what a person reads about one, and the metadata by which the hub finds it."""

from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from spotlight_jax.config.selection import MIN_TOKENS
from spotlight_jax.selector.checkpoint import Selector

_TAGS = ["spotlight-attention", "sparse-attention", "kv-cache", "long-context", "jax"]
_MEASURED = ("keep", "share_read", "oracle", "iou", "mass", "iou_lsh", "mass_lsh", "mass_oracle")


def write_card(selector: Selector, at: str = "THIS_FOLDER") -> str:
    """Return the text of a selector's card, in Markdown.

    Args:
        selector: its recipe and measured quality are given as far as `info` has them.
        at: where generation finds it.
    """
    shape, base = selector.shape, selector.base_model
    return f"""# Selector for {base}

Hash functions that choose which cached tokens each attention head reads, made with spotlight-jax:
{selector.cfg.describe()}.
The base model is not changed and not included.

- base model: {base}: {shape.layers} layers, {shape.q_heads} query / {shape.kv_heads} KV heads x {shape.head_dim}
{_describe_training(selector)}{_describe_positions(selector)}
{_quality_section(selector.info.get("metrics"))}
Use: `spotlight generate --selector {at} --prompt-file book.txt`

Files: `config.json` (base model, sizes, hash functions, recipe, metrics) and `selector.safetensors`
(docs/selector-format.md of spotlight-jax says what each array is). `orbax/`, where there is one, holds the same arrays.
"""


def write_hub_card(selector: Selector, base_model: str, name: str) -> str:
    """Return the same card with front matter for the hub.

    Args:
        selector: see `write_card`.
        base_model: the hub's id of the model that it serves.
        name: `owner/name` of the selector's own repository.
    """
    results = _eval_results(selector)
    data = ModelCardData(
        base_model=base_model,
        library_name="spotlight-jax",
        tags=_TAGS,
        model_name=name.partition("/")[2] if results else None,
        eval_results=results or None,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{write_card(selector, f'hf:{name}')}"))


def describe_share(metrics: dict[str, Any]) -> str:
    """Return what was asked for and what was read: more where the least number of tokens is more than the share."""
    read = f"{100 * metrics['share_read']:.1f} % of the cached tokens read"
    return f"{read} (keep {metrics['keep']:g}, at least {MIN_TOKENS} tokens)"


def _eval_results(selector: Selector) -> list[EvalResult]:
    """Return the selector's own measurements: at a window's length, and at the far end of its positions."""
    metrics: Any = selector.info.get("metrics")
    if not _is_measured(metrics):
        return []
    near = f"windows of {metrics.get('window')} tokens"
    far = f"far end of {metrics.get('length')} positions, windows {metrics.get('length_windows')}"
    return [
        EvalResult(
            task_type="text-generation",
            task_name=f"choice of cached tokens: {where}",
            dataset_type="text",
            dataset_name=f"held-out windows of {_training_text(selector) or 'the training text'}",
            metric_type=kind,
            metric_name=name,
            metric_value=metrics[f"{kind}{suffix}"],
            metric_args={"keep": metrics["keep"]},
        )
        for suffix, where in (("", near), ("_at_length", far))
        for kind, name in (("mass", "attention mass read"), ("iou", f"IoU with {metrics['oracle']}"))
        if f"{kind}{suffix}" in metrics
    ]


def _is_measured(metrics: Any) -> bool:
    """Return whether these are the numbers of a training run of this version; old and foreign ones are left out."""
    return isinstance(metrics, dict) and all(
        isinstance(metrics.get(name), str if name == "oracle" else int | float) for name in _MEASURED
    )


def _describe_training(selector: Selector) -> str:
    metrics, recipe = selector.info.get("metrics"), selector.info.get("recipe")
    window = recipe.get("data", {}).get("window") if isinstance(recipe, dict) else None
    if window is None:
        return ""
    steps = f"{metrics['steps']} steps" if isinstance(metrics, dict) and "steps" in metrics else "fitted, not trained"
    return f"- training text: {_training_text(selector)}, {steps}, windows of {window} tokens\n"


def _training_text(selector: Selector) -> str:
    recipe = selector.info.get("recipe")
    train = recipe.get("data", {}).get("train") if isinstance(recipe, dict) else None
    return ", ".join(map(str, train)) if isinstance(train, list | tuple) else ""


def _describe_positions(selector: Selector) -> str:
    """Return the lengths that the selector serves, each with hash functions of its own."""
    if selector.positions is None:
        return "- positions covered: not known"
    shorter = " and ".join(f"{most:,}" for most, _ in selector.shorter)
    own = f" (with hash functions of their own for sequences up to {shorter})" if shorter else ""
    return f"- positions covered: up to {selector.positions:,} tokens{own}; longer sequences need another selector"


def _quality_section(metrics: Any) -> str:
    """Return tables of measured quality: on held-out windows, and where positions go farther, at their far end."""
    if not _is_measured(metrics):
        return ""
    bare = f"- held-out text, {describe_share(metrics)}, bare (no sinks, no recent tokens):\n\n{_table(metrics, '')}"
    if "iou_at_length" not in metrics:
        return bare
    far = f"(windows {metrics['length_windows']}: {metrics['length']:,} tokens)"
    return f"{bare}\nAt the far end of the context {far}:\n\n{_table(metrics, '_at_length')}"


def _table(metrics: dict[str, Any], suffix: str) -> str:
    def cell(name: str) -> str:
        return f"{metrics[f'{name}{suffix}']:.3f}"

    return f"""| | IoU with {metrics["oracle"]} | attention mass read |
|---|---|---|
| orthogonal LSH, same bits | {cell("iou_lsh")} | {cell("mass_lsh")} |
| this selector | {cell("iou")} | {cell("mass")} |
| {metrics["oracle"]} | 1 | {cell("mass_oracle")} |
"""
