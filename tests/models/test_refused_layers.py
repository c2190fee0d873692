"""What a fused layer leaves to the stock layer because it computes something else: attention in both directions, a
cache that is to be filled, adapters on norms, and whatever somebody put into a layer."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import nn

from tests.models.test_families import packed_row, tiny
from tunesmith.models.attach import attach
from tunesmith.models.attention import packed_attention
from tunesmith.models.install import Installed, install
from tunesmith.planning.architectures import find_architecture

IDS = torch.randint(3, 384, (2, 17), generator=torch.Generator().manual_seed(0))
PARTS = ["self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm", "self_attn.q_norm"]

# stock norms are float32 in a float64 model
TOLERANCE = 3e-6


def attached(model: Any) -> Any:
    """With the door before the layers, as trainers that are not ours have it."""
    return attach(model, fused=True).installed


def plain(family: str = "qwen3", **changes: Any) -> Any:
    """A model without an adapter, in evaluation mode."""
    return tiny(family, changes, torch.float64, adapter=False)


def logits(model: Any, **given: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS, **{"use_cache": False} | given).logits
    return result.detach()


def distance(ours: torch.Tensor, stock: torch.Tensor) -> float:
    return float((ours - stock).norm() / stock.norm())


def check_same(model: Any, expected: torch.Tensor, **given: Any) -> Installed:
    installed = install(model)
    assert distance(logits(model, **given), expected) < TOLERANCE
    return installed


# ---------------------------------------------------------------------- both directions


@pytest.mark.parametrize("fused", [install, attached])
def test_a_model_that_attends_in_both_directions_is_not_fused(fused):
    model = plain("qwen2", is_causal=False)
    stock = logits(model)
    fused(model)
    assert distance(logits(model), stock) < TOLERANCE
    assert distance(logits(plain("qwen2")), stock) > 0.01
    assert find_architecture(model.config) == (None, "it attends in both directions")


def test_a_call_for_both_directions_is_the_stock_layers():
    model = plain()
    stock = logits(model, is_causal=False)
    assert distance(logits(model), stock) > 0.01
    installed = check_same(model, stock, is_causal=False)
    assert installed.fallbacks == {"attention in both directions": 2}


def test_an_attention_that_looks_both_ways_is_the_stock_layers():
    model = plain()
    installed = install(model)
    model.model.layers[1].self_attn.is_causal = False
    logits(model)
    assert installed.fallbacks == {"attention in both directions": 1}


# ---------------------------------------------------------------------- a cache


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
def test_a_cache_is_filled_while_gradients_are_on(training):
    model = plain().train(training)
    expected = logits(model)
    installed = install(model)
    first = model(IDS[:, :10], use_cache=True)
    second = model(IDS[:, 10:], past_key_values=first.past_key_values, use_cache=True)
    assert first.past_key_values.get_seq_length() == 17
    assert distance(torch.cat([first.logits, second.logits], 1).detach(), expected) < TOLERANCE
    assert installed.fallbacks.total() == 4


def test_checkpointing_drops_the_cache_as_transformers_does():
    model = plain().train()
    installed = install(model)
    model.gradient_checkpointing_enable()
    assert model(IDS).past_key_values.get_seq_length() == 0
    assert installed.fallbacks == {}
    with torch.no_grad():
        assert model(IDS).past_key_values.get_seq_length() == 17
    model.train().gradient_checkpointing_disable()
    assert model(IDS).past_key_values.get_seq_length() == 17


# ---------------------------------------------------------------------- adapters on norms


def adapted(model: Any, config: Any) -> Any:
    """With an adapter whose norms are others than the model's."""
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "ln_tuning_layers" in name or "modules_to_save" in name:
            parameter.data += torch.linspace(-0.5, 0.5, parameter.numel())
    return model


NORMS = LNTuningConfig(target_modules=["input_layernorm"])


def test_layers_whose_norms_have_an_adapter_are_not_fused():
    model = adapted(plain(), NORMS)
    installed = check_same(model, logits(model))
    assert installed.fused == []
    assert installed.stock[0][1] == ("input_layernorm: it is a LNTuningLayer, not what its family has there")
    model(IDS).logits.sum().backward()


def test_an_adapter_that_comes_to_norms_later_takes_the_stock_way():
    expected = logits(adapted(plain(), NORMS))
    model = plain()
    installed = install(model)
    assert distance(logits(adapted(model, NORMS)), expected) < TOLERANCE
    assert installed.fallbacks == {"input_layernorm: it is a LNTuningLayer": 2}


def test_norms_that_train_as_copies_beside_an_adapter_stay_fused():
    options = {"r": 3, "target_modules": "all-linear", "modules_to_save": ["input_layernorm"]}
    model = adapted(plain(), LoraConfig(**options))
    stock = logits(model)
    with model.disable_adapter():
        without = logits(model)
    assert distance(without, stock) > 0.01
    installed = check_same(model, stock)
    with model.disable_adapter():
        assert distance(logits(model), without) < TOLERANCE
    assert installed.fallbacks == {}
    assert installed.stock == []


