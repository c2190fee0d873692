"""Peaks that were measured on GPUs against those foreseen, and what holds for all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from benchmarks.shapes import SHAPES
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.planning.bytes import (
    LIBRARIES,
    fixed_bytes,
    head_rows,
    host_bytes,
    matrix_bytes,
    on_device,
    peak_bytes,
    timeline,
)
from tunesmith.planning.facts import ModelFacts, Work
from tunesmith.planning.policies import HELD
from tunesmith.planning.read_facts import read_facts

GIB = 2**30
TOLERANCE = 0.02

LLAMA = {"model_type": "llama", "hidden_act": "silu"}

QLORA = [
    # benchmarks/RESULTS.md: 2×4,096 tokens, rank 16, peaks in GiB as torch.cuda.max_memory_allocated says them
    ("8b", "keep", None, 30.02),
    ("8b", "recompute_gate_up", None, 16.18),
    ("8b", "offload_attention", None, 7.74),
    ("mistral-7b", "keep", None, 28.50),
    ("mistral-7b", "offload_attention", None, 6.19),
    ("qwen2.5-7b", "keep", None, 29.43),
    ("qwen2.5-7b", "offload_attention", None, 7.63),
    ("qwen3-8b", "keep", None, 30.95),
    ("qwen3-8b", "offload_attention", None, 7.92),
    ("gemma3-12b", "keep_all", None, 62.96),
    ("phi-4", "keep", None, 46.40),
    ("phi-4", "keep_all", None, 57.17),
    ("phi-4", "offload_attention", None, 11.49),
    # eight layers of the same shapes
    ("8b", "keep", 8, 9.61),
    ("8b", "keep_all", 8, 11.38),
    ("qwen3-8b", "keep", 8, 9.32),
    ("qwen3-8b", "keep_all", 8, 10.84),
    ("phi-4", "keep", 8, 11.62),
    ("phi-4", "keep_all", 8, 13.82),
    ("gemma3-12b", "keep_all", 8, 12.73),
    ("gemma2-9b", "keep_all", 8, 12.00),
]


SINCE = [
    # the same, since the norm behind the layers has a form of its own and the head holds one chunk of logits
    ("8b", "keep_all_unpacked", 49.73),
    ("8b", "keep_all", 36.68),
    ("8b", "keep", 29.64),
    ("8b", "offload_attention", 7.62),
    ("phi-4", "keep_all", 57.05),
    ("phi-4", "keep", 46.07),
    ("gemma3-12b", "keep_all", 62.96),
    ("gemma2-9b", "keep", 40.32),
    ("gemma2-9b", "offload_attention", 8.34),
]


def facts_of(shape: str, layers: int | None = None) -> ModelFacts:
    config: dict[str, Any] = LLAMA | SHAPES[shape]
    if layers is not None:
        config = config | {"num_hidden_layers": layers}
    # all of these were measured before the norm behind the layers had a form of its own
    return replace(read_facts(config, shape), stock_last_norm=True)


@pytest.mark.parametrize(("shape", "policy", "layers", "measured"), QLORA)
def test_qlora_peaks(shape, policy, layers, measured):
    model, work = facts_of(shape, layers), Work((4096, 4096), 8190, quantize="nf4")
    peak = peak_bytes(model, work, [policy] * len(model.layers), accumulates=False) / GIB
    assert peak == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(("shape", "policy", "measured"), SINCE)
def test_qlora_peaks_since(shape, policy, measured):
    model, work = read_facts(LLAMA | SHAPES[shape], shape), Work((4096, 4096), 8190, quantize="nf4")
    peak = peak_bytes(model, work, [policy] * len(model.layers), accumulates=False) / GIB
    assert peak == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize(("supervised", "measured"), [(4088, 2.10), (407, 1.88)])
def test_peaks_of_a_small_model(supervised, measured):
    """135M LoRA, 8 rows of 512 tokens, from CUDA graphs."""
    model, work = read_facts(LLAMA | SHAPES["135m"], "135m"), Work((512,) * 8, supervised)
    peak = peak_bytes(model, work, ["keep"] * len(model.layers), accumulates=False) / GIB
    assert peak == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(("policy", "measured"), [("keep_all", 46.80), ("keep", 39.71)])
def test_lora_peaks(policy, measured):
    model, work = facts_of("8b"), Work((4096, 4096), 8190)
    assert peak_bytes(model, work, [policy] * 32, accumulates=False) / GIB == pytest.approx(
        measured, rel=TOLERANCE
    )


@pytest.mark.parametrize("policy", ["keep", "recompute_gate_up", "recompute"])
def test_full_peaks(policy):
    """8B with 8-bit AdamW on 1×4,096 tokens: 45.35 GiB under each of them."""
    work = Work((4096,), 4095, rank=0, trained_itemsize=2, optimizer="adamw_8bit")
    model = facts_of("8b")
    assert peak_bytes(model, work, [policy] * 32, accumulates=False) / GIB == pytest.approx(
        45.35, rel=TOLERANCE
    )


@pytest.mark.parametrize(
    ("shape", "measured"),
    [("8b", 9.03), ("qwen3-8b", 10.16), ("phi-4", 14.11)],
)
def test_pinned_memory(shape, measured):
    """As the offloader counted it on the device, in GiB, when rows left without the room behind them."""
    model, work = facts_of(shape), Work((4096, 4096), 8190, quantize="nf4")
    # room for an adapter's columns behind q, k and v and behind the output of attention
    room = len(model.layers) * 8192 * (64 + 64) * 2
    found = host_bytes(model, work, ["offload_attention"] * len(model.layers)) - room
    assert found / GIB == pytest.approx(measured, abs=0.01)


def test_weights_in_4_bits():
    """4 bits a weight, one byte for 64 and four for 64 · 256 of them, and two tables."""
    rows, columns = 4096, 14336
    count = rows * columns
    exact = count / 2 + count / 64 + 4 * count / 64 / 256 + 4 * 256 + 4 * 16 + 4
    assert matrix_bytes(rows, columns, "nf4", 2) == pytest.approx(exact, abs=5 * 512)
    assert matrix_bytes(rows, columns, "none", 2) == 2 * count


def test_the_optimizer_and_the_gradients_follow_what_trains():
    model = facts_of("8b", 2)
    lora, full = Work((64,), 64), Work((64,), 64, rank=0, optimizer="adamw_8bit", trained_itemsize=2)
    adapters = 2 * 16 * (3 * 4096 + 6144 + 4096 + 4096 + 2 * 4096 + 28672 + 14336 + 4096)
    fixed = fixed_bytes(model, lora)
    assert (fixed.adapter, fixed.gradients, fixed.optimizer) == (4 * adapters, 4 * adapters, 8 * adapters)
    fixed = fixed_bytes(model, full)
    assert (fixed.adapter, fixed.gradients) == (0, 2 * model.parameters)
    assert fixed.optimizer == int((2 + 8 / 256) * model.parameters)


def test_the_chunk_of_logits():
    assert head_rows(facts_of("8b"), Work((8192,), 8192)) == 1024 - 1024 % 128
    assert head_rows(facts_of("8b"), Work((8192,), 100)) == 100


def test_what_moves_is_on_the_device_for_a_layer_more_and_comes_back_one_ahead():
    """Worked out by hand from `models.offload`: layers 0, 1 and 3 of six move 1, 10 and 1,000 bytes."""
    there = on_device([1, 10, 0, 1000, 0, 0], 0)
    assert there.forward == [0, 1, 10, 0, 1000, 0, 0]
    # layer 3 left while 4 ran; 3 brings 1 along, and 1 brings 0
    assert there.end == 0
    assert there.backward == [1, 11, 10, 1010, 0, 0]


def test_what_moves_last_does_not_leave():
    there = on_device([1, 10, 100, 1000], 0)
    assert there.forward == [0, 1, 10, 100, 1000]
    # no layer ran after the last that moves; it brings the one before it along
    assert there.end == 1000
    assert there.backward == [1, 11, 110, 1100]
    assert on_device([1, 10, 100], 0).backward == [1, 11, 110]
    assert on_device([0, 7], 0).backward == [0, 7]


def test_the_embedded_rows_are_held_through_the_forward_pass():
    """They are in the first layer's tensors until these have left."""
    there = on_device([5, 0, 0, 0], 2)
    assert (there.forward, there.end, there.backward) == ([0, 5, 2, 2, 2], 0, [5, 0, 0, 0])
    assert on_device([0, 5, 0, 0], 2).forward == [0, 0, 5, 0, 0]


@given(
    policies=st.lists(st.sampled_from(list(HELD)), min_size=4, max_size=4),
    longer=st.integers(1, 4),
    quantize=st.sampled_from(["none", "nf4"]),
)
def test_what_holds_for_every_mixture(policies, longer, quantize):
    model = facts_of("8b", 4)
    short, long = (Work((tokens,), tokens, quantize=quantize) for tokens in (1024, 1024 * (1 + longer)))
    moments = timeline(model, short, policies)
    assert [m.label for m in moments if m.label.startswith("backward")] == [
        f"backward {n}" for n in (3, 2, 1, 0)
    ]
    assert all(min(m.activations, m.passing, m.gradients) >= 0 for m in moments)
    peak = peak_bytes(model, short, policies, accumulates=False)
    assert peak < peak_bytes(model, long, policies, accumulates=False)
    assert peak <= peak_bytes(model, short, policies, accumulates=True)
    assert peak >= fixed_bytes(model, short).weights + max(m.bytes for m in moments) + LIBRARIES
    richest = peak_bytes(model, short, ["keep_all_unpacked"] * 4, accumulates=False)
    assert peak <= richest + max(m.passing for m in moments)
