"""Settings of the data: sources, what is held out, how rows are rendered and which tokens train."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, field_serializer

from tunesmith.settings.base import Section
from tunesmith.settings.urls import shown

FormatName = Literal[
    "auto",
    "alpaca",
    "chat",
    "pair",
    "prompt_completion",
    "glaive",
    "segments",
    "input_output",
    "tokens",
    "text",
    "completion",
    "custom",
    "chosen",
    "approved",
    "preference",
    "compared",
    "scored",
    "labelled",
    "stepwise",
    "prompt",
]
Role = Literal["system", "user", "assistant", "tool"]


def _iso_date(text: str) -> str:
    return date.fromisoformat(text).isoformat()


class SourceSettings(Section):
    """One source of rows: a file, a folder, a glob pattern, an address or a Hugging Face data set id."""

    path: str = Field(min_length=1, repr=False)
    """File (.jsonl, .json, .parquet, .csv, .tsv, .txt, .arrow; .gz too), glob pattern, folder saved by
    `datasets`, folder of such files, address (`https://host/rows.jsonl`, `s3://bucket/rows-*.parquet`), or a
    Hugging Face id. Relative paths start at the current directory."""
    format: FormatName = "auto"
    """How a row becomes a conversation; `auto` decides by the columns. `completion` is another name of `text`,
    `input_output` of `segments`."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames: the format's own column name to the name in your data, such as `{prompt: question}`."""
    template: dict[str, str] = Field(default_factory=dict)
    """Format strings of `format: custom`, such as `{user: "{question} {hint}", assistant: "{answer}"}`: roles
    `system`, `user`, `assistant`; or `prompt` and `completion`, joined as they are; or `text`."""
    role_key: str | None = None
    """Key of a message that holds its role, where it is not a usual one (`role`, `from`, `speaker`, ...)."""
    content_key: str | None = None
    """Key of a message that holds its content, where it is not a usual one (`content`, `value`, `text`, ...)."""
    train_key: str | None = None
    """Key of a message that says whether it trains, where it is not `train`, `training`, `loss` or `mask`."""
    roles: dict[str, Literal["system", "user", "assistant", "tool", "call"]] = Field(default_factory=dict)
    """Names of roles in the data that are not the usual ones, such as `{doctor: assistant}`; `call` is a
    message that holds a tool call."""
    train_roles: Annotated[tuple[Role, ...], Field(strict=False, min_length=1)] = ("assistant",)
    """Roles whose messages train, where a message does not say so itself."""
    last_answer_only: bool = False
    """Train only the last of the messages that would train."""
    reasoning: Literal["split", "keep"] = "split"
    """`<think>` text in front of an answer becomes its reasoning, which the chat template writes; or stays text."""
    tool_calls: Literal["auto", "text", "hermes", "llama3", "glaive"] = "auto"
    """Notation of tool calls inside the assistant's text. `auto` reads calls of the row's own `tools` that can be
    parsed, `text` leaves all of them as they are."""
    weight: float = Field(default=1.0, gt=0)
    """How often a row appears per epoch on average: 2 shows every row twice, 0.5 a random half of them."""
    split: str | None = None
    """A slice in the notation of `datasets`: `train`, `train[:1000]`, `train[10%:20%]`."""
    name: str | None = None
    """Configuration name of a Hugging Face data set that has several."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face data set."""

    @field_serializer("path")
    def _without_secrets(self, path: str) -> str:
        """What is written of the settings has no password and no signature in it."""
        return shown(path)


