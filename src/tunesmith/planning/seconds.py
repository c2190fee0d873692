"""Seconds of a training step, from what it computes and moves and what a card reaches. Torch-free.

    seconds = GEMM operations / their rate + bytes / copying's rate + attention at its own rates + kernels · latency

`amounts` and `step_amounts` count the work, `Rates` says how fast it goes. Most constants are figures of kernels,
each with its source. Six were chosen so that measured steps come out: the rate of GEMMs in steps of two cards
(from the 8B shape with adapters, and from Mistral), a kernel's latency (135M), the start of a step (profiles),
updates in 8 bits (full fine-tuning), and attention's backward in long rows (70B). The 49 measured steps of nine
shapes are then off by 1.5% on average and by 4.2% at most (`tests/planning/test_seconds.py`).

Copies to the host run beside the compute, as `models.offload` lets them: a layer waits only where the link is behind.
The host launches ahead of the device, so a step takes as long as the slower of both, unless it runs from CUDA graphs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from tunesmith.planning import step_amounts
from tunesmith.planning.amounts import Amount, LayerAmounts
from tunesmith.planning.cards import Rates
from tunesmith.planning.facts import LayerFacts, ModelFacts, Work
from tunesmith.planning.graphs import graphs_pay
from tunesmith.planning.policies import HELD, IN_FLIGHT

PASSES = 0.92
"""What passes over memory reach of copying's rate: norms 0.89 to 0.95, RoPE 0.81, the gated unit 0.99 to 1, the
residual 0.87, unpacking 4 bits 0.94 (the table of kernels in benchmarks/RESULTS.md)."""

FEW = 0.75
"""Share of supervised tokens up to which the last layer computes only these after its attention (`models.head`)."""

START_SECONDS = 3e-3
"""From the end of a step, where the host waits for the device, to the kernels of the next one. Profiled steps of 8
layers have gaps of 4 to 7 ms, of which this is what does not grow with the layers. With graphs 1 ms of gaps is
left."""
START_SECONDS_GRAPHS = 0.5e-3

STOCK_PASSES = 4.9
"""Bytes that transformers' own layers with PEFT move for each of a fused layer's, so that 8B QLoRA with checkpointing
comes out: 7,575 tokens/s on an H100 with their own head, which takes 13 ms more than ours."""
STOCK_ATTENTION = 0.55
"""Their attention is torch's FlashAttention: 319 / 264 TFLOP/s where cuDNN's reaches 610 / 467."""
STOCK_HOST = 2.0
"""Time of the host for such a layer: 30 layers of the 135M shape take 153 ms a step, 5 ms each."""


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """Seconds of one layer in one micro-batch.

    Attributes:
        forward: of its forward pass, backward: of its backward pass with what is computed again, each waiting for its
            copies where they take longer, as with all layers alike.
        computing: the same two without the wait.
        link: of its copies to the host, and as long again back.
    """

    forward: float
    backward: float
    computing: tuple[float, float]
    link: float = 0.0

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of an optimizer step, all its micro-batches together.

    Attributes:
        forward: of all layers, what they wait for the link included; backward likewise.
        head: logits, losses and their gradients.
        embeddings: they and the last norm.
        optimizer: clipping and update, and gradients added up over micro-batches.
        start: before the device is busy.
        host: launches, beside the device; 0 with CUDA graphs.
    """

    forward: float
    backward: float
    head: float
    embeddings: float
    optimizer: float
    start: float
    host: float

    @property
    def device(self) -> float:
        """The device's own work."""
        return self.forward + self.backward + self.head + self.embeddings + self.optimizer

    @property
    def total(self) -> float:
        """The whole step."""
        return self.start + max(self.device, self.host)


def seconds_of(amount: Amount, rates: Rates) -> float:
    """Seconds that a card takes for an amount of work."""
    return (
        amount.products / rates.products
        + amount.moved / (PASSES * rates.memory)
        + amount.attention_forward / rates.attention_forward
        + amount.attention_backward / rates.attention_backward
        + amount.kernels * rates.kernel
    )


def stock_amount(amount: Amount) -> Amount:
    """What a layer takes that transformers computes, for what a fused one takes."""
    return replace(
        amount,
        moved=STOCK_PASSES * amount.moved,
        attention_forward=amount.attention_forward / STOCK_ATTENTION,
        attention_backward=amount.attention_backward / STOCK_ATTENTION,
    )


