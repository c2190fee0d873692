"""The report of a run as one HTML file that opens without network, from what lies in the run directory. Torch-free.

It is written when a run is over, however it ended, and can be written again from the directory at any time. It reads
what is there: a run of an older version, or one that was killed, has fewer sections. Long runs are thinned and long
texts cut, so the file stays below some megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tunesmith.contracts.files import replace_text
from tunesmith.contracts.plural import counted
from tunesmith.contracts.sizes import file_size
from tunesmith.export import run_files
from tunesmith.export.curves import Point, number, of_kind, series, smoothed
from tunesmith.export.line_chart import Line, figure, line_chart
from tunesmith.export.page import bars, escape, names_and_values, page, tiles
from tunesmith.export.report_data import data_html, masks_html
from tunesmith.export.report_samples import samples_html
from tunesmith.export.report_settings import settings_html
from tunesmith.export.report_trouble import trouble_html
from tunesmith.export.run_files import read_json
from tunesmith.export.run_summary import Recorded, Summary, read_run

REPORT = "report.html"
_MOST_FILES = 60


def write_report(folder: Path, target: Path | None = None, *, running: bool | None = None) -> Path:
    """Write the report of a run.

    Args:
        target: the file; `report.html` in the run directory by default.
        running: whether a process trains in the directory; None looks.

    Returns:
        The file.
    """
    path = target if target is not None else folder / REPORT
    replace_text(path, report_html(read_run(folder, running=running)))
    return path


def report_html(run: Recorded) -> str:
    """The whole page."""
    folder, events = run.folder, run.events
    name = folder.resolve().name
    parts = [
        _head(run, name),
        trouble_html(folder, events),
        _curves(events),
        samples_html(events, read_json(folder / run_files.ANSWERS)),
        data_html(read_json(folder / run_files.DATA)),
        masks_html(read_json(folder / run_files.MASKS)),
        settings_html(run.settings),
        _timing(run),
        _artifacts(folder),
        _versions(read_json(folder / run_files.VERSIONS)),
    ]
    return page(f"{name} · run report", parts, styles=["report.css"])


# ---------------------------------------------------------------- the head


def loss_sentence(run: Recorded) -> str:
    """What the run came to, in a sentence or two."""
    summary, held = run.summary, series(run.events, "eval", "loss")
    steps, trained = counted(summary.steps, "step"), summary.train_loss
    if len(held) < 2:
        once = (
            f"The held-out loss was measured at step {int(held[0][0]):,} only: {held[0][1]:.4f}."
            if held
            else ""
        )
        loss = "" if trained is None else f", and the training loss at the end is {trained:.4f}"
        return f"{once or 'No held-out loss was measured.'} Complete: {steps}{loss}."
    (_, first), (_, last) = held[0], held[-1]
    verb = "fell" if last < first else "rose" if last > first else "stayed"
    change = f" ({last / first - 1:+.1%})" if first else ""
    best = summary.best_eval
    lowest = (
        f" It was lowest at step {summary.best_step:,}, with {best:.4f}."
        if best is not None and best < last
        else ""
    )
    return f"The held-out loss {verb} from {first:.4f} to {last:.4f}{change} in {steps}.{lowest}"


_ENDED = {
    "finished": "It is finished.",
    "running": "It is still running.",
    "interrupted": "It was interrupted. The command that started it goes on from there.",
    "failed": "It ended without a word: with an error, or killed. The command that started it goes on from the "
    "newest checkpoint.",
}
_REASONS = {
    "time": "Its time (train.max_hours) was over.",
    "non-finite": "It stopped at a loss or gradient that is not finite.",
    "early stop": "It stopped early, because the held-out loss no longer fell.",
}


def _head(run: Recorded, name: str) -> str:
    summary = run.summary
    state = f'<span class="state {summary.state}">{summary.state}</span>'
    when = f"{datetime.fromtimestamp(summary.when).astimezone():%Y-%m-%d %H:%M}"
    good = summary.state == "finished" and (summary.last_eval or 0) <= (summary.first_eval or 0)
    sentences = (loss_sentence(run), _REASONS.get(summary.reason or "", _ENDED[summary.state]))
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    start = of_kind(run.events, "start")
    facts = {
        "model": summary.model,
        "trained": _trained(summary, start[-1] if start else {}),
        "data": summary.data,
        "objective": summary.objective,
        "device": start[-1].get("device") if start else None,
        "directory": run.folder,
        "last event": when,
    }
    return (
        f'<h1>{escape(name)} {state}</h1><div class="verdict{" clean" if good else ""}">{said}</div>'
        f"{tiles(_figures(run))}{names_and_values({key: value for key, value in facts.items() if value})}"
    )


def _trained(summary: Summary, start: dict[str, Any]) -> str | None:
    parameters = number(start, "trained_parameters")
    if summary.adapter is None:
        return None
    return summary.adapter + (f", {int(parameters):,} parameters" if parameters else "")


def duration(seconds: float) -> str:
    """A time as hours, minutes and seconds; short ones with a tenth."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _figures(run: Recorded) -> dict[str, str]:
    summary, tokens = run.summary, sum(number(step, "tokens") or 0 for step in of_kind(run.events, "step"))
    of = (
        f" of {summary.total_steps:,}" if summary.total_steps and summary.total_steps != summary.steps else ""
    )
    found = {
        "held-out loss, last": _loss(summary.last_eval),
        "held-out loss, best": _loss(summary.best_eval),
        "training loss, last steps": _loss(summary.train_loss),
        "steps": f"{summary.steps:,}{of}",
        "tokens": figure(tokens) if tokens else None,
        "tokens/s in steps": figure(summary.tokens_per_second) if summary.tokens_per_second else None,
        "peak memory": f"{summary.memory_gib:.1f} GiB" if summary.memory_gib else None,
        "time": duration(summary.seconds) if summary.seconds else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _loss(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


# ---------------------------------------------------------------- curves


def _curves(events: list[dict[str, Any]]) -> str:
    losses, held = series(events, "step", "loss"), series(events, "eval", "loss")
    held_out = Line("held out", "held", held, dots=len(held) <= 60)
    large = line_chart("Loss", [*_both(losses), held_out], unit="nats per token", may_be_log=True)
    rate, memory = (series(events, "step", name) for name in ("learning_rate", "memory_gib"))
    norms, speeds = (_both(series(events, "step", name)) for name in ("grad_norm", "tokens_per_second"))
    small = (
        line_chart("Learning rate", [Line("rate", "smooth", rate)], small=True),
        line_chart("Gradient norm", norms, unit="before clipping", small=True, may_be_log=True),
        line_chart("Speed", speeds, unit="tokens/s", small=True),
        line_chart("Peak memory", [Line("peak", "smooth", memory)], unit="GiB", small=True),
    )
    if not large and not any(small):
        return ""
    return f'<h2>Curves</h2>{large}<div class="charts">{"".join(small)}</div>'


def _both(points: list[Point]) -> list[Line]:
    return [Line("each step", "raw", points), Line("smoothed", "smooth", smoothed(points))]


# ---------------------------------------------------------------- time, files, versions


_SPENT = {"steps": "step", "evaluation": "eval", "checkpoints": "checkpoint", "samples": "sample"}
"""What takes time, as the style sheet calls it, and the kind of its events."""


def _timing(run: Recorded) -> str:
    """What the time of the run was spent on."""
    total = run.summary.seconds
    if not total:
        return ""
    spent = {
        look: sum(number(event, "seconds") or 0.0 for event in of_kind(run.events, kind))
        for look, kind in _SPENT.items()
    }
    spent["rest"] = max(0.0, total - sum(spent.values()))
    names = {"evaluation": "held-out loss", "samples": "samples", "rest": "the rest"}
    rows = [
        (names.get(look, look), ((look, seconds),), f"{duration(seconds)} ({seconds / total:.1%})")
        for look, seconds in spent.items()
        if seconds >= 0.0005 * total
    ]
    note = '<p class="faint">Preparing data and loading the model come before and are not counted.</p>'
    return f"<h2>Time</h2>{bars(rows)}{note}"


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Files of the run directory and of its result with their sizes; a checkpoint as one entry."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == REPORT:
            continue
        if path.is_file():
            yield path.name, path.stat().st_size
        elif path.name in ("adapter", "model"):
            for file in sorted(path.rglob("*")):
                if file.is_file():
                    yield str(file.relative_to(folder)), file.stat().st_size
        elif path.is_dir():
            for child in sorted(path.iterdir()):
                files = [child] if child.is_file() else list(child.rglob("*"))
                end = "" if child.is_file() else "/"
                yield (
                    f"{path.name}/{child.name}{end}",
                    sum(file.stat().st_size for file in files if file.is_file()),
                )


def _artifacts(folder: Path) -> str:
    files = list(_files(folder))
    rows = "".join(
        f'<tr><td><code>{escape(name)}</code></td><td class="number">{file_size(size)}</td></tr>'
        for name, size in files[:_MOST_FILES]
    )
    more = len(files) - _MOST_FILES
    note = f'<p class="faint">and {counted(more, "further file")}</p>' if more > 0 else ""
    return f"<h2>Files</h2><table><tbody>{rows}</tbody></table>{note}" if rows else ""


def _versions(versions: dict[str, Any]) -> str:
    return f"<h2>Versions</h2>{names_and_values(versions)}" if versions else ""