class HeldOutSettings(Section):
    """Rows taken away from the training sources and used to measure the held-out loss."""

    fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the training rows that is held out, chosen by `train.seed`; 0 holds out nothing."""
    max_rows: int | None = Field(default=None, ge=1)
    """At most this many rows are held out."""


class MixSettings(Section):
    """How several sources share an epoch."""

    strategy: Literal["concatenate", "interleave"] = "concatenate"
    """`concatenate` shuffles all documents together, each as often as its source's `weight` says. `interleave`
    keeps the proportion of sources along the whole epoch; the weights are then their shares of the documents."""
    stop: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """Where an interleaved epoch ends: when the first source has no document left, or when each has been used up
    once, the others starting over."""


class DataSettings(Section):
    """Where rows come from and what becomes of them."""

    train: Annotated[tuple[SourceSettings, ...], Field(strict=False, min_length=1)]
    """The training sources."""
    eval: HeldOutSettings | Annotated[tuple[SourceSettings, ...], Field(strict=False)] = HeldOutSettings()
    """Held-out rows: `{fraction: 0.02}` takes them from the training sources; a list names sources."""
    mix: MixSettings = MixSettings()
    """How several training sources share an epoch."""
    streaming: bool = False
    """Read, tokenise and pack the training sources while the run goes on, from a buffer, and write nothing to disk:
    for data larger than disk or memory. Needs `train.steps`, and held-out rows from sources of their own."""
    buffer_tokens: int = Field(default=1_000_000, ge=1)
    """Tokens of a stream that are shuffled and packed at once, and held in memory (5 bytes each)."""
    template: str = "auto"
    """Chat template: `auto` is the tokenizer's own (ChatML where it has none), a Jinja file, or one of `chatml`,
    `llama-3`, `llama-4`, `mistral`, `gemma-2`, `gemma-3`, `phi-4`, `qwen-2.5`, `qwen-3`, `deepseek-r1`, `gpt-oss`."""
    train_on: (
        Literal["assistant", "last", "all"] | Annotated[tuple[Role, ...], Field(strict=False, min_length=1)]
    ) = "assistant"
    """Which tokens train: the assistant's turns with the token that ends them, its last turn, every token, or the
    turns of a list of roles. A message's own `train` goes before it."""
    end_of_turn: Literal["turn", "all", "last", "none"] = "turn"
    """Tokens that end a turn and train: those of the turns that train, of all turns, of the last one, or none."""
    prefix_mismatch: Literal["refuse", "context", "allow", "split"] = "refuse"
    """What becomes of a row in which a server's prompt is not the beginning of a turn that trains: it is refused
    (see `malformed`), such turns are context, they train nevertheless, or the row is split, each turn that trains a
    document of its own that ends with it. `split` does so, too, where the template would lose the reasoning of an
    earlier turn."""
    allow_control_tokens: bool = False
    """Let control tokens that stand in the text of users, tools and the system be control tokens; otherwise they
    are plain text."""
    date: Annotated[str, AfterValidator(_iso_date), WithJsonSchema({"type": "string", "format": "date"})] = (
        "2025-01-01"
    )
    """The day (year-month-day) that a chat template writes as today's: one for all runs, so that the tokens of a
    row do not change from day to day."""
    overlong: Literal["drop", "truncate", "error", "split"] = "truncate"
    """What becomes of a row longer than `train.sequence_length`; always counted and named. `split` makes several
    documents of a plain text, and truncates other rows."""
    overlap: int = Field(default=1, ge=0)
    """Tokens that a piece of a plain text repeats of the piece before it, as context: they do not train again. The
    default of one lets each token of a text train exactly once; with 0 the first one of a piece does not."""
    join_texts: bool = False
    """Join the plain texts of a source one behind the other, each with its EOS, and cut them into documents of
    exactly `train.sequence_length` tokens, whose texts see each other; otherwise each text is a document."""
    malformed: Literal["drop", "error"] = "drop"
    """What becomes of a row that cannot be read or would train no token; always counted and named."""
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Processes that render and tokenise local files; 0 and 1 are none but the run's own. `auto` is one for each
    core, at most 8, on Linux, and none elsewhere. The tokens are the same for any number; streams take none."""
    cache_dir: str | None = None
    """Folder of the tokenised cache; by default `~/.cache/tunesmith/tokens` (`$TUNESMITH_CACHE/tokens`)."""
