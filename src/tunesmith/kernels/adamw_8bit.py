"""AdamW with both moments in 8 bits: 2.03 bytes of state a parameter in place of 8.

The step is that of `kernels.adamw`, in float32, on moments that are held in blocks of 256 elements, each an index
into a code of 256 numbers times one float32 scale for the block: block-wise dynamic quantisation, T. Dettmers et al.,
"8-bit Optimizers via Block-wise Quantization" (https://arxiv.org/abs/2110.02861). The code of magnitudes covers
(10⁻ᵉ⁻¹, 10⁻ᵉ] for e = 0 … 6 by the middles of 2⁶⁻ᵉ equal parts (2⁷⁻ᵉ without a sign), with 0 and 1 besides: seven
decades, the largest to one part in a hundred. Three things differ from the paper:

    m   is divided by absmax / 0.99297, the largest code that both signs have; −1 has none, and a largest m that
        is negative would lose 0.7% of itself in each step, beside the 10% that it should.
    √v  is held in place of v. The root is what divides, so relative errors count where it is coded, and its range
        is as wide as that of m: gradients from 3e-7 of the largest in the block on, 6e-4 with v itself.
    √v  is rounded stochastically and never to 0. v changes by 0.1% in a step and codes are 0.7% to 70% apart:
        rounded to the nearest it would stand still once gradients become smaller. A root of 0 under an m that is
        not 0 would make a step of any size.

Measured in plain torch with noisy gradients of known size (64 blocks, 2,000 steps): updates are off from those with
float32 moments by 11% where rounding to the nearest v is off by 9%; by 10% and 32% once half of the gradients have
shrunk to 3%; by 30% where sizes inside a block spread over six decades and v itself underflows, so that updates
explode. That is noise without a sign, far below that of the gradients. m is rounded to the nearest: it changes by 10%
in a step, and stochastic rounding added noise (42% in place of 30% in the last case) and nothing else.

Letters: P tensors, B blocks, G groups of options, R rows of a table, K codes, Q blocks of a scale, C their elements.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.kernels.adamw import (
    Options,
    Table,
    advance,
    clip_factor,
    clip_reference,
    constants,
    element_words,
    make_tables,
    option_table,
    point_at,
    pointer_to,
    rounded_reference,
)
from tunesmith.kernels.launch import accumulation_dtype, jit, launch, tl, use_triton
from tunesmith.kernels.stochastic import random_words_reference, to_bfloat16

NAME = "adamw_8bit_"
"""The row of the catalog, and the entry of `launch.switched_off`."""
SCALED = 256
"""Elements that share a scale, as in the paper's successors; 8 bytes of scales for 512 of codes."""
LARGEST = 0.1 + 0.9 * 63.5 / 64
"""The largest code that both signs have."""
SLICE = 1 << 22
"""Elements that the reference computes at once: its temporaries stay small beside the parameters."""


# ---------------------------------------------------------------------- kernels


