"""Settings of a run, and `RunSettings`, the whole file."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from tunesmith.settings.base import Section
from tunesmith.settings.data import DataSettings
from tunesmith.settings.model import AdapterSettings, ModelSettings

_TOKENS = re.compile(r"^\s*(\d[\d_]*)\s*tokens\s*$")


def _check_token_count(value: str) -> str:
    match = _TOKENS.match(value)
    if match is None or int(match.group(1)) < 1:
        raise ValueError("a number of tokens such as '32768 tokens'")
    return value


class ObjectiveSettings(Section):
    """What is minimised."""

    kind: Literal["sft"] = "sft"
    """`sft`: cross-entropy of the supervised tokens."""


OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adafactor", "sgd"]
SchedulerName = Literal["cosine", "linear", "constant", "inverse_sqrt", "cosine_with_min_lr"]


class TrainSettings(Section):
    """The optimisation: how rows make a step, how long, and with which optimizer."""

    sequence_length: int = Field(default=2048, ge=8)
    """Longest row in tokens; with packing the capacity of a pack."""
    packing: bool = True
    """Put several documents into one row. Documents never see each other, and the loss of a step stays
    the mean over its supervised tokens."""
    global_batch: Annotated[int, Field(ge=1)] | Annotated[str, AfterValidator(_check_token_count)] = 16
    """Rows per optimizer step over all ranks, or a number of tokens such as `32768 tokens`. A row is a
    pack with packing, a document without."""
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Rows per forward and backward pass; `auto` fits them to the memory. Changes speed and memory only."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data; a fraction stops early."""
    steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps; replaces `epochs`."""
    max_hours: float | None = Field(default=None, gt=0)
    """Stop, save and finish cleanly once this time has passed."""
    learning_rate: float = Field(default=2.0e-4, gt=0)
    """Peak learning rate."""
    scheduler: SchedulerName = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup: float = Field(default=0.03, ge=0)
    """Linear warm-up: a fraction of all steps below 1, a number of steps from 1 on."""
    optimizer: OptimizerName = "adamw"
    """The optimizer. `adamw_8bit` holds its moments in 8 bits, about 2 bytes a parameter in place of 8; `adamw` and
    `adamw_8bit` train weights in bfloat16 too, rounded stochastically. `paged_adamw_8bit` and `lion_8bit` are
    bitsandbytes'."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; not applied to biases and norm weights."""
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    """Moment decay rates of the Adam family and of Lion."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the global gradient norm to this; null does not clip."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: `stop` the run, or `skip` the step and go on. Either way the
    step is not applied, and its rows are written to the run directory."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seeds the data order, the adapter's initial values and dropout."""
    deterministic: bool = False
    """Use deterministic CUDA algorithms only, so that runs repeat bit for bit; slower. CPU runs always do."""
    cuda_graphs: Literal["auto", "always", "never"] = "auto"
    """Record forward and backward passes as CUDA graphs and replay them: several times faster where a model is too
    small to keep a GPU busy. `auto`: where that is so. Needs fused layers, no dropout, nothing offloaded."""


PolicyName = Literal[
    "auto", "keep_all", "keep", "recompute_gate_up", "offload_attention", "recompute", "offload"
]


class MemorySettings(Section):
    """What is kept between forward and backward."""

    policy: PolicyName = "auto"
    """What is held, fastest first: `keep_all`: every activation; `keep`: all but the gated activation, which backward
    comes by anyway; `recompute_gate_up`: all but gate and up as well, which are computed again; `offload_attention`:
    the same, in host memory; `recompute`: each layer's input, and the layer runs again; `offload`: the same, in host
    memory. `auto`: the first of them under which a row fits. All but `keep` and `recompute` need a GPU and fused
    layers."""


class ParallelSettings(Section):
    """Layout over devices. One device is what this version trains on."""

    engine: Literal["auto", "single"] = "auto"
    """The distributed engine."""
    replicate: int = Field(default=1, ge=1)
    """Data-parallel replicas."""
    shard: int = Field(default=1, ge=1)
    """Ranks that share one copy of the parameters."""
    tensor: int = Field(default=1, ge=1)
    """Tensor-parallel ranks."""
    context: int = Field(default=1, ge=1)
    """Context-parallel ranks."""
    pipeline: int = Field(default=1, ge=1)
    """Pipeline stages."""


class OutputSettings(Section):
    """The run directory, checkpoints and evaluation."""

    dir: str = Field(default="runs/first", min_length=1)
    """The run directory: settings, events, loss curve, checkpoints and the result."""
    save_every: int | None = Field(default=200, ge=1)
    """Write a checkpoint every so many steps (and at the end); null writes one at the end only."""
    keep: int = Field(default=3, ge=1)
    """Checkpoints kept: the newest ones, and the best by held-out loss besides."""
    eval_every: int | None = Field(default=100, ge=1)
    """Measure the held-out loss every so many steps (and before and after); null never does."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the newest intact checkpoint in the run directory; `never` refuses to start
    over a directory that holds one."""


class RunSettings(Section):
    """A whole run file."""

    model: ModelSettings
    adapter: AdapterSettings = AdapterSettings()
    data: DataSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    train: TrainSettings = TrainSettings()
    memory: MemorySettings = MemorySettings()
    parallel: ParallelSettings = ParallelSettings()
    output: OutputSettings = OutputSettings()


def tokens_of_global_batch(global_batch: int | str) -> int | None:
    """The number of tokens that a `'32768 tokens'` global batch asks for; None where it counts rows."""
    if isinstance(global_batch, int):
        return None
    match = _TOKENS.match(global_batch)
    assert match is not None, "validated by TrainSettings"
    return int(match.group(1))
