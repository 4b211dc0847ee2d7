"""The table of targets: one row an input format."""

from tests.fuzz import models
from tests.fuzz.target import Target

TARGETS: dict[str, Target] = {**models.TARGETS}
