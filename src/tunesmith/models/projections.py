"""Reads what a linear layer is at this moment: base weight and bias, whether they train, and its active adapters.

PEFT's state may change between two calls (another adapter active, adapters disabled, merged, added), and so may what
trains, so nothing is remembered: `read_projection` looks at every call. What it returns refers to modules, not to
tensors, and the tensors are fetched at the moment of use: FSDP2 and ZeRO-3 free them after forward and gather them
again before backward.

Shape suffixes: N output columns, K input columns, R rank, P projections of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.kernels.nf4 import dequantize_nf4


class NotFusableError(Exception):
    """A linear layer is in a state that the fused layer does not compute; says why."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One active LoRA adapter of a projection: y += scaling · dropout(x) Aᵀ Bᵀ."""

    a: nn.Linear
    b: nn.Linear
    scaling: float
    dropout: float


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer with the adapters that are active on it.

    Attributes:
        base: `nn.Linear` or bitsandbytes' `Linear4bit`.
        adapters: in the order in which PEFT adds them.
        trains_weight: whether the base weight itself trains; trains_bias likewise.
    """

    base: Any
    adapters: tuple[Adapter, ...]
    trains_weight: bool = False
    trains_bias: bool = False

    @property
    def rank(self) -> int:
        """Sum of the ranks of the active adapters (R)."""
        return sum(adapter.a.out_features for adapter in self.adapters)


_NO_ADAPTERS: tuple[Adapter, ...] = ()


def read_projection(module: Any) -> Projection:
    """What `module` computes now.

    Raises:
        NotFusableError: it is no plain or 4-bit linear layer, or carries an adapter that is no plain LoRA.
    """
    if not hasattr(module, "lora_A"):
        return _projection(module, _NO_ADAPTERS)
    base = module.base_layer
    if module.disable_adapters or module.merged:
        if module.disable_adapters and module.merged:
            raise NotFusableError(
                "its adapters are disabled while merged"
            )  # PEFT un-merges in its own forward
        return _projection(base, _NO_ADAPTERS)
    adapters = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        if name in module.lora_variant:
            raise NotFusableError(
                f"adapter {name} is {type(module.lora_variant[name]).__name__}, not plain LoRA"
            )
        a, b = module.lora_A[name], module.lora_B[name]
        if b.bias is not None:
            raise NotFusableError(f"adapter {name} has a bias")
        drop = module.lora_dropout[name]
        rate = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
        adapters.append(Adapter(a, b, float(module.scaling[name]), rate))
    if len({adapter.dropout for adapter in adapters}) > 1 or (
        len(adapters) > 1 and adapters[0].dropout > 0.0
    ):
        raise NotFusableError("several adapters are active, with dropout masks of their own")
    return _projection(base, tuple(adapters))


def _projection(base: Any, adapters: tuple[Adapter, ...]) -> Projection:
    _check_base(base)
    bias = base.bias
    return Projection(base, adapters, base.weight.requires_grad, bias is not None and bias.requires_grad)


def _check_base(module: Any) -> None:
    kind = type(module).__name__
    if kind == "Linear4bit":
        state = getattr(module.weight, "quant_state", None)
        if state is None or state.quant_type != "nf4":
            raise NotFusableError("its 4-bit weights are not NF4")
    elif not isinstance(module, nn.Linear) or kind not in ("Linear", "FSDPLinear"):
        raise NotFusableError(f"it is a {kind}")


def weight_shape(base: Any) -> tuple[int, int]:
    """Output and input columns of a linear layer, however its weight is held."""
    return base.out_features, base.in_features


def write_weight(base: Any, out_NK: Tensor) -> None:
    """Write the base weight into `out_NK`, dequantised where it is held in 4 bits."""
    weight = base.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        out_NK.copy_(weight)
        return
    nested = None
    if state.nested:
        inner = state.state2
        nested = (state.absmax, inner.absmax, inner.code, state.offset, inner.blocksize)
    dequantize_nf4(
        weight.data.view(torch.uint8).flatten(), state.absmax, out_NK,
        code=state.code, blocksize=state.blocksize, nested=nested,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Group:
    """Projections that read the same input and write side by side into one output.

    Attributes:
        projections: in the order of their columns.
    """

    projections: tuple[Projection, ...]

    @property
    def widths(self) -> list[int]:
        """Output columns of each projection."""
        return [weight_shape(projection.base)[0] for projection in self.projections]

    @property
    def columns(self) -> int:
        """Output columns of the group (N)."""
        return sum(self.widths)

    @property
    def inputs(self) -> int:
        """Input columns (K)."""
        return weight_shape(self.projections[0].base)[1]

    @property
    def rank(self) -> int:
        """The largest rank among the projections (R); 0 where there is no adapter at all."""
        return max(projection.rank for projection in self.projections)

    @property
    def dropout(self) -> float:
        """The largest dropout rate among the adapters."""
        return max((a.dropout for p in self.projections for a in p.adapters), default=0.0)

    @property
    def trains(self) -> bool:
        """Whether any weight or bias of the projections themselves trains."""
        return self.trains_weight or any(projection.trains_bias for projection in self.projections)

    @property
    def trains_weight(self) -> bool:
        """Whether any of their weights trains."""
        return any(projection.trains_weight for projection in self.projections)

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Type of the adapters' parameters, in which their gradients are."""
        return next(adapter.a.weight.dtype for p in self.projections for adapter in p.adapters)

    @property
    def foldable(self) -> int:
        """Columns of all adapters side by side (P·R) where the gradient's GEMM can take them along, else 0."""
        ranks = len(self.projections) * self.rank
        # rows of a GEMM operand begin at multiples of 16 bytes
        return ranks if ranks % 8 == 0 and self.dropout == 0.0 else 0

    def weight(self, dtype: torch.dtype, *, below: int = 0, beside: int = 0) -> Tensor:
        """The group's weight `[N, K]` in `dtype`: a view where it lies in one piece already, else a new buffer.

        Args:
            below: rows of undefined content that are wanted below it, `[N + below, K]`.
            beside: columns of undefined content that are wanted beside it, `[N, K + beside]`.

        A view may lack what is wanted, and is then `[N, K]`.
        """
        bases = [projection.base for projection in self.projections]
        whole = _adjacent([base.weight for base in bases], dtype, below)
        if whole is not None:
            return whole
        device = bases[0].weight.device
        out_NK = torch.empty(self.columns + below, self.inputs + beside, dtype=dtype, device=device)
        weight_NK = out_NK[: self.columns, : self.inputs]
        for base, rows_NK in zip(bases, weight_NK.split(self.widths), strict=True):
            write_weight(base, rows_NK)
        return out_NK

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The group's bias `[N]`, or None where no projection has one."""
        biases = [projection.base.bias for projection in self.projections]
        if all(bias is None for bias in biases):
            return None
        device = self.projections[0].base.weight.device
        return torch.cat([
            torch.zeros(width, dtype=dtype, device=device) if bias is None else bias.to(dtype)
            for bias, width in zip(biases, self.widths, strict=True)
        ])  # fmt: skip


