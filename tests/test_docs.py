"""What the pages say is true: the reference is current, YAML loads, links, commands and messages exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config.load import load_settings
from tunesmith.config.yaml_source import parse_yaml
from tunesmith.contracts import events
from tunesmith.data.formats import FORMATS
from tunesmith.settings.run import RunSettings

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
MESSAGES = ROOT / "docs" / "troubleshooting.md"
MINIMAL = {"model": {"name": "model"}, "data": {"train": [{"path": "rows.jsonl"}]}}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def blocks_of(language: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{name(page)}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page.read_text(encoding="utf-8"), language))
    ]


# ---------------------------------------------------------------- generated parts


@cache
def loaded(path: Path) -> Any:
    """A file of the repository that is no part of the package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def writer() -> Any:
    return loaded(ROOT / "scripts" / "write_reference.py")


def test_the_reference_and_the_tree_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert writer().main(["--check"]) == 0, capsys.readouterr().out


def test_a_reference_that_is_out_of_date_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "reference.md"
    page.write_text(writer().reference().replace("`learning_rate`", "`rate`"), encoding="utf-8")
    monkeypatch.setattr(writer(), "REFERENCE", page)
    monkeypatch.setattr(writer(), "ROOT", tmp_path)
    monkeypatch.setattr(writer(), "readme", writer().README.read_text)

    assert writer().main(["--check"]) == 1


def test_every_setting_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))

    missing = [
        f"{section}.{setting}"
        for section, field in RunSettings.model_fields.items()
        for setting in field.annotation.model_fields  # type: ignore[union-attr]
        if setting not in rows
    ]
    assert missing == []
    assert "| required |" in text


# ---------------------------------------------------------------- blocks


def merged(base: Any, change: Any) -> Any:
    """`change` on top of `base`, section by section."""
    if isinstance(base, dict) and isinstance(change, dict):
        return {**base, **{key: merged(base.get(key), value) for key, value in change.items()}}
    return change


@pytest.mark.parametrize("block", blocks_of("yaml"))
def test_yaml_loads_as_a_run_file_or_as_a_part_of_one(block: str) -> None:
    document = parse_yaml(block, "block")
    assert document.problems == []

    load_settings(merged(MINIMAL, document.data))


def test_a_wrong_name_in_a_part_of_a_run_file_is_seen() -> None:
    with pytest.raises(Exception, match=r"unknown setting train\.rate"):
        load_settings(merged(MINIMAL, {"train": {"rate": 1.0}}))


@pytest.mark.parametrize("block", blocks_of("json"))
def test_json_is_valid_and_a_row_is_of_a_known_format(block: str) -> None:
    record = json.loads(block)

    if "micro_batches" not in record:  # the report of a fault
        found = next(row for row in FORMATS.values() if row.detect(record.keys()))
        found.convert(record)


@pytest.mark.parametrize("block", blocks_of("python"))
def test_python_compiles_and_its_settings_load(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tunesmith.train":
            argument = node.args[0]
            if isinstance(argument, ast.Dict):
                load_settings(ast.literal_eval(argument))


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", text, flags=re.MULTILINE))


def commands() -> set[str]:
    import typer

    from tunesmith.cli.main import app

    return set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def shell_lines(text: str) -> list[list[str]]:
    lines = [line.partition("#")[0].split() for block in blocks(text, "bash") for line in block.splitlines()]
    return [words for words in lines if words]


def unknown_commands(text: str) -> Iterator[str]:
    for words in shell_lines(text):
        program, argument = Path(words[0]).name, words[1] if len(words) > 1 else ""
        known = {"make": make_targets(), "tunesmith": commands()}.get(program)
        if known is None and program not in {"pip", "python", "pytest", "source", "git"}:
            yield " ".join(words)
        if known is not None and argument not in known:
            yield " ".join(words)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_of_a_page_exist(page: Path) -> None:
    assert list(unknown_commands(page.read_text(encoding="utf-8"))) == []


def test_the_readme_begins_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = text.split("\n## ")[1]

    assert [words[:2] for words in shell_lines(first)] == [["make", "demo"], ["make", "test"]]
    assert list(unknown_commands("```bash\nmake dmeo\ntunesmith trian\n```")) == [
        "make dmeo",
        "tunesmith trian",
    ]


# ---------------------------------------------------------------- links and names


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def targets(page: Path) -> list[str]:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [link for link in links if not link.startswith(("http://", "https://"))]


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in targets(page):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)

    assert broken == []


def test_every_page_is_linked_from_another() -> None:
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in targets(page)}
    folders = {path for path in linked if path.is_dir()}

    lonely = [name(page) for page in PAGES if page.resolve() not in linked and page.parent not in folders]
    assert set(lonely) <= {"README.md"}


def in_navigation(contents: str) -> list[str]:
    """The pages that the site's navigation has, from the root of the repository, in its order."""
    parts = loaded(ROOT / "docs" / "conf.py").parts(contents)
    return [name((ROOT / "docs" / page).resolve()) for _, pages in parts for page in pages]


def test_the_navigation_has_every_page_once() -> None:
    contents = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {name(page) for page in (ROOT / "docs").rglob("*.md")} - {"docs/README.md"}
    beside = {
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "benchmarks/RESULTS.md",
        "examples/data/README.md",
    }

    listed = in_navigation(contents)
    assert sorted(listed) == sorted(pages | beside)
    assert "docs/quickstart.md" not in in_navigation(contents.replace("- [Quickstart]", "* [Quickstart]"))


def test_the_navigation_becomes_directives() -> None:
    contents = "# Title\n\n## Part one\n\n- [A](a.md): a\n- [B](x/b.md)\n\n## Part two\n\n- [C](../c.md)\n"

    assert loaded(ROOT / "docs" / "conf.py").navigation(contents).split() == [
        "```{toctree}", ":hidden:", ":caption:", "Part", "one", "a.md", "x/b.md", "```",
        "```{toctree}", ":hidden:", ":caption:", "Part", "two", "../c.md", "```",
    ]  # fmt: skip


def test_every_event_field_is_explained() -> None:
    text = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")

    for kind in (
        events.Started,
        events.Stepped,
        events.Measured,
        events.Evaluated,
        events.Saved,
        events.Warned,
        events.Finished,
    ):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{kind.kind}` |"))
        fields = set(kind.__dataclass_fields__) - {"step", "kind", "kept"}
        assert fields <= set(re.findall(r"`(\w+)`", row)), kind.kind


# ---------------------------------------------------------------- messages


@cache
def texts_of_the_code() -> dict[str, list[str]]:
    """Every string of every source file, with … for what is filled in."""
    found: dict[str, list[str]] = {}
    for path in (ROOT / "src").rglob("*.py"):
        texts = found.setdefault(str(path), [])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                texts.append("".join(map(str, parts)))
    return found


def messages() -> list[str]:
    text = MESSAGES.read_text(encoding="utf-8")
    return [" ".join(message.split()) for message in re.findall(r"\*\*`(.+?)`\*\*", text, flags=re.DOTALL)]


def is_said(message: str) -> bool:
    """Whether the code says it: the fixed parts stand in one file, which may put them together from several texts."""
    parts = [part.strip(" .,") for part in re.split(r"…|: ", message)]
    return any(
        all(any(part in text for text in texts) for part in parts if part)
        for texts in texts_of_the_code().values()
    )


def test_there_are_messages() -> None:
    assert len(messages()) > 30
    assert not is_said("There is no such message in …")


@pytest.mark.parametrize("message", messages())
def test_a_message_that_is_explained_is_one_of_the_code(message: str) -> None:
    assert is_said(message)
