"""What a run writes down about itself for its report, and the report when it is over.

A run must not fail because of a report: whatever goes wrong here is a warning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tunesmith.contracts.event_log import EVENTS
from tunesmith.contracts.files import replace_text
from tunesmith.export.run_files import ANSWERS, DATA, MASKS
from tunesmith.export.run_report import write_report

if TYPE_CHECKING:
    from tunesmith.config.assemble import Run
    from tunesmith.data.batches import Documents

REPORT_COLUMN = len("held-out loss")
"""Characters of the first column, in which the row of the report stands below those of the result."""
_OF_SOURCE, _DOCUMENTS, _TOKENS = 3, 6, 400
"""Documents of a source and of all sources whose masks are kept, and tokens of each."""


@contextmanager
def _no_failure(console: Console, what: str) -> Iterator[None]:
    """Say what went wrong and go on."""
    try:
        yield
    except Exception as error:
        message = f"warning: {what} could not be written: {type(error).__name__}: {error}"
        console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def reported(folder: Path, console: Console) -> Iterator[None]:
    """Write the report of a run when the block is over, however it ends, if anything was trained in it.

    Args:
        folder: the run directory.
        console: where its place is said.
    """
    before = _stamp(folder)
    try:
        yield
    finally:
        if _stamp(folder) != before:
            with _no_failure(console, "the report"):
                path = write_report(folder, running=False)
                console.print(
                    f"{'report':<{REPORT_COLUMN}}  {path}", markup=False, highlight=False, soft_wrap=True
                )


def _stamp(folder: Path) -> tuple[int, int] | None:
    try:
        found = (folder / EVENTS).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def record_data(folder: Path, run: Run, console: Console) -> None:
    """Before a run: write `data.json`, what became of the rows of each source, and `masks.json`, some documents.

    Of a stream the first rows are read once more for their masks. Answers of an earlier run are removed.
    """
    record_counts(folder, run, console)
    with _no_failure(console, MASKS):
        (folder / ANSWERS).unlink(missing_ok=True)
        _write(folder / MASKS, {"documents": _masks(run)})


def record_counts(folder: Path, run: Run, console: Console) -> None:
    """Write `data.json`; of a stream the counts are those of what was read so far."""
    with _no_failure(console, DATA):
        _write(folder / DATA, _data(run))


def record_answers(
    folder: Path, questions: Sequence[str], before: Sequence[str], after: Sequence[str]
) -> None:
    """Write `answers.json`: what the model answered before and after training; nothing where nothing was asked."""
    if questions:
        _write(folder / ANSWERS, {"questions": list(questions), "before": list(before), "after": list(after)})


def _write(path: Path, values: dict[str, Any]) -> None:
    replace_text(path, json.dumps(values, indent=1) + "\n")


def _data(run: Run) -> dict[str, Any]:
    training = len(run.settings.data.train)
    return {
        "sources": [
            {"name": name, "role": "train" if number < training else "held out", "report": report.to_json()}
            for number, (name, report) in enumerate(run.data.reports)
        ],
        "documents": {"train": len(run.data.train_N), "held_out": len(run.data.held_out_N)},
    }


def _masks(run: Run) -> list[dict[str, Any]]:
    """The first documents of every training source, in turn."""
    by_source = [
        [_mask(run.tokenizer, documents, index) for index in indices]
        for documents, indices in (_streamed(run) if run.settings.data.streaming else _training(run))
    ]
    return [mask for mask in chain(*zip_longest(*by_source)) if mask is not None][:_DOCUMENTS]


def _training(run: Run) -> Iterator[tuple[Documents, list[int]]]:
    """Each training source with the indices of its first documents that train."""
    corpus = run.data.corpus
    for documents_N in corpus.by_source(run.data.train_N):
        places = [corpus.locate(int(document)) for document in sorted(documents_N[:_OF_SOURCE].tolist())]
        if places:
            yield places[0][0], [index for _, index in places]


def _streamed(run: Run) -> Iterator[tuple[Documents, list[int]]]:
    from tunesmith.config.prepare_data import open_stream
    from tunesmith.data.stream import DocumentList

    for source in run.settings.data.train:
        documents = DocumentList()
        for _ in open_stream(run.settings, source, run.data.renderer).feed(documents):
            if len(documents):
                break
        yield documents, list(range(min(_OF_SOURCE, len(documents))))


def _mask(tokenizer: Any, documents: Documents, index: int) -> dict[str, Any]:
    """A document as the loop gets it: its first tokens decoded, in pieces that train or do not."""
    ids, trained = documents.ids(index), documents.trained(index)
    shown, flags = ids[:_TOKENS].tolist(), trained[:_TOKENS].tolist()
    ends = [place for place in range(1, len(shown)) if flags[place] != flags[place - 1]] + [len(shown)]
    pieces: list[tuple[bool, str]] = []
    text = ""
    for end in ends:
        # a decoder may drop the space before a first token, so a piece is what the text has grown by
        longer = tokenizer.decode(shown[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append((flags[end - 1], longer[len(text) :]))
        text = longer
    return {
        "where": documents.where(index),
        "tokens": len(ids),
        "shown": len(shown),
        "trained": int(trained.sum()),
        "pieces": pieces,
    }
