"""From the tokens of a row to documents that fit: whole, cut, split into several, or joined with its neighbours.

    truncate   conversation  [############|xxxx]      what is behind the limit is lost, and counted
    split      long text     [############] [#####]   the second piece begins with the last `overlap` tokens of the
                                                      first, as context; they do not train twice
    joined     short texts   [##|####|#####] [##|##   texts one behind the other, each with its EOS

A piece is a document of its own and sees nothing before it. So the first token of a later piece could not be
predicted; with an overlap of one token or more it is, and each token of a text trains exactly once.

Rejected: splitting conversations, too. An answer without its question is not what a server would ever show.
`T` is tokens of a row or piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.reading import RowProblem
from tunesmith.data.rendered import Encoded

Overlong = Literal["drop", "truncate", "error", "split"]

UNTRAINABLE, TOO_LONG, TRUNCATED = "nothing to train on", "too long", "truncated"
"""Under what rows are counted."""


class Piece(NamedTuple):
    """Tokens of a document, int32 `[T]`, and which of them are targets, bool `[T]`."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


@dataclass(frozen=True)
class Fit:
    """How rows become documents of a bounded length.

    Attributes:
        sequence_length: most tokens of a document.
        overlong: what becomes of longer rows; `split` holds for plain text and truncates other rows.
        overlap: tokens that a piece repeats of the one before it.
        join_texts: plain texts are joined one behind the other, and cut.
    """

    sequence_length: int
    overlong: Overlong = "truncate"
    overlap: int = 1
    join_texts: bool = False

    def documents(self, tokens: Encoded, *, plain: bool) -> list[Piece] | RowProblem:
        """The documents of a row, or why it is dropped. Not for texts that are joined.

        Args:
            tokens: those of the row.
            plain: it is plain text.
        """
        if tokens.problem is not None:
            return tokens.problem
        length, limit = len(tokens.ids), self.sequence_length
        if length > limit and plain and self.overlong == "split":
            return [piece for piece in split(tokens, limit, self.overlap) if piece.trained.any()]
        if length > limit and self.overlong in ("drop", "error"):
            return RowProblem(TOO_LONG, f"{length} tokens, the longest row may have {limit}")
        piece = Piece(tokens.ids[:limit], tokens.trained[:limit])
        if not np.count_nonzero(piece.trained):  # a fifth of the time of `any`
            return RowProblem(UNTRAINABLE, f"within {limit} tokens" if length > limit else "")
        return [piece]

    def truncates(self, tokens: Encoded, *, plain: bool) -> bool:
        """Whether a row that is kept loses tokens."""
        apart = plain and (self.overlong == "split" or self.join_texts)
        return len(tokens.ids) > self.sequence_length and not apart


def split(tokens: Encoded, limit: int, overlap: int) -> Iterator[Piece]:
    """Pieces of at most `limit` tokens, each beginning with the last `overlap` ones of the piece before it.

    A repeated token is context, and so is the first token of every piece: nothing predicts it.
    """
    assert 0 <= overlap < limit, "pieces would not move on"
    start = 0
    while True:
        end = min(start + limit, len(tokens.ids))
        trained_T = tokens.trained[start:end].copy()
        trained_T[: max(1, overlap) if start else 1] = False
        yield Piece(tokens.ids[start:end], trained_T)
        if end == len(tokens.ids):
            return
        start = end - overlap


class Joiner:
    """Joins texts one behind the other into documents of exactly `limit` tokens, and a last one that is shorter.

    Tokens of different texts see each other within a document. The first token of a text trains, as what follows
    the end of another text; only the first one of a document does not.

    Args:
        limit: tokens of a document.
        overlap: tokens that a document repeats of the one before it.
    """

    def __init__(self, limit: int, overlap: int) -> None:
        assert 0 <= overlap < limit, "documents would not move on"
        self._limit, self._overlap = limit, overlap
        self._ids: list[NDArray[np.int32]] = []
        self._room = limit
        self._repeated = 0
        self._begins: tuple[int, str] | None = None

    def add(self, ids: NDArray[np.int32], row: int, where: str) -> Iterator[tuple[Piece, int, str]]:
        """Take a text; gives the documents that it completes, each with the row in which its own tokens begin."""
        done = 0
        while done < len(ids):
            if self._begins is None:
                self._begins = row, where
            taken = ids[done : done + self._room]
            self._ids.append(taken)
            done, self._room = done + len(taken), self._room - len(taken)
            if not self._room:
                yield from self._complete()

    def _complete(self) -> Iterator[tuple[Piece, int, str]]:
        assert self._begins is not None, "a document without a text"
        ids_T = np.concatenate(self._ids)
        trained_T = np.ones(len(ids_T), dtype=np.bool_)
        trained_T[: max(1, self._repeated)] = False
        begins, self._begins = self._begins, None
        self._ids = [ids_T[len(ids_T) - self._overlap :]]
        self._repeated, self._room = self._overlap, self._limit - self._overlap
        if trained_T.any():
            yield Piece(ids_T, trained_T), *begins

    def finish(self) -> Iterator[tuple[Piece, int, str]]:
        """The last document, where texts wait for one; the next text begins anew."""
        if self._begins is not None:
            yield from self._complete()
        self._ids, self._room, self._repeated = [], self._limit, 0
