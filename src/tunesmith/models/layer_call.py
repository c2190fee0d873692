"""What one call of a fused decoder layer works with: its shape, its projections now, its operands and its stash.

Shape suffixes: T tokens, D hidden size, N columns of qkv, K head size or input columns, Q ranks of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith.kernels.attention import Documents, Heads, Scores
from tunesmith.kernels.rope import RotaryLayout
from tunesmith.models.offload import Offloader
from tunesmith.models.policy import Policy
from tunesmith.models.projections import Group, Operands, build_operands
from tunesmith.models.unpacked import Unpacked


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What is constant in a layer.

    Attributes:
        heads: layout of the fused q, k, v buffer.
        eps: of all norms.
        activation: row of the kernel's table, such as `silu`.
        gated: whether the MLP multiplies by a gate.
        norm: kind of the norms around the blocks, `rms` or `layer`.
        norm_offset: added to the norm weights (1 for Gemma).
        parallel: whether both blocks read the layer's input and both results are added to it.
        residual_multiplier: factor on what a block adds.
        scores: scale, window and soft cap of attention.
        rope: whether q and k rotate.
        interleaved: whether columns 2j and 2j + 1 of a head rotate together.
        qk_full: whether norms of q and k, where there are any, are over all heads of a token.
    """

    heads: Heads
    eps: float
    activation: str
    gated: bool = True
    norm: str = "rms"
    norm_offset: float = 0.0
    parallel: bool = False
    residual_multiplier: float = 1.0
    scores: Scores = field(default_factory=Scores)
    rope: bool = True
    interleaved: bool = False
    qk_full: bool = False


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm, as it is at this call; its parameters are read from the module at the moment of use.

    Attributes:
        trains_weight: whether its weight trains; trains_bias likewise.
    """

    module: Any
    trains_weight: bool = False
    trains_bias: bool = False

    @classmethod
    def read(cls, module: Any) -> Norm:
        """What the module is now."""
        bias = getattr(module, "bias", None)
        return cls(module, module.weight.requires_grad, bias is not None and bias.requires_grad)

    @property
    def trains(self) -> bool:
        """Whether anything of it trains."""
        return self.trains_weight or self.trains_bias

    @property
    def weight(self) -> Tensor:
        """Its weight, in its own type: kernels round once, at their end."""
        weight: Tensor = self.module.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """Its bias, where it has one."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias


class Norms(NamedTuple):
    """The norms of a layer, None where there is none: as in `NormPaths`, then those of q and k."""

    before_attention: Norm | None
    behind_attention: Norm | None
    before_mlp: Norm | None
    behind_mlp: Norm | None
    q: Norm | None = None
    k: Norm | None = None


class Groups(NamedTuple):
    """The four groups of projections of a layer, as they are at this call."""

    qkv: Group
    output: Group
    gate_up: Group
    down: Group


@dataclass(frozen=True, slots=True)
class LayerCall:
    """Everything of one call that is no tensor to differentiate.

    Attributes:
        norms: the norms, and what of them trains.
        cos_TK: RoPE cosines of every pair of columns; sin_TK likewise.
        rotary_dim: leading columns of a head that rotate.
        seeds: seeds of the four groups' dropout masks.
        rows: int64 `[S]`, positions of the row that anything reads from this layer's output; None for all.
        tile_tokens: tokens beyond which the MLP is computed in tiles of at most as many, where gate and up are not
            kept (`tiles`); None for never.
        unpacked: where 4-bit weights are held from pass to pass; None where each pass unpacks them.
    """

    shape: LayerShape
    groups: Groups
    norms: Norms
    cos_TK: Tensor
    sin_TK: Tensor
    rotary_dim: int
    documents: Documents
    policy: Policy
    offloader: Offloader
    seeds: tuple[int, int, int, int]
    rows: Tensor | None = None
    tile_tokens: int | None = None
    unpacked: Unpacked | None = None

    @property
    def layout(self) -> RotaryLayout:
        """Columns of the fused buffer, and which of them rotate."""
        heads, shape = self.shape.heads, self.shape
        return RotaryLayout(heads.query, heads.key_value, heads.size, self.rotary_dim, shape.interleaved)

    def only(self, full_TK: Tensor, room: int = 0) -> Tensor:
        """The rows that are read from the layer's output, `[S, K]`, with `room` more columns behind them."""
        if self.rows is None:
            return full_TK
        tokens, columns = self.rows.shape[0], full_TK.shape[1]
        picked_SK = full_TK.new_empty(tokens, columns + room)[:, :columns]
        return picked_SK.copy_(full_TK.index_select(0, self.rows))

    def spread(self, picked_SK: Tensor) -> Tensor:
        """The gradient `[T, K]` of what `only` took its rows from."""
        if self.rows is None:
            return picked_SK
        full_TK = picked_SK.new_zeros(self.cos_TK.shape[0], picked_SK.shape[1])
        return full_TK.index_add_(0, self.rows, picked_SK)  # a position may have two targets

    @property
    def streams_again(self) -> bool:
        """Whether backward makes the stream after attention in one pass, from what the norm behind attention reads.

        Only a policy that keeps what a pass gives keeps it: `keep_all`, with the gated activation.
        """
        behind = self.norms.behind_attention is not None and not self.shape.parallel
        return behind and "act" not in self.policy.keep

    def keeps(self, name: str) -> bool:
        """Whether a large tensor lies between the passes, on the device or the host."""
        return stage_of(name) in self.policy.keep and not (name == "middle" and self.streams_again)

    def rebuilds(self, name: str) -> bool:
        """Whether backward computes a small tensor again, with the stage or the stream that it falls out of."""
        if name == "behind0" and self.streams_again:
            return True
        return name in REBUILT_WITH and REBUILT_WITH[name] not in self.policy.keep


