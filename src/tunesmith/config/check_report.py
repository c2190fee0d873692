"""`DataCheck`: what `tunesmith data check` found in a source, as plain values that are printed or written as JSON;
`RunCheck`: sources that belong together, and what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.cutting import UNTRAINABLE
from tunesmith.data.render import Encoded, Rendered

DUPLICATES = "exact duplicates of an earlier row"
EXAMPLES = 5
RANKS, ROWS_OF_RANK = (2, 4, 8), 8
"""Rows that are named of each finding."""


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
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{where}: {detail}" if detail else where)

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"rows": self.count, "examples": self.examples}


Findings = dict[str, Finding]


@dataclass(frozen=True)
class Shown:
    """A row to be shown with its mask.

    Attributes:
        limit: tokens of it that are in documents; what is behind them is cut off.
    """

    where: str
    rendered: Rendered
    encoded: Encoded
    limit: int


@dataclass(frozen=True)
class Marks:
    """What is kept of the rows of a source to find them again in another.

    Attributes:
        rows: int64 `[N]`, numbers of the rows in the source.
        digests: uint64 `[N]`, of the tokens of each row.
        prompts: uint64 `[N]`, of the tokens before those that train; 0 where there are none.
    """

    rows: NDArray[np.int64]
    digests: NDArray[np.uint64]
    prompts: NDArray[np.uint64]

    @classmethod
    def of(cls, rows: Sequence[int], digests: Sequence[int], prompts: Sequence[int]) -> Marks:
        """From sequences of numbers."""
        return cls(
            np.array(rows, dtype=np.int64),
            np.array(digests, dtype=np.uint64),
            np.array(prompts, dtype=np.uint64),
        )


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
        cut_answers: rows that lose tokens which would train, and `lost_tokens` how many.
        packs: rows after packing, and `efficiency` the share of their tokens that belong to documents.
        imbalance: by number of ranks, attention of the dearest over their mean in a step of `ROWS_OF_RANK` packs
            each: dealt in turn, and evened out. Without numbers of ranks whose step the packs do not fill.
        examples: rows with their masks, short ones of different looks first; none where no row trains.
        marks: of each row kept its number, a hash of its tokens and one of its prompt, for comparison.
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
    cut_answers: int = 0
    lost_tokens: int = 0
    packs: int = 0
    efficiency: float = 1.0
    imbalance: dict[int, tuple[float, float]] = field(default_factory=dict)
    examples: list[Shown] = field(default_factory=list)
    marks: Marks = field(default_factory=lambda: Marks.of([], [], []))

    @property
    def clean(self) -> bool:
        """Whether every row trains as it stands."""
        return not self.dropped and not self.changed and not self.instead

    @property
    def rows_dropped(self) -> int:
        """Rows that would not train."""
        return sum(found.count for found in self.dropped.values())

    def findings(self) -> dict[str, int]:
        """Numbers of the defects that are commonest."""

        def count(findings: Findings, name: str) -> int:
            return findings[name].count if name in findings else 0

        return {
            "exact duplicates": count(self.remarks, DUPLICATES),
            "empty answers": count(self.dropped, "empty answer") + count(self.dropped, "empty text"),
            "answers cut off": self.cut_answers,
            "rows of which nothing trains": count(self.dropped, UNTRAINABLE),
        }

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
            "findings": {name.replace(" ", "_"): count for name, count in self.findings().items()},
            "lost_tokens": self.lost_tokens,
            "dropped": {name: found.plain() for name, found in self.dropped.items()},
            "changed": {name: found.plain() for name, found in self.changed.items()},
            "remarks": {name: found.plain() for name, found in self.remarks.items()},
            "lengths": shape,
            "packing": {
                "sequence_length": self.sequence_length,
                "packs": self.packs,
                "efficiency": round(self.efficiency, 4),
                "imbalance": {
                    str(ranks): {"in_turn": round(before, 4), "balanced": round(after, 4)}
                    for ranks, (before, after) in self.imbalance.items()
                },
            },
            "example": _example(self.examples[0]) if self.examples else None,
        }


def _example(shown: Shown) -> dict[str, Any]:
    pieces = [{"trained": trained, "text": text} for trained, text in runs(shown, shown.limit)]
    return {"where": shown.where, "tokens": len(shown.encoded.ids), "pieces": pieces}


def runs(shown: Shown, limit: int) -> list[tuple[bool, str]]:
    """A row up to a number of tokens as runs of text: whether each trains, and the text."""
    pieces: list[tuple[bool, str]] = []
    offsets, trained = shown.encoded.offsets[:limit].tolist(), shown.encoded.trained[:limit].tolist()
    done = 0
    for (start, end), is_trained in zip(offsets, trained, strict=True):
        text = shown.rendered.text[max(start, done) : end]
        done = max(done, end)
        if pieces and pieces[-1][0] == is_trained:
            pieces[-1] = is_trained, pieces[-1][1] + text
        else:
            pieces.append((is_trained, text))
    return pieces


# ---------------------------------------------------------------- several sources


@dataclass
class Overlap:
    """What held-out rows have in common with training ones.

    Attributes:
        same: held-out rows that a training row equals, by their tokens.
        same_prompt: others that answer what a training row answers.
        held_out: rows that measure.
    """

    same: Finding = field(default_factory=Finding)
    same_prompt: Finding = field(default_factory=Finding)
    held_out: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "held_out_rows": self.held_out,
            "same_row": self.same.plain(),
            "same_prompt": self.same_prompt.plain(),
        }


@dataclass
class RunCheck:
    """Sources that are trained on and measured together.

    Attributes:
        title: the run file, or the path of the data.
        train: the training sources.
        held_out: sources that measure; none where rows of `train` do.
        repeated: rows of a training source that an earlier one has, too.
        overlap: of what measures with what trains; None where nothing measures, or it cannot be told.
        refuses: a setting under which the run ends at rows that would be dropped; empty where there is none.
    """

    title: str
    train: list[DataCheck]
    held_out: list[DataCheck] = field(default_factory=list)
    repeated: Finding = field(default_factory=Finding)
    overlap: Overlap | None = None
    refuses: str = ""

    @property
    def checks(self) -> list[DataCheck]:
        """All sources, training ones first."""
        return [*self.train, *self.held_out]

    @property
    def clean(self) -> bool:
        """Whether every row trains, or measures, as it stands."""
        return all(check.clean for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; of one source alone they are its own."""
        if len(self.checks) == 1 and self.overlap is None and self.title == self.train[0].path:
            return self.train[0].to_json()
        return {
            "path": self.title,
            "clean": self.clean,
            "train": [check.to_json() for check in self.train],
            "held_out": [check.to_json() for check in self.held_out],
            "repeated_in_another_source": self.repeated.plain(),
            "overlap": self.overlap.to_json() if self.overlap is not None else None,
        }
