"""The gradient noise scale and the norms of layers: right in expectation, equal to torch's, and without a trace."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from tests.distributed.test_graphs import FunctionRecorder
from tests.support.documents import random_corpus
from tests.support.runs import build, train
from tests.support.tiny import tiny_llama
from tunesmith.config.load import load_settings
from tunesmith.contracts.errors import UserError
from tunesmith.contracts.events import Measured
from tunesmith.data.batches import collate
from tunesmith.distributed import graphs
from tunesmith.distributed.backend import Gradients
from tunesmith.distributed.gradient_norms import added_square, changed_square
from tunesmith.distributed.single import SingleDevice
from tunesmith.models.attention import packed_attention
from tunesmith.models.head import CausalModel
from tunesmith.objectives.table import OBJECTIVES
from tunesmith.training.console import ConsoleView
from tunesmith.training.metrics import read_events
from tunesmith.training.noise_scale import (
    Gauges,
    Squares,
    Wanted,
    describe,
    estimate,
    layer_norms,
    layer_of,
    squares_of,
)
from tunesmith.training.step import ObjectiveLoss

# ---------------------------------------------------------------- the estimator


@pytest.mark.parametrize("counts", [(8, 8), (5, 20, 1, 14), (1, 63)], ids=str)
def test_the_estimates_are_right_for_a_linear_problem_with_known_noise(counts: tuple[int, ...]) -> None:
    """Gradients of w·x are x: x_t = G + Σ^½ z_t. Both means of 4,000 steps are within 5 of their standard errors."""
    rng = np.random.default_rng(0)
    true_G, deviation_D = np.array([0.3, -0.2, 0.1, 0.4]), np.array([1.0, 2.0, 0.5, 0.1])
    total, found = sum(counts), []
    for _ in range(4000):
        x_TD = true_G + deviation_D * rng.standard_normal((total, 4))
        added = [part.sum(0) / total for part in np.split(x_TD, np.cumsum(counts)[:-1])]
        parts = [float(part @ part) for part in added]
        one = estimate(parts, counts, float(sum(added) @ sum(added)))
        assert one is not None
        found.append(one)
    for values, truth in (
        ([each.gradient for each in found], float(true_G @ true_G)),
        ([each.noise for each in found], float(deviation_D @ deviation_D)),
    ):
        error = np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values) - truth) < 5 * error
        assert error < 0.2 * truth, "the test would see an estimate that is off by its own size"


def test_the_estimates_by_hand() -> None:
    """Two halves of one token with gradients (3, 0) and (1, 0): means 9/4 + 1/4 and 4; q = 1/2."""
    found = estimate([9 / 4, 1 / 4], [1, 1], 4.0)
    assert found == (pytest.approx(3.0), pytest.approx(2.0))  # 3 · 1, and the variance (3 - 1)² / 2


@pytest.mark.parametrize("counts", [(7,), (7, 0)])
def test_one_micro_batch_says_nothing(counts: tuple[int, ...]) -> None:
    assert estimate([1.0] * len(counts), counts, 1.0) is None


def test_averages_come_before_the_ratio() -> None:
    gauges = Gauges(noise_every=1)
    steps = [([9 / 4, 1 / 4], 4.0), ([1 / 4, 1 / 4], 1.0)]  # (3, 2) as above; (1, 0)
    for number, (parts, whole) in enumerate(steps, start=1):
        (event,) = gauges.events(number, Wanted(noise=True), Squares(tuple(parts), {"w": whole}), [1, 1])
        assert isinstance(event, Measured)
    expected = 0.95 * 2.0 / (0.95 * 3.0 + 1.0)
    assert event.values["noise_scale"] == pytest.approx(expected)
    assert event.values["noise_scale_in_batches"] == pytest.approx(expected / 2)
    assert (event.values["gradient_square"], event.values["gradient_noise"]) == pytest.approx((1.0, 0.0))


def test_noise_that_hides_the_gradient_has_no_scale() -> None:
    (event,) = Gauges(noise_every=1).events(1, Wanted(noise=True), Squares((1.0, 1.0), {"w": 0.5}), [1, 1])
    assert isinstance(event, Measured)
    assert "noise_scale" not in event.values
    assert "not known yet" in describe(event.values)


def test_gradients_that_are_not_finite_are_not_reported() -> None:
    for bad in (math.nan, math.inf):
        assert not list(Gauges().events(1, Wanted(True, True), Squares((1.0, bad), {"w": bad}), [1, 1]))


# ---------------------------------------------------------------- on a model

LENGTHS = [9, 30, 5, 17, 12, 21]
GROUPS = [[0, 1], [2], [3, 4, 5]]


def step_of(measure: bool, *, scaler: float | None = None, **changes: Any) -> tuple[Any, Any, Any]:
    """Backend, gradients and parameters' gradients after the micro-batches `GROUPS`."""
    corpus, model = random_corpus(LENGTHS), tiny_llama(**changes).train()
    causal = CausalModel(model, torch.float32)
    backend = SingleDevice(
        model, torch.optim.SGD(model.parameters(), lr=0.5), torch.device("cpu"), torch.float32
    )
    if scaler is not None:
        backend.scaler = torch.amp.GradScaler("cpu", init_scale=scaler)
    loss = ObjectiveLoss(causal, OBJECTIVES["sft"])
    with packed_attention(model, "sdpa"):
        gradients = backend.forward_backward([collate(corpus, g) for g in GROUPS], loss, squares=measure)
    return backend, gradients, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def each_alone() -> list[float]:
    """Squared norms of the micro-batches' gradients, each from a backward pass of its own."""
    corpus, model = random_corpus(LENGTHS), tiny_llama().train()
    causal, found = CausalModel(model, torch.float32), []
    loss = ObjectiveLoss(causal, OBJECTIVES["sft"])
    batches = [collate(corpus, group) for group in GROUPS]
    total = sum(map(loss.count, batches))
    with packed_attention(model, "sdpa"):
        for batch in batches:
            model.zero_grad()
            loss(batch, total).backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            found.append(float(sum(g.double().square().sum() for g in grads)))
    return found


