"""`tunesmith.train`: a dict in, a `RunResult` out, errors as exceptions, and silence where asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import tunesmith
from tests.support.runs import run_settings


@pytest.fixture
def settings(tiny_model_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return run_settings(tiny_model_dir, tmp_path)


def test_a_dict_trains_and_says_where_everything_lies(settings, tmp_path: Path, capfd) -> None:
    result = tunesmith.train(settings)
    assert isinstance(result, tunesmith.RunResult)
    assert result.dir == tmp_path / "run"
    assert result.result == tmp_path / "run" / "adapter"
    assert (result.result / "adapter_config.json").is_file()
    assert result.loss_curve == tmp_path / "run" / "loss.png"
    assert (result.reason, result.steps) == ("complete", 6)
    assert result.tokens > 0
    assert result.seconds > 0
    assert result.first_eval is not None
    assert result.last_eval is not None
    assert result.last_eval < result.first_eval
    assert "held-out loss" in capfd.readouterr().out


def test_quiet_prints_nothing(settings, capfd) -> None:
    tunesmith.train(settings, quiet=True)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_file_a_dict_and_overrides_are_the_same_run(settings, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    overrides = ["train.steps=2", f"output.dir={tmp_path / 'second'}"]
    second = tunesmith.train(path, overrides=overrides, quiet=True)
    third = tunesmith.train(
        settings | {"output": settings["output"] | {"dir": str(tmp_path / "third")}}, overrides=["train.steps=2"],
        quiet=True,
    )  # fmt: skip
    assert second.dir == tmp_path / "second"
    assert second.steps == third.steps == 2
    assert second.last_eval == third.last_eval


def test_the_callers_dict_is_left_alone(settings, tmp_path: Path) -> None:
    before = yaml.safe_dump(settings)
    tunesmith.train(settings, overrides=["train.steps=1", "data.eval={fraction: 0.5}"], quiet=True)
    assert yaml.safe_dump(settings) == before


def test_errors_are_exceptions_that_can_be_read(settings) -> None:
    with pytest.raises(tunesmith.ConfigError) as caught:
        tunesmith.train({"model": {"nam": 3}, "data": {"train": []}})
    assert [problem.where for problem in caught.value.problems] == ["model.name", "model.nam", "data.train"]
    assert isinstance(caught.value, tunesmith.UserError)
    settings["model"]["name"] = "./nowhere"
    with pytest.raises(tunesmith.UserError, match="there is no folder nowhere"):
        tunesmith.train(settings)


def test_without_a_held_out_row_nothing_is_measured(settings) -> None:
    settings["data"]["eval"] = {"fraction": 0.0}
    result = tunesmith.train(settings, quiet=True)
    assert (result.first_eval, result.last_eval) == (None, None)


def test_a_home_folder_as_run_directory(settings, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    settings["output"]["dir"] = "~/mine"
    settings["data"]["cache_dir"] = "~/tokens"
    assert tunesmith.train(settings, overrides=["train.steps=1"], quiet=True).dir == tmp_path / "mine"
    assert (tmp_path / "tokens").is_dir()
    assert not (tmp_path / "~").exists()


def test_public_names() -> None:
    assert set(dir(tunesmith)) >= {"train", "RunResult", "ConfigError", "UserError", "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'zork'"):
        _ = tunesmith.zork
