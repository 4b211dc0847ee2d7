"""A plan's evaluations, one after another, and the page of their results."""

import contextlib
import dataclasses
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.report import ReportConfig
from eval.report.page import write_page
from eval.report.plan import DEFAULT, Plan, PlannedPart, read_plan
from spotlight_jax import files, runs
from spotlight_jax.display import print_result
from spotlight_jax.errors import InputError


def open_folder(cfg: ReportConfig) -> tuple[ReportConfig, Path]:
    """Open the report's folder, and what it was started with where it is resumed."""
    if not cfg.resume:
        path = Path(cfg.out) if cfg.out is not None else runs.next_free(Path("runs"), "report")
        return cfg, path
    folder = runs.RunFolder(Path(cfg.out or ""))
    folder.check_resumed(cfg, ("out", "resume"))
    return cfg, folder.path


def main(cfg: ReportConfig) -> dict[str, Any]:
    """Evaluate what is not finished, then write the page; returns what the last line of stdout holds."""
    cfg, path = open_folder(cfg)
    source = path / "plan.yaml" if cfg.resume else DEFAULT if cfg.plan is None else Path(cfg.plan)
    given = {name: value for name in ("model", "selector") if (value := getattr(cfg, name)) is not None}
    plan = read_plan(source, given, cfg.fraction)
    with runs.hold(path):
        if not cfg.resume:
            runs.RunFolder.create(path, cfg)
            files.write_bytes(path / "plan.yaml", source.read_bytes())
        before = _seconds_before(path)
        parts: list[dict[str, Any]] = []
        for number, part in enumerate(plan.parts, start=1):
            print(f"report: {part.name} ({number} of {len(plan.parts)})", file=sys.stderr, flush=True)
            parts.append(run_part(part, path / part.name, before.get(part.name, 0.0)))
            write_results(path, cfg, plan, parts)  # an interrupted report has a page too
    summary: dict[str, Any] = {"eval": "report", "out": str(path), "page": str(path / "report.html")}
    summary["results"] = [{"part": part["name"]} | row for part in parts for row in part["results"]]
    print(f"written: {path / 'report.html'}", file=sys.stderr)
    print_result(summary)
    return summary


def run_part(part: PlannedPart, folder: Path, seconds: float) -> dict[str, Any]:
    """Run one evaluation into its folder, or read what it has measured; its tables go to `output.txt` there.

    Args:
        seconds: it took before it was interrupted.
    """
    if not is_finished(part, folder):
        started = time.monotonic()
        config = dataclasses.replace(part.config, out=str(folder), resume=(folder / "config.yaml").is_file())
        with contextlib.redirect_stdout(io.StringIO()) as output:
            try:
                part.main(config)
            except InputError as error:
                raise InputError(f"{part.name}: {error}") from None
        files.write_text(folder / "output.txt", output.getvalue())
        seconds += time.monotonic() - started
    results = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["results"]
    config = runs.to_plain(part.config)
    return {"name": part.name, "eval": part.evaluation, "seconds": seconds, "config": config, "results": results}


def _seconds_before(path: Path) -> dict[str, float]:
    """Return what the parts of an earlier run took."""
    file = path / "results.json"
    parts = json.loads(file.read_text(encoding="utf-8"))["parts"] if file.is_file() else []
    return {part["name"]: part["seconds"] for part in parts}


def is_finished(part: PlannedPart, folder: Path) -> bool:
    """Whether the folder holds all of what the plan asks."""
    if not (folder / "summary.json").is_file():
        return False
    first = runs.RunFolder(folder).config(type(part.config))
    same = dataclasses.replace(part.config, out=first.out, resume=first.resume)
    return not runs.differences(first, same)


def write_results(path: Path, cfg: ReportConfig, plan: Plan, parts: Sequence[dict[str, Any]]) -> None:
    """Write `results.json` and `report.html`."""
    environment = json.loads((path / "env.json").read_text(encoding="utf-8"))
    whole = {"title": plan.title, "fraction": cfg.fraction, "environment": environment, "parts": list(parts)}
    files.write_json(path / "results.json", whole, indent=1)
    missing = [part.name for part in plan.parts[len(parts) :]]
    write_page(path, whole, missing, (path / "plan.yaml").read_text(encoding="utf-8"))
