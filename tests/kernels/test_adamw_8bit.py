"""AdamW with moments in 8 bits: the code, unbiased rounding, the kernel against its reference, and compiled.

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
from torch import Tensor

from tests.kernels import compile_only
from tests.support.interpreter import run_in_interpreter
from tunesmith.kernels import adamw, adamw_8bit, launch
from tunesmith.kernels.adamw import BLOCK, adamw_reference_
from tunesmith.kernels.adamw_8bit import (
    SCALED,
    adamw_8bit_,
    adamw_8bit_reference_,
    decode,
    dynamic_code,
    encode_root,
    encode_signed,
    scales_of,
)
from tunesmith.kernels.measure import copied, error

DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda")
CPU = torch.device("cpu")
on_kernels = (lambda test: test) if launch.INTERPRETED else pytest.mark.gpu
on_cpu = pytest.mark.skipif(launch.INTERPRETED, reason="in the interpreter the kernels compute on the CPU")

OPTIONS = ((1e-2, 0.9, 0.999, 1e-8, 0.1), (3e-3, 0.0, 0.99, 1e-6, 0.0))
SIZES = {
    "odd": (1, 7, 513),
    "even": (BLOCK, 3 * BLOCK, 16),
    "tails": (BLOCK + 1, 0, 2 * BLOCK - 1, SCALED + 160),
}
DTYPES = ((torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16))


def words_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**32, (count,), generator=torch.Generator().manual_seed(seed))


def inputs_of(
    sizes: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device = DEVICE, shift: int = 0
) -> dict[str, Any]:
    """Arguments of `adamw_8bit_`; `shift` elements lie between a tensor and the start of its memory."""
    generator = torch.Generator().manual_seed(0)

    def normal(index: int) -> Tensor:
        values = torch.randn(sizes[index] + shift, generator=generator)
        return values.to(dtypes[index % len(dtypes)]).to(device)[shift:]

    indices = range(len(sizes))
    firsts = [encode_signed(torch.randn(size, generator=generator) * 0.1) for size in sizes]
    seconds = [encode_root(torch.rand(size, generator=generator), words_of(size)) for size in sizes]

    gradients = [normal(index) for index in indices]
    for gradient, (codes, _), (roots, _) in zip(gradients, firsts, seconds, strict=True):
        # a root below the lowest code, and one that is zero
        gradient[5:7] = torch.tensor([1e-9, 0.0])[: len(gradient[5:7])].to(gradient)
        codes[5:7], roots[5:7] = 127, 0

    def shifted(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:0].new_zeros(shift), tensor]).to(device)[shift:]

    return {
        "parameters": tuple(normal(index) for index in indices),
        "gradients": tuple(gradients),
        "exp_avgs": tuple(shifted(codes) for codes, _ in firsts),
        "roots": tuple(shifted(codes) for codes, _ in seconds),
        "exp_avg_scales": tuple(scale.to(device) for _, scale in firsts),
        "root_scales": tuple(scale.to(device) for _, scale in seconds),
        "steps": tuple(torch.tensor(float(index % 5), device=device) for index in indices),
        "groups": tuple(index % 2 for index in indices),
        "options": OPTIONS,
        "max_norm": 1.0,
        "seed": 7,
    }


@pytest.mark.skipif(launch.INTERPRETED, reason="this is what the test starts")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    assert "1 deselected" in run_in_interpreter(Path(__file__)), "tensors of 2^31 elements alone need a card"


# ---------------------------------------------------------------------- with the kernels


@on_kernels
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "+".join(str(dtype)[6:] for dtype in dtypes))
@pytest.mark.parametrize("sizes", SIZES)
def test_kernel_is_its_reference(sizes, dtypes):
    """The same codes and the same rounding, but for values that another order of operations moves over an edge:
    fewer than one in five hundred, by one code or one unit in the last place."""
    inputs = inputs_of(SIZES[sizes], dtypes)
    exact = adamw_8bit_reference_(**copied(inputs))
    ours = adamw_8bit_(**inputs)
    for one, other in zip(ours, exact, strict=True):
        if one.dtype in (torch.uint8, torch.bfloat16):
            steps = one if one.dtype == torch.uint8 else one.view(torch.int16)
            others = other if one.dtype == torch.uint8 else other.view(torch.int16)
            moved = (steps.int() - others.int()).abs()
            assert moved.numel() == 0 or int(moved.max()) <= 1
            assert int(moved.sum()) <= one.numel() / 500
        else:
            # a parameter near 0 is what is left of two that nearly cancel
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_gives_the_same_numbers_at_any_alignment(dtype):
    """Words belong to elements, not to threads: other loads round the same elements up."""
    sizes = (2 * BLOCK, 48)
    inputs, shifted = (inputs_of(sizes, (dtype,), shift=shift) for shift in (0, 1))
    for name in ("parameters", "gradients"):
        for source, target in zip(inputs[name], shifted[name], strict=True):
            target.copy_(source)
    assert shifted["parameters"][0].data_ptr() % 16 != 0
    for one, other in zip(adamw_8bit_(**inputs), adamw_8bit_(**shifted), strict=True):
        if launch.INTERPRETED:
            assert torch.equal(one, other)
        elif (
            one.dtype == torch.float32
        ):  # a compiler may fuse products and sums elsewhere in the other kernel
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        else:
            assert int((one != other).sum()) <= one.numel() / 500


@on_kernels
@pytest.mark.parametrize("fault", ["found_inf", "nan"])
def test_a_skipped_step_changes_no_bit(fault):
    inputs = inputs_of(SIZES["tails"], (torch.float32, torch.bfloat16))
    if fault == "nan":
        inputs["gradients"][2][77] = float("nan")
    else:
        inputs["found_inf"] = torch.ones(1, device=DEVICE)
    before = copied(inputs)
    adamw_8bit_(**inputs)
    for name in ("parameters", "exp_avgs", "roots", "exp_avg_scales", "root_scales", "steps"):
        assert all(torch.equal(*pair) for pair in zip(inputs[name], before[name], strict=True))


@on_kernels
def test_kernel_repeats_its_bits_and_leaves_gradients():
    inputs = inputs_of(SIZES["tails"], (torch.bfloat16,))
    gradients = copied(inputs["gradients"])
    first, second = adamw_8bit_(**copied(inputs)), adamw_8bit_(**copied(inputs))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    other = adamw_8bit_(**{**inputs, "seed": 8})
    assert not torch.equal(first[1], other[1])
    assert all(torch.equal(*pair) for pair in zip(gradients, inputs["gradients"], strict=True))


@on_kernels
def test_float32_moments_beside_bfloat16_are_rounded_alike():
    """`adamw_` with a seed: the kernel's bits are the reference's, and others than those of the nearest."""
    inputs = inputs_of((3 * BLOCK + 5, 40), (torch.bfloat16,))
    moments = tuple(torch.rand(p.shape, device=DEVICE) for p in inputs["parameters"])
    for name in ("exp_avgs", "roots", "exp_avg_scales", "root_scales"):
        del inputs[name]
    inputs |= {"exp_avgs": moments, "exp_avg_sqs": copied(moments), "numbers": (5, 2), "groups": (0, 0)}
    exact = adamw_reference_(**copied(inputs))
    nearest = adamw_reference_(**copied({**inputs, "seed": None}))
    ours = adamw.adamw_(**inputs)
    one, other, plain = (torch.cat([p.flatten() for p in found[1:3]]) for found in (ours, exact, nearest))
    assert int((one != other).sum()) <= one.numel() / 500
    assert int((one != plain).sum()) > one.numel() / 8


@pytest.mark.gpu
def test_kernel_reaches_past_2_31_elements():
    """Only the last elements have a gradient: β of 0 moves them by lr · sign(g), and the rest stands still."""
    size = 2**31 + BLOCK + 3
    parameter, gradient = (torch.zeros(size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    gradient[-3:] = torch.tensor([1.0, -1.0, 2.0])
    codes = [torch.full((size,), zero, dtype=torch.uint8, device="cuda") for zero in (127, 0)]
    scales = [torch.zeros(scales_of(size), device="cuda") for _ in range(2)]
    lists = [[t] for t in (parameter, gradient, *codes, *scales, torch.zeros((), device="cuda"))]
    norm = adamw_8bit_(*lists, groups=[0], options=[(0.5, 0.0, 0.0, 0.0625, 0.0)])[0]
    assert float(norm) == pytest.approx(6**0.5)
    expected = [-0.5 / 1.0625, 0.5 / 1.0625, -1.0 / 2.0625]
    assert parameter[-3:].tolist() == pytest.approx(expected, rel=2**-7)
    assert int(parameter.count_nonzero()) == 3
    assert decode(codes[0][-3:], scales[0][-1:], signed=True).tolist() == pytest.approx([1, -1, 2], rel=0.02)


# ---------------------------------------------------------------------- the code


def test_code_by_hand():
    """The paper's: with a sign 64 parts of (0.1, 1], 32 of (0.01, 0.1] … one of the lowest decade, 0 and 1."""
    signed, unsigned = dynamic_code(signed=True), dynamic_code(signed=False)
    assert len(signed) == len(unsigned) == 256
    assert (signed[127], signed[255], unsigned[0], unsigned[255]) == (0, 1, 0, 1)
    assert torch.equal(signed[:127], -signed[128:255].flip(0))
    assert signed[128:132].tolist() == pytest.approx([0.55e-6, 0.325e-5, 0.775e-5, 0.2125e-4])
    assert float(signed[254]) == pytest.approx(0.1 + 0.9 * 63.5 / 64)
    assert unsigned[1:4].tolist() == pytest.approx([0.325e-6, 0.775e-6, 0.2125e-5])
    assert float(unsigned[127]) == pytest.approx(0.1 + 0.9 * 0.5 / 128)


