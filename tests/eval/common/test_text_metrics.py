"""The metrics beside hand counts and published implementations."""

import difflib
import importlib
import random
import sys
import types
import warnings

import pytest

from eval.common import text_metrics
from eval.longbench import LongBenchConfig, answer
from eval.needle import NeedleConfig
from eval.needle import run as needle
from spotlight_jax.errors import InputError

WORDS = ("the", "a", "cat", "sat", "on", "mat.", "dog", "ran,", "far", "away", "An", "house!", "12", "7", "the.", "Cat")
CHINESE = tuple("我来到北京清华大学了，今天天气很好。他们的研究所在上海！")  # noqa: RUF001


@pytest.fixture(scope="module")
def published():
    """LongBench's metrics as lm-evaluation-harness keeps them, with what fuzzywuzzy does without python-Levenshtein."""
    fuzz = types.ModuleType("fuzzywuzzy.fuzz")
    fuzz.ratio = lambda one, two: round(100 * difflib.SequenceMatcher(None, one, two).ratio())
    package = types.ModuleType("fuzzywuzzy")
    package.fuzz = fuzz
    text_metrics.segment("先")  # jieba's files are read before warnings count as errors
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setitem(sys.modules, "fuzzywuzzy", package)
        patch.setitem(sys.modules, "fuzzywuzzy.fuzz", fuzz)
        yield importlib.import_module("lm_eval.tasks.longbench.metrics")


def _texts(vocabulary: tuple[str, ...], joint: str, seed: int) -> tuple[str, str]:
    draw = random.Random(seed)
    one, two = ([draw.choice(vocabulary) for _ in range(draw.randint(0, 25))] for _ in range(2))
    return joint.join(one), joint.join(two)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("ours", "theirs"), [("token_f1", "qa_f1_score"), ("rouge_l", "rouge_score")])
@pytest.mark.parity
def test_english_metrics_equal_the_published_ones(published, ours, theirs, seed):
    one, two = _texts(WORDS, " ", seed)
    assert getattr(text_metrics, ours)(one, two) == pytest.approx(getattr(published, theirs)(one, two), abs=1e-12)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("ours", "theirs"), [("token_f1_zh", "qa_f1_zh_score"), ("rouge_l_zh", "rouge_zh_score")])
@pytest.mark.parity
def test_chinese_metrics_equal_the_published_ones(published, ours, theirs, seed):
    one, two = _texts(CHINESE, "", seed)
    assert getattr(text_metrics, ours)(one, two) == pytest.approx(getattr(published, theirs)(one, two), abs=1e-12)


@pytest.mark.parametrize(
    "prediction",
    ["17", "It is 17, not 18.", "Paragraph 17 (17)", "no number", "", "017", "段落17", "17.5"],
)
@pytest.mark.parity
def test_numbers_are_counted_as_published(published, prediction):
    assert text_metrics.count_score(prediction, "17") == published.count_score(prediction, "17")
    english = text_metrics.retrieval_score(prediction, "Paragraph 17")
    assert english == published.retrieval_score(prediction, "Paragraph 17")
    assert text_metrics.retrieval_score_zh(prediction, "段落17") == published.retrieval_zh_score(prediction, "段落17")


@pytest.mark.parametrize(
    "classes", [["Human", "Human being", "being", "Date"], ["Date", "being", "Human", "Human being"]]
)
@pytest.mark.parametrize("prediction", ["Human being", "Human", "Date or Human being", "", "none of them"])
@pytest.mark.parametrize("answer", ["Human being", "Human", "Date"])
@pytest.mark.parity
def test_classes_are_scored_as_published(published, classes, prediction, answer):
    expected = published.classification_score(prediction, answer, all_classes=classes)
    assert text_metrics.classification_score(prediction, answer, classes) == expected


@pytest.mark.parametrize(
    "prediction", ["return total", "# a comment\nreturn total + 1", "```python\nreturn x", "// a\n# b", "return a"]
)
@pytest.mark.parity
def test_code_is_compared_as_published(published, prediction):
    expected = published.code_sim_score(prediction, "return total")
    assert text_metrics.code_similarity(prediction, "return total") == expected


