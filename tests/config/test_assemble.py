"""Assembling a run: `memory.policy` reaches the layers, and is refused where nothing could follow it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from tests.support.runs import build, run_settings
from tests.support.tiny import tiny_llama
from tunesmith.config import assemble, summary
from tunesmith.config.load import load_settings
from tunesmith.contracts.errors import UserError
from tunesmith.models.adapter import add_lora
from tunesmith.models.attention import packed_attention
from tunesmith.models.head import CausalModel
from tunesmith.models.install import Installed, install
from tunesmith.models.policy import OF_TOKENS, POLICIES
from tunesmith.models.probe import fixed_bytes, policy_costs
from tunesmith.planning.fit import STOCK_POLICIES, USABLE, Fit
from tunesmith.settings.run import PolicyName, RunSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FUSED_ONLY = [name for name in OF_TOKENS if name not in STOCK_POLICIES]
LAYERS = 8


def settings(policy: str) -> RunSettings:
    return load_settings(
        {
            "model": {"name": "x"},
            "data": {"train": [{"path": "a"}]},
            "train": {"sequence_length": 100},
            "memory": {"policy": policy},
        }
    )


def fused_model(**changes: Any) -> tuple[CausalModel, Installed]:
    model = tiny_llama(num_hidden_layers=LAYERS, **changes)
    model = add_lora(model, rank=2, alpha=4, dropout=0.0, targets="all-linear", seed=0)
    return CausalModel(model, torch.float32), install(model)


def fitted(policy: str, causal: CausalModel, installed: Installed | None) -> Fit:
    """`_fit` on the CPU as if it had a row of 100 tokens to place."""
    backend: Any = SimpleNamespace(device=CPU, autocast=lambda: torch.autocast("cpu", enabled=False))
    data: Any = SimpleNamespace(corpus=SimpleNamespace(lengths=torch.tensor([7, 60]).numpy()))
    with packed_attention(causal.base, "sdpa"):
        return assemble._fit(settings(policy), causal, backend, data, installed)


def test_the_setting_names_every_policy_in_their_order():
    assert list(get_args(PolicyName)) == ["auto", *OF_TOKENS]
    assert list(summary._KEPT) == list(POLICIES)
    assert set(STOCK_POLICIES) <= set(OF_TOKENS)


@pytest.mark.parametrize("policy", OF_TOKENS)
def test_a_policy_reaches_the_fused_layers(policy):
    causal, installed = fused_model()
    fit = fitted(policy, causal, installed)
    assert fit.policy == policy
    assert installed.policy is POLICIES[policy]


@pytest.mark.parametrize("policy", STOCK_POLICIES)
def test_a_policy_reaches_stock_layers(policy):
    causal = CausalModel(tiny_llama(), torch.float32)
    assert fitted(policy, causal, None).policy == policy
    assert causal.base.is_gradient_checkpointing == (policy == "recompute")


@pytest.mark.parametrize("policy", ["recompute", "offload"])
def test_a_policy_that_recomputes_layers_reaches_those_that_are_stock_among_the_fused(policy):
    model = add_lora(
        tiny_llama(num_hidden_layers=3), rank=2, alpha=4, dropout=0.0, targets="all-linear", seed=0
    )
    layers = model.get_base_model().model.layers
    layers[1].__class__ = type("Other", (type(layers[1]),), {})  # not one of transformers
    installed = install(model)
    fitted(policy, CausalModel(model, torch.float32), installed)
    assert [layer.gradient_checkpointing for layer in layers] == [False, True, False]
    assert installed.policy is POLICIES[policy]


def test_auto_takes_the_fastest_policy_under_which_the_row_fits(monkeypatch):
    causal, installed = fused_model()
    with packed_attention(causal.base, "sdpa"):
        costs = policy_costs(causal, torch.autocast("cpu", enabled=False), installed)
    fixed = fixed_bytes(causal, "adamw", installed)
    chosen = []
    for cost in costs:
        free = cost.device_bytes * 100 / USABLE + fixed
        monkeypatch.setattr(assemble, "_free_bytes", lambda device, free=free: int(free) + 1)
        fit = fitted("auto", causal, installed)
        assert installed.policy.name == fit.policy
        # what travels takes less of the device than some of what is slower
        fastest = next(other for other in costs if other.device_bytes <= cost.device_bytes)
        assert fit.policy == fastest.name
        assert fit.tokens == int(100 * cost.device_bytes / fastest.device_bytes)
        chosen.append(fit.policy)
    assert chosen == [
        "keep_all", "keep", "keep_offload_attention", "keep_offload_attention", "offload_attention",
        "offload_attention", "offload_attention", "offload", "offload_attention",
    ]  # fmt: skip
    monkeypatch.setattr(assemble, "_free_bytes", lambda device: 0)
    assert fitted("auto", causal, installed).policy == "offload"


@pytest.mark.parametrize("policy", FUSED_ONLY)
def test_a_policy_of_fused_layers_is_refused_on_a_cpu_before_anything_is_read(policy, tmp_path: Path):
    values = run_settings(tmp_path / "no model", tmp_path, memory={"policy": policy})
    with pytest.raises(UserError, match=f"memory.policy: {policy} needs fused layers on a GPU") as caught:
        build(values)
    assert caught.value.hint == "Use auto, keep or recompute."


@pytest.mark.parametrize("policy", FUSED_ONLY)
def test_a_policy_of_fused_layers_is_refused_where_all_are_stock_with_the_reason(policy):
    model = add_lora(tiny_llama(), rank=2, alpha=4, dropout=0.0, targets="all-linear", seed=0, use_dora=True)
    installed = install(model)
    with pytest.raises(UserError, match=r"none of this model is fused: .*not plain LoRA\."):
        assemble._check_policy(settings(policy), CUDA, installed)


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_every_policy_is_taken_where_layers_are_fused(policy):
    assemble._check_policy(settings(policy), CUDA, None)
    assemble._check_policy(settings(policy), CUDA, fused_model()[1])


@pytest.mark.parametrize("policy", ["auto", *STOCK_POLICIES])
def test_what_stock_layers_have_is_taken_everywhere(policy):
    assemble._check_policy(settings(policy), CPU, None)
    assemble._check_policy(settings(policy), CUDA, install(tiny_llama()))
