"""The driver: it measures what is missing, goes on after an interruption, keeps to its time and records failures."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.peers.processes import Card, find_card, run_process
from benchmarks.peers.tables import CASES, SYSTEMS, Case, System

from benchmarks import compare, shapes
from tests.benchmarks.tiny import SHAPE

FAKE = "tests.benchmarks.fakes"


def fake(do: str = "rows", **options: Any) -> System:
    return System(FAKE, "kept", options={"do": do, **options})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command on other tables, on the CPU; returns the rows of results and what was printed."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setitem(shapes.SHAPES, "tiny", SHAPE)

    def call(cases: dict[str, Case], systems: dict[str, System], *arguments: str) -> tuple[list[Any], str]:
        monkeypatch.setattr(compare, "CASES", cases)
        monkeypatch.setattr(compare, "SYSTEMS", systems)
        assert compare.main(["--out", str(tmp_path / "out"), *arguments]) == 0
        return compare.Results(tmp_path / "out").read(), capsys.readouterr().out

    return call


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The folder in which a checkpoint would stand, so that none is written."""
    folder = tmp_path / "out" / "checkpoints" / "tiny"
    folder.mkdir(parents=True)
    return folder


def tiny(*systems: str, **changes: Any) -> Case:
    return Case("tiny", "lora", 2, 64, systems, **({"steps": 2, "warm": 1, "expected": 20} | changes))


@pytest.mark.slow
def test_end_to_end(run, tmp_path):
    cases = {"small": tiny("tunesmith-keep", "stock", "absent")}
    systems = SYSTEMS | {"absent": System(FAKE, "kept", needs=("no_such_package",))}

    rows, printed = run(cases, systems, "--budget", "200")

    ours, stock = rows
    assert [row["system"] for row in rows] == ["tunesmith-keep", "stock"]
    assert ours["batch"] == stock["batch"]
    assert ours["losses"][0] == pytest.approx(stock["losses"][0], abs=1e-4)
    assert ours["card"] == "CPU"
    assert {"torch", "transformers", "peft", "python"} <= ours["versions"].keys()
    assert "not installed: no_such_package; left out: absent" in printed
    assert (tmp_path / "out" / "logs" / "small.stock.log").is_file()
    assert (tmp_path / "out" / "checkpoints" / "tiny" / "tokenizer.json").is_file()
    page = run(cases, systems, "--table")[1]
    assert "| stock | kept | " in page
    assert "not get the same batches" not in page


def test_a_second_call_goes_on(run, weights):
    systems = {"first": fake(), "second": fake()}
    cases = {"a": tiny(*systems), "b": tiny(*systems)}

    rows, _ = run(cases, systems, "--systems", "first", "--cases", "a")
    assert [(row["case"], row["system"]) for row in rows] == [("a", "first")]

    rows, printed = run(cases, systems)
    assert [(row["case"], row["system"]) for row in rows] == [
        ("a", "first"), ("a", "second"), ("b", "first"), ("b", "second"),
    ]  # fmt: skip
    assert "Nothing is left" in printed
    assert len(run(cases, systems)[0]) == 4
    assert len(run(cases, systems, "--again", "--systems", "second")[0]) == 6


def test_results_of_another_card_do_not_count(run, weights, monkeypatch):
    cases, systems = {"a": tiny("one")}, {"one": fake()}
    run(cases, systems)
    monkeypatch.setattr(compare, "find_card", lambda: Card("Other", "1.0"))

    rows, _ = run(cases, systems)

    assert [row["card"] for row in rows] == ["CPU", "Other"]


def test_failures_are_results(run, weights, tmp_path):
    systems = {
        "gone": System("tests.benchmarks.no_such_module", "kept"),
        "halfway": fake("crash", after=1),
        "full": fake("exhaust"),
        "whole": fake(),
    }
    cases = {"a": tiny(*systems, mean=32)}

    rows, printed = run(cases, systems)

    found = {(row["system"], row["layout"]): row for row in rows}
    assert found["gone", "packed"]["status"] == "crash"
    assert "no_such_module" in found["gone", "packed"]["reason"]
    assert found["halfway", "packed"]["status"] == "ok"
    assert found["halfway", "padded"]["status"] == "crash"
    assert found["halfway", "padded"]["reason"] == "exit status 1: ValueError: no such kernel"
    assert found["full", "packed"]["status"] == "oom"
    assert found["whole", "padded"]["status"] == "ok"
    assert "Traceback" in (tmp_path / "out" / "logs" / "a.halfway.log").read_text()
    assert "crash: exit status 1" in printed
    assert len(run(cases, systems)[0]) == len(rows), "a failure is not tried again unasked"


