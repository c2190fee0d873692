"""What a name stands for, and what is said where it stands for nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.config.find_result import base_of_adapter, find_result, scaling_of_run
from tunesmith.contracts.errors import UserError


def _file(path: Path, text: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("file", "adapter"),
    [("adapter/adapter_config.json", True), ("model/config.json", False)],
)
def test_a_run_directory_and_its_inner_folder_are_one(tmp_path: Path, file: str, adapter: bool) -> None:
    inner = _file(tmp_path / "run" / file).parent
    _file(tmp_path / "run" / "run.yaml")
    _file(inner / "run.yaml", "model: {quantize: nf4, dtype: bfloat16}\ndata: {date: '2026-02-03'}\n")
    for name in (tmp_path / "run", inner):
        found = find_result(str(name))
        assert (found.folder, found.adapter) == (inner, adapter)
        assert (found.quantize, found.dtype, found.date) == ("nf4", "bfloat16", "2026-02-03")


def test_a_folder_of_others_says_nothing_of_a_run(tmp_path: Path) -> None:
    _file(tmp_path / "config.json")
    found = find_result(str(tmp_path))
    assert (found.folder, found.adapter, found.quantize, found.date) == (tmp_path, False, "none", None)


def test_trust_is_not_taken_from_a_file(tmp_path: Path) -> None:
    _file(tmp_path / "config.json")
    _file(tmp_path / "run.yaml", "model: {trust_remote_code: true}\n")
    assert not hasattr(find_result(str(tmp_path)), "trust_remote_code")


@pytest.mark.parametrize("name", ["gpt2", "owner/name"])
def test_an_id_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_result(name).folder is None


def test_what_is_no_result_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _file(Path("runs/first/run.yaml"))
    _file(Path("empty/nothing.txt"))
    cases = {
        "runs/first": "has left no adapter or model yet",
        "runs": "Did you mean runs/first?",
        "runs/frist": "Did you mean runs/first?",
        "./gone": "There is no folder gone",
        "runs/first/run.yaml": "is a file",
        "empty": "holds neither an adapter",
    }
    for name, message in cases.items():
        with pytest.raises(UserError) as caught:
            find_result(name)
        assert message in str(caught.value), name


@pytest.mark.parametrize("text", ["model: {quantize: int3}", "model: [", "model: {dtype: [1]}"])
def test_a_damaged_run_file(tmp_path: Path, text: str) -> None:
    _file(tmp_path / "config.json")
    _file(tmp_path / "run.yaml", text)
    with pytest.raises(UserError, match="not the run file of a result"):
        find_result(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [("{", "not the configuration"), ("[]", "not the configuration"), ("{}", "does not say which model")],
)
def test_an_adapter_without_a_base(tmp_path: Path, config: str, message: str) -> None:
    _file(tmp_path / "adapter_config.json", config)
    with pytest.raises(UserError, match=message):
        base_of_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "x", "revision": "y"})
    )
    assert base_of_adapter(tmp_path) == ("x", "y")


def test_positions_that_a_run_stretched(tmp_path: Path) -> None:
    _file(tmp_path / "adapter_config.json")
    assert scaling_of_run(tmp_path) is None
    _file(tmp_path / "run.yaml", "model: {rope_scaling: {rope_type: yarn, factor: 4.0, beta_fast: null}}\n")
    assert find_result(str(tmp_path)).rope_scaling == {"rope_type": "yarn", "factor": 4.0}
    assert scaling_of_run(tmp_path) == {"rope_type": "yarn", "factor": 4.0}
    _file(tmp_path / "run.yaml", "model: {rope_scaling: null}\n")
    assert find_result(str(tmp_path)).rope_scaling is None


@pytest.mark.parametrize("scaling", ["2.0", "{rope_type: yarm, factor: 2.0}", "{rope_type: yarn}"])
def test_positions_that_nobody_knows(tmp_path: Path, scaling: str) -> None:
    _file(tmp_path / "config.json")
    _file(tmp_path / "run.yaml", f"model: {{rope_scaling: {scaling}}}\n")
    with pytest.raises(UserError, match="is not the run file of a result"):
        find_result(str(tmp_path))