@dataclass(slots=True)
class Stash:
    """What lies between forward and backward.

    Attributes:
        small: rank-wide products and row statistics, kept unless backward comes by them again.
        large: results of the stages, kept by policy.
        backend: the attention backend that computed `output`.
        operands: the adapters cast for the GEMMs.
    """

    small: dict[str, Tensor] = field(default_factory=dict)
    large: dict[str, Tensor] = field(default_factory=dict)
    backend: str = ""
    operands: AllOperands | None = None


def stage_of(name: str) -> str:
    """The stage of a policy whose result a large tensor is, or is part of; `input` for the layer's input."""
    if name == "output" or name.startswith("attention."):
        return "attention"
    return "middle" if name.startswith("branch") else name


REBUILT_WITH = {
    "before0": "qkv",
    "u_qkv": "qkv",
    "before1": "gate_up",
    "u_gate_up": "gate_up",
    "behind0": "middle",
}
"""Small tensors that computing a stage again gives again, most of them out of the same GEMM. Those of the other two
groups stay, 32 bytes a token at rank 16: u_output would take a pass over wide rows, and u_down comes out of the
activation's kernel, which backward does not run again."""


class Weights:
    """Base weights of the groups for one pass, each dequantised at most once, and dropped after its last use unless
    something holds it.

    Args:
        again: whether every weight that a recomputation reads is read once more for a gradient, in the same pass.
        unpacked: what holds 4-bit weights beyond the pass, where something does.
    """

    def __init__(
        self, groups: Groups, dtype: torch.dtype, *, again: bool, unpacked: Unpacked | None = None
    ) -> None:
        self._groups, self._dtype, self._again, self._unpacked = groups, dtype, again, unpacked
        self._held: dict[str, Tensor] = {}
        self._shared: tuple[str, ...] = ()

    @contextmanager
    def shared(self, *names: str) -> Iterator[None]:
        """Read these once and hold them until the end of the context: all tiles of a pass use them."""
        self._shared = names
        try:
            yield
        finally:
            self._shared = ()
            for name in names:
                self._held.pop(name, None)

    def get(self, name: str, operands: Operands | None = None) -> Tensor:
        """The weight `[N, K]` of a group for a forward product.

        Args:
            operands: adapters to put into its buffer where that has room: A below, `[N + Q, K]`, for the groups that
                read the normed stream; B beside, `[N, K + R]`, for those that write onto the residual stream.
        """
        held = self._held.get(name)
        group, weight = self._read(name) if held is None else (getattr(self._groups, name), held)
        if self._again or name in self._shared:
            self._held[name] = weight
        return _joined(name, group, weight, operands)

    def take(self, name: str, operands: Operands | None = None) -> Tensor:
        """The same for the gradient, its last use: dropped when the caller lets go of it, unless it is shared."""
        if name in self._shared:
            return self.get(name, operands)
        held = self._held.pop(name, None)
        group, weight = self._read(name) if held is None else (getattr(self._groups, name), held)
        return _joined(name, group, weight, operands)

    def _read(self, name: str) -> tuple[Group, Tensor]:
        group: Group = getattr(self._groups, name)
        room = {
            "below": group.foldable if name in FOLDS_A else 0,
            "beside": 0 if name in FOLDS_A else beside(group),
        }
        if self._unpacked is not None:
            return group, self._unpacked.read(name, group, self._dtype, **room)
        return group, group.weight(self._dtype, **room)


FOLDS_A = ("qkv", "gate_up")
"""Groups whose GEMM takes the adapters' A along; those of the others take B."""


def beside(group: Group) -> int:
    """Columns beside a group's input and weight that u and B need; rows stay multiples of 128 bytes in 16 bits."""
    return -(-group.foldable // 64) * 64


def _joined(name: str, group: Group, weight: Tensor, operands: Operands | None) -> Tensor:
    columns, inputs = group.columns, group.inputs
    if operands is not None and name in FOLDS_A and weight.shape[0] > columns:
        weight[columns:] = operands.a_QK
        return weight
    if operands is not None and weight.shape[1] > inputs:
        weight[:, inputs : inputs + group.rank] = operands.b_NR
        return weight[:, : inputs + group.rank]
    return weight[:columns, :inputs]


@dataclass(frozen=True, slots=True)
class AllOperands:
    """Adapter operands of the four groups."""

    qkv: Operands | None
    output: Operands | None
    gate_up: Operands | None
    down: Operands | None

    @classmethod
    def build(cls, groups: Groups, dtype: torch.dtype) -> AllOperands:
        """Cast the adapters of all four groups."""
        return cls(*build_operands(groups, dtype))