# ---------------------------------------------------------------------- what somebody put into a layer


def register(kind: str, part: nn.Module) -> Any:
    if kind == "pre":
        return part.register_forward_pre_hook(lambda _, args: tuple(2 * arg for arg in args))
    if kind == "backward":
        return part.register_full_backward_hook(lambda _, grads, __: tuple(2 * grad for grad in grads))
    return part.register_forward_hook(lambda *_: None)


HOOKS = [("forward", part) for part in PARTS]
HOOKS += [("pre", "mlp"), ("pre", "input_layernorm"), ("backward", "mlp")]


@pytest.mark.parametrize(("kind", "part"), HOOKS)
def test_hooks_inside_a_layer_run(kind, part):
    """Registered before the layer is fused, and after; once they are gone it is fused again."""
    model = plain()
    place = model.model.layers[0].get_submodule(part)
    handle = register(kind, place)
    stock = logits(model)
    installed = check_same(model, stock)
    reason = f"{part}: it has hooks, which a fused layer does not run"
    assert installed.stock == [("layers.0", reason)]
    installed.undo()
    handle.remove()
    installed = install(model)
    handle = register(kind, place)
    assert distance(logits(model), stock) < TOLERANCE
    assert installed.fallbacks == {reason: 1}
    handle.remove()
    logits(model)
    assert installed.fallbacks.total() == 1


def test_hooks_of_a_deep_copy_are_its_own():
    model = plain()
    installed = install(model)
    copied = copy.deepcopy(model)
    register("pre", copied.model.layers[0].mlp)
    logits(model)
    assert installed.fallbacks == {}
    logits(copied)
    assert installed.fallbacks.total() == 1


def test_recorders_that_transformers_leaves_in_a_model_do_not_stop_fused_layers():
    model = plain()
    installed = install(model)
    model(IDS, output_hidden_states=True, use_cache=False)
    assert model.model.layers[0].self_attn._forward_hooks
    logits(model)
    assert installed.fallbacks == {}


class Foreign(nn.Module):
    """An MLP of somebody's with the usual names."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        vars(self)["_modules"] = vars(mlp)["_modules"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


def _exchange(name: str, make: Any, layer: Any) -> None:
    layer.set_submodule(name, make(layer.get_submodule(name)))


_foreign = partial(_exchange, "mlp", Foreign)
_other_activation = partial(_exchange, "mlp.act_fn", lambda _: nn.ReLU())
_other_norm = partial(_exchange, "input_layernorm", lambda _: nn.LayerNorm(32, dtype=torch.float64))


def _patched(path: str, parent: Any) -> None:
    module = parent.get_submodule(path)
    stock = module.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    module.forward = doubled


REPLACED = {
    "foreign": (_foreign, "mlp: it is a Foreign, not what its family has there"),
    "activation": (_other_activation, "mlp.act_fn: it is a ReLU, not what its family has there"),
    "norm": (_other_norm, "input_layernorm: it is a LayerNorm, not what its family has there"),
    "layer": (partial(_patched, ""), "its forward was replaced"),
    **{part: (partial(_patched, part), f"{part}: its forward was replaced") for part in PARTS},
}


@pytest.mark.parametrize("fused", [install, attached])
@pytest.mark.parametrize("case", REPLACED)
def test_replaced_computation_is_not_fused(case, fused):
    """The door replaces the forward of attention modules as well, and may not hide what was there."""
    replace, reason = REPLACED[case]
    model = plain()
    before = logits(model)
    replace(model.model.layers[0])
    stock = logits(model)
    assert distance(before, stock) > 1e-3
    installed = fused(model)
    assert distance(logits(model), stock) < TOLERANCE
    assert installed.stock == [("layers.0", reason)]


def test_parts_that_are_exchanged_later_take_the_stock_way():
    model = plain()
    installed = install(model)
    layer = model.model.layers[0]
    _other_activation(layer)
    logits(model)
    _foreign(layer)
    logits(model)
    assert installed.fallbacks == {"mlp.act_fn: it is a ReLU": 1, "mlp: it is a Foreign": 1}


def test_a_last_norm_with_a_forward_of_its_own_keeps_it():
    model = plain()
    _patched("norm", model.model)
    check_same(model, logits(model))


# ---------------------------------------------------------------------- accelerate


@pytest.mark.parametrize("fused", [install, attached])
def test_hooks_of_accelerate_stay_and_the_stock_layer_still_runs(fused):
    """They are on every module of a model that is spread over devices."""
    model = plain()
    stock = logits(model)
    for module in [*model.model.layers.modules()][1:]:
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    installed = fused(model)
    assert installed.stock == []
    row = packed_row()
    with packed_attention(model, "sdpa"):
        model(**row, use_cache=False)
    assert installed.fallbacks == {}
    assert distance(logits(model, use_cache=True), stock) < TOLERANCE
    assert installed.fallbacks == {"a KV cache": 2}
