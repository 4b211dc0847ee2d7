"""Log-probabilities in OpenAI's formats, and what each token of a vocabulary is as text and as bytes."""

import codecs
import json
import re
from typing import Any

from spotlight_jax.serve.requests import Piece
from spotlight_jax.stops import special_tokens

LEAST = -9999.0  # OpenAI's number for what is next to impossible; JSON has no infinity
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Return what byte-level tokenizers write bytes as: printable ones as such, others as characters from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


class TokenTexts:
    """Bytes of every token of a vocabulary; of a special token, those of its name."""

    def __init__(self, tokenizer: Any, vocab: int) -> None:
        """Look all tokens up.

        Args:
            tokenizer: a fast one of Hugging Face's.
            vocab: rows of the model's embedding; those that no token has are empty.
        """
        self.special = frozenset(special_tokens(tokenizer).values())
        added = {int(index): token.content for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        is_byte_level = '"ByteLevel"' in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
        alphabet = byte_alphabet()

        def bytes_of(index: int, name: str | None) -> bytes:
            if index in added:
                return added[index].encode("utf-8")
            if name is None:
                return b""
            if is_byte_level:
                return b"".join(bytes([alphabet[one]]) if one in alphabet else one.encode("utf-8") for one in name)
            if found := _BYTE.fullmatch(name):
                return bytes([int(found[1], 16)])
            return name.replace("\u2581", " ").encode("utf-8")  # how SentencePiece writes a space

        names = tokenizer.convert_ids_to_tokens(list(range(vocab)))
        self.bytes = [bytes_of(index, name) for index, name in enumerate(names)]


def _number(logprob: float) -> float:
    return max(logprob, LEAST)


def chat_logprobs(piece: Piece, texts: TokenTexts) -> dict[str, Any]:
    """A piece's `logprobs` as `/v1/chat/completions` has them; bytes that are no text are written as \\x.."""

    def describe(token: int, logprob: float) -> dict[str, Any]:
        raw = texts.bytes[token]
        return {"token": raw.decode("utf-8", "backslashreplace"), "logprob": _number(logprob), "bytes": list(raw)}

    return {
        "content": [
            {**describe(token, one.chosen), "top_logprobs": [describe(*other) for other in one.top]}
            for token, one in zip(piece.tokens, piece.logprobs, strict=True)
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """One text's `logprobs` as `/v1/completions` has them, piece by piece."""

    def __init__(self, texts: TokenTexts) -> None:
        """Begin a text.

        Args:
            texts: of the model's tokens.
        """
        self._texts, self._offset = texts, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def _name(self, token: int) -> str:
        raw = self._texts.bytes[token]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def add(self, piece: Piece) -> dict[str, Any]:
        """Add the next tokens; the chosen one is among its place's most probable ones even where it is none of them."""
        offsets, top = [], []
        for token, one in zip(piece.tokens, piece.logprobs, strict=True):
            offsets.append(self._offset)
            if token not in self._texts.special:  # which is no text
                self._offset += len(self._decoder.decode(self._texts.bytes[token]))
            found = {self._name(other): _number(logprob) for other, logprob in one.top}
            top.append(found | {self._name(token): _number(one.chosen)})
        return {
            "text_offset": offsets,
            "token_logprobs": [_number(one.chosen) for one in piece.logprobs],
            "tokens": [self._name(token) for token in piece.tokens],
            "top_logprobs": top,
        }
