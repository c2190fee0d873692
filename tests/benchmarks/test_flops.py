"""The roofline's numerator against a count by hand and a figure that was worked out elsewhere."""

from __future__ import annotations

import pytest
from benchmarks.peers.flops import step_flops
from benchmarks.shapes import SHAPES, parameters

SMALL = {
    "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 16, "tie_word_embeddings": False,
}  # fmt: skip


def test_by_hand():
    # heads of 2, so k and v are 2 wide; weights: q 16, k 8, v 8, o 16, gate 32, up 32, down 32
    base = 4 * 5 * 144
    # inputs + outputs: q 8, k 6, v 6, o 8, gate 12, up 12, down 12; A and B, forward and two gradients, rank 1
    adapters = 6 * 5 * 64
    # 3·4/2 + 2·3/2 pairs of a query and a key, 7 products of 2 · 4 operations for both heads together
    attention = 9 * 7 * 2 * 4
    head = 4 * 3 * 4 * 16

    assert step_flops(SMALL, [3, 2], supervised=3, rank=1) == 3 * (base + adapters + attention) + head


def test_weights_that_train_take_a_third_product():
    frozen = step_flops(SMALL, [3, 2], supervised=3, rank=0)
    assert step_flops(SMALL, [3, 2], 3, 0, full=True) - frozen == 3 * 2 * 5 * 144 + 2 * 3 * 4 * 16


def test_the_8b_shape_needs_33_8_gflop_a_token():
    assert step_flops(SHAPES["8b"], [4096, 4096], supervised=8192, rank=0) / 8192 == pytest.approx(
        33.8e9, rel=2e-3
    )


def test_short_documents_and_few_targets_need_less():
    whole = step_flops(SHAPES["8b"], [8192], 8192, 16)

    assert step_flops(SHAPES["8b"], [512] * 16, 8192, 16) < whole
    assert whole - step_flops(SHAPES["8b"], [8192], 0, 16) == 4 * 8192 * 4096 * 128256


def test_windows_leave_pairs_out():
    config = SMALL | {"model_type": "gemma2", "head_dim": 4, "sliding_window": 2, "num_hidden_layers": 2}
    # q 8 wide; the first layer sees at most 2 keys of 3 (1 + 2 + 2 pairs), the second all 6
    wide = step_flops(config | {"sliding_window": 3}, [3], 0, 0)
    assert wide - step_flops(config, [3], 0, 0) == 7 * 2 * 8 * (6 - 5)


def test_parameters():
    assert parameters(SMALL) == 3 * 144 + 2 * 16 * 4
    assert parameters(SMALL | {"tie_word_embeddings": True}) == 3 * 144 + 16 * 4
    assert parameters(SHAPES["8b"]) / 1e9 == pytest.approx(8.03, abs=0.005)
    assert parameters(SHAPES["135m"]) / 1e6 == pytest.approx(134.5, abs=0.1)
    published = {
        "mistral-7b": 7.25, "qwen2.5-7b": 7.62, "qwen3-8b": 8.19, "gemma2-9b": 9.24, "gemma3-12b": 11.77,
        "phi-4": 14.66,
    }  # fmt: skip
    for shape, billions in published.items():
        assert parameters(SHAPES[shape]) / 1e9 == pytest.approx(billions, abs=0.01), shape
