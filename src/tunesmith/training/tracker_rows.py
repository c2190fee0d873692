"""`TRACKERS`: how a run is opened, described and closed in each of the programs that `output.track` may name.

Accelerate's tracker classes write the figures; a row adds what they leave to their caller: where the files lie,
whether anything leaves the machine, how an earlier run goes on, and how it ended. Nothing is imported before a
tracker is opened. By default all of them write below the run directory. Those with a service are sent to it where the
user has logged in on this machine or says so with the service's own variable; otherwise they keep its offline form.
"""

from __future__ import annotations

import os
import shlex
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Value = bool | int | float | str
Ending = Literal["complete", "interrupted", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tracker writes.

    Attributes:
        folder: the run directory.
        project: what runs are grouped under.
        name: what the run is called.
        run: what `Opened.run` was, where an earlier run goes on.
        first_step: steps from this one on are written; what stands there of an earlier attempt is void.
    """

    folder: Path
    project: str
    name: str
    run: str | None
    first_step: int


@dataclass(frozen=True, slots=True)
class Opened:
    """A tracker that takes values: Accelerate's object, its name for the run, and where a person finds it."""

    tracker: Any
    run: str
    where: str


def _configure(tracker: Any, config: Mapping[str, Value]) -> None:
    tracker.store_init_configuration(dict(config))


def _write_text(tracker: Any, name: str, text: str, step: int) -> None:
    tracker.log({name: text}, step=step)


def _finish(tracker: Any, _: Ending) -> None:
    tracker.finish()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracker:
    """One program.

    Attributes:
        module: what is imported of it.
        open: begins a run, or goes on with one.
        configure: writes the settings of the run.
        configure_again: whether they are written again where an earlier run goes on.
        rewinds: whether it takes back the figures of steps that run again; otherwise they are not written twice.
        text: writes a text under a name, at a step.
        close: ends the run, and says how it ended where the program has a word for it.
    """

    module: str
    open: Callable[[Place], Opened]
    configure: Callable[[Any, Mapping[str, Value]], None] = _configure
    configure_again: bool = True
    rewinds: bool = False
    text: Callable[[Any, str, str, int], None] = _write_text
    close: Callable[[Any, Ending], None] = _finish


def _quoted(argument: object) -> str:
    return shlex.quote(str(argument))


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables that hold inside the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# ---------------------------------------------------------------- TensorBoard


def _open_tensorboard(place: Place) -> Opened:
    from accelerate.tracking import TensorBoardTracker

    folder = place.folder / "tensorboard"
    tracker = TensorBoardTracker(folder.name, str(place.folder), purge_step=place.first_step)
    tracker.start()
    return Opened(tracker, folder.name, f"{folder}; see it with `tensorboard --logdir {_quoted(folder)}`")


def _configure_tensorboard(tracker: Any, config: Mapping[str, Value]) -> None:
    """Into the files of the run: Accelerate would make a second run of them, with no curves in it."""
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(dict(config), {"eval/loss": 0.0, "train/loss": 0.0}):
        tracker.tracker.file_writer.add_summary(summary, 0)


# ---------------------------------------------------------------- Weights & Biases


def _open_wandb(place: Place) -> Opened:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb
    from accelerate.tracking import WandBTracker

    logged_in = wandb.login(prompt=False, verify=False)
    offline = "WANDB_MODE" not in os.environ and not logged_in
    tracker = WandBTracker(
        place.project,
        name=place.name,
        id=place.run or uuid.uuid4().hex[:12],
        resume="allow",
        dir=os.environ.get("WANDB_DIR", str(place.folder)),
        **({"mode": "offline"} if offline else {}),
        settings=wandb.Settings(console="off", silent=True, disable_git=True),
    )
    tracker.start()
    run = tracker.tracker
    folder = Path(run.settings.sync_dir)
    where = f"{folder}; send it with `wandb sync --append {_quoted(folder)}`" if run.offline else run.url
    return Opened(tracker, str(run.id), where)


def _close_wandb(tracker: Any, ending: Ending) -> None:
    tracker.tracker.finish(exit_code=1 if ending == "failed" else 0)


# ---------------------------------------------------------------- MLflow


def _open_mlflow(place: Place) -> Opened:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # a server that is gone would hold a step up for minutes with the two defaults, 120 s and 7 times
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    import mlflow
    from accelerate.tracking import MLflowTracker

    artifacts = None
    where = os.environ.get("MLFLOW_TRACKING_URI")
    if where is None:
        folder = (place.folder / "mlflow").absolute()
        folder.mkdir(exist_ok=True)
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        mlflow.set_tracking_uri(uri)
        # which sets this too, and to the next run of this process it would be the word of the user
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        artifacts = (folder / "artifacts").as_uri()
        where = f"{place.folder / 'mlflow'}; see it with `mlflow ui --backend-store-uri {_quoted(uri)}`"
    tracker = MLflowTracker(place.project, logging_dir=artifacts, run_id=place.run, run_name=place.name)
    tracker.start()
    return Opened(tracker, str(tracker.tracker.info.run_id), where)


def _text_mlflow(_: Any, name: str, text: str, step: int) -> None:
    import mlflow

    kind, _, number = name.partition("/")
    mlflow.log_text(text, f"{kind}/step-{step:08d}-{number}.txt")


def _close_mlflow(_: Any, ending: Ending) -> None:
    import mlflow

    mlflow.end_run({"complete": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[ending])
    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(None)


# ---------------------------------------------------------------- Trackio


def _open_trackio(place: Place) -> Opened:
    """Trackio fixes its folder when it is imported: one that is already there is kept, and said."""
    if "trackio" not in sys.modules and "TRACKIO_DIR" not in os.environ:
        with _environment(TRACKIO_DIR=str((place.folder / "trackio").absolute())):
            import trackio.utils
    import trackio.utils
    from accelerate.tracking import TrackioTracker

    tracker = TrackioTracker(
        place.project,
        name=place.run or place.name,
        resume="allow" if place.run else "never",
        embed=False,
        auto_log_cpu=False,
    )
    tracker.start()
    run, folder = tracker.tracker, trackio.utils.TRACKIO_DIR
    command = f"TRACKIO_DIR={_quoted(folder)} trackio show --project {_quoted(place.project)}"
    where = run.url or f"{folder}; see it with `{command}`"
    return Opened(tracker, str(run.name), where)


def _close_trackio(_: Any, __: Ending) -> None:
    """By the module, which would otherwise end the run once more when the process ends."""
    import trackio

    trackio.finish()


def _configure_trackio(tracker: Any, config: Mapping[str, Value]) -> None:
    """Without the key that Accelerate adds. It is written with the first values, for a run that goes on as well."""
    tracker.tracker.config.update(config)


# ---------------------------------------------------------------- Comet


def _open_comet(place: Place) -> Opened:
    import comet_ml
    from accelerate.tracking import CometMLTracker

    online = None if "COMET_START_ONLINE" in os.environ else bool(comet_ml.get_config("comet.api_key"))
    folder = place.folder / "comet"
    folder.mkdir(exist_ok=True)
    own = dict.fromkeys(("log_code", "log_graph", "parse_args", "log_git_metadata", "log_git_patch"), False)
    tracker = CometMLTracker(
        place.project,
        online=online,
        experiment_key=place.run,
        experiment_config=comet_ml.ExperimentConfig(
            name=place.name,
            offline_directory=str(folder),
            display_summary_level=0,
            auto_output_logging=False,
            auto_param_logging=False,
            auto_metric_logging=False,
            auto_log_co2=False,
            **own,
        ),
    )
    tracker.start()
    experiment = tracker.tracker
    where = (
        f"{folder}; send it with `comet upload {_quoted(folder)}/*.zip`"
        if online is False
        else experiment.url
    )
    return Opened(tracker, str(experiment.get_key()), str(where))


def _text_comet(tracker: Any, name: str, text: str, step: int) -> None:
    tracker.tracker.log_text(text, step=step, metadata={"name": name})


def _close_comet(tracker: Any, ending: Ending) -> None:
    tracker.tracker.log_other("ended", ending)
    tracker.finish()


# ---------------------------------------------------------------- SwanLab


def _open_swanlab(place: Place) -> Opened:
    """Only its service can go on with a run, so that an offline one begins anew."""
    import swanlab
    from accelerate.tracking import SwanLabTracker

    says = os.environ.get("SWANLAB_MODE")
    mode = says or ("online" if swanlab.Settings().api_key else "offline")
    folder = place.folder / "swanlab"
    tracker = SwanLabTracker(
        place.project,
        name=place.name,
        log_dir=str(folder),
        mode=mode,
        **({"id": place.run, "resume": "allow"} if place.run and mode == "online" else {}),
    )
    tracker.start()
    run = tracker.tracker
    where = run.url if mode == "online" else f"{folder}; send it with `swanlab sync {_quoted(folder)}/run-*`"
    return Opened(tracker, str(run.id), where)


def _text_swanlab(tracker: Any, name: str, text: str, step: int) -> None:
    import swanlab

    tracker.log({name: swanlab.Text(text)}, step=step)


def _close_swanlab(tracker: Any, ending: Ending) -> None:
    state = {"complete": "success", "interrupted": "aborted", "failed": "crashed"}[ending]
    tracker.tracker.finish(state=state, error="see the events of the run" if ending == "failed" else None)


TRACKERS: dict[str, Tracker] = {
    "tensorboard": Tracker(
        module="tensorboard",
        open=_open_tensorboard,
        configure=_configure_tensorboard,
        configure_again=False,
        rewinds=True,
    ),
    "wandb": Tracker(module="wandb", open=_open_wandb, close=_close_wandb),
    "mlflow": Tracker(
        module="mlflow",
        open=_open_mlflow,
        configure_again=False,  # a parameter has one value for ever
        text=_text_mlflow,
        close=_close_mlflow,
    ),
    "trackio": Tracker(
        module="trackio",
        open=_open_trackio,
        configure=_configure_trackio,
        close=_close_trackio,
    ),
    "comet": Tracker(module="comet_ml", open=_open_comet, text=_text_comet, close=_close_comet),
    "swanlab": Tracker(module="swanlab", open=_open_swanlab, text=_text_swanlab, close=_close_swanlab),
}
"""What `output.track` may name, by the extra of tunesmith that installs it."""
