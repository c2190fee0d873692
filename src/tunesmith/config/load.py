"""From a YAML file (or a dict) and overrides to `RunSettings`, or to every problem at once.

Nothing is started before the whole configuration is right. Each problem says where it stands, what stood there,
what was expected and the nearest thing that would have been right. Torch-free.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunesmith.config.names_elsewhere import OPTIMIZERS, named_here
from tunesmith.config.rules import broken_rules
from tunesmith.config.yaml_source import Document, KeyPath, parse_yaml
from tunesmith.contracts.errors import ConfigError, Problem, UserError
from tunesmith.settings.base import sections_of
from tunesmith.settings.data import SourceSettings
from tunesmith.settings.run import RunSettings
from tunesmith.settings.urls import shown_text

_SURE = 0.8
"""Likeness of two names from which on one is a slip of the other: `micro_batch_size` and `micro_batch` are 0.81."""
_EXPECTED = {
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "string_type": "expected text",
    "bool_type": "expected true or false",
    "tuple_type": "expected a list",
    "dict_type": "expected names and values",
    "model_type": "expected a section of settings",
    "model_attributes_type": "expected a section of settings",
    "greater_than": "expected a number above {gt}",
    "greater_than_equal": "expected a number of at least {ge}",
    "less_than": "expected a number below {lt}",
    "less_than_equal": "expected a number of at most {le}",
    "too_short": "expected at least {min_length} entry",
    "string_too_short": "expected some text",
    "finite_number": "expected a finite number",
    "literal_error": "expected {expected}",
}


def _read(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent if path.parent.is_dir() else Path()
        near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.y*ml")], n=1)
        raise UserError(
            f"There is no file {path}.", hint=f"Did you mean {folder / near[0]}?" if near else None
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder.", hint="Give the YAML file of a run.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid UTF-8 (byte {error.start}).") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    return parse_yaml(text, str(path))


def _apply_override(document: Document, override: str) -> None:
    name, equals, text = override.partition("=")
    where = shown_text(f"override {override!r}")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", name):
        document.problems.append(Problem(where, "not an override", "expected section.key=value"))
        return
    value = parse_yaml(text, where)
    if value.problems:
        document.problems += value.problems
        return
    path: KeyPath = tuple(int(part) if part.isdecimal() else part for part in name.split("."))
    target = document.data
    for depth, part in enumerate(path[:-1]):
        if isinstance(target, dict) and isinstance(part, str):
            if target.get(part) is None:
                target[part] = {}
                document.places[path[: depth + 1]] = where
            target = target[part]
        elif isinstance(target, list) and isinstance(part, int) and part < len(target):
            target = target[part]
        else:
            stem = ".".join(map(str, path[: depth + 1]))
            document.problems.append(Problem(where, f"there is no {stem}", "expected a section of the file"))
            return
    last = path[-1]
    fits = isinstance(target, dict) or (
        isinstance(target, list) and isinstance(last, int) and last < len(target)
    )
    if not fits:
        document.problems.append(Problem(where, f"there is no {name}", "expected a setting of the file"))
        return
    target[last] = value.data
    for inside in [place for place in document.places if place[: len(path)] == path]:
        del document.places[inside]
    document.places[path] = where


def _section_at(path: KeyPath) -> type[BaseModel]:
    section: type[BaseModel] = RunSettings
    for part, following in zip(path, [*path[1:], None][: len(path)], strict=True):
        field = section.model_fields.get(part) if isinstance(part, str) else None
        found = sections_of(field.annotation) if field else []
        if found:  # `data.eval` is a section or a list of sections, in this order
            section = found[-1] if isinstance(following, int) else found[0]
    return section


def _data_path(location: Sequence[str | int], data: Any) -> KeyPath:
    """Pydantic's location without the names of union members: the path in the file."""
    path: list[str | int] = []
    for index, part in enumerate(location):
        is_last = index == len(location) - 1
        if isinstance(data, dict) and isinstance(part, str) and (part in data or is_last):
            path.append(part)
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            path.append(part)
            data = data[part]
    return tuple(path)


def _names_other_member(location: Sequence[str | int], data: Any) -> bool:
    """Whether an error comes from a union member of another shape: a section where a list stands, or the reverse."""
    for index, part in enumerate(location):
        in_section = isinstance(data, dict) and part in data
        if in_section or (isinstance(data, list) and isinstance(part, int) and part < len(data)):
            data = data[part]
        elif (isinstance(part, str) and index < len(location) - 1) or location[-1] == part:
            text = str(part)
            if isinstance(data, dict) and text.startswith("tuple["):
                return True
            if isinstance(data, list) and text.endswith("Settings"):
                return True
    return False


