"""`tunesmith doctor` on this machine and on broken ones: every probe alone, one sentence, no secret."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from tests.cli.command import exit_code
from tests.support.runs import run_settings
from tunesmith.config import doctor_machine, doctor_packages, doctor_plan, doctor_row, known_model, nvidia_smi
from tunesmith.config.doctor import CHECKS, Diagnosis, examine
from tunesmith.config.doctor_packages import ESSENTIAL, OPTIONAL, Optional
from tunesmith.config.doctor_row import Check, Finding, Subject
from tunesmith.contracts.errors import UserError

ROOT = Path(__file__).parent.parent.parent
CARD = "NVIDIA H100 80GB HBM3, 81559, 80990, 570.86.15, 9.0"


def finding(diagnosis: Diagnosis, name: str) -> Finding:
    return next(found for check, found in diagnosis.rows if check.name == name)


def rows(*names: str) -> tuple[Check, ...]:
    return tuple(check for check in CHECKS if check.name in names)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put an `nvidia-smi` on the path that prints these lines, or fails."""

    def install(*lines: str, code: int = 0) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        text = "\n".join(lines)
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n", encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return install


@pytest.fixture
def run_file(tiny_model_dir: Path, tmp_path: Path) -> Any:
    def write(**sections: Any) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(run_settings(tiny_model_dir, tmp_path, **sections)), encoding="utf-8")
        return str(path)

    return write


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def here() -> Diagnosis:
    return examine()


def test_this_machine_can_train(here: Diagnosis) -> None:
    assert here.possible
    assert re.fullmatch(r"Training is possible, on (cpu in float32|cuda:0.*)\.", here.sentence)
    named = {check.name for check, _ in here.rows}
    assert {"Python", "memory", "device", "compute type", "attention", "layers", "kernels", "torch"} <= named
    assert finding(here, "torch").value == torch.__version__
    assert [found for _, found in here.rows if found.state in ("broken", "unknown")] == []


