"""A real tokenizer whose token n is byte n, for tests that need no trained one."""

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

END = 256  # id of the end-of-text token
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def _byte_names() -> list[str]:
    """How byte-level tokenizers write each byte: printable ones as themselves, the others from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    names = {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    return [names[byte] for byte in range(256)]


def byte_tokenizer(end: int = END) -> transformers.PreTrainedTokenizerFast:
    """Bytes, and one special token that ends a text: id 256, or the byte `end`."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={name: byte for byte, name in enumerate(_byte_names())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    name = "<end>" if end == END else _byte_names()[end]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=name)
    tokenizer.chat_template = TEMPLATE
    return tokenizer
