"""What a run falls back on where a step runs out of memory: its plan's leaner layouts, or those that need no plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tunesmith.config.fit_run import Planned
from tunesmith.distributed.single import SingleDevice
from tunesmith.models.head import CausalModel
from tunesmith.settings.run import RunSettings
from tunesmith.training.replan import Leaner, Replanner


@dataclass
class Measured:
    """Leaner layouts where nothing is planned: layers recomputed, then micro-batches of half the size.

    Attributes:
        policy: in use; fixed: whether it, micro_batch: whether the micro-batch is the user's.
        recompute: has the layers recomputed.
    """

    policy: str
    fixed_policy: bool
    fixed_micro_batch: bool
    recompute: Callable[[], None]

    def down(self, largest: int, longest: int) -> Leaner | None:
        """Recompute, then halve."""
        if not self.fixed_policy and self.policy not in ("recompute", "offload"):
            self.policy = "recompute"
            self.recompute()
            return Leaner("all layers recomputed in backward")
        if not self.fixed_micro_batch and largest > longest:
            tokens = max(longest, largest // 2)
            return Leaner(f"micro-batches of up to {tokens:,} tokens", tokens)
        return None


def replanner_of(
    settings: RunSettings, causal: CausalModel, backend: SingleDevice, planned: Planned | None, policy: str
) -> Replanner:
    """What makes a step again that runs out of memory.

    Args:
        policy: of all layers, where nothing is planned.
    """
    if settings.memory.on_oom == "stop":
        return Replanner(backend, None)
    if planned is not None:
        return Replanner(backend, planned)

    def recompute() -> None:
        causal.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    ladder = Measured(
        policy,
        fixed_policy=settings.memory.policy != "auto",
        fixed_micro_batch=settings.train.micro_batch != "auto",
        recompute=recompute,
    )
    return Replanner(backend, ladder)
