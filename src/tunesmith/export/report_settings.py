"""The settings of a run in its report: what was chosen, what stayed as it is by default. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tunesmith.contracts.visible import one_line
from tunesmith.export.page import escape
from tunesmith.settings.base import sections_of
from tunesmith.settings.run import RunSettings

_MOST = 400
"""Characters of a value that are shown."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of a run.

    Attributes:
        name: dotted, as an override is written.
        value: a plain value.
        default: what it is where nothing is said, as a person reads it; `required` where it must be said, and
            `unknown` where this version does not know it.
        chosen: whether it differs from the default.
        help: what it does.
    """

    name: str
    value: Any
    default: str
    chosen: bool
    help: str


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return json.loads(json.dumps(value, default=str))


def settings_of(values: dict[str, Any]) -> list[Setting]:
    """The settings of a run file with their defaults; names that this version does not know have none."""
    return list(_walk(values, [RunSettings], ""))


def _walk(values: dict[Any, Any], sections: list[type[BaseModel]], prefix: str) -> Iterator[Setting]:
    fields: dict[str, FieldInfo] = {}
    for section in sections:
        fields |= {**section.model_fields, **fields}
    for key, value in values.items():
        name, field = f"{prefix}{key}", fields.get(str(key))
        inside = sections_of(field.annotation) if field is not None else []
        if inside and isinstance(value, dict):
            yield from _walk(value, inside, f"{name}.")
        elif inside and isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            for number, entry in enumerate(value):
                yield from _walk(entry, inside, f"{name}.{number}.")
        elif field is None:
            yield Setting(name, value, "unknown", True, "")
        elif field.is_required():
            yield Setting(name, value, "required", True, field.description or "")
        else:
            default = _plain(field.get_default(call_default_factory=True))
            yield Setting(name, value, written(default), value != default, field.description or "")


def written(value: Any) -> str:
    """A value as a person reads it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return one_line(text, _MOST)


def settings_html(values: dict[str, Any]) -> str:
    """What was chosen as a table beside the defaults, and all the rest folded away."""
    if not values:
        return "<h2>Settings</h2><p>The run file is missing or cannot be read.</p>"
    settings = settings_of(values)
    chosen = [setting for setting in settings if setting.chosen]
    rest = [setting for setting in settings if not setting.chosen]
    more = f"<details><summary>{len(rest)} settings as they are by default</summary>{_table(rest)}</details>"
    return f"<h2>Settings</h2>{_table(chosen)}{more if rest else ''}"


def _table(settings: list[Setting]) -> str:
    rows = "".join(map(_row, settings))
    head = "<tr><th>setting</th><th>value</th><th>default</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _row(setting: Setting) -> str:
    mark = ' class="changed"' if setting.chosen else ""
    cells = (
        f"<code>{escape(setting.name)}</code>",
        escape(written(setting.value)),
        escape(setting.default if setting.chosen else ""),
    )
    return f'<tr{mark} title="{escape(_help(setting))}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _help(setting: Setting) -> str:
    return one_line(setting.help, _MOST)
