"""The attention kernels on CPU tensors, in Triton's interpreter, with small blocks: many of them in short documents.

Not collected by itself: `test_attention_triton.py` runs this file in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention_plain import plain_attention
from tests.kernels.compare import count_launches, error
from tunesmith.kernels import attention_blocks, launch
from tunesmith.kernels.attention import attention_backward, attention_forward
from tunesmith.kernels.attention_blocks import Blocks
from tunesmith.kernels.packed import Documents, Heads, Scores

# queries and keys of a block in the kernels that walk keys, and in the one that walks queries
SQUARE, WIDE = ((16, 16), (16, 16)), ((32, 16), (16, 32))
LENGTHS = (65, 1, 5, 32, 40, 16)
# one rounding of probabilities and one of results; the interpreter truncates bfloat16
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 1.5e-3}

KINDS = [
    Scores(),
    Scores(scale=0.3),
    *(Scores(window=window) for window in (1, 2, 7, 15, 16, 17, 33, 64, 65, 66)),
    Scores(softcap=2.0),
    Scores(scale=0.2, window=20, softcap=3.0),
]


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    assert launch.INTERPRETED
    return count_launches(monkeypatch)


def _cut(monkeypatch: pytest.MonkeyPatch, cut: tuple[tuple[int, int], tuple[int, int]]) -> None:
    walked, kept = (Blocks(rows, columns, 4, 1, 1) for rows, columns in cut)
    table = {"forward": walked, "query_gradient": walked, "key_gradient": kept}
    every = {name: {(size, 256): (blocks,) for size in (2, 4)} for name, blocks in table.items()}
    monkeypatch.setattr(attention_blocks, "BLOCKS", every)


def _check(heads: Heads, lengths: tuple[int, ...], scores: Scores, dtype: torch.dtype, room: int = 0) -> None:
    torch.manual_seed(0)
    total, width = sum(lengths), heads.query * heads.size
    fused = torch.randn(total, heads.columns + 8).to(dtype)[:, : heads.columns]
    grad = torch.randn(total, width).to(dtype)
    documents = Documents(lengths, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))
    exact = fused.double().requires_grad_()
    want, _ = plain_attention(exact, heads, lengths, scores)
    (want_grad,) = torch.autograd.grad(want, exact, grad.double())
    out, _, saved = attention_forward(fused, heads, documents, scores=scores, backend="triton", room=room)
    got = attention_backward(grad, fused, out, saved, "triton", heads, documents, scores=scores, room=room)
    assert (out.stride(0), got.stride(0)) == (width + room, heads.columns + room)
    assert error(out, want) < TOLERANCES[dtype]
    assert error(got, want_grad) < TOLERANCES[dtype]


@pytest.mark.parametrize("cut", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("scores", KINDS, ids=str)
def test_every_kind_of_scores(scores, cut, monkeypatch, launches):
    _cut(monkeypatch, cut)
    _check(Heads(2, 1, 16), LENGTHS, scores, torch.float32)
    assert launches == ["_forward_kernel", "_query_gradient_kernel", "_key_gradient_kernel"]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_groups_of_heads(groups, dtype, monkeypatch):
    _cut(monkeypatch, WIDE)
    _check(Heads(8, 8 // groups, 16), (37, 3), Scores(window=20), dtype, room=4)


@pytest.mark.parametrize(
    "size", [8, 72, 128, *(pytest.param(size, marks=pytest.mark.slow) for size in (64, 80, 96, 256))]
)
def test_head_sizes(size, monkeypatch):
    _cut(monkeypatch, WIDE)
    _check(Heads(2, 1, size), (37, 3), Scores(scale=0.1, softcap=4.0), torch.bfloat16, room=3)


def test_results_repeat_bit_for_bit_and_neighbours_do_not_matter(monkeypatch):
    """A document has the same output and gradient wherever in a row it stands."""
    _cut(monkeypatch, SQUARE)
    torch.manual_seed(0)
    heads, scores = Heads(2, 1, 16), Scores(window=9, softcap=3.0)
    document, other = torch.randn(21, heads.columns), torch.randn(18, heads.columns)
    found = []
    for fused, lengths, place in (
        (torch.cat([document, other]), (21, 18), slice(0, 21)),
        (torch.cat([other, document]), (18, 21), slice(18, 39)),
    ):
        documents = Documents(lengths, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))
        grad = torch.ones(39, 32)
        out, _, saved = attention_forward(fused, heads, documents, scores=scores, backend="triton")
        got = attention_backward(grad, fused, out, saved, "triton", heads, documents, scores=scores)
        found.append((out[place], got[place]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_an_infinite_neighbour_does_not_leak(monkeypatch):
    """Rows after a document's end are not read: infinity times a probability of 0 would be no number."""
    _cut(monkeypatch, WIDE)
    heads, lengths = Heads(2, 1, 16), (21, 18)
    fused = torch.randn(39, heads.columns)
    fused[21:] = float("inf")
    documents = Documents(lengths, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))
    out, _, saved = attention_forward(fused, heads, documents, backend="triton")
    got = attention_backward(torch.ones(39, 32), fused, out, saved, "triton", heads, documents)
    assert bool(out[:21].isfinite().all())
    assert bool(got[:21].isfinite().all())


def test_no_tokens_are_no_launch(launches):
    heads, documents = Heads(2, 1, 16), Documents((0,), torch.zeros(2, dtype=torch.int32))
    out, _, saved = attention_forward(torch.zeros(0, 64), heads, documents, backend="triton")
    assert attention_backward(out, torch.zeros(0, 64), out, saved, "triton", heads, documents).shape == (
        0,
        64,
    )
