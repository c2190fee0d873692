"""The operators under `torch.ops.tunesmith`: schema, fake tensors, autograd and tracing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from tunesmith.kernels import cross_entropy, gather_rows, glu, nf4, residual, rms_norm, rope
from tunesmith.kernels.catalog import CATALOG

CPU = torch.device("cpu")


def _leaf(*shape: int) -> torch.Tensor:
    torch.manual_seed(len(shape))
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def _tables(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(tokens, width // 2, dtype=torch.float64)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


NF4 = CATALOG["dequantize_nf4"].cases({"rows": 3, "columns": 64, "nested": True}, torch.float32, CPU)
TARGETS = torch.tensor([0, 10, 3])

DIFFERENTIABLE = {
    "rms_norm": (rms_norm.rms_norm_op, (_leaf(3, 10), _leaf(10), 1e-6, 1.0)),
    "rope_qkv": (rope.rope_qkv_op, (_leaf(3, 32), *_tables(3, 8), 2, 1, 8, None, False)),
    "rope_qkv-partial": (rope.rope_qkv_op, (_leaf(3, 32), *_tables(3, 4), 2, 1, 8, 4, True)),
    "glu": (glu.glu_op, (_leaf(3, 10), "gelu_tanh")),
    "glu-adapter": (glu.glu_op, (_leaf(3, 10), "silu", _leaf(3, 4), _leaf(10, 2), 2, 0.5)),
    "add_residual": (residual.add_residual_op, (_leaf(3, 5), _leaf(3, 5), _leaf(3, 2), _leaf(5, 2))),
    "add_residual-plain": (residual.add_residual_op, (_leaf(3, 5), _leaf(3, 5))),
    "logprob": (cross_entropy.logprob_op, (_leaf(3, 11), TARGETS, 0.5, 4.0)),
}
IN_PLACE = {
    "rope_qkv_": (rope.rope_qkv_op_, (_leaf(3, 32).detach(), *_tables(3, 8), 2, 1, 8)),
    "softmax_gradient_": (cross_entropy.softmax_gradient_op_, (_leaf(3, 11).detach(), TARGETS, 1.0, None)),
    "dequantize_nf4_": (
        nf4.dequantize_nf4_op_,
        (NF4["packed"], NF4["nested"][0], NF4["out_NK"], NF4["code"], 64, *NF4["nested"][1:]),
    ),
    "rms_norm_backward": (
        rms_norm.rms_norm_backward_op,
        tuple(t.detach() for t in (_leaf(3, 10), _leaf(3, 10), _leaf(10), _leaf(3))),
    ),
    "glu_backward": (glu.glu_backward_op, (_leaf(3, 10).detach(), _leaf(3, 5).detach())),
}
FROZEN = {"gather_rows": (gather_rows.gather_rows_op, (_leaf(11, 5).detach(), TARGETS))}
"""Those that read nothing that could train."""


@pytest.mark.parametrize("case", [*DIFFERENTIABLE, *IN_PLACE, *FROZEN])
def test_operator_is_well_formed(case):
    operator, args = (DIFFERENTIABLE | IN_PLACE | FROZEN)[case]
    opcheck(operator, args)


@pytest.mark.parametrize("case", DIFFERENTIABLE)
def test_gradients_match_finite_differences(case):
    operator, args = DIFFERENTIABLE[case]

    def first(*given: object) -> torch.Tensor:
        result = operator(*given)
        return result[0] if isinstance(result, tuple) else result

    assert torch.autograd.gradcheck(first, args)


def test_operators_have_the_names_of_the_functions():
    for name in (
        "gather_rows",
        "rms_norm",
        "rope_qkv_",
        "glu",
        "softmax_gradient_",
        "dequantize_nf4_",
        "logprob",
    ):
        assert hasattr(torch.ops.tunesmith, name)


def test_modules_import_and_run_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from tunesmith.kernels.catalog import CATALOG
for row in CATALOG.values():
    row.op(**row.cases(row.small[0], torch.float32, torch.device("cpu")))
print("ran", len(CATALOG))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout.startswith(f"ran {len(CATALOG)}"), run.stderr[-2000:]
