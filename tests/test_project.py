"""What people who join find: forms that can be read, a workflow that runs what we run, facts that agree."""

import re
import stat
import tomllib
from pathlib import Path

import pytest
import yaml

from spotlight_jax import cli

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read_yaml(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [form for form in FORMS if form.stem != "config"], ids=lambda path: path.stem)
def test_issue_forms_have_what_the_host_asks_of_them(path):
    form = read_yaml(path)
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert fields and all(field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)


def test_the_workflow_runs_what_runs_everywhere():
    (job,) = read_yaml(ROOT / ".github" / "workflows" / "ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR


def test_versions_and_licenses_agree():
    citation = read_yaml(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/releasing.md"])
def test_commands_and_paths_that_pages_name_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= set(targets)
    commands = {name for name, _, _ in cli._COMMANDS} | {"eval", "COMMAND", "train"}
    for words in re.findall(r"spotlight ((?:eval )?[a-z]+)", text):
        assert words in commands or words.split()[0] in commands, words
    for path in re.findall(r"\]\(([\w./-]+)\)", text) + re.findall(
        r"`((?:examples|docs|\.ci|\.github)/[\w./-]+)`", text
    ):
        assert (ROOT / path).exists() or (ROOT / page).parent.joinpath(path).exists(), path
