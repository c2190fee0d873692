"""YAML with line numbers, and with the scalars people mean.

PyYAML follows YAML 1.1, where `2e-4` is a string and `no` is False. The loader here follows 1.2's core schema
instead, refuses a key that is given twice, and remembers the line of every key, so that an error can name it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from tunesmith.contracts.errors import Problem

KeyPath = tuple[str | int, ...]


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader whose plain scalars resolve by YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # PyYAML's own name


_FLOAT = (
    r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)

for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("merge", r"<<", "<"),
):  # fmt: skip
    _CoreLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )
_CoreLoader.yaml_implicit_resolvers[""] = _CoreLoader.yaml_implicit_resolvers.get("\0", [])


@dataclass
class Document:
    """A parsed file: plain data, the place of every key, and what is wrong with it."""

    data: Any
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath) -> str:
        """`file:line` of a key, or of the nearest section around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return ".".join(map(str, path))


def _convert(node: yaml.Node, path: KeyPath, document: Document, name: str, loader: _CoreLoader) -> Any:
    document.places.setdefault(path, f"{name}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.SequenceNode):
        return [_convert(child, (*path, i), document, name, loader) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    result: dict[Any, Any] = {}
    merged: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            parts = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for part in reversed(parts):
                merged.update(_convert(part, path, document, name, loader))
            continue
        key = loader.construct_object(key_node)
        place = f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key, str):
            document.problems.append(Problem(place, f"the key {key!r}", "expected a name"))
            continue
        if key in result:
            first = document.places[(*path, key)]
            document.problems.append(Problem(place, f"{key} is given twice", f"it already stands at {first}"))
        document.places[(*path, key)] = place
        result[key] = _convert(value_node, (*path, key), document, name, loader)
    return {**merged, **result}


def parse_scalar(text: str) -> Any:
    """A value as it would be read from a file; for overrides on the command line."""
    return yaml.load(text, Loader=_CoreLoader)  # a SafeLoader


def parse_yaml(text: str, name: str) -> Document:
    """Parse YAML text; what is wrong is collected in `problems` instead of raised.

    Args:
        name: how the file is called in messages.
    """
    document = Document(data=None)
    loader = _CoreLoader(text)
    try:
        node = loader.get_single_node()
        if node is not None:
            document.data = _convert(node, (), document, name, loader)
    except (yaml.MarkedYAMLError, yaml.reader.ReaderError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{name}:{mark.line + 1}" if mark is not None else name
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        document.problems.append(Problem(line, what, "expected valid YAML"))
    except RecursionError:
        document.problems.append(Problem(name, "nested too deeply", "expected sections of settings"))
    finally:
        loader.dispose()
    return document
