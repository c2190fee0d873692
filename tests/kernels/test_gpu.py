"""The catalog on a card, against the float64 reference on the same card."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.compare import DTYPES, LARGE, SMALL, copied, count_launches, errors, label, results
from tunesmith.kernels import rms_norm
from tunesmith.kernels.catalog import CATALOG

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran: an empty list would mean that the reference was compared to itself."""
    return count_launches(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "size"), SMALL, ids=label)
def test_odd_sizes(name, size, dtype, launches):
    found = errors(name, size, dtype, "cuda")
    assert launches
    assert [value for value in found if value >= CATALOG[name].tolerances[dtype]] == []


@pytest.mark.parametrize(("name", "size"), LARGE, ids=label)
def test_real_sizes(name, size, launches):
    found = errors(name, size, torch.bfloat16, "cuda")
    torch.cuda.empty_cache()  # float64 copies of 8,192 × 28,672 are 2 GB each
    assert launches
    assert [value for value in found if value >= CATALOG[name].tolerances[torch.bfloat16]] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "size"), [case for case in SMALL + LARGE if case[0] == "dequantize_nf4"], ids=label
)
def test_nf4_is_exact(name, size, dtype):
    torch.manual_seed(0)
    row = CATALOG[name]
    inputs = row.cases(size, dtype, torch.device("cuda"))
    exact = results(row.reference, row, copied(inputs))
    assert torch.equal(results(row.op, row, inputs)[0], exact[0])


@pytest.mark.parametrize(("name", "size"), LARGE, ids=label)
def test_the_same_call_gives_the_same_bits(name, size):
    """Sums have a fixed order, and no thread reads what another has already overwritten."""
    torch.manual_seed(0)
    row = CATALOG[name]
    inputs = row.cases(size, torch.bfloat16, torch.device("cuda"))
    first = results(row.op, row, copied(inputs))
    for _ in range(3):
        again = results(row.op, row, copied(inputs))
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@pytest.mark.parametrize("name", CATALOG)
def test_no_host_synchronisation(name):
    row = CATALOG[name]
    inputs = row.cases(row.large[-1], torch.bfloat16, torch.device("cuda"))
    results(row.op, row, copied(inputs))
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(row.op, row, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_past_2_31_elements():
    """Offsets are 64 bits wide: the last row of 2^31 + 2^16 elements is as right as the first."""
    hidden = torch.zeros(2**15 + 1, 2**16, device="cuda", dtype=torch.bfloat16)
    hidden[-1] = torch.randn(2**16, device="cuda")
    normed, _, _ = rms_norm.rms_norm(hidden, torch.ones(2**16, device="cuda", dtype=torch.bfloat16), 1e-6)
    exact, _, _ = rms_norm.rms_norm_reference(
        hidden[-1:], torch.ones(2**16, device="cuda", dtype=torch.bfloat16), 1e-6
    )
    assert torch.allclose(normed[-1:].float(), exact.float(), rtol=2**-7)
