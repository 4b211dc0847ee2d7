"""Questions with answers that lie far back: a text with something hidden in it, and what asks for it at the end."""

import dataclasses
import logging
import re
from collections.abc import Iterator

import numpy as np
import transformers
from jaxtyping import Int32

from eval.needle import Variant
from spotlight_jax import documents
from spotlight_jax.encoding import NullCount
from spotlight_jax.errors import InputError
from spotlight_jax.token_ids import encode_text

_log = logging.getLogger(__name__)


# A needle says that the best thing to do somewhere is something; which pairs with which is drawn anew each time.
_CITIES = ("Lisbon", "Bergen", "Kyoto", "Valparaiso", "Tallinn", "Marrakesh", "Hobart", "Winnipeg", "Ghent", "Busan")
_DEEDS = (
    "ride the yellow tram and eat warm custard by the river",
    "climb the lighthouse before breakfast and count the ferries",
    "buy a paper kite and fly it from the old stone bridge",
    "sit under the plane trees and listen to the brass band",
    "rent a green bicycle and follow the canal to the mill",
    "taste smoked plums at the night market near the harbour",
    "learn three songs from the bell ringers of the cathedral",
    "swim in the cold lake and then drink ginger tea",
    "draw the clock tower while the fishermen mend their nets",
    "take the last train to the coast and walk back along the beach",
)
_CUE = 16  # tokens of a passage that ask for the rest of it
_SENTENCE_END = re.compile(r"[.!?][\"')\]*_]*$")
_SEARCHED = 64  # tokens looked back for the end of a sentence


@dataclasses.dataclass(frozen=True)
class Question:
    """A text with something hidden in it, what asks for it, and the answer; together exactly as long as was asked."""

    prompt: Int32[np.ndarray, "prompt"]
    question: Int32[np.ndarray, "question"]
    answer: Int32[np.ndarray, "answer"]

    @property
    def tokens(self) -> Int32[np.ndarray, "length"]:
        """Return all tokens."""
        return np.concatenate([self.prompt, self.question, self.answer])


class Haystack:
    """A long text as token ids, from which each question takes a piece."""

    def __init__(
        self,
        source: str,
        tokenizer: transformers.PreTrainedTokenizerBase,
        vocab: int,
        least: int,
        text_column: str = "text",
    ) -> None:
        """Read at least `least` tokens of a text, for a model with an embedding of `vocab` rows.

        Args:
            source: a text file, a folder or glob of them, or an embedded text.
            tokenizer: the model's.
            vocab: see above.
            least: see above.
            text_column: key or column that holds the text in files of rows.

        Raises:
            InputError: there is no such text, it is too short, or it holds no text but token ids.
        """
        self.tokenizer, self.vocab = tokenizer, vocab
        found: list[int] = []
        for text in _read(source, text_column):
            found += self._encode(text.strip() + "\n\n")
            if len(found) >= 4 * least:
                break
        if len(found) < least:
            raise InputError(
                f"the haystack '{source}' has {len(found)} tokens, and {least} are needed; give a longer one"
            )
        self.tokens = np.asarray(found, np.int32)

    def ask(self, variant: Variant, length: int, depth: float, rng: np.random.Generator, passage: int) -> Question:
        """Make a question of `length` tokens with its answer at `depth` (0: the start, 1: the end) of the text.

        Args:
            variant: `needle`: a sentence; `passkey`: five digits; `copy`: a passage, whose start asks for the rest.
            passage: tokens of a passage that is to be copied.

        Raises: InputError where the length is too short for a text around what is hidden.
        """
        if variant == "copy":
            start = rng.integers(0, len(self.tokens) - length)
            hidden = self.tokens[start : start + passage]
            question, answer = hidden[:_CUE], hidden[_CUE:]
            rest = np.delete(self.tokens, np.s_[start : start + passage])
        else:
            statement, asked, right = (_passkey if variant == "passkey" else _needle)(rng)
            hidden = np.asarray(self._encode(statement), np.int32)
            question, answer = self._split(asked, right)
            rest = self.tokens
        begin = np.asarray(self._begin(), np.int32)
        hay_len = length - sum(map(len, (begin, hidden, question, answer)))
        if hay_len < len(hidden):
            raise InputError(f"{length} tokens leave {hay_len} for the haystack; give longer --lengths")
        start = rng.integers(0, len(rest) - hay_len + 1)
        hay = rest[start : start + hay_len]
        place = self._sentence_end(hay, round(depth * hay_len))
        return Question(np.concatenate([begin, hay[:place], hidden, hay[place:]]), question, answer)

    def _encode(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text, self.vocab, special=False)

    def _begin(self) -> list[int]:
        """Return what the tokenizer puts before every text."""
        whole, bare = encode_text(self.tokenizer, "a", self.vocab), self._encode("a")
        starts = (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
        return whole[: next(starts, 0)]  # it may put something after a text, too

    def _split(self, asked: str, right: str) -> tuple[np.ndarray, np.ndarray]:
        """Return both parts as the tokenizer writes them when they stand together."""
        whole, question = self._encode(asked + right), self._encode(asked)
        if whole[: len(question)] != question:
            whole = question + self._encode(right)
        return np.asarray(question, np.int32), np.asarray(whole[len(question) :], np.int32)

    def _sentence_end(self, hay: np.ndarray, place: int) -> int:
        """Return the last end of a sentence within reach before a place, or the place itself."""
        if place in (0, len(hay)):
            return place
        for end in range(place, max(place - _SEARCHED, 0), -1):
            if _SENTENCE_END.search(str(self.tokenizer.decode(hay[max(end - 4, 0) : end]))):
                return end
        return place


def _read(source: str, column: str) -> Iterator[str]:
    for found in documents.find_sources((source,)):
        if found.hub is not None:
            raise InputError(f"the haystack '{source}' is a data set of the hub; give a local text or text:NAME")
        nulls = NullCount(source, column)
        for document in nulls.skip(documents.read_source(found, column)):
            if not isinstance(document, str):
                raise InputError(f"the haystack '{source}' holds token ids; give a text")
            yield document
        if nulls.count:
            _log.warning(nulls.note())


def _needle(rng: np.random.Generator) -> tuple[str, str, str]:
    city, deed = rng.choice(_CITIES), rng.choice(_DEEDS)
    lead = f"The best thing to do in {city} is to"
    return f" {lead} {deed}.", f"\n\nWhat is the best thing to do in {city}? {lead}", f" {deed}."


def _passkey(rng: np.random.Generator) -> tuple[str, str, str]:
    key = rng.integers(10_000, 100_000)
    statement = f" The pass key is {key}. Remember it. {key} is the pass key."
    # the blank belongs to the question: with it in the answer, a model may go on with a word ("is a ...")
    return statement, "\n\nWhat is the pass key? The pass key is ", str(key)
