"""`CASES`, the work; `SYSTEMS`, who does it; `Work`, in which both reach the process that measures. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RANK = 16
"""Of the adapters of all systems, on all projections, with alpha = rank."""

OPTIMIZERS = {"lora": ("adamw", 2e-4), "qlora": ("adamw", 2e-4), "full": ("adamw_8bit", 2e-5)}
"""Optimizer and learning rate by what trains, under our names; the peers' are torch's and bitsandbytes'."""

TITLES = {"lora": "LoRA", "qlora": "QLoRA", "full": "full fine-tuning"}


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of training step.

    Attributes:
        shape: a row of `shapes.SHAPES`.
        adapter: `lora` (16-bit weights), `qlora` (NF4) or `full`: no adapter, all weights train in 16 bits.
        rows, length: rows · length tokens a step.
        systems: rows of `SYSTEMS` in the order in which they run: what is compared stands side by side.
        mean: documents of this mean length instead of equal rows.
        supervised: share of tokens that train.
        expected: seconds that a process is likely to take, start and loading included.
        layers: fewer layers than the shape has.
    """

    shape: str
    adapter: str
    rows: int
    length: int
    systems: tuple[str, ...]
    mean: int | None = None
    supervised: float = 1.0
    steps: int = 8
    warm: int = 3
    expected: int = 80
    layers: int | None = None

    @property
    def title(self) -> str:
        """A line for people."""
        what = f"{self.shape.upper()} {TITLES[self.adapter]}"
        size = f"{self.rows}×{self.length:,} tokens"
        extra = [f"documents of mean length {self.mean}"] if self.mean else []
        extra += [f"{self.supervised:.0%} of positions supervised"] if self.supervised < 1 else []
        extra += [f"{self.layers} layers"] if self.layers else []
        return ", ".join([what, size, *extra])


@dataclass(frozen=True, slots=True)
class System:
    """One way to do the step.

    Attributes:
        module: has `measure(work)`, which yields rows of results.
        kind: `kept` holds activations for backward, `lean` recomputes or moves them; compared within a kind.
        needs: packages without which it is left out.
        options: what `measure` finds in `Work.options`.
        environment: variables of its process.
        packs: takes one packed row only, in every case.
        within: another system, whose peak in the same case on the same card is the memory that this one may use; it
            finds that in `Work.options` as `budget`, in GiB.
    """

    module: str
    kind: str
    needs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    packs: bool = False
    within: str | None = None

    def layouts(self, case: Case) -> tuple[str, ...]:
        """The forms of a batch in which it is measured, rows of `batches.LAYOUTS`."""
        if self.packs:
            return ("packed",)
        return ("packed", "padded") if case.mean else ("rows",)


@dataclass(frozen=True, slots=True)
class Work:
    """What one process measures; plain values, so that it travels as JSON.

    Attributes:
        config: a row of `shapes.SHAPES`, perhaps with fewer layers.
        checkpoint: folder with its weights and a tokenizer.
        layouts: rows of `batches.LAYOUTS`, measured one after the other.
    """

    config: dict[str, Any]
    checkpoint: str
    adapter: str
    rows: int
    length: int
    mean: int | None
    supervised: float
    steps: int
    warm: int
    layouts: list[str]
    options: dict[str, Any]


def _ours(policy: str, kind: str, *, within: str | None = None, **options: Any) -> System:
    options = {"policy": policy, **options}
    return System("benchmarks.peers.with_tunesmith", kind, options=options, packs=True, within=within)


def _transformers(kind: str, *needs: str, **options: Any) -> System:
    return System(
        "benchmarks.peers.with_transformers",
        kind,
        ("transformers", "peft", *needs),
        options,
        {"HF_HUB_OFFLINE": "1"},
    )


def _unsloth(kind: str, checkpointing: str | bool) -> System:
    return System(
        "benchmarks.peers.with_unsloth",
        kind,
        ("unsloth", "unsloth_zoo", "trl", "bitsandbytes"),
        {"checkpointing": checkpointing},
        {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"},
    )


SYSTEMS: dict[str, System] = {
    "tunesmith-plan": _ours("plan", "kept", budget=0.92),
    "tunesmith-plan_kept": _ours("plan", "kept", within="unsloth-none"),
    "tunesmith-plan_lean": _ours("plan", "lean", within="unsloth"),
    "tunesmith-keep_all": _ours("keep_all", "kept"),
    "tunesmith-keep": _ours("keep", "kept"),
    "tunesmith-recompute_gate_up": _ours("recompute_gate_up", "lean"),
    "tunesmith-offload_attention": _ours("offload_attention", "lean"),
    "tunesmith-recompute": _ours("recompute", "lean"),
    "tunesmith-offload": _ours("offload", "lean"),
    "stock": _transformers("kept", checkpointing=False, liger=False),
    "stock-checkpointing": _transformers("lean", checkpointing=True, liger=False),
    "liger": _transformers("lean", "liger_kernel", checkpointing=True, liger=True),
    "unsloth-none": _unsloth("kept", False),
    "unsloth": _unsloth("lean", "unsloth"),
}

_ALL = (
    "tunesmith-plan", "tunesmith-keep", "unsloth-none", "stock", "tunesmith-recompute_gate_up", "unsloth",
    "tunesmith-plan_lean", "tunesmith-offload_attention", "liger", "tunesmith-recompute",
    "stock-checkpointing", "tunesmith-offload",
)  # fmt: skip
_SMALL = ("tunesmith-keep", "unsloth-none", "stock", "unsloth", "liger", "stock-checkpointing")
_KEPT = ("tunesmith-keep", "unsloth-none", "unsloth")
_FULL = (
    "tunesmith-keep", "tunesmith-recompute_gate_up", "tunesmith-recompute", "stock", "stock-checkpointing", "liger"
)  # fmt: skip
_DEEP = (
    "tunesmith-plan", "unsloth-none", "unsloth", "tunesmith-plan_lean", "tunesmith-offload_attention",
    "tunesmith-recompute",
)  # fmt: skip
_FAMILY = (
    "unsloth-none", "tunesmith-plan_kept", "unsloth", "tunesmith-plan_lean", "tunesmith-keep",
    "tunesmith-offload_attention",
)  # fmt: skip

FAMILIES = ("mistral-7b", "qwen2.5-7b", "qwen3-8b", "gemma2-9b", "gemma3-12b", "phi-4")
"""Shapes of other families than Llama's."""

