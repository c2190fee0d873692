"""What a micro-batch may hold: never over the budget, and more memory never makes it worse."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.planning.fit import (
    BUSY_TOKENS,
    USABLE,
    Fit,
    PolicyCost,
    fit_micro_batch,
    layer_costs,
    pinnable,
)

MIB, GIB = 2**20, 2**30


def named(pairs: list[tuple[float, float]]) -> tuple[PolicyCost, ...]:
    """Costs "0", "1", … of which the first takes nothing of the host."""
    return tuple(PolicyCost(str(n), device, host if n else 0.0) for n, (device, host) in enumerate(pairs))


costs = st.lists(
    st.tuples(st.floats(1.0, 5e7), st.one_of(st.just(0.0), st.floats(1.0, 1e7))), min_size=1, max_size=6
).map(named)
cases = st.fixed_dictionaries(
    {
        "costs": costs,
        "device": st.sampled_from(sorted(BUSY_TOKENS)),
        "free_bytes": st.integers(-MIB, 200 * GIB),
        "free_host_bytes": st.integers(0, 2000 * GIB),
        "row_tokens": st.integers(1, 200_000),
    }
)

# 32 layers of which each keeps 32 KiB a token, 8 KiB of that its input
LAYERS = layer_costs(kept_per_token=1.0 * MIB, input_per_token=8192.0, layers=32)
FUSED = (
    PolicyCost("keep", 1.0 * MIB),
    PolicyCost("recompute_gate_up", 0.5 * MIB),
    PolicyCost("offload_attention", 0.125 * MIB, 0.5 * MIB),
    PolicyCost("recompute", 0.25 * MIB),
    PolicyCost("offload", 0.0625 * MIB, 0.25 * MIB),
)


def fit(**values: Any) -> Fit:
    defaults = {"policy": "auto", "costs": FUSED, "device": "cuda", "row_tokens": 100}
    return fit_micro_batch(
        **defaults | {"free_bytes": 1000 * MIB, "free_host_bytes": 100 * GIB} | values  # type: ignore[arg-type]
    )


def of(case: dict[str, Any], name: str) -> PolicyCost:
    return next(cost for cost in case["costs"] if cost.name == name)


def takes(cost: PolicyCost, tokens: int, case: dict[str, Any]) -> bool:
    """Whether so many tokens fit on the device and on the host."""
    on_device = cost.device_bytes * tokens <= USABLE * max(case["free_bytes"], 0)
    return on_device and cost.host_bytes * tokens <= pinnable(case["free_host_bytes"])


@given(cases)
def test_never_over_the_budget_unless_it_is_one_token(case: dict[str, Any]) -> None:
    for policy in ("auto", *(cost.name for cost in case["costs"])):
        found = fit(policy=policy, **case)
        assert 1 <= found.tokens <= BUSY_TOKENS[case["device"]]
        assert found.bytes_per_token == of(case, found.policy).device_bytes
        if found.tokens > 1:
            assert takes(of(case, found.policy), found.tokens, case)


@given(cases)
def test_auto_is_the_fastest_under_which_a_row_fits(case: dict[str, Any]) -> None:
    found = fit(**case)
    fitting = [cost.name for cost in case["costs"] if takes(cost, case["row_tokens"], case)]
    if fitting:
        assert found.policy == fitting[0]


@given(cases)
def test_where_no_row_fits_auto_takes_least_of_the_device(case: dict[str, Any]) -> None:
    if any(takes(cost, case["row_tokens"], case) for cost in case["costs"]):
        case = {**case, "free_bytes": 0}
    rows = case["row_tokens"]
    on_host = [c for c in case["costs"] if c.host_bytes * rows <= pinnable(case["free_host_bytes"])]
    found = fit(**case)
    assert found.policy in [cost.name for cost in on_host]
    assert found.bytes_per_token == min(cost.device_bytes for cost in on_host)


@given(cases, st.integers(0, 100 * GIB))
def test_more_memory_is_never_slower(case: dict[str, Any], more: int) -> None:
    names = [cost.name for cost in case["costs"]]
    for name in ("free_bytes", "free_host_bytes"):
        less, greater = fit(**case), fit(**{**case, name: case[name] + more})
        if takes(of(case, less.policy), case["row_tokens"], case):
            assert names.index(greater.policy) <= names.index(less.policy)
        if less.policy == greater.policy:
            assert less.tokens <= greater.tokens


@given(cases)
def test_a_policy_that_is_asked_for_is_obeyed(case: dict[str, Any]) -> None:
    for cost in case["costs"]:
        assert fit(policy=cost.name, **case).policy == cost.name


def test_the_figures_by_hand() -> None:
    # 80% of 1,000 MiB at 1 MiB a token
    assert fit(costs=LAYERS) == Fit(policy="keep", tokens=800, bytes_per_token=float(MIB))
    # a row of 801 tokens does not fit: 32 layer inputs of 8 KiB and one layer's 1/32 MiB are 288 KiB a token
    leaner = fit(costs=LAYERS, row_tokens=801)
    assert leaner == Fit(policy="recompute", tokens=2844, bytes_per_token=288.0 * 1024)
    assert 2844 * 288 <= 800 * 1024 < 2845 * 288


def test_auto_walks_from_the_fastest_to_the_leanest() -> None:
    rows = (800, 1600, 6400, 12_800)  # what 800 MiB hold under the four that are leaner in turn
    found = [fit(row_tokens=row + extra).policy for row in rows for extra in (0, 1)]
    assert found == [
        "keep", "recompute_gate_up",
        "recompute_gate_up", "offload_attention",
        "offload_attention", "offload",  # recompute takes more of the device, so it holds no longer row
        "offload", "offload",
    ]  # fmt: skip


def test_a_host_without_memory_offloads_nothing() -> None:
    poor = {"free_host_bytes": 100 * MIB}
    assert fit(row_tokens=1601, **poor).policy == "recompute"
    # 50 MiB of the host hold 200 tokens of 1/4 MiB; the device alone would hold 12,800
    assert fit(policy="offload", **poor).tokens == 200


def test_a_device_that_is_busy_takes_no_more() -> None:
    plenty = 1000 * GIB
    assert fit(free_bytes=plenty).tokens == BUSY_TOKENS["cuda"]
    assert fit(free_bytes=plenty, device="cpu").tokens == BUSY_TOKENS["cpu"]


def test_what_keeps_nothing_is_bounded_by_the_device_alone() -> None:
    head_only = layer_costs(kept_per_token=0.0, input_per_token=8192.0, layers=32)
    assert fit(costs=head_only) == Fit(policy="keep", tokens=BUSY_TOKENS["cuda"], bytes_per_token=0.0)


def test_nothing_free_still_gives_a_row_to_try() -> None:
    for free in (0, -5):
        found = fit(costs=LAYERS, free_bytes=free)
        assert (found.tokens, found.policy) == (1, "recompute")


def test_one_layer_is_never_recomputed_of_its_own_accord() -> None:
    single = layer_costs(kept_per_token=1.0 * MIB, input_per_token=8192.0, layers=1)
    assert fit(costs=single, row_tokens=10**6).policy == "keep"
