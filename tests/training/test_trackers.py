"""Trackers: what each writes is read back with its own reader; what goes on, fails, is interrupted, or is secret."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.support.events import stepped
from tests.support.runs import Recorder, run_settings, train
from tunesmith.config.load import load_settings
from tunesmith.config.tracking import refuse_missing_trackers, tracked_settings
from tunesmith.contracts.errors import ConfigError, UserError
from tunesmith.contracts.events import Evaluated, Event, Finished, Sampled, Started, Stepped
from tunesmith.settings.run import TrackerName
from tunesmith.settings.secrets import without_secrets
from tunesmith.training import trackers as module
from tunesmith.training.metrics import EventLog, read_events
from tunesmith.training.tracker_rows import TRACKERS, Opened, Place, Tracker
from tunesmith.training.trackers import Trackers, metric_name


def _step(number: int, loss: float | None = None) -> Stepped:
    return stepped(number, epoch=number / 10, loss=10.0 - number if loss is None else loss)


def _eval(step: int, loss: float, **by_source: float) -> Evaluated:
    return Evaluated(step=step, loss=loss, tokens=1, seconds=0.1, by_source=by_source)


def _sample(step: int, answer: str) -> Sampled:
    return Sampled(step=step, prompt="a question", answer=answer, seconds=0.1)


class Part:
    """One part of a run: a log, trackers and a recorder that hear the same events."""

    def __init__(self, folder: Path, *names: str, step: int = 0, **more: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.recorder, self.said = Recorder(), list[str]()
        observers: list[Any] = []
        values: dict[str, Any] = {"project": "tests", "name": folder.name, "config": {"train.rate": 0.1}}
        self.trackers = Trackers(
            names,
            folder,
            step=step,
            tokens=100 * step,
            observers=observers,
            say=self.said.append,
            **values | more,
        )
        self.log = EventLog(folder / "events.jsonl", keep_until=step or None)
        observers += [self.log, self.trackers, self.recorder]
        self._observers, self._step = observers, step

    def run(self, *events: Event, reason: str | None = "complete") -> None:
        """Open, tell, end; without a reason as if the process had been killed: nothing is closed."""
        self.trackers.__enter__()
        started = Started(
            step=self._step, total_steps=9, resumed=self._step > 0, trained_parameters=1, device="cpu"
        )
        end = [] if reason is None else [Finished(step=events[-1].step, reason=reason, seconds=1.0)]
        for event in [started, *events, *end]:
            for observer in self._observers:
                observer.on_event(event)
        if reason is not None:
            self.trackers.__exit__(None, None, None)


# ---------------------------------------------------------------- a program that only remembers


class Memory:
    """What Accelerate's trackers look like, on a list; `fails_at` raises there."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.written: list[tuple[int, str, Any]] = []
        self.configs: list[dict[str, Any]] = []
        self.endings: list[str] = []
        self.fails_at: int | None = None
        self.fails_to_open = self.fails_to_close = False

    def open(self, place: Place) -> Opened:
        if self.fails_to_open:
            raise ConnectionError("no route to https://me:word@host/api?key=1")
        self.places.append(place)
        return Opened(self, place.run or f"run-{len(self.places)}", "memory")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configs.append(values)

    def log(self, values: dict[str, Any], step: int) -> None:
        if step == self.fails_at:
            raise OSError("the disk is full")
        self.written += [(step, name, value) for name, value in values.items()]

    def close(self, _: Any, ending: str) -> None:
        self.endings.append(ending)
        if self.fails_to_close:
            raise TimeoutError

    def steps(self, name: str) -> list[int]:
        return [step for step, key, _ in self.written if key == name]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory()
    row = Tracker(module="json", open=memory.open, close=memory.close)
    monkeypatch.setitem(TRACKERS, "memory", row)
    return memory


def test_every_name_has_a_row_and_an_extra():
    import tomllib

    assert set(TRACKERS) == set(get_args(TrackerName))
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert set(TRACKERS) <= set(extras)


