"""AdamW over any number of tensors in four launches: gradient norm (two), step counts, update.

    norm   = (Σ g²)^(1/2) over every gradient                     float32 products, float64 total
    factor = min(1, max_norm / (norm + 1e-6))
    m, v   = β₁ · m + (1 − β₁) · ĝ,  β₂ · v + (1 − β₂) · ĝ²         with ĝ = factor · g
    p      = (1 − lr · λ) · p − lr / (1 − β₁^t) · m / ((v / (1 − β₂^t))^(1/2) + ε)

A LoRA run trains hundreds of small tensors, so that launches and Python, not bytes, are what a step costs. The
kernels therefore find their tensors in a table of addresses on the device, and blocks find their tensor in a map.
Learning rates, clipping factor, step counts and the decision to skip are read from device memory: the host never
waits, and a CUDA graph can replay the launches. Gradients are read and not written: clipping is a factor of the
update. Sums have a fixed order on a given card, without atomics, so that a resumed run repeats every bit.

Moments may be wider than their parameters, and a parameter in bfloat16 may be rounded stochastically, see
`kernels.stochastic`. `kernels.adamw_8bit` uses the same tables for moments in 8 bits.

Rejected: an operator with lists of tensors, as the other kernels have one. `torch.library.custom_op` takes
0.57 ms for four lists of 420 tensors before anything is computed, many times the four launches; the addresses of
420 tensors are read in 0.02 ms. These are plain functions; autograd never sees an optimizer.

Letters: P tensors, B blocks, G groups of options, R rows of a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.launch import (
    accumulation_dtype,
    jit,
    launch,
    multiprocessors,
    power_of_2,
    tl,
    use_triton,
)
from tunesmith.kernels.stochastic import (
    random_words,
    random_words_reference,
    to_bfloat16,
    to_bfloat16_reference,
)

NAME = "adamw_"
"""The row of the catalog, and the entry of `launch.switched_off`."""
BLOCK = 1024
"""Elements of a block: 8 for each of 128 threads, two 16-byte loads of each float32 tensor in flight. With 2,048 the
update of tensors that are not aligned takes 213 registers a thread, and two blocks fill a multiprocessor."""
PROGRAMS_PER_SM = 16
"""Programs of the norm, each of which walks every n-th block: as many as are resident at once."""
ADVANCED = 128
"""Tensors whose step counts one program advances."""

Options = tuple[float, float, float, float, float]
"""Of one group: learning rate, β₁, β₂, ε, weight decay."""


# ---------------------------------------------------------------------- kernels


@jit()
def pointer_to(address, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    pointer = tl.load(address).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit()
def _span(extent_RP, tensor, block, tensors, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets in the tensor of this block's elements, in 64 bits, and which of them exist."""
    size = tl.load(extent_RP + tensor)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    at = (block - tl.load(extent_RP + tensors + tensor)) * BLOCK + tl.arange(0, BLOCK)
    return at, at < size


@jit()
def element_words(  # type: ignore[no-untyped-def]
    address_RP, extent_RP, tensor, block, tensors, seed, BLOCK: tl.constexpr
):  # fmt: skip
    """Random words of a block's elements in the step that is being made, which `_advance_kernel` has counted."""
    step = tl.load(tl.load(address_RP + 4 * tensors + tensor).to(tl.pointer_type(tl.float32)))
    first = (block - tl.load(extent_RP + tensors + tensor)) * BLOCK
    return random_words(seed, step, tl.load(extent_RP + 3 * tensors + tensor), first, BLOCK)


