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
from tunesmith.planning.policies import HELD, UNPACKED
from tunesmith.planning.request import PlanRequest
from tunesmith.planning.seconds import backward_seconds, forward_seconds, step_seconds
from tunesmith.planning.solver import Solution, solve

RATES = CARDS["H100-80GB"].rates()
LAYER = LayerFacts(hidden=1024, inner=2816, heads=16, kv_heads=4, head_dim=64, rotary_dim=64)
WINDOWED = replace(LAYER, window=256, norms=(True, True, True, True))
WIDE = LayerFacts(hidden=4096, inner=14_336, heads=32, kv_heads=8, head_dim=128, rotary_dim=128)
ON_DEVICE = [name for name, held in HELD.items() if not held.moved]
MOVING = [name for name, held in HELD.items() if held.moved]
MIXED = ["offload_attention", "keep", "keep", "offload", "recompute", "keep_offload_attention"]
MIB = 2**20


def model(*layers: LayerFacts) -> ModelFacts:
    return ModelFacts("small", "llama", layers, vocabulary=32_000, tied=False)


def request(rows: int = 1, tokens: int = 4096, **changes) -> PlanRequest:
    work = Work((tokens,), tokens, **changes.pop("work", {}))
    return PlanRequest("H100-80GB", work, rows, **({"embedding": "device"} | changes))


def spread(facts: ModelFacts, asked: PlanRequest) -> tuple[int, int]:
    """Peaks of the leanest and of the richest layout of the smallest micro-batch."""
    frame = Frame(facts, asked, asked.micro_batches()[0], RATES)
    peaks = [frame.peak((name,) * frame.count) for name in HELD]
    return min(peaks), max(peaks)