@pytest.mark.parametrize("signed", [True, False])
def test_code_is_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed=signed)
    assert torch.allclose(dynamic_code(signed=signed), theirs, rtol=1e-6, atol=0)


def test_every_code_encodes_to_itself():
    """With the largest magnitude of a block as its scale."""
    values = dynamic_code(signed=True)[:255] * 3.7
    codes, scale = encode_signed(values)
    assert codes.tolist() == list(range(255))
    assert float(scale) == pytest.approx(3.7, rel=1e-6)
    roots = dynamic_code(signed=False) * 0.02
    codes, scale = encode_root(roots, torch.full((256,), 0x8000))
    assert codes.tolist() == list(range(256))
    assert float(scale) == pytest.approx(0.02, rel=1e-6)


def test_moments_are_rounded_to_the_nearest_code():
    values = torch.cat([10 ** -(torch.rand(5000) * 7) * torch.randn(5000).sign(), torch.tensor([1.0])])
    for block in values.split(SCALED):
        codes, scale = encode_signed(block)
        distance = (block[:, None] / scale - dynamic_code(signed=True)[None, :255]).abs()
        nearest, found = distance.min(1).values, distance.gather(1, codes.long()[:, None])[:, 0]
        assert bool((found <= nearest * 1.0001 + 1e-7).all())


