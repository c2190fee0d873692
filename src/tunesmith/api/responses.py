"""`train_on_responses_only`: of a tokenised text, the answers train and the questions do not.

Where an answer begins and ends is found in the text, and then in the tokens by the characters that each stands for:
a marker's own tokens depend on what stands beside it, and a search for them would miss some. That the characters are
right is proved for every row: its text, tokenised again, must give the tokens of the row. Where it does not (a text
was cut in the middle of a character), tokens are decoded one character at a time, and together must give the text.

    … instruction_part  question  response_part  answer  instruction_part …
                                                 ^^^^^^ trains
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from tunesmith.contracts.errors import UserError

IGNORED = -100
_PART = "\N{REPLACEMENT CHARACTER}"
"""What decoding writes for a part of a character."""


class Answers:
    """Finds the tokens of answers in tokenised rows.

    Args:
        tokenizer: that made the rows.
        instruction: text in front of each question.
        response: text in front of each answer.
        last_only: whether only a row's last answer trains.
    """

    def __init__(self, tokenizer: Any, instruction: str, response: str, *, last_only: bool = False) -> None:
        self._tokenizer, self._last_only = tokenizer, last_only
        self._instruction, self._response = instruction, response

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Characters `[start, end)` of each answer in a text."""
        found: list[tuple[int, int]] = []
        at = text.find(self._response)
        while at >= 0:
            start = at + len(self._response)
            end = text.find(self._instruction, start)
            end = len(text) if end < 0 else end
            found.append((start, end))
            at = text.find(self._response, end)
        return found[-1:] if self._last_only else found

    def labels(self, ids: Sequence[int], labels: Sequence[int]) -> list[int]:
        """Labels of one row: of the given ones, those that belong to an answer.

        A token that holds the last characters of a marker and the first of an answer does not train: the model is
        never asked to write it.

        Raises:
            UserError: the tokens do not spell the row's text.
        """
        text, places = self._places(list(ids))
        spans = iter(self.spans(text))
        span = next(spans, None)
        kept: list[int] = []
        for (start, end), label in zip(places, labels, strict=True):
            while span is not None and start >= span[1]:
                span = next(spans, None)
            inside = span is not None and start >= span[0] and end > start
            kept.append(label if inside else IGNORED)
        return kept

    def _places(self, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
        """A row's text, and which characters of it each token is."""
        decode: Callable[[list[int]], str] = lambda some: self._tokenizer.decode(  # noqa: E731
            some, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        text = decode(ids)
        again = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if again["input_ids"] == ids:
            return text, [tuple(place) for place in again["offset_mapping"]]
        pieces, places, pending = "", [], list[int]()
        for number, token in enumerate(ids, start=1):
            pending.append(token)
            piece = decode(pending)
            if not piece.endswith(_PART) or number == len(ids):  # tokens of one character are placed together
                places += [(len(pieces), len(pieces) + len(piece))] * len(pending)
                pieces, pending = pieces + piece, []
        if pieces == text:
            return text, places
        raise UserError(
            "train_on_responses_only: the tokens of a row cannot be placed in its text, which begins "
            f"{text[:60]!r}.",
            hint="Tokenise the data with the tokenizer that the trainer has.",
        )


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
    last_response_only: bool = False,
) -> Any:
    """Have a trainer's data sets train on answers only, in every turn.

    Args:
        trainer: `SFTTrainer` or TRL's; its data sets are tokenised.
        instruction_part: text in front of each question, as the template writes it: `<|im_start|>user\\n`.
        response_part: text in front of each answer: `<|im_start|>assistant\\n`.
        force_match: the parts are always matched exactly; False is refused.
        tokenizer: where the trainer has none.
        return_function: return the function that makes labels, and leave the trainer alone.
        num_proc: processes, as in `Dataset.map`.
        last_response_only: train on the last answer of a row only.

    Returns:
        The trainer.

    Raises:
        UserError: a part is missing, or no row has an answer.
    """
    if not instruction_part or not response_part:
        raise UserError(
            "train_on_responses_only needs instruction_part and response_part, the text in front of each question "
            "and of each answer.",
            hint="Print one text of your data set and copy them from there.",
        )
    if not force_match:
        raise UserError(
            "train_on_responses_only: force_match=False would train on questions where a part does not match.",
            hint="Give the parts as they stand in the text.",
        )
    tokenizer = tokenizer or trainer.processing_class
    answers = Answers(tokenizer, instruction_part, response_part, last_only=last_response_only)

    def relabel(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        ids = rows["input_ids"]
        given, lengths = rows.get("labels", ids), rows.get("seq_lengths", [[len(row)] for row in ids])
        return {"labels": [_by_document(answers, *row) for row in zip(ids, given, lengths, strict=True)]}

    if return_function:
        return relabel
    _refuse_collator(trainer)
    _refuse_cutting(trainer)
    options = {"batched": True} | ({} if num_proc is None else {"num_proc": num_proc})
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(trainer, name, None)
        if isinstance(dataset, dict):
            changed: Any = {
                key: _relabelled(part, relabel, options, f"{name} {key}") for key, part in dataset.items()
            }
        else:
            changed = None if dataset is None else _relabelled(dataset, relabel, options, name)
        setattr(trainer, name, changed)
    return trainer


def _by_document(
    answers: Answers, ids: Sequence[int], labels: Sequence[int], lengths: Sequence[int]
) -> list[int]:
    """Labels of a row, document by document where it is packed: an answer ends where its document does."""
    ends = list(accumulate(lengths, initial=0))
    return [label for span in map(slice, ends, ends[1:]) for label in answers.labels(ids[span], labels[span])]


def _relabelled(dataset: Any, relabel: Any, options: dict[str, Any], name: str) -> Any:
    if dataset.column_names is not None and "input_ids" not in dataset.column_names:
        raise UserError(
            f"train_on_responses_only: {name} is not tokenised.",
            hint="Call it with a trainer, after it is made.",
        )
    if not hasattr(dataset, "__len__"):  # a stream is relabelled as it is read
        options = {name: value for name, value in options.items() if name != "num_proc"}
        return dataset.map(relabel, **options)
    changed = dataset.map(relabel, **options)
    trains = [any(label != IGNORED for label in labels) for labels in changed["labels"]]
    if not any(trains):
        raise UserError(
            f"train_on_responses_only: no row of {name} has an answer behind response_part.",
            hint="Print one text of your data set and copy the parts from there, line ends included; or raise "
            "max_seq_length, if it cuts the answers off.",
        )
    if not all(trains):
        print(
            f"tunesmith: {trains.count(False):,} of {len(trains):,} rows of {name} have no answer to train.",
            flush=True,
        )
    return changed


def _refuse_cutting(trainer: Any) -> None:
    """Refuse packing that cuts texts: what follows a cut has no marker that says whose words it is."""
    args = getattr(trainer, "args", None)
    packs = getattr(args, "packing", False) or getattr(args, "eval_packing", False)
    strategy = getattr(args, "packing_strategy", "bfd")
    if packs and strategy != "bfd":
        raise UserError(
            f"train_on_responses_only: packing_strategy={strategy!r} cuts texts in two, and of a second half nobody "
            "can tell whether it is an answer.",
            hint='Use packing_strategy="bfd".',
        )


def _refuse_collator(trainer: Any) -> None:
    from transformers import DataCollatorForLanguageModeling

    if isinstance(getattr(trainer, "data_collator", None), DataCollatorForLanguageModeling):
        raise UserError(
            "train_on_responses_only: the collator of this trainer makes its own labels and would overwrite these.",
            hint="Use SFTTrainer without a data_collator.",
        )