def test_figures_of_steps_evaluations_and_samples_are_written(memory, tmp_path):
    samples = [_sample(2, "one"), _sample(2, "two"), _sample(4, "three")]
    Part(tmp_path / "run", "memory").run(
        _eval(0, 3.0, **{"/data/a b.jsonl#2": 4.0}), _step(1), _step(2), *samples
    )

    written = {(step, name): value for step, name, value in memory.written}
    assert len(written) == len(memory.written)
    assert written[0, "eval/loss"] == 3.0
    assert written[0, "eval/data/a b.jsonl_2"] == 4.0
    assert written[1, "train/loss"] == 9.0
    assert written[1, "train/grad_norm"] == 0.5
    assert written[1, "train/learning_rate"] == 1e-3
    assert written[1, "train/tokens_per_second"] == 20.0
    assert written[1, "train/memory_gib"] == 0.25
    assert (written[1, "train/epoch"], written[2, "train/epoch"]) == (0.1, 0.2)
    assert (written[1, "train/tokens"], written[2, "train/tokens"]) == (100, 200)
    assert written[2, "samples/2"] == "a question\n\ntwo"
    assert written[4, "samples/1"] == "a question\n\nthree"
    assert memory.configs == [{"train.rate": 0.1}]
    assert memory.endings == ["complete"]


@pytest.mark.parametrize(
    ("reason", "ending"),
    [
        ("complete", "complete"),
        ("time", "complete"),
        ("interrupted", "interrupted"),
        ("non-finite", "failed"),
    ],
)
def test_a_run_says_how_it_ended(memory, tmp_path, reason, ending):
    Part(tmp_path / "run", "memory").run(_step(1), reason=reason)

    assert memory.endings == [ending]


