"""Everything that makes a model of transformers faster in anybody's training loop, put on in one call.

Fused layers where architecture and device allow (`install`), and padded batches as packed rows (`open_door`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.models.attention import choose_attention
from tunesmith.models.door import Door, open_door
from tunesmith.models.install import Installed, install


@dataclass(frozen=True)
class Attached:
    """What `attach` put on a model.

    Attributes:
        installed: the fused layers, or None where none were wanted.
        door: the door at the backbone.
    """

    installed: Installed | None
    door: Door

    def table(self) -> list[tuple[str, str, str]]:
        """Rows (what, how, why) for people."""
        return [*(self.installed.table() if self.installed is not None else ()), *self.door.table()]

    def undo(self) -> None:
        """Give the model its stock computation back."""
        self.door.undo()
        if self.installed is not None:
            self.installed.undo()


def attach(model: Any, *, policy: str = "keep", fused: bool | None = None) -> Attached:
    """Give a model fused layers and a door for padded batches, in place and reversibly.

    Args:
        model: a model of transformers with or without a PEFT adapter; the adapter stands already.
        policy: a row of `POLICIES`, what fused layers keep between forward and backward.
        fused: whether layers are fused where their architecture allows; None fuses on a GPU, where it is faster.

    Returns:
        What was put on and what was not, with reasons; `undo()` takes it off.
    """
    device = next(model.parameters()).device
    wanted = device.type == "cuda" if fused is None else fused
    # 16 bits whatever the weights: under autocast float32 weights attend in 16 bits, and float32 falls to sdpa
    attention = choose_attention("auto", device, torch.bfloat16)
    door = open_door(model, attention=attention)  # first: it watches the stock layers attend
    try:
        return Attached(install(model, policy=policy) if wanted else None, door)
    except BaseException:
        door.undo()
        raise
