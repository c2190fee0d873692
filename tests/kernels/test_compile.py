"""Every kernel compiles for Ampere, Hopper and Blackwell, with the arguments of real sizes, without a GPU."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.compare import DTYPES
from tests.kernels.compile_only import SHARED, Launch, compile_for, recorded, resources
from tunesmith.kernels.catalog import CATALOG, Size

# blocks of these are chosen for each card
FITTED = ("packed_attention", "packed_attention_backward")
FITTED_SPILLS = 560
"""Bytes of addresses and bounds that attention's gradients of keys may spill: their accumulators alone take 128
registers of 255, and smaller blocks would feed the tensor cores worse."""
META = torch.device("meta")
# 1,024 threads leave 64 registers each, and a row of 16,384 with its weight gradient needs more: it spills into
# the L1 cache. Only full fine-tuning of the largest models meets it.
SPILLS = {("rms_norm_backward", 16384)}


@pytest.fixture(autouse=True)
def _private_triton_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def _launches(
    name: str, sizes: tuple[Size, ...], dtype: torch.dtype, capability: int = 89
) -> dict[Launch, Size]:
    """The launches of these sizes, each once, with the first size that needs it."""
    found: dict[Launch, Size] = {}
    row = CATALOG[name]
    for size in sizes:
        with recorded(capability=capability) as launches:
            row.op(**row.cases(size, dtype, META))
        assert launches
        for launch in launches:
            found.setdefault(launch, size)
    return found


LONG = (*FITTED, "glu_backward_")
"""They take ptxas ten to thirty seconds each: of their variants only real sizes for Hopper are compiled in CI."""


def _by_hand(slow: bool):
    return [pytest.mark.slow] if slow else []


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(name, capability, marks=_by_hand(name in LONG and capability != 90))
        for name in CATALOG
        for capability in (80, 90, 100)
    ],
)
def test_kernels_of_real_sizes_compile(name, capability):
    for launch, size in _launches(name, CATALOG[name].large, torch.bfloat16, capability).items():
        compiled = compile_for(launch, capability)
        shared = SHARED[capability if name in FITTED else 89]
        assert compiled.metadata.shared <= shared * 1024, f"more than {shared} KiB, which a program can have"
        assert getattr(compiled.metadata, "tmem_size", 0) <= 512, "more tensor memory than sm_100 has"
        used = resources(compiled)
        if used is not None and name in FITTED:
            assert used[1] <= FITTED_SPILLS, f"{launch.name} spills {used[1]} bytes: {size}"
        elif used is not None and capability == 90 and (name, size.get("width")) not in SPILLS:
            assert used[1] == 0, f"{launch.name} spills {used[1]} bytes at {used[0]} registers: {size}"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=_by_hand(name in LONG or dtype != torch.bfloat16))
        for name in CATALOG
        for dtype in DTYPES
    ],
    ids=str,
)
def test_kernels_of_odd_sizes_compile_in_every_type(name, dtype):
    for launch in _launches(name, CATALOG[name].small, dtype):
        compile_for(launch, 90)


@pytest.mark.parametrize("name", CATALOG)
def test_wide_accesses_are_vectorised(name):
    """Real sizes are read and written 16 bytes at a time (nf4 reads its words of 4)."""
    row = CATALOG[name]
    ptx = "".join(
        compile_for(launch, 90).asm["ptx"] for launch in _launches(name, row.large[:1], torch.bfloat16)
    )
    if row.name != "dequantize_nf4":
        assert re.search(r"ld\.global[.\w:]*\.v4\.b32", ptx)
    if row.name != "logprob_":
        assert re.search(r"st\.global[.\w:]*\.v4\.b32", ptx)


def test_an_assertion_stands_before_the_rows_that_are_read():
    launch = next(iter(_launches("gather_rows", CATALOG["gather_rows"].large[:1], torch.bfloat16)))
    ptx = compile_for(launch, 90).asm["ptx"]
    assert re.search(r"call\.uni\s+__assertfail", ptx)
    assert ptx.index("setp.lt.s64") < ptx.index(".v4.b32")


def test_adapters_in_another_type_compile():
    """LoRA weights in float32 beside a buffer in bfloat16."""
    size = {"tokens": 64, "inner": 256, "rank": 16}
    for name in ("glu", "glu_backward_"):
        inputs = CATALOG[name].cases(size, torch.bfloat16, META)
        with recorded() as launches:
            CATALOG[name].op(**{**inputs, "b_NR": inputs["b_NR"].float()})
        compile_for(launches[0], 90)


def test_matrices_of_more_than_2_31_elements_are_indexed_in_64_bits():
    small, wide = (
        next(iter(_launches("dequantize_nf4", ({"rows": rows, "columns": 4096},), torch.bfloat16)))
        for rows in (4096, 2**19)
    )
    assert dict(small.constants)["WIDE"] is False
    assert dict(wide.constants)["WIDE"] is True
    compile_for(wide, 90)
