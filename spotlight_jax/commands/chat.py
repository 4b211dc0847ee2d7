"""Talk with a model in the terminal; the talk so far stays in the cache.

    spotlight chat --selector runs/demo

An empty line does nothing, /new starts again, /quit or Ctrl-D ends, and Ctrl-C cuts an answer short.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from spotlight_jax import cli
from spotlight_jax.commands.session import SessionConfig, describe, load_fitting, read_selector
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.engine import DecodeState, Engine
from spotlight_jax.errors import InputError
from spotlight_jax.generate import STREAM_BLOCK, Run, context_limit, encode_chat
from spotlight_jax.models.load import BaseModel, load_config, open_tokenizer


@dataclasses.dataclass(frozen=True)
class ChatCommandConfig(SessionConfig):
    """How to talk."""

    system: str = ""
    """What the model is told before the talk."""
    report: bool = False
    """After each answer, say what it took."""


class Talk:
    """Messages so far, and a cache that holds their tokens."""

    def __init__(self, model: BaseModel, engine: Engine, cfg: ChatCommandConfig) -> None:
        """Nothing said yet."""
        self.model, self.engine, self.cfg = model, engine, cfg
        self.start_anew()

    def start_anew(self) -> None:
        """Forget everything but the system's message."""
        self.messages = [{"role": "system", "content": self.cfg.system}] if self.cfg.system else []
        self.cached: list[int] = []
        self.state: DecodeState | None = None

    def answer(self, text: str, write: Callable[[str], None]) -> Run:
        """Say something, and hand the answer to `write` as it comes."""
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = encode_chat(self.model.tokenizer, messages)
        limit = context_limit(self.model.cfg)
        if len(tokens) + self.cfg.max_new_tokens > limit:
            raise InputError(f"the talk has {len(tokens)} tokens and fills the model's context of {limit}; say /new")
        # what the template makes of the talk so far is what was cached, unless it rewrites earlier turns
        keeps = self.state is not None and tokens[: len(self.cached)] == self.cached and len(tokens) > len(self.cached)
        prompt, state = (tokens[len(self.cached) :], self.state) if keeps else (tokens, None)
        self.state = None  # given up to the run
        run = Run(self.engine, self.model.tokenizer, [prompt], self.cfg.generation(), state)
        try:
            write(run.pieces[0])
            while not run.is_done:
                write(run.step(STREAM_BLOCK)[0])
        except KeyboardInterrupt:
            write(" ...")
        self.state = run.state
        said = list(run.results()[0].tokens)
        count = int(run.state.cache.lengths[0])
        self.cached = (tokens + said)[:count]
        self.messages = [*messages, {"role": "assistant", "content": run.results()[0].text}]
        return run


def main(cfg: ChatCommandConfig, read: Callable[[str], str] = input) -> list[dict[str, str]]:
    """Talk until the input ends; returns the messages."""
    console, notes = Console(highlight=False), Console(stderr=True)
    use_compile_cache()
    model_cfg = load_config(cfg.model)
    encode_chat(open_tokenizer(cfg.model), [{"role": "user", "content": "Hello"}])  # refuses a model without template
    selector = read_selector(cfg, model_cfg)
    longest = max(1, context_limit(model_cfg) - cfg.max_new_tokens)
    model, engine = load_fitting(cfg, model_cfg, selector, [longest], notes)
    talk = Talk(model, engine, cfg)

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    while True:
        try:
            text = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if text == "/quit":
            break
        if text == "/new":
            talk.start_anew()
        elif text:
            try:
                run = talk.answer(text, write)
            except InputError as error:
                notes.print(str(error), markup=False)
                continue
            write("\n")
            if cfg.report:
                for line in describe(run.report(), selector, run.cfg, model.cfg):
                    console.print(line, markup=False, style="dim")
    return talk.messages


def command(args: Sequence[str] | None = None) -> int:
    """`spotlight chat`."""
    return cli.run(main, ChatCommandConfig, "spotlight chat", __doc__, args)


if __name__ == "__main__":
    sys.exit(command())
