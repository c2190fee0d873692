"""AdamW over tables of addresses: against float64 and torch's own, at any size and alignment, and compiled.

What needs the kernels is marked `gpu` and runs on a card; `test_in_the_interpreter` runs the same tests on the CPU,
in a process that imports the kernels with Triton's interpreter switched on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kernels import compile_only
from tests.support.interpreter import run_in_interpreter
from tunesmith.kernels import adamw, launch
from tunesmith.kernels.adamw import BLOCK, adamw_, adamw_reference_
from tunesmith.kernels.measure import copied, error

DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda")
on_kernels = (lambda test: test) if launch.INTERPRETED else pytest.mark.gpu

OPTIONS = ((1e-2, 0.9, 0.999, 1e-8, 0.1), (3e-3, 0.0, 0.99, 1e-6, 0.0))
SIZES = {
    "odd": (1, 7, 513),
    "even": (BLOCK, 4 * BLOCK, 16),
    "tails": (BLOCK + 1, 0, 3 * BLOCK - 1, 160),
    "many": (3,) * 150,
}
DTYPES = ((torch.float32,), (torch.bfloat16,), (torch.float16,), (torch.float32, torch.bfloat16))
# One rounding of the parameter and of each moment; the interpreter truncates to bfloat16, which doubles the error.
TOLERANCES = {
    torch.float32: 1e-6,
    torch.bfloat16: 1e-2 if launch.INTERPRETED else 4e-3,
    torch.float16: 1e-3 if launch.INTERPRETED else 5e-4,
}


def inputs_of(
    sizes: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device, shift: int = 0
) -> dict[str, Any]:
    """Arguments of `adamw_`; `shift` elements lie between a tensor and the start of its memory."""
    generator = torch.Generator().manual_seed(0)

    def normal(index: int, scale: float) -> Tensor:
        values = torch.randn(sizes[index] + shift, generator=generator) * scale
        return values.to(dtypes[index % len(dtypes)]).to(device)[shift:]

    indices = range(len(sizes))
    return {
        "parameters": tuple(normal(index, 1.0) for index in indices),
        "gradients": tuple(normal(index, 1.0) for index in indices),
        "exp_avgs": tuple(normal(index, 0.1) for index in indices),
        "exp_avg_sqs": tuple(normal(index, 0.3).square_() for index in indices),
        "steps": tuple(torch.tensor(float(index % 5), device=device) for index in indices),
        "groups": tuple(index % 2 for index in indices),
        "options": OPTIONS,
        "max_norm": 1.0,
        "found_inf": None,
    }


@pytest.mark.skipif(launch.INTERPRETED, reason="this is what the test starts")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    assert "1 deselected" in run_in_interpreter(Path(__file__)), "tensors of 2^31 elements alone need a card"


# ---------------------------------------------------------------------- with the kernels


@on_kernels
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "+".join(str(dtype)[6:] for dtype in dtypes))
@pytest.mark.parametrize("sizes", SIZES)
def test_kernel_matches_float64(sizes, dtypes):
    inputs = inputs_of(SIZES[sizes], dtypes, DEVICE)
    exact = adamw_reference_(**copied(inputs, torch.float64))
    ours = adamw_(**inputs)
    assert error(ours[0], exact[0]) < 1e-6, "products of float32 under a norm that is summed in float64"
    for one, other in zip(ours[1:], exact[1:], strict=True):
        assert one.numel() == 0 or error(one, other) < TOLERANCES[one.dtype]


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_gives_the_same_numbers_at_any_alignment(dtype):
    """Tensors that do not start at 16 bytes take other loads, and come to the same numbers.

    A compiler may fuse products and sums elsewhere in the other kernel: a card may round once differently.
    """
    sizes = (2 * BLOCK, 48)
    inputs, shifted = (inputs_of(sizes, (dtype,), DEVICE, shift) for shift in (0, 1))
    for name in ("parameters", "gradients", "exp_avgs", "exp_avg_sqs"):
        for source, target in zip(inputs[name], shifted[name], strict=True):
            target.copy_(source)
    assert shifted["parameters"][0].data_ptr() % 16 != 0
    for _ in range(2):
        for one, other in zip(adamw_(**inputs), adamw_(**shifted), strict=True):
            slack = 0.0 if launch.INTERPRETED else 2 * torch.finfo(one.dtype).eps
            assert torch.allclose(one, other, rtol=slack, atol=slack)


@on_kernels
@pytest.mark.parametrize("max_norm", [None, 0.25, 1e6])
def test_kernel_repeats_its_bits_and_leaves_gradients(max_norm):
    inputs = {**inputs_of(SIZES["tails"], (torch.float32,), DEVICE), "max_norm": max_norm}
    gradients = copied(inputs["gradients"])
    first, second = adamw_(**copied(inputs)), adamw_(**inputs)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert all(torch.equal(*pair) for pair in zip(gradients, inputs["gradients"], strict=True))
    exact = adamw_reference_(
        **copied({**inputs_of(SIZES["tails"], (torch.float32,), DEVICE), "max_norm": max_norm})
    )
    assert error(first[1], exact[1]) < TOLERANCES[torch.float32]


@pytest.mark.gpu
def test_kernel_reaches_past_2_31_elements():
    """Only the last elements have a gradient: β of 0 moves them by lr · sign(g), and the rest stands still."""
    size = 2**31 + BLOCK + 3
    tensors = [torch.zeros(size, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    tensors[1][-3:] = torch.tensor([1.0, -1.0, 2.0])
    step = torch.zeros((), device="cuda")
    lists = [[tensor] for tensor in (*tensors, step)]
    norm = adamw_(*lists, groups=[0], options=[(0.5, 0.0, 0.0, 0.0625, 0.0)])[0]
    assert float(norm) == pytest.approx(6**0.5)
    expected = [-0.5 / 1.0625, 0.5 / 1.0625, -1.0 / 2.0625]
    assert tensors[0][-3:].tolist() == pytest.approx(expected, rel=2**-8)
    assert int(tensors[0].count_nonzero()) == 3


# ---------------------------------------------------------------------- without them


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_reference_is_torchs_adamw(dtype, max_norm):
    cpu = torch.device("cpu")
    inputs = {**inputs_of(SIZES["odd"], (torch.float32,), cpu), "max_norm": max_norm}
    parameters = [nn.Parameter(p.double()) for p in inputs["parameters"]]
    names = ("lr", "betas", "eps", "weight_decay")
    rows = [dict(zip(names, (row[0], row[1:3], row[3], row[4]), strict=True)) for row in OPTIONS]
    exact = torch.optim.AdamW([{"params": [p], **rows[i % 2]} for i, p in enumerate(parameters)])
    for index, parameter in enumerate(parameters):
        parameter.grad = inputs["gradients"][index].double()
        exact.state[parameter] = {
            "step": inputs["steps"][index].clone(),
            "exp_avg": inputs["exp_avgs"][index].double(),
            "exp_avg_sq": inputs["exp_avg_sqs"][index].double(),
        }
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
    exact.step()
    states = [[exact.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq", "step")]
    ours = adamw_reference_(**copied(inputs, dtype))
    for one, other in zip(ours, [norm, *parameters, *states[0], *states[1], *states[2]], strict=True):
        assert error(one, other) < (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("found_inf", [None, 1.0])
def test_reference_skips(found_inf):
    inputs = inputs_of(SIZES["odd"], (torch.float32,), torch.device("cpu"))
    if found_inf is None:
        inputs["gradients"][1][3] = float("nan")
    else:
        inputs["found_inf"] = torch.tensor([found_inf])
    before = copied(inputs)
    adamw_reference_(**inputs)
    for name in ("parameters", "exp_avgs", "exp_avg_sqs", "steps"):
        assert all(torch.equal(*pair) for pair in zip(inputs[name], before[name], strict=True))


@pytest.mark.skipif(launch.INTERPRETED, reason="in the interpreter the kernels compute on the CPU")
def test_on_a_cpu_the_reference_computes():
    inputs = inputs_of(SIZES["tails"], (torch.float32, torch.bfloat16), torch.device("cpu"))
    exact = adamw_reference_(**copied(inputs))
    assert all(torch.equal(*pair) for pair in zip(adamw_(**inputs), exact, strict=True))


# ---------------------------------------------------------------------- compiled


def _launches(sizes: Sequence[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(compile_only, "MODULES", (adamw,))
    monkeypatch.setitem(compile_only.TYPES, torch.float64, "*fp64")
    with compile_only.recorded() as found:
        adamw_(**inputs_of(sizes, (dtype,), torch.device("meta")))
    return found


@pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.usefixtures("_private_triton_cache")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(9216, 24576), (9216, 7)], ids=["regular", "odd"])
def test_compiles_without_spilling(sizes, dtype, capability, monkeypatch):
    found = _launches(sizes, dtype, monkeypatch)
    assert [launch.name for launch in found] == [
        "_norm_kernel",
        "_clip_kernel",
        "_advance_kernel",
        "_update_kernel",
    ]
    for launched in found:
        compiled = compile_only.compile_for(launched, capability)
        used = compile_only.resources(compiled)
        assert used is None or (used[1] == 0 and used[0] <= 128), f"{launched.name} at {used}"


@pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.usefixtures("_private_triton_cache")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_regular_tensors_are_read_and_written_16_bytes_at_a_time(dtype, monkeypatch):
    def wide(sizes: Sequence[int], instruction: str, name: str) -> int:
        (launched,) = [found for found in _launches(sizes, dtype, monkeypatch) if found.name == name]
        return len(re.findall(instruction, compile_only.compile_for(launched, 90).asm["ptx"]))

    loads, stores = r"ld\.global[.\w:]*\.v4\.b32", r"st\.global[.\w:]*\.v4\.b32"
    vectors = BLOCK // 128 * dtype.itemsize // 16  # of a thread in one tensor
    assert wide((9216,), loads, "_norm_kernel") == vectors
    assert wide((9216,), loads, "_update_kernel") == 4 * vectors
    assert wide((9216,), stores, "_update_kernel") == 3 * vectors
    assert wide((9217,), loads, "_update_kernel") == 0
