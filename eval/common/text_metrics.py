"""How well a text answers: LongBench's published metrics, and how far two models' answers agree.

LongBench's numbers are those of the packages it names, so they are called here and not rewritten: `rouge` (ROUGE-L on
sets of words, sentence by sentence, its F with 1e-8 in the denominator) and `jieba` (Chinese words). `rouge-score`,
Google's ROUGE, follows Lin (2004) more closely and gives other numbers; it measures agreement. All three come with the
extra `eval`.
"""

import collections
import contextlib
import difflib
import functools
import importlib
import logging
import re
import string
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from spotlight_jax.errors import InputError

# LongBench's list of Chinese punctuation, which its F1 leaves out of both texts
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、"  # noqa: RUF001
    "〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)
_CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")


def open_package(name: str) -> Any:
    """Import an optional package; raises InputError that names the extra it comes with."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old packages: invalid escapes, pkg_resources
            return importlib.import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        package, missing = top.replace("_", "-"), (error.name or top).partition(".")[0]
        lacking = "" if missing == top else f", which needs '{missing}'"
        raise InputError(
            f"this metric needs the package '{package}'{lacking}; install it with: pip install 'spotlight-jax[eval]'"
        ) from None


def rouge_l(prediction: str, answer: str) -> float:
    """Return the F of ROUGE-L as the package `rouge` counts it; 0 where either text has no words.

    LongBench's own script also gives 0 where Python's recursion limit stops the package (two sentences of some 500
    words); here the limit is raised instead.
    """
    scorer = open_package("rouge").Rouge(metrics=["rouge-l"])
    with _deep_recursion(len(prediction.split()) + len(answer.split())):
        try:
            return scorer.get_scores([prediction], [answer])[0]["rouge-l"]["f"]
        except ValueError:  # nothing is left of a text without its full stops
            return 0.0


def rouge_l_zh(prediction: str, answer: str) -> float:
    """Return the ROUGE-L of Chinese, whose words jieba finds."""
    return rouge_l(" ".join(segment(prediction)), " ".join(segment(answer)))


def token_f1(prediction: str, answer: str) -> float:
    """Return the F1 of the words in common, counted with repetition; case, punctuation and articles do not count."""
    return _f1(*(_normalise(text).split() for text in (prediction, answer)))


def token_f1_zh(prediction: str, answer: str) -> float:
    """Return the F1 of the Chinese words in common, counted with repetition; case and punctuation do not count."""
    return _f1(*([word for part in segment(text) if (word := _normalise_zh(part))] for text in (prediction, answer)))


def classification_score(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Return 1 over the number of class names found in the prediction, if the right one is among them.

    A name that is part of the right one (`Human` of `Human being`) does not count against it. As published, the
    name after one so dropped is not looked at, and so it stays.
    """
    found = [name for name in classes if name in prediction]
    place = 0
    while place < len(found):
        if found[place] in answer and found[place] != answer:
            del found[place]
        place += 1
    return 1 / len(found) if answer in found else 0.0


def count_score(prediction: str, answer: str) -> float:
    """Return the share of the numbers in the prediction that are the right one."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval_score(prediction: str, answer: str) -> float:
    """Return the share of the numbers in the prediction that are the one of the answer `Paragraph 7`."""
    return count_score(prediction, _number_of(answer, "Paragraph "))


def retrieval_score_zh(prediction: str, answer: str) -> float:
    """Return the share of the numbers in the prediction that are the one of the answer `段落7`."""
    return count_score(prediction, _number_of(answer, "段落"))


def code_similarity(prediction: str, answer: str) -> float:
    """Return the likeness of the first line that holds no comment or fence to the answer, in whole hundredths.

    LongBench asks `fuzzywuzzy.fuzz.ratio`, which is this where python-Levenshtein is not installed, as in LongBench's
    own requirements; where it is, edits are counted instead, and a line's score may differ by some hundredths.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


# Those that compare a prediction with one answer; `classification` also looks at the other classes.
METRICS: dict[str, Callable[[str, str], float]] = {
    "token_f1": token_f1,
    "token_f1_zh": token_f1_zh,
    "rouge_l": rouge_l,
    "rouge_l_zh": rouge_l_zh,
    "count": count_score,
    "retrieval": retrieval_score,
    "retrieval_zh": retrieval_score_zh,
    "code_similarity": code_similarity,
}
CLASSIFICATION = "classification"


def score_answers(metric: str, prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Return the best score of a prediction over the answers, any of which is right.

    Args:
        metric: a name of METRICS, or `classification`.
        classes: all class names, where the task is to name one.
    """
    if metric == CLASSIFICATION:
        return max(classification_score(prediction, answer, classes) for answer in answers)
    return max(METRICS[metric](prediction, answer) for answer in answers)


def lcs_rouge(prediction: str, answer: str) -> tuple[float, float, float]:
    """Return precision, recall and F of ROUGE-L as `rouge-score` counts it: the longest common subsequence of words."""
    score = _lcs_scorer().score(answer, prediction)["rougeL"]
    return float(score.precision), float(score.recall), float(score.fmeasure)


def agreement(first: str, second: str, plain: bool = False) -> float:
    """Return how far two answers agree: ROUGE-L's precision of each against the other, the mean of both.

    Args:
        plain: texts that are equal but have no words (both empty) count 0, by the formula; else equal texts
            count 1.
    """
    if first == second and not plain:
        return 1.0
    forth, back, _ = lcs_rouge(first, second)
    return (forth + back) / 2


def segment(text: str) -> list[str]:
    """Split a Chinese text into words."""
    return list(_jieba().cut(text, cut_all=False))


@functools.cache
def _jieba() -> Any:
    jieba = open_package("jieba")
    jieba.setLogLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # files that it leaves open
        jieba.initialize()
    return jieba


@functools.cache
def _lcs_scorer() -> Any:
    open_package("rouge_score")
    plain = open_package("rouge_score.tokenizers").DefaultTokenizer(use_stemmer=False)

    class Words:
        """Tokens of the package, or jieba's words where there is Chinese, which the package would drop."""

        def tokenize(self, text: str) -> list[str]:
            if not _CHINESE.search(text):
                return plain.tokenize(text)
            return [word for part in segment(text) if (word := _normalise_zh(part))]

    return open_package("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=Words())


def _normalise(text: str) -> str:
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept)


def _normalise_zh(word: str) -> str:
    dropped = string.punctuation + _CHINESE_PUNCTUATION
    return "".join(letter for letter in word.lower() if letter not in dropped and not letter.isspace())


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = sum((collections.Counter(prediction) & collections.Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


def _number_of(answer: str, before: str) -> str:
    found = re.search(rf"{before}(\d+)", answer)
    if found is None:
        raise InputError(f"the answer '{answer}' names no paragraph (as in '{before}7')")
    return found[1]


@contextlib.contextmanager
def _deep_recursion(depth: int) -> Iterator[None]:
    """Allow a recursion of this depth."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, depth + 1000))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
