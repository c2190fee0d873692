"""LoftQ (https://arxiv.org/abs/2310.08659): an adapter that starts from what its 4-bit base lost by rounding.

For a weight W that is held as Q, the start is the best rank-R approximation of W − Q: with W − Q = U·S·V,
B = U·√S / scaling and A = √S·V, cut at R. The base stays as it is, so the adapter loads on the same 4-bit base
anywhere. Rejected: PEFT's `replace_lora_weights_loftq`, which needs a GPU and leaves the adapter's scaling out of
account, and its `init_lora_weights="loftq"`, which rounds a 16-bit base in place and has to be saved with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tunesmith.contracts.errors import UserError
from tunesmith.models.base_weight import base_weight


@torch.no_grad()
def start_from_rounding(model: Any) -> None:
    """Set the adapter of a model with a 4-bit base to make up for the rounding of the base.

    Raises:
        UserError: the checkpoint's own weights are not at hand, or are in 4 bits themselves.
    """
    loaded = model.get_base_model()
    weights = _Weights(loaded.name_or_path, getattr(loaded.config, "_commit_hash", None))
    for name, module in loaded.named_modules():
        if not hasattr(module, "lora_B") or type(module.base_layer).__name__ != "Linear4bit":
            continue
        held_NK = base_weight(module.base_layer)
        lost_NK = weights.read(f"{name}.weight", held_NK.shape).to(held_NK) - held_NK
        u, s, v = torch.linalg.svd(lost_NK, full_matrices=False)
        for adapter, b in module.lora_B.items():
            rank, scaling = min(module.r[adapter], len(s)), module.scaling[adapter]
            root = s[:rank].sqrt()
            module.lora_A[adapter].weight[:rank].copy_(root[:, None] * v[:rank])
            b.weight[:, :rank].copy_(u[:, :rank] * root / scaling)
            if (
                adapter in module.lora_magnitude_vector
            ):  # DoRA: PEFT took the lengths of rows from W as it is held
                lengths_N = module.lora_magnitude_vector[adapter].weight
                lengths_N.copy_(torch.linalg.norm(held_NK + lost_NK, dim=1))


class _Weights:
    """The tensors of a checkpoint in safetensors, by name.

    Args:
        source: a folder or an id on the hub.
        commit: of the hub, whose weights were loaded; those of another one would make up for another rounding.
    """

    def __init__(self, source: str, commit: str | None) -> None:
        from transformers.utils.hub import cached_file

        self._source = source
        local = Path(source).expanduser()
        where = str(local) if local.is_dir() else source
        quiet: dict[str, Any] = {
            "revision": commit,
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_connection_errors": False,
        }
        index = cached_file(where, "model.safetensors.index.json", **quiet)
        names = ["model.safetensors"]
        if index is not None:
            names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        self._files: dict[str, str] = {}
        for file in names:
            path = cached_file(where, file, **quiet)
            if path is not None:
                with safe_open(path, "pt") as opened:
                    self._files |= dict.fromkeys(opened.keys(), path)

    def read(self, name: str, shape: torch.Size) -> Tensor:
        if name in self._files:
            with safe_open(self._files[name], "pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
            if tensor.shape == shape:
                return tensor
        raise UserError(
            f"adapter.init_lora_weights: loftq needs the weights of {self._source} as they were before rounding, "
            f"and its files hold no {name} of that shape.",
            hint="Give the model whose safetensors are in 16 or 32 bits, or leave this at true.",
        )
