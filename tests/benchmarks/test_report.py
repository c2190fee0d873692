"""The table and the bars, from results written by hand."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.peers.report import BARS, bars, judge, latest, table
from benchmarks.peers.tables import CASES, SYSTEMS

from tests.benchmarks.fakes import measured


def row(case: str, system: str, speed: int = 0, peak: float = 8.0, **changes: Any) -> dict[str, Any]:
    about = {
        "case": case, "system": system, "title": "8B QLoRA, 2×4,096 tokens", "card": "H100", "driver": "580.1",
        "date": "2026-11-24", "sitting": "A", "kind": SYSTEMS[system].kind, "wall_seconds": 60.0,
        "versions": {"torch": "2.11.0"},
    }  # fmt: skip
    return about | measured("rows", tokens_per_second=speed, peak_gib=peak) | changes


RESULTS = [
    row("8b-qlora", "tunesmith-keep", 15_000, 31.0),
    row("8b-qlora", "unsloth-none", 14_000, 36.0),
    row("8b-qlora", "stock", layout="rows", status="oom", reason="CUDA | full"),
    row("8b-qlora", "unsloth", 10_000, 8.06),
    row("8b-qlora", "tunesmith-offload_attention", 13_000, 8.2),
    row("8b-qlora", "tunesmith-offload", 12_600, 8.0),
    row("8b-qlora", "tunesmith-keep", 16_000, 31.0, sitting="B"),
    row("8b-qlora-packed", "unsloth", 9_000, layout="packed"),
    row("8b-qlora-packed", "unsloth", 5_000, layout="padded"),
    row("8b-qlora-packed", "tunesmith-keep", 17_000, layout="packed"),
]


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def outcome(number: int, records: list[dict[str, Any]]) -> tuple[str, str]:
    return judge(BARS[number], latest(records))


def test_a_table_compares_within_a_kind():
    page = table(RESULTS, tflops=100.0)

    (keep,) = lines(page, "| tunesmith-keep | kept | 16,000")
    # 1e9 FLOP in 0.128 s are 7.8 GFLOP/s, 0.0078% of 100 TFLOP/s
    assert "| 1.14 × unsloth-none | 31.00 | 2.00 | 0% | 6.5000, 6.4000, 6.3000 … 6.0000 |" in keep
    assert "| 1.26 × unsloth |" in lines(page, "| tunesmith-offload |")[0]
    assert lines(page, "| stock |") == ["| stock | kept | oom | – | – | – | – | CUDA \\| full |"]
    assert page.index("| tunesmith-keep | kept | 16,000") < page.index("| unsloth-none |")
    assert "15,000" not in page, "the last row counts"


def test_a_table_names_layouts_sittings_and_versions():
    page = table(RESULTS, tflops=790.0)

    assert lines(page, "| tunesmith-keep | kept | 17,000 | – |"), "no peer of its kind was measured"
    assert lines(page, "| unsloth (padded) | lean | 5,000 | 0.56 × unsloth (packed) |")
    assert "Rows come from several sittings: A, B." in page
    assert "torch 2.11.0, driver 580.1, 2026-11-24. Roofline: 790 TFLOP/s." in page


def test_the_share_of_the_roofline():
    page = table([row("8b-lora", "tunesmith-keep", 1, flops=79e12, step_seconds=0.25)], tflops=790.0)

    assert "| 40% |" in page


def test_different_batches_and_calls_that_were_not_fused_are_said():
    page = table(
        [
            row("8b-lora", "tunesmith-keep", 10, fallbacks={"a KV cache": 3}),
            row("8b-lora", "unsloth", 10, batch="other"),
        ],
        tflops=790.0,
    )

    assert "did not get the same batches" in page
    assert "tunesmith-keep: 3 layer calls were not fused (a KV cache)." in page


def test_bars_hold_fail_or_were_not_measured():
    assert outcome(0, RESULTS) == ("holds", "tunesmith-keep 16,000")
    assert outcome(1, RESULTS) == ("holds", "tunesmith-keep 31.0")
    assert outcome(2, RESULTS) == ("holds", "tunesmith-keep 16,000 / unsloth-none 14,000 = 1.143")
    assert outcome(3, RESULTS) == ("holds", "tunesmith-offload 12,600 / unsloth 10,000 = 1.260")
    assert outcome(4, RESULTS) == ("not measured", "none of ours")
    assert outcome(5, RESULTS) == ("fails", "tunesmith-keep 17,000 / unsloth (packed) 9,000 = 1.889")


def test_a_bar_fails_by_either_bound():
    slow = [row("8b-qlora", "tunesmith-keep", 15_799, 32.01)]

    assert outcome(0, slow)[0] == "fails"
    assert outcome(1, slow)[0] == "fails"
    assert outcome(2, slow) == ("not measured", "tunesmith-keep 15,799; nothing of unsloth-none at 8b-qlora")


def test_only_what_fits_counts_as_lean():
    assert outcome(3, RESULTS[:5]) == ("not measured", "none of ours within 8.06 GiB")


@pytest.mark.parametrize(("peak", "said"), [(9.6, "holds"), (9.61, "fails")])
def test_a_plan_takes_no_more_memory_than_the_peer(peak, said):
    (bar,) = [bar for bar in BARS if bar.case == "70b-qlora"]
    records = [row(bar.case, "unsloth", 10_000, 9.6), row(bar.case, "tunesmith-plan_lean", 13_700, peak)]

    figures = f"tunesmith-plan_lean 13,700 / unsloth 10,000 = 1.370, in {peak} and 9.6 GiB"
    assert judge(bar, records) == (said, figures)


def test_a_bar_against_ones_own():
    records = [row("135m-lora", "tunesmith-keep", 100), row("135m-lora-masked", "tunesmith-keep", 125)]

    assert outcome(9, records) == ("holds", "tunesmith-keep 125 / tunesmith-keep 100 = 1.250")


def test_bars_are_a_table_for_each_card():
    other = [result | {"card": "H200"} for result in RESULTS[:1]]

    page = bars([*RESULTS, *other])

    assert page.count("| bar | bound | outcome | figures |") == 2
    assert "| 8B QLoRA kept, tokens/s | ≥ 15,800 | holds | tunesmith-keep 16,000 |" in page
    assert "| 8B QLoRA kept, tokens/s | ≥ 15,800 | fails | tunesmith-keep 15,000 |" in page
    assert "| 8B QLoRA kept, peak GiB | ≤ 32.0 | holds |" in page


def test_no_results():
    assert table([], 790.0) == bars([]) == "No results."


@pytest.mark.parametrize("bar", BARS, ids=lambda bar: bar.text)
def test_a_bar_names_what_is_measured(bar):
    for case, systems in [(bar.case, bar.systems), *([bar.over] if bar.over else [])]:
        for system in systems:
            assert any(name == system or name.startswith(system) for name in CASES[case].systems)
    assert (bar.at_least is None) != (bar.at_most is None)
