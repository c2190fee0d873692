"""`add_new_tokens`: tokens that a model does not have yet, before its adapter is put on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith.api.arguments import Foreign, check_foreign
from tunesmith.api.facts import need_facts
from tunesmith.api.values import names
from tunesmith.api.wording import in_arguments
from tunesmith.contracts.errors import UserError
from tunesmith.models.vocabulary import extend_tokenizer, resize


def add_new_tokens(
    model: Any,
    tokenizer: Any,
    new_tokens: str | Sequence[str] = (),
    method: str = "mean",
    **foreign: Any,
) -> list[int]:
    """Add tokens to a tokenizer, and rows to the model's embeddings and head that start at the mean of the others.

    They train where the embeddings do: with `modules_to_save=["embed_tokens", "lm_head"]`, or, for these rows alone,
    `trainable_token_indices=` of the ids that this returns.

    Args:
        model: of `FastLanguageModel.from_pretrained`, without an adapter yet.
        new_tokens: texts that become one token each; one text, or several in a list.
        method: `mean`, the one there is.
        foreign: `interpolation`, which belongs to another method of Unsloth's.

    Returns:
        The ids of the tokens that are new.

    Raises:
        UserError: the model carries an adapter already, or the tokens are not distinct.
    """
    check_foreign(add_new_tokens, {"interpolation": Foreign(None, "It belongs to another method.")}, foreign)
    need_facts(model, "add_new_tokens")
    if hasattr(model, "peft_config"):
        raise UserError(
            "add_new_tokens: the model carries an adapter already, which would not train the new rows.",
            hint="Call it between from_pretrained and get_peft_model.",
        )
    if method != "mean":
        raise UserError(f"add_new_tokens: method={method!r} is not there.", hint='Use method="mean".')
    with in_arguments():
        ids = extend_tokenizer(tokenizer, names(new_tokens))
    resize(model, tokenizer, ids)
    return ids
