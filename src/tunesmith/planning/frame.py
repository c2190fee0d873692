"""A step with one size of micro-batch, taken apart into what policies decide and what they do not. Torch-free.

`bytes.timeline` and `seconds.step_seconds` say what a step takes under given policies; here the same sums stand open,
so that a search over policies adds and compares numbers and walks no step. Tests hold the two equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from tunesmith.planning import step_amounts
from tunesmith.planning.bytes import (
    LAST_NORM,
    LIBRARIES,
    Fixed,
    Moment,
    OnDevice,
    fixed_bytes,
    on_device,
    table_bytes,
    timeline,
)
from tunesmith.planning.cards import Rates
from tunesmith.planning.facts import LayerFacts, ModelFacts, Work
from tunesmith.planning.fit import BUSY_TOKENS, STOCK_POLICIES
from tunesmith.planning.layer_bytes import LayerBytes, layer_bytes
from tunesmith.planning.policies import HELD, IN_FLIGHT, UNPACKED
from tunesmith.planning.request import PlanRequest
from tunesmith.planning.seconds import (
    FEW,
    LayerSeconds,
    backward_seconds,
    forward_seconds,
    layer_seconds,
    seconds_of,
    step_seconds,
)
from tunesmith.planning.tape import rounded

STOCK_BYTES = 2.4
"""What a layer of transformers keeps for each byte that a fused one under `keep` does, an estimate: of a token of the
8B shape both norms' rows and inputs in float32, q and k before and after RoPE, and four times the MLP's columns, some
112,000 columns where `keep` has 47,000."""

Parts = tuple[tuple[str, int], ...]
"""(policy, how many layers), in order."""

_BASE = "recompute"
"""The policy under which what no policy decides is read off a timeline."""


@dataclass(frozen=True, slots=True)
class Way:
    """A kind of layer under one policy.

    Attributes:
        kept, moved, forward, backward, unpacked: bytes, as in `LayerBytes`.
        timed: its seconds.
        seconds: forward and backward without any wait for the link.
        held: bytes of it on the device when all layers have run forward.
    """

    kept: int
    moved: int
    forward: int
    backward: int
    unpacked: int
    timed: LayerSeconds
    seconds: float
    held: int


LINK_BEHIND = 1.1
"""Gate and up travel in long rows only, and where a layer's copies take at most so much longer than its forward pass.
Elsewhere they gain a few tenths of a per cent, for several times the host memory."""


def _keeps_up(timed: LayerSeconds) -> bool:
    return timed.link <= LINK_BEHIND * timed.computing[0]


class Frame:
    """What a step takes.

    Args:
        model: the facts.
        request: what is planned.
        rows: of a micro-batch.
        rates: of the card.
        beside: bytes on the device that the facts do not tell.

    Attributes:
        names: policies that the layers have, fastest first on a card with a fast link and room.
        moving: those of them that move tensors to the host and may pay, the leanest first.
        kinds: for each layer the number of its kind; ways: for each kind what every policy makes of it.
        forward: for each layer the bytes of its forward pass beside what layers hold and its own need; backward
            likewise.
        around: the most between the passes, beside what layers hold. The norm behind them takes more backward than
            forward, the embedded rows that are held until then included.
        embedded: bytes of the first layer's input.
        least: bytes that are there at some moment whatever the policies.
        standing: bytes that are always there.
        table: bytes of the input embedding where it lies in host memory.
        sums: for each policy kept bytes, moved bytes and seconds of so many first layers.
    """

    def __init__(
        self, model: ModelFacts, request: PlanRequest, rows: int, rates: Rates, beside: int = 0
    ) -> None:
        self.model, self.rows, self.rates = model, rows, rates
        self.work = request.work_of(rows)
        self.passes = request.rows / rows
        self.micro_batches = -(-request.rows // rows)
        self.fixed: Fixed = fixed_bytes(model, self.work)
        self.beside = beside
        self.standing = self.fixed.weights + self.fixed.adapter + self.fixed.optimizer + LIBRARIES + beside
        self.table = table_bytes(model, self.work)
        self.names = _names(model, self.work, largest=rows >= request.micro_batches()[-1])
        self.count = len(model.layers)
        self.embedded = rounded(self.work.tokens * model.hidden * self.work.itemsize)
        self._read_kinds()
        self.moving = self._moving()
        self._read_overheads()
        self._read_seconds()
        self._read_sums()

    def _read_kinds(self) -> None:
        work, last = self.work, self.count - 1
        few = work.supervised <= FEW * work.tokens and not self.model.unfused
        known: dict[tuple[LayerFacts, int | None], int] = {}
        kinds = []
        for number, layer in enumerate(self.model.layers):
            rows = work.supervised if few and number == last else None
            kinds.append(known.setdefault((layer, rows), len(known)))
        self.kinds = tuple(kinds)
        self.ways: list[Mapping[str, Way]] = [self._ways(layer, rows) for layer, rows in known]

    def _ways(self, layer: LayerFacts, rows: int | None) -> dict[str, Way]:
        fused = not self.model.unfused
        ways = {}
        for name in HELD if fused else STOCK_POLICIES:
            cost = layer_bytes(layer, self.work, name) if fused else stock_bytes(layer, self.work, name)
            timed = layer_seconds(layer, self.work, name, self.rates, rows=rows, fused=fused)
            ways[name] = Way(
                cost.kept,
                cost.moved,
                cost.forward,
                cost.backward,
                cost.unpacked,
                timed,
                seconds=sum(timed.computing),
                held=cost.kept + cost.unpacked,
            )
        return ways

    def _moving(self) -> tuple[str, ...]:
        ways = self.ways[self.kinds[0]]
        moving = [name for name in self.names if ways[name].moved]
        long = self.work.tile_tokens is not None and self.work.tokens > self.work.tile_tokens
        pays = [
            name for name in moving
            if "gate_up" not in HELD[name].moved or (long and _keeps_up(ways[name].timed))
        ]  # fmt: skip
        return tuple(sorted(pays, key=lambda name: (ways[name].kept, -ways[name].seconds)))

    def _read_overheads(self) -> None:
        """Takes the layers' own bytes out of a timeline."""
        layers = self.model.layers
        costs = {layer: layer_bytes(layer, self.work, _BASE) for layer in dict.fromkeys(layers)}
        self._bare: list[_Bare] = []
        self.forward, self.backward = [0] * self.count, [0] * self.count
        self.around, self.least = 0, self.fixed.gradients
        for moment in timeline(self.model, self.work, (_BASE,) * self.count):
            what, place = _place(moment)
            own = 0 if place is None else getattr(costs[layers[place]], what)
            # gradients of an earlier micro-batch may be there already
            gradients = self.fixed.gradients if self.micro_batches > 1 else moment.gradients
            bare = replace(moment, passing=moment.passing - own, gradients=gradients)
            self._bare.append(_Bare(bare, what, place))
            beside = bare.passing + bare.gradients
            if place is not None:
                (self.forward if what == "forward" else self.backward)[place] = beside
            elif moment.activations:
                self.around = max(self.around, beside)
            else:
                self.least = max(self.least, beside)

    def _read_seconds(self) -> None:
        work, model, rates = self.work, self.model, self.rates
        bare = step_seconds(model, work, (_BASE,) * self.count, rates)
        self._beside = bare.head + bare.embeddings
        self._once = bare.optimizer
        self._once += (self.micro_batches - 1) * seconds_of(step_amounts.accumulation(model, work), rates)
        unrecorded = step_seconds(model, work, (_BASE,) * self.count, rates, graphs=False)
        self._starts = bare.start, unrecorded.start
        self._hosts = self.micro_batches * bare.host, self.micro_batches * unrecorded.host

    def _read_sums(self) -> None:
        self.sums: dict[str, tuple[list[float], list[float], list[float]]] = {}
        for name in self.names:
            ways = self.of((name,) * self.count)
            self.sums[name] = (
                [0, *accumulate(way.kept for way in ways)],
                [0, *accumulate(way.moved for way in ways)],
                [0, *accumulate(way.seconds for way in ways)],
            )

    # ------------------------------------------------------------------ under given policies

    def of(self, policies: Sequence[str]) -> list[Way]:
        """What the policies make of the layers."""
        return [self.ways[kind][name] for kind, name in zip(self.kinds, policies, strict=True)]

    def above(self, policies: Sequence[str]) -> int:
        """The most bytes of the device beside those that are always there."""
        needs = (
            held + own + bare.moment.passing + bare.moment.gradients
            for bare, held, own in self._walk(policies)
        )
        return self.unpacked(policies) + max(self.fixed.gradients, *needs)

    def moments(self, policies: Sequence[str]) -> list[Moment]:
        """What is alive at the peak of each stretch of a micro-batch, as `bytes.timeline` has it for fused layers."""
        return [
            replace(bare.moment, activations=held, passing=bare.moment.passing + own)
            for bare, held, own in self._walk(policies)
        ]

    def _walk(self, policies: Sequence[str]) -> Iterator[tuple[_Bare, int, int]]:
        """Each moment with the bytes that layers hold then, and what its own layer needs."""
        ways = self.of(policies)
        held = [0, *accumulate(way.kept for way in ways)]
        there = on_device([way.moved for way in ways], self.embedded)
        for bare in self._bare:
            place = bare.place
            if bare.what == LAST_NORM:
                yield bare, held[-1] + there.forward[-1], 0
            elif place is None:
                yield bare, held[-1] + there.end if bare.moment.activations else 0, 0
            elif bare.what == "forward":
                yield bare, held[place] + there.forward[place], ways[place].forward
            else:
                yield bare, held[place + 1] + there.backward[place], ways[place].backward

    def peak(self, policies: Sequence[str]) -> int:
        """The most bytes of the device, as `bytes.peak_bytes` has them for fused layers."""
        return self.standing + self.above(policies)

    def unpacked(self, policies: Sequence[str]) -> int:
        """Bytes of 4-bit weights that layers hold unpacked."""
        return sum(way.unpacked for way in self.of(policies))

    def host(self, policies: Sequence[str]) -> int:
        """Pinned bytes of the host."""
        return sum(way.moved for way in self.of(policies)) + self.table

    def layers_seconds(self, policies: Sequence[str]) -> float:
        """All layers forward and backward in one micro-batch."""
        timed = [way.timed for way in self.of(policies)]
        return forward_seconds(timed) + backward_seconds(timed)

    def step_seconds(self, policies: Sequence[str]) -> float:
        """An optimizer step; of a last, smaller micro-batch its share."""
        moves = any(way.moved for way in self.of(policies))
        device = self.passes * (self.layers_seconds(policies) + self._beside) + self._once
        return self._starts[moves] + max(device, self._hosts[moves])

    def layers_within(self, seconds: float) -> float:
        """Seconds that all layers of a micro-batch may take at most for a step to be faster than this."""
        return (seconds - min(self._starts) - self._once) / self.passes - self._beside


