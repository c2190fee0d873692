"""`tunesmith train` from outside: the files of a run, running it again, and kills in the middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.command import exit_code, succeed
from tests.support.runs import run_settings
from tunesmith.config.load import load_settings
from tunesmith.training.metrics import read_events

STEPS = 8


@pytest.fixture
def run_file(tiny_model_dir: Path, tmp_path: Path):
    def write(name: str = "run", **sections: dict[str, Any]) -> Path:
        """A run in the directory `name`; dropout, so that random states matter when it goes on."""
        settings = run_settings(
            tiny_model_dir,
            tmp_path,
            adapter={"dropout": 0.2},
            output={"dir": str(tmp_path / name), "save_every": 3},
        )
        settings["train"]["steps"] = STEPS
        for section, changes in sections.items():
            settings.setdefault(section, {}).update(changes)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(e["step"], e["loss"]) for e in read_events(folder / "events.jsonl") if e["event"] == "step"]


def test_the_files_of_a_run(run_file, tmp_path: Path, capsys) -> None:
    path = run_file()
    succeed("train", path, "train.learning_rate=1e-3")
    run = tmp_path / "run"
    assert {entry.name for entry in run.iterdir()} == {
        "run.yaml", "versions.json", "events.jsonl", "loss.png", "adapter", "checkpoints", ".lock",
        "data.json", "masks.json", "report.html",
    }  # fmt: skip
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == [
        "step-00000003", "step-00000006", "step-00000008",
    ]  # fmt: skip
    assert load_settings(run / "run.yaml") == load_settings(path, ["train.learning_rate=1e-3"])
    assert json.loads((run / "versions.json").read_text())["torch"]
    kinds = [event["event"] for event in read_events(run / "events.jsonl")]
    assert kinds[:2] == ["start", "eval"]
    assert kinds[-1] == "end"
    assert kinds.count("step") == STEPS
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "adapter" / "run.yaml").read_text() == (run / "run.yaml").read_text()

    lines = capsys.readouterr().out.splitlines()
    for piece in (
        "LoRA rank 4",
        "40 rows as pair",
        "4 rows held out",
        f"step {STEPS}/{STEPS}",
        "held-out loss",
        "report.html",
    ):
        assert any(piece in line for line in lines), piece
    assert any(line.endswith(f"  {run / 'adapter'}") for line in lines), "a path in a log is not broken"


def test_the_resolved_run_file_repeats_the_run(run_file, tmp_path: Path) -> None:
    succeed("train", run_file())
    succeed("train", tmp_path / "run" / "run.yaml", f"output.dir={tmp_path / 'again'}")
    assert weights(tmp_path / "again") == weights(tmp_path / "run")
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_the_same_command_on_a_finished_run_trains_nothing(run_file, tmp_path: Path, capsys) -> None:
    path = run_file()
    succeed("train", path)
    before = weights(tmp_path / "run")
    capsys.readouterr()
    succeed("train", path)
    assert weights(tmp_path / "run") == before
    assert f"All {STEPS} steps are done already; to train on, raise their number." in capsys.readouterr().out


def test_settings_that_are_refused_do_not_replace_those_of_the_checkpoint(
    run_file, tmp_path: Path, capsys
) -> None:
    path = run_file()
    succeed("train", path)
    before = (tmp_path / "run" / "run.yaml").read_text()
    assert exit_code("train", path, "train.seed=7") == 2
    assert "train.seed was 42, is 7" in capsys.readouterr().err
    assert (tmp_path / "run" / "run.yaml").read_text() == before
    assert len(losses(tmp_path / "run")) == STEPS


def test_resume_never_refuses_to_run_over_checkpoints(run_file, capsys) -> None:
    path = run_file(output={"resume": "never"})
    succeed("train", path)
    assert exit_code("train", path) == 2
    assert "output.resume is never" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run_file, tmp_path: Path, capsys) -> None:
    succeed("train", run_file("whole"))
    path = run_file("run")
    succeed("train", path)
    damaged = tmp_path / "run" / "checkpoints" / "step-00000008" / "tensors-00001-of-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    succeed("train", path)
    out = capsys.readouterr().out
    (warning,) = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert f"passing over the damaged checkpoint {damaged.parent}: " in warning
    assert "Going on after step 6 of 8." in out
    assert "training       2 steps after step 6, " in out
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


# ---------------------------------------------------------------- kills, in real processes

# The signal comes from inside, at a known step, so that the test knows what must be there afterwards.
_KILLED = """
import os, sys
from tunesmith.cli import main
from tunesmith.training.quiet import quiet_imports

quiet_imports()  # as the command does, before anything heavy is imported
from tunesmith.training.trainer import Trainer

number, step = int(sys.argv.pop(1)), int(sys.argv.pop(1))
original = Trainer._run_step

def run_step(self, rows):
    if self.step == step:
        os.kill(os.getpid(), number)
    original(self, rows)

Trainer._run_step = run_step
main.run()
"""


def killed(number: int, step: int, path: Path) -> subprocess.CompletedProcess[str]:
    """Train in a process that gets the signal while it works on the step after `step`."""
    return subprocess.run(
        [sys.executable, "-c", _KILLED, str(int(number)), str(step), "train", str(path)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.fixture
def whole(run_file, tmp_path: Path) -> Path:
    """The run that nothing interrupts."""
    succeed("train", run_file("whole"))
    return tmp_path / "whole"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stopped_run_saves_says_so_and_goes_on_bit_for_bit(
    run_file, tmp_path: Path, whole: Path, name
) -> None:
    import signal

    path, run = run_file("run"), tmp_path / "run"
    stopped = killed(getattr(signal, name), 4, path)
    said = "\nstopping after this step; Ctrl-C once more ends at once\n" if name == "SIGINT" else ""
    assert (stopped.returncode, stopped.stderr) == (0, said)
    *rows, last = stopped.stdout.splitlines()
    assert last == "Stopped after step 5 and saved. The same command goes on from there."
    assert rows[-1] == f"report         {run / 'report.html'}"
    assert rows[-3].startswith("training       5 steps")
    assert not (run / "adapter").exists()
    assert (run / "checkpoints" / "step-00000005").is_dir()
    succeed("train", path)
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)


def test_a_killed_run_goes_on_from_its_checkpoint_bit_for_bit(
    run_file, tmp_path: Path, whole: Path, capsys
) -> None:
    import signal

    path, run = run_file("run"), tmp_path / "run"
    assert killed(signal.SIGKILL, 5, path).returncode == -signal.SIGKILL
    assert [e.name for e in (run / "checkpoints").iterdir()] == ["step-00000003"]
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5]
    capsys.readouterr()
    succeed("train", path)
    assert "Going on after step 3 of 8." in capsys.readouterr().out
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole), "steps 4 and 5 ran again and stand in the log once"
    assert not [name for name in os.listdir(run) if name.startswith(".tmp")]  # noqa: PTH208
