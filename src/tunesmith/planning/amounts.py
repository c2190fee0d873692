"""What a decoder layer computes and moves: operations and bytes, before any card is known. Torch-free.

It follows `models.decoder` pass by pass. With T tokens, a layer's group of N output and K input columns takes

    forward     one GEMM of 2 T N K operations, [W; A] or [W | B] where there is an adapter
    backward    one for the gradient of its input, and one for that of its weight where that trains
    4 bits      one pass over the weight forward and one backward, whatever is recomputed

and products with an adapter's few columns are passes over the wide operand: they are as fast as memory, not as GEMMs.
Everything else counts as the bytes that its kernel reads and writes.

Attention counts pairs of a query and a key that it sees: 4 operations for each column of the heads forward, 10
backward. A query costs as much as `EXTRA_KEYS` pairs besides: blocks on the diagonal are computed whole, the softmax
begins and ends, backward passes over its operands before and after.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from tunesmith.planning.facts import LayerFacts, Work
from tunesmith.planning.layer_bytes import streams_again
from tunesmith.planning.layer_sizes import FLOAT, Sizes
from tunesmith.planning.policies import Held
from tunesmith.planning.workspaces import glu_forward_splits

EXTRA_KEYS = (250, 670)
"""Forward and backward. cuDNN on one H100 reaches 569 / 441 TFLOP/s on documents of 4,096 and 324 / 162 on 512, which
these figures explain; they then give 0.88 / 0.76 of the full rate for a window of 1,024 in 4,096, where 0.86 / 0.77
were measured (benchmarks/RESULTS.md)."""

LONG_SHARES = (1.0, 0.8)
"""Of the rate that follows from these, what long documents reach at most: 460 TFLOP/s backward, of which 4,096 tokens
have 441 already. From steps of 32,768 and 120,000 tokens of the 70B shape (the same file)."""

HEAD_SHARES = {64: (0.64, 0.71), 96: (0.76, 0.81), 128: (1.0, 1.0), 256: (1.05, 0.77)}
"""Rate of attention forward and backward by columns of a head, against 128 (the same table)."""

CAPPED_SHARES = (0.69, 0.35)
"""The same where scores are capped, which our own kernels compute with seven products backward in place of five: from
0.69 and 4.55 ms a layer in a profiled Gemma 2 step of 8,192 tokens."""

ADAPTER_PASSES = 1.2
"""What passes that add an adapter's u B of rank 16 take, against those that do not: 1.5 for RoPE, 1.2 for the gated
unit, which computes the u behind it too, and for its backward (the table of kernels there)."""

HELD_BYTES = {"nf4": 0.5 + 1 / 64, "int8": 1.0}
"""Of an element of a quantised weight, scales included."""


@dataclass(frozen=True, slots=True)
class Amount:
    """Work of a part of a step.

    Attributes:
        products: operations of GEMMs.
        moved: bytes that passes read and write.
        kernels: launches.
        attention_forward: operations at the rate of heads of 128 columns; attention_backward likewise.
    """

    products: float = 0.0
    moved: float = 0.0
    kernels: int = 0
    attention_forward: float = 0.0
    attention_backward: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            self.products + other.products,
            self.moved + other.moved,
            self.kernels + other.kernels,
            self.attention_forward + other.attention_forward,
            self.attention_backward + other.attention_backward,
        )


NOTHING = Amount()


def total(amounts: Iterable[Amount]) -> Amount:
    return sum(amounts, NOTHING)


@lru_cache(maxsize=1024)
def pairs(documents: tuple[int, ...], window: int | None) -> int:
    """Pairs of a query and a key that it sees, itself included."""
    total = 0
    for length in documents:
        seen = length if window is None else min(length, window)
        total += seen * (seen + 1) // 2 + (length - seen) * seen
    return total


@dataclass(frozen=True, slots=True)
class LayerAmounts:
    """What one layer computes and moves.

    Attributes:
        rows: tokens that anything reads from its output; all but in a last layer of few supervised tokens.
    """

    layer: LayerFacts
    work: Work
    rows: int

    # ------------------------------------------------------------------ primitives

    def _pass(self, elements: float, count: int = 1) -> Amount:
        """`count` kernels that read and write so many elements of the compute type together."""
        return Amount(moved=elements * self.work.itemsize, kernels=count)

    def _gemm(self, name: str, rows: int, *, alone: bool = False) -> Amount:
        """The product with a group's weight, and with the adapter that lies in its buffer unless it goes `alone`."""
        outputs, inputs = self.layer.matrices[name]
        # A lies below W, B beside it
        extra = 0 if alone else self._ranks(name) * (inputs if name in ("qkv", "gate_up") else outputs)
        return Amount(products=2.0 * rows * (outputs * inputs + extra), kernels=1)

    def _ranks(self, name: str) -> int:
        """Columns of all adapters of a group."""
        return self.work.ranks(self.layer, name)

    def _weight(self, name: str) -> Amount:
        """The weight of a group in the compute type, where it is held in another."""
        work, layer = self.work, self.layer
        # full fine-tuning holds experts as it holds everything; quantisation leaves them as they compute
        rows, columns = (layer if work.full else layer.linear).matrices[name]
        elements = rows * columns
        held = HELD_BYTES.get(work.quantize, work.trained_itemsize if work.full else work.itemsize)
        if held == work.itemsize or not elements:
            return NOTHING
        return Amount(moved=elements * (held + work.itemsize), kernels=len(self.layer.outputs(name)))

    def _masks(self, name: str, rows: int) -> Amount:
        """Dropout: each projection draws a mask, scales it and multiplies a copy of its input."""
        if not (self.work.dropout and self._ranks(name)):
            return NOTHING
        return self._pass(
            6 * rows * self.layer.matrices[name][1] * len(self.layer.outputs(name)),
            4 * len(self.layer.outputs(name)),
        )

    # ------------------------------------------------------------------ forward

    def _norm(self, place: int, rows: int) -> Amount:
        """A norm before a block: reads and writes the stream."""
        return self._pass(2 * rows * self.layer.hidden) if self.layer.norms[place] else NOTHING

    def _read_by(self, name: str, rows: int, *, again: bool) -> Amount:
        """The GEMM of a group that reads the normed stream, and its adapters' u where that is not there yet."""
        found = self._gemm(name, rows)
        if self._ranks(name):
            apart = self.work.dropout and not again
            found += self._pass(rows * self.layer.hidden if apart else 0.0)
        return found if again else found + self._masks(name, rows)

    def _onto(self, name: str, place: int, *, again: bool) -> Amount:
        """The GEMM of a group that writes onto the residual stream, the adapter's u likewise, and the sum."""
        layer, rows = self.layer, self.rows
        found = self._gemm(name, rows)
        single = 3.0
        if self._ranks(name):
            if not again:
                found += self._u(name) + self._masks(name, rows)
            if self.work.quantize == "none" or self.work.dropout:
                single = 4.0  # the product waits in float32
        return found + self._pass(single * rows * layer.hidden, 2 if layer.norms[place] else 1)

    def _u(self, name: str) -> Amount:
        """The adapter's u: a GEMM, or parts of it that the activation's kernel leaves and another one adds."""
        layer, work, rows, ranks = self.layer, self.work, self.rows, self._ranks(name)
        parts = 0
        if name == "down" and not work.dropout:
            parts = glu_forward_splits(rows, layer.inner, ranks, work.itemsize)
        if parts:
            return Amount(moved=2.0 * FLOAT * parts * rows * ranks, kernels=1)
        return self._pass(rows * layer.matrices[name][1], 2)

    def qkv(self, *, again: bool = False) -> Amount:
        """q, k and v as they are kept.

        Args:
            again: whether backward computes them, where the adapters' u is still there; so below.
        """
        layer, tokens = self.layer, self.work.tokens
        found = self._norm(0, tokens) + self._read_by("qkv", tokens, again=again)
        if not layer.qk_norm:
            if self._ranks("qkv"):
                found += self._pass(ADAPTER_PASSES * 2 * tokens * layer.qkv_columns)
            elif layer.rotary_dim:
                found += self._pass(2 * tokens * (layer.q_columns + layer.kv_columns))
        return found

    def _normed_qk(self) -> Amount:
        """The pass that norms and rotates q and k into another buffer."""
        if not self.layer.qk_norm:
            return NOTHING
        return self._pass(self._adding("qkv") * 2 * self.work.tokens * self.layer.qkv_columns)

    def _adding(self, name: str) -> float:
        """How much longer the pass takes that adds the adapters of a group, where it has any."""
        return ADAPTER_PASSES if self._ranks(name) else 1.0

    def attended(self, direction: int) -> float:
        """Operations of attention, at the rate of heads of 128 columns."""
        layer, documents = self.layer, self.work.documents
        size = next((size for size in HEAD_SHARES if layer.head_dim <= size), max(HEAD_SHARES))
        share = (CAPPED_SHARES if layer.softcap else HEAD_SHARES[size])[direction]
        visible = pairs(documents, layer.window)
        seen = max(visible + EXTRA_KEYS[direction] * self.work.tokens, visible / LONG_SHARES[direction])
        return (4.0, 10.0)[direction] * layer.q_columns * seen / share

    def attention(self) -> Amount:
        """The output of attention from q, k and v as they are kept."""
        return self._normed_qk() + Amount(kernels=1, attention_forward=self.attended(0))

    def middle(self, *, again: bool = False) -> Amount:
        """The residual stream after attention."""
        return self._onto("output", 1, again=again) + self._picked(2 * self.layer.q_columns)

    def gate_up(self, *, again: bool = False) -> Amount:
        """Gate and up before the activation."""
        return self._norm(2, self.rows) + self._read_by("gate_up", self.rows, again=again)

    def act(self) -> Amount:
        """The gated activation."""
        columns = self.layer.gate_up_columns + self.layer.inner
        return self._pass(self._adding("gate_up") * self.rows * columns)

    def down(self, *, again: bool = False) -> Amount:
        """The layer's output."""
        return self._onto("down", 3, again=again)

    def _unpacking(self, held: Held) -> Amount:
        """The weights of a pass, which are there already where the layer holds them."""
        return NOTHING if "weights" in held.keep else self.weights()

    def weights(self) -> Amount:
        """All four groups' weights in the compute type."""
        return total(self._weight(name) for name in self.layer.matrices)

    def _picked(self, columns: int) -> Amount:
        """Rows taken out of all tokens, or spread over them."""
        if self.rows == self.work.tokens:
            return NOTHING
        return self._pass((2 * self.rows + self.work.tokens) * columns, 2)

    # ------------------------------------------------------------------ backward

    def _adapter(self, name: str, rows: int, *, given: bool) -> Amount:
        """Gradients of a group's adapters.

        Args:
            given: whether another kernel computes ∂u.
        """
        if not self._ranks(name):
            return NOTHING
        outputs, inputs = self.layer.matrices[name]
        kernels = 3 * len(self.layer.outputs(name)) if given else 5 * len(self.layer.outputs(name))
        found = self._pass(rows * (outputs * (1 if given else 2) + inputs), kernels)
        if name == "output" or self.work.dropout:  # ∂u A is added to ∂x in a pass of its own
            found += self._pass(2 * rows * inputs)
        return found + self._masks(name, 2 * rows)

    def _own(self, name: str, rows: int) -> Amount:
        """∂W, where the weights train."""
        if not self.work.full:
            return NOTHING
        outputs, inputs = self.layer.matrices[name]
        return Amount(products=2.0 * rows * outputs * inputs, kernels=1)

    def _through(self, place: int, rows: int) -> Amount:
        """The gradient through a norm: a norm before a block adds the stream's other gradient too, and writes the
        normed rows again where weights train."""
        if not self.layer.norms[place]:
            return NOTHING if place % 2 else self._pass(3 * rows * self.layer.hidden)
        streams = 3 if place % 2 else 5 if self.work.full else 4
        return self._pass(streams * rows * self.layer.hidden, 2 if self.work.full else 1)

    def mlp_backward(self, *, act_kept: bool) -> Amount:
        """From the gradient of the layer's output to that of the residual stream after attention."""
        layer, rows = self.layer, self.rows
        streams = 2 * layer.gate_up_columns + layer.inner * (1 if act_kept else 2)
        return total((
            self._through(3, rows),
            self._gemm("down", rows, alone=True),
            self._pass(self._adding("gate_up") * rows * streams),
            self._adapter("down", rows, given=False),
            self._own("down", rows),
            self._adapter("gate_up", rows, given=True),
            self._gemm("gate_up", rows),
            self._own("gate_up", rows),
            self._through(2, rows),
        ))  # fmt: skip

    def attention_backward(self) -> Amount:
        """From the gradient of the residual stream after attention to that of the layer's input."""
        layer, tokens = self.layer, self.work.tokens
        rotated = layer.q_columns + layer.kv_columns
        turned = 3 * rotated if layer.qk_norm else 2 * rotated if layer.rotary_dim else 0
        return total((
            self._through(1, self.rows),
            self._gemm("output", self.rows, alone=True),
            self._adapter("output", self.rows, given=False),
            self._own("output", self.rows),
            self._picked(layer.q_columns + layer.hidden),
            self._normed_qk(),
            Amount(kernels=3, attention_backward=self.attended(1)),
            self._pass(tokens * turned, 1 if turned else 0),
            self._adapter("qkv", tokens, given=False),
            self._gemm("qkv", tokens),
            self._own("qkv", tokens),
            self._through(0, tokens),
        ))  # fmt: skip

    # ------------------------------------------------------------------ whole passes

    def forward(self, held: Held) -> Amount:
        """The whole forward pass."""
        found = self._unpacking(held) + self.qkv() + self.attention() + self.middle()
        return found + self.gate_up() + self.act() + self.down()

    def backward(self, held: Held) -> Amount:
        """The whole backward pass, with what was not kept computed again."""
        kept, layer = held.keep, self.layer
        found = self._unpacking(held) + self.mlp_backward(act_kept="act" in kept) + self.attention_backward()
        if "qkv" not in kept:
            found += self.qkv(again=True)
        if "attention" not in kept:
            found += self.attention()
        if "middle" not in kept and not layer.parallel:
            found += self.middle(again=True)
        elif streams_again(layer, held):
            found += self._pass(3 * self.rows * layer.hidden)
        if "gate_up" not in kept:
            found += self.gate_up(again=True)
        if "middle" not in kept and layer.norms[3]:  # what the norm behind the MLP reads lies with the middle
            found += self.act() + self.down(again=True)
        return found

    def travelling(self, held: Held) -> float:
        """Bytes on their way to the host, and as many on their way back."""
        layer, work, tokens, rows = self.layer, self.work, self.work.tokens, self.rows
        sizes = Sizes(layer, work)
        room = {group: sizes.beside(group) if sizes.folds(group) else 0 for group in ("qkv", "gate_up")}
        columns = {
            "input": tokens * layer.hidden,
            "qkv": tokens * (layer.qkv_columns + room["qkv"]),
            "attention": tokens * (layer.q_columns + sizes.beside("output")),
            # the stream, or what a norm behind attention makes it of
            "middle": rows * layer.hidden * ((layer.norms[1] or not layer.parallel) + layer.norms[3]),
            "gate_up": rows * (layer.gate_up_columns + room["gate_up"]),
            "act": rows * layer.inner,
        }
        sums = 4.0 * tokens * layer.heads if "attention" in held.moved else 0.0
        return sums + work.itemsize * sum(columns[stage] for stage in held.moved)
