"""A whole step on a GPU that only counts, against the timeline: layers under policies of their own, head and all."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch

from tests.planning.test_layer_bytes import model_of
from tests.support.fake_gpu import BLOCK, FakeOffloader, fake_gpu, in_4_bits, materialise
from tunesmith.models import decoder
from tunesmith.models.attention import packed_attention
from tunesmith.models.head import CausalModel
from tunesmith.models.install import install
from tunesmith.models.probe import probe_batch
from tunesmith.objectives.sft import SFT
from tunesmith.planning.bytes import LIBRARIES, fixed_bytes, head_rows, peak_bytes, timeline
from tunesmith.planning.facts import ModelFacts, Work
from tunesmith.planning.read_facts import read_facts
from tunesmith.training.step import ObjectiveLoss

LAYERS = 6
DOCUMENTS = (2000, 2000)

MIXTURES = {
    "keep": ["keep"] * LAYERS,
    "recompute": ["recompute"] * LAYERS,
    "offload": ["offload"] * LAYERS,
    "recompute first, then keep": ["recompute"] * 3 + ["keep"] * 3,
    "offload first": ["offload_attention"] * 2 + ["recompute_gate_up"] * 2 + ["keep_all"] * 2,
    "all sorts": ["offload", "recompute", "recompute_projections", "recompute_gate_up", "keep", "keep_all"],
}


MOVING = {
    "offload first, then keep": ["offload_attention"] * 4 + ["keep"] * 4,
    "three kinds": ["keep_offload_attention"] * 2 + ["recompute"] * 3 + ["keep"] * 3,
    "two that move": ["offload"] * 3 + ["keep_offload_attention"] * 2 + ["recompute_gate_up"] * 3,
    "one layer behind": ["offload_attention"] * 7 + ["keep"],
    "here and there": ["offload", "keep", "keep", "offload_attention", "recompute", "offload", "keep_all"],
    "not the first": ["keep", "offload_attention", "keep", "keep", "keep"],
    "nothing": ["keep"] * 4 + ["recompute"] * 4,
    "everything": ["offload"] * 8,
}


@dataclass
class Step:
    """A step on the fake GPU, in bytes above what stood before it.

    Attributes:
        before: weights and adapters.
        peak: the most of forward and backward.
        layers: the most while each layer ran, by the labels of `timeline`.
    """

    before: int
    peak: int = 0
    layers: dict[str, int] = field(default_factory=dict)


VOCABULARY = 16_384
MANY = 131_072
"""Of this vocabulary a chunk of logits is a quarter of the rows."""


def stepped(family: str, quantize: str, rank: int, policies: list[str], vocabulary: int = VOCABULARY) -> Step:
    """Forward and backward of a step."""
    model, _ = model_of(family, rank, num_hidden_layers=len(policies), vocab_size=vocabulary)
    with fake_gpu() as live:
        materialise(model)
        if quantize == "nf4":
            in_4_bits(model)
        installed = install(model)
        installed.offloader = FakeOffloader()
        installed.set_policies(policies)
        model.train()
        loss: Any = ObjectiveLoss(CausalModel(model, torch.bfloat16), SFT)
        batch = probe_batch(DOCUMENTS)
        gc.collect()
        live.peak = live.now
        step = Step(live.now)

        def watched(run: Callable[..., Any], numbers: Iterator[int], name: str) -> Callable[..., Any]:
            def layer(*operands: Any) -> Any:
                step.peak, live.peak = max(step.peak, live.peak), live.now
                result = run(*operands)
                step.layers[f"{name} {next(numbers)}"] = live.peak - step.before
                return result

            return layer

        forward = watched(decoder.layer_forward, iter(range(len(policies))), "forward")
        backward = watched(decoder.layer_backward, iter(range(len(policies))[::-1]), "backward")
        with (
            mock.patch.object(decoder, "layer_forward", forward),
            mock.patch.object(decoder, "layer_backward", backward),
        ):
            with packed_attention(loss.causal.base, "sdpa"), torch.autocast("cpu", torch.bfloat16):
                value = loss(batch, float(batch.supervised))
            value.backward()
        assert not installed.fallbacks
        step.peak = max(step.peak, live.peak) - step.before
        return step


def counted(
    family: str, quantize: str, rank: int, layers: int, vocabulary: int = VOCABULARY
) -> tuple[ModelFacts, Work]:
    """What the timeline is asked for the same step."""
    _, config = model_of(family, rank, num_hidden_layers=layers, vocab_size=vocabulary)
    work = Work(DOCUMENTS, sum(DOCUMENTS) - 1, quantize=quantize, rank=rank)
    return read_facts(config.to_dict(), family), work


MODELS = [("llama", "nf4", 16), ("gemma2", "none", 16)]


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(("family", "quantize", "rank"), MODELS)
def test_the_peak_of_a_step(family: str, quantize: str, rank: int, mixture: str) -> None:
    policies = MIXTURES[mixture]
    step = stepped(family, quantize, rank, policies)
    model, work = counted(family, quantize, rank, LAYERS)
    fixed = fixed_bytes(model, work)
    # what stands before: weights and adapters, and a few numbers of the batch
    assert fixed.weights + fixed.adapter == pytest.approx(step.before, rel=0.01)
    foreseen = peak_bytes(model, work, policies, accumulates=False) - LIBRARIES - fixed.optimizer
    assert foreseen == pytest.approx(step.peak + step.before, rel=0.02)


@pytest.mark.parametrize(("family", "quantize", "rank"), MODELS)
def test_the_head_holds_one_chunk_of_logits(family: str, quantize: str, rank: int) -> None:
    """At its moment, which is the largest here; two of 250 MiB were alive once, the old one until the new one was."""
    step = stepped(family, quantize, rank, ["keep"] * 2, MANY)
    model, work = counted(family, quantize, rank, 2, MANY)
    assert head_rows(model, work) * 3 < work.supervised
    largest = max(timeline(model, work, ["keep"] * 2), key=lambda moment: moment.bytes)
    assert largest.label == "head"
    assert step.peak == pytest.approx(largest.bytes, rel=0.001)


@pytest.mark.parametrize("mixture", MOVING)
@pytest.mark.parametrize(("family", "quantize", "rank"), MODELS)
def test_what_is_there_while_each_layer_runs(family: str, quantize: str, rank: int, mixture: str) -> None:
    """Byte for byte, whatever moves to the host before it and comes back behind it."""
    policies = MOVING[mixture]
    step = stepped(family, quantize, rank, policies)
    model, work = counted(family, quantize, rank, len(policies))
    moments = {moment.label: moment.bytes for moment in timeline(model, work, policies)}
    batch, loss = 7 * 8 * work.tokens, 2 * BLOCK  # one stood there before, the other nobody counts
    assert step.layers == {
        label: moments[label] - batch + loss * label.startswith("backward") for label in step.layers
    }
    assert len(step.layers) == 2 * len(policies)
