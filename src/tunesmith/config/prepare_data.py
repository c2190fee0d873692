"""Wires the data layer: sources, renderer, tokenised tables, the corpus and what is held out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.contracts.errors import DataError
from tunesmith.data.batches import BatchPlan, Corpus
from tunesmith.data.render import Renderer, resolve_template
from tunesmith.data.sources import Source, open_source
from tunesmith.data.table import DataReport, TokenTable
from tunesmith.data.tokenize import default_cache_dir, tokenize_source
from tunesmith.settings.data import HeldOutSettings, SourceSettings
from tunesmith.settings.run import RunSettings, tokens_of_global_batch

Progress = Callable[[str, int], None]
"""Called with a source's name and the number of its rows that are prepared."""


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Everything that training needs to know about the data.

    Attributes:
        renderer: renders conversations and masks them.
        corpus: documents of all sources, training ones first.
        train_N: documents that train.
        held_out_N: documents that measure.
        reports: (source name, what became of its rows), training sources first.
        fingerprint: changes with any byte of the data, the template or a setting that decides the tokens.
    """

    renderer: Renderer
    corpus: Corpus
    train_N: NDArray[np.int64]
    held_out_N: NDArray[np.int64]
    reports: tuple[tuple[str, DataReport], ...]
    fingerprint: str


def make_renderer(settings: RunSettings, tokenizer: Any) -> Renderer:
    """The renderer for the run's template and mask."""
    template = resolve_template(settings.data.template, tokenizer)
    return Renderer(tokenizer, template, settings.data.train_on)


def open_settings_source(source: SourceSettings) -> Source:
    """Open one source of the run file."""
    return open_source(source.path, split=source.split, name=source.name, revision=source.revision)


def _tokenize(
    settings: RunSettings, source: SourceSettings, renderer: Renderer, progress: Progress | None
) -> TokenTable:
    cache = Path(settings.data.cache_dir).expanduser() if settings.data.cache_dir else default_cache_dir()
    return tokenize_source(
        open_settings_source(source),
        format=source.format,
        columns=dict(source.columns),
        renderer=renderer,
        sequence_length=settings.train.sequence_length,
        overlong=settings.data.overlong,
        malformed=settings.data.malformed,
        cache_dir=cache,
        progress=None if progress is None else lambda rows: progress(source.path, rows),
    )


def prepare_data(settings: RunSettings, tokenizer: Any, progress: Progress | None = None) -> PreparedData:
    """Tokenise every source (or take it from the cache) and hold out what measures.

    Raises:
        DataError: a source cannot be read, or no row is left to train on.
    """
    renderer = make_renderer(settings, tokenizer)
    held: Sequence[SourceSettings] = (
        () if isinstance(settings.data.eval, HeldOutSettings) else settings.data.eval
    )
    sources = [*settings.data.train, *held]
    tables = [_tokenize(settings, source, renderer, progress) for source in sources]
    corpus = Corpus(tables, [source.weight for source in sources])
    in_training = sum(len(table) for table in tables[: len(settings.data.train)])
    if isinstance(settings.data.eval, HeldOutSettings):
        train_N, held_out_N = corpus.hold_out(
            settings.data.eval.fraction, settings.data.eval.max_rows, settings.train.seed
        )
    else:
        train_N, held_out_N = np.arange(in_training), np.arange(in_training, len(corpus))
    if not len(train_N):
        raise DataError("No row is left to train on.", hint="Lower data.eval.fraction or add data.")
    names = [source.path for source in sources]
    reports = tuple(zip(names, (table.report for table in tables), strict=True))
    # a table's folder is named by the hash of everything that it was made from
    keys = "/".join(table.folder.name for table in tables)
    return PreparedData(renderer, corpus, train_N, held_out_N, reports, keys)


def batch_plan(settings: RunSettings) -> BatchPlan:
    """How documents become rows and steps, from the run's settings."""
    tokens = tokens_of_global_batch(settings.train.global_batch)
    return BatchPlan(
        sequence_length=settings.train.sequence_length,
        packing=settings.train.packing,
        rows_per_step=settings.train.global_batch if isinstance(settings.train.global_batch, int) else None,
        tokens_per_step=tokens,
        seed=settings.train.seed,
    )
