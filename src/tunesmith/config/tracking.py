"""Trackers of a run: refused where a package is missing, told the settings without their secrets. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tunesmith.contracts.errors import UserError
from tunesmith.contracts.installed import is_installed
from tunesmith.settings.run import RunSettings
from tunesmith.settings.secrets import HIDDEN, names_a_secret, without_secrets
from tunesmith.training.tracker_rows import TRACKERS, Value
from tunesmith.training.trackers import Trackers

if TYPE_CHECKING:
    from tunesmith.training.trainer import Trainer


def refuse_missing_trackers(settings: RunSettings) -> None:
    """Before anything is loaded, look whether the trackers that the run asks for are installed.

    Raises:
        UserError: naming the extra that installs those that are not.
    """
    missing = [name for name in settings.output.track if not is_installed(TRACKERS[name].module)]
    if missing:
        extras = ",".join(missing)
        raise UserError(
            f"output.track: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed.",
            hint=f'Install with `pip install "tunesmith[{extras}]"`, or take the name out of output.track.',
        )


def trackers_of(settings: RunSettings, folder: Path, trainer: Trainer, console: Console) -> Trackers:
    """The observer of `output.track`, a context that opens the trackers and ends their runs.

    Args:
        folder: the run directory.
        trainer: whose events it will hear; one that goes on from a checkpoint has loaded it.
        console: where it says where each tracker writes.
    """
    return Trackers(
        settings.output.track,
        folder,
        project=settings.output.project,
        name=settings.output.run_name or folder.absolute().name,
        config=tracked_settings(settings),
        step=trainer.step,
        tokens=trainer.tokens,
        observers=trainer.observers,
        say=lambda line: console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True),
    )


def tracked_settings(settings: RunSettings) -> dict[str, Value]:
    """The settings as a tracker shows them: dotted names, plain values, nothing secret."""
    return dict(_flat("", settings.model_dump(mode="json")))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Value]]:
    nested = isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
    if isinstance(value, Mapping) or nested:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _flat(f"{name}.{key}" if name else str(key), item)
    elif value is None:
        yield name, "null"
    elif names_a_secret(name.rpartition(".")[2]):
        yield name, HIDDEN
    elif isinstance(value, bool | int | float):
        yield name, value
    else:
        yield (
            name,
            without_secrets(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)),
        )
