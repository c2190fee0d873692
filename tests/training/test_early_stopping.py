"""A held-out loss that no longer falls ends the run; the lowest one names a checkpoint, and the result if asked."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tests.support.runs import build, train
from tunesmith.config.execute import execute
from tunesmith.config.leave_result import leave_result
from tunesmith.config.load import load_settings
from tunesmith.contracts.errors import ConfigError, UserError
from tunesmith.training.cadence import evaluations_without_gain
from tunesmith.training.evaluate import HeldOutLoss, held_out_loss


@pytest.fixture
def settings(settings: Callable[..., dict[str, Any]]):
    def make(**sections: dict[str, Any]) -> dict[str, Any]:
        sections["output"] = {"eval_every": 1} | sections.get("output", {})
        return settings(**sections)

    return make


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch):
    """Have evaluations measure these losses, in order of the calls; the last one from then on."""

    def script(*values: float) -> None:
        left = list(values)
        monkeypatch.setattr(
            "tunesmith.training.trainer.held_out_loss",
            lambda *_, **__: HeldOutLoss(left.pop(0) if len(left) > 1 else left[0], 1),
        )

    return script


@pytest.mark.parametrize(
    ("evals", "every", "min_delta", "count"),
    [
        ({}, 10, 0.0, 0),
        ({0: 3.0}, 10, 0.0, 0),
        ({0: 3.0, 10: 2.0, 20: 2.5, 30: 2.0}, 10, 0.0, 2),  # equal is no gain
        ({0: 3.0, 10: 2.0, 20: 1.95, 30: 1.85}, 10, 0.1, 0),  # 1.85 is a gain over 2.0
        ({0: 3.0, 10: 2.0, 20: 1.95, 30: 1.91}, 10, 0.1, 2),
        ({0: 1.0, 10: 2.0, 20: 1.5}, 10, 0.0, 2),  # it never fell below the first
        ({0: 3.0, 10: 2.0, 13: 2.5, 20: 2.5}, 10, 0.0, 1),  # 13 is where a part of the run ended
        ({0: 3.0, 10: math.nan, 20: math.nan}, 10, 0.0, 2),
        ({30: 2.5, 10: 2.0, 0: 3.0, 20: 1.0}, 10, 0.0, 1),  # whatever their order
    ],
)
def test_evaluations_without_a_gain(evals, every, min_delta, count):
    assert evaluations_without_gain(evals, every=every, min_delta=min_delta) == count


def test_a_run_ends_when_the_loss_no_longer_falls(settings, losses):
    losses(5.0, 4.0, 4.5, 4.0, 4.2)
    run, recorder = build(settings(train={"steps": 50, "early_stopping": {"patience": 3}}))
    with run.packed():
        outcome = run.trainer.train()
    assert (outcome.reason, outcome.step) == ("early stop", 4)
    assert (outcome.best_step, outcome.best_eval) == (3, 4.0)
    assert recorder.of("end")[0].reason == "early stop"
    assert run.store.newest_intact(lambda *_: None).step == 4


@pytest.mark.parametrize("stop_at", [2, 3])
def test_the_count_survives_a_kill(settings, losses, tmp_path, stop_at):
    values = (5.0, 4.0, 4.5, 4.4, 4.2)
    made = settings(train={"steps": 50, "early_stopping": {"patience": 3}}, output={"save_every": 1})
    losses(*values)
    part, _ = build(made)
    original = part.trainer._run_step
    part.trainer._run_step = lambda data: (
        original(data) if part.trainer.step < stop_at else (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with part.packed(), pytest.raises(KeyboardInterrupt):
        part.trainer.train()
    losses(*values[stop_at + 1 :])
    rest, _ = build(made)
    rest.trainer.resume(rest.store.newest_intact(lambda path, reason: pytest.fail(reason)))
    with rest.packed():
        outcome = rest.trainer.train()
    assert (outcome.reason, outcome.step) == ("early stop", 4)


def test_a_run_that_stopped_early_stays_stopped_until_it_may_go_on(settings, losses):
    losses(5.0, 6.0)
    made = settings(train={"steps": 9, "early_stopping": {"patience": 2}})
    assert train(made).result.is_dir()
    for stopping, reason, step in (
        ({"patience": 2}, "early stop", 2),
        ({"patience": 4}, "early stop", 4),
        (None, "complete", 9),
    ):
        made["train"]["early_stopping"] = stopping
        run, _ = build(made)
        run.trainer.resume(run.store.newest_intact(lambda path, reason: pytest.fail(reason)))
        before = run.trainer.step
        with run.packed():
            outcome = run.trainer.train()
        assert (outcome.reason, outcome.step) == (reason, step)
        assert (outcome.tokens > 0) is (step > before)


def test_the_end_of_a_run_says_that_it_stopped_early(settings, losses):
    losses(5.0, 4.0, 6.0)
    out = io.StringIO()
    made = settings(train={"steps": 9, "early_stopping": {"patience": 2}}, output={"save_every": 1})
    result = execute(load_settings(made), Console(file=out, width=100), quiet=True)
    text = out.getvalue()
    assert "Stopped early after step 3: the held-out loss no longer fell." in text
    assert f"4.0000 at step 1: {result.best_checkpoint}" in text
    assert result.best_checkpoint == result.dir / "checkpoints" / "step-00000001"
    assert "step 1/9" not in text, "quiet"


def test_the_best_loss_without_a_checkpoint_and_before_training(settings, losses, tmp_path):
    for name, values, said in (
        ("a", (5.0, 4.0, 6.0), "4.0000 at step 1: no checkpoint was written there"),
        ("b", (5.0, 6.0), "5.0000 before training: the held-out loss never fell below that"),
    ):
        losses(*values)
        out = io.StringIO()
        made = settings(train={"steps": 3}, output={"dir": str(tmp_path / name)})
        result = execute(load_settings(made), Console(file=out, width=100))
        assert said in out.getvalue()
        assert result.best_checkpoint is None
        assert result.result_step == 3


# ---------------------------------------------------------------- output.result: best


def _parameters_after(settings: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
    """Trained parameters of the same run after that many of its steps."""
    run, _ = build(settings)
    original = run.trainer._run_step
    run.trainer._run_step = lambda data: (
        original(data) if run.trainer.step < step else (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with run.packed(), pytest.raises(KeyboardInterrupt):
        run.trainer.train()
    return run.backend.trained_parameters()


def _same(adapter: Path, parameters: dict[str, torch.Tensor]) -> bool:
    saved = load_file(adapter / "adapter_model.safetensors")
    named = {name.replace(".default", ""): p for name, p in parameters.items()}
    assert set(saved) == set(named)
    return all(torch.equal(saved[name], named[name]) for name in saved)


def test_the_best_weights_become_the_result(settings, losses, tmp_path):
    losses(5.0, 4.0, 3.0, 3.5, 3.6, 3.7, 3.8)
    made = settings(output={"result": "best", "keep": 1})
    out = io.StringIO()
    result = execute(load_settings(made), Console(file=out, width=100))
    assert (result.steps, result.result_step, result.best_step, result.best_eval) == (6, 2, 2, 3.0)
    assert "with the weights of step 2, the best that was kept" in out.getvalue()
    kept = sorted(path.name for path in (result.dir / "checkpoints").glob("step-*"))
    assert kept == ["step-00000002", "step-00000006"], "the run can go on from its last step"
    losses(5.0)
    other = made | {"output": made["output"] | {"dir": str(tmp_path / "other")}}
    assert _same(result.result, _parameters_after(other, 2))
    card = (result.result / "README.md").read_text()
    assert "| held-out loss after | 3.0000 |" in card
    assert "| optimizer steps | 2 |" in card


@pytest.mark.parametrize(
    ("optimizer", "scheduler"), [("adamw", "cosine"), ("schedule_free_adamw", "constant")]
)
def test_the_result_measures_what_the_best_checkpoint_measured(settings, monkeypatch, optimizer, scheduler):
    """Also where the optimizer answers with other weights than those it takes gradients at."""
    made = settings(train={"optimizer": optimizer, "scheduler": scheduler}, output={"result": "best"})
    run, _ = build(made)

    def measure(*arguments: Any, **options: Any) -> HeldOutLoss:
        return held_out_loss(*arguments, **options) if run.trainer.step <= 3 else HeldOutLoss(99.0, 1)

    monkeypatch.setattr("tunesmith.training.trainer.held_out_loss", measure)
    with run.packed():
        outcome = run.trainer.train()
        left = leave_result(run, run.trainer.run_dir, outcome, Console(quiet=True))
        with run.backend.for_measuring():
            again = held_out_loss(
                run.causal,
                run.data.corpus,
                run.data.held_out_N,
                max_tokens=run.trainer.grouping.max_tokens,
                autocast=run.backend.autocast(),
            )
    assert left.step == outcome.best_step == 3
    assert again.loss == outcome.best_eval


def test_without_it_the_last_weights_do(settings, losses, tmp_path):
    losses(5.0, 4.0, 3.0, 3.5)
    made = settings(output={"save_every": 1})
    result = train(made)
    assert result.result_step == 6
    other = made | {"output": made["output"] | {"dir": str(tmp_path / "other")}, "train": made["train"]}
    losses(5.0)
    whole, _ = build(other)
    with whole.packed():
        whole.trainer.train()
    assert _same(result.result, whole.backend.trained_parameters())


def test_the_best_is_found_again_by_a_run_that_goes_on(settings, losses, tmp_path):
    """The best weights lie before the kill; the last checkpoint is where training goes on."""
    losses(5.0, 3.0, 3.5, 3.6)
    made = settings(train={"steps": 3, "scheduler": "constant"}, output={"result": "best"})
    assert train(made).result_step == 1
    made["train"]["steps"] = 6
    losses(3.7, 3.8, 3.9)
    result = train(made)
    assert (result.steps, result.result_step, result.best_eval) == (6, 1, 3.0)
    other = made | {"output": made["output"] | {"dir": str(tmp_path / "other")}}
    losses(5.0)
    assert _same(result.result, _parameters_after(other, 1))
    run, _ = build(made)
    run.trainer.resume(run.store.newest_intact(lambda path, reason: pytest.fail(reason)))
    assert run.trainer.step == 6
    whole, _ = build(other | {"output": other["output"] | {"dir": str(tmp_path / "whole")}})
    with whole.packed():
        whole.trainer.train()
    resumed = run.backend.trained_parameters()
    assert all(torch.equal(p, resumed[name]) for name, p in whole.backend.trained_parameters().items())


def test_a_damaged_best_checkpoint_is_said_and_the_last_weights_saved(settings, losses):
    losses(5.0, 3.0, 3.5)
    made = settings(train={"steps": 2}, output={"result": "best"})
    first = train(made)
    assert first.result_step == 1
    shutil.rmtree(first.result)
    (first.best_checkpoint / "state.json").write_text("{}")
    out = io.StringIO()
    again = execute(load_settings(made), Console(file=out, width=100), quiet=True)
    assert again.result_step == 2
    assert "is damaged (state.json has 2 bytes" in out.getvalue()
    assert again.result.is_dir()


# ---------------------------------------------------------------- what they need


@pytest.mark.parametrize(
    "wish", [{"train": {"early_stopping": {"patience": 2}}}, {"output": {"result": "best"}}]
)
def test_both_need_a_held_out_loss(settings, wish):
    for changes in (
        {"data": {"eval": {"fraction": 0.0}}},
        {"data": {"eval": []}},
        {"output": {"eval_every": None}},
    ):
        made = settings()
        for section, values in (*wish.items(), *changes.items()):
            made[section] = made[section] | values
        with pytest.raises(ConfigError, match="no held-out loss is measured") as found:
            load_settings(made)
        assert "set output.eval_every, and data.eval" in str(found.value)


def test_one_row_cannot_be_held_out(settings, tmp_path):
    made = settings(train={"early_stopping": {"patience": 2}})
    rows = Path(made["data"]["train"][0]["path"])
    rows.write_text(rows.read_text().splitlines()[0] + "\n")
    with pytest.raises(
        UserError, match=r"train\.early_stopping needs a held-out loss, and no row of this data"
    ):
        build(made)
