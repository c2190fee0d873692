"""`tunesmith schema`: editors get the same verdict on a run file as a run, and a description of every setting."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.cli.command import succeed
from tunesmith.config.load import load_settings
from tunesmith.config.schema import run_file_schema
from tunesmith.config.yaml_source import parse_yaml
from tunesmith.contracts.errors import ConfigError
from tunesmith.settings.run import RunSettings

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
HEAVY = {"torch", "transformers", "datasets", "numpy", "rich"}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return run_file_schema()


@pytest.fixture(scope="module")
def validator(schema: dict[str, Any]) -> Draft202012Validator:
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_the_command_prints_it(schema: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    succeed("schema")

    printed = json.loads(capsys.readouterr().out)
    assert printed == schema
    assert printed["$schema"] == Draft202012Validator.META_SCHEMA["$id"]


def test_it_loads_nothing_heavy() -> None:
    """What keeps it under a second, on a machine that is busy as well."""
    program = (
        "import sys, tunesmith.cli.main as m\n"
        "try: m.run(['schema'])\n"
        "except SystemExit: print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert json.loads(done.stdout)["type"] == "object"
    loaded = set(done.stderr.split())
    assert "tunesmith" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_accepted(validator: Draft202012Validator, example: Path) -> None:
    validator.validate(parse_yaml(example.read_text(encoding="utf-8"), example.name).data)


MINIMAL: dict[str, Any] = {"model": {"name": "m"}, "data": {"train": [{"path": "rows.jsonl"}]}}

CHANGES: list[tuple[str, Any, bool]] = [
    ("train.rate", 1.0, False),
    ("train.global_batch", 8, True),
    ("train.global_batch", "32768 tokens", True),
    ("train.global_batch", "many", False),
    ("train.global_batch", 0, False),
    ("train.learning_rate", 2.0e-4, True),
    ("train.learning_rate", "2e-4", False),
    ("train.learning_rate", 0, False),
    ("train.scheduler", "cosine", True),
    ("train.scheduler", "cosin", False),
    ("train.packing", True, True),
    ("train.packing", "yes", False),
    ("train.max_hours", None, True),
    ("adapter.targets", "all-linear", True),
    ("adapter.targets", ["q_proj"], True),
    ("adapter.targets", ".*q_proj", True),
    ("adapter.targets", "q_proj", False),
    ("adapter.rank", 16.5, False),
    ("model.nmae", "m", False),
    ("model.name", "", False),
    ("data.train", [], False),
    ("data.train", [{"path": "rows.jsonl", "columns": {"prompt": "question"}}], True),
    ("data.train", [{"path": "rows.jsonl", "colums": {}}], False),
    ("data.eval", {"fraction": 0.1}, True),
    ("data.eval", [{"path": "held.jsonl"}], True),
    ("data.eval", {"fraction": 1.0}, False),
    ("data.train_on", ["user", "assistant"], True),
    ("data.train_on", "users", False),
    ("output.save_every", None, True),
    ("outptu", {}, False),
    ("data", None, False),
]


@pytest.mark.parametrize(("path", "value", "right"), CHANGES, ids=lambda part: str(part)[:24])
def test_it_judges_as_a_run_does(validator: Draft202012Validator, path: str, value: Any, right: bool) -> None:
    run = copy.deepcopy(MINIMAL)
    *sections, name = path.split(".")
    place = run
    for section in sections:
        place = place.setdefault(section, {})
    place[name] = value

    assert validator.is_valid(run) is right
    if right:
        load_settings(run)
    else:
        with pytest.raises(ConfigError):
            load_settings(run)


def test_what_has_no_default_is_required(validator: Draft202012Validator) -> None:
    for section in ("model", "data"):
        assert not validator.is_valid({key: value for key, value in MINIMAL.items() if key != section})


def fields(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for title, section in {"": schema, **schema["$defs"]}.items():
        for name, field in section["properties"].items():
            yield f"{title}.{name}", field


def test_every_field_is_described_on_one_line(schema: dict[str, Any]) -> None:
    found = dict(fields(schema))

    assert {f".{name}" for name in RunSettings.model_fields} <= set(found)
    assert [name for name, field in found.items() if not field["description"]] == []
    assert [name for name, field in found.items() if "\n" in field["description"]] == []
    learning_rate = RunSettings.model_fields["train"].annotation.model_fields["learning_rate"]  # type: ignore[union-attr]
    assert found["TrainSettings.learning_rate"]["description"] == learning_rate.description
