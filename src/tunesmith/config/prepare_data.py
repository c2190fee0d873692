"""Wires the data layer: sources, renderer, tokenised tables or streams, what is held out, and the feed of steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tunesmith.contracts.errors import DataError
from tunesmith.data.batches import BatchPlan, Corpus
from tunesmith.data.cache import content_key
from tunesmith.data.feed import TableFeed
from tunesmith.data.formats import Reading
from tunesmith.data.mixing import Mix
from tunesmith.data.remote import Tell
from tunesmith.data.render import Renderer, resolve_template
from tunesmith.data.sources import Source, open_source
from tunesmith.data.stream import StreamFeed
from tunesmith.data.table import DataReport, TokenTable
from tunesmith.data.tokenize import SourceStream, default_cache_dir, tokenize_source
from tunesmith.models.loader import load_tokenizer
from tunesmith.models.vocabulary import extend_tokenizer
from tunesmith.settings.data import HeldOutSettings, SourceSettings
from tunesmith.settings.quantities import tokens_of
from tunesmith.settings.run import RunSettings
from tunesmith.settings.urls import shown

Progress = Callable[[str, int], None]
"""Called with a source's name and the number of its rows that are prepared."""


class Opened(NamedTuple):
    """A source of the run file, and its rows: what it downloaded or built is kept for who reads them again."""

    settings: SourceSettings
    source: Source


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Everything that training needs to know about the data.

    Attributes:
        renderer: renders conversations and masks them.
        corpus: documents of all sources in tables, training ones first.
        opened: those sources, as the run file has them and as they were opened, in the same order.
        train_N: documents that train; none where they are streamed.
        held_out_N: documents that measure.
        feed: the steps of training.
        reports: (source name, what became of its rows), training sources first. That of a stream grows as it is
            read.
        fingerprint: changes with any byte of the data, the template or a setting that decides the tokens; of a
            stream with the sizes of its files and with samples of them.
    """

    renderer: Renderer
    corpus: Corpus
    opened: tuple[Opened, ...]
    train_N: NDArray[np.int64]
    held_out_N: NDArray[np.int64]
    feed: TableFeed | StreamFeed
    reports: tuple[tuple[str, DataReport], ...]
    fingerprint: str

    @property
    def documents_are_rows(self) -> bool:
        """Whether each row of the tables is one document: none was split or joined."""
        return len(self.corpus) == sum(
            table.report.rows_kept for table in self.corpus.sources if isinstance(table, TokenTable)
        )


def tokenizer_of(settings: RunSettings) -> Any:
    """The tokenizer of the run's model, with the tokens that the run adds.

    Raises:
        UserError: it cannot be loaded.
    """
    model = settings.model
    tokenizer = load_tokenizer(model.name, revision=model.revision, trust_remote_code=model.trust_remote_code)
    extend_tokenizer(tokenizer, settings.adapter.new_tokens)
    return tokenizer


def make_renderer(settings: RunSettings, tokenizer: Any) -> Renderer:
    """The renderer for the run's template and mask."""
    template = resolve_template(settings.data.template, tokenizer)
    data = settings.data
    return Renderer(
        tokenizer,
        template,
        data.train_on,
        end_of_turn=data.end_of_turn,
        prefix_mismatch=data.prefix_mismatch,
        allow_control_tokens=data.allow_control_tokens,
        date=data.date,
    )


def open_settings_source(
    source: SourceSettings, *, streaming: bool = False, tell: Tell | None = None
) -> Source:
    """Open one source of the run file; `tell` gets lines about downloads from addresses."""
    return open_source(
        source.path,
        split=source.split,
        name=source.name,
        revision=source.revision,
        streaming=streaming,
        tell=tell,
    )


def reading_of(source: SourceSettings) -> Reading:
    """How the rows of a source of the run file are read beyond their columns."""
    return Reading(
        role_key=source.role_key,
        content_key=source.content_key,
        train_key=source.train_key,
        roles=dict(source.roles),
        train_roles=tuple(source.train_roles),
        last_answer_only=source.last_answer_only,
        reasoning=source.reasoning,
        tool_calls=source.tool_calls,
        template=dict(source.template),
    )


def names_of(sources: Sequence[SourceSettings]) -> list[str]:
    """What reports and losses call sources: their paths, and where a path is there twice what tells them apart.

    Addresses are without what opens them.
    """
    paths = Counter(shown(source.path) for source in sources)
    names: list[str] = []
    for source in sources:
        parts = [part for part in (source.name, source.split, source.revision) if part]
        path = shown(source.path)
        name = f"{path} ({', '.join(parts)})" if paths[path] > 1 and parts else path
        same = names.count(name)
        names.append(f"{name} #{same + 1}" if same else name)
    return names


def _row_options(settings: RunSettings, source: SourceSettings, renderer: Renderer) -> dict[str, Any]:
    """What decides the tokens of a row, for a table and a stream alike."""
    return {
        "format": source.format,
        "columns": dict(source.columns),
        "reading": reading_of(source),
        "renderer": renderer,
        "sequence_length": settings.train.sequence_length,
        "overlong": settings.data.overlong,
        "overlap": settings.data.overlap,
        "join_texts": settings.data.join_texts,
        "malformed": settings.data.malformed,
    }


