"""Replaces the computation of decoder layers on a model's own instances, and can undo it.

No class is patched, no source rewritten, no state-dict key changed: each layer object gets a `forward` of its own
that runs the hand-written node where it computes exactly the same, and the stock forward where it does not
(generation with a KV cache, ready-made masks, adapters of other kinds). `install` says what it replaced and why
not, and takes over `gradient_checkpointing_enable`, whose stock form would wrap the layer a second time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.kernels.attention import Documents
from tunesmith.models.base_of import base_of
from tunesmith.models.decoder import dropout_seeds, run_layer
from tunesmith.models.host_embedding import HostEmbedding, move_embedding_to_host
from tunesmith.models.last_norm import last_norm_forward
from tunesmith.models.layer_call import Groups, LayerCall, LayerShape, Norm, Norms
from tunesmith.models.offload import Offloader
from tunesmith.models.override import is_patched, override, stock_forward
from tunesmith.models.policy import POLICIES, Policy
from tunesmith.models.projections import (
    Group,
    NotFusableError,
    join_weights,
    read_projection,
    weight_shape,
)
from tunesmith.models.read_layer import (
    Part,
    check_layer,
    check_parts,
    linear_paths,
    norm_paths,
    parts_of,
    shape_of,
)
from tunesmith.models.tiles import TILE_TOKENS
from tunesmith.models.unpacked import Unpacked
from tunesmith.planning.architectures import Architecture, find_architecture


@dataclass
class Installed:
    """What `install` did to a model.

    Attributes:
        fused: names of the layers whose computation was replaced.
        stock: (layer, reason) for each that was left alone.
        fallbacks: how often a fused layer ran its stock forward, by reason.
        policies: what each decoder layer, from the first to the last, holds between forward and backward; may be
            changed between steps. Those of layers that are not fused stand for nothing.
        tile_tokens: tokens beyond which the MLP of a layer that does not keep gate and up is computed in tiles of at
            most as many (`tiles`); None for never.
        layers: the fused layers themselves; shapes: the constants of each.
        row: the family of the model, or None where it has no fused layer.
        embedding: the input embedding where it is on the host (`set_embedding_on_host`), else None.
        checkpointing: whether gradient checkpointing was asked for; layers that train then drop a cache, as
            transformers' own do.
    """

    model: Any
    policies: tuple[Policy, ...]
    offloader: Offloader
    fused: list[str] = field(default_factory=list)
    stock: list[tuple[str, str]] = field(default_factory=list)
    fallbacks: Counter[str] = field(default_factory=Counter)
    layers: list[Any] = field(default_factory=list, repr=False)
    shapes: list[LayerShape] = field(default_factory=list, repr=False)
    row: Architecture | None = None
    tile_tokens: int | None = TILE_TOKENS
    embedding: HostEmbedding | None = None
    checkpointing: bool = False
    _unpacked: dict[int, Unpacked] = field(default_factory=dict, repr=False)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def set_policy(self, name: str) -> None:
        """Use another row of `POLICIES` in all layers from the next forward on."""
        self.set_policies([name] * len(self.policies))

    def set_policies(self, names: Sequence[str]) -> None:
        """Use a row of `POLICIES` in each decoder layer, from the first to the last, from the next forward on."""
        assert len(names) == len(self.policies)
        self.policies = tuple(POLICIES[name] for name in names)
        for number, policy in enumerate(self.policies):
            if "weights" not in policy.keep:
                self._unpacked.pop(number, None)

    def unpacked(self, number: int) -> Unpacked | None:
        """What holds the 4-bit weights of a decoder layer from pass to pass; None where its policy does not."""
        if "weights" not in self.policies[number].keep:
            return None
        return self._unpacked.setdefault(number, Unpacked())

    def forget_unpacked(self) -> None:
        """Let go of weights that layers hold unpacked; their next pass makes them again.

        Not where graphs are recorded, which know where these weights lie.
        """
        self._unpacked.clear()

    def set_embedding_on_host(self, wanted: bool) -> None:
        """Hold the input embedding in pinned host memory, or on its device again; between steps.

        Raises:
            NotMovableError, NoHostMemoryError: see `host_embedding.move_embedding_to_host`.
            torch.OutOfMemoryError: see `HostEmbedding.undo`; it is on the host still.
        """
        if self.embedding is not None and not wanted:
            self.embedding.undo()
            self.embedding = None
        elif self.embedding is None and wanted:
            self.embedding = move_embedding_to_host(self.model)

    @property
    def host_bytes(self) -> int:
        """Pinned bytes of the host: what layers move there, and the input embedding."""
        return self.offloader.host_bytes + (0 if self.embedding is None else self.embedding.bytes)

    @property
    def policy(self) -> Policy:
        """The policy of all layers, where they have but one."""
        (policy,) = set(self.policies)
        return policy

    def table(self) -> list[tuple[str, str, str]]:
        """Rows (what, how, why) for people."""
        rows = []
        if self.fused:
            rows.append((f"{len(self.fused)} decoder layers", "fused", f"activations: {self._held()}"))
        reasons = Counter(reason for _, reason in self.stock)
        rows += [(f"{count} decoder layers", "stock", reason) for reason, count in reasons.items()]
        if self.embedding is not None:
            rows.append(("input embedding", "on the host", f"{self.embedding.bytes / 2**30:.2f} GiB pinned"))
        return rows

    def _used(self) -> list[Policy]:
        """The policies of the fused layers."""
        stock = {name for name, _ in self.stock}
        return [policy for n, policy in enumerate(self.policies) if f"layers.{n}" not in stock]

    def _held(self) -> str:
        """Such as `keep`, or `20 layers recompute, 12 keep`."""
        counts = Counter(policy.name for policy in self._used())
        if len(counts) == 1:
            return next(iter(counts))
        (name, count), *others = counts.items()
        parts = [f"{count} layer{'s' * (count > 1)} {name}", *(f"{count} {name}" for name, count in others)]
        return ", ".join(parts)

    def recordable(self) -> str | None:
        """Why a forward and backward pass cannot be recorded once and replayed, or None where it can."""
        if self.stock or not self.fused:
            return "not every decoder layer is fused"
        moving = next((policy.name for policy in self._used() if policy.offload), None)
        if moving is not None:
            return f"{moving} moves activations to the host"
        if any(module.p > 0.0 for module in self.model.modules() if isinstance(module, nn.Dropout)):
            return "dropout draws its seeds on the host"
        return None

    def layer_parameters(self) -> float:
        """Weights of one fused layer on average, those in 4 bits counted one by one."""
        total = sum(math.prod(weight_shape(base)) for layer in self.layers for base in _linear_bases(layer))
        return total / max(1, len(self.layers))

    def undo(self) -> None:
        """Give the model its stock computation back, and the input embedding its place."""
        while self._undo:
            self._undo.pop()()
        self.forget_unpacked()
        self.set_embedding_on_host(False)


class _FusedForward:
    """The `forward` of one layer instance."""

    def __init__(
        self,
        layer: Any,
        row: Architecture,
        shape: LayerShape,
        parts: tuple[Part, ...],
        installed: Installed,
        number: int,
    ) -> None:
        self._stock = stock_forward(layer)
        self._shape = shape
        self._parts = parts
        self._installed = installed
        self._number = number
        # modules are looked up at every call: PEFT replaces a linear layer by a wrapper when an adapter is added
        self._groups = tuple(tuple(map(attrgetter, names)) for names in linear_paths(row))
        self._norms = [path if path is None else attrgetter(path) for path in norm_paths(row)]
        self._table_step = 2 if row.paired_tables else 1

    def __call__(self, layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reason = self._refusal(layer, hidden_states, args, kwargs)
        if reason is None:
            try:
                return self._fused(layer, hidden_states, kwargs)
            except NotFusableError as error:
                reason = str(error)
        self._installed.fallbacks[reason] += 1
        stock: Tensor = self._stock(layer, hidden_states, *args, **kwargs)
        return stock

    def _refusal(
        self, layer: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        """Why this call is not for the fused node, or None."""
        if args:
            return "positional arguments"
        if kwargs.get("attention_mask") is not None:
            return "a ready-made attention mask"
        if kwargs.get("is_causal") is False or getattr(layer.self_attn, "is_causal", True) is False:
            return "attention in both directions"
        cache = kwargs.get("cache")
        if cache is None:  # as older versions call it
            cache = kwargs.get("past_key_values")
        if cache is not None and not self._drops(layer, cache):
            return "a KV cache"
        if kwargs.get("cu_seq_lens_q") is not None and kwargs.get("document_lengths") is None:
            return "document boundaries without document_lengths"
        if kwargs.get("position_embeddings") is None:
            return "no position embeddings"
        if hidden_states.ndim != 3:
            return "hidden states that are not [batch, tokens, hidden]"
        if kwargs.get("document_lengths") is None and hidden_states.shape[0] == 1 and _splits_rows(layer):
            return "a row that flash attention may split at its position ids"
        return None

    def _drops(self, layer: Any, cache: Any) -> bool:
        """Whether the stock layer would leave an empty cache empty, as it does under gradient checkpointing."""
        dropping = self._installed.checkpointing and layer.training and torch.is_grad_enabled()
        return dropping and cache.get_seq_length() == 0

    def _fused(self, layer: Any, hidden_BTD: Tensor, kwargs: dict[str, Any]) -> Tensor:
        installed = self._installed
        groups = Groups(
            *(Group(tuple(read_projection(get(layer)) for get in getters)) for getters in self._groups)
        )
        if any(p.base.weight.numel() == 0 for group in groups for p in group.projections):
            raise NotFusableError("its weights are not gathered: for ZeRO-3 it has to be a leaf module")
        check_parts(layer, self._parts)
        norms = Norms(*(get if get is None else Norm.read(get(layer)) for get in self._norms))
        batch, tokens, width = hidden_BTD.shape
        tables = kwargs["position_embeddings"]
        rotary_dim = tables[0].shape[-1]
        cos_TK, sin_TK = (_rows(table, batch, tokens)[:, :: self._table_step] for table in tables)
        if not self._shape.rope:
            cos_TK, sin_TK = torch.ones_like(cos_TK[:1]), torch.zeros_like(sin_TK[:1])
            cos_TK, sin_TK = (table.expand(batch * tokens, -1) for table in (cos_TK, sin_TK))
        call = LayerCall(
            shape=self._shape,
            groups=groups,
            norms=norms,
            cos_TK=cos_TK,
            sin_TK=sin_TK,
            rotary_dim=rotary_dim,
            documents=_documents(kwargs, batch, tokens, hidden_BTD.device),
            policy=installed.policies[self._number],
            offloader=installed.offloader,
            seeds=dropout_seeds(groups),
            rows=kwargs.get("wanted_rows") if self._number == len(installed.policies) - 1 else None,
            tile_tokens=installed.tile_tokens,
            unpacked=installed.unpacked(self._number),
        )
        out_TD = run_layer(call, hidden_BTD.reshape(batch * tokens, width))
        # a tensor of its own for autograd: FSDP2 hooks backward onto what a layer returns, and warns of views
        out_BTD: Tensor = torch.ops.aten._unsafe_view(out_TD, (batch, -1, width))
        return out_BTD


def _linear_bases(layer: nn.Module) -> list[Any]:
    """The linear layers of a decoder layer without their adapters."""
    wrapped = [module.base_layer for module in layer.modules() if hasattr(module, "base_layer")]
    return wrapped or [module for module in layer.modules() if isinstance(module, nn.Linear)]


def _rows(table_BTK: Tensor, batch: int, tokens: int) -> Tensor:
    """Cosines or sines as `[batch · tokens, K]`."""
    return table_BTK.expand(batch, tokens, -1).reshape(batch * tokens, -1)


def _documents(kwargs: dict[str, Any], batch: int, tokens: int, device: torch.device) -> Documents:
    packed: Documents | None = kwargs.get("packed_documents")
    if packed is not None:
        return packed
    lengths = kwargs.get("document_lengths")
    if lengths is not None:
        return Documents(tuple(lengths), kwargs["cu_seq_lens_q"])
    cu_seqlens = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=device)
    return Documents((tokens,) * batch, cu_seqlens)


def _splits_rows(layer: Any) -> bool:
    """Whether the stock attention takes documents from position ids, which only the device knows."""
    return "flash" in (layer.self_attn.config._attn_implementation or "")


def _decoder_layers(model: Any) -> Sequence[nn.Module]:
    base = base_of(model)
    backbone = base.get_decoder() if hasattr(base, "get_decoder") else base
    layers: Sequence[nn.Module] = getattr(backbone, "layers", ())
    return layers


def install(model: Any, *, policy: str = "keep") -> Installed:
    """Give a model's decoder layers the hand-written computation, in place and reversibly.

    Args:
        model: a causal model of transformers, with or without a PEFT adapter.
        policy: a row of `POLICIES`.

    Returns:
        What was replaced, what was not and why; `undo()` restores the model.
    """
    base = base_of(model)
    device = next(model.parameters()).device
    layers = _decoder_layers(model)
    policies = (POLICIES[policy],) * len(layers)
    installed = Installed(model, policies, Offloader(enabled=device.type == "cuda"))
    config = base.config.get_text_config()
    row, reason = find_architecture(config)
    installed.row = row
    for number, layer in enumerate(layers):
        if row is None:
            installed.stock.append((f"layers.{number}", reason))
            continue
        try:
            check_layer(layer, row)
            parts = parts_of(config, row, layer)
            check_parts(layer, parts)
            shape = shape_of(config, row, layer)
        except (NotFusableError, AttributeError) as error:
            # another version of transformers may have renamed what a row names: never computed without it
            installed.stock.append((f"layers.{number}", str(error)))
            continue
        forward = _FusedForward(layer, row, shape, parts, installed, number)
        _replace_forward(layer, row, forward, installed)
        installed.layers.append(layer)
        installed.shapes.append(shape)
        installed.fused.append(f"layers.{number}")
    if installed.fused:
        _take_over_checkpointing(base, installed)
    if installed.fused and not installed.stock:
        _replace_last_norm(base.get_decoder(), installed)
    return installed


def _replace_last_norm(backbone: Any, installed: Installed) -> None:
    norm = getattr(backbone, "norm", None)
    if norm is None or is_patched(norm):
        return
    if type(norm).__module__.startswith(("transformers.", "torch.nn.")):
        forward = last_norm_forward(type(norm).forward, installed.shapes[-1])
        override(norm, "forward", forward, installed._undo)


def _replace_forward(layer: Any, row: Architecture, forward: _FusedForward, installed: Installed) -> None:
    for names in (row.qkv, row.gate_up):
        join_weights([read_projection(attrgetter(name)(layer)).base for name in names])
    override(layer, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs), installed._undo)


def _take_over_checkpointing(base: Any, installed: Installed) -> None:
    """Map transformers' gradient checkpointing onto policies for as long as the layers are fused."""

    stock_enable = type(base).gradient_checkpointing_enable
    stock_disable = type(base).gradient_checkpointing_disable

    def enable(self: Any, *args: Any, **kwargs: Any) -> None:
        installed.checkpointing = True
        installed.set_policy("recompute")
        if installed.stock:
            stock_enable(self, *args, **kwargs)
            for layer in installed.layers:  # their stock form would be wrapped and recompute a second time
                layer.gradient_checkpointing = False

    def disable(self: Any, *args: Any, **kwargs: Any) -> None:
        installed.checkpointing = False
        installed.set_policy("keep")
        if installed.stock:
            stock_disable(self, *args, **kwargs)

    override(base, "gradient_checkpointing_enable", enable, installed._undo)
    override(base, "gradient_checkpointing_disable", disable, installed._undo)
