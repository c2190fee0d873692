"""The solver against brute force over all layouts, and against the walk of the real timeline."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.planning.bytes import host_bytes, peak_bytes, timeline
from tunesmith.planning.cards import CARDS
from tunesmith.planning.facts import LayerFacts, ModelFacts, Work
from tunesmith.planning.frame import Frame, Prefix
from tunesmith.planning.policies import HELD
from tunesmith.planning.request import PlanRequest
from tunesmith.planning.seconds import backward_seconds, forward_seconds, step_seconds
from tunesmith.planning.solver import Solution, solve

RATES = CARDS["H100-80GB"].rates()
LAYER = LayerFacts(hidden=1024, inner=2816, heads=16, kv_heads=4, head_dim=64, rotary_dim=64)
WINDOWED = replace(LAYER, window=256, norms=(True, True, True, True))
ON_DEVICE = [name for name, held in HELD.items() if not held.moved]
MIB = 2**20


def model(*layers: LayerFacts) -> ModelFacts:
    return ModelFacts("small", "llama", layers, vocabulary=32_000, tied=False)


def request(rows: int = 1, tokens: int = 4096, **changes) -> PlanRequest:
    work = Work((tokens,), tokens, **changes.pop("work", {}))
    return PlanRequest("H100-80GB", work, rows, **changes)


def spread(facts: ModelFacts, asked: PlanRequest) -> tuple[int, int]:
    """Peaks of the leanest and of the richest layout of the smallest micro-batch."""
    frame = Frame(facts, asked, asked.micro_batches()[0], RATES)
    peaks = [frame.peak((name,) * frame.count) for name in HELD]
    return min(peaks), max(peaks)


def truly(facts: ModelFacts, asked: PlanRequest, found: Solution) -> int:
    """The peak of a solution by the walk of the real timeline."""
    accumulates = found.rows < asked.rows
    return peak_bytes(facts, asked.work_of(found.rows), found.policies, accumulates=accumulates)


MODELS = {
    "alike": model(*[LAYER] * 5),
    "small head": replace(model(*[LAYER] * 5), vocabulary=64),
    "windows": model(*[WINDOWED, LAYER] * 2, LAYER),
}
WORKS = {
    "lora": {},
    "qlora with few supervised": {"quantize": "nf4"},
    "full": {"rank": 0, "adapted": (), "trained_itemsize": 2, "optimizer": "adamw_8bit"},
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_frame_says_what_the_timeline_and_the_seconds_say(kind, work, rows):
    facts, asked = MODELS[kind], request(2, work=WORKS[work])
    if work.endswith("few supervised"):
        asked = replace(asked, work=replace(asked.work, supervised=1000))
    frame = Frame(facts, asked, rows, RATES)
    layouts = [(name,) * 5 for name in HELD]
    layouts += [tuple(itertools.islice(itertools.cycle(ON_DEVICE), start, start + 5)) for start in range(5)]
    for policies in layouts:
        accumulates = rows < 2
        assert frame.peak(policies) == peak_bytes(facts, frame.work, policies, accumulates=accumulates)
        assert frame.host(policies) == host_bytes(facts, frame.work, policies)
        seconds = step_seconds(facts, frame.work, policies, RATES, 2 // rows).total
        assert frame.step_seconds(policies) == pytest.approx(seconds, rel=1e-12)
        if not accumulates:
            assert frame.moments(policies) == timeline(facts, frame.work, policies)


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("kind", MODELS)
def test_no_layout_without_the_host_is_faster_than_the_solution(kind, work):
    """All 5^5 layouts, at 41 budgets between the leanest and the richest."""
    facts, asked = MODELS[kind], request(work=WORKS[work], host_bytes=0)
    frame = Frame(facts, asked, 1, RATES)
    every = [(frame.peak(p), frame.step_seconds(p)) for p in itertools.product(ON_DEVICE, repeat=5)]
    low, high = min(peak for peak, _ in every), max(peak for peak, _ in every)
    for part in range(41):
        budget = low + (high - low) * part // 40
        found = solve(facts, asked, RATES, budget)
        assert found.fits
        best = min(seconds for peak, seconds in every if peak <= budget)
        assert found.seconds == pytest.approx(best, rel=1e-9)
    assert not solve(facts, asked, RATES, low - 1).fits


@pytest.mark.parametrize("window", [None, 256])
def test_no_layout_whose_first_layers_move_under_one_policy_is_faster(window):
    wide = LayerFacts(hidden=4096, inner=14_336, heads=32, kv_heads=8, head_dim=128, rotary_dim=128)
    facts, asked = model(wide, replace(wide, window=window), wide, wide, wide), request()
    frame = Frame(facts, asked, 1, RATES)
    moving = [name for name in HELD if name not in ON_DEVICE]
    every = [
        (frame.peak(policies), frame.step_seconds(policies))
        for first in range(6)
        for name in moving
        for rest in itertools.product(ON_DEVICE, repeat=5 - first)
        for policies in [(name,) * first + rest]
    ]
    low, high = min(peak for peak, _ in every), max(peak for peak, _ in every)
    moved = 0
    for tenth in range(11):
        budget = low + (high - low) * tenth // 10
        found = solve(facts, asked, RATES, budget)
        assert found.fits
        best = min(seconds for peak, seconds in every if peak <= budget)
        assert found.seconds <= best * (1 + 1e-9)
        moved += found.host > 0
    assert moved > 3


def test_what_the_prefix_takes_is_added_to_the_rest():
    """The sum that enumerating prefixes rests on."""
    facts, asked = model(*[LAYER] * 8), request()
    frame = Frame(facts, asked, 1, RATES)
    for parts in [(("offload_attention", 5),), (("offload", 2), ("keep_offload_attention", 4))]:
        prefix = Prefix(frame, parts)
        rest = [*["recompute"] * 1, *["keep"] * (7 - prefix.count)]
        ways = frame.of([*prefix.policies, *rest])
        timed = [way.timed for way in ways]
        apart = prefix.seconds + sum(way.seconds for way in ways[prefix.count :])
        assert apart == pytest.approx(forward_seconds(timed) + backward_seconds(timed), rel=1e-12)
        assert prefix.seconds > prefix.least_seconds, "it waits for the link, or nothing is tested"
        leaving = [way.moved for way in ways[prefix.count - 2 : prefix.count]]
        assert prefix.kept == sum(way.kept for way in ways[: prefix.count]) + sum(leaving)
        assert prefix.host == frame.host([*prefix.policies, *rest])


@settings(max_examples=40, deadline=None)
@given(
    share=st.floats(0.0, 1.1),
    more=st.floats(0.0, 0.5),
    rows=st.sampled_from([1, 3, 8]),
    tokens=st.sampled_from([500, 2048, 5000]),
    work=st.sampled_from(sorted(WORKS)),
    kind=st.sampled_from(sorted(MODELS)),
    host=st.sampled_from([None, 0, 40 * MIB]),
)
def test_budgets_are_kept_to_and_more_memory_is_never_slower(share, more, rows, tokens, work, kind, host):
    facts, asked = MODELS[kind], request(rows, tokens, work=WORKS[work], host_bytes=host)
    low, high = spread(facts, asked)
    budget = int(low + share * (high - low) * rows)
    found = solve(facts, asked, RATES, budget)
    true = truly(facts, asked, found)
    assert found.peak >= true
    if len(set(found.policies)) == 1 or not found.host:
        assert found.peak == true
    assert found == replace(solve(facts, asked, RATES, budget), frame=found.frame)
    if not found.fits:
        return
    assert found.peak <= budget
    assert host is None or found.host <= host
    larger = solve(facts, asked, RATES, int(budget + more * (high - low) * rows))
    assert larger.fits
    assert larger.seconds <= found.seconds * (1 + 1e-9)


def test_the_last_layers_that_move_are_there_until_they_are_wanted():
    """Nothing pushes them out any more (`models.offload`)."""
    facts, asked = model(*[LAYER] * 6), request()
    frame = Frame(facts, asked, 1, RATES)
    ways = frame.ways[0]
    moved, kept = ways["offload_attention"].moved, ways["offload_attention"].kept
    policies = (*["offload_attention"] * 3, *["keep"] * 3)
    held = {moment.label: moment.activations for moment in frame.moments(policies)}
    assert held["forward 2"] == 2 * kept + 2 * moved
    assert held["forward 5"] == 3 * kept + 2 * moved + 2 * ways["keep"].kept
    assert held["head"] == held["backward 5"] == 3 * kept + 2 * moved + 3 * ways["keep"].kept
    assert held["backward 3"] == 3 * kept + 2 * moved + ways["keep"].kept
    assert held["backward 2"] == 3 * kept + 2 * moved
    assert held["backward 1"] == 2 * kept + 2 * moved
    assert held["backward 0"] == kept + moved
    assert frame.peak(policies) >= peak_bytes(facts, frame.work, policies, accumulates=False)


def test_lean_layers_come_first_and_those_that_move_before_them():
    facts, asked = model(*[LAYER] * 12), request()
    low, high = spread(facts, asked)
    rank = {
        name: number
        for number, name in enumerate(
            ["recompute", "recompute_projections", "recompute_gate_up", "keep", "keep_all"]
        )
    }
    mixed = 0
    for tenth in range(1, 10):
        policies = solve(facts, asked, RATES, low + (high - low) * tenth // 10).policies
        moving = [bool(HELD[name].moved) for name in policies]
        assert moving == sorted(moving, reverse=True)
        rest = [rank[name] for name in policies if name in rank]
        assert rest == sorted(rest)
        mixed += len(set(rest)) > 1
    assert mixed


def test_a_fixed_policy_and_a_fixed_micro_batch_are_held_to():
    facts = model(*[LAYER] * 4)
    found = solve(facts, request(8, policy="recompute", micro_batch=2), RATES, 80 * 2**30)
    assert (found.policies, found.rows, found.fits) == (("recompute",) * 4, 2, True)
    assert not solve(facts, request(8, policy="keep_all", micro_batch=8), RATES, found.peak).fits


def test_what_does_not_fit_is_the_leanest_there_is():
    facts, asked = model(*[LAYER] * 4), request(8)
    found = solve(facts, asked, RATES, 100 * MIB)
    low, _ = spread(facts, asked)
    assert (found.fits, found.peak, found.rows) == (False, low, 1)
    # without memory of the host nothing moves there
    assert not solve(facts, replace(asked, host_bytes=0), RATES, 100 * MIB).host


def test_layers_of_transformers_know_two_policies_and_need_more():
    fused = replace(model(*[LAYER] * 4), vocabulary=1000)  # of a large one the head takes more than any layer
    stock = replace(fused, unfused="its norms are others")
    for name in ("keep", "recompute"):
        asked = request(1, policy=name)
        ours, theirs = (solve(facts, asked, RATES, 80 * 2**30) for facts in (fused, stock))
        assert theirs.peak > ours.peak
        assert theirs.seconds > ours.seconds
    low = solve(stock, request(1, policy="recompute"), RATES, 1).peak
    found = solve(stock, request(1), RATES, low)
    assert found.fits
    assert set(found.policies) <= {"keep", "recompute"}
    assert solve(stock, request(1), RATES, 80 * 2**30).policies == ("keep",) * 4


def test_micro_batches_part_a_step_evenly_and_are_few():
    assert request(8, 4096).micro_batches() == [1, 2, 3, 4]
    assert request(8, 20_000).micro_batches() == [1]
    assert request(7, 128, micro_batch=9).micro_batches() == [7]
    many = request(1000, 128).micro_batches()
    assert many[0] == 1
    assert many[-1] == 125
    assert len(many) < 20


@pytest.mark.slow  # a time, which a busy machine does not keep
def test_eighty_layers_take_less_than_a_second():
    layer = LayerFacts(hidden=8192, inner=28_672, heads=64, kv_heads=8, head_dim=128, rotary_dim=128)
    facts, asked = model(*[layer] * 80), request(2, work={"quantize": "nf4"})
    low, high = spread(facts, asked)
    solve(facts, asked, RATES, high)  # what is remembered of layers is remembered then
    for share in (0.2, 0.5, 0.8):
        started = time.process_time()
        assert solve(facts, asked, RATES, int(low + share * (high - low))).fits
        assert time.process_time() - started < 1.0
