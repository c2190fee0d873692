"""Answers to a file of prompts: in batches, each a line of JSON, and resumable.

Every line is written with one call and names its row, so what is there after a crash is whole but for a torn last
line, which is cut off. Lines carry a key of the model and of how the answers were drawn: going on with other settings
is refused, and not mixed in.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tunesmith.config.find_result import FoundResult
from tunesmith.config.load_result import Loaded, only_base
from tunesmith.config.prompt_rows import PromptRow
from tunesmith.contracts.errors import StorageError, UserError
from tunesmith.data.formats import RowProblem
from tunesmith.models.generate import Answer, Sampling, generate

Done = tuple[int, int]
"""Number of a row, and of the answer to it."""


class Sink(Protocol):
    """Where lines go."""

    def write(self, line: dict[str, Any]) -> None:
        """Take one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How prompts are answered.

    Attributes:
        sampling: how tokens are chosen.
        samples: answers for each row.
        seed: of the random draws; those of an answer depend on it, on its row and on its number alone.
        batch: prompts at once.
        base: answer without the adapter as well.
    """

    sampling: Sampling
    samples: int = 1
    seed: int = 0
    batch: int = 8
    base: bool = False


def key_of(found: FoundResult, asking: Asking) -> str:
    """Changes with the model's files and with every setting that decides an answer; not with the batch."""
    settings = asdict(asking)
    del settings["batch"], settings["samples"]
    weights = sorted(found.folder.glob("*.safetensors")) if found.folder is not None else []
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weights]
    where = found.name if found.folder is None else str(found.folder.resolve())
    text = json.dumps([where, stamps, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass
class AnswerFile:
    """The lines that are there, and the way to append to them.

    Args:
        path: the file; it need not exist.
        key: see `key_of`.

    Attributes:
        done: answers that the file holds, with the prompts that they answer.

    Raises:
        UserError: it holds something else, or answers that were made otherwise.
        StorageError: it cannot be read or written.
    """

    path: Path
    key: str
    done: dict[Done, list[dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            for number, line in enumerate(whole.splitlines(), start=1):
                self._take(number, line)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            if len(whole) < len(content):
                os.ftruncate(self._file, len(whole))
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read or written: {error.strerror}.") from error

    def _take(self, number: int, line: bytes) -> None:
        try:
            found = json.loads(line)
            place, prompt, key = (found["row"], found["sample"]), found["messages"], found["key"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.path}:{number} is not an answer of `tunesmith generate`.",
                hint="Choose another --out.",
            ) from None
        if key != self.key:
            raise UserError(
                f"{self.path} holds answers of another model or of other settings.",
                hint="Choose another --out, or delete that file.",
            )
        self.done[place] = prompt

    def has(self, row: PromptRow, sample: int) -> bool:
        """Whether an answer is there.

        Raises:
            UserError: the one that is there answers another prompt.
        """
        prompt = self.done.get((row.index, sample))
        if prompt is None:
            return False
        if prompt != row.messages:
            raise UserError(
                f"{self.path} answers another prompt as row {row.index} than {row.where} holds.",
                hint="The prompts have changed: choose another --out, or delete that file.",
            )
        return True

    def has_all(self, rows: Sequence[PromptRow], samples: int) -> bool:
        """Whether nothing is left to do, so that no model need be loaded.

        Raises:
            UserError: as `has`.
        """
        return all(row.problem is None and self.has(row, n) for row in rows for n in range(samples))

    def write(self, line: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            StorageError: the disk is full.
        """
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        try:
            if os.write(self._file, data) < len(data):
                raise OSError(28, "the disk is full")
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be written: {error.strerror}.",
                hint="Free some space and run the same command again; it goes on where it stopped.",
            ) from error

    def close(self) -> None:
        """Let the file go."""
        os.close(self._file)


@dataclass(frozen=True, slots=True)
class _Task:
    row: PromptRow
    sample: int
    ids: list[int]

    def seed(self, seed: int) -> int:
        text = f"{seed} {self.row.index} {self.sample}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def answer_rows(
    loaded: Loaded, rows: Sequence[PromptRow], asking: Asking, sink: Sink, key: str, done: AnswerFile | None
) -> Iterator[PromptRow | int]:
    """Answer rows and write each answer.

    Args:
        sink: takes the lines.
        done: answers that are skipped.

    Yields:
        A row that cannot be answered, with its problem; else how many answers were skipped or written.

    Raises:
        UserError: `done` holds answers to other prompts; the base was asked for and there is none.
        StorageError: a line cannot be written.
    """
    waiting: list[_Task] = []
    for row in rows:
        checked, ids = _encoded(loaded, row)
        if checked.problem is not None:
            yield checked
            continue
        for sample in range(asking.samples):
            if done is not None and done.has(row, sample):
                yield 1
                continue
            waiting.append(_Task(row, sample, ids))
            if len(waiting) == asking.batch:
                yield _answer(loaded, waiting, asking, sink, key)
                waiting = []
    if waiting:
        yield _answer(loaded, waiting, asking, sink, key)


def _encoded(loaded: Loaded, row: PromptRow) -> tuple[PromptRow, list[int]]:
    """The row and its tokens, or the row with its problem."""
    if row.problem is not None:
        return row, []
    try:
        ids = loaded.prompter.ids(row.messages, row.tools)
    except RowProblem as problem:
        return PromptRow(row.index, row.where, [], None, str(problem)), []
    if loaded.context is not None and len(ids) >= loaded.context:
        problem_text = f"the prompt has {len(ids):,} tokens, and the model takes {loaded.context:,}"
        return PromptRow(row.index, row.where, [], None, problem_text), []
    return row, ids


def _answer(loaded: Loaded, tasks: Sequence[_Task], asking: Asking, sink: Sink, key: str) -> int:
    """Answer one batch and write it."""
    answers = _generated(loaded, tasks, asking, base=False)
    others = _generated(loaded, tasks, asking, base=True) if asking.base else [None] * len(tasks)
    for task, answer, other in zip(tasks, answers, others, strict=True):
        line: dict[str, Any] = {
            "row": task.row.index,
            "sample": task.sample,
            "where": task.row.where,
            "messages": task.row.messages,
            "answer": answer.text,
            "tokens": answer.tokens,
            "complete": answer.complete,
        }
        if other is not None:
            line |= {"base": other.text, "base_tokens": other.tokens, "base_complete": other.complete}
        sink.write(line | {"key": key})
    return len(tasks)


def _generated(loaded: Loaded, tasks: Sequence[_Task], asking: Asking, *, base: bool) -> list[Answer]:
    """Answers to one batch. An answer ends where the context does, whatever the others in its batch are."""
    most = asking.sampling.max_tokens
    with only_base(loaded, base):
        return generate(
            loaded.model,
            loaded.tokenizer,
            [task.ids for task in tasks],
            sampling=asking.sampling,
            stop=loaded.stop,
            seeds=[task.seed(asking.seed) for task in tasks],
            most=None if loaded.context is None else [min(most, loaded.context - len(t.ids)) for t in tasks],
        )
