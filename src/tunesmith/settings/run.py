"""Settings of a run, and `RunSettings`, the whole file."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from tunesmith.settings.base import Section
from tunesmith.settings.data import DataSettings
from tunesmith.settings.model import AdapterSettings, ModelSettings, Patterns
from tunesmith.settings.quantities import Count, Share, Size, Time, TokenCount


class ObjectiveSettings(Section):
    """What is minimised."""

    kind: Literal["sft"] = "sft"
    """`sft`: cross-entropy of the supervised tokens."""


OptimizerName = Literal[
    "adamw",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "adamw_torch_8bit",
    "adamw_torch_4bit",
    "adamw_torch_fp8",
    "schedule_free_adamw",
    "muon",
    "lion_32bit",
    "lion_8bit",
    "ademamix",
    "ademamix_8bit",
    "adafactor",
    "sgd",
]
SchedulerName = Literal["cosine", "linear", "constant", "inverse_sqrt", "cosine_with_min_lr"]


class EarlyStoppingSettings(Section):
    """When a held-out loss that no longer falls ends the run. Only evaluations of `output.eval_every` count."""

    patience: int = Field(ge=1)
    """Evaluations in a row without a new lowest held-out loss after which the run ends."""
    min_delta: float = Field(default=0.0, ge=0)
    """A loss counts as lower where it falls by more than this, in nats per token."""


def _check_regular(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"a regular expression ({error})") from None
    return value


class GroupSettings(Section):
    """Parameters with a learning rate or a weight decay of their own."""

    match: Annotated[
        str, AfterValidator(_check_regular), WithJsonSchema({"type": "string", "format": "regex"})
    ] = Field(min_length=1)
    """A regular expression, looked for anywhere in the names of the parameters, such as `embed_tokens|lm_head` or
    `layers\\.[0-3]\\.`."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate, which follows the same schedule; null is that of the rest."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Decay of all that matches, biases and norm weights too; null is that of the rest."""


class TrainSettings(Section):
    """The optimisation: how rows make a step, how long, and with which optimizer."""

    sequence_length: int = Field(default=2048, ge=8)
    """Longest row in tokens; with packing the capacity of a pack."""
    packing: bool = True
    """Put several documents into one row. Documents never see each other, and the loss of a step stays
    the mean over its supervised tokens."""
    global_batch: Count | TokenCount = 16
    """Rows per optimizer step over all ranks, or a number of tokens such as `32768 tokens`. A row is a
    pack with packing, a document without."""
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Rows per forward and backward pass; `auto` fits them to the memory. Changes speed and memory only."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data; a fraction stops early."""
    steps: Count | TokenCount | None = None
    """Stop after this many optimizer steps; replaces `epochs`. A number of tokens such as `5_000_000 tokens` stops
    with the first step that has taken as many through the model, supervised or not."""
    max_hours: float | None = Field(default=None, gt=0)
    """Stop, save and finish cleanly once this time has passed."""
    early_stopping: EarlyStoppingSettings | None = None
    """Stop once the held-out loss no longer falls; null does not."""
    learning_rate: float = Field(default=2.0e-4, gt=0)
    """Peak learning rate."""
    scheduler: SchedulerName = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup: float = Field(default=0.03, ge=0)
    """Linear warm-up: a fraction of all steps below 1, a number of steps from 1 on."""
    optimizer: OptimizerName = "adamw"
    """The optimizer. `adamw_8bit` holds its moments in 8 bits, about 2 bytes a parameter in place of 8. It, `adamw`
    and torchao's `adamw_torch_8bit`, `_4bit` and `_fp8` train weights in bfloat16 too, rounded stochastically. `muon`
    is for full fine-tuning; `schedule_free_adamw` needs `scheduler: constant`. Paged ones, Lion and AdEMAMix are
    bitsandbytes'."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; not applied to biases and norm weights."""
    groups: Annotated[tuple[GroupSettings, ...], Field(strict=False)] = ()
    """Parameters by name with a learning rate or weight decay of their own; the first that matches counts."""
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    """Moment decay rates of the Adam family and of Lion."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the global gradient norm to this; null does not clip."""
    neftune_alpha: float | None = Field(default=None, gt=0)
    """NEFTune: uniform noise on the embeddings while the model trains, of this strength (5 to 15 are usual) over the
    root of a document's length times the width. null adds none."""
    noise_scale: bool | Annotated[int, Field(ge=1)] = False
    """Measure the gradient noise scale, which says how large a batch is worth it: true at every step, or a number
    for every so many steps. Needs two micro-batches or more in a step."""
    layer_grad_norms: int | None = Field(default=None, ge=1)
    """Measure the gradient norm of each layer every so many steps; null never does."""
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
    "auto",
    "keep_all",
    "keep",
    "keep_offload_attention",
    "recompute_gate_up",
    "offload_attention",
    "recompute_projections",
    "recompute",
    "offload",
    "keep_offload_all",
]