@lru_cache(maxsize=4096)
def layer_seconds(
    layer: LayerFacts,
    work: Work,
    policy: str,
    rates: Rates,
    *,
    rows: int | None = None,
    fused: bool = True,
) -> LayerSeconds:
    """Seconds of a layer forward and backward.

    Args:
        policy: a row of `HELD`.
        rows: tokens that anything reads from its output, None for all.
        fused: whether it is a fused layer; others know the policies keep and recompute.
    """
    held = HELD[policy]
    counted = LayerAmounts(layer, work, work.tokens if rows is None else rows)
    passes = counted.forward(held), counted.backward(held)
    if not fused:
        passes = stock_amount(passes[0]), stock_amount(passes[1])
    bytes_moved = counted.travelling(held)
    # what passes the link also passes the device's memory, beside everything else
    beside = bytes_moved / rates.memory
    forward, backward = (seconds_of(amount, rates) + beside for amount in passes)
    link = bytes_moved / rates.host_link
    return LayerSeconds(max(forward, link), max(backward, link), (forward, backward), link)


def other_seconds(model: ModelFacts, work: Work, rates: Rates) -> dict[str, float]:
    """Seconds of what is not a layer: head and embeddings for one micro-batch, the optimizer for one step."""
    # rows that are read over the link, while nothing is computed
    read = work.tokens * model.hidden * work.itemsize / rates.host_link if work.host_embedding else 0.0
    return {
        "head": seconds_of(step_amounts.head(model, work), rates),
        "embeddings": seconds_of(step_amounts.embeddings(model, work), rates) + read,
        "optimizer": seconds_of(step_amounts.optimizer(model, work), rates),
    }


def step_seconds(
    model: ModelFacts,
    work: Work,
    policies: Sequence[str],
    rates: Rates,
    micro_batches: int = 1,
    *,
    graphs: bool | None = None,
) -> StepSeconds:
    """Seconds of an optimizer step.

    Args:
        work: of one micro-batch.
        policies: one a layer, from the first to the last.
        micro_batches: of the step.
        graphs: whether it runs from CUDA graphs; None where training would.
    """
    if graphs is None:
        graphs = _records(model, work, policies)
    last = work.supervised if work.supervised <= FEW * work.tokens and not model.unfused else None
    count, fused = len(model.layers), not model.unfused
    layers = [
        layer_seconds(layer, work, policy, rates, rows=last if number == count - 1 else None, fused=fused)
        for number, (layer, policy) in enumerate(zip(model.layers, policies, strict=True))
    ]
    other = other_seconds(model, work, rates)
    added = seconds_of(step_amounts.accumulation(model, work), rates)
    host = rates.host_layer * count * (1.0 if fused else STOCK_HOST)
    return StepSeconds(
        forward=micro_batches * forward_seconds(layers),
        backward=micro_batches * backward_seconds(layers),
        head=micro_batches * other["head"],
        embeddings=micro_batches * other["embeddings"],
        optimizer=other["optimizer"] + (micro_batches - 1) * added,
        start=START_SECONDS_GRAPHS if graphs else START_SECONDS,
        host=0.0 if graphs else micro_batches * host,
    )


def _records(model: ModelFacts, work: Work, policies: Sequence[str]) -> bool:
    """Whether training would record CUDA graphs."""
    if model.unfused or work.dropout or any(HELD[policy].moved for policy in policies):
        return False
    parameters = sum(layer.matrix_parameters for layer in model.layers) / len(model.layers)
    return graphs_pay(tokens=work.tokens, layer_parameters=parameters, full=work.full)


def forward_seconds(layers: Sequence[LayerSeconds]) -> float:
    """All layers forward: a layer's memory must have left before `IN_FLIGHT` layers after it are done."""
    now = link = 0.0
    leaving: deque[float] = deque()
    for layer in layers:
        now += layer.computing[0]
        if layer.link:
            link = max(link, now) + layer.link
        leaving.append(link if layer.link else 0.0)
        if len(leaving) > IN_FLIGHT:
            now = max(now, leaving.popleft())
    return now


def backward_seconds(layers: Sequence[LayerSeconds]) -> float:
    """All layers backward: each brings itself back, if nobody has, and the one that travelled before it."""
    travelled = [number for number, layer in enumerate(layers) if layer.link]
    # those among the last have not left
    back = {number: 0.0 for number in travelled if number >= len(layers) - IN_FLIGHT}
    now = link = 0.0
    for number in reversed(range(len(layers))):
        if layers[number].link:
            for wanted in travelled[:-3:-1]:
                if wanted not in back:
                    link = max(link, now) + layers[wanted].link
                    back[wanted] = link
            now = max(now, back[travelled.pop()])
        now += layers[number].computing[1]
    return now
