"""What ends a text: the ids that the model's files name, and the strings that the user names."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from spotlight_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Stops:
    """Ids and strings that end a text, and strings that were asked to and cannot."""

    tokens: tuple[int, ...]  # a text ends with the first of them
    by_string: tuple[int, ...]  # of these, the ones that a stop string names
    strings: tuple[str, ...]  # a text ends before the first of them
    unmatched: tuple[str, ...]  # a line for each string that no text can hold


def find_stops(
    model_cfg: DecoderConfig, tokenizer: Any, strings: Sequence[str] = (), ignore_eos: bool = False
) -> Stops:
    """Find everything that ends a text of this model.

    The model's own ids are those of its configs (several, in models that end a turn and a text differently) and the
    tokenizer's end of text. Text is decoded without special tokens, so a stop string that is one is an id.

    Args:
        model_cfg: names the ids of the model's configs.
        tokenizer: of the model; None where texts are token ids.
        strings: of which the first to appear ends a text.
        ignore_eos: leave the model's own ids out.
    """
    end = getattr(tokenizer, "eos_token_id", None)
    own = {*model_cfg.stop_tokens, *(() if end is None else (int(end),))}
    special = special_tokens(tokenizer)
    by_string = [special[text] for text in strings if text in special]
    unmatched = []
    for text in strings:
        inside = [name for name in special if name in text]
        if text not in special and inside:
            unmatched.append(
                f"the stop string {text!r} can never match: the special token {max(inside, key=len)!r} in it is not "
                "part of the text; give that token alone"
            )
    tokens = sorted({*by_string, *(() if ignore_eos else own)})
    return Stops(tuple(tokens), tuple(by_string), tuple(text for text in strings if text), tuple(unmatched))


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return tokens that decoding leaves out, with their ids."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token.content: int(index) for index, token in added.items() if token.special and token.content}