def test_roots_are_right_on_average_and_never_lost():
    """Over 4,096 words the mean is the value, within five standard errors; rounded to the nearest most would be off
    by a large part of a gap."""
    draws = 4096
    values = torch.tensor([1.0, 0.6123, 0.0999, 0.1004, 0.00123, 3.3e-5, 4.1e-6, 5.5e-7, 1.2e-7, 1e-12, 0.0])
    total, squares = torch.zeros(len(values)).double(), torch.zeros(len(values)).double()
    for draw in range(draws):
        codes, scale = encode_root(values, words_of(len(values), draw))
        back = decode(codes, scale, signed=False).double()
        total, squares = total + back, squares + back.square()
        assert bool((codes[:-1] > 0).all())
        assert int(codes[-1]) == 0
    mean = total / draws
    spread = (squares / draws - mean.square()).clamp(min=0).sqrt() / draws**0.5
    within = (mean - values).abs() <= 5 * spread + 1e-5 * values
    # below the lowest code it stands for all
    assert within[:8].all(), (mean, values, spread)
    assert mean[8:10].tolist() == pytest.approx([0.325e-6] * 2, rel=1e-3)


def test_a_root_that_shrinks_is_followed():
    """1,000 steps without gradients take v to 37% of itself and √v to 61%, beside an element whose root stays the
    same and holds the scale; rounded to the nearest nothing would move, as 0.05% of a root is below half a gap."""
    size = 4096
    inputs = inputs_of((size,), (torch.float32,), CPU)
    roots = torch.full((size,), 0.5)
    roots[::SCALED] = 1.0
    inputs["roots"], inputs["root_scales"] = ([t] for t in encode_root(roots, words_of(size)))
    gradient = torch.zeros(size)
    gradient[::SCALED] = 1.0
    inputs |= {"gradients": [gradient], "max_norm": None, "options": OPTIONS[:1]}
    for _ in range(1000):
        adamw_8bit_reference_(**inputs)
    left = decode(inputs["roots"][0], inputs["root_scales"][0], signed=False)
    assert float(left[0]) == pytest.approx(1.0, rel=1e-3)
    assert float(left[1:SCALED].mean()) == pytest.approx(0.5 * 0.999**500, rel=0.02)


