"""Families without hand-written layers against the models that transformers builds: what is counted, what refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.contracts.errors import UserError
from tunesmith.planning.read_facts import read_facts

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 200}
USUAL = {**SIZES, "intermediate_size": 80, "num_key_value_heads": 2}
FALCON = {**SIZES, "num_kv_heads": 2, "multi_query": True, "new_decoder_architecture": True}


def built(family: str, sizes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """The config.json that `save_pretrained` writes, and elements of each parameter, without memory for weights."""
    config = AutoConfig.for_model(family, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    elements = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return json.loads(config.to_json_string()), elements


# ---------------------------------------------------------------------- what is counted

COUNTED: list[Any] = [
    pytest.param("arcee", USUAL, "", id="arcee"),
    pytest.param("arcee", USUAL | {"attention_bias": True, "mlp_bias": True}, "", id="arcee with biases"),
    pytest.param("jais2", USUAL, "", id="jais2"),
    pytest.param("apertus", USUAL, "act_fn", id="apertus"),
    pytest.param("apertus", USUAL | {"attention_bias": True}, "act_fn", id="apertus with biases"),
    pytest.param("falcon", FALCON, "", id="falcon"),
    pytest.param("falcon", FALCON | {"bias": True}, "", id="falcon with biases"),
    pytest.param(
        "falcon",
        FALCON | {"new_decoder_architecture": False, "num_kv_heads": 4, "parallel_attn": False},
        "",
        id="falcon of old with one head for keys and values",
    ),
    pytest.param("opt", SIZES | {"ffn_dim": 80, "word_embed_proj_dim": 48}, "embed_positions", id="opt"),
]
"""A family, its sizes, and a name in what is not counted: two numbers of an activation, a table of positions."""


@pytest.mark.parametrize(("family", "sizes", "uncounted"), COUNTED)
def test_all_parameters_are_counted(family, sizes, uncounted):
    config, elements = built(family, sizes)
    counted = {name: count for name, count in elements.items() if not uncounted or uncounted not in name}

    assert bool(uncounted) == (len(counted) < len(elements))
    assert read_facts(config, "tiny").parameters == sum(counted.values())


def test_an_mlp_without_a_gate_does_not_make_layer_norms_and_biases():
    config, _ = built("arcee", USUAL)
    layer = read_facts(config, "tiny").layers[0]

    assert (layer.gated, layer.gate_up_parts) == (False, 1)
    assert not any((layer.layer_norm, layer.norm_bias, layer.qkv_bias, layer.gate_up_bias, layer.down_bias))


# ---------------------------------------------------------------------- what is refused

PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 200}
REFUSED: list[Any] = [
    pytest.param(
        "gemma4_text",
        {**USUAL, **PER_LAYER},
        "embed_tokens_per_layer",
        "each of its layers has embeddings of its own (hidden_size_per_layer_input)",
        id="gemma4",
    ),
    pytest.param(
        "gemma3n_text",
        {"num_hidden_layers": 35, **PER_LAYER},
        "embed_tokens_per_layer",
        "each of its layers has embeddings of its own (hidden_size_per_layer_input)",
        id="gemma3n",
    ),
    pytest.param(
        "lfm2",
        USUAL | {"layer_types": ["conv", "full_attention", "conv"]},
        ".conv.",
        "some of its layers are convolutions in place of attention (conv_L_cache)",
        id="lfm2",
    ),
    pytest.param(
        "opt",
        SIZES | {"ffn_dim": 80, "word_embed_proj_dim": 24},
        "project_in",
        "its embeddings are projected to the width of its layers (word_embed_proj_dim)",
        id="opt-350m",
    ),
]
"""A family, its sizes, a name among its parameters that no decoder of the usual kind has, and what is said."""


@pytest.mark.parametrize(("family", "sizes", "unusual", "said"), REFUSED)
def test_what_is_no_usual_decoder_is_a_sentence(family, sizes, unusual, said):
    config, elements = built(family, sizes)

    assert any(unusual in name for name in elements)
    with pytest.raises(UserError) as caught:
        read_facts(config, "tiny")
    assert caught.value.message == f"No plan can be made from the config.json of tiny: {said}."


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"layer_types": ["full_attention", "conv", "full_attention"]},
            "its layer_types names conv, which is another kind of layer than attention",
        ),
        ({"altup_num_inputs": 4}, "its layers hand on several streams side by side (altup_num_inputs)"),
        *(
            ({key: [80] * 35}, f"its {key} is a list where one number for all layers should be")
            for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads")
        ),
    ],
)
def test_a_config_that_gives_another_layer_away(changes, said):
    with pytest.raises(UserError) as caught:
        read_facts({"model_type": "somebodys", **USUAL, **changes}, "tiny")

    assert caught.value.message == f"No plan can be made from the config.json of tiny: {said}."


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size_per_layer_input": 0},
        {"word_embed_proj_dim": 48},
        {"layer_types": ["full_attention", "sliding_attention", "chunked_attention"]},
    ],
)
def test_a_config_that_only_names_what_it_does_without_is_read(changes):
    config = {"model_type": "somebodys", **USUAL}

    assert read_facts(config | changes, "tiny").parameters == read_facts(config, "tiny").parameters
