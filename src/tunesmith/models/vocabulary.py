"""New tokens: rows for them in the embeddings and in the head, that start at the mean of the others.

The mean row makes the new token as likely as an average one; random rows can be more likely than all others together
(https://nlp.stanford.edu/~johnhew/vocab-expansion.html). transformers draws from a normal distribution around the
mean instead, which is the same but for its variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tunesmith.contracts.errors import UserError
from tunesmith.models.adapter_targets import ends_in


def extend_tokenizer(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Add tokens to a tokenizer.

    Args:
        tokens: texts that become one token each; those that are tokens already stay as they are.

    Returns:
        The ids of the tokens that are new.

    Raises:
        UserError: a text is empty or given twice.
    """
    if len(set(tokens)) != len(tokens) or not all(tokens):
        raise UserError("adapter.new_tokens: a token is empty or given twice.", hint="Give each text once.")
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    ids: list[int] = tokenizer.convert_tokens_to_ids(new)
    return ids


@torch.no_grad()
def resize(model: Any, tokenizer: Any, new: Sequence[int]) -> None:
    """Rows for all tokens of a tokenizer in a model without an adapter; the new ones are the mean of the others.

    Models often have rows without a token, which were never trained: new tokens take those first.

    Args:
        new: ids of the new tokens, which follow the others.
    """
    if not new:
        return
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.requires_grad_(False)
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(module.weight): module.weight for module in modules if module is not None}
    for weight in weights.values():
        weight[list(new)] = weight[: min(new)].mean(dim=0, dtype=torch.float32).to(weight.dtype)


def embedding_name(model: Any) -> str:
    """The last part of the name of a model's embeddings: `embed_tokens`, in GPT-2 `wte`."""
    embeddings = model.get_input_embeddings()
    path: str = next(name for name, module in model.named_modules() if module is embeddings)
    return path.rsplit(".", 1)[-1]


def trainable_rows(model: Any, ids: Sequence[int], whole: Sequence[str] = ()) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices` for the rows of some tokens, in embeddings and head; None for no rows.

    Args:
        whole: name endings of modules that train whole beside the adapter, whose rows train anyway.
    """
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {id(module): name for name, module in model.named_modules()}
    tied = wanted[1] is not None and wanted[1].weight is wanted[0].weight
    found = [names[id(module)] for module in wanted if module is not None]
    rest = [name for name in found if not any(ends_in(name, ending) for ending in whole)]
    if not ids or not rest or (tied and rest != found):
        return None
    return {name.rsplit(".", 1)[-1]: list(ids) for name in rest[: 1 if tied else 2]}


def widen_for(model: Any, rows: int) -> None:
    """Give a model without an adapter at least so many rows of embeddings, for an adapter that has them."""
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.requires_grad_(False)
