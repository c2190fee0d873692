"""`Found`: what every reader yields, a row with the place where a person finds it; `Stored`: what it takes."""

from __future__ import annotations

from io import BufferedReader
from typing import Any, Literal, NamedTuple, Protocol


class Stored(Protocol):
    """A file that a reader can open: a `Path`, or one that lies elsewhere."""

    @property
    def name(self) -> str:
        """Its name, which says what kind of file it is."""
        ...

    def open(self, mode: Literal["rb"]) -> BufferedReader:
        """Its bytes."""
        ...


class Found(NamedTuple):
    """A row and its place, such as `train.jsonl:17`; exactly one of `record` and `problem` is given."""

    where: str
    record: dict[str, Any] | None
    problem: str | None = None