def test_a_run_that_raises_has_failed(memory, tmp_path):
    def fails() -> None:
        with Part(tmp_path / "run", "memory").trackers as trackers:
            trackers.on_event(_step(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()

    assert memory.endings == ["failed"]


# ---------------------------------------------------------------- going on


def test_a_run_that_goes_on_is_the_same_run_and_writes_no_step_twice(memory, tmp_path):
    run = tmp_path / "run"
    Part(run, "memory").run(_eval(0, 3.0), *map(_step, range(1, 9)), reason=None)  # killed at 8, saved at 4
    Part(run, "memory", step=4).run(_step(5), _step(6), reason=None)  # killed at 6: the log knows no 7 and 8
    Part(run, "memory", step=4).run(*map(_step, range(5, 11)), _eval(10, 2.0))

    assert [place.run for place in memory.places] == [None, "run-1", "run-1"]
    assert memory.steps("train/loss") == [*range(1, 11)]
    assert memory.steps("eval/loss") == [0, 10]
    assert [value for _, name, value in memory.written if name == "train/tokens"] == [*range(100, 1001, 100)]


def test_what_rewinds_is_told_from_where_and_gets_the_steps_again(memory, tmp_path, monkeypatch):
    monkeypatch.setitem(TRACKERS, "memory", replace(TRACKERS["memory"], rewinds=True, configure_again=False))
    Part(tmp_path / "run", "memory").run(*map(_step, range(1, 6)), reason=None)
    Part(tmp_path / "run", "memory", step=3).run(_step(4), _step(5))

    assert [place.first_step for place in memory.places] == [0, 4]
    assert memory.steps("train/loss") == [1, 2, 3, 4, 5, 4, 5]
    assert len(memory.configs) == 1


def test_a_tracker_that_is_new_when_a_run_goes_on_begins_there(memory, tmp_path):
    Part(tmp_path / "run").run(*map(_step, range(1, 6)), reason=None)
    Part(tmp_path / "run", "memory", step=3).run(_step(4), _step(5))

    assert memory.places[0].run is None
    assert memory.steps("train/loss") == [4, 5]


def test_a_run_that_begins_anew_is_a_new_run(memory, tmp_path):
    Part(tmp_path / "run", "memory").run(_step(1), _step(2), reason=None)
    Part(tmp_path / "run", "memory").run(_step(1))

    assert [place.run for place in memory.places] == [None, None]
    assert memory.steps("train/loss") == [1, 2, 1]


@pytest.mark.parametrize("text", ["", "[]", '{"memory": 3}', '{"memory": {"run": "x"}}'])
def test_a_damaged_memory_of_runs_begins_a_new_one(memory, tmp_path, text):
    Part(tmp_path / "run", "memory").run(_step(1), reason=None)
    (tmp_path / "run" / module.STATE).write_text(text)
    Part(tmp_path / "run", "memory", step=1).run(_step(2))

    assert [place.run for place in memory.places] == [None, None]


# ---------------------------------------------------------------- failing


def test_a_tracker_that_fails_becomes_one_warning_and_the_others_go_on(memory, tmp_path, monkeypatch):
    other = Memory()
    monkeypatch.setitem(TRACKERS, "other", Tracker(module="json", open=other.open, close=other.close))
    memory.fails_at = 2
    part = Part(tmp_path / "run", "memory", "other")
    part.run(*map(_step, range(1, 5)))

    warnings = [event.message for event in part.recorder.of("warning")]
    assert warnings == [
        "output.track: memory failed at step 2 (OSError: the disk is full) and is switched off; the run goes on."
    ]
    assert [
        event["message"] for event in read_events(tmp_path / "run" / "events.jsonl") if "message" in event
    ] == warnings
    assert memory.steps("train/loss") == [1]
    assert memory.endings == ["failed"]
    assert other.steps("train/loss") == [1, 2, 3, 4]
    assert other.endings == ["complete"]


def test_what_was_switched_off_gets_the_steps_that_it_lacks_when_the_run_goes_on(memory, tmp_path):
    memory.fails_at = 3
    Part(tmp_path / "run", "memory").run(*map(_step, range(1, 7)), reason=None)
    memory.fails_at = None
    Part(tmp_path / "run", "memory", step=1).run(*map(_step, range(2, 8)))

    assert memory.steps("train/loss") == [1, 2, 3, 4, 5, 6, 7]


def test_a_tracker_that_cannot_be_opened_is_a_warning_without_the_password(memory, tmp_path):
    memory.fails_to_open = True
    part = Part(tmp_path / "run", "memory")
    part.run(_step(1))

    assert [event.message for event in part.recorder.of("warning")] == [
        "output.track: memory could not be opened (ConnectionError: no route to https://…@host/api?key=…); "
        "the run goes on without it."
    ]
    assert part.said == []


def test_a_tracker_that_cannot_be_opened_again_goes_on_later_with_what_it_lacks(memory, tmp_path):
    run = tmp_path / "run"
    Part(run, "memory").run(*map(_step, range(1, 5)), reason=None)  # has 1 to 4, saved at 2
    memory.fails_to_open = True
    Part(run, "memory", step=2).run(*map(_step, range(3, 7)), reason=None)  # saved at 2 still
    memory.fails_to_open = False
    Part(run, "memory", step=2).run(*map(_step, range(3, 8)))

    assert [place.run for place in memory.places] == [None, "run-1"]
    assert memory.steps("train/loss") == [1, 2, 3, 4, 5, 6, 7]


def test_a_tracker_that_cannot_end_its_run_is_a_warning(memory, tmp_path):
    memory.fails_to_close = True
    part = Part(tmp_path / "run", "memory")
    part.run(_step(1))

    assert "could not end its run (TimeoutError)" in part.recorder.of("warning")[0].message


# ---------------------------------------------------------------- settings


def test_a_missing_package_is_refused_with_its_extra(tiny_model_dir, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "tunesmith.contracts.installed.find_spec",
        lambda name: None if name in ("wandb", "comet_ml") else found(name),
    )
    settings = load_settings(run_settings(tiny_model_dir, tmp_path, output={"track": ["wandb", "comet"]}))

    with pytest.raises(UserError, match="wandb and comet are not installed") as error:
        refuse_missing_trackers(settings)
    assert 'pip install "tunesmith[wandb,comet]"' in str(error.value)
    with pytest.raises(UserError, match="not installed"):
        train(run_settings(tiny_model_dir, tmp_path, output={"track": ["wandb", "comet"]}))
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_named_twice_or_unknown_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ConfigError, match="names a tracker twice"):
        load_settings(run_settings(tiny_model_dir, tmp_path, output={"track": ["wandb", "wandb"]}))
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        load_settings(run_settings(tiny_model_dir, tmp_path, output={"track": ["wanb"]}))


def test_settings_are_flat_and_have_no_secrets(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "unusual-token")
    settings = run_settings(
        tiny_model_dir,
        tmp_path,
        data={"train": [{"path": "https://me:word@host/rows.jsonl?sig=abc", "columns": {"prompt": "q"}}]},
        adapter={"targets": ["q_proj", "v_proj"], "new_tokens": ["<call>"]},
        output={"dir": "runs/hf_abcdefghij/unusual-token"},
    )

    flat = tracked_settings(load_settings(settings))

    assert flat["train.learning_rate"] == 5.0e-3
    assert flat["data.train.0.path"] == "https://…@host/rows.jsonl?sig=…"
    assert flat["data.train.0.columns.prompt"] == "q"
    assert flat["adapter.targets"] == '["q_proj", "v_proj"]'
    assert flat["adapter.new_tokens"] == '["<call>"]'
    assert flat["output.dir"] == "runs/(not shown)/(not shown)"
    assert flat["output.run_name"] == "null"
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())