CASES: dict[str, Case] = {
    "8b-qlora": Case("8b", "qlora", 2, 4096, _ALL),
    "8b-lora": Case("8b", "lora", 2, 4096, ("tunesmith-keep_all", *_KEPT, "liger")),
    "8b-qlora-packed": Case("8b", "qlora", 2, 4096, (*_KEPT, "liger"), mean=512, expected=100),
    "8b-qlora-masked": Case("8b", "qlora", 2, 4096, _KEPT, supervised=0.1),
    "8b-full": Case("8b", "full", 1, 4096, _FULL, expected=120),
    "135m-lora": Case("135m", "lora", 8, 512, _SMALL, steps=20, warm=5, expected=50),
    "135m-lora-masked": Case("135m", "lora", 8, 512, _KEPT, supervised=0.1, steps=20, warm=5, expected=50),
    "70b-qlora": Case("70b", "qlora", 1, 4096, _DEEP, steps=6, expected=120, layers=8),
    "70b-qlora-long": Case("70b", "qlora", 1, 32_768, _DEEP, steps=4, warm=2, expected=150, layers=8),
    **{f"{shape}-qlora": Case(shape, "qlora", 2, 4096, _FAMILY, steps=6, expected=90) for shape in FAMILIES},
}
"""`--layers` of `compare.py` makes any of them shallower."""
