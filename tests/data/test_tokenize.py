"""From a source to its table: every row accounted for, refusals with places, and the cache key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tiny import tiny_tokenizer
from tunesmith.contracts.errors import DataError
from tunesmith.data.render import Renderer
from tunesmith.data.sources import open_source
from tunesmith.data.table import TokenTable
from tunesmith.data.template import CHATML
from tunesmith.data.tokenize import default_cache_dir, tokenize_source

RENDERER = Renderer(tiny_tokenizer(), CHATML)
SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def pair(question: str, answer: Any) -> str:
    return json.dumps({"prompt": question, "response": answer})


def run(tmp_path: Path, *lines: str, sequence_length: int = 512, **options: Any) -> TokenTable:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return tokenize_source(
        open_source(path, split=options.pop("split", None)),
        renderer=options.pop("renderer", RENDERER),
        sequence_length=sequence_length,
        cache_dir=tmp_path / "cache",
        **options,
    )


def answers(table: TokenTable) -> list[str]:
    return [RENDERER.tokenizer.decode(table.ids(i)[table.trained(i)]) for i in range(len(table))]


def test_rows_become_tokens_and_every_row_is_accounted_for(tmp_path: Path) -> None:
    table = run(tmp_path, pair("a", "one"), "{broken", pair("b", ""), pair("c", [1]), pair("d", "two"))
    assert answers(table) == ["one<|im_end|>", "two<|im_end|>"]
    assert [table.row(i) for i in range(2)] == [0, 4]
    assert [table.where(i) for i in range(2)] == [f"{tmp_path}/rows.jsonl:1", f"{tmp_path}/rows.jsonl:5"]
    report = table.report
    assert report.dropped == {"unreadable": 1, "empty answer": 1, "not text": 1}
    assert (report.rows_in, report.rows_kept, report.truncated, report.format) == (5, 2, 0, "pair")
    assert report.tokens == int(table.lengths.sum())
    assert report.trained_tokens == sum(int(table.trained(i).sum()) for i in range(2))
    assert report.examples[0].startswith(f"{tmp_path}/rows.jsonl:2: unreadable (invalid JSON at column 2")
    assert f"{tmp_path}/rows.jsonl:3: empty answer" in report.examples


def test_batches_and_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.data.tokenize._BATCH", 3)
    done: list[int] = []
    table = run(tmp_path, *[pair("q", f"answer {n}") for n in range(8)], progress=done.append)
    assert done == [3, 6, 8]
    assert answers(table) == [f"answer {n}<|im_end|>" for n in range(8)]


def test_long_rows_are_cut_or_dropped_or_refused(tmp_path: Path) -> None:
    lines = [pair("q", "x" * 300), pair("q", "short"), pair("q" * 300, "cut off before the answer")]
    whole = run(tmp_path, *lines)
    cut = run(tmp_path, *lines, sequence_length=100)
    assert cut.lengths.tolist() == [100, whole.lengths[1]]
    assert cut.ids(0).tolist() == whole.ids(0)[:100].tolist()
    assert cut.trained(0).tolist() == whole.trained(0)[:100].tolist()
    assert cut.report.truncated == 1
    assert cut.report.dropped == {"nothing to train on": 1}
    assert any(": truncated (" in line and "cut to 100" in line for line in cut.report.examples)
    dropped = run(tmp_path, *lines, sequence_length=100, overlong="drop")
    assert answers(dropped) == ["short<|im_end|>"]
    assert dropped.report.dropped == {"too long": 2}
    exact = run(tmp_path, lines[1], sequence_length=int(whole.lengths[1]), overlong="error")
    assert (len(exact), exact.report.truncated) == (1, 0)
    with pytest.raises(DataError) as caught:
        run(tmp_path, *lines, sequence_length=100, overlong="error")
    assert "2 of the 3 rows" in caught.value.message
    assert "rows.jsonl:1: too long" in caught.value.message
    assert "data.overlong" in (caught.value.hint or "")


def test_malformed_rows_are_refused_where_asked(tmp_path: Path) -> None:
    lines = [pair("a", "one"), pair("b", ""), "nonsense"]
    with pytest.raises(DataError) as caught:
        run(tmp_path, *lines, malformed="error")
    assert "2 of the 3 rows" in caught.value.message
    assert "empty answer 1, unreadable 1" in caught.value.message
    assert "rows.jsonl:2: empty answer" in caught.value.message
    assert "rows.jsonl:3: unreadable" in caught.value.message
    assert "data.malformed" in (caught.value.hint or "")
    long = [pair("a", "one"), pair("a", "x" * 300)]
    assert len(run(tmp_path, *long, sequence_length=50, malformed="error", overlong="drop")) == 1


def test_no_row_left_lists_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No row of .* can train: empty answer 2") as caught:
        run(tmp_path, pair("a", ""), pair("b", " "))
    assert "rows.jsonl:1: empty answer" in caught.value.message
    assert not list((tmp_path / "cache").iterdir()), "a refusal leaves nothing in the cache"
    with pytest.raises(DataError, match=r"No row of .* can be read; .*rows.jsonl:1: invalid JSON"):
        run(tmp_path, "nonsense", "more")


def test_the_format_is_found_behind_unreadable_rows_and_with_sparse_columns(tmp_path: Path) -> None:
    assert len(run(tmp_path, *["nonsense"] * 70, pair("a", "one"))) == 1
    first, second = {"instruction": "i", "output": "o"}, {"instruction": "i", "extra": "e", "output": "o"}
    table = run(tmp_path, json.dumps(first), json.dumps(second), columns={"input": "extra"})
    assert table.report.format == "alpaca"
    assert len(table) == 2


def test_plain_text_trains_from_its_second_token(tmp_path: Path) -> None:
    table = run(tmp_path, json.dumps({"text": "hello"}), json.dumps({"text": ""}))
    assert table.trained(0).tolist() == [False] + [True] * (len(table.ids(0)) - 1)
    assert table.ids(0)[-1] == RENDERER.tokenizer.eos_token_id
    assert table.report.dropped == {"empty text": 1}


def test_notes_count_the_rows_they_concern(tmp_path: Path) -> None:
    tools = [{"name": "f"}]
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with_tools = json.dumps({"messages": talk, "tools": tools})
    table = run(tmp_path, with_tools, json.dumps({"messages": talk}), with_tools)
    assert [note for note in table.report.notes if "ignores tools" in note and "(2 rows)" in note]


def test_examples_are_few_and_of_every_reason(tmp_path: Path) -> None:
    table = run(tmp_path, pair("q", "a"), *[pair("q", "")] * 50, "nonsense")
    assert len(table.report.examples) == 6
    assert table.report.dropped == {"empty answer": 50, "unreadable": 1}


# ---- the cache --------------------------------------------------------------------------------------------


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").iterdir())


def test_a_second_run_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, pair("a", "one"))
    monkeypatch.setattr("tunesmith.data.render.Renderer.encode", None)
    second = run(tmp_path, pair("a", "one"))
    assert second.ids(0).tolist() == first.ids(0).tolist()
    assert second.report == first.report
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_length": 100},
        {"overlong": "drop"},
        {"malformed": "error"},
        {"format": "pair"},
        {"columns": {"prompt": "response", "response": "prompt"}},
        {"split": "[:1]"},
        {"renderer": Renderer(tiny_tokenizer(), CHATML, "all")},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_setting_has_an_entry_of_its_own(tmp_path: Path, options: dict[str, Any]) -> None:
    lines = [pair("a", "one"), pair("b", "two")]
    run(tmp_path, *lines)
    run(tmp_path, *lines, **options)
    assert len(entries(tmp_path)) == 2


def test_changed_bytes_have_an_entry_of_their_own(tmp_path: Path) -> None:
    run(tmp_path, pair("a", "one"))
    assert answers(run(tmp_path, pair("a", "two"))) == ["two<|im_end|>"]
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("name", ["ids.npy", "trained.npy", "starts.npy", "report.json"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, name: str) -> None:
    first = run(tmp_path, pair("a", "one"))
    path = entries(tmp_path)[0] / name
    path.write_bytes(path.read_bytes()[:-3])
    again = run(tmp_path, pair("a", "one"))
    assert answers(again) == ["one<|im_end|>"]
    assert again.report == first.report
    assert len(entries(tmp_path)) == 1


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path / "tokens"
    monkeypatch.delenv("TUNESMITH_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "tunesmith" / "tokens"


# ---- whatever comes in ------------------------------------------------------------------------------------

text = st.text(st.characters(), max_size=12) | st.just("\ud800")
value = st.none() | st.booleans() | st.floats(allow_nan=True) | text | st.lists(text, max_size=2)
row = st.fixed_dictionaries({}, optional={"prompt": value, "response": value, "system": value})
line = row.map(json.dumps) | st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=12)


@settings(max_examples=40, deadline=None)
@given(lines=st.lists(line, max_size=6), length=st.integers(40, 90))
def test_rows_in_are_rows_kept_and_rows_dropped(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], length: int
) -> None:
    table = run(tmp_path_factory.mktemp("any"), pair("q", "a" * 30), *lines, sequence_length=length)
    report = table.report
    assert report.rows_in == report.rows_kept + sum(report.dropped.values())
    assert len(table) == report.rows_kept
    assert table.lengths.max(initial=0) <= length
    assert all(table.trained(i).any() for i in range(len(table)))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_a_real_file_from_end_to_end(tmp_path: Path) -> None:
    table = tokenize_source(
        open_source(SHARED / "gsm8k" / "train.jsonl", split="train[:50]"),
        columns={"prompt": "question", "response": "answer"},
        renderer=RENDERER,
        sequence_length=4096,
        cache_dir=tmp_path,
    )
    with (SHARED / "gsm8k" / "train.jsonl").open(encoding="utf-8") as lines:
        expected = [json.loads(next(lines))["answer"] + "<|im_end|>" for _ in range(50)]
    assert answers(table) == expected
    assert table.report.dropped == {}
    assert table.where(49).endswith("train.jsonl:50")
    assert np.all(table.lengths > 0)
