"""Sizes of more than 2^31 elements for rows of the catalog, and inputs whose last rows are the ones looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

LIMIT = 2**31
HALF = torch.float16


def room(*shape: int, dtype: torch.dtype = HALF, device: torch.device | str = "cpu") -> Tensor:
    """Memory that, on a CPU, is there once it is written to."""
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError as error:
        pytest.skip(f"the system promises no such memory: {error}")


def at_the_end(rows: Tensor, count: int) -> Tensor:
    """The rows behind so many others that there are `count`."""
    whole = room(count, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    whole[count - len(rows) :] = rows
    return whole


def long(inputs: dict[str, Any], count: int) -> dict[str, Any]:
    """Inputs with a row for each of `count` tokens, which have letter T or C in front of their shape."""
    found = dict(inputs)
    for name, value in inputs.items():
        letters = name.rpartition("_")[2]
        if isinstance(value, Tensor) and letters[:1] in ("T", "C"):
            found[name] = at_the_end(value, count)
        elif isinstance(value, Tensor) and letters == "2T":
            found[name] = at_the_end(value.T, count).T.contiguous()
        elif name == "adapter" and value is not None:
            found[name] = value._replace(xa_TR=at_the_end(value.xa_TR, count))
    return found


def cases(columns: int, tokens: int) -> dict[str, list[tuple[dict[str, Any], int, int]]]:
    """By row of the catalog: a size of as many tokens as are looked at, the programs that compute them, and T.

    Args:
        columns: of the widest tensor, a multiple of 1,024.
        tokens: T; so many columns make more than 2^31 elements of it.
    """
    assert columns * tokens > LIMIT
    norm = {"tokens": 4, "width": columns}
    return {
        "rms_norm": [(norm, 4, tokens), (norm | {"residual": True, "offset": 1.0}, 4, tokens)],
        "rms_norm_backward": [(norm | {"add": True, "recompute": True}, 4, tokens)],
        "add_normed": [(norm, 4, tokens)],
        "layer_norm": [(norm | {"bias": True}, 4, tokens)],
        "layer_norm_backward": [(norm | {"add": True, "recompute": True, "bias": True}, 4, tokens)],
        "add_residual": [({"tokens": 64, "columns": columns, "rank": 4}, 1, tokens)],
        "glu": [
            ({"tokens": 4, "inner": columns // 2}, 8, tokens),
            ({"tokens": 64, "inner": columns // 2, "rank": 4, "down_rank": 4}, 1, tokens),
            ({"tokens": 64, "inner": columns, "plain": True, "rank": 24, "activation": "gelu"}, 1, tokens),
        ],
        "glu_backward_": [
            ({"tokens": 4, "inner": columns // 2}, 8, tokens),
            ({"tokens": 64, "inner": columns // 2, "rank": 4, "down_rank": 4}, 1, tokens),
        ],
        "rope_qkv_": [
            (
                {"tokens": 32, "heads": columns // 128 - 4, "kv_heads": 2, "head_dim": 128, "rank": 4},
                1,
                tokens,
            )
        ],
        "qk_norm_rope": [
            (
                {"tokens": 32, "heads": columns // 128 - 4, "kv_heads": 2, "head_dim": 128, "rank": 4},
                2,
                tokens,
            )
        ],
        "qk_norm_rope_backward_": [
            ({"tokens": 32, "heads": columns // 128 - 4, "kv_heads": 2, "head_dim": 128}, 2, tokens)
        ],
        "softmax_gradient_": [
            ({"rows": 3, "vocabulary": 131_072, "softcap": 5.0}, 3, tokens * columns // 131_072)
        ],
        "logprob_": [({"rows": 3, "vocabulary": 131_072}, 3, tokens * columns // 131_072)],
    }