def test_the_table_and_the_json_say_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "4000")
    assert exit_code("doctor") == 0
    table = capsys.readouterr().out
    assert exit_code("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)

    assert found["possible"] is True
    assert found["sentence"] == table.splitlines()[-1]
    for check in found["checks"]:
        if check["name"] != "memory" and not check["name"].startswith("disk"):  # they change meanwhile
            assert check["value"] in table
            assert check["advice"] in table


def test_a_token_is_never_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "x" * 34
    monkeypatch.setenv("HF_TOKEN", secret)
    assert exit_code("doctor", "--json") == 0
    out = capsys.readouterr()

    assert "a token is set" in out.out
    assert secret not in out.out + out.err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", "nowhere")
    assert "no token is set" in finding(examine(checks=rows("Hugging Face hub")), "Hugging Face hub").value


def test_without_torch_it_still_answers(tmp_path: Path) -> None:
    said = "libcudart.so.13: cannot open shared object file"
    (tmp_path / "torch.py").write_text(f"raise ImportError({said!r})", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "tunesmith", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    by_name = {check["name"]: check for check in found["checks"]}
    assert not found["possible"]
    assert found["sentence"].startswith("Training is not possible: torch: ")
    assert said in found["sentence"]
    assert by_name["device"]["state"] == "unknown"
    assert by_name["numpy"]["state"] == "good"
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- probes alone


def test_a_probe_that_fails_hides_no_other() -> None:
    def fails(error: Exception) -> Any:
        def probe(_: Subject) -> Finding:
            raise error

        return probe

    checks = (
        Check("a", "broken library", fails(RuntimeError("CUDA error 999\nsecond line"))),
        Check("a", "without a word", fails(ValueError())),
        Check("a", "missing module", fails(ModuleNotFoundError("no", name="torchao.optim"))),
        Check("a", "sentence", fails(UserError("It is so.", hint="Do this."))),
        Check("a", "nothing to say", lambda _: None),
        Check("a", "last", lambda _: Finding("fine")),
    )
    diagnosis = examine(checks=checks)

    assert [(check.name, found.value, found.state, found.advice) for check, found in diagnosis.rows] == [
        ("broken library", "cannot be told: RuntimeError: CUDA error 999", "unknown", ""),
        ("without a word", "cannot be told: ValueError: no reason given", "unknown", ""),
        ("missing module", "cannot be told without torchao", "unknown", "Run `pip install torchao`."),
        ("sentence", "It is so.", "unknown", "Do this."),
        ("last", "fine", "good", ""),
    ]
    assert diagnosis.possible


def test_the_first_thing_that_is_broken_is_the_sentence() -> None:
    checks = (
        Check("a", "one", lambda _: Finding("fine")),
        Check("a", "two", lambda _: Finding("gone", "broken", "Bring it back.")),
        Check("a", "three", lambda _: Finding("gone, too", "broken")),
    )

    assert examine(checks=checks).sentence == "Training is not possible: two: gone. Bring it back."


def test_a_python_that_is_too_old_or_too_new(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, state in (((3, 10, 1), "broken"), ((3, 11, 0), "good"), ((3, 14, 0), "broken")):
        monkeypatch.setattr(doctor_machine, "sys", SimpleNamespace(version_info=version))
        assert finding(examine(checks=rows("Python")), "Python").state == state


def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    for text, expected in (("max\n", None), ("2147483648\n", 2**31)):
        limit.write_text(text, encoding="ascii")
        assert doctor_machine.number_in(tmp_path / "absent", limit) == expected
    assert doctor_machine.number_in(tmp_path / "absent") is None

    monkeypatch.setattr(doctor_machine, "LIMITS", (limit,))
    found = finding(examine(checks=rows("memory")), "memory")
    assert "this container may use 2.0 GiB" in found.value
    assert found.state == "note"


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(free=50 * 2**20)
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda _: free)
    full = doctor_machine.disk(tmp_path / "runs" / "new", needed=True)
    assert (full.state, full.value) == ("broken", f"50.0 MiB free in {tmp_path}")
    assert doctor_machine.disk(tmp_path, needed=False).state == "note"
    free.free = 2**30
    assert doctor_machine.disk(tmp_path, needed=True).state == "note"
    free.free = 2**40
    assert doctor_machine.disk(tmp_path, needed=True) == Finding(f"1024.0 GiB free in {tmp_path}")
    monkeypatch.setattr(doctor_machine.os, "access", lambda *_: False)
    assert doctor_machine.disk(tmp_path, needed=True).state == "broken"


# ---------------------------------------------------------------- GPUs


def test_a_gpu_is_found_without_torch(smi: Any) -> None:
    smi(CARD)
    diagnosis = examine(checks=rows("GPU", "driver"))

    expected = "NVIDIA H100 80GB HBM3, 79.1 GiB free of 79.6 GiB, compute capability 9.0"
    assert finding(diagnosis, "GPU") == Finding(expected)
    assert finding(diagnosis, "driver").value == "NVIDIA 570.86.15"


def test_several_gpus(smi: Any) -> None:
    smi(CARD, CARD)
    found = finding(examine(checks=rows("GPU")), "GPU")

    assert found.value.count("H100") == 2
    assert "CUDA_VISIBLE_DEVICES" in found.advice


@pytest.mark.parametrize("lines", [("Failed to initialize NVML",), ("a, b",)])
def test_a_driver_that_does_not_answer_is_no_gpu(smi: Any, lines: tuple[str, ...]) -> None:
    smi(*lines, code=0 if "," in lines[0] else 9)

    assert nvidia_smi.ask_nvidia_smi() == []
    assert finding(examine(checks=rows("GPU")), "GPU").value == "no NVIDIA GPU found"


def test_a_gpu_that_torch_cannot_use(smi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(CARD)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = finding(examine(checks=rows("device")), "device")
    assert "was built without CUDA" in found.value
    assert found.state == "note"

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = finding(examine(checks=rows("device")), "device")
    assert "torch cannot use it" in found.value
    assert "CUDA 13.0" in found.advice


@pytest.fixture
def on_a_gpu(smi: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As far as rows can tell there is a card of this capability; attention backends answer for the CPU."""

    def pretend(major: int, minor: int) -> None:
        smi(CARD)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Card")
        backend = doctor_plan.fused_backend
        monkeypatch.setattr(
            doctor_plan,
            "fused_backend",
            lambda _, dtype, config=None: backend(torch.device("cpu"), dtype, config),
        )

    return pretend


def test_what_a_run_would_use_on_a_gpu(on_a_gpu: Any, run_file: Any) -> None:
    on_a_gpu(9, 0)
    diagnosis = examine(run_file())

    assert finding(diagnosis, "device").value.startswith("cuda:0, Card, compute capability 9.0")
    assert finding(diagnosis, "compute type").value == "bfloat16: this GPU computes it"
    assert finding(diagnosis, "attention").value == "sdpa in fused layers, varlen in stock ones"
    assert finding(diagnosis, "layers").value.startswith("fused, as ")
    assert finding(diagnosis, "kernels").value == "not checked yet"
    assert finding(diagnosis, "CUDA graphs").value.startswith("where the model is too small")


def test_an_older_gpu_and_settings_that_decide(on_a_gpu: Any, run_file: Any) -> None:
    on_a_gpu(7, 5)
    names = ("compute type", "attention", "CUDA graphs")
    diagnosis = examine(run_file(), checks=rows(*names))
    assert finding(diagnosis, "compute type").value == "float16: this GPU has no bfloat16"
    assert "sdpa in stock ones" in finding(diagnosis, "attention").value
    assert finding(diagnosis, "CUDA graphs").value == "none: float16 trains with a loss scale"

    settings = {"train": {"deterministic": True}, "model": {"dtype": "float32"}}
    diagnosis = examine(run_file(**settings), checks=rows(*names))
    assert finding(diagnosis, "compute type").value == "float32: model.dtype says so"
    assert finding(diagnosis, "CUDA graphs").value == (
        "none: train.deterministic is on, and a run that goes on would record at other steps than one that never "
        "stopped"
    )

    diagnosis = examine(run_file(train={"neftune_alpha": 5}, model={"dtype": "float32"}), checks=rows(*names))
    assert finding(diagnosis, "CUDA graphs").value.startswith("none: NEFTune")
    diagnosis = examine(run_file(model={"attention": "varlen", "dtype": "float32"}), checks=rows("attention"))
    assert finding(diagnosis, "attention").state == "broken"


def test_the_config_of_the_model_is_read_once(
    on_a_gpu: Any, run_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(9, 0)
    read, names = known_model.known_config, []

    def counted(name: str, **options: Any) -> Any:
        names.append(name)
        return read(name, **options)

    monkeypatch.setattr(known_model, "known_config", counted)
    diagnosis = examine(run_file(), checks=rows("model", "attention", "layers"))
    assert finding(diagnosis, "layers").value.startswith("fused, as ")
    assert len(names) == 1


def test_layers_that_are_not_fused(on_a_gpu: Any, run_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.kernels import launch

    on_a_gpu(9, 0)
    monkeypatch.setattr("tunesmith.planning.architectures.ARCHITECTURES", {})
    found = finding(examine(run_file(), checks=rows("layers")), "layers")
    assert found.value.startswith("stock layers: llama is not among the families")
    assert finding(examine(checks=rows("layers")), "layers").value.startswith("fused, for the families")
    monkeypatch.setattr(launch, "HAS_TRITON", False)
    assert "triton is missing" in finding(examine(checks=rows("layers")), "layers").value


def test_the_last_check_of_the_kernels_is_remembered(tmp_path: Path) -> None:
    assert doctor_plan.remembered_canary(tmp_path / "absent").value == "not checked yet"
    entry = {"name": "rms_norm", "error": 1.0, "tolerance": 0.1}
    for number, entries in enumerate(([], [entry], [])):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(entries), encoding="utf-8")
        os.utime(file, (1_000_000 + number * 86_400,) * 2)
        found = doctor_plan.remembered_canary(tmp_path)
        assert found.state == ("note" if entries else "good")
        assert re.search(r"the check of 1970-01-\d\d$", found.value)
        assert ("rms_norm failed" in found.value) == bool(entries)


# ---------------------------------------------------------------- a run


def test_a_run_that_is_right(run_file: Any) -> None:
    diagnosis = examine(path := run_file(), checks=rows("run file", "model", "data", "weights"))

    assert finding(diagnosis, "run file").value == f"{path} is right"
    assert finding(diagnosis, "model").value.endswith(", llama")
    assert finding(diagnosis, "data").value == "1 source found"
    assert diagnosis.possible
    with pytest.raises(StopIteration):
        finding(diagnosis, "weights")
    quantised = examine(run_file(model={"quantize": "nf4"}), checks=rows("weights"))
    assert finding(quantised, "weights").value == "nf4, by bitsandbytes"


@pytest.mark.parametrize(
    ("sections", "name", "said"),
    [
        ({"train": {"global_batch": 0}}, "run file", r"1 problem: .*run\.yaml:\d+: train\.global_batch is 0"),
        ({"model": {"name": "./absent"}}, "model", "there is no folder absent"),
        ({"data": {"train": [{"path": "absent.jsonl"}]}}, "data", "There is no file"),
        ({"data": {"eval": [{"path": "held.jsonl"}]}}, "data", "There is no file"),
    ],
)
def test_a_run_that_cannot_start(
    run_file: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any, sections: Any, name: str, said: str
) -> None:
    monkeypatch.setattr("tunesmith.config.doctor.CHECKS", rows("run file", "model", "data"))
    path = run_file(**sections)
    found = finding(examine(path, checks=rows("run file", "model", "data")), name)

    assert found.state == "broken"
    assert re.search(said, found.value)
    assert exit_code("doctor", path, "--json") == 1
    assert json.loads(capsys.readouterr().out)["sentence"].startswith(f"Training is not possible: {name}: ")


def test_a_run_file_that_is_not_there_and_a_model_that_is_on_the_hub(run_file: Any) -> None:
    missing = examine("nowhere.yaml", checks=rows("run file", "device"))
    assert finding(missing, "run file").value == "There is no file nowhere.yaml."
    assert finding(missing, "device").state in ("good", "note")

    found = finding(examine(run_file(model={"name": "org/absent"}), checks=rows("model")), "model")
    assert (found.state, found.value) == ("note", "org/absent is not on this machine")


# ---------------------------------------------------------------- packages


def test_every_package_of_the_project_has_a_row() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.split(r"[\s<>=!~;\[]", line)[0].lower() for line in project["dependencies"]}

    assert needed - {"bitsandbytes"} == set(ESSENTIAL)
    assert {row.extra for row in OPTIONAL.values() if row.extra} == set(project["optional-dependencies"])
    modules = [row.module for row in OPTIONAL.values()]
    assert len(set(modules)) == len(modules)


def look(package: str, module: str) -> Finding:
    return doctor_packages._essential(package, module, Subject())


def test_a_package_that_is_missing_broken_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look("no-such-package", "x").value == "not installed"
    assert look("no-such-package", "x").state == "broken"

    (tmp_path / "half_removed.py").write_text("raise OSError('undefined symbol')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    broken = look("numpy", "half_removed")
    assert broken.state == "broken"
    assert broken.value.endswith("cannot be imported: OSError: undefined symbol")

    monkeypatch.setattr(doctor_packages, "requires", lambda _: ["numpy>=99,<100", "torch>=1; extra == 'x'"])
    old = look("numpy", "numpy")
    assert (old.state, old.advice) == ("note", 'Run `pip install "numpy>=99,<100"`.')
    assert look("torch", "torch").state == "good"


def test_an_optional_part_says_what_it_would_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(cards: list[dict[str, str]], **options: Any) -> Finding | None:
        monkeypatch.setattr(doctor_row, "ask_nvidia_smi", lambda: cards)
        return doctor_packages._optional("absent", Optional("absent_module", "wings", **options), Subject())

    assert row([]) == Finding("not installed", "missing", "it would give wings: pip install absent")
    assert row([], extra="fly") == Finding(
        "not installed", "missing", "it would give wings: pip install 'tunesmith[fly]'"
    )
    assert row([], useful=lambda gpu: gpu) is None
    assert row([{}], useful=lambda gpu: gpu) == row([])
    there = doctor_packages._optional("numpy", Optional("numpy", "arrays"), Subject())
    assert there is not None
    assert (there.state, there.advice) == ("good", "gives arrays")
