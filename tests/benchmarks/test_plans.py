"""Planned layouts beside what they do: which are measured, that they compute the same, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.planned import GIB, card_name, facts_of, plan_step, work_of

from benchmarks import plan_report, plans, shapes
from tests.benchmarks.tiny import SHAPE


@pytest.fixture(autouse=True)
def _tiny_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setitem(shapes.SHAPES, "tiny", SHAPE)


def row(**changes: Any) -> dict[str, Any]:
    """One of results as `plans.py` writes it."""
    return {
        "shape": "8b", "layers": 32, "adapter": "qlora", "rows": 2, "length": 4096, "mean": None,
        "supervised": 1.0, "optimizer": "adamw", "asked": "keep", "plan": "32 × keep",
        "embedding": "device", "fits": True, "status": "ok",
        "foreseen_peak_gib": 30.3, "foreseen_host_gib": 0.0, "foreseen_seconds": 0.51, "tokens_per_second": 16000,
        "step_seconds": 0.5, "peak_gib": 30.0, "reserved_gib": 31.0, "host_gib": 0.0,
        "card": "NVIDIA H100 80GB HBM3", "date": "2026-11-27",
    } | changes  # fmt: skip


def test_a_budget_is_kept_and_spent() -> None:
    facts, work = facts_of(shapes.SHAPES["8b"]), work_of("qlora", [4096, 4096], 8190)
    found = [
        plan_step(facts, work, card="H100-80GB", budget=gib * GIB, host_bytes=60 * GIB) for gib in (9, 16, 32)
    ]
    for plan, gib in zip(found, (9, 16, 32), strict=True):
        assert plan.fits
        assert 0.9 * gib < plan.peak_bytes / GIB <= gib
    assert found[0].tokens_per_second < found[1].tokens_per_second < found[2].tokens_per_second


def test_cards_by_the_names_that_the_driver_gives() -> None:
    assert card_name("NVIDIA H100 80GB HBM3") == "H100-80GB"
    assert card_name("NVIDIA H200") == "H200"
    assert card_name("CPU") == "H100-80GB"


def test_layouts_that_are_alike_are_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--budgets", "0.92", "55", "70", "--policies", "keep_all_unpacked", "keep", "--foresee"]
    plans.main([*words, "--out", str(tmp_path / "rows.jsonl")])
    said = [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()]
    # everything is held within 55 GiB already
    assert said == ["32 layers, within 0.92", "32 layers, keep"]
    assert not (tmp_path / "rows.jsonl").exists()


def test_layouts_compute_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["--shape", "tiny", "--adapter", "lora", "--batch", "2x48", "--layers", "2", "3"]
    words += ["--optimizer", "adamw_8bit"]
    plans.main([*words, "--policies", "keep", "recompute", "--steps", "2", "--warm", "1", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["layers"], r["asked"]) for r in rows] == [
        (2, "keep"), (2, "recompute"), (3, "keep"), (3, "recompute"),
    ]  # fmt: skip
    for found in rows:
        assert found["status"] == "ok"
        assert found["card"] == "CPU"
        assert found["fallbacks"] == {}
        assert found["optimizer"] == "adamw_8bit"
        assert found["plan"] == f"{found['layers']} × {found['asked']}"
    for keep, recompute in (rows[:2], rows[2:]):
        # the adapter trains on from layout to layout, a little in three steps
        assert recompute["losses"] == pytest.approx(keep["losses"], abs=0.01)
        assert recompute["losses"][0] < keep["losses"][0]
    assert capsys.readouterr().out.count("RESULT") == 4


def test_the_last_row_of_a_layout_counts(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    for found in (row(peak_gib=1.0), row(asked="recompute"), row(peak_gib=2.0), row(layers=8)):
        plan_report.append(out, found)
    assert [(r["asked"], r["layers"], r["peak_gib"]) for r in plan_report.read(out)] == [
        ("keep", 32, 2.0), ("recompute", 32, 30.0), ("keep", 8, 30.0),
    ]  # fmt: skip


def test_the_table_says_how_far_off_forecasts_were() -> None:
    text = "\n".join(plan_report.table([row(), row(asked="within 4", status="oom", foreseen_peak_gib=7.5)]))
    assert "8B QLoRA, 2×4,096 tokens, NVIDIA H100 80GB HBM3, 2026-11-27" in text
    assert "| 16,000 | 0.500, +2.0% | 30.00, +1.0% | 31.00 | 0.00 |" in text
    assert "| oom | | 7.50 | | |" in text


def test_an_account_of_more_layers() -> None:
    """2 GiB a layer and 5 besides; half a GiB of the host a layer."""
    rows = [row(layers=n, peak_gib=5.0 + 2.0 * n, host_gib=0.5 * n) for n in (4, 8)]
    within = [row(layers=n, asked="within 9", peak_gib=1.0) for n in (4, 8)]
    (line,) = plan_report.account([*rows, *within, row(asked="recompute")], 80)
    assert "keep: 2.000 GiB a layer (measured with 4 and 8) and 5.00 GiB besides: 165.00 GiB" in line
    assert line.endswith("40.0 GiB of the host")


def test_where_the_embedding_lay_and_who_updated_is_told_apart() -> None:
    there = [row(layers=n, peak_gib=5.0 + 2.0 * n) for n in (4, 8)]
    moved = [row(layers=n, peak_gib=4.0 + 2.0 * n, embedding="host") for n in (4, 8)]
    coded = [row(layers=n, peak_gib=3.0 + 2.0 * n, optimizer="adamw_8bit") for n in (4, 8)]
    lines = list(plan_report.account([*there, *moved, *coded], 10))
    assert [line.partition(" GiB a layer")[0] for line in lines] == [
        "8B QLoRA, 2×4,096 tokens, keep: 2.000",
        "8B QLoRA, 2×4,096 tokens, keep, embedding in host memory: 2.000",
        "8B QLoRA, 2×4,096 tokens, adamw_8bit, keep: 2.000",
    ]
    for line, size in zip(lines, (25, 24, 23), strict=True):
        assert f"{size:.2f} GiB with 10 layers" in line
    foreseen = [float(line.rpartition("layers (")[2].partition(" ")[0]) for line in lines]
    table = 128_256 * 4096 * 2 / GIB
    assert foreseen[0] - foreseen[1] == pytest.approx(table, abs=0.011)
    assert foreseen[2] < foreseen[0]


def test_the_account_is_beside_the_planner_s() -> None:
    (line,) = plan_report.account([row(layers=4, peak_gib=8.0), row(layers=8, peak_gib=11.0)], 32)
    facts, work = facts_of(shapes.SHAPES["8b"]), work_of("qlora", [4096, 4096], 8192)
    plan = plan_step(facts, work, card="H100-80GB", budget=1.0, policy="keep", host_bytes=None)
    assert f"({plan.peak_bytes / GIB:.2f} foreseen)" in line


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, results = tmp_path / "rows.jsonl", tmp_path / "results.jsonl"
    for found in (row(), row(asked="within 9", peak_gib=8.9, tokens_per_second=13700), row(shape="70b")):
        plan_report.append(out, found)
    peer = {
        "case": "8b-qlora", "card": row()["card"], "status": "ok", "tokens": 8192, "system": "unsloth",
        "peak_gib": 8.05, "tokens_per_second": 10173,
    }  # fmt: skip
    others = [peer | {"card": "another"}, peer | {"system": "tunesmith-keep"}, peer | {"case": "8b-lora"}]
    results.write_text("\n".join(map(json.dumps, [peer, *others])))
    assert plan_report.peers(results, row()) == [("unsloth", 8.05, 10173)]
    assert plan_report.peers(tmp_path / "none.jsonl", row()) == []

    words = ["--out", str(out), "--picture", str(tmp_path / "curve.png"), "--peers", str(results)]
    plans.main(words)
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="no row of the shape 135m"):
        plans.main([*words, "--shape", "135m"])
