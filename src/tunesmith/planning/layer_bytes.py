"""What one fused decoder layer allocates, forward and backward, under each policy. Torch-free.

The tape repeats `models.decoder` line by line: which buffer comes to life where, and when its last name goes. A test
runs the decoder itself on tensors without memory and holds the two equal, so what changes there has to change here.

Shape suffixes as in the decoder: T tokens, D hidden size, N columns of qkv, I inner columns, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from tunesmith.planning import workspaces
from tunesmith.planning.facts import LayerFacts, Work
from tunesmith.planning.layer_sizes import FLOAT, Sizes
from tunesmith.planning.policies import HELD, Held
from tunesmith.planning.tape import Tape, rounded

STAGES: Mapping[str, tuple[str, ...]] = {
    "qkv": ("qkv",),
    "attention": ("output", "lse"),
    "middle": ("middle", "branch0", "branch1"),
    "gate_up": ("gate_up",),
    "act": ("act",),
    "weights": (),
}
"""Buffers by the stage of a policy that they belong to."""

SMALL: Mapping[str, str | None] = {
    "u.qkv": "qkv", "stats0": "qkv", "u.output": None, "stats1": "middle",
    "u.gate_up": "gate_up", "stats2": "gate_up", "u.down": None, "stats3": None,
}  # fmt: skip
"""Rank-wide products and statistics of rows, and the stage whose recomputation gives them again; None are kept."""


def streams_again(layer: LayerFacts, held: Held) -> bool:
    """Whether the stream after attention is made again from what the norm behind attention reads."""
    behind = layer.norms[1] and not layer.parallel
    return behind and "middle" in held.keep and "act" not in held.keep


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Bytes of one layer under one policy.

    Attributes:
        kept: on the device between forward and backward, the layer's input included.
        moved: of what lies in host memory instead.
        forward: the most while it runs forward, its output included and its input not.
        backward: the most while it runs backward beside what was kept, the incoming gradient included.
        gradients: of what trains in it.
        unpacked: of its 4-bit weights as they are unpacked, where it holds them between steps.
    """

    kept: int
    moved: int
    forward: int
    backward: int
    gradients: int
    unpacked: int = 0


