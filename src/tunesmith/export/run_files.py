"""Finding run directories, and reading what lies in them, whatever state they are in. Torch-free and quick.

A run may be half-written, killed, older or newer than this version, and other folders may lie beside it. What cannot
be read is absent; nothing here raises because of what a file holds.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tunesmith.contracts.errors import UserError
from tunesmith.contracts.event_log import EVENTS, parse_events
from tunesmith.export.curves import LAST

SETTINGS, VERSIONS, DATA, MASKS, ANSWERS = (
    "run.yaml", "versions.json", "data.json", "masks.json", "answers.json",
)  # fmt: skip
"""Files of a run directory beside `events.jsonl`."""

_DEPTH = 4
"""Levels of folders in which runs are looked for."""
_STEP = b'{"event": "step"'
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where libyaml is there


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The run directories among the folders and below them, each once, in the order of their paths.

    Raises:
        UserError: one of the folders is not there.
    """
    found: list[Path] = []
    seen: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise UserError(
                f"{folder} {what}.",
                hint="Name a run directory or a folder of them, as in `tunesmith runs runs/`.",
            )
        found += _below(folder, _DEPTH, seen)
    return found


def _below(folder: Path, levels: int, seen: set[Path]) -> Iterator[Path]:
    """Runs in a folder, links followed; no folder of `seen` is entered, so that links may lead in circles."""
    place = folder.resolve()
    if place in seen:
        return
    seen.add(place)
    if is_run(folder):
        yield folder
        return
    if not levels:
        return
    try:
        children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    except OSError:
        return
    for child in children:
        if child.is_dir():
            yield from _below(child, levels - 1, seen)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory: it has events, or a run file with versions, or a run starts in it."""
    names = (EVENTS, VERSIONS, ".lock")
    has_events, has_versions, has_lock = ((folder / name).is_file() for name in names)
    settings = has_versions and (folder / SETTINGS).is_file()
    return has_events or settings or (has_lock and is_running(folder))


def open_run(folder: Path) -> Path:
    """The folder, which must be a run directory.

    Raises:
        UserError: it is not there, or no run has written into it.
    """
    if not folder.is_dir():
        raise UserError(f"There is no run directory {folder}.", hint="`tunesmith runs` lists the runs.")
    if not is_run(folder):
        inside = find_runs([folder])
        hint = f"Did you mean {inside[0]}?" if inside else "Name the output.dir of a run."
        raise UserError(f"{folder} is not a run directory: it has no {EVENTS}.", hint=hint)
    return folder


def is_running(folder: Path) -> bool:
    """Whether a process trains in the folder: it holds the lock, which the system frees when it ends."""
    try:
        lock = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a run as plain values; empty where there are none that can be read."""
    try:
        settings = yaml.load((folder / SETTINGS).read_bytes(), Loader=_Loader)
    except (OSError, yaml.YAMLError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def sparse_events(path: Path, most: int = 30) -> list[dict[str, Any]]:
    """The events of a run with at most about `most` of its steps, evenly spread, and the last ones.

    A list of hundreds of runs with thousands of steps each is read in the time that parsing all of them would take
    for a few.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    steps = [number for number, line in enumerate(lines) if line.startswith(_STEP)]
    kept = {*steps[:: max(1, -(-len(steps) // most))], *steps[-LAST - 1 :]}  # the very last may be cut short
    left_out = set(steps) - kept
    return list(parse_events(line for number, line in enumerate(lines) if number not in left_out))