# ---------------------------------------------------------------------- the step


@on_cpu
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_step_from_exact_moments_is_adamws(max_norm):
    """Moments that are codes are read without error, so that the step is that of float32 moments."""
    inputs = {**inputs_of(SIZES["odd"], (torch.float64,), CPU), "max_norm": max_norm}
    exact = copied(inputs)
    scales = [exact.pop(name) for name in ("exp_avg_scales", "root_scales")]
    exact["exp_avgs"] = tuple(
        decode(c, s, signed=True, dtype=torch.float64)
        for c, s in zip(exact["exp_avgs"], scales[0], strict=True)
    )
    exact["exp_avg_sqs"] = tuple(
        decode(c, s, signed=False, dtype=torch.float64) ** 2
        for c, s in zip(exact.pop("roots"), scales[1], strict=True)
    )
    ours, theirs = adamw_8bit_(**inputs), adamw_reference_(**exact)
    for one, other in zip(ours[: 1 + len(SIZES["odd"])], theirs, strict=False):
        assert error(one, other) < 1e-12
    for index, moment in enumerate(exact["exp_avgs"]):
        back = decode(inputs["exp_avgs"][index], inputs["exp_avg_scales"][index], signed=True)
        assert bool(((back - moment).abs() <= 0.0071 * moment.abs().max()).all()), "half of the widest gap"
    for index, second in enumerate(exact["exp_avg_sqs"]):
        back = decode(inputs["roots"][index], inputs["root_scales"][index], signed=False)
        assert bool(((back - second.sqrt()).abs() <= 0.0071 * second.sqrt().max()).all()), "the widest gap"


@on_cpu
def test_slices_of_the_reference_are_one_tensor(monkeypatch):
    inputs = inputs_of((5 * SCALED + 3, 40), (torch.bfloat16,), CPU)
    whole = adamw_8bit_reference_(**copied(inputs))
    monkeypatch.setattr(adamw_8bit, "SLICE", 2 * SCALED)
    parts = adamw_8bit_reference_(**inputs)
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))


# ---------------------------------------------------------------------- compiled


def _launches(sizes: Sequence[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(compile_only, "MODULES", (adamw, adamw_8bit))
    monkeypatch.setitem(compile_only.TYPES, torch.float64, "*fp64")
    inputs = inputs_of(sizes, (dtype,), CPU)
    meta = {
        name: tuple(item.to("meta") if isinstance(item, Tensor) else item for item in value)
        if isinstance(value, tuple)
        else value
        for name, value in inputs.items()
    }
    with compile_only.recorded() as found:
        adamw_8bit_(**meta)
    return found


@pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.usefixtures("_private_triton_cache")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(9216, 24576), (9216, 7)], ids=["regular", "odd"])
def test_compiles_without_spilling(sizes, dtype, capability, monkeypatch):
    found = _launches(sizes, dtype, monkeypatch)
    names = ["_norm_kernel", "_clip_kernel", "_advance_kernel", "_update_8bit_kernel"]
    assert [launch.name for launch in found] == names
    used = compile_only.resources(compile_only.compile_for(found[-1], capability))
    assert used is None or (used[1] == 0 and used[0] <= 128), f"{used}"


@pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.usefixtures("_private_triton_cache")
def test_regular_tensors_are_read_and_written_in_whole_words(monkeypatch):
    """8 elements of a thread: 16 bytes of bfloat16, 8 of codes; only 4 bytes a program pass through shared memory."""
    compiled = compile_only.compile_for(_launches((9216,), torch.bfloat16, monkeypatch)[-1], 90)
    ptx = compiled.asm["ptx"]
    assert len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)) == 2
    assert len(re.findall(r"st\.global[.\w:]*\.v4\.b32", ptx)) == 1
    assert len(re.findall(r"ld\.global[.\w:]*\.v2\.b32", ptx)) == 2
    assert len(re.findall(r"st\.global[.\w:]*\.v2\.b32", ptx)) == 2
    assert compiled.metadata.shared <= 64
