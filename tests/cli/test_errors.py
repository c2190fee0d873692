"""Whatever goes wrong is one clear sentence and an exit code: no traceback without --debug, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.errors import GatedRepoError

import tunesmith.config.assemble as assemble_module
from tests.support.runs import run_settings, train
from tests.support.tiny import save_tiny_model
from tunesmith.cli import main
from tunesmith.config.run_dir import claimed_run_dir
from tunesmith.contracts.errors import StorageError

ROW = json.dumps({"question": "how many", "answer": "four"}) + "\n"


@pytest.fixture
def call(capfd, monkeypatch):
    """Run a command in this process; gives exit code, output and error output."""
    monkeypatch.setattr(
        warnings, "formatwarning", warnings.formatwarning
    )  # the CLI sets its own: put it back

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = 0
        try:
            main.run([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def run_file(tiny_model_dir: Path, tmp_path: Path):
    """Write a run file: the small run with changes to its sections; `rows` replaces the data."""

    def write(rows: str | bytes | None = None, **sections: dict[str, Any]) -> Path:
        settings = run_settings(tiny_model_dir, tmp_path, **sections)
        if rows is not None:
            (tmp_path / "rows.jsonl").write_bytes(rows if isinstance(rows, bytes) else rows.encode())
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


def assert_one_sentence(error: str) -> None:
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert "Unexpected" not in error
    assert ".py" not in error


# ---------------------------------------------------------------- run files


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "run.yaml is empty."),
        ("model: {name: x\n", "run.yaml:2: expected ',' or '}'"),
        ("model:\n\tname: x\n", "run.yaml:2: found character '\\t'"),
        ("model: {name: x, name: y}\n", "name is given twice"),
        ("model: {name: 3}\n", "model.name is 3; expected text"),
        ("modle: {name: x}\n", "did you mean model?"),
        ("model: {name: x}\ndata: {train: [{path: a}]}\nparallel: {tensor: 2}\n", "so it must be 1"),
        (b"\xff\xfe\x00", "is not valid UTF-8"),
    ],
)
@pytest.mark.parametrize("command", ["train", "inspect"])
def test_a_bad_run_file(call, tmp_path: Path, command: str, content: Any, sentence: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, error = call(command, path)
    assert code == 2
    assert out == ""
    assert_one_sentence(error)
    assert sentence in error


def test_a_missing_run_file(call, tmp_path: Path) -> None:
    code, _, error = call("train", tmp_path / "nope.yaml")
    assert (code, error) == (2, f"error: There is no file {tmp_path / 'nope.yaml'}.\n")


@pytest.mark.parametrize("override", ["train.steps=abc", "train.steps=[1", "nonsense", "a.b=1"])
def test_a_bad_override(call, run_file, override: str) -> None:
    code, _, error = call("train", run_file(), override)
    assert code == 2
    assert_one_sentence(error)
    assert f"override {override!r}" in error


# ---------------------------------------------------------------- data

NO_ANSWER = json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n"
LONG_PROMPT = json.dumps({"question": "how many " * 50, "answer": "four"}) + "\n"
HUGE = json.dumps({"question": "word " * 300, "answer": "word " * 200_000}) + "\n"

DATA: dict[str, tuple[str | bytes, dict[str, Any], str]] = {
    "empty": ("", {}, "holds no rows"),
    "blank lines": ("\n\n \n", {}, "holds no rows"),
    "malformed": ("{nope\n" * 5, {}, "rows.jsonl:1: invalid JSON at column 2"),
    "not UTF-8": (b'{"question": "\xff"}\n', {}, "is not valid UTF-8"),
    "binary": (bytes(range(256)) * 50, {}, "can be read"),
    "nothing to answer": (NO_ANSWER, {}, "no assistant turn 1"),
    "prompts longer than the sequence": (LONG_PROMPT, {"train": {"sequence_length": 8}}, "within 8 tokens"),
    "one row of a megabyte": (HUGE, {}, "within 128 tokens"),
    "one malformed row, refused": (ROW * 3 + "{\n", {"data": {"malformed": "error"}}, "1 of the 4 rows"),
    "a long row, refused": (ROW + LONG_PROMPT, {"data": {"overlong": "error"}}, "1 of the 2 rows"),
    "long rows, dropped": (LONG_PROMPT, {"data": {"overlong": "drop"}}, "too long 1"),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data(call, run_file, tmp_path: Path, case: str) -> None:
    rows, sections, sentence = DATA[case]
    code, _, error = call("train", run_file(rows, **sections))
    assert code == 2
    assert_one_sentence(error)
    assert sentence in error
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.train.0.path=nope.jsonl"], "nope.jsonl."),
        (["data.train.0.path=some/hub-set"], "'some/hub-set' could not be reached"),
        (["data.train.0.path=run.yaml"], "is of a kind that cannot be read"),
        (["data.train.0.format=pair", "data.train.0.columns={prompt: qestion}"], "Did you mean 'question'?"),
        (["data.train.0.format=chat"], "The format chat needs the column 'messages'"),
        (["data.train.0.split='train[99:]'"], "takes none of the 40 rows"),
        (["data.eval=[{path: nope.jsonl}]"], "nope.jsonl."),
        (["data.template=nope.jinja"], "nope.jinja cannot be read"),
        (["adapter.targets=[qproj]"], "Did you mean 'q_proj'?"),
        (["adapter.targets=[]"], "adapter.targets is empty"),
        (["adapter.path=nowhere"], "adapter.path: nowhere holds no adapter_config.json."),
        (["adapter.kind=none", "adapter.path=nowhere"], "adapter.path with adapter.kind: none"),
        (["adapter.kind=none", "model.freeze=['nope.*']"], "matches no parameter"),
        (["model.name=./nowhere"], "there is no folder nowhere"),
        (["model.name=Nobody/nothing"], "the Hugging Face hub cannot be reached"),
        (["output.dir=run.yaml"], "output.dir: run.yaml is not a folder."),
    ],
)
def test_bad_settings(
    call, run_file, tmp_path: Path, monkeypatch, overrides: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = call("train", run_file(), *overrides)
    assert code == 2
    assert_one_sentence(error)
    assert sentence in error


def test_one_row_trains_and_none_is_held_out(call, run_file) -> None:
    code, out, error = call("train", run_file(ROW), "train.steps=1")
    assert (code, error) == (0, "")
    assert "0 rows held out" in out


# ---------------------------------------------------------------- models (the rest is in tests/models)


def test_a_gated_model_without_a_token(call, run_file, monkeypatch) -> None:
    import transformers

    class Response:
        headers: dict[str, str] = {}  # noqa: RUF012
        request = None
        status_code = 401

    def gated(*_args: object, **_options: object) -> None:
        raise GatedRepoError("401 Client Error.", response=Response())

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", gated)
    code, _, error = call("train", run_file(), "model.name=meta-llama/Llama-3.2-1B")
    assert code == 2
    assert_one_sentence(error)
    assert "is gated" in error
    assert "https://huggingface.co/meta-llama/Llama-3.2-1B" in error


def test_a_tokenizer_that_is_larger_than_the_model(call, run_file, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "small", vocab_size=300)
    code, _, error = call("train", run_file(), f"model.name={tmp_path / 'small'}")
    assert code == 2
    assert_one_sentence(error)
    assert "has embeddings for 300 tokens only" in error


def test_a_larger_tokenizer_is_harmless_while_its_tokens_are_not_used(call, run_file, tmp_path: Path) -> None:
    row = json.dumps({"question": "!", "answer": "!"}) + "\n"
    save_tiny_model(tmp_path / "small", vocab_size=300)
    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    (tmp_path / "t.jinja").write_text(template)
    code, _, error = call(
        "train", run_file(row), f"model.name={tmp_path / 'small'}", f"data.template={tmp_path / 't.jinja'}",
        "train.steps=1",
    )  # fmt: skip
    assert (code, error) == (0, "")


# ---------------------------------------------------------------- machines


def test_several_processes(call, run_file, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, error = call("train", run_file())
    assert code == 2
    assert "launched with 2 processes" in error


def test_a_second_process_in_the_same_directory(call, run_file, tmp_path: Path) -> None:
    with claimed_run_dir(tmp_path / "run"):
        code, _, error = call("train", run_file())
    assert code == 2
    assert f"another process is training in {tmp_path / 'run'}" in error


def fails(error: BaseException) -> Callable[..., Any]:
    def fail(*_args: object, **_options: object) -> None:
        raise error

    return fail


NO_SPACE = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "where", ["os.write in the checkpoint", "the result", "the loss curve", "the events"]
)
def test_a_full_disk(call, run_file, tmp_path: Path, monkeypatch, where: str) -> None:
    from matplotlib.figure import Figure
    from peft import PeftModel

    from tunesmith.training import storage
    from tunesmith.training.metrics import EventLog

    path = run_file()
    match where:
        case "os.write in the checkpoint":
            monkeypatch.setattr(storage, "write_file", fails(NO_SPACE))
        case "the result":
            monkeypatch.setattr(PeftModel, "save_pretrained", fails(NO_SPACE))
        case "the loss curve":
            monkeypatch.setattr(Figure, "savefig", fails(NO_SPACE))
        case "the events":
            monkeypatch.setattr(EventLog, "on_event", fails(NO_SPACE))
    code, _, error = call("train", path)
    assert code == 1
    assert_one_sentence(error)
    assert "disk is full" in error or "No space left on device" in error
    monkeypatch.undo()
    result = call("train", path)
    assert result[0] == 0, result
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_full_disk_is_foreseen(call, run_file, monkeypatch) -> None:
    from tunesmith.training import storage

    monkeypatch.setattr(storage, "free_bytes", lambda _: 1000)
    code, _, error = call("train", run_file())
    assert code == 1
    assert_one_sentence(error)
    assert "where only 1000 bytes are free" in error


def test_going_on_needs_no_room_for_what_is_there(
    run_file, tiny_model_dir, tmp_path: Path, monkeypatch
) -> None:
    """Checkpoints of the first part count: a run that fitted when it began may go on."""
    from tunesmith.training import storage

    settings = run_settings(tiny_model_dir, tmp_path, output={"save_every": 2, "keep": 1})
    train(settings)
    checkpoint = 3 * (tmp_path / "run/adapter/adapter_model.safetensors").stat().st_size  # with two moments
    settings["train"]["steps"] = 12  # room for three: one is kept, one is the best, one is in the making
    monkeypatch.setattr(storage, "free_bytes", lambda _: 2 * checkpoint)
    assert train(settings).steps == 12
    (tmp_path / "other").mkdir()
    with pytest.raises(StorageError, match="are free"):
        train(settings | {"output": settings["output"] | {"dir": str(tmp_path / "other")}})


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (MemoryError(), 1, "Out of memory."),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "Out of memory."),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: x"), 1, "Out of memory."),
        (OSError(28, "No space left on device", "/a/b"), 1, "The disk is full while writing /a/b."),
        (OSError(122, "Disk quota exceeded"), 1, "The disk is full."),
        (
            PermissionError(13, "Permission denied", "/a/b"),
            1,
            "/a/b cannot be written or read: Permission denied.",
        ),
        (
            OSError(30, "Read-only file system", "/a/b"),
            1,
            "/a/b cannot be written or read: Read-only file system.",
        ),
        (ZeroDivisionError("by zero"), 70, "Unexpected ZeroDivisionError: by zero\nThis is a defect"),
    ],
)
def test_errors_of_the_machine_and_of_ours(
    call, run_file, monkeypatch, error, code: int, sentence: str
) -> None:
    monkeypatch.setattr(assemble_module, "prepare_data", fails(error))
    found, _, text = call("train", run_file())
    assert found == code
    assert text.startswith(f"error: {sentence}")
    assert "Traceback" not in text


@pytest.mark.parametrize("where", ["make_model", "load_tokenizer", "prepare_data"])
def test_ctrl_c_while_a_run_is_prepared(call, run_file, monkeypatch, where: str) -> None:
    monkeypatch.setattr(assemble_module, where, fails(KeyboardInterrupt()))
    assert call("train", run_file()) == (130, "", "error: interrupted\n")


# ---------------------------------------------------------------- --debug, --help


@pytest.mark.parametrize("place", ["before", "behind"])
def test_debug_lets_the_traceback_through(run_file, monkeypatch, place: str) -> None:
    monkeypatch.setattr(assemble_module, "make_model", fails(ZeroDivisionError("ours")))
    words = ["train", str(run_file())]
    with pytest.raises(ZeroDivisionError, match="ours"):
        main.run(["--debug", *words] if place == "before" else [*words, "--debug"])


def test_debug_lets_errors_of_the_user_through_with_their_cause(
    tiny_model_dir: Path, run_file, tmp_path
) -> None:
    from tunesmith.contracts.errors import UserError

    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    with pytest.raises(UserError) as caught:
        main.run(["--debug", "train", str(run_file()), f"model.name={tmp_path / 'bad'}"])
    assert isinstance(caught.value.__cause__, OSError | ValueError)


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), (["--version"], 0), (["train", "--help"], 0), (["train"], 2), (["zork"], 2), ([], 2)],
)
def test_usage(call, words: list[str], code: int) -> None:
    found, out, error = call(*words)
    assert found == code
    assert (out + error).strip()
    assert "Traceback" not in error


def test_a_warning_is_a_line_without_source_code(call, run_file, monkeypatch) -> None:
    def warns(*_args: object, **_options: object) -> None:
        warnings.warn("the cache cannot be written", stacklevel=1)
        raise MemoryError

    monkeypatch.setattr(assemble_module, "prepare_data", warns)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", _show_as_python_does)
        _, _, error = call("train", run_file())
    assert error.splitlines()[0] == "warning: the cache cannot be written"


def _show_as_python_does(message, category, filename, lineno, file=None, line=None) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


# ---------------------------------------------------------------- real processes


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "tunesmith", *map(str, words)]


def test_a_real_process_fails_with_one_sentence_and_its_code(tmp_path: Path) -> None:
    result = subprocess.run(
        command("train", tmp_path / "nope.yaml"), capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: There is no file {tmp_path / 'nope.yaml'}.\n"
    debugged = subprocess.run(
        command("train", tmp_path / "nope.yaml", "--debug"), capture_output=True, text=True, check=False
    )
    assert debugged.returncode == 1
    assert "Traceback" in debugged.stderr
    assert "UserError: There is no file" in debugged.stderr


def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    """The run file is a pipe, so the process is known to be waiting in it when the signal comes."""
    pipe = tmp_path / "run.yaml"
    os.mkfifo(pipe)

    def listen() -> None:  # a shell has what it runs in the background ignore the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with (
        subprocess.Popen(
            command("train", pipe), stderr=subprocess.PIPE, text=True, preexec_fn=listen
        ) as process,
        pipe.open("w"),
    ):
        process.send_signal(signal.SIGINT)  # the pipe opened, so the other side reads it
        try:
            _, error = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:  # it came between the opening and the reading, which then waits
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "error: interrupted\n")
