"""Gemma 3 as it is published from 4B on: a decoder inside a model that sees pictures, trained on text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tunesmith.models.attach import Attached, attach

IMAGE = 302


def model_of() -> Any:
    text = {
        "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "max_position_embeddings": 256,
        "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, boi_token_index=300,
            eoi_token_index=301, image_token_index=IMAGE,
        )
    )  # fmt: skip
    return model.double().train()


def rows() -> dict[str, torch.Tensor]:
    """Two rows, one of them padded, longer than the window."""
    ids = torch.arange(3, 43).reshape(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def outcome(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def both(batch: dict[str, Any]) -> tuple[Attached, Any]:
    """What is attached after a call that has to be the stock one's."""
    model = model_of()
    loss, gradients = outcome(model, batch)
    attached = attach(model, fused=True)
    ours, our_gradients = outcome(model, batch)
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)  # norms of the stock layers are in float32
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm()
    return attached, model


@pytest.mark.parametrize(
    "more",
    [{}, {"token_type_ids": torch.zeros(2, 20, dtype=torch.int64)}, {"attention_mask": None}],
    ids=["text", "types", "no mask"],
)
def test_text_is_packed_and_fused(more: dict[str, Any]) -> None:
    attached, model = both(rows() | more)
    assert attached.installed is not None
    assert attached.installed.fallbacks == {}
    assert (attached.door.packed, attached.door.stock) == (1, {})
    attached.undo()
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_a_picture_takes_the_stock_way() -> None:
    batch = rows()
    types = torch.zeros(2, 20, dtype=torch.int64)
    batch["input_ids"][:, 4:8], types[:, 4:8] = IMAGE, 1
    torch.manual_seed(1)
    attached, _ = both(batch | {"token_type_ids": types, "pixel_values": torch.randn(2, 3, 28, 28).double()})
    assert attached.door.packed == 0
    assert attached.installed is not None
    assert sum(attached.installed.fallbacks.values()) == 2


def test_tokens_of_pictures_without_one_take_the_stock_way() -> None:
    types = torch.zeros(2, 20, dtype=torch.int64)
    types[:, 4:8] = 1
    attached, model = both(rows() | {"token_type_ids": types})
    assert attached.door.packed == 0
    outcome(model, rows())  # nothing of that call is left
    assert attached.door.packed == 1
