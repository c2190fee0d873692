"""The checkpoint store: directories that appear by one rename, with a manifest of hashes, and never pickle.

    checkpoints/step-00000200/
        tensors-00001-of-00002.safetensors ...   plain safetensors
        index.json       dtype, global shape and shards of every tensor
        state.json       everything that is not a tensor
        manifest.json    size and SHA-256 of every other file, step, metric, versions; written last

The idea: a checkpoint is written into a hidden sibling, forced to the disk, and renamed. Only a directory
called `step-...` is a checkpoint, so a kill at any moment leaves the old ones as they were. Hidden names say
what a directory is and which process made it: `.tmp-` is being written, `.trash-` is being deleted (renamed
first, so that nothing half deleted is ever called `step-...`), and `.aside-` is the old checkpoint of a step
that is being saved again. A kill between the two renames of that replacement leaves `.aside-step-N` without a
`step-N`; it is then read as the checkpoint of that step, and gets its name back with the next save.

Rejected: exchanging the two directories with `renameat2(RENAME_EXCHANGE)`, which NFS and several cluster file
systems do not have; and a file that names the newest checkpoint, which is one more thing that can be wrong.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tunesmith.contracts.best import best_step
from tunesmith.contracts.errors import StorageError
from tunesmith.training import storage
from tunesmith.training.manifest import (
    MANIFEST,
    STATE,
    Checkpoint,
    DamagedError,
    encode_manifest,
    read_manifest,
    verify,
)
from tunesmith.training.state import join_state, restore_rng, rng_state, split_state
from tunesmith.training.tensors import TensorShard, TensorSource, encode_json, size_of, write_tensors

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "TensorShard",
    "join_state",
    "restore_rng",
    "rng_state",
    "split_state",
]

_STEP = re.compile(r"step-(\d{8,})")
_HIDDEN = re.compile(r"\.(tmp|aside|trash)-step-(\d{8,})-(\d+)'*")
_SHARD_BYTES = 2 * 2**30

_log = logging.getLogger(__name__)


class CheckpointStore:
    """Writes checkpoints into a folder, finds them again, and deletes the ones no longer needed.

    One process at a time may save into a folder; others may read.

    Args:
        folder: `<run>/checkpoints`; created by the first save.
        keep: how many of the newest checkpoints stay, at least 1; the best by metric stays besides.
        shard_bytes: size in bytes at which a new safetensors file is begun.
    """

    def __init__(self, folder: Path, *, keep: int, shard_bytes: int = _SHARD_BYTES) -> None:
        assert keep >= 1, "settings check it"
        self.folder = folder
        self.keep = keep
        self.shard_bytes = shard_bytes
        self._damaged: set[int] = set()

    def save(
        self,
        step: int,
        tensors: Mapping[str, TensorSource],
        state: Mapping[str, Any],
        *,
        metric: float | None,
    ) -> Checkpoint:
        """Write the checkpoint of `step`, replacing one of the same step; then delete what is not kept.

        Args:
            step: optimizer steps that are complete.
            tensors: by name; a tensor, a shard that covers it, or several shards that do so together.
            state: scalars, strings, lists, tuples and dicts, of which every type comes back as it was.
            metric: held-out loss; the lowest is the best. One that is not finite is stored as null.

        Raises:
            StorageError: the disk is full or the folder cannot be written. The partial directory is removed
                and older checkpoints are intact.
            TypeError, ValueError: tensors or state that cannot be stored; nothing was written.
        """
        needed = size_of(tensors)
        in_state, skeleton = split_state("", dict(state))
        if in_state:
            raise TypeError(f"the state holds tensors ({', '.join(in_state)}): use split_state for it")
        metric = float(metric) if metric is not None and math.isfinite(metric) else None
        final = self.folder / f"step-{step:08d}"
        try:
            storage.make_directories(self.folder)
            self._clean()
            with ExitStack() as undo:
                temporary = self._hidden("tmp", final.name)
                storage.make_directory(temporary)
                undo.callback(self._discard, temporary)
                files = write_tensors(temporary, tensors, self.shard_bytes)
                files[STATE] = storage.write_file(temporary / STATE, [encode_json(skeleton)])
                manifest = encode_manifest(step, metric, files)
                storage.write_file(temporary / MANIFEST, [manifest])
                storage.sync_directory(temporary)
                self._publish(temporary, final)
                undo.pop_all()
        except OSError as error:
            raise storage.explain(error, self.folder, needed) from error
        self._damaged.discard(step)
        self._retain(step)
        return Checkpoint(final, step, metric)

    def newest_intact(self, on_damaged: Callable[[Path, str], None]) -> Checkpoint | None:
        """The newest checkpoint whose files all have the size and SHA-256 of the manifest.

        A damaged one does not count for `keep` afterwards, and is deleted once training has passed its step.

        Args:
            on_damaged: called with the path and the reason of each one passed over, newest first.

        Raises:
            StorageError: this user may not read one, or a newer version of tunesmith wrote it.
        """
        for step, path in reversed(self._candidates()):
            try:
                manifest = read_manifest(path)
                if manifest["step"] != step:
                    raise DamagedError(f"{MANIFEST} belongs to step {manifest['step']}")
                verify(path, manifest)
            except DamagedError as error:
                if path.exists():  # not deleted by a run in the meantime
                    self._damaged.add(step)
                    on_damaged(path, str(error))
                continue
            return Checkpoint(path, step, manifest["metric"])
        return None

    def all(self) -> list[Checkpoint]:
        """Every checkpoint with a readable manifest, oldest first; the other files are not looked at."""
        found = []
        for step, path in self._candidates():
            try:
                manifest = read_manifest(path)
            except (DamagedError, StorageError):
                continue
            if manifest["step"] == step:
                found.append(Checkpoint(path, step, manifest["metric"]))
        return found

    def best(self) -> Checkpoint | None:
        """The checkpoint with the lowest metric, the newest of equal ones; None where none has a metric.

        Those that `newest_intact` found damaged are left out; the files of the others are not looked at.
        """
        usable = {c.step: c for c in self.all() if c.step not in self._damaged}
        best = best_step({c.step: c.metric for c in usable.values() if c.metric is not None})
        return None if best is None else usable[best]

    def ensure_space(self, bytes_needed: int) -> None:
        """Check before a run that its checkpoints can be written; creates the folder.

        Args:
            bytes_needed: size of all checkpoints that will lie side by side.

        Raises:
            StorageError: fewer bytes are free, or the folder cannot be written.
        """
        try:
            storage.check_writable(self.folder)
            free = storage.free_bytes(self.folder)
        except OSError as error:
            raise storage.explain(error, self.folder, bytes_needed) from error
        if free < bytes_needed:
            raise storage.not_enough_space(self.folder, bytes_needed, free)

    def clean_temporary(self) -> None:
        """Remove what killed saves left behind; a checkpoint they had set aside gets its name back.

        Left alone is what belongs to another process that is alive. `save` does this too.

        Raises:
            StorageError: a checkpoint that was set aside cannot be given its name back.
        """
        try:
            self._clean()
        except OSError as error:
            raise storage.explain(error, self.folder, 0) from error

    def _clean(self) -> None:
        for kind, step, path in self._hidden_directories():
            final = self.folder / f"step-{step:08d}"
            if kind == "aside" and not final.exists():
                storage.rename(path, final)
                storage.sync_directory(self.folder)
            else:
                self._discard(path)

    def _publish(self, temporary: Path, final: Path) -> None:
        """Give the finished directory its name; an older one of that name is set aside meanwhile."""
        if not final.exists():
            storage.rename(temporary, final)
            storage.sync_directory(self.folder)
            return
        aside = self._hidden("aside", final.name)
        storage.rename(final, aside)
        try:
            storage.rename(temporary, final)
        except OSError:
            storage.rename(aside, final)
            raise
        storage.sync_directory(self.folder)
        self._discard(aside)

    def _retain(self, step: int) -> None:
        """Delete all but the newest `keep` up to `step` and the best; later steps are another story's."""
        intact = [c for c in self.all() if c.step <= step and c.step not in self._damaged]
        best = self.best()
        kept = {c.step for c in intact[-self.keep :]} | ({best.step} if best else set())
        replaced = {c.step for c in intact} - kept | {damaged for damaged in self._damaged if damaged <= step}
        for candidate, path in self._candidates():
            if candidate in replaced:
                self._discard(path)
        self._damaged -= replaced

    def _discard(self, path: Path) -> None:
        """Delete a directory under a name that is never read; what fails is left to the next save."""
        match = re.search(_STEP, path.name)
        assert match is not None, "only our own directories are deleted"
        try:
            if not path.name.startswith((".trash-", ".tmp-")):
                trash = self._hidden("trash", match[0])
                storage.rename(path, trash)
                storage.sync_directory(self.folder)
                path = trash
            storage.remove_tree(path)
        except FileNotFoundError:
            return  # it is gone already
        except OSError as error:
            _log.warning("could not delete %s (%s); the next save tries again", path, error.strerror)

    def _hidden(self, kind: str, name: str) -> Path:
        """A hidden sibling of this process that does not exist yet."""
        path = self.folder / f".{kind}-{name}-{os.getpid()}"
        while path.exists():
            path = path.with_name(path.name + "'")
        return path

    def _hidden_directories(self, *, of_live_processes: bool = False) -> list[tuple[str, int, Path]]:
        """Kind, step and path of the hidden directories; by default those of dead processes and our own."""
        found = []
        for path, match in self._matching(_HIDDEN):
            pid = int(match[3])
            if of_live_processes or pid == os.getpid() or not storage.owner_is_alive(path, pid):
                found.append((match[1], int(match[2]), path))
        return found

    def _candidates(self) -> list[tuple[int, Path]]:
        """Step and path of everything that claims to be a checkpoint, oldest first."""
        found = [(int(match[1]), path) for path, match in self._matching(_STEP)]
        steps = {step for step, _ in found}
        hidden = self._hidden_directories(of_live_processes=True)
        found += [(step, path) for kind, step, path in hidden if kind == "aside" and step not in steps]
        return sorted(found)

    def _matching(self, pattern: re.Pattern[str]) -> Iterator[tuple[Path, re.Match[str]]]:
        try:
            entries = sorted(self.folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return
        except PermissionError as error:
            raise StorageError(
                f"the folder {self.folder} cannot be listed: {error.strerror}",
                hint="Make it readable for the user who trains.",
            ) from error
        for path in entries:
            match = pattern.fullmatch(path.name)
            if match is not None:
                yield path, match
