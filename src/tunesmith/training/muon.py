"""Muon for the hidden matrices of a model, AdamW for the rest, as one optimizer.

Muon (https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest matrix whose
singular values are all one. That is the steepest step for a weight that maps one hidden vector to another. An
embedding is a table of rows and a head reads one vector a token; vectors have no singular values: they train with
AdamW. The update is scaled by 0.2·√max(rows, columns), which gives it the size of AdamW's
(https://arxiv.org/abs/2502.16982), so that both parts take the same learning rate and weight decay.

Refused for LoRA (`config.rules`): what trains is B·A, and a step of B and a step of A, each made orthogonal, are not
an orthogonal step of B·A. Where a model holds q, k and v in one weight, its step is orthogonal as that one matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tunesmith.contracts.errors import UserError

MOMENTUM = 0.95
"""Of Muon's part, the value of its author; `train.betas` are AdamW's."""

Adam = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def hidden_matrices(model: Any) -> set[int]:
    """Identities of the trained weights of linear layers, the head and what is tied to it excepted.

    Experts that are held in one tensor of three dims and matrices that no linear layer multiplies with are not among
    them.
    """
    from transformers.pytorch_utils import Conv1D

    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    excepted = {id(p) for module in (*ends, *tables) if module is not None for p in module.parameters()}
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    return {id(p) for p in weights if p.ndim == 2 and p.requires_grad} - excepted


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers that step together; their groups are the very same dicts as those seen here.

    The state is that of each under its name: `muon` and `adamw`.

    Args:
        groups: of the trained parameters; those marked `apart` are the hidden matrices.
        lr: learning rate of both.
        adamw: makes the optimizer of the other groups.

    Raises:
        UserError: there is no hidden matrix among them.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, adamw: Adam) -> None:
        matrices = [group for group in groups if group.get("apart")]
        others = [group for group in groups if not group.get("apart")]
        if not matrices:
            raise UserError(
                "train.optimizer: muon is for the weights of hidden linear layers, and none of them trains.",
                hint="Use adamw, or take these weights out of model.freeze.",
            )
        self.parts: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(matrices, lr=lr, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
        }
        if others:
            self.parts["adamw"] = adamw(others)
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of each part under its name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self.param_groups = self._groups()  # torch gives a part new dicts
