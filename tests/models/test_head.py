"""The head over supervised positions gives every family's own logits, or the model is refused."""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Qwen2Config,
)

from tests.support.tiny import tiny_llama
from tunesmith.contracts.errors import UserError
from tunesmith.models.adapter import add_lora
from tunesmith.models.attention import packed_attention
from tunesmith.models.head import CausalModel
from tunesmith.models.head_check import check_head
from tunesmith.models.probe import probe_batch

_SIZES: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

FAMILIES = {
    "gemma2": Gemma2Config(**_SIZES, head_dim=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "gemma2 without a cap": Gemma2Config(**_SIZES, head_dim=8, final_logit_softcapping=None),
    "cohere": CohereConfig(**_SIZES, logit_scale=0.25),
    "cohere2": Cohere2Config(**_SIZES, logit_scale=0.25, head_dim=8),
    "granite": GraniteConfig(**_SIZES, logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5),
    "qwen2": Qwen2Config(**_SIZES),
}


def family(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name]).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # logits far from zero, where a cap or a factor shows
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_accepted(name: str) -> None:
    check_head(CausalModel(family(name), torch.float32))


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probabilities_are_the_models_own(name: str) -> None:
    model = family(name)
    causal = CausalModel(model, torch.float32)
    batch = probe_batch((12,))
    with torch.no_grad(), packed_attention(causal.base, "sdpa"):
        ours_S = causal.score(batch).logprob()
    with torch.no_grad():
        logits_TV = model(input_ids=batch.ids_T[None], use_cache=False).logits[0]
    theirs_S = logits_TV.log_softmax(-1)[batch.logit_index_S, batch.targets_S]
    torch.testing.assert_close(ours_S, theirs_S, rtol=1e-4, atol=1e-4)  # float32, another order of sums


@pytest.mark.parametrize(
    ("name", "attribute"),
    [("gemma2", "final_logit_softcapping"), ("cohere", "logit_scale"), ("granite", "logits_scaling")],
)
def test_a_rule_that_is_not_applied_is_seen(name: str, attribute: str, monkeypatch) -> None:
    from tunesmith.models import head

    rules = {key: rule for key, rule in head._LOGIT_RULES.items() if key != attribute}
    monkeypatch.setattr(head, "_LOGIT_RULES", rules)
    with pytest.raises(UserError, match="computes its logits in a way that is not supported"):
        check_head(CausalModel(family(name), torch.float32))


@pytest.mark.parametrize(
    "change",
    [lambda logits: logits * 1.5, lambda logits: logits - logits.square(), lambda logits: logits * math.nan],
)
def test_a_model_with_logits_of_its_own_is_refused(change) -> None:
    model = tiny_llama()
    original = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.logits = change(output.logits)
        return output

    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.forward = MethodType(forward, model)
    with pytest.raises(UserError, match="LlamaForCausalLM computes its logits in a way"):
        check_head(CausalModel(model, torch.float32))


def test_a_model_that_looks_ahead_is_refused() -> None:
    model = tiny_llama()
    original = type(model).forward

    def forward(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = original(self, input_ids, **kwargs)
        output.logits = output.logits + input_ids[0, -1] * torch.linspace(0, 0.01, 384)
        return output

    model.forward = MethodType(forward, model)
    with pytest.raises(UserError, match="its tokens see the ones behind them"):
        check_head(CausalModel(model, torch.float32))


@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_the_model_as_it_was(training: bool) -> None:
    model = add_lora(tiny_llama(), rank=2, alpha=4, dropout=0.5, targets="all-linear", seed=0)
    model.train(training)
    before = {name: p.clone() for name, p in model.named_parameters()}
    check_head(CausalModel(model, torch.float32))
    assert model.training is training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accepted(dtype: torch.dtype) -> None:
    check_head(CausalModel(tiny_llama(dtype=dtype), dtype))


def test_a_model_without_a_head_is_refused() -> None:
    from transformers import AutoModel

    with pytest.raises(UserError, match="LlamaModel has no language-model head"):
        CausalModel(AutoModel.from_config(tiny_llama().config), torch.float32)
