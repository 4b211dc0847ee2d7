"""Docstrings name the arguments that there are, in sections that the site can render."""

import ast
import re

from tests.docs.blocks import ROOT

SECTION = re.compile(r"^Args:\n((?:    .*\n?|\n)*)", re.MULTILINE)
# the site takes the first line for a title and only what is indented for the section
BROKEN = re.compile(r"^(?:Args|Returns|Raises): *\S[^\n]*\n    \S", re.MULTILINE)


def _functions():
    for package in ("spotlight_jax", "train", "eval"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
                    yield f"{file.relative_to(ROOT)}: {node.name}", node.args, text


def _wrong_names(args, text):
    """Names in the section of arguments that are no parameters, or out of order."""
    found = re.findall(r"^    \**(\w+):", section[1], re.MULTILINE) if (section := SECTION.search(text)) else []
    given = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    names = [arg.arg for arg in given if arg is not None]
    places = [names.index(name) for name in found if name in names]
    return [name for name in found if name not in names] or (found if places != sorted(places) else [])


def test_arguments_that_docstrings_name_are_parameters_in_their_order():
    assert [(where, wrong) for where, args, text in _functions() if (wrong := _wrong_names(args, text))] == []
    args = ast.parse("def f(a, b): ...").body[0].args
    assert _wrong_names(args, "Do.\n\nArgs:\n    a: one.\n    c: other.\n") == ["c"]
    assert _wrong_names(args, "Do.\n\nArgs:\n    b: one.\n    a: other.\n") == ["b", "a"]


def test_sections_of_docstrings_are_in_a_form_that_the_site_renders():
    assert [where for where, _, text in _functions() if BROKEN.search(text)] == []
    assert BROKEN.search("Do.\n\nReturns: one thing,\n    and another.")
