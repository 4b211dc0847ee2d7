"""`spotlight push` and `--selector hf:owner/name`, against a stand-in of the hub on this machine."""

import dataclasses
import json
import subprocess
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
import yaml

from spotlight_jax import cli
from spotlight_jax.errors import InputError
from spotlight_jax.selector.card import write_card
from spotlight_jax.selector.checkpoint import load_selector, save_selector
from tests.eval.tiny import make_selector
from tests.hub_standin import TOKEN, run_hub

# huggingface_hub's own way with its HTTP library
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

METRICS = {"keep": 0.02, "share_read": 0.0251, "oracle": "oracle-mass", "window": 64, "steps": 7, "length": 160} | {
    "iou": 0.61, "mass": 0.83, "iou_lsh": 0.3, "mass_lsh": 0.7, "mass_oracle": 0.85, "length_windows": "whole",
    "iou_at_length": 0.5, "mass_at_length": 0.8, "iou_lsh_at_length": 0.2, "mass_lsh_at_length": 0.6,
    "mass_oracle_at_length": 0.82, "selector": "/home/somebody/runs/mine/selector",
}  # fmt: skip
RECIPE = {"model": "/home/somebody/model", "data": {"train": ["/home/somebody/letters.txt", "embedded"], "window": 64}}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, in the place of the real hub for this process."""
    with run_hub() as hub:
        constants = huggingface_hub.constants
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def selector(tmp_path):
    base = "owner/base-model"
    made = dataclasses.replace(
        make_selector(), base_model=base, positions=160, info={"recipe": RECIPE, "metrics": METRICS}
    )
    save_selector(tmp_path / "run" / "selector", made, write_card(made))
    return tmp_path / "run"


def push(selector, *flags, to="me/selector"):
    return cli.main(["push", "--selector", str(selector), "--to", to, *flags])


def metadata_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_what_is_pushed_is_what_is_fetched(hub, selector, capsys):
    assert push(selector) == 0
    assert "sent 4 files" in capsys.readouterr().out
    original, fetched = load_selector(selector), load_selector("hf:me/selector")
    for ours, theirs in zip(jax.tree.leaves(original.params), jax.tree.leaves(fetched.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (fetched.base_model, fetched.positions, fetched.cfg) == (original.base_model, 160, original.cfg)
    assert hub.is_private == {"me/selector": False}
    at = f"hf:me/selector@{hub.sha('me/selector')}"
    assert load_selector(at).info == fetched.info
    assert push(selector) == 0  # once more: the repository is there


def test_no_path_of_this_machine_and_no_code_is_sent(hub, selector, capsys):
    (selector / "selector" / "handler.py").write_text("raise SystemExit('executed')")
    assert push(selector, "--private") == 0
    files = hub.files["me/selector"]
    assert set(files) == {"README.md", "config.json", "manifest.json", "selector.safetensors"}
    assert not any(b"somebody" in content for content in files.values())
    assert hub.is_private == {"me/selector": True}
    assert json.loads(files["config.json"])["recipe"]["data"]["train"] == ["letters.txt", "embedded"]


def test_only_the_selectors_files_are_fetched(hub, selector, capsys):
    assert push(selector) == 0
    hub.files["me/selector"]["modeling.py"] = b"raise SystemExit('executed')"
    load_selector("hf:me/selector")
    fetched = {path.name for path in (selector.parent / "hub-cache").rglob("*") if path.is_file()}
    assert "config.json" in fetched and "modeling.py" not in fetched


def test_a_damaged_repository_is_refused(hub, selector, capsys):
    assert push(selector) == 0
    hub.files["me/selector"]["selector.safetensors"] = hub.files["me/selector"]["selector.safetensors"][:-8]
    with pytest.raises(InputError, match="damaged"):
        load_selector("hf:me/selector")


def test_a_dry_run_shows_the_card_and_sends_nothing(hub, selector, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert push(selector, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "would send 4 files" in shown and not hub.files
    metadata = metadata_of(shown)
    assert metadata["base_model"] == "owner/base-model" and metadata["library_name"] == "spotlight-jax"
    assert {"jax", "kv-cache"} <= set(metadata["tags"])
    (model,) = metadata["model-index"]
    measured = [metric["value"] for result in model["results"] for metric in result["metrics"]]
    assert measured == [METRICS[name] for name in ("mass", "iou", "mass_at_length", "iou_at_length")]
    huggingface_hub.ModelCard(shown[shown.index("---\n") :])  # the hub's own reader takes it


def test_a_selector_without_measurements_claims_none(hub, tmp_path, capsys):
    save_selector(tmp_path / "bare", dataclasses.replace(make_selector(), base_model="smollm2-135m"), "card")
    assert push(tmp_path / "bare", "--dry-run") == 0
    metadata = metadata_of(capsys.readouterr().out)
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and "model-index" not in metadata


@pytest.mark.parametrize(
    ("flags", "to", "token", "told"),
    [
        ([], "me/selector", None, "HF_TOKEN"),
        ([], "me/selector", "hf_reads", "your token may not write to 'me/selector' (HTTP 401)"),
        ([], "other/selector", TOKEN, "your token may not write to 'other/selector' (HTTP 403)"),
        ([], "selector", TOKEN, "--to is 'selector'; give OWNER/NAME"),
        (["--base-model", "x"], "me/selector", TOKEN, "--base-model is 'x'"),
        ([], "me/a--b", TOKEN, "'me/a--b' is no name that the hub takes"),
    ],
)
def test_what_cannot_be_sent_is_one_line(hub, selector, capsys, monkeypatch, flags, to, token, told):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert push(selector, *flags, to=to) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error and not hub.files


def test_an_upload_that_breaks_off_is_one_line_and_commits_nothing(hub, selector, capsys):
    hub.is_full = True
    assert push(selector) == 2
    assert "cannot be sent to the hub" in capsys.readouterr().err.splitlines()[-1]
    assert hub.files == {"me/selector": {}}


def test_a_base_model_on_this_machine_needs_a_name_that_others_know(hub, selector, tmp_path, capsys):
    local = dataclasses.replace(load_selector(selector), base_model=str(tmp_path / "model"))
    save_selector(tmp_path / "local", local, "card")
    assert push(tmp_path / "local", "--dry-run") == 2
    assert "give --base-model OWNER/NAME" in capsys.readouterr().err
    assert push(tmp_path / "local", "--base-model", "owner/other") == 0
    assert load_selector("hf:me/selector").base_model == "owner/other"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("hf:me/none", "me/none: the hub has no such selector"),
        ("hf:me/selector@v9", "me/selector: the hub has no revision 'v9'"),
        ("hf:selector", "give hf:OWNER/NAME"),
        ("hf:me/selector@", "give hf:OWNER/NAME"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(hub, selector, capsys, source, told):
    assert push(selector) == 0
    assert cli.main(["generate", "--selector", source, "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert told in error.splitlines()[-1]


def test_a_hub_that_does_not_answer_is_one_line(selector):
    code = f"from spotlight_jax import cli; cli.main(['push', '--selector', {str(selector)!r}, '--to', 'me/x']); "
    code += "cli.main(['generate', '--selector', 'hf:me/x', '--prompt', 'x'])"
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": TOKEN, "HF_HOME": str(selector), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=nowhere)
    sent, fetched = done.stderr.splitlines()
    assert sent.startswith("spotlight push: 'me/x' cannot be sent to the hub (no network?)")
    assert fetched.startswith("spotlight generate: me/x: cannot be fetched from the hub (no network?)")
