"""The `LM` that lm-evaluation-harness talks to; importing this needs the harness (extra `eval`), not torch."""

import collections
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from eval.harness.scorer import GenerationSettings, Progress, Request, Scorer, TaskStats
from spotlight_jax.config.sampling import SamplingConfig
from spotlight_jax.errors import InputError
from spotlight_jax.token_ids import check_ids, encode_text, render_chat

DEFAULT_NEW_TOKENS = 256  # the harness's default, where a task names none

Pair = tuple[tuple[str, str], list[int], list[int]]  # texts, and the token ids of context and continuation


def question_start(context: str) -> int:
    """Return where the question begins: after the last blank line, else the last line break, else at the start."""
    text = context.rstrip()
    for break_ in ("\n\n", "\n"):
        place = text.rfind(break_)
        if place >= 0:
            return place + len(break_)
    return 0


class SpotlightLM(TemplateLM):  # type: ignore[misc]  # the harness is an extra, and not there to be checked
    """A model with one method.

    Contexts are passed densely, as a prefill; the tokens of a continuation are scored as decoding would: each query
    from the first continuation token on reads what the method selects. With `question_sparse`, so does every query from
    the context's question on.
    """

    def __init__(
        self,
        scorer: Scorer,
        max_length: int | None = None,
        question_sparse: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Take a scorer; sequences, with the token that comes last, are at most its model's context.

        Args:
            scorer: the model and the method.
            max_length: tokens of a sequence; longer ones lose their beginning.
            question_sparse: see above.
            progress: is called with how many requests of how many are done.
        """
        super().__init__()
        assert scorer.model.tokenizer is not None, "the harness gives texts"
        self.scorer = scorer
        self.tokenizer: Any = scorer.model.tokenizer
        self.max_length = scorer.limit - 1 if max_length is None else max_length
        self.question_sparse, self.progress = question_sparse, progress
        self.stats: dict[str, TaskStats] = collections.defaultdict(TaskStats)
        self.unmatched: set[str] = set()  # a line for each stop string that no text can hold

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text."""
        if self.tokenizer.eos_token_id is None:
            raise InputError("the model's tokenizer has no token that ends a text, and this task needs one")
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Return the token that an empty context stands for."""
        found = self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        if found is None:
            raise InputError("the model's tokenizer has no token that begins or ends a text, and the harness needs one")
        check_ids([found], self.scorer.model.cfg.vocab, self.tokenizer)
        return found

    @property
    def tokenizer_name(self) -> str:
        """Return the name of the model that the template and the tokens are of."""
        return self.scorer.model.source.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode a text; one that begins with the beginning-of-text token does not get another."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        return encode_text(self.tokenizer, string, self.scorer.model.cfg.vocab, add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Apply the model's template; a system message that it does not know is left out."""
        if not self.tokenizer.chat_template:
            raise InputError(f"{self.scorer.model.source} has no chat template; leave --chat out")
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        known = [message for message in chat_history if message["role"] != "system"]
        try:
            return render_chat(self.tokenizer, chat_history, **options)
        except InputError:
            if known == chat_history:
                raise
            return render_chat(self.tokenizer, known, **options)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability after its context, and whether greedy decoding would write it."""
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
        """Return log-probabilities of texts, in windows of the context's length; every query but the first selects."""
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
        asked = []
        for number, ((context, _text), before, after) in enumerate(requests):
            task = tasks[number] if tasks else ""
            if not after or len(after) > self.max_length:
                name = task or "a task"
                raise InputError(f"{name} has a continuation of {len(after)} tokens, and 1 to {self.max_length} fit")
            sparse_from = len(before)
            if self.question_sparse:
                start = question_start(context)
                sparse_from = min(len(self.tok_encode(context[:start])) if start else 0, len(before))
            dropped = max(0, len(before) + len(after) - (self.max_length + 1))
            self.stats[task].truncated += dropped > 0
            tokens = tuple([*before, *after][dropped:])
            asked.append(Request(tokens, len(before) - dropped, max(sparse_from - dropped, 0)))
        answers = self.scorer.score(asked, self.progress)
        for number, (request, answer) in enumerate(zip(asked, answers, strict=True)):
            scored = len(request.tokens) - request.scored_from
            self.stats[tasks[number] if tasks else ""].add(answer, scored, scored)
        return [(answer.log_prob, answer.is_greedy) for answer in answers]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts up to a stop string of the task; those with the same settings are continued together."""
        groups: dict[GenerationSettings, list[int]] = collections.defaultdict(list)
        for place, request in enumerate(requests):
            groups[read_settings(request.args[1], self.scorer.seed)].append(place)
        texts = [""] * len(requests)
        for settings, places in groups.items():
            self.unmatched.update(self.scorer.stops(settings).unmatched)
            longest = self.max_length - settings.max_new_tokens
            if longest < 1:
                raise InputError(
                    f"{requests[places[0]].task_name} asks for {settings.max_new_tokens} new tokens; the model's "
                    f"context holds {self.max_length}"
                )
            prompts = []
            for place in places:
                tokens = self.tok_encode(requests[place].args[0]) or [self.prefix_token_id]
                self.stats[requests[place].task_name].truncated += len(tokens) > longest
                prompts.append(tokens[-longest:])
            for place, found in zip(places, self.scorer.generate(prompts, settings, self.progress), strict=True):
                texts[place] = found.text
                self.stats[requests[place].task_name].add(found, found.tokens, max(found.tokens - 1, 0))
        return texts


def read_settings(given: dict[str, Any], seed: int = 0) -> GenerationSettings:
    """Return a task's generation settings; raises InputError for those that no method here has."""
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
    return GenerationSettings(int(count), tuple(text for text in stops if text), sampling)
