"""Rows that were tokenised elsewhere: ids, and which of them train.

Padding goes: what the attention mask leaves out, before or behind the tokens, is no token of the row. A hole
inside is refused, because packed documents have no such thing. `labels` must be the ids or -100: labels that
stand one place to the left were shifted for a model that does not shift, and would train nonsense here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tunesmith.data.formats.contract import Column, Format, Tokens, need, prefers, take
from tunesmith.data.reading import AS_USUAL, Reading, RowProblem, parse_json

_IGNORED = -100
_LARGEST = 2**31 - 1

_TOKENS = {
    "input_ids": Column(True, "ids of the tokens"),
    "labels": Column(False, "the ids again where they train, -100 where not"),
    "mask": Column(
        False,
        "1 where a token trains",
        ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask"),
    ),
    "attention_mask": Column(False, "0 where a token is padding"),
}


def _detect(keys: Collection[str]) -> bool:
    return "input_ids" in keys and not prefers(keys)


def _integers(value: Any, name: str) -> list[int]:
    value = parse_json(value, "bad tokens", name)
    if not isinstance(value, list) or not all(type(one) is int or isinstance(one, bool) for one in value):
        raise RowProblem("bad tokens", f"{name} is not a list of integers")
    return value


def _beside(record: Mapping[str, Any], name: str, length: int) -> list[int] | None:
    raw = take(record, _TOKENS, name)
    if raw is None:
        return None
    value = _integers(raw, name)
    if len(value) != length:
        raise RowProblem("bad tokens", f"{name} has {len(value)} entries for {length} tokens")
    return value


def _flags(value: list[int], name: str) -> list[bool]:
    if not {0, 1}.issuperset(value):
        raise RowProblem("bad tokens", f"{name} holds more than 0 and 1")
    return [bool(one) for one in value]


def _trained(record: Mapping[str, Any], ids: list[int]) -> list[bool]:
    labels, mask = _beside(record, "labels", len(ids)), _beside(record, "mask", len(ids))
    trained = _flags(mask, "mask") if mask is not None else [True] * len(ids)
    if labels is not None:
        if any(label not in (_IGNORED, own) for label, own in zip(labels, ids, strict=True)):
            raise RowProblem("bad tokens", "labels are neither input_ids nor -100; they may be shifted")
        trained = [flag and label != _IGNORED for flag, label in zip(trained, labels, strict=True)]
    return trained


def _convert(record: Mapping[str, Any], _: Reading = AS_USUAL, /) -> Tokens:
    ids = _integers(need(record, _TOKENS, "input_ids"), "input_ids")
    if any(isinstance(one, bool) or not 0 <= one <= _LARGEST for one in ids):
        raise RowProblem("bad tokens", "input_ids holds what cannot be a token id")
    trained = _trained(record, ids)
    attended = _beside(record, "attention_mask", len(ids))
    if attended is not None:
        seen = _flags(attended, "attention_mask")
        start = seen.index(True) if True in seen else len(ids)
        end = start + sum(seen)
        if not all(seen[start:end]):
            raise RowProblem("bad tokens", "attention_mask has a hole between tokens")
        ids, trained = ids[start:end], trained[start:end]
    if not any(trained):
        raise RowProblem("empty answer", "no token trains")
    return Tokens(list(ids), trained)


TOKENS_FORMAT = Format(
    "tokens",
    Tokens,
    "token ids with their labels, taken as they are",
    _TOKENS,
    _detect,
    _convert,
    {"input_ids": [1, 306, 763, 2], "labels": [-100, -100, 763, 2]},
)
