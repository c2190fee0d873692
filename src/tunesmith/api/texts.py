"""Texts that `SFTTrainer` trains on, from a column or a formatting function, as tokens.

TRL by itself reads a column of messages in place of a text beside it, and in place of what a formatting function made
of it; its tokenizer puts a second beginning in front of a text that a chat template has begun already, and it ends
texts once more that have ended and a line break behind. Here what a script names is what trains, with one of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from tunesmith.contracts.errors import UserError

READ_FIRST = ("messages", "prompt", "completion", "conversations")
"""Columns that TRL reads in place of a text."""

KNOWN = ("add_special_tokens", "append_concat_token", "skip_prepare_dataset")
"""Keys of `dataset_kwargs`: those of 2024, and the one that TRL reads today."""

Say = Callable[[str], None]


def check_keys(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """`dataset_kwargs`, none of which is unknown.

    Raises:
        UserError: one is.
    """
    for name in options or {}:
        if name not in KNOWN:
            raise UserError(
                f"SFTTrainer: dataset_kwargs has {name!r}, which nothing reads.",
                hint=f"There are: {', '.join(KNOWN)}.",
            )
    return dict(options or {})


def as_tokens(
    name: str, dataset: Any, config: Any, formatting: Callable[[Any], Any] | None, tokenizer: Any, say: Say
) -> Any:
    """A data set whose texts are tokens; one that holds none is as it was.

    Args:
        name: `train_dataset` or `eval_dataset`.
        config: TRL's, which names the column.
        formatting: a function that makes texts of a row or of a batch.
        say: prints a line.

    Raises:
        UserError: a text is none, or the function returns something else.
    """
    if isinstance(dataset, dict):
        return {
            key: as_tokens(name, part, config, formatting, tokenizer, say) for key, part in dataset.items()
        }
    options = check_keys(config.dataset_kwargs)
    if dataset is None or not hasattr(dataset, "map") or options.get("skip_prepare_dataset"):
        return dataset
    columns = dataset.column_names or list(next(iter(dataset), {}))
    field, workers = config.dataset_text_field, _workers(dataset, config)
    if "input_ids" in columns:
        return dataset
    if formatting is not None:
        dataset = _formatted(dataset, formatting, field, columns, workers)
    elif field not in columns or config.assistant_only_loss or config.completion_only_loss:
        return _conversations(name, dataset, columns)
    elif others := [column for column in READ_FIRST if column in columns]:
        say(
            f"tunesmith: {name} trains on its column {field!r}; {', '.join(map(repr, others))} beside it "
            f"{'is' if len(others) == 1 else 'are'} not read. Remove {field!r} to train on conversations."
        )
        dataset = dataset.remove_columns(others)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return dataset  # TRL loads one, and makes tokens
    rows = Rows(name, field, tokenizer, config.eos_token or tokenizer.eos_token, options)
    if rows.begun(next(iter(dataset), {}).get(field)):
        say(
            f"tunesmith: the texts of {name} begin with {tokenizer.bos_token} already; no second one is added."
        )
    return dataset.map(rows, batched=True, with_indices=True, remove_columns=field, **workers)


def _conversations(name: str, dataset: Any, columns: list[str]) -> Any:
    """Conversations in the column in which TRL reads them.

    Raises:
        UserError: they are ShareGPT's, whose roles a chat template would write as they stand.
    """
    if "conversations" not in columns or "messages" in columns:
        return dataset
    row: dict[str, Any] = next(iter(dataset), {})
    messages = row.get("conversations")
    first = messages[0] if isinstance(messages, list) and messages else None
    if not isinstance(first, Mapping) or not {"from", "role"} & set(first):
        raise UserError(f"SFTTrainer: {name}: row 0 has no messages in its column 'conversations'.")
    if "from" in first:
        raise UserError(
            f"SFTTrainer: {name} holds conversations of ShareGPT, whose roles no chat template knows.",
            hint="Give it to standardize_sharegpt first.",
        )
    return dataset.rename_column("conversations", "messages")


def _workers(dataset: Any, config: Any) -> dict[str, Any]:
    """How `map` of a data set in memory runs; one that streams takes no such options."""
    if not hasattr(dataset, "__len__"):
        return {}
    return {"num_proc": config.dataset_num_proc, "desc": "Tokenizing"}


class Rows:
    """Tokens of texts, batch by batch.

    Args:
        name: of the data set; field: its column.
        end: the token that ends a text.
        options: `dataset_kwargs`.
    """

    def __init__(
        self, name: str, field: str, tokenizer: Any, end: str | None, options: Mapping[str, Any]
    ) -> None:
        self._name, self._field, self._tokenizer, self._end = name, field, tokenizer, end
        self._special = options.get("add_special_tokens", True)
        self._ends = options.get("append_concat_token", True)

    def begun(self, text: Any) -> bool:
        """Whether a text begins with the token that the tokenizer would put in front of it."""
        first = self._tokenizer.bos_token
        return isinstance(text, str) and bool(first) and self._special and text.startswith(first)

    def __call__(self, rows: Mapping[str, list[Any]], numbers: Iterable[int]) -> dict[str, list[Any]]:
        found = []
        for number, text in zip(numbers, rows[self._field], strict=True):
            if not isinstance(text, str):
                raise UserError(
                    f"SFTTrainer: {self._name} row {number}: {self._field!r} is {text!r:.60}, and has to be text."
                )
            if self._ends and self._end and not text.rstrip().endswith(self._end):
                text = text + self._end
            special = self._special and not self.begun(text)
            found.append(self._tokenizer(text=text, add_special_tokens=special)["input_ids"])
        return {"input_ids": found}


def _formatted(
    dataset: Any, formatting: Callable[[Any], Any], field: str, columns: list[str], workers: Mapping[str, Any]
) -> Any:
    """The texts that a formatting function makes of all rows, in the column `field` and nothing beside it."""
    batched = _takes_batches(formatting, next(iter(dataset)))

    def texts(rows: Any) -> dict[str, Any]:
        made = formatting(rows)
        for text in made if batched else [made]:
            if not isinstance(text, str):
                raise _not_text(text)
        return {field: made}

    options = {**workers, "desc": "Applying formatting_func"} if workers else {}
    return dataset.map(texts, batched=batched, remove_columns=columns, **options)


def _takes_batches(formatting: Callable[[Any], Any], row: Mapping[str, Any]) -> bool:
    """Whether a formatting function is one of 2024, which takes a dict of lists and returns a list.

    Many of these return a list of one row as well, others fail on it.
    """
    try:
        made = formatting(row)
    except Exception:
        try:
            if isinstance(formatting({name: [value] for name, value in row.items()}), list):
                return True
        except Exception:  # what it says of one row is what a person wants to know
            pass
        raise
    if not isinstance(made, str | list):
        raise _not_text(made)
    return isinstance(made, list)


def _not_text(made: Any) -> UserError:
    return UserError(
        f"SFTTrainer: formatting_func returned a {type(made).__name__} for a text.",
        hint="Return the text of a row, or of a batch (a dict of lists) the list of its texts.",
    )
