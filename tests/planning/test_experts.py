"""Mixtures of experts against the models that transformers builds: what is linear, in 4 bits, and adapted of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.test_families import TINY
from tests.planning.test_read_facts import OTHERS, built, elements, written
from tunesmith.models.adapter_targets import all_linear
from tunesmith.models.loader import load_model
from tunesmith.planning.amounts import LayerAmounts
from tunesmith.planning.bytes import fixed_bytes, matrix_bytes
from tunesmith.planning.facts import Work, trained_parameters
from tunesmith.planning.known_models import published_config
from tunesmith.planning.layer_bytes import layer_bytes
from tunesmith.planning.layer_sizes import Sizes
from tunesmith.planning.read_facts import read_facts

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}

MIXTURES: dict[str, dict[str, Any]] = {
    **{family: OTHERS[family] for family in ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8},
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8},
    "phimoe": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8},
    "minimax_m2": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8},
    "flex_olmo": {"num_experts": 6, "num_experts_per_tok": 2, "head_dim": 8},
    "glm4_moe": {**_EXPERTS, "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "solar_open": {**_EXPERTS, "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 0},
    "dots1": {
        **_EXPERTS,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
}
"""Families whose sizes can be read from their config."""


_WEIGHS_EXPERTS = re.compile(r"(^|[._])(gate|router)$")


def linear(model: nn.Module) -> int:
    """Elements of a model's linear layers, but for the head and those that weigh experts."""
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and not _WEIGHS_EXPERTS.search(name)
    )


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_no_linear_layers(family: str) -> None:
    """Where a family comes to hold each expert in layers of its own, its facts have to learn it."""
    config = AutoConfig.for_model(family, **TINY | MIXTURES[family])
    facts = read_facts(written(config), "mixture")

    assert any(layer.expert_inner for layer in facts.layers)
    assert sum(layer.linear.matrix_parameters for layer in facts.layers) == linear(built(config))


def mixture(**changes: Any) -> Any:
    """A config whose matrices bitsandbytes reads rightly on a CPU: a dense layer, and one with a shared expert."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
        "mlp_only_layers": [0],
    }
    return AutoConfig.for_model("qwen2_moe", **TINY | sizes | changes)


def test_four_bits_hold_what_the_facts_call_linear(tmp_path: Path) -> None:
    config = mixture()
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device=torch.device("cpu"), dtype=torch.bfloat16, quantize="nf4")
    facts = read_facts(written(config), "mixture")
    states = {
        name: module.weight.quant_state.shape.numel()
        for name, module in model.named_modules()
        if hasattr(getattr(module, "weight", None), "quant_state")
    }
    gates = sum(count for name, count in states.items() if _WEIGHS_EXPERTS.search(name))

    assert sum(states.values()) - gates == sum(layer.linear.matrix_parameters for layer in facts.layers)
    assert gates == 64  # of the one shared expert
    in_bits = {False: 0, True: 0}
    for name, parameter in model.named_parameters():
        in_bits[name.removesuffix(".weight") in states] += parameter.nbytes
    counted = sum(layer.linear.matrix_parameters for layer in facts.layers)
    assert in_bits[True] == (counted + gates) // 2
    assert in_bits[False] == 2 * (facts.parameters - counted - gates)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "olmoe"])
def test_adapters_are_on_linear_layers(family: str) -> None:
    config = AutoConfig.for_model(family, **TINY | MIXTURES[family])
    model = AutoModelForCausalLM.from_config(config)
    expected = sum(
        4 * (module.in_features + module.out_features)
        for name in all_linear(model)
        if not _WEIGHS_EXPERTS.search(name)
        for module in [model.get_submodule(name)]
    )
    facts, work = read_facts(written(config), "mixture"), Work((64,), 64, rank=4)

    assert trained_parameters(facts, work) == expected > 0
    assert sum(layer_bytes(layer, work, "keep").gradients for layer in facts.layers) >= 4 * expected


def test_mixtral_in_four_bits_is_its_experts_in_sixteen() -> None:
    """85 GiB: of 46.7 billion parameters 45.1 billion are experts'."""
    facts = read_facts(published_config("mistralai/Mixtral-8x7B-v0.1") or {}, "mixtral")
    experts = 32 * 8 * 3 * 4096 * 14336
    attention = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    rest = facts.parameters - experts - attention
    held = fixed_bytes(facts, Work((2048,), 2048, quantize="nf4")).weights

    assert held == pytest.approx(2 * (experts + rest) + attention * (0.5 + 1 / 64), rel=1e-4)
    assert 85 <= held / 2**30 < 85.2
    assert (
        matrix_bytes(0, 4096, "nf4", 2) == matrix_bytes(4096, 0, "nf4", 2) == 0
    )  # where nothing else is linear
    eight = fixed_bytes(facts, Work((2048,), 2048, quantize="int8")).weights
    assert eight == pytest.approx(2 * (experts + rest) + attention, rel=1e-4)


def test_only_linear_layers_are_unpacked():
    """Experts are there in the type that everything is computed in."""
    config = AutoConfig.for_model("qwen2_moe", **TINY | MIXTURES["qwen2_moe"])
    layers = read_facts(written(config), "mixture").layers
    bare = read_facts(published_config("mistralai/Mixtral-8x7B-v0.1") or {}, "mixtral").layers[0]
    work = Work((64,), 64, quantize="nf4")
    for layer in (*layers, bare):
        unpacked = LayerAmounts(layer, work, 64).weights()
        assert unpacked.moved == pytest.approx(layer.linear.matrix_parameters * (0.5 + 1 / 64 + 2))
    shared = next(layer for layer in layers if layer.expert_inner)
    beside = 2 * 16  # columns of the adapters of gate and up
    assert shared.inner - shared.expert_inner == 40
    assert Sizes(shared, work).weight("gate_up") == (2 * 40 + beside) * 32 * 2
    assert Sizes(bare, work).weight("gate_up") == Sizes(bare, work).weight("down") == 0
    assert LayerAmounts(bare, work, 64).weights().kernels == 3 + 1
    assert not Sizes(bare, work).adapted("down")
    full = replace(work, quantize="none", rank=0, adapted=())
    everything = bare.matrix_parameters * (4 + 2)
    assert LayerAmounts(bare, full, 64).weights().moved == pytest.approx(everything)


def test_all_of_an_expert_trains_with_everything() -> None:
    facts = read_facts(written(mixture()), "mixture")
    work = Work((64,), 64, rank=0, adapted=())

    assert trained_parameters(facts, work) == facts.parameters == elements(built(mixture()))
    assert fixed_bytes(facts, work).gradients == 4 * facts.parameters
