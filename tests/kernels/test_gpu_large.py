"""Kernels on a card at more than 2^31 elements: their first and last rows against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.compare import copied, error, results
from tests.kernels.large import HALF, LIMIT, cases, long
from tunesmith.kernels.catalog import CATALOG
from tunesmith.kernels.launch import use_triton

pytestmark = pytest.mark.gpu

CASES = cases(32_768, 65_600)


@pytest.mark.parametrize(
    ("name", "case"), [(name, n) for name, found in CASES.items() for n in range(len(found))]
)
def test_last_rows_of_many_on_the_gpu(name, case):
    size, _, tokens = CASES[name][case]
    torch.manual_seed(0)
    row, device = CATALOG[name], torch.device("cuda")
    inputs = row.cases(size, HALF, device)
    inputs = {key: value.to(HALF) if key == "y_TN" else value for key, value in inputs.items()}
    count = size.get("tokens", size.get("rows"))
    exact = results(row.reference, row, copied(inputs, torch.float64))
    large = long(inputs, tokens)
    assert use_triton(next(value for value in inputs.values() if torch.is_tensor(value)), name)
    assert max(value.numel() for value in large.values() if torch.is_tensor(value)) > LIMIT
    for found, right in zip(results(row.op, row, large), exact, strict=True):
        last = found[:, -count:] if found.shape[0] == 2 else found[-count:]  # statistics are [2, T]
        assert error(last, right) < row.tolerances[HALF]
    torch.cuda.empty_cache()
