"""Run several evaluations and write one page: tables that sort, pictures, no network; finished parts are not run again.

    spotlight eval report --selector runs/demo --fraction 0.2      # two CPU cores: about 10 minutes
    spotlight eval report --selector runs/smollm2                  # one GPU
    spotlight eval report --plan my_plan.yaml --out runs/report
    spotlight eval report --resume --out runs/report               # after an interruption

Without --plan: SmolLM2 on embedded texts (perplexity, selections, a passage again, a pass key), all rivals. The folder
holds report.html (one file, to be passed on), results.json, plan.yaml, and a run folder of each evaluation.
"""

import dataclasses
from collections.abc import Sequence

from spotlight_jax import cli
from spotlight_jax.errors import InputError
from spotlight_jax.runs import stored_by


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What is reported."""

    plan: str | None = None
    """YAML file of evaluations; without it, SmolLM2 on embedded texts."""
    model: str | None = None
    """Model of all evaluations, instead of the plan's."""
    selector: str | None = None
    """Trained hash functions for all evaluations, instead of the plan's."""
    fraction: float = 1.0
    """Share of the plan to run, for a quick look: of lists (texts, lengths, depths, keep, settings, ...) the first
    entries, of counts (windows, samples, queries, ...) a part."""
    out: str | None = None
    """Folder of the report; without it, a new one under runs/."""
    resume: bool = False
    """Continue the report in --out: what it has evaluated is not evaluated again."""

    def __post_init__(self) -> None:
        """Refuse reports of nothing."""
        if not 0 < self.fraction <= 1:
            raise InputError(f"fraction is {self.fraction}; give a share above 0 and at most 1")
        if self.resume and self.out is None:
            raise InputError("--resume needs the report's folder: add --out FOLDER")


main = cli.main_of("eval.report.run")


def command(args: Sequence[str] | None = None) -> int:
    """Run `spotlight eval report`."""
    return cli.run(main, ReportConfig, "spotlight eval report", __doc__, args, stored_by(ReportConfig))
