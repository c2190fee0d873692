"""`get_chat_template` and `standardize_sharegpt`: chat data for trainers that take a transformers tokenizer."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from tunesmith.api.arguments import CONVERTING, check_foreign
from tunesmith.contracts.errors import UserError
from tunesmith.data.chat import RowProblem, read_message
from tunesmith.data.named_templates import TEMPLATES, missing_control

ALIASES: dict[str, str] = {
    "deepseek": "deepseek-r1",
    "gemma": "gemma-2",
    "gemma2": "gemma-2",
    "gemma3": "gemma-3",
    "llama-3.1": "llama-3",
    "llama-3.2": "llama-3",
    "llama-3.3": "llama-3",
    "llama3": "llama-3",
    "llama-31": "llama-3",
    "llama4": "llama-4",
    "phi4": "phi-4",
    "qwen2.5": "qwen-2.5",
    "qwen25": "qwen-2.5",
    "qwen3": "qwen-3",
}
"""Names that scripts use for a row of `data.named_templates.TEMPLATES`."""

_KEYS = ("role", "content", "user", "assistant", "system")
_MAPPED = (
    "{%- set renamed = ROLES -%}{%- set read = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set read.messages = read.messages + [dict(role=renamed.get(message[ROLE], message[ROLE]), "
    "content=message[CONTENT])] -%}"
    "{%- endfor -%}{%- set messages = read.messages -%}"
)


def get_chat_template(
    tokenizer: Any,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """Give a tokenizer a chat template.

    Args:
        tokenizer: of the model that trains; it is changed.
        chat_template: a row of `TEMPLATES` or another name of it, Jinja text, or `(Jinja text, end-of-turn token)`.
        mapping: how the data names things: `{"role": "from", "content": "value", "user": "human",
            "assistant": "gpt"}` for ShareGPT.
        map_eos_token: make the token that ends an answer the tokenizer's end-of-sequence token.
        system_message: None; a system message is part of the data here.

    Returns:
        The tokenizer.

    Raises:
        UserError: there is no such template, or the tokenizer lacks its control tokens.
    """
    if system_message is not None:
        raise UserError(
            "get_chat_template: system_message is not possible; a template writes what a conversation says.",
            hint='Begin each conversation with {"role": "system", "content": ...}.',
        )
    end = None
    if isinstance(chat_template, tuple):
        chat_template, end = chat_template
    text = _text_of(chat_template)
    prelude = "" if mapping is None else _prelude(mapping)
    vocabulary = tokenizer.get_vocab()
    missing = missing_control(text, vocabulary)
    if missing:
        raise UserError(
            f"get_chat_template: the tokenizer has no token {missing[0]!r}, so {chat_template} would be plain text "
            "to the model.",
            hint="Use the template of the model's family, or add_new_tokens(model, tokenizer, [...]) and train them.",
        )
    if map_eos_token and end is not None and end not in vocabulary:
        raise UserError(f"get_chat_template: the tokenizer has no token {end!r} to end an answer with.")
    tokenizer.chat_template = text  # nothing is refused from here on
    end = end or _end_of_turn(tokenizer)
    if map_eos_token and end is not None:
        tokenizer.eos_token = end
    tokenizer.chat_template = prelude + text
    return tokenizer


def _text_of(template: Any) -> str:
    if not isinstance(template, str):
        raise UserError(
            f"get_chat_template: chat_template is {template!r}, and has to be a name or Jinja text.",
            hint=f"There are: {', '.join(TEMPLATES)}.",
        )
    if "{%" in template or "{{" in template:
        return template
    row = TEMPLATES.get(ALIASES.get(template, template))
    if row is None:
        # letters that are wrong, not another number or another family
        near = [
            name
            for name in difflib.get_close_matches(template, [*TEMPLATES, *ALIASES], cutoff=0.75)
            if sorted(filter(str.isdigit, name)) == sorted(filter(str.isdigit, template))
        ]
        raise UserError(
            f"get_chat_template: there is no template {template!r}.",
            hint=f"Did you mean {near[0]!r}?"
            if near
            else f"There are: {', '.join(TEMPLATES)}. Without the call a tokenizer keeps the template it came with.",
        )
    return row.text


def _end_of_turn(tokenizer: Any) -> str | None:
    """The control token that the template writes behind an answer, or None where it writes text."""
    mark = "answer-7f3a"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).partition(mark)[2].lstrip()
    tokens = [tokenizer.eos_token, *(str(token) for token in tokenizer.added_tokens_decoder.values())]
    ends = [token for token in tokens if token and after.startswith(token)]
    return max(ends, key=len, default=None)


def _prelude(mapping: Mapping[str, str]) -> str:
    """Jinja in front of a template that turns messages of other keys and roles into its own."""
    unknown = [key for key in mapping if key not in _KEYS]
    if unknown:
        raise UserError(
            f"get_chat_template: mapping has {unknown[0]!r}.", hint=f"Its keys are {', '.join(_KEYS)}."
        )
    roles = {mapping[role]: role for role in _KEYS[2:] if role in mapping}
    values = {
        "ROLES": roles,
        "ROLE": mapping.get("role", "role"),
        "CONTENT": mapping.get("content", "content"),
    }
    text = _MAPPED
    for name, value in values.items():
        text = text.replace(name, json.dumps(value, ensure_ascii=False))
    return text


def standardize_sharegpt(
    dataset: Any,
    column: str = "conversations",
    num_proc: int | None = None,
    **foreign: Any,
) -> Any:
    """Conversations of `from` and `value` (or any usual keys and roles) as lists of `role` and `content`.

    Args:
        dataset: of the `datasets` package.
        column: that holds the conversations.
        num_proc: processes, as in `Dataset.map`.
        foreign: arguments of Unsloth that change nothing here, or are refused with their reason.

    Returns:
        The data set with that column converted.

    Raises:
        UserError: there is no such column, or a message cannot be read.
        TypeError: an argument that nobody knows.
    """
    check_foreign(standardize_sharegpt, CONVERTING, foreign)
    names = dataset.column_names
    if names is not None and column not in names:
        raise UserError(
            f"standardize_sharegpt: the data set has no column {column!r}.",
            hint=f"It has {', '.join(names)}; say which with column=.",
        )

    def convert(row: dict[str, Any], number: int) -> dict[str, Any]:
        if not isinstance(row[column], list):
            raise UserError(f"standardize_sharegpt: row {number} has no list of messages in {column!r}.")
        try:
            read = [read_message(raw, at) for at, raw in enumerate(row[column])]
        except RowProblem as problem:
            hint = "Mend the row, or leave it out with dataset.filter."
            if problem.reason == "unknown role":
                hint = "Rename it in the data, to user, assistant, system or tool."
            what = problem.detail.partition("; say")[0]
            raise UserError(
                f"standardize_sharegpt: row {number}: {problem.reason}: {what}.", hint=hint
            ) from problem
        return {column: [{"role": message["role"], "content": message["content"]} for message in read]}

    # without the column's own type, which would ask for the old keys again
    options = {} if num_proc is None else {"num_proc": num_proc}
    features = dataset.features.copy() if dataset.features is not None else None
    if features is not None:
        from datasets import Value

        features[column] = [{"role": Value("string"), "content": Value("string")}]
    return dataset.map(convert, with_indices=True, features=features, **options)
