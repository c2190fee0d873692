"""A packed row is the sum of its parts: logits and gradients, with transformers' defaults left as they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.documents import random_corpus
from tests.support.tiny import tiny_llama
from tunesmith.contracts.errors import UserError
from tunesmith.data.batches import collate
from tunesmith.models.attention import choose_attention, document_kwargs, packed_attention, sdpa_attention

LENGTHS = [7, 1, 19, 2, 30]

_SMALL = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": 8},
    "olmo2": {},
    "smollm3": {},
    "granite": {},
    "cohere": {},
}


def _model(family: str) -> torch.nn.Module:
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **(_SMALL | FAMILIES[family]))
    return AutoModelForCausalLM.from_config(config).double().eval()


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_row_equals_its_parts(family):
    """`use_cache` and `attention_mask` stay at their defaults: the stock model with eager attention per document
    is the reference, in float64."""
    model = _model(family)
    batch = collate(random_corpus(LENGTHS), range(len(LENGTHS)))
    weights = torch.randn(batch.tokens, 384, dtype=torch.float64)

    model.set_attn_implementation("eager")
    parts = [model(input_ids=ids[None]).logits[0] for ids in batch.ids_T.split(LENGTHS)]
    reference = torch.cat(parts)
    (reference * weights).sum().backward()
    expected = _gradients(model)

    with packed_attention(model, "sdpa"):
        packed = model(
            input_ids=batch.ids_T[None], position_ids=batch.position_ids_T[None], **document_kwargs(batch)
        ).logits[0]
        (packed * weights).sum().backward()
    gradients = _gradients(model)

    # eager attention takes its softmax in float32 whatever the type, hence not 1e-12
    torch.testing.assert_close(packed, reference, atol=2e-6, rtol=2e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)
        assert error < 2e-6, name


def test_stock_attention_would_mix_documents():
    """The trap this guards against: with the default cache stock transformers lets documents see each other."""
    model = tiny_llama()
    batch = collate(random_corpus([9, 9]), [0, 1])
    alone = model(input_ids=batch.ids_T[None, 9:]).logits[0]
    stock = model(input_ids=batch.ids_T[None], position_ids=batch.position_ids_T[None]).logits[0, 9:]
    with packed_attention(model, "sdpa"):
        ours = model(
            input_ids=batch.ids_T[None], position_ids=batch.position_ids_T[None], **document_kwargs(batch)
        ).logits[0, 9:]
    assert (stock - alone).abs().max() > 1e-3
    assert (ours - alone).abs().max() < 1e-5


def test_implementation_is_restored_and_generation_works_inside():
    model = tiny_llama()
    before = model.config._attn_implementation
    prompt = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    with packed_attention(model, "sdpa"):
        assert model.config._attn_implementation == "tunesmith_per_document"
        assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), expected)
    assert model.config._attn_implementation == before


def test_what_would_be_computed_wrongly_is_refused():
    q = torch.randn(1, 2, 3, 4)
    module = torch.nn.Identity()
    with pytest.raises(UserError, match="mask"):
        sdpa_attention(module, q, q, q, torch.ones(1, 1, 3, 3))
    module.is_causal = False
    with pytest.raises(UserError, match="both directions"):
        sdpa_attention(module, q, q, q, None)


def test_choice_of_attention():
    cpu = torch.device("cpu")
    assert choose_attention("auto", cpu, torch.float32) == "sdpa"
    with pytest.raises(UserError, match="varlen needs a GPU"):
        choose_attention("varlen", cpu, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_varlen_matches_float64(dtype, window):
    from tunesmith.models.attention import varlen_attention

    lengths = [1, 130, 64, 257, 3]
    batch = collate(random_corpus(lengths), range(len(lengths))).to("cuda")
    torch.manual_seed(0)
    shapes = [(1, 8, batch.tokens, 64), (1, 2, batch.tokens, 64), (1, 2, batch.tokens, 64)]
    leaves = [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    grad = torch.randn(1, batch.tokens, 8, 64, device="cuda", dtype=torch.float64)
    module = torch.nn.Identity()
    kwargs = document_kwargs(batch) | {"sliding_window": window}
    ours, _ = varlen_attention(module, *leaves, None, **kwargs)
    theirs, _ = sdpa_attention(module, *exact, None, **kwargs)
    ours.backward(grad.to(dtype))
    theirs.backward(grad)
    # inputs and outputs carry 8 (bfloat16) or 11 (float16) bits
    tolerance = 1.5e-2 if dtype == torch.bfloat16 else 2e-3
    for got, want in [(ours, theirs), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]:
        assert (got.double() - want).norm() / want.norm() < tolerance


@pytest.mark.parametrize("family", ["deepseek_v32", "deepseek_v4", "glm_moe_dsa"])
def test_a_model_that_picks_its_keys_is_refused(family):
    config = AutoConfig.for_model(family, **_SMALL)
    model = SimpleNamespace(config=config)
    with (
        pytest.raises(UserError, match=r"picks the [0-9]+ keys that each token attends to") as caught,
        packed_attention(model, "sdpa"),
    ):
        pass
    assert "FastLanguageModel" in caught.value.hint
