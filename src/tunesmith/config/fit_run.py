"""How much a micro-batch of a run holds and what its layers keep: planned where that can be, measured elsewhere.

On a GPU whose model has fused layers throughout, the planner is asked with the facts of the model that is loaded:
what trains of it, on what rows, what the card has left, what the host may pin. Elsewhere a token is measured under
each policy (`models.probe`). Either way there are leaner layouts for steps that run out of memory all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from tunesmith.config.plan_run import embedding_error
from tunesmith.config.prepare_data import PreparedData
from tunesmith.contracts.errors import UserError, first_line
from tunesmith.data.cache import cache_folder
from tunesmith.data.feed import TableFeed
from tunesmith.models.calibrate import Calibration, calibrate
from tunesmith.models.device_memory import Room, room_of
from tunesmith.models.head import CausalModel
from tunesmith.models.host_embedding import NotMovableError, reason_to_stay
from tunesmith.models.host_memory import NoHostMemoryError
from tunesmith.models.install import Installed
from tunesmith.models.offload import Offloader
from tunesmith.planning.bytes import Fixed, fixed_bytes
from tunesmith.planning.cards import CARDS, Card, Rates, find_card
from tunesmith.planning.facts import ModelFacts, Work
from tunesmith.planning.fit import STATE_BYTES, Fit, pinnable
from tunesmith.planning.host import free_host_memory
from tunesmith.planning.plan import Plan, PlanRequest, plan_of
from tunesmith.planning.read_facts import read_facts
from tunesmith.planning.solver import Solution, solve
from tunesmith.settings.quantities import share_or_bytes, tokens_of
from tunesmith.settings.run import RunSettings
from tunesmith.training.foresight import Forecast
from tunesmith.training.replan import Leaner

LOOKED_AT = 10_000
"""Rows among which the heaviest is sought."""

LESS = 0.15
"""Share of what a step makes by which each leaner layout is smaller."""


def card_of(device: torch.device) -> Card:
    """The row of `CARDS` for a device; of one that has none the row that is most like it."""
    properties = torch.cuda.get_device_properties(device)
    try:
        return find_card(properties.name, properties.total_memory)
    except UserError:
        capability = properties.major + properties.minor / 10

        def unlike(card: Card) -> tuple[float, float]:
            own = card.capability[0] + card.capability[1] / 10
            return abs(own - capability), abs(card.memory_bytes - properties.total_memory)

        return min(CARDS.values(), key=unlike)


# ---------------------------------------------------------------- what is asked


def facts_of(causal: CausalModel, installed: Installed, name: str) -> ModelFacts | None:
    """The facts of a model whose layers are all fused, None where the planner cannot count it."""
    if installed.stock or not installed.fused:
        return None
    try:
        facts = read_facts(causal.base.config.to_dict(), name)
    except UserError:
        return None
    return None if facts.unfused or len(facts.layers) != len(installed.policies) else facts


def work_of(settings: RunSettings, causal: CausalModel, installed: Installed, data: PreparedData) -> Work:
    """How one row trains, from the model that is loaded and the rows that there are."""
    assert installed.row is not None
    row = installed.row
    paths = {"qkv": row.qkv, "output": (row.output,), "gate_up": row.gate_up, "down": (row.down,)}
    adapted, ranks = [], [0]
    for group, names in paths.items():
        found = [module for name in names for layer in installed.layers for module in _adapters(layer, name)]
        if found:
            adapted.append(group)
            ranks += [rank for module in found for rank in module.r.values()]
    modules = list(causal.model.modules())
    documents = heaviest_row(settings, data)
    trained = [p for p in causal.model.parameters() if p.requires_grad]
    return Work(
        documents=documents,
        supervised=sum(documents),
        quantize="nf4" if any(type(module).__name__ == "Linear4bit" for module in modules) else "none",
        rank=max(ranks),
        adapted=tuple(adapted),
        dropout=any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in modules),
        optimizer=settings.train.optimizer,
        itemsize=causal.compute_dtype.itemsize,
        trained_itemsize=max(p.itemsize for p in trained),
    )


def _adapters(layer: Any, path: str) -> Iterator[Any]:
    module = layer.get_submodule(path)
    if getattr(module, "lora_A", None):
        yield module


def heaviest_row(settings: RunSettings, data: PreparedData) -> tuple[int, ...]:
    """Lengths of the documents of the row that takes most: full, and of those packs the one that attention's backward
    needs most for, where rows are known."""
    length = settings.train.sequence_length
    if not (settings.train.packing or settings.data.streaming):
        return (int(data.corpus.lengths.max()),)
    if not isinstance(data.feed, TableFeed):
        return (length,)
    lengths_N = data.corpus.lengths
    rows, _ = data.feed.epoch(0)
    parts = [[int(lengths_N[document]) for document in row] for row in rows[:LOOKED_AT]]
    heaviest = max(parts, key=lambda part: (len(part) * max(part), part))
    left = length - sum(heaviest)
    return (*heaviest, left) if left > 0 else tuple(heaviest)


def beside_bytes(causal: CausalModel, work: Work, fixed: Fixed, allocated: int) -> int:
    """Bytes on the device that the facts do not tell: buffers, modules that are saved whole, what is not counted of
    adapters; less where the facts tell too much."""
    counted = fixed.gradients // work.trained_itemsize
    trained = sum(p.numel() for p in causal.model.parameters() if p.requires_grad)
    of_training = (trained - counted) * (work.trained_itemsize + STATE_BYTES[work.optimizer])
    return int(allocated - fixed.weights - fixed.adapter + of_training)


# ---------------------------------------------------------------- what is followed


@dataclass
class Planned:
    """The plan that a run follows, and the leaner ones below it: a `training.replan.Ladder`.

    Attributes:
        request, rates, beside: what the planner is asked.
        budget: bytes that the layout in use was allowed.
        solution: the layout in use.
        installed: the layers that follow it.
        note: one sentence on rates that could not be measured, else empty.
        stays: one sentence on an input embedding that was to be on the host and had no room there, else empty.
    """

    facts: ModelFacts
    request: PlanRequest
    rates: Rates
    beside: int
    budget: int
    solution: Solution
    installed: Installed
    note: str = ""
    stays: str = ""

    @property
    def plan(self) -> Plan:
        """The layout in use as a plan."""
        return plan_of(self.request, self.solution, self.budget)

    def fit(self) -> Fit:
        """The plan for whoever asks about a token."""
        frame, moments = self.solution.frame, self.solution.frame.moments(self.solution.policies)
        most = max(moment.activations + moment.passing for moment in moments)
        names = dict.fromkeys(self.solution.policies)
        policy = next(iter(names)) if len(names) == 1 else "auto"
        unpacked = frame.unpacked(self.solution.policies)
        return Fit(policy, frame.work.tokens, most / frame.work.tokens, unpacked)

    def forecast(self) -> Forecast:
        """What every step takes by the plan."""
        return Forecast(self.solution.peak, self.plan.tokens_per_second)

    def warnings(self) -> Iterator[str]:
        """What a person should know before the run starts."""
        yield from filter(None, (self.note, self.stays))
        plan = self.plan
        if not plan.fits:
            yield (
                f"The run needs {plan.peak_bytes / 2**30:.1f} GiB of the GPU by its plan, and "
                f"{plan.budget_bytes / 2**30:.1f} GiB may be used (memory.budget); it is tried all the same. "
                "`tunesmith plan` names the nearest settings that fit."
            )

    def regroup(self, max_tokens: int) -> None:
        """Plan for micro-batches of another size, which a run that goes on brings with it."""
        rows = max(1, max_tokens // self.request.work.tokens)
        if self.request.micro_batch is None and rows != self.solution.rows:
            self.solution = self._solve(rows, self.budget)
            self.follow()

    def follow(self) -> None:
        """Have the layers keep what the layout says, and the input embedding lie where it says.

        Where the host has no memory for it, the layout becomes one with the embedding on the device.

        Raises:
            UserError: it has none, and `memory.embedding` is `host`.
            torch.OutOfMemoryError: the device has no room for the embedding, which is on the host still.
        """
        self.installed.set_policies(self.solution.policies)
        try:
            self.installed.set_embedding_on_host(self.solution.frame.work.host_embedding)
        except NoHostMemoryError as error:
            if self.request.embedding == "host":
                raise embedding_error(first_line(error)) from None
            self.stays = f"The input embedding stays on the GPU: {first_line(error)}."
            self.request = replace(self.request, embedding="device")
            self.solution = self._solve(self.solution.rows, self.budget)
            self.installed.set_policies(self.solution.policies)

    def down(self, largest: int, longest: int) -> Leaner | None:
        """Smaller by `LESS` of what a step makes, with other policies where they are left to the plan, then with half
        the micro-batch where that is."""
        frame = self.solution.frame
        less = self.solution.peak - int(LESS * (self.solution.peak - frame.standing))
        if self.request.policy == "auto":
            found = self._solve(frame.rows, less)
            # where nothing is small enough, what is smaller at all
            if found.peak < self.solution.peak:
                return self._take(found, less)
        if self.request.micro_batch is None and largest > longest:
            rows = max(1, min(frame.rows, -(-largest // self.request.work.tokens)) // 2)
            leaner = self._take(self._solve(rows, less), less)
            return replace(leaner, max_tokens=max(longest, largest // 2))
        return None

    def _solve(self, rows: int, budget: int) -> Solution:
        return solve(self.facts, self.request, self.rates, budget, beside=self.beside, rows=rows)

    def _take(self, solution: Solution, budget: int) -> Leaner:
        self.solution, self.budget, stayed = solution, budget, self.stays
        # tensors of the step that failed may be on their way in the one before
        self.installed.offloader = Offloader(enabled=next(self.installed.model.parameters()).is_cuda)
        try:
            self.follow()
        except torch.OutOfMemoryError:
            if self.installed.embedding is None:
                raise
            # no room for the embedding's way back: a leaner layout leaves it on the host
            self.request = replace(self.request, embedding="host")
            self.solution = self._solve(solution.rows, budget)
            self.follow()
        rows = solution.rows
        what = f"layers {self.plan.layout} and micro-batches of {rows} row{'s' * (rows > 1)}"
        return Leaner(what if self.stays == stayed else f"{what}. {self.stays.removesuffix('.')}")


def plan_fit(
    settings: RunSettings,
    causal: CausalModel,
    data: PreparedData,
    installed: Installed,
    *,
    card: Card,
    room: Room,
    host_bytes: int,
    rates: Callable[[ModelFacts, Work], Calibration],
) -> Planned | None:
    """Plan a run on the card that it is on, None where the planner cannot count its model.

    Args:
        card: most like it in the table.
        room: of the device.
        host_bytes: memory of the host that is free.
        rates: of the card, for the model and a row, and what is to be said of them.
    """
    facts = facts_of(causal, installed, settings.model.name)
    if facts is None:
        return None
    work = work_of(settings, causal, installed, data)
    train = settings.train
    reason = reason_to_stay(causal.model)
    if reason is not None and settings.memory.embedding == "host":
        raise embedding_error(reason)
    tokens = tokens_of(train.global_batch)
    rows = -(-tokens // work.tokens) if tokens is not None else int(train.global_batch)
    request = PlanRequest(
        card=card.name,
        work=work,
        rows=max(1, rows),
        micro_batch=train.micro_batch if isinstance(train.micro_batch, int) else None,
        policy=settings.memory.policy,
        embedding=settings.memory.embedding if reason is None else "device",
        budget=share_or_bytes(settings.memory.budget),
        host_bytes=pinnable(host_bytes),
    )
    reached, budget = rates(facts, work), room.budget(request.budget)
    beside = beside_bytes(causal, work, fixed_bytes(facts, work), room.allocated)
    solution = solve(facts, request, reached.rates, budget, beside=beside)
    planned = Planned(facts, request, reached.rates, beside, budget, solution, installed, note=reached.note)
    planned.follow()
    return planned


def rates_of(card: Card, causal: CausalModel) -> Callable[[ModelFacts, Work], Calibration]:
    """What the card reaches: the table's figures where steps were measured on one, else measured now."""

    def rates(facts: ModelFacts, work: Work) -> Calibration:
        if not card.estimated:
            return Calibration(card.rates())
        kinds = list(facts.layers)
        usual = max(kinds, key=kinds.count)
        folder, dtype = cache_folder("calibration"), causal.compute_dtype
        return calibrate(usual, work, card.rates(), causal.device, dtype, memory=folder)

    return rates


def planned_here(
    settings: RunSettings, causal: CausalModel, data: PreparedData, installed: Installed | None
) -> Planned | None:
    """Plan a run on the GPU that its model is on; None where there is none, or nothing to plan."""
    if installed is None or causal.device.type != "cuda":
        return None
    card = card_of(causal.device)
    return plan_fit(
        settings,
        causal,
        data,
        installed,
        card=card,
        room=room_of(causal.device),
        host_bytes=free_host_memory(),
        rates=rates_of(card, causal),
    )


def place_embedding(settings: RunSettings, causal: CausalModel, installed: Installed | None) -> None:
    """Move the input embedding to the host where that is asked for and no plan does it.

    Raises:
        UserError: it cannot lie there.
    """
    if settings.memory.embedding != "host":
        return
    if causal.device.type != "cuda":
        raise embedding_error("this run is on a CPU")
    if installed is None or not installed.fused:
        raise embedding_error("layers are not fused")
    try:
        installed.set_embedding_on_host(True)
    except (NotMovableError, NoHostMemoryError) as error:
        raise embedding_error(first_line(error)) from None
