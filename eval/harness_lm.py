"""The `LM` that lm-evaluation-harness talks to; importing this needs the harness (extra `eval`), not torch."""

import collections
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from eval.harness_scores import Progress, Reader, Request, Tally, Wanted
from spotlight_jax.config.sampling import SamplingConfig
from spotlight_jax.errors import InputError
from spotlight_jax.token_ids import check_ids, encode_text, render_chat

DEFAULT_NEW_TOKENS = 256  # the harness's own, where a task names none

Pair = tuple[tuple[str, str], list[int], list[int]]  # texts, and the token ids of context and continuation


def question_start(context: str) -> int:
    """Where the question begins: after the last blank line, else after the last line break, else at the start."""
    text = context.rstrip()
    for break_ in ("\n\n", "\n"):
        place = text.rfind(break_)
        if place >= 0:
            return place + len(break_)
    return 0


class SpotlightLM(TemplateLM):
    """A model read by one method.

    Contexts are passed densely, as a prefill; the tokens of a continuation are scored as decoding would: each query
    from the first continuation token on reads what the method selects. With `question_sparse`, so does every query from
    the context's question on.
    """

    def __init__(
        self,
        reader: Reader,
        max_length: int | None = None,
        question_sparse: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Take a reader; sequences, with the token that comes last, are at most its model's context.

        Args:
            reader: the model and the method.
            max_length: tokens of a sequence; longer ones lose their beginning.
            question_sparse: see above.
            progress: is told how many requests of how many are done.
        """
        super().__init__()
        assert reader.subject.tokenizer is not None, "the harness gives texts"
        self.reader = reader
        self.tokenizer: Any = reader.subject.tokenizer
        self.max_length = reader.limit - 1 if max_length is None else max_length
        self.question_sparse, self.progress = question_sparse, progress
        self.tallies: dict[str, Tally] = collections.defaultdict(Tally)
        self.unmatched: set[str] = set()  # a line for each stop string that no text can hold

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        if self.tokenizer.eos_token_id is None:
            raise InputError("the model's tokenizer has no token that ends a text, and this task needs one")
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context stands for."""
        found = self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        if found is None:
            raise InputError("the model's tokenizer has no token that begins or ends a text, and the harness needs one")
        check_ids([found], self.reader.subject.cfg.vocab, self.tokenizer)
        return found

    @property
    def tokenizer_name(self) -> str:
        """Of the model whose template and tokens these are."""
        return self.reader.subject.source.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a text that begins with the beginning-of-text token does not get another."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        return encode_text(self.tokenizer, string, self.reader.subject.cfg.vocab, add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The model's template; a system message that it does not know is left out."""
        if not self.tokenizer.chat_template:
            raise InputError(f"{self.reader.subject.source} has no chat template; leave --chat out")
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        known = [message for message in chat_history if message["role"] != "system"]
        try:
            return render_chat(self.tokenizer, chat_history, **options)
        except InputError:
            if known == chat_history:
                raise
            return render_chat(self.tokenizer, known, **options)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would write it."""
        pairs: list[Pair] = []
        for context, continuation in (request.args for request in requests):
            if context:
                pairs.append(((context, continuation), *self._encode_pair(context, continuation)))
                continue
            tokens = self.tok_encode(continuation, add_special_tokens=False)
            begin = [self.prefix_token_id]
            if tokens[:1] == begin:
                begin, tokens = tokens[:1], tokens[1:]
            pairs.append(((context, continuation), begin, tokens))
        return self._loglikelihood_tokens(pairs, tasks=[request.task_name for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the context's length; every query but the first selects."""
        pairs: list[Pair] = []
        tasks, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                pairs.append((("", ""), *make_disjoint_window(window)))
                tasks.append(request.task_name)
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(pairs, tasks=tasks), strict=True):
            sums[owner] += log_prob
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], tasks: Sequence[str] = (), **_: Any
    ) -> list[tuple[float, bool]]:
        wanted = []
        for number, ((context, _text), before, after) in enumerate(requests):
            task = tasks[number] if tasks else ""
            if not after or len(after) > self.max_length:
                name = task or "a task"
                raise InputError(f"{name} has a continuation of {len(after)} tokens, and 1 to {self.max_length} fit")
            sparse_from = len(before)
            if self.question_sparse:
                asked = question_start(context)
                sparse_from = min(len(self.tok_encode(context[:asked])) if asked else 0, len(before))
            dropped = max(0, len(before) + len(after) - (self.max_length + 1))
            self.tallies[task].truncated += dropped > 0
            tokens = tuple([*before, *after][dropped:])
            wanted.append(Request(tokens, len(before) - dropped, max(sparse_from - dropped, 0)))
        answers = self.reader.score(wanted, self.progress)
        for number, (request, answer) in enumerate(zip(wanted, answers, strict=True)):
            scored = len(request.tokens) - request.scored_from
            self.tallies[tasks[number] if tasks else ""].add(answer, scored, scored)
        return [(answer.log_prob, answer.is_greedy) for answer in answers]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string of the task; those with the same settings are written together."""
        groups: dict[Wanted, list[int]] = collections.defaultdict(list)
        for place, request in enumerate(requests):
            groups[read_settings(request.args[1], self.reader.seed)].append(place)
        texts = [""] * len(requests)
        for wanted, places in groups.items():
            self.unmatched.update(self.reader.stops(wanted).unmatched)
            room = self.max_length - wanted.max_new_tokens
            if room < 1:
                raise InputError(
                    f"{requests[places[0]].task_name} asks for {wanted.max_new_tokens} new tokens; the model's context "
                    f"holds {self.max_length}"
                )
            prompts = []
            for place in places:
                tokens = self.tok_encode(requests[place].args[0]) or [self.prefix_token_id]
                self.tallies[requests[place].task_name].truncated += len(tokens) > room
                prompts.append(tokens[-room:])
            for place, found in zip(places, self.reader.write(prompts, wanted, self.progress), strict=True):
                texts[place] = found.text
                self.tallies[requests[place].task_name].add(found, found.tokens, max(found.tokens - 1, 0))
        return texts


def read_settings(given: dict[str, Any], seed: int = 0) -> Wanted:
    """A task's generation settings; raises InputError for those that no method here has."""
    known = dict(given)
    stop = known.pop("until", None) or ()
    counts = [
        known.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    ]
    count = next((count for count in counts if count is not None), DEFAULT_NEW_TOKENS)
    temperature = float(known.pop("temperature", 0.0) or 0.0)
    if not known.pop("do_sample", temperature > 0):
        temperature = 0.0
    top_k, top_p = int(known.pop("top_k", None) or 0), float(known.pop("top_p", None) or 1.0)
    sampling = SamplingConfig(temperature, top_k, top_p, seed) if temperature else SamplingConfig(seed=seed)
    if known.get("num_beams") in (1, None):  # greedy, or drawn, as without beams
        known.pop("num_beams", None)
    if known:
        raise InputError(f"the task's generation settings {', '.join(sorted(known))} are not known here")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    return Wanted(int(count), tuple(text for text in stops if text), sampling)
