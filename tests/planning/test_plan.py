"""Plans: what they say of memory and time, and what they advise where a run does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tunesmith.planning import plan as planning
from tunesmith.planning.bytes import LIBRARIES, fixed_bytes, head_rows, peak_bytes, timeline
from tunesmith.planning.cards import CARDS
from tunesmith.planning.facts import ModelFacts, Work
from tunesmith.planning.fit import pinnable
from tunesmith.planning.known_models import published_config
from tunesmith.planning.plan import PARTS, Plan, PlanRequest, make_plan
from tunesmith.planning.read_facts import read_facts
from tunesmith.planning.request import settled
from tunesmith.planning.seconds import step_seconds
from tunesmith.planning.solver import solve

GIB = 2**30
EIGHT = read_facts(published_config("meta-llama/Llama-3.1-8B") or {}, "8B")
FOUR = read_facts(published_config("Qwen/Qwen3-4B") or {}, "4B")
SMALL = read_facts(published_config("HuggingFaceTB/SmolLM2-135M") or {}, "135M")


def asked(card: str = "H100-80GB", rows: int = 4, length: int = 4096, **changes) -> PlanRequest:
    work = Work((length,), length, **changes.pop("work", {"quantize": "nf4"}))
    return PlanRequest(card, work, rows, **changes)


def changed(request: PlanRequest, setting: str) -> PlanRequest:
    """The request as a run file with this setting would make it."""
    name, _, value = setting.partition("=")
    work = request.work
    match name:
        case "memory.policy":
            return replace(request, policy=value)
        case "memory.embedding":
            return replace(request, embedding=value)
        case "train.micro_batch":
            return replace(request, micro_batch=None)
        case "train.sequence_length":
            return replace(request, work=replace(work, documents=(int(value),), supervised=int(value)))
        case "adapter.rank":
            return replace(request, work=replace(work, rank=int(value)))
        case "adapter.kind":
            lora = Work(work.documents, work.supervised)
            return replace(request, work=replace(lora, optimizer=work.optimizer))
        case "train.optimizer":
            return replace(request, work=replace(work, optimizer=value))
        case "model.quantize":
            return replace(request, work=replace(work, quantize=value))
        case "model.dtype":
            return replace(request, work=replace(work, trained_itemsize=2))
    raise AssertionError(setting)


def check_alternatives(facts: ModelFacts, request: PlanRequest, plan: Plan) -> None:
    """What is said of other settings is what a plan with them says."""
    for other in (*plan.nearest, *plan.alternatives):
        again = replace(request, card=other.summary.card)
        if "host memory" in other.what:
            again = replace(again, host_bytes=pinnable(int(other.what.partition(" ")[0]) * GIB))
        for setting in other.settings:
            again = changed(again, setting)
        assert make_plan(facts, again).summary == other.summary


def test_a_plan_says_what_the_models_of_bytes_and_seconds_say():
    request = asked(steps=100, budget=0.5)
    plan = make_plan(EIGHT, request)
    work = request.work_of(plan.micro_batch_rows)
    passes = 4 // plan.micro_batch_rows
    assert plan.fits
    assert plan.missing_bytes == 0
    assert plan.budget_bytes == int(0.5 * CARDS["H100-80GB"].memory_bytes)
    peak = peak_bytes(EIGHT, work, plan.policies, accumulates=passes > 1)
    assert plan.peak_bytes == peak <= plan.budget_bytes
    rates = CARDS["H100-80GB"].rates()
    seconds = step_seconds(EIGHT, work, plan.policies, rates, passes).total
    assert plan.step_seconds == pytest.approx(seconds, rel=1e-12)
    assert plan.tokens_per_second == pytest.approx(4 * 4096 / seconds)
    assert plan.total_seconds == pytest.approx(100 * seconds)
    assert plan.tokens == work.tokens
    assert plan.chunks["head"] == head_rows(EIGHT, work)


def test_the_parts_are_those_of_the_walk_and_the_largest_moment_is_the_peak():
    request = asked(rows=1)
    plan = make_plan(EIGHT, request)
    fixed = fixed_bytes(EIGHT, request.work)
    assert tuple(plan.parts) == PARTS
    assert plan.parts["weights"] == fixed.weights
    assert plan.parts["optimizer"] == fixed.optimizer
    assert plan.parts["reserve"] == LIBRARIES
    moments = timeline(EIGHT, request.work, plan.policies)
    assert plan.parts["activations"] == max(moment.activations for moment in moments)
    assert [label for label, _ in plan.timeline] == [moment.label for moment in moments]
    assert max(sum(parts.values()) for _, parts in plan.timeline) == plan.peak_bytes
    head = next(parts for label, parts in plan.timeline if label == "head")
    assert head["head"] == plan.parts["head"] > 0
    assert head["workspace"] == 0


def test_weights_that_nothing_computes_with_are_counted():
    tower = replace(EIGHT, other_parameters=10**9)
    bare, seeing = make_plan(EIGHT, asked(rows=1)), make_plan(tower, asked(rows=1))
    assert seeing.parts["weights"] - bare.parts["weights"] == 2 * 10**9
    assert seeing.peak_bytes - bare.peak_bytes == 2 * 10**9


def test_a_budget_in_bytes_is_never_more_than_the_card_has():
    assert make_plan(EIGHT, asked(budget=24 * GIB)).budget_bytes == 24 * GIB
    card = CARDS["H100-80GB"]
    assert make_plan(EIGHT, asked(budget=500 * GIB)).budget_bytes == card.memory_bytes


def test_what_fits_names_the_next_card_the_other_weights_and_half_the_length():
    request = asked()
    plan = make_plan(EIGHT, request)
    assert not plan.nearest
    assert [(other.what, other.settings) for other in plan.alternatives] == [
        ("GH200", ()),
        ("LoRA instead of QLoRA", ("model.quantize=none",)),
        ("rows of half the length", ("train.sequence_length=2048",)),
    ]
    check_alternatives(EIGHT, request, plan)


def test_weights_that_were_published_in_4_bits_are_not_said_to_be_otherwise():
    names = [other.what for other in make_plan(EIGHT, asked(published_quantized=True)).alternatives]
    assert names == ["GH200", "rows of half the length"]


def test_what_does_not_fit_names_settings_under_which_it_does():
    request = asked("RTX-3090", work={}, length=16_384, budget=0.75, host_bytes=0)
    plan = make_plan(EIGHT, request)
    assert not plan.fits
    assert plan.missing_bytes == plan.peak_bytes - plan.budget_bytes > 0
    assert not plan.alternatives
    assert all(other.summary.fits for other in plan.nearest)
    names = [other.what for other in plan.nearest]
    assert names[0] == "QLoRA instead of LoRA"
    assert plan.nearest[-1].summary.card == "RTX-5090"
    check_alternatives(EIGHT, request, plan)


def test_what_lacks_memory_of_the_host_says_how_much_would_do():
    request = asked("H100-80GB", length=500_000, rows=1, host_bytes=pinnable(125 * GIB))
    plan = make_plan(EIGHT, request)
    assert not plan.fits
    (host,) = [other for other in plan.nearest if "host memory" in other.what]
    assert host.what == "178 GiB of free host memory"
    assert host.settings == ()
    assert host.summary.card == "H100-80GB"
    check_alternatives(EIGHT, request, plan)
    assert not make_plan(EIGHT, replace(request, host_bytes=pinnable(165 * GIB))).fits


def test_fixed_settings_that_are_in_the_way_are_left_to_the_plan_first():
    plan = make_plan(EIGHT, asked("RTX-4090", length=16_384, policy="keep_all", micro_batch=4, host_bytes=0))
    assert plan.nearest[0].settings == ("memory.policy=auto", "train.micro_batch=auto")
    plan = make_plan(EIGHT, asked("RTX-4090", length=8192, policy="keep_all", micro_batch=1))
    assert plan.nearest[0].settings == ("memory.policy=auto",)


def test_an_embedding_that_is_in_the_way_is_left_to_the_plan_first():
    request = asked("RTX-3090", work={}, length=2048, budget=0.68, embedding="device")
    plan = make_plan(EIGHT, request)
    assert not plan.fits
    assert plan.nearest[0].what == "embedding left to the plan"
    assert plan.nearest[0].settings == ("memory.embedding=auto",)
    check_alternatives(EIGHT, request, plan)
    moved = make_plan(EIGHT, replace(request, embedding="auto"))
    assert (moved.embedding, plan.embedding) == ("host", "device")
    assert plan.parts["weights"] - moved.parts["weights"] == EIGHT.table_parameters * 2


def test_a_batch_and_a_run_in_tokens_stay_as_long_with_shorter_rows():
    request = replace(asked(rows=8, steps=100), batch_tokens=30_000, run_tokens=3_200_000)
    half = request.of_length(2048)
    assert (half.rows, half.steps) == (15, 105)  # 30,000 / 2,048 = 14.6; 3,200,000 / (15 x 2,048) = 104.2
    assert (half.work.documents, half.work.supervised) == ((2048,), 2048)
    rows = asked(rows=8, steps=100).of_length(2048)
    assert (rows.rows, rows.steps) == (8, 100)


@pytest.mark.parametrize(
    ("trained_in", "card", "optimizer", "itemsize"),
    [
        ("auto", "H100-80GB", "adamw_8bit", 4),  # of 4 billion parameters 10 bytes each
        ("auto", "RTX-4090", "adamw_8bit", 2),
        ("auto", "RTX-4090", "adafactor", 4),  # it does not round
        ("auto", "V100-32GB", "adamw_8bit", 4),  # it has no bfloat16
        ("bfloat16", "H100-80GB", "adamw_8bit", 2),
        ("float32", "RTX-4090", "adamw_8bit", 4),
    ],
)
def test_what_weights_train_in_is_the_cards_own(trained_in, card, optimizer, itemsize):
    work = {"rank": 0, "adapted": (), "optimizer": optimizer}
    request = asked(card, work=work, trained_in=trained_in)
    assert settled(FOUR, request).work.trained_itemsize == itemsize
    assert make_plan(FOUR, request).parts["weights"] == pytest.approx(itemsize * FOUR.parameters, rel=0.01)


def test_what_becomes_of_weights_on_another_card_is_said():
    """On a 4090 4 billion weights train in bfloat16, on an A100 of 80 GB in float32."""
    request = asked("RTX-4090", work={"rank": 0, "adapted": (), "optimizer": "adamw_8bit"}, trained_in="auto")
    names = [other.what for other in make_plan(FOUR, request).nearest]
    assert names[-1] == "RTX-5090"
    names = [other.what for other in make_plan(FOUR, replace(request, card="RTX-5090")).alternatives]
    assert names[0] == "A100-40GB"
    names = [other.what for other in make_plan(FOUR, replace(request, card="L40S")).alternatives]
    assert names[0] == "H100-80GB, weights in float32"


def test_smaller_moments_may_make_weights_larger():
    """On an L40S 3 billion weights with AdamW's moments train in bfloat16, and with moments in 8 bits in float32."""
    model = read_facts(published_config("Qwen/Qwen2.5-3B") or {}, "3B")
    request = asked("L40S", work={"rank": 0, "adapted": ()}, trained_in="auto", length=512, budget=28 * GIB)
    plan = make_plan(model, request)
    assert not plan.fits
    assert plan.nearest[0].settings == ("train.optimizer=adamw_8bit", "model.dtype=bfloat16")


