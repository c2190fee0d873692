"""Quantities with a unit in a run file, `32768 tokens` and `30 minutes`: what they look like and what they are."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema

_TOKENS = re.compile(r"^\s*(\d[\d_]*)\s*tokens\s*$")
_TIME = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(second|minute|hour)s?\s*$")
_SECONDS = {"second": 1.0, "minute": 60.0, "hour": 3600.0}


def _check_token_count(value: str) -> str:
    match = _TOKENS.match(value)
    if match is None or int(match.group(1)) < 1:
        raise ValueError("a number of tokens such as '32768 tokens'")
    return value


def _check_time(value: str) -> str:
    match = _TIME.match(value)
    if match is None or float(match.group(1)) <= 0:
        raise ValueError("a time such as '30 minutes' or '2 hours'")
    return value


Count = Annotated[int, Field(ge=1)]
"""A number of steps or rows."""

TokenCount = Annotated[
    str, AfterValidator(_check_token_count), WithJsonSchema({"type": "string", "pattern": _TOKENS.pattern})
]
"""A number of tokens such as `32768 tokens`."""

Time = Annotated[
    str, AfterValidator(_check_time), WithJsonSchema({"type": "string", "pattern": _TIME.pattern})
]
"""A time such as `30 minutes`."""


def tokens_of(value: int | str | None) -> int | None:
    """The number of tokens that `'32768 tokens'` says; None for a plain number or nothing."""
    if not isinstance(value, str):
        return None
    match = _TOKENS.match(value)
    assert match is not None, "validated by the settings"
    return int(match.group(1))


def seconds_of(value: int | str | None) -> float | None:
    """The seconds that `'30 minutes'` says; None for a plain number or nothing."""
    if not isinstance(value, str):
        return None
    match = _TIME.match(value)
    assert match is not None, "validated by the settings"
    return float(match.group(1)) * _SECONDS[match.group(2)]
