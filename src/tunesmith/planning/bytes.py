"""What a training step holds at every moment: weights, optimizer, gradients, activations, head. Torch-free.

`timeline` walks a step over the layers as they run, forward and backward, each under a policy of its own, and says
what is alive at the peak of each; the largest of these is the peak of the step. What fused layers allocate is worked
out buffer by buffer (`layer_bytes`), and held equal to the decoder by a test; around them stand the last norm and the
head.

Shape suffixes: T tokens, S supervised tokens, D hidden size, V vocabulary, C rows of a chunk of logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from tunesmith.planning.facts import LayerFacts, ModelFacts, Work, trained_parameters
from tunesmith.planning.fit import STATE_BYTES
from tunesmith.planning.layer_bytes import layer_bytes
from tunesmith.planning.layer_sizes import SPARE_ROWS
from tunesmith.planning.policies import IN_FLIGHT
from tunesmith.planning.tape import rounded

LIBRARIES = 96 << 20
"""What cuBLAS and others allocate for themselves: 60 to 95 MiB in each of two dozen runs on an H100."""

CHUNK_BYTES = 256 << 20
"""Upper bound of one chunk of logits, as `kernels.linear_logprob` has it."""

STOCK_LAST_NORM = {False: (14, 4, 22), True: (18, 8, 18)}
"""Bytes for each element of `[T, D]` of the last norm as transformers computes it, by whether it is a layer norm: the
most forward, what autograd holds, the most backward. Measured with tensors without memory, in 16 bits."""

_NESTED = 256
"""Scales of NF4 blocks that share one of their own."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """Bytes that do not depend on tokens.

    Attributes:
        weights: of the model, as it is held.
        adapter: of the adapters' parameters.
        optimizer: of its state.
        gradients: of everything that trains.
    """

    weights: int
    adapter: int
    optimizer: int
    gradients: int


@dataclass(frozen=True, slots=True)
class Moment:
    """What is alive at the peak of one stretch of a step.

    Attributes:
        label: such as `forward 3`, `head`, `backward 3`.
        activations: what layers hold for backward.
        passing: what the stretch itself needs, gradients of the head and embeddings included.
        gradients: of what trains, so far.
    """

    label: str
    activations: int
    passing: int
    gradients: int

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.activations + self.passing + self.gradients


def matrix_bytes(rows: int, columns: int, quantize: str, itemsize: int) -> int:
    """A weight matrix as it is held."""
    count = rows * columns
    if not count:
        return 0
    if quantize == "nf4":
        blocks = -(-count // 64)
        nested = rounded(-(-blocks // _NESTED) * 4) + rounded(_NESTED * 4) + rounded(16 * 4) + rounded(4)
        return rounded(-(-count // 2)) + rounded(blocks) + nested
    if quantize == "int8":
        return rounded(count) + rounded(rows * 4)
    return rounded(count * itemsize)


def _layer_weights(layer: LayerFacts, work: Work) -> int:
    """All weights of a layer."""
    held = work.trained_itemsize if work.full else work.itemsize
    total = (layer.small_parameters + layer.idle_parameters) * held
    if work.quantize == "none":
        for group, (rows, columns) in layer.matrices.items():
            spare = SPARE_ROWS * columns if group in ("qkv", "gate_up") else 0
            total += rounded((rows * columns + spare) * held)
        return total
    linear = layer.linear
    total += (layer.matrix_parameters - linear.matrix_parameters) * held
    for group, (_, columns) in linear.matrices.items():
        total += sum(matrix_bytes(share, columns, work.quantize, held) for share in linear.outputs(group))
    return total


def table_bytes(model: ModelFacts, work: Work) -> int:
    """The input embedding where it lies in host memory, 0 where it is on the device."""
    return model.table_parameters * work.itemsize if work.host_embedding else 0


def fixed_bytes(model: ModelFacts, work: Work) -> Fixed:
    """What training holds whatever the number of tokens."""
    held = work.trained_itemsize if work.full else work.itemsize
    weights = sum(_layer_weights(layer, work) for layer in model.layers)
    weights += (model.embedding_parameters + model.hidden + model.other_parameters) * held
    weights -= table_bytes(model, work)
    trained = trained_parameters(model, work)
    one = trained * work.trained_itemsize
    return Fixed(weights, 0 if work.full else one, int(STATE_BYTES[work.optimizer] * trained), one)


def head_rows(model: ModelFacts, work: Work) -> int:
    """Rows of a chunk of logits (C)."""
    rows = CHUNK_BYTES // (work.itemsize * model.vocabulary)
    rows = rows // 128 * 128 if rows >= 128 else max(16, rows)
    return min(rows, work.supervised)


def _head(model: ModelFacts, work: Work) -> tuple[int, int]:
    """What the head needs beside the hidden states, forward, and what is left of it until backward."""
    rows, width = work.supervised, model.hidden
    chunk = head_rows(model, work)
    kept = rounded(rows * width * 4)
    weights = model.vocabulary * width * 4 if work.full else 0
    logits = chunk * model.vocabulary * work.itemsize
    passing = rounded(rows * width * work.itemsize) + logits + chunk * width * (work.itemsize + 4)
    return passing + kept + weights, kept + weights


def _inputs(model: ModelFacts, work: Work) -> int:
    """Token and position numbers, and the tables of rotary positions."""
    layer = model.layers[0]
    kinds = len({layer.window is None for layer in model.layers}) if model.model_type == "gemma3_text" else 1
    return work.tokens * (7 * 8 + 2 * kinds * layer.rotary_dim * work.itemsize)


@dataclass(frozen=True, slots=True)
class OnDevice:
    """Bytes on the device of what layers move to the host.

    Attributes:
        forward: while each layer runs forward, and at the end while the norm behind the layers does.
        end: between the passes.
        backward: while each layer runs backward.
    """

    forward: list[int]
    end: int
    backward: list[int]


def on_device(moved: Sequence[int], embedded: int) -> OnDevice:
    """What of the moved tensors is on the device at every moment, as `models.offload` has it.

    A layer's tensors stay until `IN_FLIGHT` layers after it have run forward, whether those move anything or not;
    what has not left by then stays until its layer goes backward. A layer that goes backward brings its own tensors
    back, and at once those of the layer that moved before it, which stay from then on until their own turn.

    Args:
        moved: bytes that each layer moves, from the first to the last; 0 where it moves nothing.
        embedded: bytes of the first layer's input. The model's own forward pass holds on to them until it ends,
            though the layer has moved them.
    """
    count, sums = len(moved), [0, *accumulate(moved)]
    forward = [sums[number] - sums[max(0, number - IN_FLIGHT)] for number in range(count + 1)]
    end = forward[-1]
    if moved[0]:
        forward = [held + embedded * (number > IN_FLIGHT) for number, held in enumerate(forward)]
    moving = [number for number, size in enumerate(moved) if size]
    there = {number for number in moving if number >= count - IN_FLIGHT}
    backward, held = [0] * count, end
    for number in reversed(range(count)):
        if moved[number]:
            for one in moving[-2:]:
                if one not in there:
                    there.add(one)
                    held += moved[one]
            moving.pop()
        backward[number] = held
        if moved[number]:
            there.remove(number)
            held -= moved[number]
    return OnDevice(forward, end, backward)


def timeline(model: ModelFacts, work: Work, policies: Sequence[str]) -> list[Moment]:
    """The peaks of a step's stretches, in order; weights, adapters and the optimizer are not in them, nor are weights
    that layers hold unpacked.

    Args:
        policies: one of `policies.HELD` for each layer.
    """
    costs = [layer_bytes(layer, work, policy) for layer, policy in zip(model.layers, policies, strict=True)]
    rows = rounded(work.tokens * model.hidden * work.itemsize)
    there = on_device([cost.moved for cost in costs], rows)
    held, moments, inputs = 0, [], _inputs(model, work)
    for number, cost in enumerate(costs):
        activations = held + there.forward[number]
        moments.append(Moment(f"forward {number}", activations, inputs + rows + cost.forward, 0))
        held += cost.kept
    moments += _around_the_head(model, work, held, there, inputs + rows)
    gradients = _head_gradients(model, work)
    for number, cost in reversed(list(enumerate(costs))):
        activations = held + there.backward[number]
        moments.append(Moment(f"backward {number}", activations, inputs + cost.backward, gradients))
        held -= cost.kept
        gradients += cost.gradients
    if work.full:
        table = model.vocabulary * model.hidden * work.trained_itemsize
        moments.append(Moment("embeddings", 0, inputs + rows + table, gradients))
    return moments


def _head_gradients(model: ModelFacts, work: Work) -> int:
    if not work.full:
        return 0
    return int(model.vocabulary * model.hidden * work.trained_itemsize)


LAST_NORM = "last norm"
"""The moment at which the norm behind the layers runs forward."""


def _around_the_head(model: ModelFacts, work: Work, held: int, there: OnDevice, passing: int) -> list[Moment]:
    stock = model.stock_last_norm or bool(model.unfused)
    ours = work.itemsize, 0, 2 * work.itemsize
    forward, kept, backward = STOCK_LAST_NORM[model.layers[0].layer_norm] if stock else ours
    elements = work.tokens * model.hidden
    head, left = _head(model, work)
    gradients = _head_gradients(model, work)
    return [
        Moment(LAST_NORM, held + there.forward[-1], passing + forward * elements, 0),
        Moment("head", held + there.end, passing + kept * elements + head, 0),
        Moment(
            "last norm, backward",
            held + there.end,
            passing + (kept + backward) * elements + (left if work.full else 0),
            gradients,
        ),
    ]


def peak_bytes(model: ModelFacts, work: Work, policies: Sequence[str], *, accumulates: bool) -> int:
    """The most that a step allocates on the device.

    Args:
        accumulates: whether gradients of an earlier micro-batch are there already.
    """
    fixed = fixed_bytes(model, work)
    gradients = fixed.gradients
    weights = fixed.weights + unpacked_bytes(model, work, policies)
    most = max(
        moment.activations + moment.passing + (gradients if accumulates else moment.gradients)
        for moment in timeline(model, work, policies)
    )
    # the update: all gradients, and nothing of the passes
    return weights + fixed.adapter + fixed.optimizer + max(most, gradients) + LIBRARIES


def unpacked_bytes(model: ModelFacts, work: Work, policies: Sequence[str]) -> int:
    """4-bit weights that layers hold unpacked, beside those in 4 bits."""
    layers = zip(model.layers, policies, strict=True)
    return sum(layer_bytes(layer, work, policy).unpacked for layer, policy in layers)


def host_bytes(model: ModelFacts, work: Work, policies: Sequence[str]) -> int:
    """What lies in pinned host memory: between forward and backward, and the embedding where it is there."""
    moved = sum(
        layer_bytes(layer, work, policy).moved for layer, policy in zip(model.layers, policies, strict=True)
    )
    return moved + table_bytes(model, work)