def test_what_each_micro_batch_adds_is_its_own_gradient_with_tied_embeddings_counted_once() -> None:
    _, gradients, _ = step_of(True)
    assert gradients.squares.tolist() == pytest.approx(each_alone(), rel=1e-5)


def test_a_loss_scale_is_taken_out() -> None:
    backend, gradients, _ = step_of(True, scaler=1024.0)
    assert gradients.squares.tolist() == pytest.approx(each_alone(), rel=1e-5)
    plain = squares_of(*step_of(True)[:2]).read()
    assert squares_of(backend, gradients).read().whole == pytest.approx(plain.whole, rel=1e-5)


def test_a_copy_of_the_sum_gives_the_same() -> None:
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))]
    seen: dict[Any, list[torch.Tensor]] = {added_square: [], changed_square: []}
    for measured, squares in seen.items():
        for weight in weights:
            weight.grad = None
        for factor in (1.0, 2.0):
            with measured(weights, squares):
                (factor * weights[0].sum() + factor * weights[1].sum() * 3).backward()
    for squares in seen.values():
        assert [float(square) for square in squares] == pytest.approx([21.0, 84.0])  # f² · (3 · 1 + 2 · 9)
    assert not any(weight._backward_hooks for weight in weights)


def test_recorded_micro_batches_are_measured_as_well_and_add_the_same(monkeypatch) -> None:
    """Three micro-batches that are alike: each adds a third of the gradient."""
    monkeypatch.setattr(graphs, "CudaRecorder", FunctionRecorder)

    def second_step(measure: bool) -> tuple[Any, list[torch.Tensor]]:
        corpus, model = random_corpus(LENGTHS), tiny_llama().train()
        optimizer, cpu = torch.optim.SGD(model.parameters(), lr=0.5), torch.device("cpu")
        backend = SingleDevice(model, optimizer, cpu, torch.float32, graphs=True)
        loss = ObjectiveLoss(CausalModel(model, torch.float32), OBJECTIVES["sft"])
        with packed_attention(model, "sdpa"):
            for _ in range(2):
                backend._zero_grad()
                gradients = backend.forward_backward([collate(corpus, [0, 1])] * 3, loss, squares=measure)
        assert backend._graphs[1].recorded == 1
        return gradients.squares, [p.grad for p in model.parameters() if p.grad is not None]

    squares, measured = second_step(True)
    none, plain = second_step(False)
    assert none is None
    whole = float(nn.utils.get_total_norm(plain)) ** 2
    assert squares.tolist() == pytest.approx([whole / 9] * 3, rel=1e-4)
    assert all(map(torch.equal, measured, plain))