SPARE_ROWS = 96
"""Rows that `join_weights` leaves free below a group's weights, for adapters up to rank 32 of q, k and v, or one of
up to 96 on a matrix that holds all three."""
_SPARE = "tunesmith_spare_rows"


def _adjacent(weights: Sequence[Tensor], dtype: torch.dtype, below: int = 0) -> Tensor | None:
    """One view over weights whose rows follow each other in memory, as `join_weights` lays them."""
    first = weights[0]
    if first.dtype != dtype or first.ndim != 2 or not first.is_contiguous():
        return None
    if len(weights) == 1 and not hasattr(first, _SPARE):
        return first.detach()
    at, storage = first.data_ptr(), first.untyped_storage()
    for weight in weights:
        fits = weight.dtype == dtype and weight.is_contiguous() and weight.data_ptr() == at
        if not fits or weight.untyped_storage().data_ptr() != storage.data_ptr():
            return None
        at += weight.numel() * weight.element_size()
    rows = sum(weight.shape[0] for weight in weights)
    spare = getattr(weights[-1], _SPARE, 0)
    # an engine may have moved the weights into a buffer of its own, where others follow them
    whole = first.storage_offset() == 0
    whole = whole and storage.nbytes() == (rows + spare) * first.shape[1] * first.element_size()
    if whole and below <= spare:
        rows += below
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())


