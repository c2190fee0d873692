"""`tunesmith runs` and `tunesmith runs compare`, called as the entry point calls them."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.cli.command import exit_code, succeed
from tests.support.fake_runs import evaluated, events_of, step, write_run
from tunesmith.cli.runs import SORTS, Choice, compare_runs, list_runs
from tunesmith.cli.terminal_chart import print_chart

NOW = 1_800_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs in different states, the first one the oldest."""
    runs = tmp_path_factory.mktemp("runs")
    write_run(runs / "a", events_of(last=1.5), train={"learning_rate": 1e-4})
    write_run(runs / "b", events_of(10, last=1.1, reason="interrupted"), train={"learning_rate": 3e-4})
    write_run(
        runs / "c",
        events_of(30, last=1.3),
        model={"name": "org/Other"},
        data={"train": [{"path": "x/chats"}]},
    )
    write_run(runs / "d", [])
    for number, name in enumerate("abcd"):
        os.utime(runs / name / "events.jsonl", (NOW + number, NOW + number))
    return runs


def names(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The runs that are listed, in order, each by its letter."""
    succeed("runs", *words, "--json")
    return "".join(Path(run["name"]).name for run in json.loads(capsys.readouterr().out))


def test_the_newest_run_stands_first_with_its_figures(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    succeed("runs", folder)

    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == (
        "run model adapter data state steps first last best train tokens/s GiB time when".split()  # noqa: SIM905
    )
    assert [Path(line.split()[0]).name for line in lines] == list("dcba")
    assert lines[2].split()[1:12] == [
        "org/small-model", "lora", "16", "rows.jsonl", "interrupted", "10", "2.5000", "1.1000",
        "1.1000", "1.2929", "200",
    ]  # fmt: skip
    assert lines[0].split()[1:7] == ["org/small-model", "lora", "16", "rows.jsonl", "failed", "0"]


@pytest.mark.parametrize(
    ("words", "order"),
    [
        ((), "dcba"), (("--reverse",), "abcd"), (("--sort", "name"), "abcd"), (("--sort", "last"), "bcad"),
        (("--sort", "best"), "bacd"), (("--sort", "steps"), "cabd"), (("--state", "finished"), "ca"),
        (("--state", "finished", "--state", "failed"), "dca"), (("--model", "other"), "c"),
        (("--data", "ROWS"), "dba"), (("-n", "2"), "dc"), (("--state", "running"), ""),
    ],
)  # fmt: skip
def test_choosing_and_sorting(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], order: str
) -> None:
    assert names(capsys, folder, *words) == order


@pytest.mark.parametrize("sort", SORTS)
def test_every_order_takes_runs_without_figures(
    folder: Path, capsys: pytest.CaptureFixture[str], sort: str
) -> None:
    assert sorted(names(capsys, folder, "--sort", sort)) == list("abcd")
    if sort in ("last", "best", "train", "memory", "time"):
        assert names(capsys, folder, "--sort", sort)[-1] == "d"


def test_one_run_and_the_folder_of_habit(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    assert names(capsys, folder / "a") == "a"
    monkeypatch.chdir(folder.parent)
    assert exit_code("runs") == 2
    assert "There is no folder runs/ here." in capsys.readouterr().err
    (folder.parent / "runs").symlink_to(folder)
    try:
        assert names(capsys) == "dcba"
    finally:
        (folder.parent / "runs").unlink()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere",), "nowhere does not exist."),
        ((".", "--sort", "loss"), "--sort loss: there is no such choice."),
        ((".", "--state", "done"), "Choose finished, running, interrupted, failed."),
        (("compare", "."), "One run alone cannot be compared."),
        (("compare", "nowhere", "elsewhere"), "There is no run directory nowhere."),
        (("compare", ".", ".", "--x", "epochs"), "Choose steps, tokens, time."),
    ],
)
def test_mistakes_get_a_sentence(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert exit_code("runs", *words) == 2
    assert said in capsys.readouterr().err


def test_no_runs_is_no_error(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("runs", tmp_path)
    assert capsys.readouterr().out == f"No runs in {tmp_path}.\n"
    succeed("runs", folder, "--state", "running")
    assert capsys.readouterr().out == "None of 4 runs is like that.\n"


def terminal(width: int = 80, *, color: bool = True) -> Console:
    system = "truecolor" if color else None
    return Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system=system, legacy_windows=False
    )  # type: ignore[arg-type]


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_narrow_terminal_gets_the_columns_that_matter(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder.parent)
    console = terminal(80, color=False)
    list_runs(Choice(folders=[folder.name]), console)

    *lines, last = printed(console).splitlines()
    assert max(map(len, lines)) <= 80
    assert "last" in lines[0]
    assert "left out, for want of width: GiB, time" in last


def test_hundreds_of_long_runs_are_listed_quickly(tmp_path: Path) -> None:
    one = write_run(tmp_path / "r0", events_of(1000))
    for number in range(1, 200):
        other = tmp_path / f"r{number}"
        other.mkdir()
        for file in one.iterdir():
            (other / file.name).symlink_to(file)
    began = time.process_time()
    list_runs(Choice(folders=[str(tmp_path)]), Console(file=io.StringIO()))

    assert time.process_time() - began < 1.5  # 0.4 s on a machine with nothing else to do


# ---------------------------------------------------------------- comparing


def test_runs_beside_each_other(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    succeed(
        "runs",
        "compare",
        folder / "a",
        folder / "b",
        folder / "c",
        "--png",
        tmp_path / "c.png",
        "--x",
        "tokens",
    )

    out = capsys.readouterr().out
    rows = {tuple(line.split()) for line in out.splitlines()}
    assert ("train.learning_rate", "0.0001", "0.0003", "0.0002") in rows
    assert ("last", "held-out", "loss", "1.5000", "1.1000", "1.3000") in rows
    assert ("steps", "20", "10", "30") in rows
    assert not any("train.seed" in row for row in rows)
    assert "Not all of these runs are finished." in out
    assert "a: a   b: b   c: c" in out
    assert out.count("tokens ") >= 2
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed("runs", "compare", folder / "a", folder / "d", "--json")

    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == ["a", "d"]
    assert found["settings"] == {"train.learning_rate": [1e-4, 2e-4]}
    assert found["figures"]["last held-out loss"] == [1.5, None]


def test_the_best_loss_is_green_and_curves_have_colours(folder: Path) -> None:
    console = terminal(100)
    compare_runs([str(folder / name) for name in "abd"], console)

    out = printed(console)
    assert "\x1b[1;32m1.1000" in out
    assert "\x1b[1;32m1.5000" not in out
    assert any(0x2800 < ord(char) < 0x2900 for char in out)


def test_a_curve_goes_from_the_upper_left_to_the_lower_right() -> None:
    console = Console(file=io.StringIO(), width=60)
    print_chart(console, "loss", [[(0, 4.0), (10, 2.0)], [(0, 4.0), (10, 4.0)], []], "optimizer step")

    title, *rows, axis = printed(console).splitlines()
    assert title == "loss"
    assert rows[0].startswith("       4 |b")
    assert rows[0].count("b") == 50
    assert rows[-1].startswith("       2 |")
    assert rows[-1].endswith("a")
    columns = [row.rfind("a") for row in rows[1:]]
    assert columns == sorted(columns)
    assert columns[0] > 9
    assert axis.split() == ["0", "optimizer", "step", "10"]


def test_a_chart_of_nothing_and_of_one_point() -> None:
    console = Console(file=io.StringIO(), width=60)
    print_chart(console, "loss", [[], []], "optimizer step")
    assert printed(console) == ""
    print_chart(console, "loss", [[(3, 1.0)]], "optimizer step")
    assert printed(console).count("a") >= 1


def test_names_of_data_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write_run(tmp_path / "\x1b[2Jred", [evaluated(0, 1.0), step(1)], model={"name": "\x1b[31mmodel"})
    good = write_run(tmp_path / "good")
    succeed("runs", tmp_path)
    succeed("runs", "compare", bad, good)

    assert "\x1b" not in capsys.readouterr().out
