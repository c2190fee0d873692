"""Facts of every family against the models that transformers builds: parameters, windows, positions, biases."""

from __future__ import annotations

import json
from operator import attrgetter
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.models.test_families import CASES, FAMILIES, TINY
from tunesmith.contracts.errors import UserError
from tunesmith.models.install import install
from tunesmith.planning.architectures import ARCHITECTURES, find_architecture
from tunesmith.planning.family_defaults import DEFAULTS
from tunesmith.planning.read_facts import read_facts

META = torch.device("meta")
THIRD = ["full_attention", "full_attention", "sliding_attention"] * 3
HEADS = {"ministral": {"head_dim": 128}}
"""What transformers cannot do without."""


def built(config: Any) -> Any:
    """The model that transformers makes of a config, without memory for its weights."""
    with META:
        return AutoModelForCausalLM.from_config(config)


def elements(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def written(config: Any) -> dict[str, Any]:
    """The config.json that `save_pretrained` writes."""
    return json.loads(config.to_json_string())


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_facts_are_those_of_the_model(family, changes):
    config = AutoConfig.for_model(family, **TINY | changes)
    model, row = built(config), ARCHITECTURES[family]
    facts = read_facts(written(config), "tiny")

    assert facts.parameters == elements(model)
    assert facts.tied == (model.lm_head.weight is model.get_input_embeddings().weight)
    assert (facts.vocabulary, facts.longest, facts.unfused) == (384, 512, "")
    layers = model.get_decoder().layers
    assert len(facts.layers) == len(layers)
    for layer, said in zip(layers, facts.layers, strict=True):
        window = attrgetter(row.window)(layer) if row.window else None
        softcap = attrgetter(row.softcap)(layer) if row.softcap else None
        assert said.window == window
        assert said.softcap == (softcap is not None)
        assert bool(said.rotary_dim) == (row.rope is None or bool(attrgetter(row.rope)(layer)))
        groups = {"qkv": row.qkv, "output": (row.output,), "gate_up": row.gate_up, "down": (row.down,)}
        for group, paths in groups.items():
            modules = [attrgetter(path)(layer) for path in paths]
            rows = sum(module.weight.shape[0] for module in modules)
            assert said.matrices[group] == (rows, modules[0].weight.shape[1]), group
            assert getattr(said, f"{group}_bias") == (modules[0].bias is not None), group
        assert (said.qkv_parts, said.gate_up_parts) == (len(row.qkv), len(row.gate_up))


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_as_many_columns_rotate_as_in_the_model(family, changes):
    config = AutoConfig.for_model(family, **TINY | changes)
    model = AutoModelForCausalLM.from_config(config)
    rotary, kinds = model.get_decoder().rotary_emb, set(getattr(config, "layer_types", None) or ())
    arguments = (torch.zeros(1, 2, 32), torch.arange(2)[None])
    try:
        cos, _ = rotary(*arguments)
    except TypeError:  # a table for each kind of layer
        cos, _ = rotary(*arguments, min(kinds))
    rotating = {layer.rotary_dim for layer in read_facts(written(config), "tiny").layers} - {0}

    assert rotating == {cos.shape[-1]}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_a_config_leaves_out_is_the_familys_own(family):
    """A config.json with nothing in it but its type is the model that transformers makes of that."""
    given = {"model_type": family, **HEADS.get(family, {})}

    assert read_facts(given, "bare").parameters == elements(built(AutoConfig.for_model(**given)))


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_defaults_are_those_of_transformers(family):
    fields = CONFIG_MAPPING[family].__dataclass_fields__

    assert {key: fields[key].default for key in DEFAULTS[family]} == DEFAULTS[family]


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3},
        {"sliding_window_pattern": 3},
        {"sliding_window": 7, "use_sliding_window": True, "layer_types": THIRD},
    ],
    ids=["bare", "windows", "pattern", "listed"],
)
def test_windows_are_those_of_the_model(family, changes):
    """Which layers look at the last keys only follows from the family, an old name for its pattern, or a list
    that some families do not read."""
    given = {
        "model_type": family,
        "num_hidden_layers": 9,
        **{k: TINY[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")},
        "num_key_value_heads": 2,
        **HEADS.get(family, {}),
        **changes,
    }
    config = AutoConfig.for_model(**given)
    row = ARCHITECTURES[family]
    layers = built(config).get_decoder().layers
    facts = read_facts(given, "listless")

    assert [layer.window for layer in facts.layers] == [
        attrgetter(row.window)(layer) if row.window else None for layer in layers
    ]
    assert [bool(layer.rotary_dim) for layer in facts.layers] == [
        row.rope is None or bool(attrgetter(row.rope)(layer)) for layer in layers
    ]


REFUSED = [
    ("llama", {"attention_dropout": 0.1}),
    ("llama", {"hidden_act": "relu"}),
    ("phi3", {"head_dim": 8, "resid_pdrop": 0.1}),
    ("starcoder2", {}),
    ("cohere", {"head_dim": 8, "use_qk_norm": True}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
    ("qwen2", {"is_causal": False}),
    ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}),
]


@pytest.mark.parametrize(("family", "changes"), REFUSED)
def test_layers_are_unfused_for_the_reason_that_a_run_gives(family, changes):
    if family == "starcoder2":
        changes = {"residual_dropout": 0.1}
    given = {"model_type": family, **TINY, **changes}
    config = AutoConfig.for_model(**{key: value for key, value in given.items() if key != "layer_types"})
    if "layer_types" in changes:
        config.layer_types = changes["layer_types"]
    _, reason = find_architecture(config)

    facts = read_facts(given, "refused")
    assert reason
    assert facts.unfused == reason


RATES = [
    ("starcoder2", "attention_dropout", "it drops attention weights: its attention_dropout is 0.1"),
    ("granite", "attention_dropout", "it drops attention weights: its attention_dropout is 0.1"),
    ("starcoder2", "residual_dropout", "it drops what a block adds: its residual_dropout is 0.1"),
    ("phi3", "resid_pdrop", "it drops what a block adds: its resid_pdrop is 0.1"),
]


@pytest.mark.parametrize(("family", "key", "reason"), RATES)
def test_the_reason_names_the_rate_of_dropout(family, key, reason):
    changes = {"head_dim": 8, "residual_dropout": 0.0, key: 0.1}
    assert read_facts({"model_type": family, **TINY, **changes}, "refused").unfused == reason


def test_norms_of_q_and_k_in_command_r_are_counted():
    given = {"model_type": "cohere", **TINY, "head_dim": 8, "use_qk_norm": True}

    assert read_facts(given, "command r").parameters == elements(built(AutoConfig.for_model(**given)))


def test_a_fused_model_is_one_that_install_fuses():
    """The facts and a run decide by the same row."""
    for family in ("llama", "cohere2", "starcoder2"):
        config = AutoConfig.for_model(family, **TINY | CASES[family][0])
        assert (read_facts(written(config), "tiny").unfused == "") == bool(
            install(AutoModelForCausalLM.from_config(config)).fused
        )


# ---------------------------------------------------------------------- a model that also sees


@pytest.mark.parametrize("head", [False, True])
def test_a_language_model_that_also_sees(head):
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
        "vision_use_head": head,
    }
    text = {key: TINY[key] for key in TINY if key != "max_position_embeddings"}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model, facts = built(config), read_facts(written(config), "gemma")

    assert facts.parameters == elements(model)
    assert facts.other_parameters == facts.parameters - elements(model.get_decoder())
    assert facts.model_type == "gemma3_text"
    assert facts.tied


