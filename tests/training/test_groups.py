"""Groups of parameters: who gets which rate and decay, what is refused, and what a checkpoint relies on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.tiny import tiny_llama
from tunesmith.contracts.errors import UserError
from tunesmith.distributed.single import SingleDevice
from tunesmith.models.adapter import add_lora, train_all
from tunesmith.training.groups import Pattern, parameter_groups
from tunesmith.training.optim import Schedule, build_optimizer
from tunesmith.training.state import join_state, split_state

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["q_proj"], "seed": 1}


@pytest.fixture(scope="module")
def adapted() -> Any:
    return add_lora(tiny_llama(), modules_to_save=["embed_tokens"], **LORA)


def values(model: nn.Module, *patterns: Pattern, **options: Any) -> dict[str, tuple[float, float]]:
    """Peak rate and decay of each trained parameter, where those of most are 1e-3 and 0.1."""
    groups = parameter_groups(model, 0.1, learning_rate=1e-3, patterns=patterns, **options)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(p)]: (1e-3 * group.get("lr_ratio", 1.0), group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    assert len(found) == sum(len(group["params"]) for group in groups), "each parameter is in one group"
    return found


def test_the_first_pattern_that_matches_counts() -> None:
    found = values(
        tiny_llama(),
        Pattern("embed_tokens", learning_rate=5e-5, weight_decay=0.0),
        Pattern(r"layers\.0\.", learning_rate=2e-4),
        Pattern("norm|q_proj", weight_decay=0.3),
    )
    assert found["model.embed_tokens.weight"] == pytest.approx((5e-5, 0.0))
    assert found["model.layers.0.self_attn.q_proj.weight"] == pytest.approx((2e-4, 0.1)), "the earlier one"
    assert found["model.layers.0.input_layernorm.weight"] == pytest.approx((2e-4, 0.0)), "a vector, as ever"
    assert found["model.layers.1.self_attn.q_proj.weight"] == pytest.approx((1e-3, 0.3))
    assert found["model.layers.1.input_layernorm.weight"] == pytest.approx((1e-3, 0.3)), "it was asked for"
    assert found["model.layers.1.mlp.up_proj.weight"] == pytest.approx((1e-3, 0.1))


def test_patterns_beside_lora_plus_and_a_rate_of_embeddings(adapted: Any) -> None:
    """LoRA+ is a ratio, so it holds within a pattern; a rate of a pattern is in place of that of embeddings."""
    options = {"loraplus_lr_ratio": 16.0, "embedding_learning_rate": 2e-5}
    found = values(adapted, Pattern(r"layers\.0\.", learning_rate=1e-4), **options)
    rates = {
        "layers.0.self_attn.q_proj.lora_A": 1e-4,
        "layers.0.self_attn.q_proj.lora_B": 16e-4,
        "layers.1.self_attn.q_proj.lora_A": 1e-3,
        "layers.1.self_attn.q_proj.lora_B": 16e-3,
        "embed_tokens": 2e-5,
    }
    assert len(found) == len(rates)
    for part, rate in rates.items():
        assert [own for name, (own, _) in found.items() if part in name] == pytest.approx([rate])
    found = values(adapted, Pattern("embed_tokens", learning_rate=3e-5), **options)
    assert [own for name, (own, _) in found.items() if "embed_tokens" in name] == pytest.approx([3e-5])
    found = values(adapted, Pattern("embed_tokens", weight_decay=0.5), **options)
    assert [own for name, own in found.items() if "embed_tokens" in name] == [pytest.approx((2e-5, 0.5))]


def test_a_tied_parameter_is_found_under_each_of_its_names() -> None:
    rate, _ = values(tiny_llama(), Pattern("lm_head", learning_rate=5e-5))["model.embed_tokens.weight"]
    assert rate == pytest.approx(5e-5)


@pytest.mark.parametrize(
    ("patterns", "said", "near"),
    [
        (["q_prj"], "train.groups.0.match: 'q_prj' matches no parameter", "self_attn.q_proj.lora_A"),
        (["embed_token$"], "'embed_token$' matches no parameter", "embed_tokens"),
        ([r"\.k_proj\.weight"], "matches only what does not train, such as base_model", "lora_A"),
        (
            ["lora", "lora_A"],
            "train.groups.1.match: 'lora_A' matches nothing that the groups before it",
            "lora_A",
        ),
    ],
)
def test_a_pattern_that_gets_nothing_is_refused(
    adapted: Any, patterns: list[str], said: str, near: str
) -> None:
    with pytest.raises(UserError) as caught:
        values(adapted, *(Pattern(match, learning_rate=1e-5) for match in patterns))
    assert said in str(caught.value)
    nearest = (
        str(caught.value.hint).removeprefix("The nearest names that train: ").removesuffix(".").split(", ")
    )
    assert near in nearest[0]
    trained = {name for name, p in adapted.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert set(nearest) <= trained


def test_every_pattern_that_gets_nothing_is_named(adapted: Any) -> None:
    with pytest.raises(UserError) as caught:
        values(adapted, Pattern("x_x", weight_decay=0.0), Pattern("lora", weight_decay=0.0), Pattern("y_y"))
    assert "groups.0" in str(caught.value)
    assert "groups.1" not in str(caught.value)
    assert "groups.2" in str(caught.value)


def test_frozen_parameters_are_in_no_group() -> None:
    model = train_all(tiny_llama(), ["model.embed_tokens.*"], torch.float32)
    assert "model.embed_tokens.weight" not in values(model, Pattern("proj", learning_rate=1e-4))


def test_the_order_of_groups_is_that_of_checkpoints_written_before_there_were_patterns(adapted: Any) -> None:
    """By rate, matrices before vectors, also where both decay alike; patterns come after, in their order."""
    model = tiny_llama()
    plain = parameter_groups(model, 0.0, learning_rate=1e-3)
    assert [group["params"][0].ndim for group in plain] == [2, 1]
    rates = parameter_groups(
        adapted, 0.1, learning_rate=1e-3, loraplus_lr_ratio=16.0, embedding_learning_rate=1e-5
    )
    assert [group.get("lr_ratio", 1.0) for group in rates] == pytest.approx([0.01, 1.0, 16.0])
    patterns = [Pattern("embed", learning_rate=1.0), Pattern("norm", learning_rate=1e-9)]
    groups = parameter_groups(model, 0.1, learning_rate=1e-3, patterns=patterns)
    assert [group.get("lr_ratio", 1.0) for group in groups] == pytest.approx([1.0, 1e3, 1e-6])


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon", "sgd"])
def test_a_run_goes_on_with_another_rate_and_groups_keep_theirs(name: str) -> None:
    def backend(rate: float) -> SingleDevice:
        model = tiny_llama().train()
        patterns = [Pattern("embed", learning_rate=5e-5), Pattern(r"layers\.1\.", learning_rate=3e-4)]
        optimizer = build_optimizer(
            name, model, learning_rate=rate, weight_decay=0.1, betas=(0.9, 0.99), patterns=patterns
        )
        return SingleDevice(model, optimizer, torch.device("cpu"), torch.float32)

    first = backend(1e-4)
    for parameter in first.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.optimizer.step()
    later = backend(1e-3)  # the rate of most is now above those of the patterns
    later.load_state(join_state("o", *split_state("o", first.state())))
    Schedule("constant", learning_rate=1e-3, warmup=0.0, total_steps=4).apply(later.optimizer, 0)
    rates = {p: group["lr"] for group in later.optimizer.param_groups for p in group["params"]}
    for parameter_name, parameter in later.module.named_parameters():
        own = 5e-5 if "embed" in parameter_name else 3e-4 if ".1." in parameter_name else 1e-3
        assert rates[parameter] == pytest.approx(own)


def test_parameters_of_a_pattern_are_trained_with_its_rate() -> None:
    """AdamW's first step is the rate in the direction of the gradient's sign."""
    model = tiny_llama().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    patterns = [Pattern("embed", learning_rate=5e-5), Pattern("norm", learning_rate=3e-3)]
    optimizer = build_optimizer(
        "adamw", model, learning_rate=1e-3, weight_decay=0.0, betas=(0.9, 0.99), patterns=patterns
    )
    Schedule("constant", learning_rate=1e-3, warmup=0.0, total_steps=4).apply(optimizer, 0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        own = 5e-5 if "embed" in name else 3e-3 if "norm" in name else 1e-3
        # float32 holds weights near 1 to 6e-8, an eight-hundredth of the smallest step
        torch.testing.assert_close(
            before[name] - parameter.detach(), torch.full_like(parameter, own), rtol=0, atol=1e-7
        )
