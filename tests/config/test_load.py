"""From a file, a dict and overrides to settings, or to every problem at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest

from tunesmith.config.load import load_settings
from tunesmith.config.names_elsewhere import OPTIMIZERS, REMARKS, SETTINGS
from tunesmith.contracts.errors import ConfigError, UserError
from tunesmith.settings.base import sections_of
from tunesmith.settings.run import OptimizerName, RunSettings

MINIMAL = "model: {name: x}\ndata: {train: [{path: a.jsonl}]}\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def make(text: str | bytes, name: str = "run.yaml") -> str:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return make


def problems(source: Any, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(source, overrides)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]


def test_defaults_fill_what_is_not_given(write) -> None:
    settings = load_settings(write(MINIMAL))
    assert settings.model.name == "x"
    assert settings.data.train[0].path == "a.jsonl"
    assert settings.adapter.rank == 16
    assert settings.train.betas == (0.9, 0.999)


def test_a_file_and_the_same_dict_are_equal_and_the_dict_is_left_alone(write) -> None:
    text = MINIMAL + "train: {learning_rate: 2e-4, betas: [0.8, 0.9]}\nadapter: {targets: [q_proj]}\n"
    given: dict[str, Any] = {
        "model": {"name": "x"},
        "data": {"train": ({"path": Path("a.jsonl")},)},
        "train": {"learning_rate": 2e-4, "betas": (0.8, 0.9)},
        "adapter": {"targets": ["q_proj"]},
    }
    assert load_settings(write(text)) == load_settings(given)
    load_settings(given, ["train.steps=5", "data.train.0.path=b"])
    assert given["data"]["train"][0]["path"] == Path("a.jsonl")
    assert "steps" not in given["train"]


def test_settings_are_frozen(write) -> None:
    settings = load_settings(write(MINIMAL))
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        settings.train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"model: {name: \xff}\n", "is not valid UTF-8 (byte 14)"),
        ("", "is empty."),
        ("# nothing yet\n", "is empty."),
    ],
)
def test_a_file_that_is_no_run_file(write, text, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings(write(text))
    assert sentence in str(caught.value)
    assert not isinstance(caught.value, ConfigError)


def test_a_missing_file_names_the_nearest(write, tmp_path: Path) -> None:
    write(MINIMAL, "first.yaml")
    with pytest.raises(UserError) as caught:
        load_settings("frist.yaml")
    assert str(caught.value) == "There is no file frist.yaml.\nDid you mean first.yaml?"
    with pytest.raises(UserError, match="is a folder"):
        load_settings(tmp_path)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("train: {lr: 1e-4}", "unknown setting train.lr; here it is train.learning_rate"),
        ("train: {micro_batch_size: 2}", "unknown setting train.micro_batch_size; did you mean micro_batch?"),
        (
            "train: {gradient_accumulation_steps: 4}",
            "unknown setting train.gradient_accumulation_steps; here it is train.global_batch (it counts the rows of "
            "all micro-batches of a step)",
        ),
        ("lora_r: 16", "unknown setting lora_r; here it is adapter.rank"),
        ("train: {rank: 16}", "unknown setting train.rank; it is adapter.rank"),
        ("learning_rate: 1.0", "unknown setting learning_rate; it is train.learning_rate"),
        ("data: {train: [{path: a}], split: train}", "unknown setting data.split; it is data.train.0.split"),
        ("data: {train: [{path: a}], path: b}", "unknown setting data.path; it is data.train.0.path"),
        (
            "parallel: {what: 1}",
            "unknown setting parallel.what; expected one of engine, replicate, shard, tensor,",
        ),
        ("train: {optimizer: adamw_torch}", "(did you mean 'adamw'?)"),
    ],
)
def test_names_of_other_tools_and_of_other_sections(write, section: str, said: str) -> None:
    kept = [line for line in MINIMAL.splitlines() if line.partition(":")[0] != section.partition(":")[0]]
    (problem,) = problems(write("\n".join([*kept, section, ""])))
    assert said in problem


def test_every_name_of_another_tool_leads_to_a_setting() -> None:
    for here in SETTINGS.values():
        section, name = here.split(".")
        (found, *_) = sections_of(RunSettings.model_fields[section].annotation)
        assert name in found.model_fields
    sections = [
        found for field in RunSettings.model_fields.values() for found in sections_of(field.annotation)
    ]
    assert not any(name in section.model_fields for section in sections for name in SETTINGS)
    assert set(OPTIMIZERS.values()) <= set(get_args(OptimizerName))
    assert set(REMARKS) <= set(SETTINGS)


@pytest.mark.parametrize("text", ["- a\n", "hello\n"])
def test_a_file_without_sections(write, text: str) -> None:
    assert problems(write(text)) == ["run.yaml:1: no sections; expected model:, data: and so on"]


def test_all_problems_are_collected_with_their_lines(write) -> None:
    text = """\
