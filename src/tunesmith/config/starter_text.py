"""Writes settings as YAML in which every line says what it does: the docstring of its setting, and a remark.

The comments are the docstrings, so they cannot say what an earlier version did. Rejected: a template file, which
would.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from tunesmith.config.yaml_source import KeyPath, parse_yaml
from tunesmith.settings.base import sections_of
from tunesmith.settings.run import RunSettings

_WIDTH = 100
_PLAIN = re.compile(r"[A-Za-z0-9_./~-][A-Za-z0-9_./@+ ~-]*")
"""Text that may stand without quotes, if it is read back as text."""


def commented_yaml(values: Mapping[str, Any], remarks: Mapping[KeyPath, str]) -> str:
    """A run file with comments.

    Args:
        values: sections of settings, in the order in which they are written.
        remarks: for the path of a setting what is to be said of it beside its docstring.
    """
    return "\n".join(_section(values, RunSettings, (), remarks))


def _section(
    values: Mapping[str, Any], section: type[BaseModel], path: KeyPath, remarks: Mapping[KeyPath, str]
) -> Iterator[str]:
    indent = "  " * len(path)
    for name, value in values.items():
        field = section.model_fields[name]
        inner = _section_of(field.annotation, value)
        said = field.description or (inner.__doc__ if inner is not None else "") or ""
        if not path:
            yield ""
        yield from _comment(said, _others(field.annotation, said), remarks.get((*path, name), ""), indent)
        if inner is None:
            yield f"{indent}{name}: {flow(value)}"
        elif isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from _section(value, inner, (*path, name), remarks)
        else:
            yield f"{indent}{name}:"
            for number, entry in enumerate(value):
                yield from _entry(list(_section(entry, inner, (*path, name, number), remarks)), indent)


def _entry(lines: list[str], indent: str) -> Iterator[str]:
    """The lines of a section as an entry of a list: the dash stands before its first setting, comments above it."""
    first = next(number for number, line in enumerate(lines) if not line.lstrip().startswith("#"))
    for number, line in enumerate(lines):
        mark = "- " if number == first else ""
        yield f"{indent}  {mark}{line.lstrip()}" if number <= first else line


def _section_of(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The section that a value is of, or each of its entries; None for plain values."""
    found = sections_of(annotation)
    if not found or not isinstance(value, list | Mapping):
        return None
    return found[-1] if isinstance(value, list) else found[0]


def _others(annotation: Any, said: str) -> str:
    """The values that a setting may have, where its docstring does not name all of them."""
    names = choices(annotation)
    return "" if all(f"`{name}`" in said for name in names) else f"One of {', '.join(names)}."


def choices(annotation: Any) -> list[str]:
    """The words that a setting may have; empty where it takes anything."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if get_origin(annotation) in (tuple, list, dict):
        return []  # words of entries
    return [name for argument in get_args(annotation) for name in choices(argument)]


def _comment(said: str, others: str, remark: str, indent: str) -> Iterator[str]:
    for text in (" ".join(f"{said} {others}".split()), remark):
        yield from textwrap.wrap(
            printable(text),
            _WIDTH,
            initial_indent=f"{indent}# ",
            subsequent_indent=f"{indent}# ",
            break_long_words=False,
            break_on_hyphens=False,
        )


def printable(text: str) -> str:
    """The text with spaces in the place of characters that would end a comment or be refused in YAML."""
    return "".join(character if character.isprintable() else " " for character in text)


def flow(value: Any) -> str:
    """A plain value on one line of YAML, which our reader reads back as the same."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, float) and 0 < value < 1e-2 and float(f"{value:.1e}") == value:
        return re.sub(r"e-0*", "e-", f"{value:.1e}")
    if (
        isinstance(value, str)
        and _PLAIN.fullmatch(value)
        and parse_yaml(value, "").data == value.strip() == value
    ):
        return value
    if isinstance(value, str):  # escapes are YAML's: JSON's halves of a character beyond 16 bits are two here
        return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=float("inf")).rstrip("\n")
    return json.dumps(value)
