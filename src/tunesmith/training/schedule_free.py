"""AdamW without a schedule (https://arxiv.org/abs/2405.15682): an average of the weights in place of a falling rate.

Three points matter: z, which takes the steps; x, the average of all z, which is the result; and y between them, where
gradients are taken. The parameters hold y while the model trains. `measuring` moves them to x, for evaluation,
samples and the result, and back. The way back is a copy: y → x → y by arithmetic is off by roundings, and a run that
was evaluated more often would be another run. A checkpoint holds y as the parameters, and z in the state.

The arithmetic is that of the package `schedulefree`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class ScheduleFree(torch.optim.Optimizer):
    """What `build` puts before `schedulefree`'s optimizer: it is in training mode but within `measuring`."""

    eval: Callable[[], None]
    train: Callable[[], None]

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within the block the parameters are the average; afterwards they are bit for bit as before."""
        if not self._training():  # a block within a block
            yield
            return
        moved = [p for group in self.param_groups for p in group["params"] if "z" in self.state.get(p, {})]
        kept = [parameter.detach().clone() for parameter in moved]
        self.eval()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, before in zip(moved, kept, strict=True):
                    parameter.copy_(before)
            for group in self.param_groups:
                group["train_mode"] = True

    def state_dict(self) -> dict[str, Any]:
        """The state between two steps."""
        assert self._training(), "a checkpoint holds the point where gradients are taken"
        return super().state_dict()

    def _training(self) -> bool:
        return all(group["train_mode"] for group in self.param_groups)


def build(groups: list[dict[str, Any]], rate: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Schedule-free AdamW over these groups; warm-up comes with the learning rate of each step."""
    import schedulefree

    kind: Any = type("ScheduleFreeAdamW", (ScheduleFree, schedulefree.AdamWScheduleFree), {})
    optimizer: Any = kind(groups, lr=rate, betas=betas)
    optimizer.train()
    made: torch.optim.Optimizer = optimizer
    return made
