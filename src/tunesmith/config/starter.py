"""What `tunesmith init` writes: a small and complete run file for a model, a data set and an objective.

What is chosen here is where a first run starts, not where the last one ends: common values, and sizes that follow
from the data. Every line of the file says what it does and where its value comes from.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith._version import __version__
from tunesmith.config.load import load_settings
from tunesmith.config.schema import SCHEMA_FILE
from tunesmith.config.starter_data import Lengths, Look
from tunesmith.config.starter_text import commented_yaml, printable
from tunesmith.config.yaml_source import KeyPath, parse_yaml
from tunesmith.contracts.errors import StorageError, UserError
from tunesmith.contracts.plural import counted
from tunesmith.data.formats import Text
from tunesmith.settings.run import TrainSettings

SEQUENCE_LENGTHS: tuple[int, ...] = (512, 768, 1024, 1536, *(2**power for power in range(11, 18)))
"""What is chosen from: below 512 tokens a pack gains nothing, and above 128k models are rare."""
_UNKNOWN_CONTEXT, _LONGEST_TEXT = 8_192, 2_048
_SHARE = 0.99
"""Share of the rows that shall fit whole."""
_GLOBAL_BATCHES, _FEWEST_STEPS = (16, 8, 4, 2, 1), 20
"""The largest global batch is taken with which an epoch has so many steps."""
_SHORT_RUN, _EPOCHS = 100, 3
"""A run of fewer steps than the first gets so many epochs."""
_LEARNING_RATES = {"none": 2.0e-5}
"""Of kinds of adapters; others start at the setting's own default, which is for LoRA. All weights move far more at
a rate than an adapter does."""
_EVALUATIONS = 10
_SMALL, _SMALL_FRACTION, _FRACTION, _MOST_HELD_OUT = 2_000, 0.05, 0.02, 500
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Wishes:
    """What the file is for, as flags or answers say it.

    Attributes:
        model, objective, adapter, quantize, output: as `model.name`, `objective.kind`, `adapter.kind`,
            `model.quantize` and `output.dir` have it.
        data: as `path` of a source has it; format and columns likewise.
        held_out: data that measures; None takes a share of the training rows.
        sequence_length: None chooses it by the data.
    """

    model: str
    data: str
    output: str
    objective: str = "sft"
    adapter: str = "lora"
    quantize: str = "none"
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    held_out: str | None = None
    sequence_length: int | None = None

    def check(self) -> None:
        """Refuse wishes that no run file fulfils, before data is read for them.

        Raises:
            ConfigError: with every problem.
        """
        load_settings(_sections(self))


def default_output(data: str) -> str:
    """The run directory that is named after the data."""
    name = Path(data.rstrip("/")).name.partition(".")[0].strip("*?[]")
    return f"runs/{name or 'first'}"


# ---------------------------------------------------------------- choices


@dataclass(frozen=True)
class Sizes:
    """What follows from the lengths of the rows.

    Attributes:
        sequence_length: of a pack.
        longer: rows that are longer.
        global_batch, epochs, steps, eval_every, held_out: as the settings of these names; steps are those of the run,
            None where only the first rows were read.
    """

    sequence_length: int
    longer: int
    global_batch: int
    epochs: int
    steps: int | None
    eval_every: int
    held_out: dict[str, Any]


def choose_sizes(lengths: Lengths, *, plain_text: bool = False, sequence_length: int | None = None) -> Sizes:
    """Sizes for rows of such lengths.

    Args:
        plain_text: rows may be split without loss.
        sequence_length: where it is not to be chosen.
    """
    chosen = sequence_length or choose_sequence_length(lengths, plain_text=plain_text)
    longer = sum(length > chosen for length in lengths.tokens)
    if lengths.partial:
        held = {"fraction": _FRACTION, "max_rows": _MOST_HELD_OUT}
        return Sizes(chosen, longer, _GLOBAL_BATCHES[0], 1, None, 100, held)
    fraction = _SMALL_FRACTION if len(lengths.tokens) < _SMALL else _FRACTION
    fitted = lengths.total if plain_text else sum(min(length, chosen) for length in lengths.tokens)
    packs = max(1.0, fitted * (1 - fraction) / chosen)
    batch = next((size for size in _GLOBAL_BATCHES if packs / size >= _FEWEST_STEPS), 1)
    epochs = 1 if packs / batch >= _SHORT_RUN else _EPOCHS
    steps = max(1, round(epochs * packs / batch))
    return Sizes(
        chosen, longer, batch, epochs, steps, min(100, max(1, steps // _EVALUATIONS)), {"fraction": fraction}
    )


def choose_sequence_length(lengths: Lengths, *, plain_text: bool) -> int:
    """The smallest usual length that nearly all rows fit into, within what the model was made for."""
    most = lengths.context or _UNKNOWN_CONTEXT
    if plain_text:
        most = min(most, _LONGEST_TEXT)
    wanted = lengths.quantile(_SHARE)
    return min(most, next((length for length in SEQUENCE_LENGTHS if length >= wanted), SEQUENCE_LENGTHS[-1]))


# ---------------------------------------------------------------- the file


def _sections(wishes: Wishes, look: Look | None = None, sizes: Sizes | None = None) -> dict[str, Any]:
    """The settings of the file, as far as they are known."""
    adapter: dict[str, Any] = {"kind": wishes.adapter}
    if wishes.adapter != "none":
        adapter |= {"rank": 16, "alpha": 32.0, "targets": "all-linear"}
    source: dict[str, Any] = {
        "path": wishes.data,
        "format": wishes.format if look is None else look.format.name,
    }
    if renames := wishes.columns if look is None else look.renames:
        source["columns"] = dict(renames)
    held = sizes.held_out if sizes is not None else {}
    data: dict[str, Any] = {"train": [source], "eval": held}
    if wishes.held_out is not None:
        data["eval"] = [{**source, "path": wishes.held_out}]
    plain_text = look is not None and look.format.kind is Text
    if not plain_text:
        data["train_on"] = "assistant"
    data["overlong"] = "split" if plain_text else "truncate"
    train: dict[str, Any] = {}
    if sizes is not None:
        train = {
            "sequence_length": sizes.sequence_length,
            "packing": True,
            "global_batch": sizes.global_batch,
            "epochs": float(sizes.epochs),
        }
    train["learning_rate"] = _LEARNING_RATES.get(wishes.adapter, TrainSettings().learning_rate)
    train |= {"scheduler": "cosine", "warmup": 0.05, "optimizer": "adamw", "seed": 42}
    output: dict[str, Any] = {"dir": wishes.output}
    if sizes is not None:
        output |= {"save_every": 2 * sizes.eval_every, "eval_every": sizes.eval_every}
    return {
        "model": {"name": wishes.model, "quantize": wishes.quantize},
        "adapter": adapter,
        "data": data,
        "objective": {"kind": wishes.objective},
        "train": train,
        "output": output,
    }


def _remarks(wishes: Wishes, look: Look, lengths: Lengths, sizes: Sizes, duration: str) -> dict[KeyPath, str]:
    """What is to be said of values beside the docstrings of their settings: where they come from."""
    source: KeyPath = ("data", "train", 0)
    remarks: dict[KeyPath, str] = {
        (*source, "format"): f"Here: {look.described}.",
        ("train", "sequence_length"): f"Here: {length_remark(lengths, sizes)}",
    }
    if look.guessed:
        remarks[(*source, "columns")] = "Here: chosen by the likeness of names; see that they are right."
    if wishes.adapter == "none":
        remarks[("train", "learning_rate")] = "A tenth of what an adapter takes: all weights move."
    if sizes.steps is not None:
        takes = f", {duration} on the CPU of the machine that wrote this" if duration else ""
        remarks[("train", "epochs")] = f"Here: about {counted(sizes.steps, 'step')} in all{takes}."
    return remarks


def length_remark(lengths: Lengths, sizes: Sizes) -> str:
    """Where the sequence length comes from, and what becomes of longer rows."""
    which = (
        f"the first {counted(lengths.rows, 'row')}"
        if lengths.partial
        else counted(len(lengths.tokens), "row")
    )
    how = (
        "estimated as a quarter of the characters"
        if lengths.estimated
        else "counted with the model's tokenizer"
    )
    text = (
        f"of {which}, {_SHARE:.0%} have at most {counted(lengths.quantile(_SHARE), 'token')} and the longest has "
        f"{lengths.tokens[-1]:,}, {how}."
    )
    if sizes.longer:
        text += f" {sizes.longer:,} of them {'is' if sizes.longer == 1 else 'are'} longer: see data.overlong."
    if lengths.context is not None and sizes.sequence_length == lengths.context:
        text += " The model was made for no more."
    return text


def sizes_of(wishes: Wishes, look: Look, lengths: Lengths) -> Sizes:
    """The sizes of the run that is wished for."""
    plain_text = look.format.kind is Text
    return choose_sizes(lengths, plain_text=plain_text, sequence_length=wishes.sequence_length)


def starter_text(wishes: Wishes, look: Look, lengths: Lengths, *, file: Path, duration: str = "") -> str:
    """The text of the run file.

    Args:
        look: the format of the training data.
        lengths: of its rows.
        file: where it will be written.
        duration: what the run takes without a GPU, in words; empty where there is one or nobody knows.

    Raises:
        ConfigError: wishes that do not go together.
    """
    sizes = sizes_of(wishes, look, lengths)
    body = commented_yaml(_sections(wishes, look, sizes), _remarks(wishes, look, lengths, sizes, duration))
    text = f"{_head(file)}{body}\n"
    load_settings(parse_yaml(text, str(file)).data)
    return text


def _head(file: Path) -> str:
    line = f"# yaml-language-server: $schema={SCHEMA_FILE}\n"
    beside = (file.parent / SCHEMA_FILE).is_file()
    return (
        (line if beside else "")
        + f"# A run of tunesmith, written by `tunesmith init` of version {__version__}. Start it with:\n"
        + f"#     tunesmith train {shlex.quote(printable(str(file)))}\n"
        + "# There are more settings than these: docs/reference.md has all of them, and an editor completes them "
        + (
            "by the line above.\n"
            if beside
            else f"after\n# `tunesmith schema > {SCHEMA_FILE}`, with this as the first line:\n#   {line}"
        )
    )


def refuse_file(file: Path, *, force: bool) -> None:
    """Refuse a place where the file cannot be written, before anything is asked or measured.

    Raises:
        UserError: it exists, is a folder, lies in no folder, or has a name that is none of a run file.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"{file} does not end in .yaml.", hint=f"Name it {file.with_suffix('.yaml')}.")
    if file.is_dir():
        raise UserError(f"{file} is a folder.", hint="Name a file, such as run.yaml.")
    if not file.parent.is_dir():
        raise UserError(f"{file} cannot be written: there is no folder {file.parent}.", hint="Make it first.")
    if file.exists() and not force:
        raise UserError(
            f"{file} exists already, and is left as it is.",
            hint="Give another name, or --force to replace it.",
        )


def write_starter(file: Path, text: str, *, force: bool) -> None:
    """Write the run file; a file that is there is replaced only by force, and then as a whole.

    Raises:
        UserError: as `refuse_file`.
        StorageError: it cannot be written.
    """
    refuse_file(file, force=force)
    target = file.with_name(f".tmp-{file.name}") if force else file
    try:
        with target.open("w" if force else "x", encoding="utf-8") as stream:  # x: a file may appear meanwhile
            stream.write(text)
        target.replace(file)
    except FileExistsError:
        raise UserError(f"{file} exists already, and is left as it is.") from None
    except OSError as error:
        target.unlink(missing_ok=True)
        raise StorageError(f"{file} cannot be written: {error.strerror or error}.") from None
