"""What a model must compute for its rows to be packed and its head to be trained."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.runs import build, run_settings
from tests.support.tiny import tiny_llama
from tunesmith.contracts.errors import UserError
from tunesmith.models.attention import packed_attention
from tunesmith.models.head import CausalModel
from tunesmith.models.head_check import check_packing

_SMALL = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # layers that matter, as trained ones do
}
CARRYING = {
    "mamba": {"state_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def _causal(family: str, **changes) -> CausalModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(_SMALL | changes)))
    return CausalModel(model.eval(), torch.float32)


@pytest.mark.parametrize("family", CARRYING)
def test_layers_that_carry_one_document_into_the_next_are_refused(family):
    causal = _causal(family, **CARRYING[family])
    replaceable = causal.model._can_set_attn_implementation()
    with (
        packed_attention(causal.base, "sdpa") if replaceable else nullcontext(),
        pytest.raises(UserError, match="carries one document of a row into the next"),
    ):
        check_packing(causal)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt_neox"])
def test_attention_models_pass(family):
    causal = _causal(family)
    with packed_attention(causal.base, "sdpa"):
        check_packing(causal)


def test_an_adapter_on_the_head_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_llama(tie_word_embeddings=False), LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    )
    with pytest.raises(UserError, match="adapter sits on the language-model head"):
        CausalModel(model, torch.float32)


@pytest.mark.parametrize("freeze", [["model.layers.0.*"], ["model.embed_tokens.*", "model.layers.*"]])
def test_partly_frozen_models_train_in_bfloat16(freeze, tiny_model_dir, tmp_path):
    settings = run_settings(
        tiny_model_dir, tmp_path, model={"dtype": "bfloat16", "freeze": freeze}, adapter={"kind": "none"},
        train={"steps": 2, "optimizer": "sgd"},
    )  # fmt: skip
    run, events = build(settings)
    parameters = dict(run.causal.model.named_parameters())
    assert parameters["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert parameters["model.norm.weight"].dtype == torch.float32
    with run.packed():
        run.trainer.train()
    assert len(events.of("step")) == 2


def test_full_fine_tuning_starts_from_the_checkpoints_own_values(tiny_model_dir, tmp_path):
    from safetensors.torch import load_file

    saved = load_file(tiny_model_dir / "model.safetensors")
    for optimizer, held in (
        ("sgd", torch.float32),
        ("adamw", torch.bfloat16),
    ):  # the latter rounds stochastically
        (tmp_path / optimizer).mkdir()
        settings = run_settings(
            tiny_model_dir, tmp_path / optimizer, model={"dtype": "bfloat16"}, adapter={"kind": "none"},
            train={"optimizer": optimizer},
        )  # fmt: skip
        run, _ = build(settings)
        for name, parameter in run.causal.model.named_parameters():
            assert torch.equal(parameter, saved[name].to(held)), name