@jit(do_not_specialize=["tensors", "blocks"])
def _norm_kernel(  # type: ignore[no-untyped-def]
    address_RP, extent_RP, tensor_B, partial, tensors, blocks,
    ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        tensor = tl.load(tensor_B + block)
        at, live = _span(extent_RP, tensor, block, tensors, ALIGNED, BLOCK)
        grad = pointer_to(address_RP + tensors + tensor, ELEMENT, ALIGNED)
        g = tl.load(grad + at, mask=live, other=0.0).to(tl.float32)
        total += g * g
    # in float64, where it does not show that threads hold other elements when loads are not of 16 bytes
    tl.store(partial + tl.program_id(0), tl.sum(total.to(tl.float64), axis=0))


@jit(do_not_specialize=["partials"])
def _clip_kernel(partial, clip_2, partials, max_norm, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    squares = tl.load(partial + at, mask=at < partials, other=0.0)
    norm = tl.sqrt(tl.sum(squares, axis=0)).to(tl.float32)
    factor = max_norm / (norm + 1e-6)
    tl.store(clip_2, norm)
    tl.store(clip_2 + 1, tl.where(factor < 1.0, factor, 1.0))


@jit(do_not_specialize=["tensors"])
def _advance_kernel(  # type: ignore[no-untyped-def]
    address_RP, extent_RP, option_GR, clip_2, found_inf, scalar_RP, tensors, BLOCK: tl.constexpr,
):  # fmt: skip
    # β^t is formed in float64: in float32 1 − β₂^t of the first step would be off by 1e-4 of itself
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = tensor < tensors
    apply = (tl.load(found_inf) == 0.0) & (tl.abs(tl.load(clip_2)) < float("inf"))
    step = tl.load(address_RP + 4 * tensors + tensor, mask=live, other=0).to(tl.pointer_type(tl.float32))
    count = tl.load(step, mask=live, other=0.0) + tl.where(apply, 1.0, 0.0)
    tl.store(step, count, mask=live)
    option = option_GR + tl.load(extent_RP + 2 * tensors + tensor, mask=live, other=0) * 7
    rate, beta1, beta2 = tl.load(option), tl.load(option + 1), tl.load(option + 2)
    t = tl.maximum(count, 1.0).to(tl.float64)
    bias1 = 1.0 - tl.exp2(t * tl.load(option + 5))
    bias2 = 1.0 - tl.exp2(t * tl.load(option + 6))
    scalar = scalar_RP + tensor
    tl.store(scalar, tl.where(apply, tl.load(clip_2 + 1), 0.0), mask=live)
    tl.store(scalar + tensors, (1.0 - rate * tl.load(option + 4)).to(tl.float32), mask=live)
    tl.store(scalar + 2 * tensors, (rate / bias1).to(tl.float32), mask=live)
    tl.store(scalar + 3 * tensors, (1.0 / tl.sqrt(bias2)).to(tl.float32), mask=live)
    tl.store(scalar + 4 * tensors, beta1.to(tl.float32), mask=live)
    tl.store(scalar + 5 * tensors, (1.0 - beta1).to(tl.float32), mask=live)
    tl.store(scalar + 6 * tensors, beta2.to(tl.float32), mask=live)
    tl.store(scalar + 7 * tensors, (1.0 - beta2).to(tl.float32), mask=live)
    tl.store(scalar + 8 * tensors, tl.load(option + 3).to(tl.float32), mask=live)
    tl.store(scalar + 9 * tensors, tl.where(apply, 1.0, 0.0), mask=live)


@jit(do_not_specialize=["tensors", "seed"])
def _update_kernel(  # type: ignore[no-untyped-def]
    address_RP, extent_RP, tensor_B, scalar_RP, tensors, seed,
    ELEMENT: tl.constexpr, MOMENT: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    tensor = tl.load(tensor_B + block)
    scalar = scalar_RP + tensor
    if tl.load(scalar + 9 * tensors) != 0.0:
        at, live = _span(extent_RP, tensor, block, tensors, ALIGNED, BLOCK)
        address = address_RP + tensor
        parameter = pointer_to(address, ELEMENT, ALIGNED) + at
        grad = pointer_to(address + tensors, ELEMENT, ALIGNED) + at
        first = pointer_to(address + 2 * tensors, MOMENT, ALIGNED) + at
        second = pointer_to(address + 3 * tensors, MOMENT, ALIGNED) + at
        g = tl.load(grad, mask=live, other=0.0).to(tl.float32) * tl.load(scalar)
        m = tl.load(first, mask=live, other=0.0).to(tl.float32) * tl.load(scalar + 4 * tensors)
        v = tl.load(second, mask=live, other=0.0).to(tl.float32) * tl.load(scalar + 6 * tensors)
        p = tl.load(parameter, mask=live, other=0.0).to(tl.float32) * tl.load(scalar + tensors)
        m += tl.load(scalar + 5 * tensors) * g
        v += tl.load(scalar + 7 * tensors) * g * g
        # correctly rounded: the approximate root takes the v of a gradient below 1e-19 for zero
        root = tl.sqrt_rn(v) * tl.load(scalar + 3 * tensors) + tl.load(scalar + 8 * tensors)
        p -= tl.load(scalar + 2 * tensors) * tl.div_rn(m, root)
        tl.store(first, m.to(MOMENT), mask=live)
        tl.store(second, v.to(MOMENT), mask=live)
        if STOCHASTIC:
            word = element_words(address_RP, extent_RP, tensor, block, tensors, seed, BLOCK)
            tl.store(parameter, to_bfloat16(p, word), mask=live)
        else:
            tl.store(parameter, p.to(ELEMENT), mask=live)


# ---------------------------------------------------------------------- tables and launchers


@dataclass(slots=True)
class Table:
    """Tensors of one type as the kernels find them; it holds addresses, and whoever keeps it keeps the tensors.

    Attributes:
        members: which tensors of the lists it was made from.
        dtype: their type.
        moment_dtype: that of their moments.
        address_RP: int64 rows: parameter, gradient, first moment, second moment, step count, and what else a kernel
            needs for each tensor.
        extent_RP: int64 rows: elements, first block, group, number in the sequence of random words.
        tensor_B: int32, the tensor of each block.
        regular: whether sizes are multiples of 16 and addresses, except those of gradients, of 16 bytes.
        aligned: whether the gradients are too, so that 16 bytes are read at a time.
        gradients: addresses of the gradients, as they are on the device.
    """

    members: tuple[int, ...]
    dtype: torch.dtype
    moment_dtype: torch.dtype
    address_RP: Tensor
    extent_RP: Tensor
    tensor_B: Tensor
    regular: bool
    aligned: bool = False
    gradients: list[int] = field(default_factory=list)


def staged(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers in memory from which the device copies without the host waiting; torch keeps it until it has."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")


def make_tables(
    parameters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    groups: Sequence[int],
    *,
    numbers: Sequence[int] | None = None,
    scales: Sequence[Sequence[Tensor]] = (),
) -> tuple[Table, ...]:
    """One table for each pair of types; `point_at` has to name the gradients before it is used.

    Args:
        parameters: contiguous tensors of one device.
        exp_avgs: first moments, of the shapes of their parameters.
        exp_avg_sqs: second moments, each of the type of the first.
        steps: step counts, float32 scalars on that device.
        groups: the row of options that applies to each parameter.
        numbers: what tells the random words of one parameter from those of another; their order by default.
        scales: rows of further tensors.
    """
    members: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for index, parameter in enumerate(parameters):
        members.setdefault((parameter.dtype, exp_avgs[index].dtype), []).append(index)
    rows = (parameters, exp_avgs, exp_avg_sqs, steps, *scales)
    numbers = range(len(parameters)) if numbers is None else numbers
    return tuple(
        _make_table([[row[i] for i in inside] for row in rows], inside,
                    [groups[i] for i in inside], [numbers[i] for i in inside])
        for inside in members.values()
    )  # fmt: skip


def _make_table(
    tensors: list[list[Tensor]], members: list[int], groups: list[int], numbers: list[int]
) -> Table:
    parameters, exp_avgs = tensors[:2]
    assert all(tensor.is_contiguous() for row in tensors for tensor in row)
    device = parameters[0].device
    sizes = [parameter.numel() for parameter in parameters]
    blocks = torch.tensor([-(-size // BLOCK) for size in sizes])
    first_P = blocks.cumsum(0) - blocks
    parameter, first, second, *rest = ([tensor.data_ptr() for tensor in row] for row in tensors)
    tensor_B = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), blocks)
    address_RP = staged([parameter, [0] * len(sizes), first, second, *rest], torch.int64, device)
    extent_RP = staged([sizes, first_P.tolist(), groups, numbers], torch.int64, device)
    return Table(
        members=tuple(members),
        dtype=parameters[0].dtype,
        moment_dtype=exp_avgs[0].dtype,
        address_RP=address_RP.to(device, non_blocking=True),
        extent_RP=extent_RP.to(device, non_blocking=True),
        tensor_B=(tensor_B.pin_memory() if device.type == "cuda" else tensor_B).to(device, non_blocking=True),
        regular=all(number % 16 == 0 for row in (sizes, parameter, first, second) for number in row),
    )


def point_at(tables: Sequence[Table], gradients: Sequence[Tensor]) -> None:
    """Bring the tables up to date with where the gradients lie: one small copy where an address has changed."""
    for table in tables:
        places = [gradients[index].data_ptr() for index in table.members]
        if places != table.gradients:
            host_P = staged(places, torch.int64, table.address_RP.device)
            table.address_RP[1].copy_(host_P, non_blocking=True)
            table.gradients = places
            table.aligned = table.regular and all(place % 16 == 0 for place in places)


def option_table(options: Sequence[Options], device: torch.device) -> Tensor:
    """Options as the kernels read them, float64 `[G, 7]`, staged: themselves, log₂ β₁ and log₂ β₂."""
    logs = [[math.log2(beta) if beta else -math.inf for beta in row[1:3]] for row in options]
    return staged([[*row, *log] for row, log in zip(options, logs, strict=True)], torch.float64, device)


def element_type(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def constants(table: Table) -> dict[str, Any]:
    return {"ELEMENT": element_type(table.dtype), "ALIGNED": table.aligned, "BLOCK": BLOCK, "num_warps": 4}


def clip_factor(tables: Sequence[Table], max_norm: float | None) -> Tensor:
    """Global gradient norm and the factor that clips it to `max_norm`, as float32 `[2]` on the device."""
    first = tables[0].address_RP
    programs = PROGRAMS_PER_SM * multiprocessors(first)
    partial = torch.empty(len(tables) * programs, dtype=torch.float64, device=first.device)
    clip_2 = torch.empty(2, dtype=torch.float32, device=first.device)
    for index, table in enumerate(tables):
        launch(
            _norm_kernel, (programs,), table.address_RP, table.extent_RP, table.tensor_B,
            partial[index * programs :], len(table.members), len(table.tensor_B), **constants(table),
        )  # fmt: skip
    limit = math.inf if max_norm is None else float(max_norm)
    launch(_clip_kernel, (1,), partial, clip_2, len(partial), limit, BLOCK=power_of_2(len(partial)))
    return clip_2


def advance(table: Table, option_GR: Tensor, clip_2: Tensor, found_inf: Tensor) -> Tensor:
    """Count the step of each tensor, unless it is skipped; returns the factors of its update, float32 `[10, P]`."""
    tensors = len(table.members)
    scalar_RP = torch.empty((10, tensors), dtype=torch.float32, device=option_GR.device)
    launch(
        _advance_kernel, (-(-tensors // ADVANCED),), table.address_RP, table.extent_RP, option_GR, clip_2,
        found_inf, scalar_RP, tensors, BLOCK=ADVANCED, num_warps=4,
    )  # fmt: skip
    return scalar_RP


def update_(
    tables: Sequence[Table],
    option_GR: Tensor,
    clip_2: Tensor,
    found_inf: Tensor,
    seed: int | None = None,
) -> None:
    """One step of every tensor of the tables, none of which changes where the step is to be skipped.

    Args:
        tables: from `make_tables`, with the gradients of this step.
        option_GR: `option_table`, on the device.
        clip_2: from `clip_factor`; a norm that is not finite skips the step.
        found_inf: one float32 on the device; another value than 0 skips the step.
        seed: rounds parameters in bfloat16 stochastically; None rounds to the nearest.
    """
    for table in tables:
        scalar_RP = advance(table, option_GR, clip_2, found_inf)
        launch(
            _update_kernel, (len(table.tensor_B),), table.address_RP, table.extent_RP, table.tensor_B,
            scalar_RP, len(table.members), seed or 0, MOMENT=element_type(table.moment_dtype),
            STOCHASTIC=seed is not None and table.dtype == torch.bfloat16, **constants(table),
        )  # fmt: skip


# ---------------------------------------------------------------------- reference


def clip_reference(
    gradients: Sequence[Tensor], dtype: torch.dtype, max_norm: float | None, found_inf: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, factor that clips it, and whether the step is made, as the kernels find them."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    factor = (math.inf if max_norm is None else max_norm) / (norm + 1e-6)
    apply = norm.isfinite()
    if found_inf is not None:
        apply &= (found_inf == 0).all()
    return norm.to(dtype), factor.clamp(max=1.0).to(dtype), apply


def rounded_reference(
    wide: Tensor, dtype: torch.dtype, seed: int | None, step: Tensor, number: int, first: int = 0
) -> Tensor:
    """New values of a parameter from element `first` on in its own type."""
    if seed is None or dtype != torch.bfloat16:
        return wide.to(dtype)
    words = random_words_reference(seed, step, number, range(first, first + wide.numel()))
    return to_bfloat16_reference(wide, words.view(wide.shape))


def adamw_reference_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    groups: Sequence[int],
    options: Sequence[Options],
    max_norm: float | None = None,
    found_inf: Tensor | None = None,
    seed: int | None = None,
    numbers: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """`adamw_` in plain torch."""
    norm, factor, apply = clip_reference(
        gradients, accumulation_dtype(parameters[0].dtype), max_norm, found_inf
    )
    step_reference_(
        parameters, gradients, exp_avgs, exp_avg_sqs, steps, groups=groups, options=options, factor=factor,
        apply=apply, seed=seed, numbers=numbers,
    )  # fmt: skip
    return norm, *parameters, *exp_avgs, *exp_avg_sqs, *steps


def step_reference_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    groups: Sequence[int],
    options: Sequence[Options],
    factor: Tensor,
    apply: Tensor,
    seed: int | None,
    numbers: Sequence[int] | None,
) -> None:
    """The step after clipping: `factor` and `apply` are those of `clip_reference`, whose type is computed in."""
    dtype = factor.dtype
    for index, parameter in enumerate(parameters):
        rate, beta1, beta2, eps, decay = options[groups[index]]
        m, v, step = exp_avgs[index], exp_avg_sqs[index], steps[index]
        step += apply
        count = step.double()
        gradient = gradients[index].to(dtype) * factor
        new_m = beta1 * m.to(dtype) + (1 - beta1) * gradient
        new_v = beta2 * v.to(dtype) + (1 - beta2) * gradient.square()
        size, root = rate / (1 - beta1**count), (1 - beta2**count).sqrt()
        change = size.to(dtype) * new_m / (new_v.sqrt() / root.to(dtype) + eps)
        new = parameter.to(dtype) * (1 - rate * decay) - change
        number = index if numbers is None else numbers[index]
        rounded = rounded_reference(new, parameter.dtype, seed, step, number)
        for old, wide in ((parameter, rounded), (m, new_m), (v, new_v)):
            old.copy_(torch.where(apply, wide.to(old.dtype), old))


# ---------------------------------------------------------------------- public


def adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    groups: Sequence[int],
    options: Sequence[Options],
    max_norm: float | None = None,
    found_inf: Tensor | None = None,
    seed: int | None = None,
    numbers: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Clip the global gradient norm and make one step of AdamW, in place, at least one tensor.

    Makes its tables anew; an optimizer keeps them and calls `point_at`, `clip_factor` and `update_`.

    Args:
        parameters: contiguous tensors of one device; types may be mixed.
        gradients: each like its parameter; left as they are.
        exp_avgs: first moments, of the shapes of their parameters, in types of their own.
        exp_avg_sqs: second moments, each like the first.
        steps: step counts, float32 scalars.
        groups: the row of `options` that applies to each parameter.
        options: learning rate, β₁, β₂, ε, weight decay.
        max_norm: limit of the norm; None clips nothing.
        found_inf: another value than 0 skips the step, as does a norm that is not finite.
        seed: rounds parameters in bfloat16 stochastically; None rounds to the nearest.
        numbers: what tells the random words of one parameter from those of another; their order by default.

    Returns:
        The norm before clipping, in the accumulation type, and then everything that was written, in the order of
        the arguments.
    """
    if not all(use_triton(parameter, NAME) for parameter in parameters):
        return adamw_reference_(
            parameters, gradients, exp_avgs, exp_avg_sqs, steps, groups=groups, options=options,
            max_norm=max_norm, found_inf=found_inf, seed=seed, numbers=numbers,
        )  # fmt: skip
    device = parameters[0].device
    tables = make_tables(parameters, exp_avgs, exp_avg_sqs, steps, groups, numbers=numbers)
    point_at(tables, gradients)
    clip_2 = clip_factor(tables, max_norm)
    if found_inf is None:
        found_inf = torch.zeros(1, device=device)
    option_GR = option_table(options, device).to(device, non_blocking=True)
    update_(tables, option_GR, clip_2, found_inf, seed)
    return clip_2[0], *parameters, *exp_avgs, *exp_avg_sqs, *steps
