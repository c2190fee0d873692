"""The comparison of kernels on a CPU: what is compared, what is refused, and a table whatever happens to a peer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.kernel_peers import compare, with_bitsandbytes, with_torch, with_tunesmith, worker
from benchmarks.kernel_peers.rows import ROWS, Prepared, q_and_k, refuse_more, result

from benchmarks import kernels

NORM = ("rms_norm", {"tokens": 8, "width": 16, "residual": True})
NESTED = ("dequantize_nf4", {"rows": 16, "columns": 128, "nested": True})


def comparison(**cells: list[dict[str, Any]]) -> compare.Comparison:
    """Two cases on a card that copies 1 TB/s."""
    return compare.Comparison([NORM, NESTED], cells, "Some card", {"torch": "2.11"}, 1e12, "2026-11-24")


# ---------------------------------------------------------------------- the table


def test_the_table_has_a_column_a_system_and_a_row_a_case() -> None:
    found = comparison(
        tunesmith=[{"ms": 1.024e-6}, {"ms": 0.5}], torch=[{"ms": 2.0}, {"reason": "too large"}]
    )
    lines = list(found.lines())

    assert lines[0] == "Some card, 2026-11-24; torch 2.11; copy 1.00 TB/s."
    assert lines[2] == "| kernel | size | tunesmith ms | torch ms | ours, share of copy |"
    assert lines[3].count("---") == 5
    # four passes over 8 · 16 elements of 2 bytes are 1,024 bytes, or 1.024e-6 ms of a copy
    assert lines[4] == "| rms_norm | tokens 8, width 16, residual | 0.000 | 2.000 | 100% |"
    assert lines[5].startswith("| dequantize_nf4 | rows 16, columns 128, nested | 0.500 | - |")


def test_every_missing_figure_has_its_reason_below_the_table() -> None:
    lost = {"reason": "out of memory"}
    text = list(
        comparison(
            tunesmith=[{"ms": 1.0}, {"ms": 1.0}], liger=[lost, lost], unsloth=[{"ms": 1.0}, lost]
        ).lines()
    )

    assert "- No figure of Liger: out of memory." in text
    assert "- No figure of Unsloth for dequantize_nf4: out of memory." in text


def test_a_reason_that_holds_for_some_sizes_names_them() -> None:
    other = ("rms_norm", {"tokens": 8, "width": 32})
    found = compare.Comparison(
        [NORM, other], {"tunesmith": [{"ms": 1.0}] * 2, "torch": [{"ms": 1.0}, {"reason": "no"}]}, "", {}, None, ""
    )  # fmt: skip

    assert "- No figure of torch for rms_norm (tokens 8, width 32): no." in list(found.lines())


# ---------------------------------------------------------------------- a system's process


def scripted(
    monkeypatch: pytest.MonkeyPatch, *processes: tuple[list[dict[str, Any]], int | None]
) -> list[int]:
    """Let processes write these answers and end with these statuses; returns how many jobs each was given."""
    given: list[int] = []

    def run(arguments: Sequence[str], log: Path, *_: Any) -> int | None:
        answers, status = processes[len(given)]
        given.append(len(json.loads(arguments[-1])))
        Path(arguments[3]).write_text("".join(json.dumps(answer) + "\n" for answer in answers))
        log.write_text("Traceback\nValueError: it broke\n")
        return status

    monkeypatch.setattr(compare, "run_process", run)
    return given


ABOUT: dict[str, Any] = {"versions": {"torch": "2.11"}}
JOBS = [NORM, NORM, NESTED]


def test_a_case_that_ends_its_process_costs_itself_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = scripted(monkeypatch, ([ABOUT, {"job": 0, "ms": 1.0}], -11), ([ABOUT, {"job": 0, "ms": 3.0}], 0))

    cells, about = compare.run_peer("liger", JOBS, "cuda", tmp_path, 9.0)

    assert [cell.get("ms") for cell in cells] == [1.0, None, 3.0]
    assert cells[1]["reason"] == "ValueError: it broke"
    assert given == [3, 1]
    assert about == ABOUT


def test_after_an_error_that_spoils_the_device_the_next_case_gets_a_new_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spoiled = {"job": 0, "reason": "illegal memory access"}
    given = scripted(
        monkeypatch,
        ([ABOUT, spoiled], worker.UNUSABLE),
        ([ABOUT, {"job": 0, "ms": 2.0}, {"job": 1, "ms": 3.0}], 0),
    )

    cells, _ = compare.run_peer("liger", JOBS, "cuda", tmp_path, 9.0)

    assert [cell.get("ms") for cell in cells] == [None, 2.0, 3.0]
    assert cells[0]["reason"] == "illegal memory access"
    assert given == [3, 2]


def test_a_peer_that_cannot_be_imported_is_tried_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = scripted(monkeypatch, ([], 1))

    cells, about = compare.run_peer("unsloth", JOBS, "cuda", tmp_path, 9.0)

    assert given == [3]
    assert about == {}
    assert {cell["reason"] for cell in cells} == {"ValueError: it broke"}


def test_a_peer_whose_time_is_up_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = scripted(monkeypatch, ([ABOUT, {"job": 0, "ms": 1.0}], None))

    cells, _ = compare.run_peer("unsloth", JOBS, "cuda", tmp_path, 9.0)

    assert given == [3]
    assert [cell.get("ms") for cell in cells] == [1.0, None, None]
    assert cells[2]["reason"] == "its 9 s were over"


def test_a_peer_that_dies_at_every_case_is_not_started_for_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = scripted(monkeypatch, *[([ABOUT], -11)] * compare.RESTARTS)

    cells, _ = compare.run_peer("unsloth", [NORM] * 9, "cuda", tmp_path, 9.0)

    assert given == [9, 8, 7, 6, 5, 4]
    assert cells[-1]["reason"] == "its processes ended too often"


def test_a_failure_of_a_peer_is_a_cell_and_the_next_case_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(size: Any, inputs: Any) -> Prepared:
        raise RuntimeError("no kernel image\nmore words")

    peer = SimpleNamespace(PEER={"dequantize_nf4": with_torch.PEER["dequantize_nf4"], "rms_norm": fails})
    monkeypatch.setattr(worker.importlib, "import_module", lambda name: peer)
    file = tmp_path / "answers.jsonl"

    worker.main("liger", str(file), "cpu", json.dumps([NORM, NESTED]))

    about, first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert about["versions"]["torch"] == torch.__version__
    assert first == {"job": 0, "reason": "RuntimeError: no kernel image"}
    assert second["ms"] > 0


# ---------------------------------------------------------------------- what is compared


def test_a_peer_that_computes_something_else_has_no_time() -> None:
    peer = SimpleNamespace(
        PEER={"rms_norm": lambda size, inputs: Prepared(lambda: inputs["hidden_TD"], result)}
    )

    assert "computes something else" in worker.time_job(peer, *NORM, "cpu")["reason"]


@pytest.mark.parametrize(
    "size", [{"rank": 16}, {"down_rank": 4}, {"recompute": True}, {"rotary_dim": 8}, {"activation": "gelu"}]
)
def test_what_only_our_kernels_fuse_is_not_compared(size: dict[str, Any]) -> None:
    peer = SimpleNamespace(PEER=with_torch.PEER)
    whole = {
        **ROWS["glu"].small[0],
        **ROWS["rms_norm_backward"].small[0],
        **ROWS["rope_qkv_"].small[0],
        **size,
    }
    name = {"recompute": "rms_norm_backward", "rotary_dim": "rope_qkv_"}.get(next(iter(size)), "glu")

    assert "ms" not in worker.time_job(peer, name, whole, "cpu")


def test_sizes_without_extras_are_compared() -> None:
    for name, row in ROWS.items():
        refuse_more(name, {key: value for key, value in row.large[0].items() if key != "rank"})


def test_a_kernel_that_a_peer_lacks_is_said_to_be_lacking() -> None:
    assert "no such kernel" in worker.time_job(with_bitsandbytes, *NORM, "cpu")["reason"]


@pytest.mark.parametrize("size", [NESTED[1], {"rows": 6, "columns": 64, "pad": 8}])
def test_bitsandbytes_gets_our_scales_in_its_form(size: dict[str, Any]) -> None:
    answer = worker.time_job(with_bitsandbytes, "dequantize_nf4", size, "cpu")

    assert answer["error"] < 1e-6


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_computed_by_us_and_by_plain_torch(name: str) -> None:
    for peer in (with_tunesmith, with_torch):
        answer = worker.time_job(peer, name, dict(ROWS[name].small[0]), "cpu")
        assert answer["ms"] > 0
        assert answer["error"] < 1e-5


def test_q_and_k_are_the_heads_of_the_fused_buffer() -> None:
    size = {"heads": 2, "kv_heads": 1, "head_dim": 3}
    qkv_TN = torch.arange(2 * 12.0).view(2, 12)
    q, k = q_and_k(size, qkv_TN)

    assert q.shape == (1, 2, 2, 3)
    assert q[0, 1, 0].tolist() == [3.0, 4.0, 5.0]
    assert k[0, 0, 1].tolist() == [18.0, 19.0, 20.0]
    assert q.transpose(1, 2).is_contiguous(), "peers turn heads in place where tokens come first"


# ---------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_compares_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kernels.md"

    kernels.main(
        ["dequantize_nf4", "--small", "--peers", "torch", "bitsandbytes", "liger", "--out", str(file)]
    )

    text = file.read_text()
    assert text == capsys.readouterr().out
    table = [line.split("|")[3:7] for line in text.splitlines() if line.startswith("| dequantize_nf4")]
    assert len(table) == len(ROWS["dequantize_nf4"].small)
    for ours, torch_ms, _, liger in table:
        assert float(ours) > 0
        assert float(torch_ms) > 0
        assert liger.strip() == "-"
    assert float(table[1][2]) > 0, "bitsandbytes dequantises nested scales on a CPU"
    assert "- No figure of Liger: " in text


@pytest.mark.parametrize("words", [["no_such_kernel"], ["--set", "glu.ADAPTER_ROWS=1", "--peers"]])
def test_a_command_that_cannot_work_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parse: Callable[[list[str]], Any] = kernels.parse
    with pytest.raises(SystemExit):
        parse(words)
    assert "error:" in capsys.readouterr().err
