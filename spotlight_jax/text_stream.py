"""Tokens to text as they come: no broken characters, no half stop strings."""

from collections.abc import Sequence

import transformers

from spotlight_jax.stops import special_tokens

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character yet
MOST_BYTES = 4  # of one UTF-8 character, and so the most tokens that one waits for
PATIENCE = 12  # pending tokens after which bytes that still are no character are taken for broken


class TextStream:
    """The text of one sequence, piece by piece; the pieces together are the text up to the first stop string."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        """Begin with nothing in it.

        Args:
            tokenizer: of the model.
            stop: strings of which the first to appear ends the text and is not part of it.
        """
        self._tokenizer, self._stop = tokenizer, tuple(text for text in stop if text)
        # decoding leaves them out; left in, one may be all the context of what follows, which then loses its space
        self._skipped = frozenset(special_tokens(tokenizer).values())
        self._tokens: list[int] = []
        self._start = 0  # tokens from here on give context to the pending ones: decoding one alone may drop its space
        self._read = 0  # tokens before here are in the text
        self._held = ""  # text that may be the beginning of a stop string
        self.is_stopped = False
        self.text = ""

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # a list only for a batch
        return text

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens and return the text that is certain now."""
        pieces = []
        for token in tokens:
            if self.is_stopped:
                break
            if token in self._skipped:
                continue
            self._tokens.append(int(token))
            pieces.append(self._settle(self._take(is_last=False), is_last=False))
        return "".join(pieces)

    def finish(self) -> str:
        """Return what was held back, as the text ends here."""
        return "" if self.is_stopped else self._settle(self._take(is_last=True), is_last=True)

    def _take(self, is_last: bool) -> str:
        """Return the text of the pending tokens, where it ends with a whole character."""
        end = len(self._tokens)
        context = self._decode(self._tokens[self._start : self._read])
        text = self._decode(self._tokens[self._start : end])
        if text.endswith(BROKEN) and not is_last:
            if end - self._read <= PATIENCE:
                return ""
            end -= MOST_BYTES - 1  # only the last tokens can still become a character
            text = self._decode(self._tokens[self._start : end])
        self._start, self._read = self._read, end
        return text[len(context) :]

    def _settle(self, new: str, is_last: bool) -> str:
        """Cut at a stop string; hold back an end that may become one."""
        text = self._held + new
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.is_stopped, self._held = True, ""
            text = text[: min(places)]
        elif not is_last:
            longest = max((len(stop) - 1 for stop in self._stop), default=0)
            held = next(
                (
                    size
                    for size in range(min(longest, len(text)), 0, -1)
                    if any(stop.startswith(text[-size:]) for stop in self._stop)
                ),
                0,
            )
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        else:
            self._held = ""
        self.text += text
        return text
