"""cuDNN's backward in parts of the heads: what each run of a graph is given, and what its workspace takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.attention_plain import plain_attention
from tunesmith.kernels import attention_cudnn
from tunesmith.kernels.attention import Documents, Heads, Scores, attention_backward, attention_forward
from tunesmith.kernels.attention_cudnn import PART_BYTES, backward_part, backward_workspace

FORMS = {
    "equal": (attention_cudnn.equal_forward, attention_cudnn.equal_backward),
    "ragged": (attention_cudnn.ragged_forward, attention_cudnn.ragged_backward),
}


def _documents(lengths: tuple[int, ...], device: str = "cpu") -> Documents:
    return Documents(lengths, torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32))


@pytest.mark.parametrize(
    ("tokens", "heads", "part"),
    [
        (8_192, Heads(32, 8, 128), Heads(32, 8, 128)),
        (32_768, Heads(64, 8, 128), Heads(16, 2, 128)),
        (120_000, Heads(64, 8, 128), Heads(8, 1, 128)),
        (500_000, Heads(32, 8, 128), Heads(4, 1, 128)),
        (70_000, Heads(9, 3, 64), Heads(9, 3, 64)),
        (200_000, Heads(9, 3, 64), Heads(3, 1, 64)),
        (100_000, Heads(32, 32, 96), Heads(16, 16, 96)),
    ],
    ids=str,
)
def test_parts_take_as_many_heads_as_their_workspace_allows(tokens: int, heads: Heads, part: Heads) -> None:
    assert backward_part(tokens, heads, 2) == part
    if part.key_value > 1:
        assert backward_workspace(tokens, part, 2) <= PART_BYTES


def test_500_000_tokens_take_a_workspace_of_15_gib_at_once() -> None:
    """What an H100 was asked for at this length: 15.32 GiB."""
    assert backward_workspace(500_000, Heads(32, 8, 128), 2) / 2**30 == pytest.approx(15.32, abs=0.01)
    # ∂k and ∂v go straight to their place where each query head has its own
    assert backward_workspace(1, Heads(4, 4, 64), 2) == 4 * 4 * 65


class _Graphs:
    """Graphs that compute as cuDNN's do, on what they are given; counts those that ran backward."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths, self.backward = lengths, 0

    def forward_plan(self, shape: Any) -> Any:
        return SimpleNamespace(shape=shape, run=self._forward)

    def backward_plan(self, shape: Any) -> Any:
        return SimpleNamespace(shape=shape, run=self._backward)

    def _fused(self, values: dict[str, Tensor]) -> Tensor:
        return torch.cat([values[name].flatten(1) for name in ("q", "k", "v")], 1).double()

    def _forward(self, shape: Any, values: dict[str, Tensor]) -> None:
        output, sums = plain_attention(self._fused(values), shape.part, self.lengths, shape.scores)
        values["out"].copy_(output)
        if shape.ragged:
            values["lse"].copy_(sums.T)
        else:
            by_document = sums.unflatten(1, (shape.documents, shape.length)).transpose(0, 1)
            values["lse"].view(by_document.shape).copy_(by_document)

    def _backward(self, shape: Any, values: dict[str, Tensor]) -> None:
        self.backward += 1
        fused = self._fused(values).requires_grad_()
        output, sums = plain_attention(fused, shape.part, self.lengths, shape.scores)
        # cuDNN takes the sums of documents of one length in one piece only
        assert shape.ragged or values["lse"].is_contiguous()
        lse = values["lse"].T if shape.ragged else values["lse"].transpose(0, 1).flatten(1)
        assert torch.allclose(lse.double(), sums, atol=1e-5)
        assert torch.allclose(values["out"].flatten(1), output)
        output.backward(values["grad"].flatten(1).double())
        assert fused.grad is not None
        for name, found in zip(("dq", "dk", "dv"), shape.part.split(fused.grad), strict=True):
            values[name].copy_(found)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
    ("form", "lengths"), [("equal", (65, 65)), ("equal", (67,)), ("ragged", (70, 3, 12))]
)
def test_each_run_gets_its_heads(
    form: str, lengths: tuple[int, ...], groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    heads, scores, graphs = Heads(6, 3, 8), Scores(), _Graphs(lengths)
    monkeypatch.setattr(attention_cudnn, "_forward_plan", graphs.forward_plan)
    monkeypatch.setattr(attention_cudnn, "_backward_plan", graphs.backward_plan)
    monkeypatch.setattr(attention_cudnn, "_execute", lambda plan, values: plan.run(plan.shape, values))
    monkeypatch.setattr(attention_cudnn, "PART_BYTES", 1 << 60 if groups == 1 else 0)
    fused = torch.randn(sum(lengths), heads.columns + 16, dtype=torch.float64)[:, : heads.columns]
    grad = torch.randn(sum(lengths), heads.query * heads.size, dtype=torch.float64)
    exact = fused.clone().requires_grad_()
    want, _ = plain_attention(exact, heads, lengths, scores)
    want.backward(grad)
    documents = _documents(lengths)
    forward, backward = FORMS[form]
    output, saved = forward(fused, heads, documents, scores, 8)
    found = backward(grad, fused, output, saved, heads, documents, scores, 24)
    assert graphs.backward == groups
    assert torch.allclose(output, want)
    assert exact.grad is not None
    assert torch.allclose(found, exact.grad)
    assert found.stride(0) == heads.columns + 24


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "heads", [Heads(8, 4, 128), Heads(28, 4, 128), Heads(4, 4, 64), Heads(9, 3, 64)], ids=str
)
@pytest.mark.parametrize(
    ("name", "lengths"),
    [("cudnn_equal", (192, 192)), ("cudnn_equal", (131,)), ("cudnn_ragged", (300, 1, 77))],
    ids=str,
)
def test_parts_on_the_gpu(
    name: str, lengths: tuple[int, ...], heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what all heads at once give, but for ∂q, which cuDNN adds up in no fixed order."""
    torch.manual_seed(0)
    fused = torch.randn(sum(lengths), heads.columns, device="cuda").to(torch.bfloat16)
    grad = torch.randn(sum(lengths), heads.query * heads.size, device="cuda").to(torch.bfloat16)
    documents = _documents(lengths, "cuda")
    output, used, saved = attention_forward(fused, heads, documents, scores=Scores(), backend=name)
    found = []
    for most in (1 << 60, 0):
        monkeypatch.setattr(attention_cudnn, "PART_BYTES", most)
        found.append(attention_backward(grad, fused, output, saved, used, heads, documents, scores=Scores()))
    whole, parts = (heads.split(gradient) for gradient in found)
    assert torch.equal(whole[1], parts[1])
    assert torch.equal(whole[2], parts[2])
    assert float((whole[0].float() - parts[0].float()).norm() / whole[0].float().norm()) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [Heads(32, 8, 128), Heads(64, 8, 128), Heads(9, 3, 64)], ids=str)
@pytest.mark.parametrize(
    ("count", "length", "ragged"), [(2, 4096, False), (1, 32_768, False), (16, 512, True)], ids=str
)
def test_the_workspace_of_a_graph(heads: Heads, count: int, length: int, ragged: bool) -> None:
    strides = heads.columns, heads.columns, heads.query * heads.size
    plan = attention_cudnn._backward_plan(
        attention_cudnn._Shape(count, length, heads, heads, Scores(), *strides, torch.bfloat16, ragged)
    )
    foreseen = backward_workspace(count * length, heads, 2)
    assert plan.workspace <= 1.01 * foreseen, plan.workspace
    if not ragged:
        assert plan.workspace >= 0.99 * foreseen, plan.workspace
