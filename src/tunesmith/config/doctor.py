"""`tunesmith doctor`: what this machine has, what a run would use and why, and what is missing.

A table of rows (`CHECKS`), each with a probe of its own. A probe that fails is a row that says so and hides no other,
because the machine of somebody who looks here is often broken.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tunesmith._version import __version__
from tunesmith.config.doctor_machine import MACHINE
from tunesmith.config.doctor_packages import ESSENTIAL, PACKAGES
from tunesmith.config.doctor_plan import PLAN
from tunesmith.config.doctor_row import Check, Finding, Subject
from tunesmith.contracts.errors import UserError

CHECKS: tuple[Check, ...] = (*MACHINE, *PLAN, *PACKAGES)
"""Every row, in the order in which they are printed."""


@dataclass(frozen=True)
class Diagnosis:
    """Every row with what it found.

    Attributes:
        rows: those that have something to say, in the order of `CHECKS`.
    """

    rows: tuple[tuple[Check, Finding], ...]

    @property
    def possible(self) -> bool:
        """Whether nothing essential is broken."""
        return not any(finding.state == "broken" for _, finding in self.rows)

    @property
    def sentence(self) -> str:
        """One sentence: whether training is possible and on what, or the first thing that is in the way."""
        for check, finding in self.rows:
            if finding.state == "broken":
                what = f"{check.name}: {finding.value}".rstrip(".")
                return f"Training is not possible: {what}. {finding.advice}".rstrip()
        found = {check.name: finding for check, finding in self.rows}
        using = [found[name].value.partition(":")[0] for name in ("device", "compute type") if name in found]
        return f"Training is possible, on {' in '.join(using)}."

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [
            {
                "section": check.section,
                "name": check.name,
                "value": finding.value,
                "state": finding.state,
                "advice": finding.advice,
            }
            for check, finding in self.rows
        ]
        return {
            "tunesmith": __version__,
            "possible": self.possible,
            "sentence": self.sentence,
            "checks": rows,
        }


def examine(run_file: str | None = None, checks: tuple[Check, ...] = CHECKS) -> Diagnosis:
    """Look at every row. Never fails.

    Args:
        run_file: the run that is asked about; None is any run.
        checks: the rows.
    """
    subject = Subject(run_file)
    with _silence():
        found = [(check, _look(check, subject)) for check in checks]
    return Diagnosis(tuple((check, finding) for check, finding in found if finding is not None))


@contextmanager
def _silence() -> Iterator[None]:
    """Libraries warn while they are imported; what matters of it is a row."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


def _look(check: Check, subject: Subject) -> Finding | None:
    try:
        return check.probe(subject)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        advice = "" if package in ESSENTIAL.values() else f"Run `pip install {package}`."
        return Finding(f"cannot be told without {package}", "unknown", advice)
    except UserError as error:
        return Finding(error.message, "unknown", error.hint or "")
    except Exception as error:  # whatever a broken package, driver or file raises belongs into its own row
        first = str(error).strip().splitlines()[:1] or ["no reason given"]
        return Finding(f"cannot be told: {type(error).__name__}: {first[0]}", "unknown")
