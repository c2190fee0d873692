"""The table of objectives: `objective.kind` names a row."""

from __future__ import annotations

from tunesmith.objectives.api import Objective
from tunesmith.objectives.sft import SFT

OBJECTIVES: dict[str, Objective] = {SFT.name: SFT}
