"""The loop: steps, epochs, limits, evaluation, guards, float16, signals."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.support.runs import build, run_settings, train
from tunesmith.contracts.errors import NonFiniteError, UserError
from tunesmith.training.metrics import read_events


@pytest.fixture
def settings(tiny_model_dir: Path, tmp_path: Path):
    def make(**sections):
        return run_settings(tiny_model_dir, tmp_path, **sections)

    return make


def _run(settings: dict):
    run, recorder = build(settings)
    with run.packed():
        outcome = run.trainer.train()
    return run, recorder, outcome


def test_training_lowers_the_held_out_loss_and_says_so(settings):
    _, events, outcome = _run(settings(adapter={"kind": "none"}, train={"steps": 40, "learning_rate": 1e-2}))
    assert outcome.reason == "complete"
    assert outcome.last_eval < 0.75 * outcome.first_eval
    assert [event.step for event in events.of("step")] == list(range(1, 41))
    assert events.of("end")[0].reason == "complete"
    step = events.of("step")[0]
    assert step.supervised_tokens < step.tokens
    assert step.grad_norm > 0
    assert step.memory_gib > 0


def test_every_document_trains_once_per_epoch(settings):
    run, _ = build(settings(train={"steps": None, "epochs": 2.0}))
    seen: list[int] = []
    run.trainer._run_step = lambda data: (
        seen.extend(d for row in data.rows for d in row),
        setattr(run.trainer, "step", run.trainer.step + 1),
    )
    run.trainer._evaluate = lambda: None
    run.trainer.train()
    assert sorted(seen) == sorted([*run.data.train_N.tolist()] * 2)
    assert seen[: len(seen) // 2] != seen[len(seen) // 2 :], "epochs have orders of their own"


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 9), (2.0, 18), (0.5, 5), (1.5, 14), (0.01, 1)])
def test_epochs_become_steps(settings, epochs, steps):
    run, _ = build(settings(train={"packing": False}))
    assert len(run.data.train_N) == 36
    assert run.data.feed.count_steps(epochs) == steps


def test_global_batch_in_tokens(settings):
    _, events, _ = _run(settings(train={"global_batch": "150 tokens", "packing": False, "steps": 5}))
    for step in events.of("step"):
        assert 150 <= step.tokens < 150 + 128


def test_time_limit_saves_and_ends(settings):
    run, _, outcome = _run(settings(train={"max_hours": 1e-9, "steps": 50}))
    assert (outcome.reason, outcome.step) == ("time", 1)
    assert run.store.newest_intact(lambda *_: None).step == 1


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_stops_names_the_rows_and_applies_nothing(settings, where):
    run, _ = build(settings())
    _poison(run, where, at_step=2)
    before: dict[str, torch.Tensor] = {}
    original = run.trainer._run_step

    def remember(rows):
        before.update({n: p.clone() for n, p in run.backend.trained_parameters().items()})
        original(rows)

    run.trainer._run_step = remember
    with run.packed(), pytest.raises(NonFiniteError, match=f"The {where} of step 3 is not finite"):
        run.trainer.train()
    for name, parameter in run.backend.trained_parameters().items():
        assert torch.equal(parameter, before[name])
    report = json.loads((run.trainer.run_dir / "faults" / "step-00000003.json").read_text())
    assert report["not_finite"] == where
    rows = [row for batch in report["micro_batches"] for row in batch["rows"]]
    assert rows
    assert all("rows.jsonl:" in row for row in rows)


def test_non_finite_step_is_skipped_where_asked(settings):
    run, events = build(settings(train={"on_non_finite": "skip"}))
    _poison(run, "loss", at_step=2)
    with run.packed():
        outcome = run.trainer.train()
    assert outcome.reason == "complete"
    assert [event.applied for event in events.of("step")] == [True, True, False, True, True, True]
    assert "step 3 is not finite" in events.of("warning")[0].message
    assert math.isfinite(outcome.last_eval)


def _poison(run, where: str, at_step: int) -> None:
    """Make the loss, or the gradient of one parameter, NaN in one step."""
    loss = run.trainer.loss
    parameter = next(p for p in run.causal.model.parameters() if p.requires_grad)
    if where == "gradient":
        parameter.register_hook(lambda g: g * math.nan if run.trainer.step == at_step else g)
        return

    class Poisoned(type(loss)):
        def __call__(self, batch, total):
            value = super().__call__(batch, total)
            return value * math.nan if run.trainer.step == at_step else value

    run.trainer.loss = Poisoned(loss.causal, loss.objective)


def test_float16_overflow_is_no_fault(settings):
    """The loss scale starts far too high: steps are skipped while it falls, and the run goes on."""
    run, events = build(settings(model={"dtype": "float16"}, train={"steps": 12}))
    run.backend.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    with run.packed():
        outcome = run.trainer.train()
    applied = [event.applied for event in events.of("step")]
    assert outcome.reason == "complete"
    assert not applied[0]
    assert applied[-1]
    assert not (run.trainer.run_dir / "faults").exists()
    scales = [event.loss_scale for event in events.of("step")]
    assert scales[0] == 2.0**30
    assert scales[-1] < scales[0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_trains_float32_adapters_close_to_float32(settings, tmp_path, dtype):
    _, exact, _ = _run(settings(train={"packing": False}))
    half = settings(model={"dtype": dtype}, train={"packing": False}, output={"dir": str(tmp_path / "half")})
    run, rounded, _ = _run(half)
    assert {p.dtype for p in run.backend.trained_parameters().values()} == {torch.float32}
    for a, b in zip(exact.of("step"), rounded.of("step"), strict=True):
        assert b.loss == pytest.approx(a.loss, rel=2e-2)


def test_full_fine_tuning_with_frozen_parts(settings):
    run, _, _ = _run(
        settings(adapter={"kind": "none"}, model={"freeze": ["model.embed_tokens.*", "model.layers.0.*"]})
    )
    trained = run.backend.trained_parameters()
    assert trained
    assert all("layers.1." in name or name == "model.norm.weight" for name in trained)


def test_qlora_trains_on_cpu(settings, wide_model_dir):
    import bitsandbytes

    run, events, _ = _run(settings(model={"name": str(wide_model_dir), "quantize": "nf4"}))
    quantised = [m for m in run.causal.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(quantised) == 14
    assert all(m.weight.dtype == torch.uint8 for m in quantised)
    losses = [event.loss for event in events.of("step")]
    assert losses[-1] < losses[0]


def test_continuing_from_an_adapter_starts_where_it_ended(settings, tmp_path):
    first = train(settings())
    again, _ = build(settings(adapter={"path": str(first.result)}, output={"dir": str(tmp_path / "second")}))
    with again.packed():
        again.trainer._evaluate()
    assert again.trainer.evals[0] == pytest.approx(first.last_eval, rel=1e-6)


def test_second_run_on_a_finished_directory_trains_nothing_more(settings):
    first = train(settings())
    second = train(settings())
    assert second.steps == first.steps
    assert second.tokens == 0
    assert second.last_eval == first.last_eval


def test_more_steps_go_on_and_events_stay_in_order(settings):
    train(settings())
    result = train(settings(train={"steps": 9}))
    steps = [e["step"] for e in read_events(result.dir / "events.jsonl") if e["event"] == "step"]
    assert steps == list(range(1, 10))


def test_changed_data_order_is_refused_on_resume(settings):
    train(settings())
    with pytest.raises(UserError, match=r"train\.seed was 42, is 7"):
        train(settings(train={"seed": 7, "steps": 20}))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_and_saves(settings, number):
    run, events = build(settings(train={"steps": 50}))
    original = run.trainer._run_step

    def kill_in_step_three(rows):
        if run.trainer.step == 2:
            os.kill(os.getpid(), number)
        original(rows)

    run.trainer._run_step = kill_in_step_three
    with run.packed():
        outcome = run.trainer.train()
    assert (outcome.reason, outcome.step) == ("interrupted", 3)
    assert run.store.newest_intact(lambda *_: None).step == 3
    assert events.of("end")[0].reason == "interrupted"


def test_weights_of_sources_repeat_and_thin(settings, tmp_path):
    extra = tmp_path / "extra.txt"
    extra.write_text("".join(f"line number {i} of the text\n" for i in range(20)))
    made = settings(train={"packing": False, "steps": None})
    made["data"]["train"] = [made["data"]["train"][0] | {"weight": 2.0}, {"path": str(extra), "weight": 0.5}]
    made["data"]["eval"] = {"fraction": 0.0}
    run, _ = build(made)
    drawn = run.data.corpus.draw(run.data.train_N, seed=1, epoch=0).tolist()
    assert sum(d < 40 for d in drawn) == 80
    assert sum(d >= 40 for d in drawn) == 10
