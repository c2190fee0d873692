"""docs/fast-language-model.md: its tables are those of the code, and its script runs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tests.api.scripts import replaced, run_script
from tunesmith import FastLanguageModel
from tunesmith.api.arguments import ADAPTING, CONVERTING, LOADING, SAVING, Foreign
from tunesmith.api.trainer_arguments import MOVED, TRAINING

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "fast-language-model.md"


def described(function: Callable[..., Any]) -> dict[str, str]:
    """What the docstring of a function says of each argument."""
    section = inspect.getdoc(function).partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"^    (?=\w+: )", section, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, _, text in (entry.partition(": ") for entry in entries)}


def own_table(function: Callable[..., Any]) -> str:
    """The arguments that do something."""
    rows = ["| argument | default | what it does |", "|---|---|---|"]
    parameters = inspect.signature(function).parameters
    for name, text in described(function).items():
        if name == "foreign":
            continue
        default = parameters[name].default
        shown = "" if default is inspect.Parameter.empty else f"`{default!r}`"
        rows.append(f"| `{name}` | {shown} | {text} |")
    return "\n".join(rows)


def foreign_table(table: Mapping[str, Foreign]) -> str:
    """The arguments that change nothing."""
    rows = ["| argument | accepted | otherwise |", "|---|---|---|"]
    for name, row in table.items():
        accepted = "anything" if row.harmless is None else ", ".join(f"`{value!r}`" for value in row.harmless)
        rows.append(f"| `{name}` | {accepted} | {f'{row.reason} {row.instead}'.strip()} |")
    return "\n".join(rows)


def moved_table() -> str:
    """The arguments that have other names today."""
    rows = ["| argument of 2024 | field of `SFTConfig` |", "|---|---|"]
    return "\n".join([*rows, *(f"| `{name}` | `{field}` |" for name, field in MOVED.items())])


TABLES = {
    "from_pretrained": own_table(FastLanguageModel.from_pretrained),
    "get_peft_model": own_table(FastLanguageModel.get_peft_model),
    "from_pretrained, others": foreign_table(LOADING),
    "get_peft_model, others": foreign_table(ADAPTING),
    "SFTTrainer": moved_table(),
    "SFTTrainer, others": foreign_table(TRAINING),
    "save_pretrained_merged, others": foreign_table(SAVING),
    "standardize_sharegpt, others": foreign_table(CONVERTING),
}


@pytest.mark.parametrize("function", [FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model])
def test_every_argument_is_described(function: Callable[..., Any]) -> None:
    assert list(described(function)) == list(inspect.signature(function).parameters)


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_the_page_is_the_codes(table: str) -> None:
    assert TABLES[table] in PAGE.read_text(encoding="utf-8")


def test_every_public_name_stands_in_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    others = {"ConfigError", "RunResult", "UserError", "__version__", "train"}
    assert [name for name in tunesmith.__all__ if name not in others and name not in text] == []


@pytest.mark.parametrize("page", ["docs/fast-language-model.md", "README.md"])
def test_the_script_of_a_page_runs(page: str, wide_model_dir: Path, tmp_path: Path) -> None:
    """And prints what the page says it prints, but for the figures of another model."""
    text = (ROOT / page).read_text(encoding="utf-8")
    script, printed = re.search(
        r"```python\n([^`]*FastLanguageModel[^`]*)```.*?```text\n([^`]*)```", text, flags=re.DOTALL
    ).groups()
    rows = (ROOT / "examples" / "data" / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    changes = {
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': repr(str(wide_model_dir)),
        '"examples/data/gsm8k.jsonl"': '"rows.jsonl"',
        "max_steps=60": "max_steps=2, report_to='none'",
    }
    output = run_script(replaced(script, changes), tmp_path)

    def shape(lines: str) -> list[str]:
        said = lines[lines.index("tunesmith: ") :].splitlines()[:4]
        return [re.sub(r"tunesmith: .*|[\d,]+|\s+", "#", line) for line in said]

    assert shape(output[output.index("tunesmith: /") :]) == shape(printed)
