"""`DataCheck`: what `tunesmith data check` found, as plain values that are printed or written as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.render import Encoded, Rendered

_EXAMPLES = 5


@dataclass
class Finding:
    """Rows with one thing in common.

    Attributes:
        count: how many.
        examples: `place` or `place: detail` of the first ones.
    """

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, where: str, detail: str = "") -> None:
        """Count a row."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{where}: {detail}" if detail else where)


Findings = dict[str, Finding]


@dataclass(frozen=True)
class Shown:
    """A row to be shown with its mask."""

    where: str
    rendered: Rendered
    encoded: Encoded


@dataclass
class DataCheck:
    """What became of every row. Always `rows_in == rows_kept + sum of the counts in dropped`.

    Attributes:
        path: what was checked.
        tokenizer: the name of the model whose tokenizer was used.
        format: name of the format.
        summary: the format in one sentence.
        kind: what its rows are.
        instead: what can be done with rows of a kind that no objective trains on yet; empty for the others.
        counts: what is counted of rows of this kind, such as pairs.
        columns: columns of the first rows that the format reads, and `ignored` those that it does not.
        template: what `--template` said.
        sequence_length: most tokens of a row.
        partial: only the first rows were read.
        rows_in: rows read.
        rows_kept: rows that would train; `rows_changed` those that would not train as they stand.
        tokens: tokens of the rows kept, within the sequence length; `trained_tokens` those that are targets.
        dropped: rows that would not train, by reason.
        changed: rows that would train on something else than the file says, by what was changed.
        remarks: what is worth knowing and changes no row.
        lengths: tokens of each document of the rows kept, before it is cut; a pair has two documents.
        packs: rows after packing, and `efficiency` the share of their tokens that belong to documents.
        shown: a row with its mask; None where no row trains.
    """

    path: str
    tokenizer: str
    template: str
    sequence_length: int
    format: str = ""
    summary: str = ""
    kind: str = ""
    instead: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    partial: bool = False
    rows_in: int = 0
    rows_kept: int = 0
    rows_changed: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped: Findings = field(default_factory=dict)
    changed: Findings = field(default_factory=dict)
    remarks: Findings = field(default_factory=dict)
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    packs: int = 0
    efficiency: float = 1.0
    shown: Shown | None = None

    @property
    def clean(self) -> bool:
        """Whether every row trains as it stands."""
        return not self.dropped and not self.changed and not self.instead

    def histogram(self) -> list[tuple[int, int, int]]:
        """(shortest, longest, rows) of each doubling of the length, from the shortest row to the longest."""
        if not self.lengths.size:
            return []
        doublings, counts = np.unique(np.frexp(self.lengths.astype(np.float64))[1], return_counts=True)
        found = dict(zip(doublings.tolist(), counts.tolist(), strict=True))
        span = range(min(found), max(found) + 1)
        return [(1 << (power - 1), (1 << power) - 1, found.get(power, 0)) for power in span]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""

        def plain(findings: Findings) -> dict[str, Any]:
            return {
                name: {"rows": found.count, "examples": found.examples} for name, found in findings.items()
            }

        lengths = self.lengths
        shape = (
            {
                "shortest": int(lengths.min()),
                "median": int(np.median(lengths)),
                "longest": int(lengths.max()),
                "histogram": [
                    {"from": low, "to": high, "rows": rows} for low, high, rows in self.histogram()
                ],
            }
            if lengths.size
            else None
        )
        return {
            "path": self.path,
            "clean": self.clean,
            "format": {
                "name": self.format,
                "kind": self.kind,
                "columns": self.columns,
                "ignored": self.ignored,
            },
            "counts": self.counts,
            "tokenizer": self.tokenizer,
            "template": self.template,
            "rows": {
                "in": self.rows_in,
                "kept": self.rows_kept,
                "changed": self.rows_changed,
                "only_the_first": self.partial,
            },
            "tokens": {"total": self.tokens, "trained": self.trained_tokens},
            "dropped": plain(self.dropped),
            "changed": plain(self.changed),
            "remarks": plain(self.remarks),
            "lengths": shape,
            "packing": {
                "sequence_length": self.sequence_length,
                "packs": self.packs,
                "efficiency": round(self.efficiency, 4),
            },
            "example": _pieces(self.shown, self.sequence_length),
        }


def _pieces(shown: Shown | None, limit: int) -> dict[str, Any] | None:
    """The shown row as runs of text that train or do not."""
    if shown is None:
        return None
    pieces: list[dict[str, Any]] = []
    offsets, trained = shown.encoded.offsets[:limit].tolist(), shown.encoded.trained[:limit].tolist()
    done = 0
    for (start, end), is_trained in zip(offsets, trained, strict=True):
        text = shown.rendered.text[max(start, done) : end]
        done = max(done, end)
        if pieces and pieces[-1]["trained"] == is_trained:
            pieces[-1]["text"] += text
        else:
            pieces.append({"trained": is_trained, "text": text})
    return {"where": shown.where, "tokens": len(shown.encoded.ids), "pieces": pieces}