def test_a_timeout_is_a_result(run, weights):
    rows, _ = run({"a": tiny("slow", expected=1)}, {"slow": fake("sleep")})

    (row,) = rows
    assert row["status"] == "timeout"
    assert row["reason"] == "took longer than 3 s; last line: compiling"
    assert row["wall_seconds"] < 30


def test_nothing_starts_that_would_not_end_in_time(run, weights):
    systems = {"long": fake()}
    cases = {"a": tiny("long", expected=100), "b": tiny("long", expected=10)}

    rows, printed = run(cases, systems, "--budget", "60")

    assert [row["case"] for row in rows] == ["b"]
    assert "1 of 2 left" in printed


def test_a_checkpoint_counts_against_the_budget(run, tmp_path):
    rows, printed = run({"a": tiny("one")}, {"one": fake()}, "--budget", "40")

    assert rows == []
    assert "1 of 1 left" in printed
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_what_the_budget_ends_is_not_blamed_on_the_system(run, weights):
    systems = {"quick": fake(), "slow": fake("sleep")}

    rows, printed = run({"a": tiny(*systems, expected=2)}, systems, "--budget", "4")

    assert [row["system"] for row in rows] == ["quick"]
    assert "1 of 2 left" in printed


def test_a_failed_checkpoint_is_named(run, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", SHAPE | {"vocab_size": -1})

    rows, printed = run({"a": tiny("one")}, {"one": fake()})

    assert rows == []
    assert "the checkpoint tiny could not be written: exit status 1" in printed


def test_fewer_layers_are_other_cases(run, tmp_path):
    folder = tmp_path / "out" / "checkpoints" / "tiny-1layers"
    folder.mkdir(parents=True)

    rows, _ = run({"a": tiny("one")}, {"one": fake()}, "--layers", "1")

    assert rows[0]["case"] == "a-1layers"
    assert rows[0]["title"].endswith("1 layers")


def test_a_pattern_that_names_nothing_is_refused(run):
    with pytest.raises(SystemExit, match=r"no system 'unslot'; there are: one"):
        run({"a": tiny("one")}, {"one": fake()}, "--systems", "unslot")


def test_a_line_that_was_cut_off_is_passed_over(tmp_path):
    results = compare.Results(tmp_path)
    results.append({"number": 1})
    with results.path.open("a") as file:
        file.write('{"number": 2, "ca')

    assert results.read() == [{"number": 1}]
    results.append({"number": 3})
    assert results.read() == [{"number": 1}, {"number": 3}]


def lives(process: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_ends_with_all_that_it_started(tmp_path):
    program = (
        "import subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )

    code = run_process(["-c", program], tmp_path / "log", 3.0, {}, tmp_path / "work")

    assert code is None
    child = int((tmp_path / "log").read_text())
    deadline = time.monotonic() + 10  # it was told to end, and takes a moment
    while lives(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not lives(child)


def test_the_card_is_the_cpu_where_no_gpu_is_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    assert find_card() == Card("CPU", "")


def test_the_tables_name_each_other():
    for name, case in CASES.items():
        assert set(case.systems) <= SYSTEMS.keys(), name
        assert case.shape in shapes.SHAPES
        assert json.loads(json.dumps(SYSTEMS[case.systems[0]].layouts(case)))


def test_a_system_that_stays_within_another_s_peak(run, weights):
    """It is told that peak less a hundredth, of the same case on the same card, and waits until it is known."""
    systems = {"lean": dataclasses.replace(fake("tell"), within="peer"), "peer": fake()}
    cases = {"a": tiny("lean", "peer"), "b": tiny("lean")}

    rows, printed = run(cases, systems)
    assert [(row["case"], row["system"]) for row in rows] == [("a", "peer")]
    assert "a.lean: peer has to be measured first" in printed

    rows, printed = run(cases, systems)
    assert (rows[-1]["case"], rows[-1]["system"], rows[-1]["budget"]) == ("a", "lean", 0.99)
    assert "b.lean: peer has to be measured first" in printed


def test_cases_of_fewer_layers_have_checkpoints_of_their_own(tmp_path):
    jobs = compare.plan(["70b-*"], ["unsloth"], tmp_path, None)
    assert [(job.case_name, job.config["num_hidden_layers"], job.checkpoint.name) for job in jobs] == [
        ("70b-qlora", 8, "70b-8layers"), ("70b-qlora-long", 8, "70b-8layers"),
    ]  # fmt: skip
