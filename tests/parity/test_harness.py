"""eval.harness beside the harness's own Hugging Face model on SmolLM2: the same scores; run with `-m parity`."""

import json

import jax.numpy as jnp
import pytest

from eval.common.cases import list_cases
from eval.common.flags import EvalConfig
from eval.harness.scorer import Scorer
from eval.model.load import load_eval_model

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # of the harness and its imports

FACTS = [
    ("The capital of France is", ["Paris", "Berlin", "a small dog"], 0),
    ("Water freezes at a temperature of", ["zero degrees Celsius", "ninety degrees", "blue"], 0),
    ("The opposite of hot is", ["cold", "warm", "table"], 0),
    ("Two plus two equals", ["four", "seven", "green"], 0),
    ("A baby cat is called a", ["puppy", "kitten", "calf"], 1),
    ("The sun rises in the", ["west", "east", "kitchen"], 1),
]
TASKS = {
    "facts": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "completions": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}} {{choices[label]}}.",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


def ask(lm, folder, **options):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, **options)


def responses(found, task):
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for response in sample["filtered_resps"]]


@pytest.mark.parametrize("chat", [False, True])
def test_scores_and_texts_are_those_of_the_harness_with_torch(chat, tmp_path, smollm2_by_torch):
    from lm_eval.models.huggingface import HFLM

    from eval.harness.lm import SpotlightLM

    docs = tmp_path / "docs.jsonl"
    rows = [{"text": text, "choices": choices, "label": label} for text, choices, label in FACTS]
    docs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(docs)}}, "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))

    cfg = EvalConfig(methods=("dense",), dtype="float32")
    model = load_eval_model(cfg)
    assert model.params["embed"]["table"].dtype == jnp.float32
    theirs = ask(
        HFLM(pretrained=smollm2_by_torch, tokenizer=model.tokenizer, batch_size=1), tmp_path, apply_chat_template=chat
    )
    ours = ask(SpotlightLM(Scorer(model, list_cases(cfg)[0], batch=4)), tmp_path, apply_chat_template=chat)

    for task in TASKS:
        scores = {name: value for name, value in theirs["results"][task].items() if isinstance(value, float)}
        assert scores
        for name, value in scores.items():
            assert ours["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
    for (one, one_greedy), (other, other_greedy) in zip(
        responses(ours, "facts"), responses(theirs, "facts"), strict=True
    ):
        assert one == pytest.approx(other, abs=2e-3) and one_greedy == other_greedy
    assert responses(ours, "completions") == responses(theirs, "completions")
    assert responses(ours, "texts") == pytest.approx(responses(theirs, "texts"), rel=1e-4)
