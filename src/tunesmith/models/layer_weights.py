"""A layer's own weights where they train: inputs of the node, and their gradients as backward comes by them.

With ∂y the gradient of what a group of projections wrote and x the rows that it read:

    ∂W = ∂yᵀ x        ∂b = Σ_t ∂y_t

One GEMM serves all weights of a group, as one does forward. Each gradient is the rows of its weight in that product,
a contiguous view, which autograd takes as `.grad` without a copy: `AccumulateGrad` does so with whatever nobody else
refers to and is laid out like its parameter. x is never kept for it: the norm's backward kernel writes its rows
again, the activation's kernel the activation, and the output of attention is there. Rejected: ∂W = ((∂y r)ᵀ h) w,
which spares the rows and makes a copy of ∂y instead, rounded once more.

Shape suffixes: T tokens, D hidden size, N output columns, K input columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tunesmith.kernels.launch import accumulation_dtype
from tunesmith.models.adapter_math import product
from tunesmith.models.layer_call import Groups, Norm, Norms
from tunesmith.models.projections import Group, adapter_parameters, own_parameters


def node_parameters(groups: Groups, norms: Norms) -> list[Tensor]:
    """Everything of a layer that trains at this call: by group its adapters and its own, then the norms."""
    found: list[Tensor] = []
    for group in groups:
        found += adapter_parameters(group)
        found += own_parameters(group)
    for norm in norms:
        if norm is not None:
            found += norm_parameters(norm)
    return found


def norm_parameters(norm: Norm) -> list[Tensor]:
    """Weight and bias of a norm, of these what trains."""
    trained = (("weight", norm.trains_weight), ("bias", norm.trains_bias))
    return [getattr(norm.module, name) for name, trains in trained if trains]


@dataclass(slots=True)
class Gradients:
    """Gradients of one layer, collected by the names of its groups and its norms.

    Attributes:
        wide: whether those of weights, biases and norms stay in the type that sums are kept in, because those of
            other tokens are yet to be added.
    """

    adapters: dict[str, list[Tensor]] = field(default_factory=dict)
    own: dict[str, list[Tensor]] = field(default_factory=dict)
    norms: dict[str, list[Tensor]] = field(default_factory=dict)
    wide: bool = False

    def in_order(self) -> list[Tensor]:
        """All of them, in the order of `node_parameters`."""
        found: list[Tensor] = []
        for name in Groups._fields:
            found += self.adapters.get(name, ())
            found += self.own.get(name, ())
        for name in Norms._fields:
            found += self.norms.get(name, ())
        return found

    def put_norm(self, name: str, norm: Norm, *sums_D: Tensor) -> None:
        """Take the gradients of a norm's weight and, where there is one, its bias, as they were summed."""
        self.norms[name] = norm_gradients(norm, sums_D, wide=self.wide)

    def put_own(self, name: str, group: Group, grad_TN: Tensor, x_TK: Tensor | None) -> None:
        """Take ∂W and ∂b of what trains in a group, in the order of `own_parameters`.

        Args:
            grad_TN: gradient of what the group wrote, without the adapters' columns; rows may be strided.
            x_TK: the rows that it read; may be None where only biases train.
        """
        self.own[name] = _own_gradients(group, grad_TN, x_TK, self.wide)

    def add(self, others: Gradients) -> None:
        """Add those of other tokens, in the type that sums are kept in."""
        for mine, theirs in (
            (self.adapters, others.adapters), (self.own, others.own), (self.norms, others.norms),
        ):  # fmt: skip
            for name, grads in theirs.items():
                if name not in mine:
                    mine[name] = [grad.to(accumulation_dtype(grad.dtype)) for grad in grads]
                    continue
                for total, grad in zip(mine[name], grads, strict=True):
                    total += grad

    def take(self, sums: Gradients, groups: Groups, norms: Norms) -> None:
        """Take what others were added up to, each in the type of its parameter."""
        for name, grads in sums.adapters.items():
            self.adapters[name] = _like(grads, adapter_parameters(getattr(groups, name)))
        for name, grads in sums.own.items():
            self.own[name] = _like(grads, own_parameters(getattr(groups, name)))
        for name, grads in sums.norms.items():
            self.norms[name] = _like(grads, norm_parameters(getattr(norms, name)))


def norm_gradients(norm: Norm, sums_D: Sequence[Tensor], *, wide: bool = False) -> list[Tensor]:
    """Gradients of what trains of a norm, in the order of `norm_parameters`.

    Args:
        sums_D: of its weight and, where there is one, its bias.
        wide: as they were summed, not in the types of the parameters.
    """
    wanted = (norm.trains_weight, norm.trains_bias)
    return [
        grad_D if wide else grad_D.to(parameter.dtype)
        for grad_D, parameter, trains in zip(sums_D, (norm.weight, norm.bias), wanted, strict=False)
        if trains and parameter is not None
    ]


def _like(grads: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    return [grad.to(parameter.dtype) for grad, parameter in zip(grads, parameters, strict=True)]


def _own_gradients(group: Group, grad_TN: Tensor, x_TK: Tensor | None, wide: bool) -> list[Tensor]:
    weights, biases = _weights(group, grad_TN, x_TK, wide), _biases(group, grad_TN, wide)
    found: list[Tensor] = []
    for projection in group.projections:
        if projection.trains_weight:
            found.append(next(weights))
        if projection.trains_bias:
            found.append(next(biases))
    return found


def _weights(group: Group, grad_TN: Tensor, x_TK: Tensor | None, wide: bool) -> Iterator[Tensor]:
    trained = [projection.trains_weight for projection in group.projections]
    if not any(trained):
        return
    assert x_TK is not None
    types = [projection.base.weight.dtype for projection in group.projections]
    if wide:
        types = [accumulation_dtype(dtype) for dtype in types]
    if all(trained) and len(set(types)) == 1:
        yield from product(grad_TN.T, x_TK, types[0]).to(types[0]).split(group.widths)
        return
    for columns_TN, dtype, trains in zip(grad_TN.split(group.widths, 1), types, trained, strict=True):
        if trains:
            yield product(columns_TN.T, x_TK, dtype).to(dtype)


def _biases(group: Group, grad_TN: Tensor, wide: bool) -> Iterator[Tensor]:
    if not any(projection.trains_bias for projection in group.projections):
        return
    sum_N = grad_TN.sum(0, dtype=accumulation_dtype(grad_TN.dtype))
    for projection, part_N in zip(group.projections, sum_N.split(group.widths), strict=True):
        if projection.trains_bias:
            yield part_N if wide else part_N.to(projection.base.bias.dtype)
