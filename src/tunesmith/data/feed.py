"""`Feed`: what the training loop takes its steps from, a table of tokens on disk or a stream.

A step brings its documents, its rows and the position behind it. A position is plain values; a feed asked for the
steps from a position gives exactly those that would have followed it. `TableFeed` plans an epoch once: the count of
steps, the plan that is printed and the loop share it. `stream.StreamFeed` never has more than a buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.batches import BatchPlan, Corpus, Row, rows_of_epoch, steps_of_epoch


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the data: the epoch, and the steps of it that are complete; a stream has its own beside them."""

    epoch: int = 0
    step_in_epoch: int = 0
    stream: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """The data of one optimizer step.

    Attributes:
        corpus: holds the documents of the rows, and more besides where they come from a table.
        rows: the rows, by the numbers of their documents in `corpus`.
        position: where the data stands when the step is done.
        epochs: passes over the data that are then complete.
    """

    corpus: Corpus
    rows: list[Row]
    position: Position
    epochs: float


class Feed(Protocol):
    """Gives the steps of a run in order; a function of its arguments and the position."""

    def steps(self, position: Position) -> Iterator[Step]:
        """The steps from a position on, without end."""
        ...


class TableFeed:
    """Steps over documents that lie in tables.

    Args:
        corpus: the documents.
        train_N: int64, those that train, ascending.
        plan: how they become steps.
    """

    def __init__(self, corpus: Corpus, train_N: NDArray[np.int64], plan: BatchPlan) -> None:
        self._corpus, self._train_N, self._plan = corpus, train_N, plan
        self._planned: tuple[int, list[Row], list[list[Row]]] | None = None

    def epoch(self, number: int) -> tuple[list[Row], list[list[Row]]]:
        """The rows of an epoch and its steps; the epoch asked for last is kept."""
        if self._planned is None or self._planned[0] != number:
            rows = rows_of_epoch(self._corpus, self._train_N, self._plan, number)
            self._planned = number, rows, steps_of_epoch(self._corpus, rows, self._plan)
        return self._planned[1:]

    def count_steps(self, epochs: float) -> int:
        """Optimizer steps of `epochs` passes; a fraction of a pass is rounded up to a step."""
        total = 0
        # from the last epoch to the first, which is then the one that is kept
        for number in reversed(range(math.ceil(epochs))):
            steps = len(self.epoch(0 if self._alike() else number)[1])
            total += math.ceil(steps * min(1.0, epochs - number) - 1e-9)
        return total

    def count_steps_of_tokens(self, tokens: int) -> int:
        """Optimizer steps until so many tokens have gone through the model: the last one reaches or passes it."""
        number = total = 0
        if self._alike():  # then all passes but the last one need no look
            steps = self.epoch(0)[1]
            whole = sum(map(self._tokens_of, steps))
            number = (tokens - 1) // whole
            total, tokens = number * len(steps), tokens - number * whole
        while True:
            for step in self.epoch(number)[1]:
                total, tokens = total + 1, tokens - self._tokens_of(step)
                if tokens <= 0:
                    return total
            number += 1

    def _tokens_of(self, step: list[Row]) -> int:
        return int(self._corpus.lengths[[document for row in step for document in row]].sum())

    def _alike(self) -> bool:
        """Whether all epochs have as many steps: they hold the same documents, and rows are what is counted.

        The number of rows that best fit makes of documents depends on their lengths and not on their order.
        """
        whole = all(float(weight).is_integer() for weight in self._corpus.weights)
        return self._plan.rows_per_step is not None and whole and not self._plan.mix.interleaved

    def steps(self, position: Position) -> Iterator[Step]:
        """The steps from a position on, epoch after epoch."""
        epoch, done = position.epoch, position.step_in_epoch
        while True:
            steps = self.epoch(epoch)[1]
            for index in range(done, len(steps)):
                behind = Position(epoch, index + 1)
                yield Step(self._corpus, steps[index], behind, epoch + (index + 1) / len(steps))
            epoch, done = epoch + 1, 0