def test_the_whole_models_word_on_tying_counts():
    given = {
        "model_type": "gemma3",
        "text_config": dict(TINY),
        "vision_config": {},
        "tie_word_embeddings": False,
    }

    assert not read_facts(given, "apart").tied


# ---------------------------------------------------------------------- other families

OTHERS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 1,
    },
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
        "head_dim": 8,
    },
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "head_dim": 8},
    "gpt_neox": {"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_read_as_well_as_can_be(family):
    config = AutoConfig.for_model(family, **TINY | OTHERS[family])
    facts = read_facts(written(config), "other")
    exact = elements(built(config))

    if family != "gpt_neox":  # names of its norms' biases are not in a config
        assert facts.parameters == exact
    assert facts.parameters == pytest.approx(exact, rel=0.02)
    assert "not among the families with fused layers" in facts.unfused


def test_names_that_older_families_use():
    given = {
        "model_type": "gpt2",
        "n_embd": 96,
        "n_layer": 3,
        "n_head": 4,
        "vocab_size": 50,
        "n_positions": 70,
    }
    facts = read_facts(given, "gpt2")
    exact = elements(built(AutoConfig.for_model(**given)))

    assert (facts.longest, facts.tied, facts.layers[0].gated) == (70, True, False)
    assert facts.parameters == exact - 70 * 96  # all but its table of positions


def test_older_configs_of_qwens_mixture_do_not_say_that_it_has_biases():
    given = written(AutoConfig.for_model("qwen2_moe", **TINY | OTHERS["qwen2_moe"]))
    said = read_facts(given, "moe").parameters

    assert given.pop("qkv_bias")
    assert read_facts(given, "moe").parameters == said


def test_a_token_meets_the_experts_it_is_sent_to():
    config = AutoConfig.for_model("mixtral", **TINY | OTHERS["mixtral"])
    (layer, _) = read_facts(written(config), "mixtral").layers

    assert layer.inner == 2 * 64
    assert layer.idle_parameters == 3 * (3 * 32 * 64) + 5 * 32


# ---------------------------------------------------------------------- what cannot be read

_SOME = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_experts_per_tok": 1,
    "vocab_size": 10,
}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "it has no model_type"),
        ({"model_type": "gpt2", "n_embd": 8, "n_head": 2}, "it has no num_hidden_layers"),
        (
            {"model_type": "somebodys", "num_hidden_layers": 2, "hidden_size": 8},
            "it has no num_attention_heads",
        ),
        ({"model_type": "llama", "num_hidden_layers": "32"}, "its num_hidden_layers is '32'"),
        ({"model_type": "llama", "hidden_size": 0}, "its hidden_size is 0"),
        ({"model_type": "llama", "vocab_size": True}, "its vocab_size is True"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "it is an encoder and a decoder"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "it compresses keys and values"),
        ({"model_type": "mamba", "state_size": 16}, "its layers carry a state in place of attention"),
        ({"model_type": "gemma3", "text_config": 7}, "its text_config is no set of names and values"),
        ({"model_type": "mistral3", "text_config": {}}, "mistral3 is a language model inside another"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"]},
            "its layer_types",
        ),
        ({"model_type": "llama", "max_position_embeddings": "4096"}, "its max_position_embeddings is '4096'"),
        ({"model_type": "llama", "num_hidden_layers": 1_001}, "it says that there are 1,001 layers"),
        ({"model_type": "mixtral", **_SOME, "num_local_experts": -8}, "its num_local_experts is -8"),
        (
            {"model_type": "qwen3_moe", **_SOME, "num_experts": 4, "moe_intermediate_size": "a"},
            "its moe_intermediate_size is 'a'",
        ),
        ({"model_type": "gpt2", **_SOME, "n_positions": "x"}, "its n_positions is 'x'"),
        ({"model_type": "mistral", "sliding_window": "x"}, "one of its values is not of the kind"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "one of its values is not of the kind"),
        ({"model_type": "phi3", "partial_rotary_factor": "x"}, "one of its values is not of the kind"),
        ({"model_type": "llama", "hidden_act": ["silu"]}, "one of its values is not of the kind"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "it fills in masked words"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(config, said):
    with pytest.raises(UserError) as caught:
        read_facts(config, "somebody/model")

    assert f"config.json of somebody/model: {said}" in caught.value.message
    assert caught.value.hint
