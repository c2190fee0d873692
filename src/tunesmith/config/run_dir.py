"""The run directory: made, locked against a second process, and checked before anything is spent on the run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version

import yaml

from tunesmith._version import __version__
from tunesmith.config.yaml_source import CORE_RESOLVERS
from tunesmith.contracts.errors import StorageError, UserError
from tunesmith.contracts.files import replace_text
from tunesmith.settings.run import RunSettings

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "tokenizers",
    "safetensors",
)


def versions() -> dict[str, str]:
    """Versions of everything that decides what a run computes."""
    found = {"tunesmith": __version__, "python": python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def refuse_several_processes() -> None:
    """Training runs in one process; started under a launcher it would train the same thing several times.

    Raises:
        UserError: a launcher started more than one process.
    """
    size = os.environ.get("WORLD_SIZE", "").strip() or "1"
    if size != "1":
        raise UserError(
            f"This run was launched with {size} processes (WORLD_SIZE), and this version trains on one device.",
            hint="Start it with `tunesmith train` alone.",
        )


@contextmanager
def claimed_run_dir(folder: Path) -> Iterator[Path]:
    """Create the run directory and hold it for this process.

    Raises:
        StorageError: it cannot be made or written.
        UserError: another process trains in it, or it is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"output.dir: {folder} is not a folder.", hint="Choose another output.dir.") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageError(
                f"output.dir: the disk of {folder} is full.", hint="Free some space."
            ) from None
        raise StorageError(
            f"output.dir: {folder} cannot be written ({error.strerror}).", hint="Choose another output.dir."
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise UserError(
            f"output.dir: another process is training in {folder}.",
            hint="Wait for it, or choose another output.dir.",
        ) from None
    try:
        yield folder
    finally:
        os.close(lock)


class _Dumper(yaml.SafeDumper):
    """Quotes text that our reader (YAML 1.2) would take for a number, such as the revision 1e5."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *CORE_RESOLVERS.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *CORE_RESOLVERS}
}


def resolved_yaml(settings: RunSettings) -> str:
    """The run file with every default filled in; it repeats the run."""
    plain = json.loads(settings.model_dump_json())
    text = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return f"# tunesmith {__version__}: every setting of this run\n{text}"


def write_run_files(folder: Path, settings: RunSettings) -> None:
    """Write `run.yaml` and `versions.json`; each replaces an older one whole or not at all."""
    replace_text(folder / "run.yaml", resolved_yaml(settings))
    replace_text(folder / "versions.json", json.dumps(versions(), indent=2) + "\n")