def truly(facts: ModelFacts, asked: PlanRequest, found: Solution) -> int:
    """The peak of a solution by the walk of the real timeline."""
    accumulates = found.rows < asked.rows
    work = replace(asked.work_of(found.rows), host_embedding=found.frame.work.host_embedding)
    return peak_bytes(facts, work, found.policies, accumulates=accumulates)


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
    for names in (ON_DEVICE, list(HELD), MIXED):
        cycled = [itertools.islice(itertools.cycle(names), start, start + 5) for start in range(len(names))]
        layouts += map(tuple, cycled)
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
    facts, asked = model(WIDE, replace(WIDE, window=window), WIDE, WIDE, WIDE), request()
    frame = Frame(facts, asked, 1, RATES)
    every = [
        (frame.peak(policies), frame.step_seconds(policies))
        for first in range(6)
        for name in MOVING
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


def test_gate_and_up_travel_in_long_rows_where_the_link_keeps_up():
    wide = LayerFacts(hidden=8192, inner=28_672, heads=64, kv_heads=8, head_dim=128, rotary_dim=128)
    facts, moved = model(*[wide] * 6), "keep_offload_all"
    for tokens, rates, pays in (
        (32_768, RATES, True),
        (8_192, RATES, False),
        (32_768, replace(RATES, host_link=RATES.host_link / 2), False),
    ):
        asked = request(tokens=tokens, work={"quantize": "nf4"})
        low, high = (Frame(facts, asked, 1, rates).peak((name,) * 6) for name in ("offload", "keep"))
        found = [solve(facts, asked, rates, low + (high - low) * part // 20) for part in range(21)]
        assert any(moved in one.policies for one in found) == pays
        named = solve(facts, replace(asked, policy=moved), rates, high)
        assert set(named.policies) == {moved}
        lean = solve(facts, replace(asked, policy="offload_attention"), rates, high)
        assert not pays or named.seconds < 0.95 * lean.seconds


@pytest.mark.parametrize("host_bytes", [None, 250 * MIB])
def test_no_layout_whose_first_layers_move_under_two_policies_is_faster(host_bytes):
    """All of them with the leaner one first, at 31 budgets."""
    facts, asked = replace(model(*[WIDE] * 6), vocabulary=64), request(host_bytes=host_bytes)
    frame = Frame(facts, asked, 1, RATES)
    rest = ["recompute", "recompute_gate_up", "keep_all"]
    every = [
        (frame.peak(policies), frame.step_seconds(policies))
        for pair in itertools.combinations(["offload", "offload_attention", "keep_offload_attention"], 2)
        for first, second in itertools.product(range(7), repeat=2)
        if first + second <= 6
        for behind in itertools.product(rest, repeat=6 - first - second)
        for policies in [(pair[0],) * first + (pair[1],) * second + behind]
        if host_bytes is None or frame.host(policies) <= host_bytes
    ]
    low, high = min(peak for peak, _ in every), max(peak for peak, _ in every)
    moved = two = 0
    for part in range(31):
        budget = low + (high - low) * part // 30
        found = solve(facts, asked, RATES, budget)
        best = min(seconds for peak, seconds in every if peak <= budget)
        assert found.fits
        assert found.seconds <= best * (1 + 1e-9)
        moved += found.host > 0
        two += len(set(found.policies) & set(MOVING)) > 1
    assert moved > 3
    assert two or host_bytes


@pytest.mark.parametrize(
    "parts",
    [
        (("offload_attention", 5),),
        (("offload", 2), ("keep_offload_attention", 4)),
        (("offload_attention", 7),),
        (("offload", 3), ("offload_attention", 5)),
    ],
)
def test_what_the_prefix_takes_is_added_to_the_rest(parts):
    """The sums that enumerating prefixes rests on, whatever the layers behind it keep."""
    facts, asked = model(*[LAYER] * 8), request()
    frame = Frame(facts, asked, 1, replace(RATES, host_link=20e9))
    prefix = Prefix(frame, parts)
    alone = sum(way.seconds for way in prefix.ways)
    assert prefix.seconds > alone, "it waits for the link, or nothing is tested"
    for rest in itertools.islice(itertools.product(ON_DEVICE, repeat=8 - prefix.count), 30):
        policies = [*prefix.policies, *rest]
        ways, moments = frame.of(policies), frame.moments(policies)
        behind = ways[prefix.count :]
        timed = [way.timed for way in ways]
        apart = prefix.seconds + sum(way.seconds for way in behind)
        assert apart == pytest.approx(forward_seconds(timed) + backward_seconds(timed), rel=1e-12)
        held = {moment.label: moment.activations for moment in moments}
        assert held["head"] == prefix.kept + sum(way.kept for way in behind)
        for number in range(prefix.count, 8):
            before = sum(way.kept for way in ways[prefix.count : number])
            assert held[f"forward {number}"] == prefix.kept + prefix.leaving(number) + before
        own = [
            moment.bytes
            for moment in moments
            if moment.label.split()[-1].isdigit() and int(moment.label.split()[-1]) < prefix.count
        ]
        assert prefix.fits(max(own))
        assert not prefix.fits(max(own) - 1)


@settings(max_examples=40, deadline=None)
@given(
    share=st.floats(0.0, 1.1),
    more=st.floats(0.0, 0.5),
    rows=st.sampled_from([1, 3, 8]),
    tokens=st.sampled_from([64, 500, 2048, 5000]),
    work=st.sampled_from(sorted(WORKS)),
    kind=st.sampled_from(sorted(MODELS)),
    host=st.sampled_from([None, 0, 40 * MIB, 100 * MIB]),
    embedding=st.sampled_from(["device", "auto"]),
)
def test_budgets_are_kept_to_and_more_memory_is_never_slower(
    share, more, rows, tokens, work, kind, host, embedding
):  # fmt: skip
    facts = MODELS[kind]
    asked = request(rows, tokens, work=WORKS[work], host_bytes=host, embedding=embedding)
    low, high = spread(facts, asked)
    budget = int(low + share * (high - low) * rows)
    found = solve(facts, asked, RATES, budget)
    assert found.peak == truly(facts, asked, found)
    assert found == replace(solve(facts, asked, RATES, budget), frame=found.frame)
    if not found.fits:
        return
    assert found.peak <= budget
    assert host is None or found.host <= host
    larger = solve(facts, asked, RATES, int(budget + more * (high - low) * rows))
    assert larger.fits
    assert larger.seconds <= found.seconds * (1 + 1e-9)


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


@pytest.mark.parametrize("tokens", [64, 256])
def test_no_layout_of_short_rows_is_faster(tokens):
    """There held weights are much and activations little: what a layer unpacks in its backward pass lies beside those
    of all others."""
    facts = replace(model(*[WIDE] * 4), vocabulary=64)
    asked = request(tokens=tokens, work={"quantize": "nf4"}, host_bytes=0)
    frame = Frame(facts, asked, 1, RATES)
    every = [(frame.peak(p), frame.step_seconds(p)) for p in itertools.product(ON_DEVICE, repeat=4)]
    low, high = min(peak for peak, _ in every), max(peak for peak, _ in every)
    before = float("inf")
    for part in range(41):
        budget = low + (high - low) * part // 40
        found = solve(facts, asked, RATES, budget)
        assert found.seconds == pytest.approx(min(s for peak, s in every if peak <= budget), rel=1e-9)
        assert found.seconds <= before * (1 + 1e-9)
        before = found.seconds


def test_weights_are_held_unpacked_where_memory_is_left():
    facts, qlora = model(*[WIDE] * 8), {"quantize": "nf4"}
    most, keep = (
        Frame(facts, request(tokens=8192, work=qlora), 1, RATES).peak((name,) * 8)
        for name in ("keep_all_unpacked", "keep")
    )
    held = []
    for part in range(6):
        found = solve(facts, request(tokens=8192, work=qlora), RATES, keep + (most - keep) * part // 5)
        held.append(sum(name in UNPACKED for name in found.policies))
        assert (
            found.frame.unpacked(found.policies) == held[-1] * found.frame.ways[0]["keep_unpacked"].unpacked
        )
    assert held[0] == 0
    assert held == sorted(held)
    assert held[3] < held[-1] == 8
    assert not set(solve(facts, request(tokens=8192), RATES, most).policies) & set(UNPACKED)


@pytest.mark.parametrize(
    ("rows", "tokens", "micro_batch", "may"),
    [(8, 2048, None, [4, 8]), (8, 2048, 2, [2]), (1, 512, None, [1]), (3, 500, None, [3])],
)
def test_micro_batches_that_could_be_larger_unpack_their_weights_in_each_pass(rows, tokens, micro_batch, may):
    asked = request(rows, tokens, micro_batch=micro_batch, work={"quantize": "nf4"})
    frames = [Frame(model(WIDE), asked, size, RATES) for size in asked.micro_batches()]
    assert [frame.rows for frame in frames if set(frame.names) & set(UNPACKED)] == may


def test_a_settled_micro_batch_keeps_to_the_rule_of_the_open_one():
    facts, asked = model(*[WIDE] * 2), request(8, 2048, work={"quantize": "nf4"})
    for rows, may in ((1, False), (4, True)):
        found = solve(facts, asked, RATES, 80 * 2**30, rows=rows)
        assert found.rows == rows
        assert bool(set(found.policies) & set(UNPACKED)) == may


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


def table_of(facts: ModelFacts, asked: PlanRequest) -> int:
    """Bytes of the input embedding."""
    return facts.vocabulary * facts.hidden * asked.work.itemsize


def test_the_embedding_on_the_host_frees_its_bytes_and_costs_its_rows():
    facts, asked = MODELS["alike"], request(tokens=3000)
    device, host = (
        solve(facts, replace(asked, embedding=place, policy="keep"), RATES, 2**40)
        for place in ("device", "host")
    )
    assert device.peak - host.peak == host.host == table_of(facts, asked)
    assert not device.frame.work.host_embedding
    assert host.frame.work.host_embedding
    read = 3000 * facts.hidden * 2 / RATES.host_link
    assert host.seconds - device.seconds == pytest.approx(read, rel=1e-9)
    assert truly(facts, asked, host) == host.peak


def test_the_embedding_leaves_where_its_room_makes_a_step_faster():
    """One layout is faster by more than the rows take, and fits into the room of the embedding alone."""
    facts, asked = replace(MODELS["alike"], vocabulary=256_000), request()
    low, high = spread(facts, asked)
    budget = (low + high) // 2
    stays = solve(facts, asked, RATES, budget)
    found = solve(facts, replace(asked, embedding="auto"), RATES, budget)
    assert found.frame.work.host_embedding
    assert found.seconds < stays.seconds
    assert found.host >= table_of(facts, asked)
    assert found.fits


def test_the_embedding_stays_where_it_may_or_should():
    facts, asked = MODELS["alike"], request(embedding="auto")
    low, high = spread(facts, asked)
    table = table_of(facts, asked)
    assert not solve(facts, asked, RATES, high).frame.work.host_embedding, "everything fits"
    half = (low + high) // 2
    little = replace(asked, host_bytes=table - 1)
    assert not solve(facts, little, RATES, half).frame.work.host_embedding, "the host has no room"
    for other in (replace(facts, tied=True), replace(facts, unfused="a reason")):
        found = solve(other, asked, RATES, low)
        assert not found.frame.work.host_embedding
    full = request(work=WORKS["full"], embedding="auto")
    assert not solve(facts, full, RATES, half).frame.work.host_embedding


def test_what_fits_with_the_embedding_on_the_host_alone_fits():
    facts, asked = MODELS["alike"], request(embedding="auto")
    low, _ = spread(facts, asked)
    budget = low - table_of(facts, asked) // 2
    assert not solve(facts, replace(asked, embedding="device"), RATES, budget).fits
    found = solve(facts, asked, RATES, budget)
    assert found.fits
    assert found.frame.work.host_embedding
    # where nothing fits the leanest of all is named
    least = solve(facts, asked, RATES, 0)
    assert not least.fits
    assert least.frame.work.host_embedding