def test_cards_without_bfloat16_are_not_told_to_train_in_it():
    request = asked(
        "V100-32GB", work={"rank": 0, "adapted": (), "optimizer": "adamw_8bit"}, trained_in="auto"
    )
    plan = make_plan(FOUR, request)
    assert not plan.fits
    assert not any("model.dtype=bfloat16" in other.settings for other in plan.nearest)
    assert not any("bfloat16" in other.what for other in plan.nearest if other.settings)


def test_the_next_larger_card_is_no_slower():
    for name in ("H100-80GB", "RTX-4090", "A100-40GB"):
        (larger, *_) = make_plan(SMALL, asked(name, work={})).alternatives
        assert CARDS[larger.what].tensor >= CARDS[name].tensor
        assert CARDS[larger.what].gb > CARDS[name].gb


def test_two_changes_where_one_is_not_enough():
    request = asked("L4", work={"rank": 64}, length=65_536, budget=0.45, host_bytes=0)
    plan = make_plan(EIGHT, request)
    assert plan.nearest[0].settings == ("model.quantize=nf4", "train.sequence_length=4096")
    check_alternatives(EIGHT, request, plan)


def test_full_fine_tuning_that_does_not_fit_gets_8_bits_and_bfloat16():
    request = asked(work={"rank": 0, "adapted": ()}, length=2048)
    plan = make_plan(EIGHT, request)
    assert plan.nearest[0].settings == ("train.optimizer=adamw_8bit", "model.dtype=bfloat16")
    assert plan.nearest[1].settings == ("adapter.kind=lora",)
    check_alternatives(EIGHT, request, plan)


