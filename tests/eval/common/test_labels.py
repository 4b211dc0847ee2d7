"""eval.common.labels: names that people read are short, unique and say which; every method looks like no other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.common.labels import explain_methods, explain_names, name_methods, style_methods
from eval.methods import METHODS

FOLDERS = st.lists(st.sampled_from(["a", "b", "selector", ".", "run of a night in november 1", "…"]), min_size=1)
SELECTORS = st.builds(lambda root, parts: "spotlight@" + root + "/".join(parts), st.sampled_from(["", "/"]), FOLDERS)
NAMES = st.lists(st.one_of(st.sampled_from([*METHODS, "new"]), SELECTORS), min_size=1, max_size=8, unique=True)


def looks(styles):
    return [tuple(sorted(style.items())) for style in styles.values()]


@given(NAMES)
def test_names_are_unique_and_in_the_order_given(methods):
    names = name_methods(methods)
    assert list(names) == methods and len(set(names.values())) == len(methods)
    assert all(names[name] == name for name in methods if "@" not in name)


@given(NAMES, st.randoms())
def test_a_name_depends_on_the_others_but_not_on_their_order(methods, random):
    shuffled = random.sample(methods, len(methods))
    assert name_methods(shuffled) == name_methods(methods)


def test_one_selector_needs_no_folder():
    assert name_methods(["dense", "spotlight@/tmp/ab/wide/selector", "lsh"]) == {
        "dense": "dense", "spotlight@/tmp/ab/wide/selector": "spotlight", "lsh": "lsh"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("folders", "shown"),
    [
        (["/tmp/ab/wide/selector", "/tmp/ab/paper/selector"], ["wide", "paper"]),
        (["/tmp/ab/wide", "/tmp/ab/paper/selector"], ["wide", "paper"]),
        (["runs/a/step_5/selector", "runs/a/step_10/selector"], ["step_5", "step_10"]),
        (["runs/a/x", "runs/b/x"], ["a", "b"]),
        (["runs/a/x", "runs/b/x", "runs/a/y", "runs/b/y"], ["a/x", "b/x", "a/y", "b/y"]),
        (["a", "a/b"], ["a", "b"]),
        (["a", "a/", "/a"], ["a", "a/", "/a"]),
        (["layerwise-135m-20260101-123456", "b"], ["layerwise…101-123456", "b"]),
        (["layerwise-135m-20260101-123456", "layerwise-360m-20260101-123456"],
         ["layerwise-135m-20260101-123456", "layerwise-360m-20260101-123456"]),
    ],
)  # fmt: skip
def test_several_selectors_are_told_apart_by_as_little_as_possible(folders, shown):
    names = name_methods([f"spotlight@{folder}" for folder in folders])
    assert list(names.values()) == [f"spotlight {text}" for text in shown]


def test_the_selector_of_the_run_stays_plain_beside_another():
    assert list(name_methods(["spotlight", "spotlight@runs/wide/selector"]).values()) == ["spotlight", "spotlight wide"]


def test_a_short_name_is_explained():
    assert explain_names(["dense", "spotlight@runs/wide", "spotlight"]) == [("spotlight wide", "runs/wide")]
    assert explain_names(["dense", "spotlight"]) == []


def test_every_method_and_many_selectors_and_strangers_look_different():
    methods = [*METHODS, *(f"spotlight@{n}" for n in range(20)), *(f"new {n}" for n in range(20))]
    found = looks(style_methods(methods))
    assert len(set(found)) == len(methods)
    few = [*METHODS, *(f"spotlight@{n}" for n in range(4)), *(f"new {n}" for n in range(7))]
    colors = {style["color"] for style in style_methods(few).values()}
    assert len(colors) == len(few)


@pytest.mark.parametrize("name", ["spotlight", "spotlight@runs/a", "spotlight wide", "spotlight, 64 bits"])
def test_selectors_are_blue_by_any_name_and_oracles_grey(name):
    styles = style_methods([name, "oracle-scores", "oracle-mass", "spotlight@runs/other"])

    def channels(method):
        return [int(styles[method]["color"][place : place + 2], 16) for place in (1, 3, 5)]

    for selector in (name, "spotlight@runs/other"):
        red, green, blue = channels(selector)
        assert blue > green > red
    for oracle in ("oracle-scores", "oracle-mass"):
        assert max(channels(oracle)) - min(channels(oracle)) < 0x20


def test_known_methods_look_alike_in_every_company():
    alone, together = style_methods(["quest", "lsh"]), style_methods(["new", "lsh", "spotlight@x", "quest"])
    assert all(alone[name] == together[name] for name in alone)


def test_methods_whose_reading_their_names_do_not_say_are_explained():
    told = dict(explain_methods(["dense", "quest", "magicpig", "oracle-scores", "quest"]))
    assert list(told) == ["quest", "magicpig", "oracle-scores"]
    assert "whole pages of 16 tokens" in told["quest"] and "no share is asked" in told["magicpig"]
