"""Optimizers and schedules: which parameters decay, and the learning rate of every step by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.support.tiny import tiny_llama
from tunesmith.models.adapter import add_lora
from tunesmith.training.groups import parameter_groups
from tunesmith.training.optim import OPTIMIZERS, SCHEDULES, Schedule, build_optimizer


def test_matrices_decay_and_vectors_do_not():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
    groups = parameter_groups(model, 0.1, learning_rate=1.0)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {p.ndim for p in groups[0]["params"]} == {2}
    assert {p.ndim for p in groups[1]["params"]} == {1}
    assert len(parameter_groups(model[1], 0.1, learning_rate=1.0)) == 1, "empty groups are left out"


def test_rates_of_lora_plus_and_of_embeddings():
    model = add_lora(
        tiny_llama(),
        rank=4,
        alpha=8.0,
        dropout=0.0,
        targets=["q_proj"],
        seed=1,
        modules_to_save=["embed_tokens"],
    )
    options = {"loraplus_lr_ratio": 16.0, "embedding_learning_rate": 1e-5}
    optimizer = build_optimizer(
        "sgd", model, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.9), **options
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    Schedule("constant", learning_rate=1e-3, warmup=4.0, total_steps=10).apply(optimizer, 0)
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [r for name, r in rates.items() if "lora_A" in name] == pytest.approx([1e-3 / 5] * 2)
    assert [r for name, r in rates.items() if "lora_B" in name] == pytest.approx([16e-3 / 5] * 2)
    assert [r for name, r in rates.items() if "embed_tokens" in name] == pytest.approx([1e-5 / 5])
    assert len(rates) == 2 * 2 + 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_quadratic_and_leaves_frozen_parameters(name):
    torch.manual_seed(0)
    model = nn.Linear(64, 80)
    model.bias.requires_grad_(False)
    bias = model.bias.clone()
    optimizer = build_optimizer(name, model, learning_rate=1e-2, weight_decay=0.0, betas=(0.9, 0.99))
    losses = []
    for _ in range(20):
        loss = model.weight.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(model.bias, bias)


def test_cosine_with_warmup_by_hand():
    schedule = Schedule("cosine", learning_rate=2.0, warmup=0.2, total_steps=10)
    # two steps of warm-up: a third and two thirds of the way; then half a cosine over eight steps
    assert [schedule.at(step) for step in (0, 1)] == pytest.approx([2 / 3, 4 / 3])
    for step in range(2, 10):
        assert schedule.at(step) == pytest.approx(1 + math.cos(math.pi * (step - 2) / 8))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_starts_positive_peaks_once_and_is_a_pure_function(name):
    schedule = Schedule(name, learning_rate=1e-3, warmup=3, total_steps=40)
    rates = [schedule.at(step) for step in range(40)]
    assert rates == [schedule.at(step) for step in range(40)]
    assert all(rate > 0 for rate in rates)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[:3] == sorted(rates[:3])
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_the_rate_reaches_every_group():
    model = nn.Linear(3, 3)
    optimizer = build_optimizer("sgd", model, learning_rate=1.0, weight_decay=0.1, betas=(0.0, 0.9))
    rate = Schedule("constant", learning_rate=0.5, warmup=0.0, total_steps=4).apply(optimizer, 2)
    assert rate == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
