"""What a micro-batch may hold: never over the budget, and more memory never makes it worse."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.planning.fit import BUSY_TOKENS, USABLE, Fit, fit_micro_batch

MIB = 2**20

cases = st.fixed_dictionaries(
    {
        "device": st.sampled_from(sorted(BUSY_TOKENS)),
        "free_bytes": st.integers(-MIB, 200 * 2**30),
        "kept_per_token": st.floats(1.0, 5e7),
        "input_per_token": st.floats(1.0, 1e5),
        "layers": st.integers(1, 128),
        "row_tokens": st.integers(1, 200_000),
    }
)
policies = st.sampled_from(["auto", "keep", "recompute"])


def fit(**values: Any) -> Fit:
    return fit_micro_batch(
        **{"policy": "auto", "device": "cuda", "free_bytes": 1000 * MIB, "kept_per_token": float(MIB),
           "input_per_token": 8192.0, "layers": 32, "row_tokens": 100} | values
    )  # fmt: skip


@given(cases, policies)
def test_never_over_the_budget_unless_it_is_one_token(case: dict[str, Any], policy: str) -> None:
    found = fit(policy=policy, **case)
    assert 1 <= found.tokens <= BUSY_TOKENS[case["device"]]
    if found.tokens > 1:
        assert found.tokens * found.bytes_per_token <= USABLE * case["free_bytes"]


@given(cases, st.integers(0, 100 * 2**30))
def test_more_memory_never_turns_recomputation_on(case: dict[str, Any], more: int) -> None:
    if not fit(**case).recompute:
        assert not fit(**{**case, "free_bytes": case["free_bytes"] + more}).recompute


@given(cases, policies, st.integers(0, 100 * 2**30))
def test_more_memory_never_holds_less_under_the_same_choice(case, policy: str, more: int) -> None:
    less, greater = (
        fit(policy=policy, **case),
        fit(policy=policy, **case | {"free_bytes": case["free_bytes"] + more}),
    )
    if less.recompute == greater.recompute:
        assert less.tokens <= greater.tokens


@given(cases)
def test_auto_keeps_what_fits_and_recomputes_only_to_save_memory(case: dict[str, Any]) -> None:
    found = fit(**case)
    row_fits = case["kept_per_token"] * case["row_tokens"] <= USABLE * max(case["free_bytes"], 0)
    if row_fits:
        assert not found.recompute
    if found.recompute:
        assert found.bytes_per_token < case["kept_per_token"]


@given(cases)
def test_a_policy_that_is_asked_for_is_obeyed(case: dict[str, Any]) -> None:
    assert not fit(policy="keep", **case).recompute
    assert fit(policy="recompute", **case).recompute


def test_the_figures_by_hand() -> None:
    # 80% of 1,000 MiB at 1 MiB a token
    assert fit() == Fit(recompute=False, tokens=800, bytes_per_token=float(MIB))
    # a row of 801 tokens does not fit: 32 layer inputs of 8 KiB and one layer's 1/32 MiB are 288 KiB a token
    assert fit(row_tokens=801) == Fit(recompute=True, tokens=2844, bytes_per_token=288.0 * 1024)
    assert 2844 * 288 <= 800 * 1024 < 2845 * 288


def test_a_device_that_is_busy_takes_no_more() -> None:
    plenty = 1000 * 2**30
    assert fit(free_bytes=plenty).tokens == BUSY_TOKENS["cuda"]
    assert fit(free_bytes=plenty, device="cpu").tokens == BUSY_TOKENS["cpu"]


def test_nothing_free_still_gives_a_row_to_try() -> None:
    for free in (0, -5):
        found = fit(free_bytes=free)
        assert (found.tokens, found.recompute) == (1, True)


def test_one_layer_is_never_recomputed_of_its_own_accord() -> None:
    assert not fit(layers=1, row_tokens=10**6).recompute