def _instead_of(path: KeyPath) -> str:
    """What to write in place of an unknown setting: the one that is meant, where that can be told."""
    name, known = str(path[-1]), list(_section_at(path[:-1]).model_fields)
    if near := difflib.get_close_matches(name, known, n=1, cutoff=_SURE):
        return f"did you mean {near[0]}?"
    same = [f"{section}.{name}" for section, names in _names().items() if name in names]
    same = [each for each in same if each.startswith(f"{path[0]}.")] or same
    if len(same) == 1:
        return f"it is {same[0]}"
    if (here := named_here(name)) is not None:
        return f"here it is {here}"
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"


def _source_without_a_list(path: KeyPath, value: Any) -> str | None:
    """How sources are written, where one stands without its list or its `path`; None elsewhere."""
    if path[:2] not in (("data", "train"), ("data", "eval")) or not all(isinstance(p, int) for p in path[2:]):
        return None
    if isinstance(value, Mapping) and len(path) == 2:
        value = value.get("path")
    return f"write `- path: {shown_text(value)}` below data.{path[1]}" if isinstance(value, str) else None


def _names() -> dict[str, list[str]]:
    """The settings of each section, and those of a source."""
    sections = {name: sections_of(field.annotation) for name, field in RunSettings.model_fields.items()}
    found = {name: [*section[0].model_fields] for name, section in sections.items() if section}
    return found | {"data.train.0": [*SourceSettings.model_fields]}


def _problem(document: Document, path: KeyPath, errors: list[ErrorDetails]) -> Problem:
    """One problem for all errors that validation found at one place."""
    name = ".".join(map(str, path))
    error = errors[0]
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return Problem(document.place(path), f"unknown setting {name}", _instead_of(path))
    if kind == "missing":
        return Problem(document.place(path), f"{name} is missing", "this setting has no default")
    expected = []
    if len(errors) > 1:  # "or text" says nothing beside what the text may be
        errors = [each for each in errors if each["type"] != "string_type"] or errors
    for each in errors:
        context = each.get("ctx", {})
        text = _EXPECTED.get(each["type"])
        message = text.format(**context) if text else each["msg"].removeprefix("Value error, ")
        if message not in expected:
            expected.append(message)
    allowed = [
        w.strip("'") for e in errors for w in re.findall(r"'[^']*'", e.get("ctx", {}).get("expected", ""))
    ]
    if source := _source_without_a_list(path, value):
        found = f"{name} is {shown_text(repr(value))}"
        return Problem(document.place(path), found, "expected a list of sources", source)
    near = [OPTIMIZERS[value]] if path[-1] == "optimizer" and value in OPTIMIZERS else []
    near = near or difflib.get_close_matches(str(value), allowed, n=1)
    shown = "empty" if value is None else shown_text(repr(value))
    shown = shown if len(shown) < 80 else shown[:77] + "..."
    return Problem(
        document.place(path),
        f"{name} is {shown}",
        " or ".join(m if i == 0 else m.removeprefix("expected ") for i, m in enumerate(expected)),
        f"did you mean {near[0]!r}?" if near else None,
    )


def _validation_problems(error: ValidationError, document: Document) -> list[Problem]:
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for each in error.errors():
        if not _names_other_member(each["loc"], document.data):
            by_path.setdefault(_data_path(each["loc"], document.data), []).append(each)
    shadowed = {
        path for path in by_path if any(other[: len(path)] == path and other != path for other in by_path)
    }
    return [_problem(document, path, errors) for path, errors in by_path.items() if path not in shadowed]


def _by_line(problems: list[Problem]) -> list[Problem]:
    """In the order of the file; what stands in no line of it comes last."""

    def line(problem: Problem) -> float:
        number = problem.where.rpartition(":")[2]
        return int(number) if number.isdecimal() else math.inf

    return sorted(problems, key=line)


def load_settings(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunSettings:
    """Read, check and freeze the settings of a run.

    Args:
        source: a YAML file, or the same structure as a dict.
        overrides: `section.key=value`, applied in order on top of the file; lists by number
            (`data.train.0.path=rows.jsonl`).

    Raises:
        UserError: the file cannot be read.
        ConfigError: with every problem that was found.
    """
    if isinstance(source, Mapping):
        document = Document(data=_plain(source))
    else:
        document = _read(Path(source))
        if document.data is None and not document.problems:
            raise UserError(f"{source} is empty.", hint="It needs at least model.name and data.train.")
    if document.data is None:
        raise ConfigError(document.problems)
    if not isinstance(document.data, dict):
        problem = Problem(document.place(()), "no sections", "expected model:, data: and so on")
        raise ConfigError([*document.problems, problem])
    for override in overrides:
        _apply_override(document, override)
    try:
        settings = RunSettings.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError(_by_line(document.problems + _validation_problems(error, document))) from None
    broken = [
        Problem(document.place(path), found, expected) for path, found, expected in broken_rules(settings)
    ]
    if document.problems or broken:
        raise ConfigError(_by_line(document.problems + broken))
    return settings


def _plain(value: Any) -> Any:
    """A copy of nested mappings and sequences as dicts and lists, with paths as text."""
    if isinstance(value, Mapping):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return str(value) if isinstance(value, Path) else value
