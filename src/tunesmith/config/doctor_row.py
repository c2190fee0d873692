"""The words of `tunesmith doctor`: a row of its table, what a row found, and the run that it is about. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from tunesmith.config.nvidia_smi import ask_nvidia_smi
from tunesmith.settings.run import RunSettings

State = Literal["good", "note", "missing", "broken", "unknown"]
"""`note` is worth knowing, `missing` an optional part that is not there, `broken` what makes training impossible,
and `unknown` what could not be found out."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a row found.

    Attributes:
        value: one line.
        advice: what to do about it, or what it would give; empty where there is nothing to say.
    """

    value: str
    state: State = "good"
    advice: str = ""


@dataclass(frozen=True)
class Subject:
    """What is looked at: this machine, for a run where one is named.

    Attributes:
        run_file: the run file; None where none is named.
    """

    run_file: str | None = None

    @cached_property
    def settings(self) -> RunSettings | None:
        """The settings of the run; None where no run is named.

        Raises:
            UserError: the file cannot be read, or is wrong.
        """
        from tunesmith.config.load import load_settings

        return None if self.run_file is None else load_settings(self.run_file)

    @cached_property
    def config(self) -> Any:
        """The config of the run's model; None without a run, and where the model is not on this machine.

        Raises:
            UserError: as `settings`, or the config cannot be read.
        """
        from tunesmith.config.known_model import known_config

        if self.settings is None:
            return None
        model = self.settings.model
        return known_config(model.name, revision=model.revision, trust_remote_code=model.trust_remote_code)

    @cached_property
    def cards(self) -> list[dict[str, str]]:
        """The GPUs of the machine by `SMI_FIELDS`, whatever torch says of them."""
        return ask_nvidia_smi()


@dataclass(frozen=True, slots=True)
class Check:
    """A row of the table.

    Attributes:
        section: the heading that it stands under.
        name: what is looked at.
        probe: looks at it; None where there is nothing to say. What it raises becomes a finding.
    """

    section: str
    name: str
    probe: Callable[[Subject], Finding | None]