@jit()
def _magnitude_code(x, threshold, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Index of a magnitude of 0 to 1 among 0, the codes and 1: the upper neighbour where the distance from the lower
    one is more than `threshold` of their gap.

    In units of a decade's parts its codes are at 0, 1, …, n − 1; the last one below lies at −0.6, the first one
    above at n + 2, 0 below the lowest decade at −n/9 − 1/2, and 1 at n − 1/2.
    """
    # at the edge of a decade either side gives the same result, so that an approximate logarithm will do
    decade = tl.floor(tl.log2(tl.maximum(x, 1e-7)) * -0.3010299957)
    e = tl.minimum(tl.maximum(decade, 0.0), 6.0).to(tl.int32)
    power = (
        tl.where((e & 1) != 0, 10.0, 1.0)
        * tl.where((e & 2) != 0, 100.0, 1.0)
        * tl.where((e & 4) != 0, 10000.0, 1.0)
    )
    n = (LEVELS >> e).to(tl.float32)
    part = (x * power - 0.1) * (n * 1.1111111) - 0.5
    cell = tl.floor(part)
    last = part - (n - 1.0)
    low = 1.0 + part / tl.where(e == 6, n * 0.11111111 + 0.5, 0.6)
    high = last * tl.where(e == 0, 2.0, 0.33333333)
    share = tl.where(part < 0.0, low, tl.where(last > 0.0, high, part - cell))
    return (n + cell).to(tl.int32) + tl.where(share > threshold, 1, 0)


@jit()
def _reciprocal(scale):  # type: ignore[no-untyped-def]
    # below 1e-37 it would be infinite
    return tl.where(scale > 1e-37, tl.div_rn(1.0, tl.maximum(scale, 1e-37)), 0.0)


@jit(do_not_specialize=["tensors", "seed"])
def _update_8bit_kernel(  # type: ignore[no-untyped-def]
    address_RP, extent_RP, tensor_B, scalar_RP, code_2K, tensors, seed,
    ELEMENT: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    tensor = tl.load(tensor_B + block)
    scalar = scalar_RP + tensor
    if tl.load(scalar + 9 * tensors) != 0.0:
        ROWS: tl.constexpr = BLOCK // SCALED
        size = tl.load(extent_RP + tensor)
        if ALIGNED:
            size = tl.multiple_of(size, 16)
        row = (block - tl.load(extent_RP + tensors + tensor)) * ROWS + tl.arange(0, ROWS)
        row_live = row * SCALED < size
        at = row[:, None] * SCALED + tl.arange(0, SCALED)[None, :]
        live = at < size
        address = address_RP + tensor
        parameter = pointer_to(address, ELEMENT, ALIGNED) + at
        grad = pointer_to(address + tensors, ELEMENT, ALIGNED) + at
        first = pointer_to(address + 2 * tensors, tl.uint8, ALIGNED) + at
        second = pointer_to(address + 3 * tensors, tl.uint8, ALIGNED) + at
        first_scale = pointer_to(address + 5 * tensors, tl.float32, False) + row
        second_scale = pointer_to(address + 6 * tensors, tl.float32, False) + row

        m = tl.load(code_2K + tl.load(first, mask=live, other=127).to(tl.int32))
        s = tl.load(code_2K + 256 + tl.load(second, mask=live, other=0).to(tl.int32))
        m *= tl.load(first_scale, mask=row_live, other=0.0)[:, None]
        s *= tl.load(second_scale, mask=row_live, other=0.0)[:, None]
        g = tl.load(grad, mask=live, other=0.0).to(tl.float32) * tl.load(scalar)
        m = m * tl.load(scalar + 4 * tensors) + tl.load(scalar + 5 * tensors) * g
        s = tl.sqrt_rn(s * s * tl.load(scalar + 6 * tensors) + tl.load(scalar + 7 * tensors) * g * g)
        p = tl.load(parameter, mask=live, other=0.0).to(tl.float32) * tl.load(scalar + tensors)
        root = s * tl.load(scalar + 3 * tensors) + tl.load(scalar + 8 * tensors)
        p -= tl.load(scalar + 2 * tensors) * tl.div_rn(m, root)

        word = element_words(address_RP, extent_RP, tensor, block, tensors, seed, BLOCK)
        word = tl.reshape(word, (ROWS, SCALED))
        if STOCHASTIC:
            tl.store(parameter, to_bfloat16(p, word), mask=live)
        else:
            tl.store(parameter, p.to(ELEMENT), mask=live)

        m_scale = tl.div_rn(tl.max(tl.abs(m), axis=1), LARGEST)
        s_scale = tl.max(s, axis=1)
        tl.store(first_scale, m_scale, mask=row_live)
        tl.store(second_scale, s_scale, mask=row_live)
        index = _magnitude_code(tl.abs(m) * _reciprocal(m_scale)[:, None], 0.5, 64)
        index = tl.minimum(index, 127)
        tl.store(first, (127 + tl.where(m < 0.0, -index, index)).to(tl.uint8), mask=live)
        threshold = ((word & 0xFFFF).to(tl.float32) + 0.5) * (1.0 / 65536)
        index = _magnitude_code(s * _reciprocal(s_scale)[:, None], threshold, 128) - 1
        tl.store(second, tl.maximum(index, tl.where(s > 0.0, 1, 0)).to(tl.uint8), mask=live)


# ---------------------------------------------------------------------- code


@functools.cache
def dynamic_code(*, signed: bool) -> Tensor:
    """The 256 numbers of the code, ascending, float32 on the CPU."""
    values = [0.0, 1.0]
    for decade in range(7):
        parts = (64 if signed else 128) >> decade
        middles = [(0.1 + 0.9 * (part + 0.5) / parts) / 10**decade for part in range(parts)]
        values += middles + [-middle for middle in middles if signed]
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def _codes(device: torch.device) -> Tensor:
    """Both codes, float32 `[2, K]`."""
    return torch.stack([dynamic_code(signed=True), dynamic_code(signed=False)]).to(device)


def scales_of(elements: int) -> int:
    """Scales that a moment of so many elements has."""
    return -(-elements // SCALED)


def decode(code_C: Tensor, scale_Q: Tensor, *, signed: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that flat uint8 codes stand for; with `signed` the moment m, else √v."""
    numbers_C = _codes(code_C.device)[0 if signed else 1].to(dtype)[code_C.long()]
    return numbers_C * scale_Q.to(dtype).repeat_interleave(SCALED)[: len(numbers_C)]


def _largest(values_C: Tensor) -> Tensor:
    """Largest magnitude of each block."""
    padded = torch.nn.functional.pad(values_C, (0, -len(values_C) % SCALED))
    return padded.view(-1, SCALED).abs().amax(1)


def _relative(values_C: Tensor, scale_Q: Tensor) -> Tensor:
    inverse_Q = torch.where(scale_Q > 1e-37, 1 / scale_Q.clamp(min=1e-37), 0.0)
    return values_C.abs() * inverse_Q.repeat_interleave(SCALED)[: len(values_C)]


def _magnitude_code_reference(x: Tensor, threshold: Tensor | float, levels: int) -> Tensor:
    e = (x.clamp(min=1e-7).log2() * -0.3010299957).floor().clamp(0, 6).long()
    n = (levels >> e).to(x.dtype)
    part = (x * (10**e).to(x.dtype) - 0.1) * (n * 1.1111111) - 0.5
    cell = part.floor()
    last = part - (n - 1)
    low = 1 + part / torch.where(e == 6, n * 0.11111111 + 0.5, 0.6)
    high = last * torch.where(e == 0, 2.0, 0.33333333)
    share = torch.where(part < 0, low, torch.where(last > 0, high, part - cell))
    return (n + cell).long() + (share > threshold)


def encode_signed(values_C: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of m, rounded to the nearest."""
    scale_Q = _largest(values_C) / LARGEST
    index = _magnitude_code_reference(_relative(values_C, scale_Q), 0.5, 64).clamp(max=127)
    return (127 + torch.where(values_C < 0, -index, index)).to(torch.uint8), scale_Q


def encode_root(values_C: Tensor, words_C: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of √v, rounded with the lower 16 bits of random words, and to 0 only where it is 0."""
    scale_Q = _largest(values_C)
    threshold = ((words_C & 0xFFFF).to(values_C.dtype) + 0.5) / 65536
    index = _magnitude_code_reference(_relative(values_C, scale_Q), threshold, 128) - 1
    return torch.maximum(index, (values_C > 0).long()).to(torch.uint8), scale_Q


# ---------------------------------------------------------------------- tables and launchers


def make_tables_8bit(
    parameters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    roots: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    root_scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    groups: Sequence[int],
    numbers: Sequence[int] | None = None,
) -> tuple[Table, ...]:
    """`adamw.make_tables` for moments in 8 bits; `adamw.point_at` and `clip_factor` take them as well."""
    assert all(
        scales.numel() == scales_of(p.numel()) for p, scales in zip(parameters, root_scales, strict=True)
    )
    return make_tables(
        parameters, exp_avgs, roots, steps, groups, numbers=numbers, scales=(exp_avg_scales, root_scales)
    )


def update_8bit_(
    tables: Sequence[Table], option_GR: Tensor, clip_2: Tensor, found_inf: Tensor, seed: int
) -> None:
    """`adamw.update_` for tables of `make_tables_8bit`; the seed is that of the moments' rounding too."""
    for table in tables:
        scalar_RP = advance(table, option_GR, clip_2, found_inf)
        launch(
            _update_8bit_kernel, (len(table.tensor_B),), table.address_RP, table.extent_RP, table.tensor_B,
            scalar_RP, _codes(scalar_RP.device), len(table.members), seed,
            STOCHASTIC=table.dtype == torch.bfloat16, SCALED=SCALED, LARGEST=LARGEST, **constants(table),
        )  # fmt: skip


# ---------------------------------------------------------------------- reference


def adamw_8bit_reference_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    roots: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    root_scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    groups: Sequence[int],
    options: Sequence[Options],
    max_norm: float | None = None,
    found_inf: Tensor | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """`adamw_8bit_` in plain torch."""
    norm, factor, apply = clip_reference(
        gradients, accumulation_dtype(parameters[0].dtype), max_norm, found_inf
    )
    step_8bit_reference_(
        parameters, gradients, exp_avgs, roots, exp_avg_scales, root_scales, steps, groups=groups,
        options=options, factor=factor, apply=apply, seed=seed, numbers=numbers,
    )  # fmt: skip
    return norm, *parameters, *exp_avgs, *roots, *exp_avg_scales, *root_scales, *steps


def step_8bit_reference_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    roots: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    root_scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    groups: Sequence[int],
    options: Sequence[Options],
    factor: Tensor,
    apply: Tensor,
    seed: int,
    numbers: Sequence[int] | None,
) -> None:
    """The step after clipping, as `adamw.step_reference_`."""
    for index, parameter in enumerate(parameters):
        step = steps[index]
        step += apply
        number = index if numbers is None else numbers[index]
        for first in range(0, parameter.numel(), SLICE):
            part = slice(first, first + SLICE)
            scales = slice(first // SCALED, (first + SLICE) // SCALED)
            old = [t[index].view(-1)[part] for t in (parameters, exp_avgs, roots)]
            old += [t[index][scales] for t in (exp_avg_scales, root_scales)]
            gradient = gradients[index].view(-1)[part].to(factor.dtype) * factor
            new = _new_values(old, gradient, step, options[groups[index]], seed, number, first)
            for target, values in zip(old, new, strict=True):
                target.copy_(torch.where(apply, values.to(target.dtype), target))


def _new_values(
    old: Sequence[Tensor], g: Tensor, step: Tensor, options: Options, seed: int, number: int, first: int
) -> tuple[Tensor, ...]:
    """New parameter, codes of m and √v, and their scales, of the elements from `first` on."""
    parameter, code, root_code, scale, root_scale = old
    rate, beta1, beta2, eps, decay = options
    count = step.double()
    m = beta1 * decode(code, scale, signed=True, dtype=g.dtype) + (1 - beta1) * g
    s = decode(root_code, root_scale, signed=False, dtype=g.dtype)
    s = (beta2 * s.square() + (1 - beta2) * g.square()).sqrt()
    size, bias = rate / (1 - beta1**count), (1 - beta2**count).rsqrt()
    p = parameter.to(g.dtype) * (1 - rate * decay) - size.to(g.dtype) * m / (s * bias.to(g.dtype) + eps)
    words = random_words_reference(seed, step, number, range(first, first + g.numel()))
    new = rounded_reference(p, parameter.dtype, seed, step, number, first)
    (new_code, new_scale), (new_root, new_root_scale) = encode_signed(m), encode_root(s, words)
    return new, new_code, new_root, new_scale, new_root_scale


# ---------------------------------------------------------------------- public


def adamw_8bit_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    roots: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    root_scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    groups: Sequence[int],
    options: Sequence[Options],
    max_norm: float | None = None,
    found_inf: Tensor | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """`adamw.adamw_` with moments in 8 bits, in place; parameters in bfloat16 are rounded stochastically.

    Args:
        parameters: contiguous tensors of one device; types may be mixed.
        gradients: each like its parameter; left as they are.
        exp_avgs: codes of the first moments, uint8 of the shapes of their parameters; 127 is zero.
        roots: codes of the roots of the second moments, likewise; 0 is zero.
        exp_avg_scales: float32, one for each 256 elements of the flat parameter.
        root_scales: likewise.
        steps: step counts, float32 scalars.
        groups: the row of `options` that applies to each parameter.
        options: learning rate, β₁, β₂, ε, weight decay.
        max_norm: limit of the norm; None clips nothing.
        found_inf: another value than 0 skips the step, as does a norm that is not finite.
        seed: of the random words.
        numbers: what tells the words of one parameter from those of another; their order by default.

    Returns:
        The norm before clipping, in the accumulation type, and then everything that was written, in the order of
        the arguments.
    """
    if not all(use_triton(parameter, NAME) for parameter in parameters):
        return adamw_8bit_reference_(
            parameters, gradients, exp_avgs, roots, exp_avg_scales, root_scales, steps, groups=groups,
            options=options, max_norm=max_norm, found_inf=found_inf, seed=seed, numbers=numbers,
        )  # fmt: skip
    device = parameters[0].device
    tables = make_tables_8bit(
        parameters, exp_avgs, roots, exp_avg_scales, root_scales, steps, groups, numbers
    )
    point_at(tables, gradients)
    clip_2 = clip_factor(tables, max_norm)
    if found_inf is None:
        found_inf = torch.zeros(1, device=device)
    option_GR = option_table(options, device).to(device, non_blocking=True)
    update_8bit_(tables, option_GR, clip_2, found_inf, seed)
    return clip_2[0], *parameters, *exp_avgs, *roots, *exp_avg_scales, *root_scales, *steps
