"""The report with pictures: everything inside one file, every word of the data as text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.command import exit_code
from tests.support.html import HOSTILE, Page, harmless
from tunesmith.cli.pictures import histogram
from tunesmith.export.page import bars, escape

LIMIT = 128
ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "dl", "dt", "dd", "b", "i", "svg",
    "rect", "text", "line", "details", "summary", "span", "ul", "li", "pre", "mark",
}  # fmt: skip


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def page(tiny_model_dir: Path, tmp_path: Path, capsys):
    """The report of some rows, parsed, and what the terminal says."""

    def run(rows: list[Any], *words: object, name: str = "rows.jsonl") -> tuple[Page, str]:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        out = tmp_path / "report.html"
        exit_code(
            "data",
            "check",
            path,
            "--model",
            tiny_model_dir,
            "--sequence-length",
            LIMIT,
            "--html",
            out,
            *words,
        )
        printed = capsys.readouterr()
        assert printed.err == ""
        return Page(out.read_text(encoding="utf-8")), printed.out

    return run


def test_a_report_is_one_file_with_its_pictures(page) -> None:
    rows = [chat(f"why {n}?", "so " * n) for n in range(1, 60)]
    made, printed = page([*rows, chat("why 1?", "so "), chat("q", "")])

    harmless(made, ELEMENTS)
    assert made.open == []
    assert made.elements.count("svg") == 1
    assert made.elements.count("rect") >= 4
    text = " ".join(text for _, text in made.texts)
    for said in (
        "61",
        "dropped: empty answer",
        "exact duplicates of an earlier row",
        "128 fit",
        "tokens a document",
    ):
        assert said in text
    assert "<|im_start|>user\nwhy 1?<|im_end|>" in made.text("pre")
    assert "so <|im_end|>" in made.text("mark")
    assert "why" not in made.text("mark")
    assert "report.html" in printed


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_row_is_text(page, text: str) -> None:
    made, _ = page(
        [chat(text, text), {"messages": [{"role": text, "content": "x"}]}, {text: "x"}, chat("q", "a")]
    )

    harmless(made, ELEMENTS)
    assert made.open == []
    shown = made.text("pre") + made.text("mark")
    seen = escape(text)
    for raw in ("<", ">"):
        assert raw not in seen
    wanted = Page(f"<pre>{seen}</pre>").text("pre")
    assert wanted in shown
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "".join(text for _, text in made.texts))


def test_a_hostile_name_of_a_file_is_text(page) -> None:
    made, _ = page([chat("q", "a")], name="<img src=x onerror=alert(1)>.jsonl")

    harmless(made, ELEMENTS)
    assert "<img src=x onerror=alert(1)>.jsonl" in made.text("h1")


@given(st.text(st.characters(exclude_categories=[]), max_size=40))
def test_any_text_is_one_text(text: str) -> None:
    made = Page(f'<p title="{escape(text)}">{escape(text)}</p>')

    assert made.elements == ["p"]
    assert [name for name, _ in made.attributes] == ["title"]
    assert len(made.text("p")) == len(text.encode("utf-8", "replace").decode())


def test_a_long_row_is_cut_in_the_report(page) -> None:
    made, _ = page([{"text": "again " * 20_000}], "--sequence-length", 30_000)

    assert "of which the first 1,500 are shown" in made.text("p")
    assert len(made.text("mark")) < 20_000


def test_sources_stand_beside_each_other_with_what_they_share(page, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(
        "".join(json.dumps(row) + "\n" for row in (chat("q 1", "a"), chat("q 2", "other"), chat("z", "z")))
    )
    made, _ = page([chat("q 1", "a"), chat("q 2", "b")], "--held-out", held)

    harmless(made, ELEMENTS)
    assert made.elements.count("svg") == 2
    assert "held-out rows that are training rows, too" in made.text("summary")
    assert "held-out rows that answer the prompt of a training row" in made.text("summary")
    assert "Of 3 held-out rows 1 is in the training data, too and 1 is behind a prompt" in made.text("p")


@pytest.mark.parametrize("where", ["nowhere/report.html", "."])
def test_a_report_that_cannot_be_written_is_told_before_anything_is_read(
    tiny_model_dir: Path, tmp_path: Path, capsys, where: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(chat("q", "a")) + "\n")
    code = exit_code(
        "data", "check", tmp_path / "rows.jsonl", "--model", tiny_model_dir, "--html", tmp_path / where
    )

    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert "Name a file, such as --html report.html." in printed.err


# ---------------------------------------------------------------- pictures


def test_the_bars_of_a_histogram_hold_every_row() -> None:
    rng = np.random.default_rng(0)
    for lengths in ([1], [7, 7], rng.integers(1, 9000, 500).tolist()):
        drawn = histogram(np.array(lengths, dtype=np.int64), 2048)
        found = re.findall(r"<title>([\d,]+) to ([\d,]+) tokens: ([\d,]+)</title>", drawn)
        bins = [tuple(int(number.replace(",", "")) for number in one) for one in found]
        assert sum(count for _, _, count in bins) == len(lengths)
        assert all(sum(low <= length <= high for length in lengths) == count for low, high, count in bins)


def test_what_just_fits_is_left_of_the_line() -> None:
    drawn = histogram(np.array([128, 128, 129], dtype=np.int64), 128)

    assert re.findall(r'class="(fits|long)"', drawn) == ["fits", "long"]


def test_bars_share_a_scale() -> None:
    drawn = bars([("a", (("kept", 30), ("dropped", 10)), "40"), ("<b>", (("kept", 10),), "10")])

    assert re.findall(r"width:([\d.]+)%", drawn) == ["75.000", "25.000", "25.000"]
    assert "&lt;b&gt;" in drawn
    assert bars([]) == '<div class="bars"></div>'
