"""Dense: every layer reads everything."""

from eval.methods.base import Method, Setting, rule_of


def open_dense(name: str, setting: Setting) -> Method:
    """Open the model as it is."""
    return Method(name, rule_of(setting.selection), tuple(range(setting.shape.layers)))
