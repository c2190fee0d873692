"""`Found`: what every reader yields, a row with the place where a person finds it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Found(NamedTuple):
    """A row and its place, such as `train.jsonl:17`; exactly one of `record` and `problem` is given."""

    where: str
    record: dict[str, Any] | None
    problem: str | None = None
