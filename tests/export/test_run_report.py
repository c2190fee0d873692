"""The report of a run: one file, every word as text, bounded, and as much as the directory tells."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.fake_runs import START, end, evaluated, events_of, step, write_events, write_run
from tests.support.html import HOSTILE, Page, harmless
from tunesmith.export.page import escape
from tunesmith.export.report_settings import settings_of
from tunesmith.export.run_report import write_report
from tunesmith.export.run_summary import read_run

ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "h4", "p", "div", "dl", "dt", "dd", "b", "i",
    "svg", "g", "rect", "text", "line", "polyline", "circle", "figure", "figcaption", "details", "summary", "span",
    "ul", "li", "pre", "mark", "table", "thead", "tbody", "tr", "th", "td", "code",
}  # fmt: skip


def report(folder: Path, **more: Any) -> Page:
    page = Page(write_report(folder, **more).read_text(encoding="utf-8"))
    harmless(page, ELEMENTS)
    return page


def words(page: Page) -> str:
    return " ".join(text for around, text in page.texts if around != "style")


def write_json(folder: Path, name: str, values: Any) -> None:
    (folder / name).write_text(json.dumps(values), encoding="utf-8")


def data_of(name: str = "rows.jsonl", **report: Any) -> dict[str, Any]:
    counts = {
        "rows_in": 10, "rows_kept": 7, "dropped": {"empty answer": 2, "unreadable": 1}, "truncated": 3,
        "examples": ["rows.jsonl:3: empty answer"], "tokens": 400, "trained_tokens": 100, "format": "pair",
        "notes": [],
    }  # fmt: skip
    return {
        "sources": [{"name": name, "role": "train", "report": {**counts, **report}}],
        "documents": {"train": 6, "held_out": 1},
    }


def test_a_whole_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "first", train={"learning_rate": 3e-4})
    write_json(run, "data.json", data_of())
    pieces = [[False, "Why?"], [True, "Because."]]
    mask = {"where": "rows.jsonl:1", "tokens": 9, "shown": 4, "trained": 3, "pieces": pieces}
    write_json(run, "masks.json", {"documents": [mask]})
    write_json(run, "answers.json", {"questions": ["2+2?"], "before": ["fish"], "after": ["4"]})
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 1_500_000)

    page = report(run)
    text = words(page)

    assert page.text("title").startswith("first · run report")
    assert page.elements.count("svg") == 5
    assert (
        "The held-out loss fell from 2.5000 to 1.2500 (-50.0%) in 20 steps. It was lowest at step 10, with 1.2000."
        in text
    )
    for said in (
        "org/small-model", "lora 16, 1,234 parameters", "400 tokens, 25% trained on", "dropped: empty answer",
        "2 (20.0%)", "4 (40.0%)", "3 (30.0%)",
        "documents that train: 6; that are held out and measure: 1", "9 tokens, 3 trained on, of which the first 4",
        "before training", "fish", "after training", "adapter/adapter_model.safetensors", "1.5 MB",
        "0.0003", "0.0002",
    ):  # fmt: skip
        assert said in text, said
    assert page.text("mark") == "on greenBecause."
    assert "Why?" in page.text("pre")
    assert "finished" in page.text("span")
    assert "Warnings" not in text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text_wherever_it_stands(tmp_path: Path, text: str) -> None:
    events = [
        {"event": "start", "step": 0, **START, "device": text},
        *events_of(reason=None)[1:],
        {"event": "warning", "step": 1, "message": text},
        {"event": "sample", "step": 1, "prompt": text, "answer": text, "seconds": 0.1},
        {"event": text, "step": 2},
        end(20, text),
    ]
    run = write_run(tmp_path / "<b>run", events, model={"name": text}, data={"train": [{"path": text}]})
    write_json(run, "data.json", data_of(text, dropped={text: 3}, examples=[text], notes=[text], format=text))
    mask = {"where": text, "tokens": 2, "shown": 2, "trained": 1, "pieces": [[True, text], [False, text]]}
    write_json(run, "masks.json", {"documents": [mask]})
    write_json(run, "answers.json", {"questions": [text], "before": [text], "after": [text]})
    write_json(run, "versions.json", {text: text})
    (run / "faults").mkdir()
    fault = {"not_finite": text, "micro_batches": [{"loss": "nan", "rows": [text]}]}
    write_json(run / "faults", "step-00000003.json", fault)

    page = report(run)

    wanted = Page(f"<p>{escape(text)}</p>").text("p")
    for element in ("dd", "dt", "pre", "mark", "p", "td", "div", "h3"):
        assert " ".join(wanted.split()) in " ".join(page.text(element).split()), element
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", words(page))
    assert "<b>run" in page.text("h1")


def test_a_long_run_makes_a_small_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "long", events_of(15_000))
    long = "so " * 2_000
    mask = {"where": "x", "tokens": 9, "shown": 9, "trained": 1, "pieces": [[True, "x" * 2000]]}
    write_json(run, "masks.json", {"documents": [mask]})
    write_json(run, "answers.json", {"questions": [long] * 50, "before": [long] * 50, "after": [long] * 50})
    with (run / "events.jsonl").open("a") as file:
        for number in range(500):
            for name in (f"warning {number}", long):
                file.write(json.dumps({"event": "warning", "step": 1, "message": name}) + "\n")
            file.write(json.dumps({"event": "sample", "step": number, "prompt": "p", "answer": long}) + "\n")

    path = write_report(run)

    assert path.stat().st_size < 1_000_000
    text = words(Page(path.read_text(encoding="utf-8")))
    assert "(cut, 6,000 characters)" in text
    assert "494 answers between them left out" in text
    assert "and 471 further ones" in text
    assert len(re.findall(r"warning \d+", text)) == 29  # and the long one
    assert "500 times" in text


HALF = (
    "",
    "[1]",
    '{"sources": 3, "documents": [3], "questions": 1}',
    '{"documents": [{"pieces": [3]}], "sources": [{"report": {"dropped": 7}}], "before": {}}',
)


@pytest.mark.parametrize("name", ["run.yaml", "versions.json", "data.json", "masks.json", "answers.json"])
@pytest.mark.parametrize("content", HALF)
def test_what_is_half_written_is_left_out(tmp_path: Path, name: str, content: str) -> None:
    run = write_run(tmp_path / "run")
    (run / name).write_text(content)

    assert "The held-out loss fell" in words(report(run))


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([], "No held-out loss was measured. Complete: 0 steps."),
        ([{"event": "start", "step": 0}, step(1), end(1, "interrupted")], "It was interrupted."),
        (
            [{"event": "start", "step": 0}, evaluated(0, 2.0), step(1)],
            "measured at step 0 only: 2.0000. Complete: 1 step",
        ),
        ([{"event": "start", "step": 0}, evaluated(0, 2.0), step(1)], "ended without a word"),
        ([step(1), end(1, "non-finite")], "not finite"),
        ([step(1), end(1, "early stop")], "stopped early"),
        ([step(1), evaluated(0, 1.0), evaluated(1, 2.0), end(1, "time")], "rose from 1.0000 to 2.0000"),
    ],
)
def test_every_end_has_its_sentence(tmp_path: Path, events: list[dict[str, Any]], said: str) -> None:
    assert said in words(report(write_events(tmp_path / "run", events)))


def test_a_faulty_step_is_named_with_its_rows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "faults").mkdir()
    batches = [{"loss": "0.4", "rows": ["a:1"]}, {"loss": "nan", "rows": ["a:7", "a:9"]}]
    write_json(
        run / "faults", "step-00000017.json", {"step": 17, "not_finite": "loss", "micro_batches": batches}
    )

    page = report(run)

    assert "The loss is not finite. Rows: a:7, a:9" in page.text("p")
    assert "faults/step-00000017.json" in page.text("h4")


def test_time_is_broken_down(tmp_path: Path) -> None:
    events = events_of(reason=None)
    events += [
        {"event": "sample", "step": 20, "prompt": "p", "answer": "a", "seconds": 2.0},
        end(20, seconds=20.0),
    ]

    text = words(report(write_events(tmp_path / "run", events)))

    for said in ("10.0 s (50.0%)", "3.0 s (15.0%)", "1.0 s (5.0%)", "2.0 s (10.0%)", "4.0 s (20.0%)"):
        assert said in text


def test_a_report_goes_where_it_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")

    assert write_report(run) == run / "report.html"
    assert write_report(run, tmp_path / "other.html") == tmp_path / "other.html"
    assert "report.html" not in words(Page((tmp_path / "other.html").read_text()))


def test_settings_are_marked_where_they_differ_from_the_defaults(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        train={"learning_rate": 3e-4, "steps": 9},
        data={"train": [{"path": "a", "weight": 2.0}]},
    )
    settings = yaml.safe_load((run / "run.yaml").read_text())
    settings["train"]["of_a_newer_version"] = 1

    chosen = {each.name: (each.value, each.default) for each in settings_of(settings) if each.chosen}

    assert chosen == {
        "model.name": ("org/small-model", "required"),
        "data.train.0.path": ("a", "required"),
        "data.train.0.weight": (2.0, "1.0"),
        "train.steps": (9, "null"),
        "train.learning_rate": (3e-4, "0.0002"),
        "train.of_a_newer_version": (1, "unknown"),
        "output.dir": (str(run), "runs/first"),
    }
    helped = {each.name: each.help for each in settings_of(settings)}
    assert "learning rate" in helped["train.learning_rate"]
    assert read_run(run).summary.name == str(run)