@dataclass(frozen=True, slots=True)
class _Bare:
    """A moment without what its layer needs.

    Attributes:
        what: the pass of the layer; place: its number, None where the moment is no layer's.
    """

    moment: Moment
    what: str
    place: int | None


def _names(model: ModelFacts, work: Work, *, largest: bool) -> tuple[str, ...]:
    """Policies that layers of a model have, fastest first where there is room.

    What unpacked weights save, larger micro-batches save as well, and more that seconds do not tell: weights are held
    unpacked where micro-batches keep a card busy, or cannot be larger.
    """
    if model.unfused:
        return STOCK_POLICIES
    unpacked = work.quantize == "nf4" and (largest or work.tokens >= BUSY_TOKENS["cuda"] // 2)
    return tuple(name for name in HELD if name not in UNPACKED or unpacked)


def _place(moment: Moment) -> tuple[str, int | None]:
    """The pass and the layer of a moment; None where it is no layer's."""
    what, _, number = moment.label.partition(" ")
    return (what, int(number)) if number.isdigit() else (moment.label, None)


def stock_bytes(layer: LayerFacts, work: Work, policy: str) -> LayerBytes:
    """An estimate of what a layer of transformers allocates."""
    fused = layer_bytes(layer, work, policy)
    whole = int(STOCK_BYTES * layer_bytes(layer, work, "keep").kept)
    if policy == "keep":
        return LayerBytes(whole, 0, max(fused.forward, whole), fused.backward, fused.gradients)
    return LayerBytes(fused.kept, 0, max(fused.forward, whole), whole + fused.backward, fused.gradients)


class Prefix:
    """The first layers of a frame under policies that move tensors to the host.

    Args:
        parts: (policy, layers) in order.
    """

    def __init__(self, frame: Frame, parts: Parts = ()) -> None:
        self._frame, self.parts = frame, parts
        self.count = sum(count for _, count in parts)

    @cached_property
    def policies(self) -> tuple[str, ...]:
        """One a layer."""
        return tuple(name for name, count in self.parts for _ in range(count))

    @cached_property
    def ways(self) -> list[Way]:
        """What the policies make of the layers."""
        frame = self._frame
        return [frame.ways[kind][name] for kind, name in zip(frame.kinds, self.policies, strict=False)]

    @cached_property
    def _there(self) -> OnDevice:
        """What of the moved tensors is on the device, where no layer behind these moves any."""
        behind = self._frame.count - self.count
        return on_device([*(way.moved for way in self.ways), *[0] * behind], self._frame.embedded)

    @cached_property
    def kept(self) -> int:
        """Bytes on the device from forward to backward: what its layers keep, and what does not leave any more."""
        return sum(way.kept for way in self.ways) + self._there.end

    def leaving(self, number: int) -> int:
        """Bytes beside `kept` that are on the device while a layer behind it runs forward."""
        return self._there.forward[number] - self._there.end

    @cached_property
    def seconds(self) -> float:
        """What both passes take, with their waits for the link and those that they cause behind them: forward takes
        the same under all policies that move nothing and hold no weights, which alone stand behind these."""
        frame = self._frame
        behind = frame.kinds[self.count : self.count + IN_FLIGHT]
        others = [frame.ways[kind][_BASE] for kind in behind]
        timed = [way.timed for way in (*self.ways, *others)]
        return forward_seconds(timed) + backward_seconds(timed) - sum(way.seconds for way in others)

    def fits(self, room: int) -> bool:
        """Whether its own layers stay within so many bytes."""
        held, frame, there = 0, self._frame, self._there
        for number, way in enumerate(self.ways):
            if held + there.forward[number] + frame.forward[number] + way.forward > room:
                return False
            held += way.kept
            if held + there.backward[number] + frame.backward[number] + way.backward > room:
                return False
        return True
