"""Rules of kernels that planning says once more."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tunesmith.kernels import glu, launch
from tunesmith.planning import workspaces


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glu, "multiprocessors", lambda _: workspaces.MULTIPROCESSORS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_parts_of_the_gated_unit(dtype: torch.dtype) -> None:
    seen = set()
    for tokens, inner, rank in product(
        (1, 64, 700, 4096, 8192, 70_000), (1536, 14_336, 17_920), (1, 8, 16, 17, 64)
    ):
        gate_up_TN = torch.empty(tokens, 2 * inner, dtype=dtype, device="meta")
        summed = rank <= launch.max_rank(dtype)
        forward, _ = glu._forward_splits(gate_up_TN, inner, rank, rank)
        backward, _ = glu._backward_splits(gate_up_TN, inner, rank)
        itemsize = dtype.itemsize
        assert workspaces.glu_forward_splits(tokens, inner, rank, itemsize) == (forward if summed else 0)
        assert workspaces.glu_splits(tokens, inner, rank, itemsize) == (backward if summed else 0)
        if forward > 1:
            share = 2 * glu.FLOAT * forward * rank / (inner * itemsize)
            assert share <= glu.PARTS_SHARE
            seen.add(share > 0.9 * glu.PARTS_SHARE)
    assert seen == {False, True}


def test_the_largest_rank_that_is_fused() -> None:
    assert workspaces.LARGEST_FUSED_RANK == glu.LARGEST_FUSED_RANK
