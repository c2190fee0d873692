"""What the fused layers of a model ask of the kernels, for the canary."""

from __future__ import annotations

from typing import Any

from torch import nn

from tunesmith.kernels.canary import ModelShape, Traits
from tunesmith.models.base_of import base_of
from tunesmith.models.install import Installed


def kernel_shape(installed: Installed, *, rank: int, nf4: bool) -> ModelShape:
    """Shapes, kinds of scores and traits of the layers that were fused, which must be some.

    Args:
        rank: the largest rank of an adapter, 0 without.
        nf4: whether weights are dequantised.
    """
    base = base_of(installed.model)
    config, row, shapes = base.config.get_text_config(), installed.row, installed.shapes
    assert row is not None
    shape = shapes[0]
    before, behind = row.norms[::2], row.norms[1::2]
    norm = next(path for path in row.norms if path is not None)
    traits = Traits(
        norm=row.norm,
        norm_bias=getattr(installed.layers[0].get_submodule(norm), "bias", None) is not None,
        norm_offset=row.norm_offset,
        before=any(before),
        behind=any(behind),
        qk_norm=row.qk_norms is not None,
        qk_full=row.qk_full,
        one_qkv=len(row.qkv) == 1,
        one_gate_up=row.gated and len(row.gate_up) == 1,
        activation=shape.activation,
        gated=row.gated,
        rotary_dim=_rotary_dim(base.get_decoder(), shape.heads.size),
        interleaved=row.interleaved,
        spread=row.paired_tables,
        residual_multiplier=shape.residual_multiplier,
        norms_train=_norms_train(installed),
    )
    return ModelShape(
        width=config.hidden_size,
        inner=config.intermediate_size,
        heads=shape.heads,
        rank=rank,
        vocabulary=config.vocab_size,
        nf4=nf4,
        scores=tuple(dict.fromkeys(other.scores for other in shapes)),
        traits=traits,
    )


def _norms_train(installed: Installed) -> bool:
    row = installed.row
    assert row is not None
    paths = [path for path in (*row.norms, *(row.qk_norms or ())) if path is not None]
    modules = (layer.get_submodule(path) for layer in installed.layers for path in paths)
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


def _rotary_dim(backbone: Any, size: int) -> int | None:
    """Columns of a head that the model's tables rotate, or None where it is all."""
    rotary = getattr(backbone, "rotary_emb", None)
    if not isinstance(rotary, nn.Module):
        return None
    frequencies = next((b for name, b in rotary.named_buffers() if name.endswith("inv_freq")), None)
    return None if frequencies is None or 2 * frequencies.shape[0] == size else 2 * frequencies.shape[0]
