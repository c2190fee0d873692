"""The table of formats in the guide is the one that the code has."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

from tunesmith.data.formats import FORMATS, KINDS, SUPERVISED, Column

PAGE = Path(__file__).parents[2] / "docs" / "your-own-data.md"


def quoted(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def others(columns: dict[str, Column]) -> str:
    return "; ".join(quoted(column.aliases) for column in columns.values() if column.aliases)


def table() -> Iterator[str]:
    """The lines of the table, one for each format that rows can be recognised as or that can be named."""
    yield "| format | what it is | rows become | columns it needs | other names of these | also read |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, row in FORMATS.items():
        if name != row.name:
            continue
        needed = {own: column for own, column in row.columns.items() if column.required}
        also = [own for own, column in row.columns.items() if not column.required]
        cells = [f"`{name}`", row.summary, KINDS[row.kind], quoted(needed), others(needed), quoted(also)]
        yield "| " + " | ".join(cells) + " |"


def test_the_table_of_formats_is_current() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(
        (number for number, line in enumerate(lines) if line.startswith("| format | what it is")), -1
    )
    assert start >= 0, "the page has no table of formats"
    shown = lines[start : start + len(list(table()))]
    assert shown == list(table()), "the table should be:\n" + "\n".join(table())


def test_the_guide_says_what_trains() -> None:
    words = " ".join(PAGE.read_text(encoding="utf-8").split())
    *most, last = (KINDS[kind] for kind in KINDS if kind in SUPERVISED)
    assert f"Runs train on {', '.join(most)} and {last};" in words


REASON_AT = {"RowProblem": 0, "as_flag": 1, "as_number": 1, "parse_json": 1}


def reasons() -> set[str]:
    """Every reason for which a reader of rows drops one."""
    folder = Path(__file__).parents[2] / "src" / "tunesmith" / "data"
    files = [
        *(folder / "formats").glob("*.py"),
        *(folder / f"{name}.py" for name in ("chat", "tool_dialects")),
    ]
    found = {"not text"}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            place = (
                REASON_AT.get(node.func.id)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                else None
            )
            if place is not None:
                reason = node.args[place]
                assert isinstance(reason, ast.Constant), f"{file.name}:{node.lineno} computes its reason"
                found.add(str(reason.value))
    return found


def test_every_reason_is_in_the_guide() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(reasons()) > 20
    assert [reason for reason in sorted(reasons()) if f"`{reason}`" not in page] == []
