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
# PyYAML reads 010 as octal 8 and fails at 08; both are decimal in the core schema.
_CoreLoader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))

CORE_RESOLVERS = _CoreLoader.yaml_implicit_resolvers
"""First character of a plain scalar to (tag, pattern), for a writer whose text is read back here."""

_MERGE = "tag:yaml.org,2002:merge"
_CORE_TAGS = {f"tag:yaml.org,2002:{name}": name for name in ("str", "int", "float", "bool", "null")}


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


def _scalar(node: yaml.Node, place: str, document: Document, loader: _CoreLoader) -> Any:
    """The value of a plain or quoted scalar; an explicit tag that does not fit it is a problem."""
    kind = _CORE_TAGS.get(node.tag)
    if kind is None:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        document.problems.append(Problem(place, f"the tag {tag}", "expected a plain value"))
        return None
    try:
        return loader.construct_object(node)
    except (ValueError, KeyError):
        document.problems.append(Problem(place, f"{node.value!r} as !!{kind}", f"expected a YAML {kind}"))
        return None


def _merged(node: yaml.Node, path: KeyPath, document: Document, name: str, loader: _CoreLoader) -> Any:
    """What the merge key `<<` brings in: a mapping, or a list of mappings of which the first counts most."""
    parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
    merged: dict[Any, Any] = {}
    for part in reversed(parts):
        if isinstance(part, yaml.MappingNode):
            merged.update(_convert(part, path, document, name, loader))
        else:
            place = f"{name}:{part.start_mark.line + 1}"
            document.problems.append(Problem(place, "<< without a section", "expected an alias of a section"))
    return merged


def _convert(node: yaml.Node, path: KeyPath, document: Document, name: str, loader: _CoreLoader) -> Any:
    document.places.setdefault(path, f"{name}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.SequenceNode):
        return [_convert(child, (*path, i), document, name, loader) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(node, f"{name}:{node.start_mark.line + 1}", document, loader)
    result: dict[Any, Any] = {}
    merged: dict[Any, Any] = {}
    merges = [value for key, value in node.value if key.tag == _MERGE]
    for value_node in merges:  # first, so that a key given here also has its place here
        merged = {**_merged(value_node, path, document, name, loader), **merged}
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE:
            continue
        place = f"{name}:{key_node.start_mark.line + 1}"
        key = _scalar(key_node, place, document, loader) if isinstance(key_node, yaml.ScalarNode) else ()
        if not isinstance(key, str):
            found = "a list or a section as a key" if key == () else f"the key {key!r}"
            document.problems.append(Problem(place, found, "expected a name"))
            continue
        if key in result:
            first = document.places[(*path, key)]
            document.problems.append(Problem(place, f"{key} is given twice", f"it already stands at {first}"))
        document.places[(*path, key)] = place
        result[key] = _convert(value_node, (*path, key), document, name, loader)
    return {**merged, **result}


def parse_yaml(text: str, name: str) -> Document:
    """Parse YAML text; what is wrong is collected in `problems` instead of raised.

    Args:
        name: how the file is called in messages.

    Returns:
        The document; its data is None where the text is no YAML.
    """
    document = Document(data=None)
    try:
        loader = _CoreLoader(text)
        node = loader.get_single_node()
        if node is not None:
            document.data = _convert(node, (), document, name, loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"the character U+{ord(text[error.position]):04X}"
        document.problems.append(Problem(f"{name}:{line}", what, "expected printable text"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark is not None else name
        what = error.problem or str(error).splitlines()[0]
        if what.startswith("but "):  # the other half of a sentence that PyYAML begins in its context
            what = f"{error.context}, {what}"
        document.problems.append(Problem(place, what, "expected valid YAML", _advice(what)))
    except RecursionError:
        document.problems.append(Problem(name, "nested too deeply", "expected sections of settings"))
    return document


def _advice(problem: str) -> str | None:
    """The usual cause of what PyYAML's scanner complains about."""
    if r"'\t'" in problem:
        return "indent with spaces"
    if problem == "mapping values are not allowed here":
        return "check the indentation, and quote text that holds a colon"
    return None
