"""The loop: steps, epochs, limits, evaluation, guards, float16, signals."""

from __future__ import annotations

import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from tests.support.runs import build, train
from tunesmith.config.load import load_settings
from tunesmith.contracts.errors import ConfigError, NonFiniteError, UserError
from tunesmith.data.feed import Position
from tunesmith.settings.quantities import seconds_of
from tunesmith.training.metrics import read_events
from tunesmith.training.step import train_step


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
    underway = [(event.step, event.what) for event in events.of("underway")]
    assert set(underway) == {(0, "held-out loss"), (40, "held-out loss")}
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


# ---------------------------------------------------------------- length in tokens, checkpoints by time


@pytest.mark.parametrize(
    "train",
    [
        {"packing": False},  # epochs alike: whole passes are counted at once
        {"packing": True},
        {"packing": False, "global_batch": "150 tokens"},  # every pass is planned
    ],
)
@pytest.mark.parametrize("part", [0.0, 0.3, 1.0, 2.0, 2.6])
def test_steps_until_so_many_tokens_have_trained(settings, train, part):
    """Against the steps themselves: the one before the last has not reached the number, the last has."""
    run, _ = build(settings(train=train))
    feed = run.data.feed
    epoch = int(run.data.corpus.lengths[run.data.train_N].sum())
    for wanted in {max(1, int(part * epoch) + shift) for shift in (-1, 0, 1)}:
        count = feed.count_steps_of_tokens(wanted)
        taken = 0
        for number, step in enumerate(feed.steps(Position()), start=1):
            before, taken = (
                taken,
                taken + int(run.data.corpus.lengths[[d for row in step.rows for d in row]].sum()),
            )
            if number == count:
                break
        assert before < wanted <= taken


def test_a_run_as_long_as_a_number_of_tokens(settings, tmp_path):
    """It ends with the step that reaches the number, its schedule ends there, and a part of it goes on."""
    made = settings(train={"steps": "1_500 tokens", "scheduler": "linear", "packing": False})
    _, events, outcome = _run(made)
    steps = events.of("step")
    total = sum(step.tokens for step in steps)
    assert total >= 1500 > total - steps[-1].tokens
    assert outcome.all_tokens == total
    assert events.of("start")[0].total_steps == len(steps)
    assert steps[-1].learning_rate == pytest.approx(5.0e-3 / len(steps), rel=1e-6)
    short = train(
        made
        | {
            "output": made["output"] | {"dir": str(tmp_path / "b")},
            "train": made["train"] | {"steps": "700 tokens"},
        }
    )
    assert short.steps < len(steps)
    longer = train(made | {"output": made["output"] | {"dir": str(tmp_path / "b")}})
    assert longer.steps == len(steps)
    assert longer.tokens + short.tokens == total


def test_a_stream_cannot_count_tokens_ahead(settings):
    made = settings(data={"streaming": True, "eval": {"fraction": 0.0}}, train={"steps": "1_000 tokens"})
    with pytest.raises(ConfigError, match=r"train\.steps counts tokens, and data\.streaming is on"):
        build(made)


def test_checkpoints_by_time(settings, monkeypatch):
    """Steps of 40 s, a checkpoint after a minute without one: after every second step, and at the end."""
    now = [1000.0]
    monkeypatch.setattr("tunesmith.training.trainer.time", SimpleNamespace(monotonic=lambda: now[0]))
    run, events = build(settings(train={"steps": 5}, output={"save_every": "1 minute"}))

    def slow(*arguments):
        now[0] += 40.0
        return train_step(*arguments)

    monkeypatch.setattr("tunesmith.training.trainer.train_step", slow)
    with run.packed():
        run.trainer.train()
    assert [event.step for event in events.of("checkpoint")] == [2, 4, 5]


def test_the_last_checkpoint_knows_its_held_out_loss_also_where_it_was_due(settings):
    run, events, outcome = _run(settings(train={"steps": 4}, output={"save_every": 2, "eval_every": 3}))
    assert [event.step for event in events.of("checkpoint")] == [2, 4]
    assert run.store.all()[-1].metric == outcome.last_eval


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30 minutes", 1800.0),
        ("1 hour", 3600.0),
        (" 1.5 hours ", 5400.0),
        ("90 seconds", 90.0),
        (200, None),
        (None, None),
    ],
)
def test_times_in_a_run_file(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["0 minutes", "3 weeks", "-1 hours", "minutes", "1_000", "1 hour 30 minutes"]
)
def test_other_times_are_refused(settings, text):
    with pytest.raises(ConfigError, match="a time such as '30 minutes' or '2 hours'"):
        load_settings(settings(output={"save_every": text}))
