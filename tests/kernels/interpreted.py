"""Triton's kernels on CPU tensors, in Triton's interpreter.

Not collected by itself: the interpreter is chosen when the kernel modules are imported, so `test_interpreted.py`
runs this file in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import interpreter_builder

from tests.kernels.compare import DTYPES, SMALL, copied, count_launches, errors, label, results
from tunesmith.kernels import cross_entropy, gather_rows, glu, launch, rms_norm, rope
from tunesmith.kernels.catalog import CATALOG

# The interpreter truncates where the card rounds to nearest when it stores bfloat16: twice the error, all to one
# side, which adds up where rounded values are summed.
SLACK = {torch.float32: 1.0, torch.bfloat16: 2.5, torch.float16: 1.0}


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran; none is a failure, because then the reference was compared to itself."""
    assert launch.INTERPRETED
    return count_launches(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "size"), SMALL, ids=label)
def test_kernel_matches_float64(name, size, dtype, launches):
    tolerance = CATALOG[name].tolerances[dtype] * SLACK[dtype]
    found = errors(name, size, dtype, "cpu")
    assert launches
    assert [value for value in found if value >= tolerance] == []


@pytest.mark.parametrize(("name", "size"), [case for case in SMALL if case[0] == "dequantize_nf4"], ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nf4_is_exact(name, size, dtype):
    row = CATALOG[name]
    inputs = row.cases(size, dtype, torch.device("cpu"))
    exact = results(row.reference, row, copied(inputs))
    assert torch.equal(results(row.op, row, inputs)[0], exact[0])


@pytest.mark.parametrize("wrong", [-1, 5, 2**32])
def test_an_id_that_is_no_row_stops_the_kernel(wrong, launches, monkeypatch):
    # what `debug` of the launch is on a card; the interpreter does not take it from there
    monkeypatch.setattr(interpreter_builder, "options", replace(interpreter_builder.options, debug=True))
    with pytest.raises(InterpreterError, match="an id is not a row of the table"):
        gather_rows.gather_rows(torch.zeros(5, 8), torch.tensor([0, wrong]))
    assert launches == ["_gather_kernel"]


def test_no_tokens_are_no_launch(launches):
    rms_norm.rms_norm(torch.zeros(0, 8), torch.ones(8), 1e-6)
    _, weight, _ = rms_norm.rms_norm_backward(
        torch.zeros(0, 8), torch.zeros(0, 8), torch.ones(8), torch.zeros(0), weight_grad=True
    )
    assert weight.tolist() == [0.0] * 8
    glu.glu(torch.zeros(0, 8))
    glu.glu(torch.zeros(0, 8), down_a_RI=torch.zeros(2, 4), down_u_TR=torch.zeros(0, 2))
    adapter = {"xa_TR": torch.zeros(0, 4), "b_NR": torch.zeros(8, 2), "rank": 2}
    assert glu.glu_backward_(torch.zeros(0, 8), torch.zeros(0, 4), **adapter).shape == (0, 4)
    rope.rope_qkv_(torch.zeros(0, 32), torch.zeros(0, 8), torch.zeros(0, 8), heads=2, kv_heads=1, head_dim=8)
    assert cross_entropy.softmax_gradient_(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert gather_rows.gather_rows(torch.zeros(3, 8), torch.zeros(0, dtype=torch.int64)).shape == (0, 8)


@pytest.mark.parametrize(("programs", "parts"), [(1, 1), (3, 2), (64, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_program_of_the_gated_unit_walks_tiles(dtype, programs, parts, launches, monkeypatch):
    """Five blocks of columns: all in one program, three and two, and a program for each."""
    monkeypatch.setattr(glu, "FORWARD_PROGRAMS", programs)
    monkeypatch.setattr(glu, "PARTS_SHARE", 1.0)
    size = {"tokens": 130, "inner": 300, "rank": 5, "down_rank": 3, "pad": 8}
    found = errors("glu", size, dtype, "cpu")
    assert launches == ["_forward_kernel", *["_sum_splits_kernel"] * (parts > 1)]
    assert max(found) < CATALOG["glu"].tolerances[dtype]
    assert glu._forward_splits(torch.empty(130, 600, dtype=dtype), 300, 5, 3)[0] == parts


def test_masked_vocabulary_has_no_probability():
    """Logits of −inf, as a padded vocabulary has them, are neither counted nor a NaN."""
    logits = torch.tensor([[0.0, float("-inf"), 1.0, float("-inf")]])
    logprob = cross_entropy.softmax_gradient_(logits, torch.tensor([2]))
    expected = torch.log_softmax(torch.tensor([0.0, 1.0]), 0)
    assert torch.allclose(logprob, expected[1:], atol=1e-6)
    assert torch.allclose(
        logits[0], torch.tensor([-expected[0].exp(), 0.0, 1 - expected[1].exp(), 0.0]), atol=1e-6
    )


def test_adapters_in_another_type_are_widened():
    """LoRA weights in float32 beside a buffer in bfloat16."""
    torch.manual_seed(0)
    gate_up, xa, b = torch.randn(3, 64).bfloat16(), torch.randn(3, 8).bfloat16(), torch.randn(64, 4)
    options = {"xa_TR": xa, "b_NR": b, "rank": 4}
    down_a, down_u = torch.randn(4, 32), [torch.zeros(3, 4).bfloat16() for _ in range(2)]
    ours = glu.glu(gate_up, **options, down_a_RI=down_a, down_u_TR=down_u[0])
    exact = glu.glu_reference(gate_up, **options, down_a_RI=down_a, down_u_TR=down_u[1])
    assert torch.allclose(ours.float(), exact.float(), rtol=2**-7)
    assert torch.allclose(down_u[0].float(), down_u[1].float(), rtol=0.05, atol=0.1)
    grads = [gate_up.clone(), gate_up.clone()]
    acts = [exact.clone(), exact.clone()]
    ours = glu.glu_backward_(grads[0], acts[0], **options)
    exact = glu.glu_backward_reference_(grads[1], acts[1], **options)
    assert torch.allclose(ours.float(), exact.float(), rtol=0.05, atol=0.1)


def test_norm_is_that_of_the_rounded_sum():
    """The stream that the next layer reads is the rounded one; the norm of anything else is off by more than 1e-6."""
    torch.manual_seed(0)
    hidden, residual = torch.randn(4, 16).half(), torch.randn(4, 16).half()
    _, ours, _ = rms_norm.rms_norm(hidden, torch.ones(16), 1e-6, residual_TD=residual)
    _, exact, _ = rms_norm.rms_norm_reference(hidden, torch.ones(16), 1e-6, residual_TD=residual)
    unrounded = (hidden.float() + residual.float()).square().mean(-1).rsqrt()
    assert torch.allclose(ours, exact, rtol=1e-6, atol=0)
    assert not torch.allclose(ours, unrounded, rtol=1e-6, atol=0)