def test_metrics_by_hand():
    # normalised: cat sat on mat / cat on mat: 3 in common of 4 and 3
    assert text_metrics.token_f1("The cat sat on a mat!", "cat on the mat") == pytest.approx(6 / 7)
    assert text_metrics.token_f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert text_metrics.token_f1("the", "a") == 0
    # longest common subsequence 3 of 4 and 5 words
    assert text_metrics.rouge_l("a b c d", "a x b c y") == pytest.approx(6 / 9, abs=1e-6)
    assert text_metrics.rouge_l("", "a b") == text_metrics.rouge_l("...", "a b") == 0
    # 我 来到 北京 清华大学 / 我 来到 清华大学
    assert text_metrics.segment("我来到北京清华大学") == ["我", "来到", "北京", "清华大学"]
    assert text_metrics.rouge_l_zh("我来到北京清华大学", "我来到清华大学") == pytest.approx(6 / 7, abs=1e-6)
    assert text_metrics.token_f1_zh("我来到北京清华大学。", "我，来到清华大学") == pytest.approx(6 / 7)  # noqa: RUF001
    assert text_metrics.count_score("17 or 18", "17") == 0.5
    assert text_metrics.code_similarity("\n# note\nabcd", "abxd") == 0.75
    assert text_metrics.code_similarity("# nothing else", "abxd") == 0
    assert text_metrics.code_similarity("\n\n  abcd\n", "  abcd") == 1
    assert text_metrics.code_similarity("  \nabcd", "abcd") == 0


def test_the_best_answer_counts():
    assert text_metrics.score_answers("token_f1", "hound", ["dog", "a hound"]) == 1
    assert text_metrics.score_answers("classification", "Date", ["Human", "Date"], ["Human", "Date"]) == 1


def test_long_sentences_are_scored_too():
    """The package's recursion is as deep as both sentences are long; Python's limit would end it."""
    long = " ".join(map(str, range(900)))
    assert text_metrics.rouge_l(long, long) == pytest.approx(1)
    assert sys.getrecursionlimit() < 2000


def test_agreement_is_the_mean_of_both_precisions():
    rouge_scorer = importlib.import_module("rouge_score.rouge_scorer")  # not when collected: SciPy comes with it
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    one, two = "The cat sat on the mat.", "A cat on the red mat"
    forth, back = scorer.score(two, one)["rougeL"], scorer.score(one, two)["rougeL"]
    assert text_metrics.agreement(one, two) == pytest.approx((forth.precision + back.precision) / 2)
    assert text_metrics.agreement(one, two) == text_metrics.agreement(two, one)
    # cat, on, the, mat of 6 words each way
    assert text_metrics.agreement(one, two) == pytest.approx(4 / 6)
    assert text_metrics.lcs_rouge(one, two)[2] == pytest.approx(scorer.score(two, one)["rougeL"].fmeasure)


def test_equal_answers_agree_unless_the_rule_is_plain():
    assert text_metrics.agreement("", "") == text_metrics.agreement("!", "!") == 1
    assert text_metrics.agreement("", "", plain=True) == text_metrics.agreement("!", "!", plain=True) == 0
    assert text_metrics.agreement("a b", "a b", plain=True) == 1


def test_chinese_answers_agree_by_words():
    # 3 words in common of 4 and 3
    assert text_metrics.agreement("我来到北京清华大学", "我来到清华大学。") == pytest.approx((3 / 4 + 1) / 2)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(InputError, match=r"needs the package 'rouge'.*spotlight-jax\[eval\]"):
        text_metrics.rouge_l("a", "a")
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    text_metrics._lcs_scorer.cache_clear()
    with pytest.raises(InputError, match="'rouge-score'"):
        text_metrics.agreement("a", "b")


def test_what_a_package_needs_and_lacks_is_named(monkeypatch, tmp_path):
    (tmp_path / "half_there.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="the package 'half-there', which needs 'not_installed'; install it with"):
        text_metrics.open_package("half_there")


def test_an_answer_without_a_number_is_refused():
    with pytest.raises(InputError, match="names no paragraph"):
        text_metrics.retrieval_score("7", "seven")


@pytest.mark.parametrize(("run", "config"), [(needle, NeedleConfig), (answer, LongBenchConfig)])
def test_a_missing_package_is_told_before_a_model_is_loaded(run, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setattr(run, "load_eval_model", lambda cfg: pytest.fail("the model was loaded first"))
    with pytest.raises(InputError, match="needs the package 'rouge-score'"):
        run.main(config(methods=("dense",)))