modle: {name: x}
data:
  train:
    - pth: a.jsonl
train:
  steps: 2.5
  packing: no
  scheduler: cosin
  seed: 1
  seed: 2
  global_batch: many
memory: 3
"""
    assert problems(write(text)) == [
        "run.yaml:1: model is missing; this setting has no default",
        "run.yaml:1: unknown setting modle; did you mean model?",
        "run.yaml:4: data.train.0.path is missing; this setting has no default",
        "run.yaml:4: unknown setting data.train.0.pth; did you mean path?",
        "run.yaml:6: train.steps is 2.5; expected a whole number",
        "run.yaml:7: train.packing is 'no'; expected true or false",
        "run.yaml:8: train.scheduler is 'cosin'; expected 'cosine', 'linear', 'constant', 'inverse_sqrt' or"
        " 'cosine_with_min_lr' (did you mean 'cosine'?)",
        "run.yaml:10: seed is given twice; it already stands at run.yaml:9",
        "run.yaml:11: train.global_batch is 'many'; expected a whole number or a number of tokens such as"
        " '32768 tokens'",
        "run.yaml:12: memory is 3; expected a section of settings",
    ]


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ("model: {name: 3}", "model.name is 3; expected text"),
        ("model: {name: ''}", "model.name is ''; expected some text"),
        ("model:", "model is empty; expected a section of settings"),
        ("adapter: {rank: '16'}", "adapter.rank is '16'; expected a whole number"),
        ("adapter: {rank: 0}", "adapter.rank is 0; expected a number of at least 1"),
        ("adapter: {dropout: 1}", "adapter.dropout is 1; expected a number below 1.0"),
        ("adapter: {alpha: 0}", "adapter.alpha is 0; expected a number above 0.0"),
        (
            "adapter: {targets: all_linear}",
            "adapter.targets is 'all_linear'; expected 'all-linear' or a regular expression "
            "(with . * [ ( or | in it) or a list (did you mean 'all-linear'?)",
        ),
        ("objective: {kind: dpo}", "objective.kind is 'dpo'; expected 'sft'"),
        ("train: {seed: 4294967296}", "train.seed is 4294967296; expected a number below 4294967296"),
        ("train: {betas: 0.9}", "train.betas is 0.9; expected a list"),
        ("train: {micro_batch: all}", "train.micro_batch is 'all'; expected 'auto' or a whole number"),
        (
            "train: {global_batch: 0 tokens}",
            "train.global_batch is '0 tokens'; expected a whole number or a number of tokens such as"
            " '32768 tokens'",
        ),
        ("train: {max_grad_norm: .nan}", "train.max_grad_norm is nan; expected a finite number"),
        (
            "data: {train: {path: a}}",
            "data.train is {'path': 'a'}; expected a list of sources (write `- path: a` below data.train)",
        ),
        (
            "data: {train: a.jsonl}",
            "data.train is 'a.jsonl'; expected a list of sources (write `- path: a.jsonl` below data.train)",
        ),
        ("data: {train: []}", "data.train is []; expected at least 1 entry"),
        (
            "data: {train: [a]}",
            "data.train.0 is 'a'; expected a list of sources (write `- path: a` below data.train)",
        ),
        ("data: {train: [3]}", "data.train.0 is 3; expected a section of settings"),
        (
            "data: {train: [{path: a}], eval: b.jsonl}",
            "data.eval is 'b.jsonl'; expected a list of sources (write `- path: b.jsonl` below data.eval)",
        ),
        (
            "data: {train: [{path: a}], eval: {fraction: some}}",
            "data.eval.fraction is 'some'; expected a number",
        ),
        (
            "data: {train: [{path: a, columns: {prompt: 1}}]}",
            "data.train.0.columns.prompt is 1; expected text",
        ),
        (
            "data: {train: [{path: a}], eval: {fraction: 2}}",
            "data.eval.fraction is 2; expected a number below 1.0",
        ),
        (
            "data: {train: [{path: a}], eval: [{path: b}, {format: chat}]}",
            "data.eval.1.path is missing; this setting has no default",
        ),
        (
            "data: {train: [{path: a}], eval: [{path: b, spilt: c}]}",
            "unknown setting data.eval.0.spilt; did you mean split?",
        ),
    ],
)
def test_one_wrong_value_is_one_problem(write, section: str, problem: str) -> None:
    kept = [line for line in MINIMAL.splitlines() if line.partition(":")[0] != section.partition(":")[0]]
    file = write("\n".join([*kept, section, ""]))
    assert problems(file) == [f"run.yaml:{len(kept) + 1}: {problem}"]


def test_a_long_value_is_clipped(write) -> None:
    (found,) = problems(write(MINIMAL), f"train.steps={'x' * 500}")
    assert "'xxx" in found
    assert "...; expected a whole number" in found
    assert found.count("x") < 600


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=7", lambda s: s.train.steps == 7),
        ("train.learning_rate=2e-4", lambda s: s.train.learning_rate == 2e-4),
        ("train.steps=null", lambda s: s.train.steps is None),
        ("output.dir=a=b", lambda s: s.output.dir == "a=b"),
        ("model.revision='08'", lambda s: s.model.revision == "08"),
        ("data.train.0.path=b.jsonl", lambda s: s.data.train[0].path == "b.jsonl"),
        ("data.train.0.columns.prompt=question", lambda s: s.data.train[0].columns == {"prompt": "question"}),
        ("data.train=[{path: b}, {path: c}]", lambda s: [t.path for t in s.data.train] == ["b", "c"]),
        ("data.eval=[{path: b}]", lambda s: s.data.eval[0].path == "b"),
        ("data.eval.fraction=0.5", lambda s: s.data.eval.fraction == 0.5),
        ("adapter.targets=[q_proj, v_proj]", lambda s: s.adapter.targets == ("q_proj", "v_proj")),
        ("train={steps: 3}", lambda s: s.train.steps == 3 and s.train.seed == 42),
    ],
)
def test_an_override_replaces_a_setting(write, override: str, value) -> None:
    assert value(load_settings(write(MINIMAL), [override]))


def test_later_overrides_win(write) -> None:
    assert load_settings(write(MINIMAL), ["train.steps=1", "train.steps=2"]).train.steps == 2


def test_an_override_into_an_empty_section(write) -> None:
    assert load_settings(write(MINIMAL + "train:\n"), ["train.steps=2"]).train.steps == 2


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.steps", "not an override; expected section.key=value"),
        ("=3", "not an override; expected section.key=value"),
        ("--steps=3", "not an override; expected section.key=value"),
        (
            "train.steps=abc",
            "train.steps is 'abc'; expected a whole number or a number of tokens such as '32768 tokens'",
        ),
        ("train.steps=[1", None),
        ("train.steps=!!int x", None),
        ("data.train.4.path=x", "there is no data.train.4; expected a section of the file"),
        ("data.train.1=x", "there is no data.train.1; expected a setting of the file"),
        ("model.name.x=2", "there is no model.name.x; expected a setting of the file"),
        (
            "train={steps: abc}",
            "train.steps is 'abc'; expected a whole number or a number of tokens such as '32768 tokens'",
        ),
    ],
)
def test_a_wrong_override_is_named(write, override: str, problem: str | None) -> None:
    (found,) = problems(write(MINIMAL + "train: {steps: 1}\n"), override)
    assert found.startswith(f"override {override!r}")
    assert problem is None or found == f"override {override!r}: {problem}"


@pytest.mark.parametrize("override", ["train.stpes=1", "trian.steps=1", "train.²=1"])
def test_an_override_of_an_unknown_setting_is_named(write, override: str) -> None:
    (found,) = problems(write(MINIMAL), override)
    assert found.startswith(f"override {override!r}: unknown setting {override.split('=')[0].split('.')[0]}")


def test_problems_of_file_overrides_and_validation_come_together(write) -> None:
    found = problems(write(MINIMAL + "train: {seed: -1}\n"), "nonsense", "train.steps=abc")
    assert [line.partition(":")[0] for line in found] == [
        "run.yaml",
        "override 'nonsense'",
        "override 'train.steps=abc'",
    ]


def test_reading_a_run_file_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    program = (
        "import sys; from tunesmith.config.load import load_settings; load_settings('run.yaml');"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