class _Layer:
    """A layer's passes on a tape.

    Args:
        policy: a name of `HELD`.
    """

    def __init__(self, layer: LayerFacts, work: Work, policy: str) -> None:
        self.layer, self.work, self.held = layer, work, HELD[policy]
        self.sizes, self.tape = Sizes(layer, work), Tape()
        left_out = {"middle"} if streams_again(layer, self.held) else set()
        self.kept = {name for stage in self.held.keep for name in STAGES[stage]} - left_out
        self.moved = {name for stage in self.held.moved for name in STAGES.get(stage, ())} & self.kept
        self.unpacked = "weights" in self.held.keep
        self.again = self.shared = False
        most = work.tile_tokens
        self.tiled = most is not None and "gate_up" not in self.held.keep and work.tokens > most

    # ------------------------------------------------------------------ what both passes do

    def norm(self, place: int, result: str) -> None:
        """The rows that a norm makes, and what it knows of each row."""
        if self.layer.norms[place]:
            self.tape.make(result, self.sizes.rows(self.layer.hidden))
            self.tape.make(f"stats{place}", self.sizes.floats(2 if self.layer.layer_norm else 1))

    def read(self, group: str) -> None:
        """The group's weight for a product; one that the layer holds is there before the pass and after it."""
        if not self.unpacked and not self.tape.has(f"weight.{group}"):
            self.tape.make(f"weight.{group}", self.sizes.weight(group))

    def forget(self, group: str) -> None:
        """After a forward product; in backward the weight is used once more."""
        if not (self.again or self.shared):
            self.tape.drop(f"weight.{group}")

    def project(self, group: str) -> None:
        """A group that reads normed rows; its u, and its rows with room for ∂u behind them."""
        sizes, tape, key = self.sizes, self.tape, f"u.{group}"
        columns = self.layer.matrices[group][0]
        self.read(group)
        if sizes.folds(group):
            tape.make(group, sizes.rows(columns + sizes.beside(group)))
            tape.make(key, sizes.rows(sizes.ranks(group)))
        else:
            if sizes.adapted(group) and not tape.has(key):
                tape.make(key, sizes.rows(sizes.ranks(group)))
            tape.make(group, sizes.rows(columns))
        self.forget(group)

    def onto(self, block: int, result: str) -> None:
        """The last projection of a block and the stream after it."""
        group, sizes, tape = ("output", "down")[block], self.sizes, self.tape
        behind = self.layer.norms[2 * block + 1]
        target = f"branch{block}" if behind else result
        if sizes.adapted(group) and not tape.has(f"u.{group}"):
            tape.make(f"u.{group}", sizes.rows(sizes.ranks(group)))
        self.read(group)
        if sizes.adapted(group) and not sizes.folds(group):
            tape.make("wide", sizes.floats(self.layer.hidden))
        tape.make(target, sizes.rows(self.layer.hidden))
        tape.drop("wide")
        self.forget(group)
        if behind and result:
            self.norm(2 * block + 1, result)

    def attend(self) -> None:
        """q, k and v, and the output of attention; what is there is not computed again."""
        layer, sizes, tape = self.layer, self.sizes, self.tape
        if not tape.has("qkv"):
            self.norm(0, "normed")
            self.project("qkv")
        if not tape.has("output"):
            if layer.qk_norm:
                tape.make("attended", sizes.rows(layer.qkv_columns))
            tape.make("output", sizes.rows(layer.q_columns + sizes.beside("output")))
            tape.make("lse", sizes.floats(layer.heads))
            tape.drop("attended")
        tape.drop("normed")

    def gate_up(self) -> None:
        """gate and up before the activation."""
        self.norm(2, "normed")
        self.project("gate_up")
        self.tape.drop("normed")

    def activate(self) -> None:
        """What the down projection reads, and its u, which leaves the kernel in parts."""
        sizes, tape, layer = self.sizes, self.tape, self.layer
        tape.make("act", sizes.rows(layer.inner + sizes.beside("down")))
        if sizes.adapted("down") and not self.work.dropout and not tape.has("u.down"):
            tape.make("u.down", sizes.rows(sizes.ranks("down")))
            work = sizes.work
            splits = workspaces.glu_forward_splits(work.tokens, layer.inner, work.rank, work.itemsize)
            if splits > 1:
                tape.brief(splits * sizes.floats(sizes.ranks("down")))
        if sizes.adapted("gate_up") and self.work.rank > workspaces.LARGEST_FUSED_RANK:
            tape.brief(sizes.rows(layer.gate_up_columns))  # a copy gets the adapters

    # ------------------------------------------------------------------ forward

    def forward(self) -> None:
        """Leaves on the tape what lies between the passes, and the output."""
        self.tape.make("operands", self.sizes.operands())
        self.attend()
        self.onto(0, "middle")
        if self.tiled:
            self.tiles_forward()
        else:
            self.gate_up()
            self.activate()
            self.onto(1, "out")
        stages = self.held.keep
        self.kept |= {name for name, stage in SMALL.items() if stage is None or stage in stages}
        if streams_again(self.layer, self.held):
            self.kept.discard("stats1")
        if "gate_up" in stages:
            self.kept.add("operands")
        if self.layer.parallel:
            self.kept.discard("middle")
        if self.held.moved and not stages:  # then nothing of the layer's tokens stays on the device
            self.moved |= self.kept
        self.tape.only(self.kept | {"out"})

    # ------------------------------------------------------------------ backward

    def backward(self) -> None:
        """From what lies between the passes and the incoming gradient to the gradient of the input."""
        tape, sizes, layer = self.tape, self.sizes, self.layer
        self.again = True
        tape.drop("out")
        tape.make("grad", sizes.rows(layer.hidden))
        if not tape.has("operands"):
            tape.make("operands", sizes.operands())
        self.attend()
        if tape.has("branch0") and not tape.has("middle"):
            self.norm(1, "middle")
        elif not tape.has("middle") and not layer.parallel:
            self.onto(0, "middle")
        if self.tiled:
            self.tiles_backward()
        else:
            self.mlp_again()
            self.mlp_backward("grad_stream")
        self.free("middle")
        self.attention_backward()

    def free(self, *names: str) -> None:
        """Backward lets go of buffers; autograd holds those that stayed on the device until the layer is done."""
        self.tape.drop(*(name for name in names if name not in self.kept - self.moved))

    def last_use(self, group: str, result: str, columns: float) -> None:
        """The product with a weight that gives a gradient."""
        self.read(group)
        self.tape.make(result, self.sizes.rows(columns))
        if not self.shared:
            self.tape.drop(f"weight.{group}")

    def own(self, group: str) -> None:
        """Gradients of the group's weights where they train."""
        if self.work.full:
            rows, columns = self.layer.matrices[group]
            self.tape.make(f"own.{group}", rows * columns * self.work.trained_itemsize)

    def adapter_gradients(self, group: str, *, given: bool = False) -> None:
        """∂u, unless a kernel has given it, and ∂B; ∂A comes with the rows."""
        if self.sizes.adapted(group):
            rows = self.layer.matrices[group][0]
            if not given:
                self.tape.make(f"du.{group}", self.sizes.rows(self.sizes.ranks(group)))
            self.tape.make(f"db.{group}", rows * self.work.rank * self.work.trained_itemsize)

    def a_gradient(self, group: str) -> None:
        """∂A of a group."""
        if self.sizes.adapted(group):
            columns = self.layer.matrices[group][1]
            self.tape.make(f"da.{group}", self.sizes.ranks(group) * columns * self.work.trained_itemsize)

    def through_before(self, place: int, group: str, result: str) -> None:
        """∂ through the norm before a block."""
        sizes, layer, tape = self.sizes, self.layer, self.tape
        rms = not layer.layer_norm
        early = not layer.norms[place] or (
            rms and self.work.trained_itemsize >= FLOAT and not self.work.dropout
        )
        if early and sizes.adapted(group):
            if layer.norms[place]:
                tape.brief(sizes.floats(sizes.ranks(group)), sizes.rows(sizes.ranks(group)))
            self.a_gradient(group)
        if layer.norms[place]:
            tape.make(result, sizes.rows(layer.hidden))
            if self.work.full or (sizes.adapted(group) and not early):
                tape.make("normed", sizes.rows(layer.hidden))
            if self.work.full:
                width = layer.hidden * (2 if layer.layer_norm else 1)
                tape.brief(workspaces.NORM_PROGRAMS * width * FLOAT)
                tape.make(f"sum{place}", width * FLOAT)
                tape.make(f"own.norm{place}", width * self.work.trained_itemsize)
        else:
            tape.make(result, 0)
        if not early and sizes.adapted(group):
            self.a_gradient(group)
        self.own(group)
        tape.drop("normed", f"sum{place}")

    def mlp_again(self) -> None:
        """What backward reads of the MLP; what is there is not computed again."""
        if not self.tape.has("gate_up"):
            self.gate_up()
        if self.layer.norms[3] and not self.tape.has("branch1"):
            self.activate()
            self.onto(1, "")

    def mlp_backward(self, result: str) -> None:
        """∂ of the stream that the MLP reads."""
        tape, sizes, layer = self.tape, self.sizes, self.layer
        if layer.norms[3]:
            tape.make("grad_branch", sizes.rows(layer.hidden))
            self.free("branch1")
        self.last_use("down", "grad_act", layer.inner)
        self.adapter_gradients("down")
        if not self.work.full:
            tape.drop("grad_branch")
        if sizes.adapted("gate_up"):
            tape.make("du.gate_up", sizes.rows(sizes.ranks("gate_up")))
            work = sizes.work
            splits = workspaces.glu_splits(work.tokens, layer.inner, work.rank, work.itemsize)
            if splits > 1:
                tape.brief(splits * sizes.floats(sizes.ranks("gate_up")))
        self.a_gradient("down")
        self.own("down")
        tape.drop("grad_act", "grad_branch")
        self.free("act")
        self.adapter_gradients("gate_up", given=True)
        self.last_use("gate_up", "grad_normed", layer.hidden)
        if not self.work.full:
            self.free("gate_up")
        self.through_before(2, "gate_up", result)
        self.free("gate_up")
        tape.drop("du.down", "du.gate_up")
        if layer.norms[2]:
            tape.drop("grad_normed")

    # ------------------------------------------------------------------ the MLP in tiles

    def tiles_forward(self) -> None:
        """Tiles of the MLP write into one output; a second one runs beside what the first has left."""
        tape, whole = self.tape, self.sizes
        left = {"u.down": whole.rows(whole.ranks("down")) if whole.adapted("down") else 0}
        if self.layer.norms[3]:
            left["stats3"] = whole.floats(1)
            left["branch1"] = whole.rows(self.layer.hidden) if "middle" in self.held.keep else 0
        tape.make("out", whole.rows(self.layer.hidden))
        self.sizes, self.shared = whole.tile(), True
        for turn in range(2):
            self.gate_up()
            self.activate()
            self.onto(1, "tile")
            if turn == 0:
                for name, size in left.items():
                    tape.make(f"whole.{name}", size)
            tape.drop("gate_up", "act", "u.gate_up", "stats2", "tile", "branch1", "u.down", "stats3")
        self.sizes, self.shared = whole, False
        tape.drop("weight.gate_up", "weight.down", *(f"whole.{name}" for name in left))
        for name, size in left.items():
            tape.make(name, size)

    def tiles_backward(self) -> None:
        """Tiles of the MLP; each one's gradients of what trains are added to those before, in float32."""
        tape, whole, work = self.tape, self.sizes, self.work
        tape.make("grad_stream", whole.rows(self.layer.hidden))
        self.sizes, self.shared = whole.tile(), True
        self.work = replace(work, trained_itemsize=FLOAT)
        sums = ("da.down", "db.down", "da.gate_up", "db.gate_up", "own.down", "own.gate_up")
        for turn in range(2):
            self.mlp_again()
            self.mlp_backward("tile")
            tape.drop("tile", "grad_normed", "gate_up", "act")
            if turn == 0:
                tape.make("sums", tape.size(*sums))
                tape.drop("u.gate_up", "stats2", *sums)
        self.sizes, self.shared, self.work = whole, False, work
        # the sums, rounded, beside those in float32 and the last tile's
        tape.make("gradients", tape.size("sums") * work.trained_itemsize // FLOAT if work.full else 0)
        tape.drop("weight.gate_up", "weight.down", "u.gate_up", "stats2", *sums)
        if work.full:
            tape.drop("sums")

    def attention_backward(self) -> None:
        """∂ of the layer's input."""
        tape, sizes, layer = self.tape, self.sizes, self.layer
        if layer.norms[1]:
            tape.make("grad_branch", sizes.rows(layer.hidden))
            self.free("branch0")
        self.last_use("output", "grad_output", layer.q_columns)
        self.adapter_gradients("output")
        self.a_gradient("output")
        self.own("output")
        tape.drop("grad_branch")
        if layer.qk_norm:
            tape.make("attended", sizes.rows(layer.qkv_columns))
        tape.make("grad_qkv", sizes.rows(layer.qkv_columns + sizes.beside("qkv")))
        tape.brief(workspaces.attention_workspace(layer, self.work))
        tape.drop("attended")
        self.adapter_gradients("qkv")
        self.last_use("qkv", "grad_normed2", layer.hidden)
        if not self.work.full:
            tape.drop("grad_qkv")
        self.through_before(0, "qkv", "grad_hidden")


@lru_cache(maxsize=4096)
def layer_bytes(layer: LayerFacts, work: Work, policy: str) -> LayerBytes:
    """What a layer allocates; `kept` holds the layer's input, which is the output of the layer before."""
    passes = _Layer(layer, work, policy)
    rows = rounded(passes.sizes.rows(layer.hidden))
    passes.forward()
    forward = passes.tape.peak
    kept = passes.tape.now - passes.tape.size("out") + rows
    moved = passes.tape.size(*passes.moved) + ("input" in passes.held.moved) * rows
    before = passes.tape.now - passes.tape.size("out")
    passes.tape.peak = passes.tape.now
    passes.backward()
    gradients = sum(passes.sizes.gradients(group) for group in layer.matrices)
    if work.full:
        gradients = (layer.matrix_parameters + layer.small_parameters) * work.trained_itemsize
    # without dropout, as where a model is measured, they have room for adapters, and stay as they are
    sizes = Sizes(layer, replace(work, dropout=False))
    weights = sum(rounded(sizes.weight(group)) for group in layer.matrices) if passes.unpacked else 0
    return LayerBytes(kept - moved, moved, forward, passes.tape.peak - before, int(gradients), weights)
