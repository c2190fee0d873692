"""A step that runs out of memory is made again: the same numbers, nothing left behind, and an end with a sentence."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.runs import Recorder, build
from tunesmith.config.assemble import Run
from tunesmith.contracts.errors import UserError
from tunesmith.models.host_memory import NoHostMemoryError
from tunesmith.training.replan import Leaner, OutOfRoomError, Replanner

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB"
ERROR = f"{SAID}. GPU 0 has a total capacity of 79.1 GiB of which 1.2 GiB is free. Process 4 has\nmore lines"
LAST = "model.layers.1"


@pytest.fixture
def settings(settings: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def make(**sections: Any) -> dict[str, Any]:
        train = {"steps": 4, "micro_batch": "auto", "global_batch": 4, "packing": False} | sections.pop(
            "train", {}
        )
        adapter = {"dropout": 0.2} | sections.pop("adapter", {})
        return settings(train=train, adapter=adapter, **sections)

    return make


class Shortage:
    """Runs out of memory at given calls of a layer.

    Args:
        run: whose layer; backward: in its backward pass.
        calls: numbers of the calls, from 1.
    """

    def __init__(self, run: Run, calls: set[int], *, backward: bool = False) -> None:
        self.calls, self.seen = calls, 0
        self.error: Callable[[], Exception] = lambda: torch.OutOfMemoryError(ERROR)
        self.alive: list[weakref.ref[torch.Tensor]] = []
        self.found_alive: list[int] = []
        layer = run.causal.base.get_submodule(LAST)
        if backward:
            layer.register_full_backward_hook(lambda *_: self.maybe())
        else:
            layer.register_forward_pre_hook(lambda _layer, inputs: self.watch(inputs[0]))

    def watch(self, hidden: torch.Tensor) -> None:
        self.alive.append(weakref.ref(hidden))
        self.maybe()

    def maybe(self) -> None:
        self.seen += 1
        if self.seen in self.calls:
            raise self.error()


def fix_groups(run: Run, max_tokens: int) -> None:
    """Micro-batches of up to so many tokens."""
    run.trainer.grouping = type(run.trainer.grouping)(None, max_tokens)


def trained(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in run.backend.trained_parameters().items()}


def run_with(
    values: dict[str, Any], calls: set[int], *, tokens: int = 60, backward: bool = False
) -> tuple[Run, Recorder]:
    run, recorder = build(values)
    fix_groups(run, tokens)
    Shortage(run, calls, backward=backward)
    with run.packed():
        run.trainer.train()
    return run, recorder


def losses(recorder: Recorder) -> list[tuple[float, float]]:
    return [(event.loss, event.grad_norm) for event in recorder.of("step")]


def test_the_micro_batches_of_these_tests_are_several(settings):
    run, _ = build(settings())
    fix_groups(run, 60)
    step = next(iter(run.trainer.feed.steps(run.trainer.position)))
    assert len(run.trainer._groups(step)) > 1


@pytest.mark.parametrize(
    ("calls", "backward"),
    [({1}, False), ({2}, False), ({5}, False), ({1}, True), ({2}, True), ({6}, True)],
    ids=[
        "first forward",
        "second micro-batch",
        "a later step",
        "first backward",
        "second backward",
        "later backward",
    ],
)
def test_a_change_of_policy_changes_no_bit(settings, calls, backward):
    """With dropout, whose masks are drawn again from the step's own random state."""
    values = settings(output={"eval_every": None})
    plain, expected = run_with(values, set())
    again, found = run_with(values, calls, backward=backward)
    assert losses(found) == losses(expected)
    for name, parameter in trained(plain).items():
        assert torch.equal(parameter, trained(again)[name])
    (warning,) = found.of("warning")
    assert f"ran out of the device's memory ({SAID})" in warning.message
    assert warning.message.endswith("It is made again, from now on with all layers recomputed in backward.")
    assert again.causal.base.is_gradient_checkpointing
    assert [event.step for event in found.of("step")] == [1, 2, 3, 4]


def test_then_the_micro_batch_is_halved_and_sums_are_the_same_up_to_rounding(settings):
    values = settings(adapter={"dropout": 0.0}, output={"eval_every": None})
    _, expected = run_with(values, set(), tokens=1000)
    run, found = run_with(values, {1, 2}, tokens=1000)
    first, second = found.of("warning")
    assert "recomputed" in first.message
    assert "micro-batches of up to" in second.message
    assert run.trainer.grouping.max_tokens < 100
    for (loss, norm), (other, other_norm) in zip(losses(found), losses(expected), strict=True):
        # float32 sums in another order, over four steps
        assert loss == pytest.approx(other, rel=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-4)


def test_nothing_of_a_step_that_failed_is_left(settings):
    run, _ = build(settings(output={"eval_every": None}))
    fix_groups(run, 60)
    failing = Shortage(run, {2})
    found: list[int] = []
    gradients: list[bool] = []
    down = run.trainer.replanner._ladder.down

    def look(largest: int, longest: int) -> Leaner | None:
        # no help from another collection: what is alive here is alive while the step is made again
        found.append(sum(ref() is not None for ref in failing.alive))
        gradients.append(any(p.grad is not None for p in run.causal.model.parameters()))
        return down(largest, longest)

    run.trainer.replanner._ladder.down = look
    gc.disable()
    try:
        with run.packed():
            run.trainer.train()
    finally:
        gc.enable()
    assert len(failing.alive) > 2
    assert found == [0]
    assert gradients == [False]