@torch.no_grad()
def join_weights(bases: Sequence[Any]) -> None:
    """Lay the weights of plain linear layers one after the other, so that one GEMM serves them and their adapters.

    Each stays a contiguous parameter of its own with its name and shape; only its storage moves. 4-bit weights
    are left alone: they are dequantised side by side anyway. So are those that an engine has sharded already
    (FSDP2's are `DTensor`s): they have no memory of their own, and what is gathered later lies elsewhere.
    """
    weights = [base.weight for base in bases]
    plain = all(
        type(w) is nn.Parameter and w.ndim == 2 and w.is_floating_point() and w.dtype == weights[0].dtype
        for w in weights
    )
    alone = len(weights) == 1 and not hasattr(weights[0], _SPARE)  # in one piece, but with no room below
    if not plain or (not alone and _adjacent(weights, weights[0].dtype) is not None):
        return
    counts = [weight.shape[0] for weight in weights]
    joined = weights[0].new_empty(sum(counts) + SPARE_ROWS, weights[0].shape[1])
    for weight, rows in zip(weights, joined.split([*counts, SPARE_ROWS]), strict=False):
        weight.data = rows.copy_(weight)
    setattr(weights[-1], _SPARE, SPARE_ROWS)


@dataclass(frozen=True, slots=True)
class Operands:
    """The adapters of a group as GEMM operands in the compute type; None without adapters.

    Attributes:
        a_QK: `[P·R, K]`, the A matrices of the projections one below the other, zero rows up to R.
        b_NR: `[N, R]`, the B matrices times their scaling one below the other, zero columns up to R.
    """

    a_QK: Tensor
    b_NR: Tensor


def adapter_parameters(group: Group) -> list[Tensor]:
    """All A and B parameters of a group in a fixed order: per projection and adapter, A then B."""
    return [
        weight
        for projection in group.projections
        for adapter in projection.adapters
        for weight in (adapter.a.weight, adapter.b.weight)
    ]


def own_parameters(group: Group) -> list[Tensor]:
    """The weights and biases of a group that train, in a fixed order: per projection, weight then bias."""
    return [
        parameter
        for projection in group.projections
        for parameter, trains in (
            (projection.base.weight, projection.trains_weight),
            (projection.base.bias, projection.trains_bias),
        )
        if trains
    ]


@torch.no_grad()
def build_operands(groups: Sequence[Group], dtype: torch.dtype) -> list[Operands | None]:
    """Cast the adapters of several groups into GEMM operands, all of them in two or three launches.

    The scaling is multiplied into B in the type of its parameter and rounded once.
    """
    operands: list[Operands | None] = []
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    scaled: list[tuple[int, float]] = []
    for group in groups:
        rank = group.rank
        if rank == 0:
            operands.append(None)
            continue
        ragged = any(projection.rank != rank for projection in group.projections)
        make = torch.zeros if ragged else torch.empty
        device = group.projections[0].base.weight.device
        a_QK = make(len(group.projections) * rank, group.inputs, dtype=dtype, device=device)
        b_NR = make(group.columns, rank, dtype=dtype, device=device)
        operands.append(Operands(a_QK, b_NR))
        for number, (projection, rows_NR) in enumerate(
            zip(group.projections, b_NR.split(group.widths), strict=True)
        ):
            at = 0
            for adapter in projection.adapters:
                width = adapter.a.out_features
                targets += [
                    a_QK[number * rank + at : number * rank + at + width],
                    rows_NR[:, at : at + width],
                ]
                sources += [adapter.a.weight, adapter.b.weight]
                if adapter.scaling != 1.0:
                    scaled.append((len(sources) - 1, adapter.scaling))
                at += width
    if scaled:
        factors = [factor for _, factor in scaled]
        products = torch._foreach_mul([sources[index] for index, _ in scaled], factors)
        for (index, _), product in zip(scaled, products, strict=True):
            sources[index] = product
    if targets:
        torch._foreach_copy_(targets, sources)
    return operands


def split_gradients(group: Group, grad_a_QK: Tensor, grad_b_NR: Tensor) -> list[Tensor]:
    """Gradients of a group's operands as gradients of its parameters, in the order of `adapter_parameters`."""
    grads: list[Tensor] = []
    rank = group.rank
    # B enters as scaling · B, so its gradient carries the scaling
    scalings = {adapter.scaling for projection in group.projections for adapter in projection.adapters}
    common = scalings.pop() if len(scalings) == 1 else None
    if common is not None and common != 1.0:
        grad_b_NR = grad_b_NR * common
    for number, (projection, rows_NR) in enumerate(
        zip(group.projections, grad_b_NR.split(group.widths), strict=True)
    ):
        at = 0
        for adapter in projection.adapters:
            width = adapter.a.out_features
            grad_a = grad_a_QK[number * rank + at : number * rank + at + width]
            grad_b = rows_NR[:, at : at + width]
            if common is None:
                grad_b = grad_b * adapter.scaling
            grads += [grad_a.to(adapter.a.weight.dtype), grad_b.to(adapter.b.weight.dtype)]
            at += width
    return grads
