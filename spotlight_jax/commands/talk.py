"""A conversation with a model in the terminal."""

from collections.abc import Callable

from rich.console import Console

from spotlight_jax.commands.chat import ChatCommandConfig
from spotlight_jax.commands.session import decode, describe, load_fitting, read_configs
from spotlight_jax.commands.terminal import HELP, prepare_lines, read_line, write_text
from spotlight_jax.compiled import use_compile_cache
from spotlight_jax.decode_step import DecodeState
from spotlight_jax.engine import Engine
from spotlight_jax.errors import InputError
from spotlight_jax.generation import Run
from spotlight_jax.models.load import BaseModel, open_tokenizer
from spotlight_jax.selector.checkpoint import Selector
from spotlight_jax.token_ids import encode_chat


class Talk:
    """Messages so far, and a cache that holds their tokens."""

    def __init__(self, model: BaseModel, engine: Engine, cfg: ChatCommandConfig, limit: int, notes: Console) -> None:
        """Begin with nothing said.

        Args:
            limit: most tokens of the conversation, the next answer included.
            notes: where a terminal shows what is being waited for.
        """
        self.model, self.engine, self.cfg, self.limit, self.notes = model, engine, cfg, limit, notes
        self.start_anew()

    def start_anew(self) -> None:
        """Forget everything but the system's message."""
        self.messages = _first_messages(self.cfg)
        self.cached: list[int] = []
        self.state: DecodeState | None = None

    def answer(self, text: str, write: Callable[[str], None]) -> tuple[Run, bool]:
        """Say something, and hand the answer to `write` as it comes; returns the run and whether Ctrl-C cut it short.

        An answer that fails is as if nothing had been said.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = encode_chat(self.model.tokenizer, messages, self.model.cfg.vocab)
        most = self.cfg.generation.max_new_tokens
        if len(tokens) + most > self.limit:
            raise InputError(
                f"the talk has {len(tokens)} tokens, and with {most} for the answer passes its limit of {self.limit}; "
                + ("say /new to start again" if len(self.messages) > 1 else "shorten what you said")
            )
        # what the template makes of the messages so far is what was cached, unless it rewrites earlier turns
        keeps = self.state is not None and tokens[: len(self.cached)] == self.cached and len(tokens) > len(self.cached)
        rope = self.model.cfg.rope
        if rope.kind == "dynamic" and len(tokens) + most > rope.trained_len:
            keeps = False  # the cached keys were turned for a shorter talk
        prompt, state = (tokens[len(self.cached) :], self.state) if keeps else (tokens, None)
        self.state = None  # given up to the run
        run, is_cut = decode(self.engine, self.model.tokenizer, [prompt], self.cfg.generation, self.notes, write, state)
        self.state = run.state
        (result,) = run.results()
        self.cached = (tokens + list(result.tokens))[: int(run.state.cache.lengths[0])]
        self.messages = [*messages, {"role": "assistant", "content": result.text}]
        return run, is_cut


def _first_messages(cfg: ChatCommandConfig) -> list[dict[str, str]]:
    """Return the messages that every conversation begins with."""
    return [{"role": "system", "content": cfg.system}] if cfg.system else []


def main(cfg: ChatCommandConfig, read: Callable[[str], str] = input) -> list[dict[str, str]]:
    """Talk until the input ends; returns the messages."""
    notes = Console(stderr=True, highlight=False, style="dim")
    use_compile_cache()
    name, model_cfg, selector = read_configs(cfg, notes)
    # refuses a model without a template, and one whose template takes no system message, or wants one
    encode_chat(open_tokenizer(name), [*_first_messages(cfg), {"role": "user", "content": "Hello"}], model_cfg.vocab)
    limit = _talk_limit(cfg, model_cfg.max_context)
    model, engine = load_fitting(cfg, name, model_cfg, selector, [limit - cfg.generation.max_new_tokens], notes)
    talk = Talk(model, engine, cfg, limit, notes)
    prepare_lines()
    notes.print(HELP, markup=False, soft_wrap=True)
    while (text := read_line(read, notes)) is not None:
        if text == "/new":
            talk.start_anew()
        elif text == "/help":
            notes.print(HELP, markup=False, soft_wrap=True)
        elif text:
            _answer(talk, text, selector)
    return talk.messages


def _talk_limit(cfg: ChatCommandConfig, context: int) -> int:
    """Return the most tokens of a conversation; raises InputError where an answer leaves no room to say anything."""
    limit = context if cfg.context is None else min(cfg.context, context)
    if limit <= cfg.generation.max_new_tokens:
        raise InputError(
            f"a talk of at most {limit} tokens has no room for answers of {cfg.generation.max_new_tokens}; "
            "lower --max-new-tokens" + ("" if limit == context else " or raise --context")
        )
    return limit


def _answer(talk: Talk, text: str, selector: Selector | None) -> None:
    """Show an answer, and why it ends where it is not the model that ended it."""
    notes, cfg = talk.notes, talk.cfg.generation
    try:
        run, is_cut = talk.answer(text, write_text)
    except InputError as error:
        notes.print(str(error), markup=False, soft_wrap=True)
        return
    except KeyboardInterrupt:
        write_text("\n")
        notes.print("cut short; the talk is as it was before", markup=False, soft_wrap=True)
        return
    write_text(" ...\n" if is_cut else "\n")
    if not is_cut and run.results()[0].ended_by == "length":
        notes.print(f"the answer ends at --max-new-tokens {cfg.max_new_tokens}", markup=False, soft_wrap=True)
    if talk.cfg.report:
        for line in describe(run.report(), selector, cfg, talk.model.cfg):
            notes.print(line, markup=False, soft_wrap=True)