class MemorySettings(Section):
    """What is kept between forward and backward, and where."""

    policy: PolicyName = "auto"
    """What is held, fastest first: `keep_all`: every activation; `keep`: all but the gated activation, which backward
    comes by anyway; `keep_offload_attention`: the same, all but gate and up in host memory; `recompute_gate_up`: all
    but gate and up as well, which are computed again; `offload_attention`: the same, in host memory;
    `recompute_projections`: what attention gave and the stream behind it, so that attention alone is not computed
    again; `recompute`: each layer's input, and the layer runs again; `offload`: the same, in host memory;
    `keep_offload_all`: what `keep` holds, all of it in host memory, for rows so long that layers take as long as the
    copies. `auto`: on a GPU with fused layers one for each layer, such that a step takes the least time within
    `budget`, and where there is room for it 4-bit weights stay unpacked from step to step (`keep_unpacked` and
    `keep_all_unpacked` in plans); elsewhere the first of them under which a row fits. All but `keep` and `recompute`
    need a GPU and fused layers."""
    embedding: Literal["auto", "device", "host"] = "auto"
    """Where the input embedding lies: on the `device`, or in pinned memory of the `host`, from where a step reads the
    rows of its tokens; of a 70B model that frees 2 GiB. `auto`: where a step is faster within `budget`. The host is
    for a GPU with fused layers, and for an embedding that is frozen and not the head as well."""
    budget: Share | Size = 0.92
    """Memory of the GPU that the run may use: a share of all that the card has, or a size such as `24 GiB`. What is
    left of it is for the driver and for gaps between allocations."""
    on_oom: Literal["replan", "stop"] = "replan"
    """What happens where a step runs out of GPU memory all the same. `replan`: the same step is made again under a
    leaner layout of what `policy` and `train.micro_batch` leave at `auto`. `stop`: the run ends."""


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


TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet", "swanlab"]


class OutputSettings(Section):
    """The run directory, checkpoints and evaluation."""

    dir: str = Field(default="runs/first", min_length=1)
    """The run directory: settings, events, loss curve, checkpoints and the result."""
    save_every: Count | Time | None = 200
    """Write a checkpoint every so many steps, or after a time such as `30 minutes` or `2 hours` (and at the end);
    null writes one at the end only."""
    keep: int = Field(default=3, ge=1)
    """Checkpoints kept: the newest ones, and the best by held-out loss besides."""
    eval_every: int | None = Field(default=100, ge=1)
    """Measure the held-out loss every so many steps (and before and after); null never does."""
    sample_every: int | None = Field(default=None, ge=1)
    """Let the model answer a few prompts every so many steps (and before and after); null never does. Training is
    the same with and without, bit for bit."""
    sample_prompts: Patterns | str | None = None
    """What it answers: a list of user messages, or a text or JSONL file of prompts. null takes the first ones that
    are held out, or that train where nothing is."""
    sample_tokens: int = Field(default=96, ge=1)
    """Longest sample answer, in tokens."""
    result: Literal["last", "best"] = "last"
    """Which weights become the result: those of the `last` step, or those with the `best` held-out loss. `best`
    writes a checkpoint at each new lowest loss."""
    track: Annotated[tuple[TrackerName, ...], Field(strict=False)] = ()
    """Where the figures of the run are written besides, such as `[tensorboard, wandb]`. Nothing leaves the machine
    unless you name a tracker here whose service you have logged in to."""
    project: str = Field(default="tunesmith", min_length=1)
    """What trackers group runs under."""
    run_name: str | None = Field(default=None, min_length=1)
    """What trackers call the run; null takes the name of the run directory."""
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
