"""JSON Schema of a run file, for editors: names, types, defaults and what each setting does, as it is typed.

It comes from the settings themselves, so it knows every setting of this version and none of another. Rules between
settings (`rules.RULES`) are not in it: `tunesmith train` checks those.
"""

from __future__ import annotations

from typing import Any

from tunesmith._version import __version__
from tunesmith.settings.run import RunSettings

DIALECT = "https://json-schema.org/draft/2020-12/schema"
"""The dialect in which pydantic writes schemas, and the one that the file names."""

SCHEMA_FILE = "tunesmith.schema.json"
"""The name under which the pages and `tunesmith init` expect the schema."""


def run_file_schema() -> dict[str, Any]:
    """The schema of a whole run file, as plain values for JSON."""
    schema = RunSettings.model_json_schema()
    sections: dict[str, Any] = schema["$defs"]
    for section in (schema, *sections.values()):
        for field in section["properties"].values():
            _make_readable(field, sections)
        del section["title"]
        section["description"] = _one_line(section["description"])
    head = {"$schema": DIALECT, "title": f"Run file of tunesmith {__version__}"}
    return head | schema


def _make_readable(field: dict[str, Any], sections: dict[str, Any]) -> None:
    """A field as an editor shows it: one line of description, a section's own where it has none."""
    field.pop("title", None)  # it repeats the name
    section = sections.get(field.get("$ref", "").removeprefix("#/$defs/"))
    if section is not None:
        field.setdefault("description", section["description"])
    if isinstance(field.get("default"), dict) and field["default"]:
        del field["default"]  # of a whole section: each setting in it says its own
    field["description"] = _one_line(field.get("description", ""))


def _one_line(text: str) -> str:
    return " ".join(text.split())
