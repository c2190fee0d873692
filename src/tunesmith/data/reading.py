"""What every reader of rows shares: findings about a row, plain values, and how messages are named.

Rows come from JSON, from CSV and from Arrow. Arrow gives each struct the keys of all structs of its column and
fills them with None, so None means "not there" wherever an object was read; `without_nulls` undoes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Reasoning = Literal["split", "keep"]
ToolNotation = Literal["auto", "text", "hermes", "llama3", "glaive"]


class RowProblem(Exception):  # noqa: N818 it is a finding about the data, not a failure
    """A row that cannot train.

    Args:
        reason: a short stable category under which such rows are counted, such as "empty answer".
        detail: what exactly, for the person who looks at the row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True)
class Reading:
    """How rows of a source are read, beyond the names of their columns.

    Attributes:
        role_key: the key of a message that holds its role; None for the usual ones.
        content_key: the key of a message that holds its content; None for the usual ones.
        train_key: the key of a message that says whether it trains; None for the usual ones.
        roles: names of roles in the data and what they mean: system, user, assistant, tool or call.
        train_roles: roles whose messages train where the message itself does not say.
        last_answer_only: train the last of the trained messages only.
        reasoning: whether `<think>` in front of an answer becomes its `reasoning_content` or stays text.
        tool_calls: the notation in which assistants write tool calls into their text; `auto` reads those that
            are certain, `text` leaves all of them as they are.
        template: format strings of the format `custom`, by role.
    """

    role_key: str | None = None
    content_key: str | None = None
    train_key: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    train_roles: tuple[str, ...] = ("assistant",)
    last_answer_only: bool = False
    reasoning: Reasoning = "split"
    tool_calls: ToolNotation = "auto"
    template: Mapping[str, str] = field(default_factory=dict)


AS_USUAL = Reading()
"""How rows are read where nothing is said."""


def as_text(value: Any, what: str) -> str:
    """A string as it is, a number as JSON writes it.

    Raises:
        RowProblem: "not text" for anything else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    raise RowProblem("not text", f"{what} is {type(value).__name__}")


_FLAGS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def as_flag(value: Any, reason: str, what: str) -> bool:
    """A boolean, also written as 0 and 1 or as a word.

    Raises:
        RowProblem: `reason` for anything else.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        flag = _FLAGS.get(value.strip().lower())
    else:
        flag = bool(value) if isinstance(value, int | float) and value in (0, 1) else None
    if flag is None:
        raise RowProblem(reason, f"{what} is neither true nor false")
    return flag


def as_number(value: Any, reason: str, what: str) -> float:
    """A finite number.

    Raises:
        RowProblem: `reason` for anything else.
    """
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass  # an integer beyond every float
    raise RowProblem(reason, f"{what} is not a finite number")


def parse_json(value: Any, reason: str, what: str) -> Any:
    """`value`, parsed where it is a string that holds JSON.

    Raises:
        RowProblem: `reason` where the string holds something else.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowProblem(reason, f"{what} is not valid JSON") from error


def without_nulls(value: Any) -> Any:
    """`value` without the keys of objects whose value is None; elements of lists stay."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def first_of(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first of these keys that is there; None where none is."""
    for name in names:
        value = record.get(name)
        if value is not None:
            return value
    return None
