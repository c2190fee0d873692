"""A whole step on a GPU that only counts, against the timeline: layers under policies of their own, head and all."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from tests.planning.test_layer_bytes import model_of
from tests.support.fake_gpu import FakeOffloader, fake_gpu, in_4_bits, materialise
from tunesmith.models.attention import packed_attention
from tunesmith.models.head import CausalModel
from tunesmith.models.install import install
from tunesmith.models.probe import probe_batch
from tunesmith.objectives.sft import SFT
from tunesmith.planning.bytes import LIBRARIES, fixed_bytes, peak_bytes
from tunesmith.planning.facts import Work
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


def stepped(family: str, quantize: str, rank: int, policies: list[str]) -> tuple[int, int]:
    """Peak of a step's forward and backward, and what stood before it."""
    model, _ = model_of(family, rank, num_hidden_layers=LAYERS, vocab_size=16384)
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
        live.peak = before = live.now
        with packed_attention(loss.causal.base, "sdpa"), torch.autocast("cpu", torch.bfloat16):
            value = loss(batch, float(batch.supervised))
        value.backward()
        assert not installed.fallbacks
        return live.peak, before


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(("family", "quantize", "rank"), [("llama", "nf4", 16), ("gemma2", "none", 16)])
def test_the_peak_of_a_step(family: str, quantize: str, rank: int, mixture: str) -> None:
    policies = MIXTURES[mixture]
    peak, before = stepped(family, quantize, rank, policies)
    _, config = model_of(family, rank, num_hidden_layers=LAYERS, vocab_size=16384)
    model = read_facts(config.to_dict(), family)
    work = Work(DOCUMENTS, sum(DOCUMENTS) - 1, quantize=quantize, rank=rank)
    fixed = fixed_bytes(model, work)
    # what stands before: weights and adapters, and a few numbers of the batch
    assert fixed.weights + fixed.adapter == pytest.approx(before, rel=0.01)
    foreseen = peak_bytes(model, work, policies, accumulates=False) - LIBRARIES - fixed.optimizer
    assert foreseen == pytest.approx(peak, rel=0.02)
