"""Quantities with a unit in a run file, `32768 tokens`, `30 minutes`, `24 GiB`: how they look and what they are."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema

_TOKENS = re.compile(r"^\s*(\d[\d_]*)\s*tokens\s*$")
_TIME = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(second|minute|hour)s?\s*$")
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(MiB|GiB|TiB|GB)\s*$")
_BYTES = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "GB": 10**9}
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


def bytes_of(value: str) -> int | None:
    """The bytes that `'24 GiB'` says; None where it says no size, or less than a MiB."""
    match = _SIZE.match(value)
    size = 0 if match is None else int(float(match.group(1)) * _BYTES[match.group(2)])
    return size if size >= 2**20 else None


def _check_size(value: str) -> str:
    if bytes_of(value) is None:
        raise ValueError("a size such as '24 GiB'")
    return value


def _check_share(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError("expected a share above 0 and of at most 1, or a size such as '24 GiB'")
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


Share = Annotated[
    float,
    AfterValidator(_check_share),
    WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
]
"""A part of the memory there is, 1 for all of it."""

Size = Annotated[
    str, AfterValidator(_check_size), WithJsonSchema({"type": "string", "pattern": _SIZE.pattern})
]
"""Memory such as `24 GiB`."""


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


def share_or_bytes(value: float | str) -> float:
    """A share as it is, and the bytes that `'24 GiB'` says."""
    if not isinstance(value, str):
        return value
    size = bytes_of(value)
    assert size is not None, "validated by the settings"
    return float(size)