def open_stream(
    settings: RunSettings, source: SourceSettings, renderer: Renderer, tell: Tell | None = None
) -> SourceStream:
    """Open one source of the run file as a stream of documents."""
    opened = open_settings_source(source, streaming=True, tell=tell)
    return SourceStream(opened, **_row_options(settings, source, renderer))


def _open(sources: Sequence[SourceSettings], tell: Tell | None) -> tuple[Opened, ...]:
    return tuple(Opened(source, open_settings_source(source, tell=tell)) for source in sources)


def _tokenize(
    settings: RunSettings, opened: Opened, renderer: Renderer, progress: Progress | None
) -> TokenTable:
    source = opened.settings
    cache = Path(settings.data.cache_dir).expanduser() if settings.data.cache_dir else default_cache_dir()
    return tokenize_source(
        opened.source,
        **_row_options(settings, source, renderer),
        cache_dir=cache,
        workers=None if settings.data.workers == "auto" else settings.data.workers,
        progress=None if progress is None else lambda rows: progress(shown(source.path), rows),
    )


def prepare_data(
    settings: RunSettings, tokenizer: Any, progress: Progress | None = None, tell: Tell | None = None
) -> PreparedData:
    """Tokenise every source (or take it from the cache) and hold out what measures.

    Args:
        progress: called after every batch of rows.
        tell: gets lines about downloads from addresses.

    Raises:
        DataError: a source cannot be read, or no row is left to train on.
    """
    renderer = make_renderer(settings, tokenizer)
    held: Sequence[SourceSettings] = (
        () if isinstance(settings.data.eval, HeldOutSettings) else settings.data.eval
    )
    if settings.data.streaming:
        return _stream(settings, renderer, held, progress, tell)
    sources = [*settings.data.train, *held]
    opened = _open(sources, tell)
    tables = [_tokenize(settings, each, renderer, progress) for each in opened]
    names = [*names_of(settings.data.train), *names_of(held)]
    corpus = Corpus(tables, [source.weight for source in sources], names)
    in_training = sum(len(table) for table in tables[: len(settings.data.train)])
    if isinstance(settings.data.eval, HeldOutSettings):
        train_N, held_out_N = corpus.hold_out(
            settings.data.eval.fraction, settings.data.eval.max_rows, settings.train.seed
        )
    else:
        train_N, held_out_N = np.arange(in_training), np.arange(in_training, len(corpus))
    if not len(train_N):
        raise DataError("No row is left to train on.", hint="Lower data.eval.fraction or add data.")
    plan = batch_plan(settings)
    _check_groups(corpus, train_N, plan)
    reports = tuple(zip(names, (table.report for table in tables), strict=True))
    feed = TableFeed(corpus, train_N, plan)
    return PreparedData(renderer, corpus, opened, train_N, held_out_N, feed, reports, _fingerprint(tables))


def _fingerprint(tables: Sequence[TokenTable]) -> str:
    # a table's folder is named by the hash of everything that it was made from
    return "/".join(table.folder.name for table in tables)


def _check_groups(corpus: Corpus, train_N: NDArray[np.int64], plan: BatchPlan) -> None:
    """Refuse documents that belong together and do not fit into one pack.

    Raises:
        DataError: with the place of the first of them.
    """
    firsts = corpus.firsts(train_N)
    lengths = corpus.group_lengths(firsts)
    too_long = np.flatnonzero(lengths > plan.sequence_length)
    if plan.packing and len(too_long):
        first = int(too_long[0])
        raise DataError(
            f"The documents of {corpus.where(int(firsts[first]))} have {lengths[first]} tokens together, which is "
            f"longer than a pack; so are those of {len(too_long) - 1} other rows.",
            hint="Raise train.sequence_length until both fit, or set train.packing: false.",
        )


def _stream(
    settings: RunSettings,
    renderer: Renderer,
    held: Sequence[SourceSettings],
    progress: Progress | None,
    tell: Tell | None,
) -> PreparedData:
    """The training sources as streams, those that are held out as tables."""
    streams = [open_stream(settings, source, renderer, tell) for source in settings.data.train]
    weights = [source.weight for source in settings.data.train]
    feed = StreamFeed(streams, weights, batch_plan(settings), settings.data.buffer_tokens)
    opened = _open(held, tell)
    tables = [_tokenize(settings, each, renderer, progress) for each in opened]
    names = [*names_of(settings.data.train), *names_of(held)]
    corpus = Corpus(tables, names=names[len(streams) :])
    found = [*(stream.report for stream in streams), *(table.report for table in tables)]
    reports = list(zip(names, found, strict=True))
    key = content_key({"stream": feed.fingerprint(), "held out": _fingerprint(tables)})
    none, everything = np.empty(0, dtype=np.int64), np.arange(len(corpus))
    return PreparedData(renderer, corpus, opened, none, everything, feed, tuple(reports), key)


def batch_plan(settings: RunSettings) -> BatchPlan:
    """How documents become rows and steps, from the run's settings."""
    tokens = tokens_of(settings.train.global_batch)
    return BatchPlan(
        sequence_length=settings.train.sequence_length,
        packing=settings.train.packing,
        rows_per_step=settings.train.global_batch if isinstance(settings.train.global_batch, int) else None,
        tokens_per_step=tokens,
        seed=settings.train.seed,
        mix=Mix(settings.data.mix.strategy, settings.data.mix.stop),
    )