def test_where_nothing_fits_nothing_is_advised_but_a_card():
    seventy = read_facts(published_config("meta-llama/Llama-3.1-70B") or {}, "70B")
    plan = make_plan(seventy, asked("L4", work={}))
    assert [other.what for other in plan.nearest] == ["B200"]
    assert not make_plan(seventy, asked("L4", work={}, budget=20 * GIB)).nearest


def test_what_is_too_large_by_its_weights_is_not_laid_out(monkeypatch):
    laid_out = []

    def watched(facts, request, *others):
        laid_out.append((request.card, request.work.quantize))
        return solve(facts, request, *others)

    monkeypatch.setattr(planning, "solve", watched)
    seventy = read_facts(published_config("meta-llama/Llama-3.1-70B") or {}, "70B")
    make_plan(seventy, asked("L4", work={}))
    assert laid_out == [("L4", "none"), ("B200", "none")]


def test_a_table_that_can_move_to_the_host_is_not_in_the_way():
    """The weights are too large for the budget by less than the input embedding is."""
    request = asked("RTX-4090", work={"rank": 16}, length=512, rows=1)
    held = fixed_bytes(EIGHT, request.work).weights + 2**30
    table = EIGHT.table_parameters * 2
    plan = make_plan(EIGHT, replace(request, embedding="device", budget=held - table // 2))
    assert not plan.fits
    assert plan.nearest[0].settings == ("memory.embedding=auto",)


def test_a_small_model_keeps_everything_in_large_micro_batches():
    plan = make_plan(SMALL, asked(rows=16, length=1024, work={}))
    assert plan.strip == (("keep_all", 30),)
    assert plan.micro_batch_rows == 16


def test_of_cards_that_are_sold_with_the_same_memory_the_fastest_is_named():
    """A V100 of 32 GB would hold this by a whisker, and an RTX 5090, of which drivers take more, does not."""
    model = read_facts(published_config("Qwen/Qwen2.5-14B") or {}, "14B")
    request = asked("RTX-4090", rows=16, length=2048, work={}, embedding="device")

    assert make_plan(model, replace(request, card="V100-32GB")).fits
    assert not make_plan(model, replace(request, card="RTX-5090")).fits
    assert make_plan(model, request).nearest[-1].summary.card == "A100-40GB"