def test_norms_of_layers_equal_torchs_and_make_up_the_norm_of_the_step() -> None:
    backend, gradients, by_name = step_of(False)
    squares = squares_of(backend, gradients).read()
    norms = layer_norms(squares.by_name)
    assert list(norms) == ["embed_tokens", "layers.0", "layers.1", "norm"]
    for layer, norm in norms.items():
        own = [g for name, g in by_name.items() if f".{layer}." in f".{name}"]
        assert norm == pytest.approx(float(nn.utils.get_total_norm(own)), rel=1e-6)
    assert math.sqrt(squares.whole) == pytest.approx(float(nn.utils.get_total_norm(list(by_name.values()))))


@pytest.mark.parametrize("noise", [False, True])
def test_nothing_is_read_from_the_device_before_the_update(noise: bool) -> None:
    """Meta tensors have no values: whoever reads one gets an error."""

    class Backend:
        def gradient_squares(self) -> dict[str, torch.Tensor]:
            return {name: torch.empty((), dtype=torch.float64, device="meta") for name in ("a", "b")}

    parts = torch.empty(3, dtype=torch.float64, device="meta") if noise else None
    unread = squares_of(Backend(), Gradients((), 1.0, parts))
    assert unread.names == ("a", "b")
    assert unread.values.shape == (5 if noise else 2,)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "layers.11"),
        ("base_model.model.model.layers.3.mlp.experts.7.up_proj.lora_A.default.weight", "layers.3"),
        ("transformer.h.0.attn.c_attn.bias", "h.0"),
        ("base_model.model.model.embed_tokens.modules_to_save.default.weight", "embed_tokens"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default", "embed_tokens"),
        ("base_model.model.lm_head.lora_embedding_A.default", "lm_head"),
        ("lm_head.bias", "lm_head"),
        ("model.norm.weight", "norm"),
    ],
)
def test_names_of_layers(name: str, layer: str) -> None:
    assert layer_of(name) == layer


# ---------------------------------------------------------------- in a run


def test_training_is_the_same_bit_for_bit(settings, tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> tuple[Any, Any]:
        made = settings(
            adapter={"dropout": 0.1},
            train={"steps": 5, "micro_batch": 1, **options},
            output={"dir": str(tmp_path / name)},
        )
        run, events = build(made)
        with run.packed():
            run.trainer.train()
        return run.backend.trained_parameters(), events

    plain, quiet = run("plain")
    watched, events = run("watched", noise_scale=True, layer_grad_norms=2)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert [e.loss for e in events.of("step")] == [e.loss for e in quiet.of("step")]
    assert not quiet.of("measure")
    measured = {event.step: event.values for event in events.of("measure")}
    assert list(measured) == [1, 2, 3, 4, 5]
    assert "gradient_noise" in measured[1]
    assert [step for step, values in measured.items() if "grad_norm/layers.0" in values] == [2, 4]
    for step in events.of("step"):
        if step.step in (2, 4):
            norms = [v for name, v in measured[step.step].items() if name.startswith("grad_norm/")]
            assert math.hypot(*norms) == pytest.approx(step.grad_norm, rel=1e-5)


def test_values_are_in_the_log_and_in_one_line_of_the_console(settings) -> None:
    result = train(settings(train={"steps": 4, "micro_batch": 2, "noise_scale": 2}))
    logged = [event for event in read_events(result.dir / "events.jsonl") if event["event"] == "measure"]
    assert [event["step"] for event in logged] == [2, 4]
    console = Console(record=True, width=200, quiet=False, file=(result.dir / "shown").open("w"))
    values = {"noise_scale": 1234.6, "noise_scale_in_batches": 0.5, "grad_norm/a": 2.0, "grad_norm/b": 0.125}
    ConsoleView(console).on_event(Measured(step=7, values=values))
    shown = console.export_text().strip()
    assert shown == (
        "step 7: noise scale 1,235 supervised tokens, 0.5 × this batch · gradient norms from 0.125 (b) to 2 (a)"
    )


def test_one_micro_batch_is_said_once(settings) -> None:
    run, events = build(settings(train={"steps": 3, "noise_scale": True}))
    with run.packed():
        run.trainer.train()
    assert not events.of("measure")
    assert ["one micro-batch" in event.message for event in events.of("warning")] == [True]


def test_a_micro_batch_that_is_the_batch_is_refused() -> None:
    made = {"model": {"name": "x"}, "data": {"train": [{"path": "a"}]}}
    with pytest.raises(UserError, match=r"half of train\.global_batch"):
        load_settings(made | {"train": {"noise_scale": True, "micro_batch": 4, "global_batch": 4}})
    load_settings(made | {"train": {"noise_scale": 10, "micro_batch": 2, "global_batch": 4}})
    load_settings(made | {"train": {"micro_batch": 4, "global_batch": 4}})