def test_a_run_goes_on_from_a_checkpoint_with_the_smaller_micro_batch(settings):
    values = settings(train={"steps": 6}, output={"eval_every": None, "save_every": 3})
    whole, expected = run_with(values, {1, 2}, tokens=1000)
    grouping = whole.trainer.grouping
    rest, recorder = build(values)
    checkpoint = next(c for c in whole.store.all() if c.step == 3)
    rest.trainer.resume(checkpoint)
    assert rest.trainer.grouping == grouping
    with rest.packed():
        rest.trainer.train()
    assert losses(recorder) == losses(expected)[3:]


def test_a_run_gives_up_with_a_sentence_and_keeps_what_it_learned(settings):
    run, recorder = build(settings(output={"eval_every": None}))
    fix_groups(run, 1000)
    Shortage(run, set(range(3, 50)))
    before: dict[str, torch.Tensor] = {}
    with run.packed(), pytest.raises(OutOfRoomError, match="Step 3 ran out") as caught:
        run.trainer.train()
    before = trained(run)
    assert "no leaner layout is left" in caught.value.message
    assert caught.value.exit_code == 1
    assert caught.value.__context__ is None, "frames of the pass would stay alive"
    assert all(p.grad is None for p in run.causal.model.parameters())
    # all layers recomputed, then half of the micro-batch until it is one row
    assert 2 <= len(recorder.of("warning")) <= 4
    saved = run.store.newest_intact(lambda *_: None)
    assert saved is not None
    assert saved.step == 2
    tensors = saved.tensors()
    assert all(torch.equal(tensors[f"model/{name}"], p) for name, p in before.items())


def test_a_host_without_room_ends_the_run_with_what_it_learned(settings):
    run, recorder = build(settings(output={"eval_every": None}))
    fix_groups(run, 1000)
    shortage = Shortage(run, {3})
    shortage.error = lambda: NoHostMemoryError("5 bytes of host memory are not free")
    with (
        run.packed(),
        pytest.raises(OutOfRoomError, match=r"Step 3 ran out of host memory.*5 bytes") as caught,
    ):
        run.trainer.train()
    assert "memory.policy" in caught.value.hint
    assert caught.value.__context__ is None, "frames of the pass would stay alive"
    assert not recorder.of("warning"), "a leaner layout would need more of the host"
    saved = run.store.newest_intact(lambda *_: None)
    assert saved is not None
    assert saved.step == 2


@pytest.mark.parametrize("fixed", ["policy", "micro_batch"])
def test_what_the_user_fixed_stays(settings, fixed):
    values = settings(
        memory={"policy": "keep"} if fixed == "policy" else {},
        train={"micro_batch": 4} if fixed == "micro_batch" else {},
        output={"eval_every": None},
    )
    run, recorder = build(values)
    if fixed == "policy":
        fix_groups(run, 1000)
    Shortage(run, set(range(1, 50)))
    grouping = run.trainer.grouping
    with run.packed(), pytest.raises(OutOfRoomError):
        run.trainer.train()
    said = [event.message for event in recorder.of("warning")]
    assert said
    if fixed == "policy":
        assert not run.causal.base.is_gradient_checkpointing
        assert not any("recomputed" in message for message in said)
    else:
        assert run.trainer.grouping == grouping
        assert len(said) == 1


def test_stop_ends_the_run_at_once(settings):
    run, recorder = build(settings(memory={"on_oom": "stop"}, output={"eval_every": None}))
    Shortage(run, {1})
    with run.packed(), pytest.raises(OutOfRoomError, match=r"and memory\.on_oom is stop") as caught:
        run.trainer.train()
    assert "memory.on_oom: replan" in (caught.value.hint or "")
    assert not recorder.of("warning")
    assert run.store.newest_intact(lambda *_: None) is None


def test_an_update_is_not_made_twice(settings, monkeypatch):
    run, recorder = build(settings(output={"eval_every": None}))

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError(ERROR)

    monkeypatch.setattr(run.backend.optimizer, "step", full)
    with run.packed(), pytest.raises(UserError, match="The update ran out of the device's memory") as caught:
        run.trainer.train()
    assert not isinstance(caught.value, OutOfRoomError)
    assert not recorder.of("warning")
    assert run.store.newest_intact(lambda *_: None) is None, "weights that may have moved are not saved"


def test_graphs_are_given_up_before_anything_else(settings):
    run, _ = build(settings())
    run.backend.use_graphs = True
    tries, said = [], []

    def attempt() -> str:
        tries.append(run.backend.use_graphs)
        if len(tries) == 1:
            raise torch.OutOfMemoryError(ERROR)
        return "made"

    replanner = Replanner(run.backend, run.trainer.replanner._ladder)
    made = replanner.make(attempt, step=1, sizes=lambda: (1, 1), regroup=lambda _: None, warn=said.append)
    assert made == "made"
    assert tries == [True, False]
    assert said[0].endswith("from now on with no CUDA graphs.")
    assert not run.causal.base.is_gradient_checkpointing
