"""Sample answers: greedy generation for a few prompts at once, through the stock attention and its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from tunesmith.models.modes import evaluating


@torch.no_grad()
def sample_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    autocast: AbstractContextManager[object],
) -> list[str]:
    """Answers of the model to rendered prompts, decoded without control tokens.

    Args:
        prompts: rendered text that ends where the model is to go on.
        max_new_tokens: upper bound of each answer's length.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    longest = max(map(len, encoded))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in encoded], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded], device=model.device)
    with evaluating(model), autocast:
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
    return [tokenizer.decode(row[longest:], skip_special_tokens=True).strip() for row in output]
