"""Settings of the data: sources, what is held out, how rows are rendered and which tokens train."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.settings.base import Section

FormatName = Literal["auto", "alpaca", "chat", "pair", "text", "completion"]


class SourceSettings(Section):
    """One source of rows: a file, a folder, a glob pattern or a Hugging Face data set id."""

    path: str = Field(min_length=1)
    """File (.jsonl, .json, .parquet, .csv, .tsv, .txt, .arrow; .gz too), glob pattern, folder saved by
    `datasets`, folder of such files, or a Hugging Face id. Relative paths start at the current directory."""
    format: FormatName = "auto"
    """How a row becomes a conversation; `auto` decides by the columns. `completion` is another name of `text`."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames: the format's own column name to the name in your data, such as `{prompt: question}`."""
    weight: float = Field(default=1.0, gt=0)
    """How often a row appears per epoch on average: 2 shows every row twice, 0.5 a random half of them."""
    split: str | None = None
    """A slice in the notation of `datasets`: `train`, `train[:1000]`, `train[10%:20%]`."""
    name: str | None = None
    """Configuration name of a Hugging Face data set that has several."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face data set."""


class HeldOutSettings(Section):
    """Rows taken away from the training sources and used to measure the held-out loss."""

    fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the training rows that is held out, chosen by `train.seed`; 0 holds out nothing."""
    max_rows: int | None = Field(default=None, ge=1)
    """At most this many rows are held out."""


class DataSettings(Section):
    """Where rows come from and what becomes of them."""

    train: Annotated[tuple[SourceSettings, ...], Field(strict=False, min_length=1)]
    """The training sources."""
    eval: HeldOutSettings | Annotated[tuple[SourceSettings, ...], Field(strict=False)] = HeldOutSettings()
    """Held-out rows: `{fraction: 0.02}` takes them from the training sources; a list names sources."""
    template: str = "auto"
    """Chat template: `auto` is the tokenizer's own (ChatML where it has none), `chatml`, or a Jinja file."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Which tokens train: the assistant's turns with the token that ends them, or every token."""
    overlong: Literal["drop", "truncate", "error"] = "truncate"
    """What becomes of a row longer than `train.sequence_length`; always counted and named."""
    malformed: Literal["drop", "error"] = "drop"
    """What becomes of a row that cannot be read or would train no token; always counted and named."""
    cache_dir: str | None = None
    """Folder of the tokenised cache; by default `~/.cache/tunesmith/tokens` (`$TUNESMITH_CACHE/tokens`)."""
