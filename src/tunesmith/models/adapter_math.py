"""The rank-R side of a projection group: x·Aᵀ on the way in, the gradients on the way back, dropout included.

For one projection with input x, output y and adapter (A, B), s already multiplied into B:

    u = drop(x) Aᵀ                    y += u Bᵀ
    ∂u = ∂y B                         ∂B = ∂yᵀ u
    ∂x += dropᵀ(∂u A)                 ∂A = ∂uᵀ drop(x)

Dropout masks are not kept: each is drawn from a generator whose seed is, and drawn again in backward.

Shape suffixes: T tokens, K input columns, N output columns, Q = P·R columns of all projections' ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tunesmith.models.projections import Group, Operands


def draw_seed() -> int:
    """A seed for the dropout masks of one call, from torch's CPU generator (so that a resumed run draws it too)."""
    return int(torch.randint(0, 2**62, ()).item())


def _masks(group: Group, like_TK: Tensor, seed: int) -> Iterator[tuple[int, Tensor | None]]:
    """Per projection its number and its scaled keep mask `[T, K]`, or None where it has no dropout."""
    for number, projection in enumerate(group.projections):
        rate = max((adapter.dropout for adapter in projection.adapters), default=0.0)
        if rate == 0.0:
            yield number, None
            continue
        generator = torch.Generator(like_TK.device).manual_seed(seed + number)
        keep_TK = torch.empty_like(like_TK).bernoulli_(1 - rate, generator=generator)
        yield number, keep_TK.div_(1 - rate)


def product(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """left · right rounded once, to `dtype` where that is wider: on CUDA the GEMM itself writes float32."""
    if left.is_cuda and dtype == torch.float32 and left.dtype in (torch.bfloat16, torch.float16):
        if out is None:
            return torch.mm(left, right, out_dtype=dtype)
        return torch.mm(left, right, out_dtype=dtype, out=out)
    if dtype.itemsize > left.dtype.itemsize:
        left, right = left.to(dtype), right.to(dtype)
    return left @ right if out is None else out.copy_(left @ right)


def adapter_input(x_TK: Tensor, group: Group, operands: Operands, seed: int) -> Tensor:
    """u `[T, P·R]` of all projections of the group."""
    if group.dropout == 0.0:
        return x_TK @ operands.a_QK.T
    rank = group.rank
    parts = [
        (x_TK if keep_TK is None else x_TK * keep_TK) @ operands.a_QK[n * rank : (n + 1) * rank].T
        for n, keep_TK in _masks(group, x_TK, seed)
    ]
    return torch.cat(parts, dim=1)


def output_gradients(
    grad_TN: Tensor, group: Group, operands: Operands, u_TQ: Tensor, *, grad_u_TQ: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """∂u `[T, P·R]` and ∂B `[N, R]` from the gradient of the group's output.

    Args:
        grad_u_TQ: ∂u where a kernel has computed it already.
    """
    rank, widths = group.rank, group.widths
    if len(widths) == 1:
        if grad_u_TQ is None:
            grad_u_TQ = grad_TN @ operands.b_NR
        return grad_u_TQ, product(grad_TN.T, u_TQ, group.adapter_dtype)
    grads_TN = grad_TN.split(widths, dim=1)
    if grad_u_TQ is None:
        grad_u_TQ = torch.empty_like(u_TQ, memory_format=torch.contiguous_format)
        for grad, b_NR, out in zip(
            grads_TN, operands.b_NR.split(widths), grad_u_TQ.split(rank, dim=1), strict=True
        ):
            torch.mm(grad, b_NR, out=out)
    grad_b_NR = u_TQ.new_empty(group.columns, rank, dtype=group.adapter_dtype)
    for grad, u, out in zip(grads_TN, u_TQ.split(rank, dim=1), grad_b_NR.split(widths), strict=True):
        product(grad.T, u, group.adapter_dtype, out)
    return grad_u_TQ, grad_b_NR


def add_dropped(grad_x_TK: Tensor, group: Group, operands: Operands, grad_u_TQ: Tensor, seed: int) -> None:
    """∂x += dropᵀ(∂u A) in place."""
    if group.dropout == 0.0:
        grad_x_TK.addmm_(grad_u_TQ, operands.a_QK)
        return
    rank = group.rank
    for n, keep_TK in _masks(group, grad_x_TK, seed):
        columns = slice(n * rank, (n + 1) * rank)
        part_TK = grad_u_TQ[:, columns] @ operands.a_QK[columns]
        grad_x_TK += part_TK if keep_TK is None else part_TK.mul_(keep_TK)


def adapter_a_gradient(x_TK: Tensor, group: Group, grad_u_TQ: Tensor, seed: int) -> Tensor:
    """∂A `[P·R, K]` from the group's input and ∂u."""
    if group.dropout == 0.0:
        return product(grad_u_TQ.T, x_TK, group.adapter_dtype)
    rank = group.rank
    return torch.cat([
        product(
            grad_u_TQ[:, n * rank : (n + 1) * rank].T,
            x_TK if keep_TK is None else x_TK * keep_TK,
            group.adapter_dtype,
        )
        for n, keep_TK in _masks(group, x_TK, seed)
    ])  # fmt: skip


def input_gradients(
    grad_x_TK: Tensor, x_TK: Tensor, group: Group, operands: Operands, grad_u_TQ: Tensor, seed: int
) -> Tensor:
    """Add the adapters' part to ∂x in place and return ∂A `[P·R, K]`."""
    add_dropped(grad_x_TK, group, operands, grad_u_TQ, seed)
    return adapter_a_gradient(x_TK, group, grad_u_TQ, seed)