def test_what_names_a_secret_is_not_shown():
    from tunesmith.config.tracking import _flat

    flat = dict(_flat("", {"options": {"secret_key": "abc", "token": "x", "keys": 3}, "sample_tokens": 4}))

    assert flat == {
        "options.secret_key": "(not shown)", "options.token": "(not shown)", "options.keys": 3, "sample_tokens": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/rows", "s3://…@bucket/rows"),
        ("see https://host/a?token=1#b and rows.jsonl", "see https://host/a?token=… and rows.jsonl"),
        ("rows.jsonl:12", "rows.jsonl:12"),
        ("https://[half", "https://…"),
        ("https://user:pass/word@host/x", "https://…"),
        ("<https://me:wo<rd@host/a>", "<https://…@host/a>"),
        ("https://me:unusual-token@host/a?sig=1", "https://…@host/a?sig=…"),
    ],
)
def test_addresses_lose_what_logs_in(text, shown, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "unusual-token")
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    ("source", "name"),
    [("a/b.jsonl", "a/b.jsonl"), ("/a//../b:c", "a/b_c"), ("..", "source"), ("C:\\x", "C_/x")],
)
def test_names_of_sources_become_names_of_metrics(source, name):
    assert metric_name(source) == name


def test_a_run_file_is_tracked_from_start_to_end(memory, tiny_model_dir, tmp_path, monkeypatch):
    """The whole way: what is told, that a fault ends it, and that training is the same with a tracker and without."""
    monkeypatch.setattr("tunesmith.config.tracking.TRACKERS", TRACKERS)
    settings = run_settings(
        tiny_model_dir, tmp_path, train={"steps": 3}, output={"run_name": "mine", "project": "p"}
    )
    plain = load_settings(settings)
    output = plain.output.model_copy(update={"track": ("memory",)})
    tracked = plain.model_copy(update={"output": output})
    from rich.console import Console

    from tunesmith.config.execute import execute

    result = execute(tracked, Console(quiet=True))

    assert (memory.places[0].project, memory.places[0].name) == ("p", "mine")
    assert memory.steps("train/loss") == [1, 2, 3]
    losses = {step: value for step, name, value in memory.written if name == "eval/loss"}
    assert losses == {0: result.first_eval, 3: result.last_eval}
    assert memory.configs[0]["train.steps"] == 3
    assert memory.endings == ["complete"]


# ---------------------------------------------------------------- TensorBoard


def _board(folder: Path) -> Any:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = reader.EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    board.Reload()
    return board


