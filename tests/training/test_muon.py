"""Muon: which weights it takes, that its step is orthogonal and of AdamW's size, and what the others get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

from tests.support.tiny import tiny_llama
from tunesmith.contracts.errors import UserError
from tunesmith.models.adapter import train_all
from tunesmith.training.groups import Pattern
from tunesmith.training.muon import hidden_matrices
from tunesmith.training.optim import Schedule, build_optimizer

RATE = 1e-3
PROJECTIONS = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


def names_of(model: nn.Module) -> set[str]:
    taken = hidden_matrices(model)
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in taken}


@pytest.mark.parametrize("tied", [True, False])
def test_it_takes_the_weights_of_hidden_linear_layers(tied: bool) -> None:
    names = names_of(tiny_llama(tie_word_embeddings=tied))
    assert len(names) == 2 * len(PROJECTIONS), "neither embeddings nor the head"
    assert {name.split(".")[-2] for name in names} == PROJECTIONS


def test_it_takes_transposed_layers_and_no_table_of_positions() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16))
    assert {name.removeprefix("transformer.h.0.") for name in names_of(model)} == {
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    }


def test_experts_in_one_tensor_and_routers_are_left_to_adamw() -> None:
    config = MixtralConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=16, num_local_experts=2,
    )  # fmt: skip
    names = names_of(AutoModelForCausalLM.from_config(config))
    assert {name.split(".")[-2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def stepped(model: nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    """What one step takes from each parameter, in units of the rate."""
    optimizer = build_optimizer(
        "muon", model, learning_rate=RATE, weight_decay=0.0, betas=(0.9, 0.99), **options
    )
    Schedule("constant", learning_rate=RATE, warmup=0.0, total_steps=4).apply(optimizer, 0)
    generator = torch.Generator().manual_seed(3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return {name: (before[name] - p.detach()) / RATE for name, p in model.named_parameters()}


def test_a_step_is_orthogonal_and_as_large_as_that_of_adamw() -> None:
    """Five iterations bring singular values to about 1, between 0.6 and 1.3; 0.2·√max(rows, columns) is the scale."""
    model = tiny_llama()
    for name, change in stepped(model).items():
        if "_proj" in name:
            values = torch.linalg.svdvals(change / (0.2 * max(change.shape) ** 0.5))
            assert 0.6 < values.min() < values.max() < 1.3
            # AdamW's steps have 0.2 to 0.4 of its rate in the root mean square
            assert 0.12 < change.square().mean().sqrt() < 0.26
        else:  # AdamW's first step: the rate, in the direction of the sign; float32 rounds weights of 1 to 6e-8
            torch.testing.assert_close(change.abs(), torch.ones_like(change), rtol=0, atol=1e-3)


def test_a_pattern_reaches_both_parts() -> None:
    one, other = tiny_llama(), tiny_llama()
    plain = stepped(one)
    tenth = stepped(other, patterns=[Pattern(r"layers\.1\.", learning_rate=RATE / 10)])
    for name, change in tenth.items():
        expected = plain[name] / 10 if "layers.1." in name else plain[name]
        torch.testing.assert_close(change, expected, rtol=1e-2, atol=1e-3)


def test_a_frozen_matrix_is_left_and_none_at_all_is_refused() -> None:
    some = train_all(tiny_llama(), ["*mlp*"], torch.float32)
    assert {name.split(".")[-2] for name in names_of(some)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    none = train_all(tiny_llama(), ["*_proj*"], torch.float32)
    with pytest.raises(UserError, match="none of them trains"):
        build_optimizer("muon", none, learning_rate=RATE, weight_decay=0.0, betas=(0.9, 0.99))


def test_a_model_of_nothing_but_matrices_has_no_second_part() -> None:
    optimizer = build_optimizer(
        "muon", nn.Linear(8, 8, bias=False), learning_rate=RATE, weight_decay=0.0, betas=(0.9, 0.99)
    )
    assert list(optimizer.state_dict()) == ["muon"]
