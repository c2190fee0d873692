"""What `all-linear` means where linear layers are not all there is: routers, stacked experts, other layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig

from tests.models.test_door_walk import LATENT
from tests.support.tiny import tiny_llama
from tunesmith.contracts.errors import UserError
from tunesmith.models.adapter import add_lora, load_lora
from tunesmith.models.adapter_targets import all_linear, for_peft, left_out, left_out_rows, taken_for_experts

_SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj"}


def tiny(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(_SMALL | changes))
    return AutoModelForCausalLM.from_config(config).eval()


def adapted(model: Any, **changes: Any) -> Any:
    values = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": "all-linear", "seed": 1}
    return add_lora(model, **(values | changes))


def carrying(model: Any) -> set[str]:
    """Last parts of the names of what carries an adapter."""
    base = model.get_base_model()
    return {name.rpartition(".")[2] for name, module in base.named_modules() if hasattr(module, "lora_A")}


def trains(model: Any) -> None:
    """One step, after which every matrix of the adapter has moved or could: its gradient is there."""
    ids = torch.arange(3, 15)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert parameters
    assert not [name for name, p in parameters.items() if p.grad is None]
    with torch.no_grad():
        for parameter in parameters.values():
            parameter -= 0.1 * parameter.grad + 0.01


@pytest.mark.parametrize(
    ("family", "changes", "names", "left"),
    [
        ("phimoe", {}, _ATTENTION, ["experts", "routers"]),
        ("llama4_text", {"intermediate_size_mlp": 48}, _ATTENTION | _MLP, ["experts", "routers"]),
        ("mixtral", {}, _ATTENTION, ["experts"]),
        ("gpt_oss", {}, _ATTENTION, ["experts"]),
        ("qwen3_moe", {}, _ATTENTION, ["experts"]),
        ("qwen2_moe", {"shared_expert_intermediate_size": 16},
         _ATTENTION | _MLP | {"shared_expert_gate"}, ["experts"]),
        ("glm4_moe", {}, _ATTENTION, ["experts", "down_proj, gate_proj, up_proj"]),
        ("hunyuan_v1_moe", {"moe_topk": 2}, _ATTENTION, ["experts", "routers", "down_proj, gate_proj, up_proj"]),
        ("jetmoe", {"kv_channels": 8}, {"kv_proj"}, ["experts", "routers"]),
        ("deepseek_v4", LATENT, {"kv_proj", "o_b_proj", "q_a_proj", "q_b_proj"} | _MLP, ["experts", "o_a_proj"]),
        ("deepseek_v32", LATENT, {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"},
         ["experts", "indexers", "down_proj, gate_proj, up_proj"]),
        ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1},
         _ATTENTION | _MLP | {"in_proj", "x_proj", "out_proj"}, ["experts", "dt_proj"]),
        ("mamba", {"state_size": 8}, {"in_proj", "x_proj"}, ["dt_proj", "out_proj"]),
    ],
)  # fmt: skip
def test_all_linear_leaves_out_routers_and_what_an_adapter_cannot_stand_on(
    family: str, changes: dict[str, Any], names: set[str], left: list[str]
) -> None:
    model = adapted(tiny(family, **changes))
    assert carrying(model) == names
    rows = left_out_rows(model.get_base_model(), "all-linear")
    assert [what for what, _, _ in rows] == left
    assert {how for _, how, _ in rows} == {"no adapter"}
    if family != "deepseek_v4":  # rows of 12 tokens are shorter than what it compresses
        trains(model)


def test_a_dense_model_is_as_peft_has_it() -> None:
    model = tiny_llama()
    assert for_peft(model, None) == "all-linear"
    assert left_out_rows(model, "all-linear") == []
    assert len(all_linear(model)) == 14


def test_a_linear_layer_of_a_family_s_own_that_is_one_gets_an_adapter() -> None:
    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    model = adapted(AutoModelForCausalLM.from_config(config))
    assert carrying(model) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    trains(model)


@pytest.mark.parametrize(
    ("family", "experts", "changes"),
    [
        ("mixtral", ["w1", "w2", "w3"], {}),
        ("qwen3_moe", ["gate_proj", "up_proj", "down_proj"], {}),
        ("deepseek_v3", ["gate_proj", "up_proj", "down_proj"], LATENT),
    ],
)
def test_experts_that_are_named_train_and_load_again(
    family: str, experts: list[str], changes: dict[str, Any], tmp_path: Path
) -> None:
    targets = ["o_proj", *experts]
    model = adapted(tiny(family, **changes), targets=targets)
    assert carrying(model) == {"o_proj", "experts", "base_layer"}  # two parameters of one module, so nested
    trains(model)
    model.save_pretrained(tmp_path)
    again = load_lora(tiny(family, **changes), str(tmp_path))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    # and where dense layers have the name as well, it is said that they get none
    rows = left_out_rows(model.get_base_model(), targets)
    assert [what for what, _, _ in rows] == (
        ["down_proj, gate_proj, up_proj"] if family == "deepseek_v3" else []
    )


def test_a_router_that_is_named_is_refused() -> None:
    for targets in (["q_proj", "router"], r".*\.(q_proj|router)"):
        with pytest.raises(
            UserError, match=r"layers.0.mlp.router is a PhimoeTopKRouter, which computes more than a product"
        ):
            adapted(tiny("phimoe"), targets=targets)


def test_experts_of_a_family_whose_names_peft_does_not_know_are_refused() -> None:
    with pytest.raises(UserError, match="no linear layer of GptOssForCausalLM is called 'down_proj'"):
        adapted(tiny("gpt_oss"), targets=["q_proj", "down_proj"])
    with pytest.raises(UserError, match="no linear layer of LlamaForCausalLM is called 'w1'"):
        adapted(tiny_llama(), targets=["w1"])


def test_names_are_taken_for_experts_by_family() -> None:
    assert taken_for_experts("qwen3_moe", "gate_proj")
    assert taken_for_experts("mixtral", "w2")
    assert not taken_for_experts("qwen3_moe", "q_proj")
    assert not taken_for_experts("llama", "gate_proj")


def with_a_second_q_proj() -> Any:
    model = tiny_llama()
    model.model.layers[0].router = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    return model


def test_layers_whose_names_end_alike_are_told_apart() -> None:
    model = with_a_second_q_proj()
    assert list(left_out(model)) == ["model.layers.0.router.q_proj"]
    assert len(for_peft(model, None)) == 14
    found = adapted(model).get_base_model()
    assert not hasattr(found.model.layers[0].router["q_proj"], "lora_A")
    assert hasattr(found.model.layers[0].self_attn.q_proj, "lora_A")
    for layers in (1, [1]):
        found = adapted(with_a_second_q_proj(), layers_to_transform=layers).get_base_model()
        assert not hasattr(found.model.layers[0].self_attn.q_proj, "lora_A")
        assert hasattr(found.model.layers[1].self_attn.q_proj, "lora_A")


def test_a_model_with_nothing_to_adapt_is_refused() -> None:
    model = tiny_llama()
    model.model.layers = nn.ModuleList()
    with pytest.raises(UserError, match="no linear layer that an adapter can be put on"):
        adapted(model)
