"""What a token keeps between forward and backward: measured, in proportion, and without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.tiny import tiny_llama
from tunesmith.models import probe
from tunesmith.models.adapter import add_lora, train_all
from tunesmith.models.attention import packed_attention
from tunesmith.models.head import CausalModel
from tunesmith.models.probe import probe_batch, saved_bytes_per_token

NO_AUTOCAST = torch.autocast("cpu", enabled=False)


def measured(model: Any, autocast: torch.autocast = NO_AUTOCAST) -> float:
    causal = CausalModel(model, torch.float32)
    with packed_attention(causal.base, "sdpa"):
        return saved_bytes_per_token(causal, autocast)


def whole(**changes: Any) -> Any:
    return train_all(tiny_llama(**changes), []).train()


def test_twice_the_layers_keep_twice_as_much() -> None:
    one, two, four = (measured(whole(num_hidden_layers=n)) for n in (1, 2, 4))
    per_layer = two - one
    assert per_layer > 0
    assert four - two == pytest.approx(2 * per_layer, rel=0.01)


def test_a_wider_model_keeps_more_in_proportion() -> None:
    narrow = measured(whole())
    wide = measured(whole(hidden_size=64, intermediate_size=128))
    assert wide / narrow == pytest.approx(2, rel=0.1)


def test_at_least_what_the_linear_layers_need() -> None:
    # each keeps its input: qkv share one of 32 floats, o 32, gate and up share 32, down 64; times 2 layers
    assert measured(whole()) >= 2 * 4 * (32 + 32 + 32 + 64)


def test_it_does_not_depend_on_the_length_of_the_probe(monkeypatch) -> None:
    short = measured(whole())
    monkeypatch.setattr(probe, "PROBE_TOKENS", 256)
    assert measured(whole()) == pytest.approx(short, rel=0.02)


def test_parameters_are_not_counted() -> None:
    # the embedding of a large vocabulary is a parameter; only the ids of a token are kept for it
    assert measured(whole(vocab_size=38_400)) == pytest.approx(measured(whole()), rel=0.01)


def test_recomputation_keeps_less() -> None:
    model = whole(num_hidden_layers=8)
    kept = measured(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert measured(model) < kept / 3


def test_half_precision_keeps_less() -> None:
    full = measured(whole())
    assert measured(whole(), torch.autocast("cpu", dtype=torch.bfloat16)) < full


def test_nothing_is_left_behind() -> None:
    model = add_lora(tiny_llama(), rank=2, alpha=4, dropout=0.5, targets="all-linear", seed=0)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first = measured(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert measured(model) == first


def test_the_probe_is_a_batch_as_any_other() -> None:
    batch = probe_batch((5,))
    assert batch.lengths == (5,)
    assert batch.cu_seqlens.tolist() == [0, 5]
    assert batch.targets_S.tolist() == batch.ids_T[1:].tolist()
    assert batch.supervised == 4