def test_tensorboard_reads_back_what_was_written_and_a_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    first = Part(run, "tensorboard")
    first.run(_eval(0, 3.0, rows=3.5), *map(_step, range(1, 6)), _sample(4, "early"), reason=None)
    assert str(run / "tensorboard") in first.said[0]
    first.trackers.__exit__(None, None, None)
    Part(run, "tensorboard", step=3).run(
        _step(4, 0.4), _step(5, 0.5), _sample(4, "again"), _sample(5, "late"), _eval(5, 2.0)
    )

    board = _board(run / "tensorboard")
    losses = [(point.step, pytest.approx(point.value)) for point in board.Scalars("train/loss")]
    assert losses == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 0.4), (5, 0.5)]
    assert [(point.step, point.value) for point in board.Scalars("eval/loss")] == [(0, 3.0), (5, 2.0)]
    assert [point.value for point in board.Scalars("eval/rows")] == [3.5]
    assert [point.value for point in board.Scalars("train/tokens")] == [100, 200, 300, 400, 500]
    texts = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("samples/1/text_summary")]
    assert texts == ["a question\n\nearly", "a question\n\nlate"]
    hparams = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"train.rate" in hparams
    assert [path.name for path in (run / "tensorboard").iterdir() if path.is_dir()] == []


# ---------------------------------------------------------------- MLflow


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in (
        "MLFLOW_DISABLE_TELEMETRY",
        "MLFLOW_HTTP_REQUEST_TIMEOUT",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    ):
        monkeypatch.delenv(name, raising=False)


def test_mlflow_reads_back_what_was_written(tmp_path, no_server):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    run = tmp_path / "run"
    events = (_eval(0, 3.0), *map(_step, range(1, 6)), _sample(5, "an answer"))
    Part(run, "mlflow").run(*events, reason="interrupted")
    Part(run, "mlflow", step=3, config={"train.rate": 9}).run(*map(_step, range(4, 7)), reason="non-finite")

    client = mlflow.MlflowClient(f"sqlite:///{run / 'mlflow' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'tests'")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 10.0 - step) for step in range(1, 7)]
    assert client.get_metric_history(found.info.run_id, "eval/loss")[0].value == 3.0
    assert found.data.params == {"train.rate": "0.1"}
    assert (found.info.run_name, found.info.status) == ("run", "FAILED")
    text = run / "mlflow" / "artifacts" / found.info.run_id / "artifacts" / "samples" / "step-00000005-1.txt"
    assert text.read_text() == "a question\n\nan answer"
    assert not mlflow.is_tracking_uri_set(), "the next run of this process has a directory of its own"


# ---------------------------------------------------------------- Trackio


def test_trackio_reads_back_what_was_written(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    for name in ("TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it fixes its folder when it is imported
    run = tmp_path / "run"
    first = Part(run, "trackio")
    first.run(_eval(0, 3.0), *map(_step, range(1, 6)), _sample(5, "an answer"), reason="interrupted")
    Part(run, "trackio", step=3).run(*map(_step, range(4, 7)))

    from trackio.sqlite_storage import SQLiteStorage

    assert [path.name for path in (run / "trackio").glob("*.db")] == ["tests.db"]
    assert f"trackio: {run / 'trackio'}; " in first.said[0]
    assert "TRACKIO_DIR" not in os.environ
    assert [record["name"] for record in SQLiteStorage.get_run_records("tests")] == ["run"]
    logs = SQLiteStorage.get_logs("tests", "run")
    assert [(row["step"], row["train/loss"]) for row in logs if "train/loss" in row] == [
        (step, 10.0 - step) for step in range(1, 7)
    ]
    assert [(row["step"], row["eval/loss"]) for row in logs if "eval/loss" in row] == [(0, 3.0)]
    assert [row["samples/1"] for row in logs if "samples/1" in row] == ["a question\n\nan answer"]
    assert SQLiteStorage.get_run_config("tests", "run")["train.rate"] == 0.1
