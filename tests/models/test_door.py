"""Padded batches packed at the backbone's door: the same logits, gradients and tokens as without it."""

from __future__ import annotations

import copy
import gc
import inspect
import sys
import threading
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.support.tiny import tiny_llama
from tunesmith.models.adapter import add_lora
from tunesmith.models.attach import attach

MASKS = {
    "right": [[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8],
    "left": [[0] * 3 + [1] * 6, [1] * 9, [0] * 8 + [1]],
    "both": [[0, 0, 1, 1, 1, 1, 0, 0, 0], [1] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 0]],
    "an empty row": [[1] * 5 + [0] * 4, [0] * 9, [0] * 2 + [1] * 7],
    "full": [[1] * 9] * 3,
    "none": None,
}

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
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # layers that matter, as trained ones do
}
FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": 4},
    "gpt_neox": {},
    "gpt2": {"n_positions": 128, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_oss": {"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},  # attention sinks
}
RESTARTING = {"opt"}  # counts the ones of the mask; the others number the columns


IN_FLOAT32 = {"mixtral", "qwen3_moe", "gpt_oss", "gemma2"}
"""Experts multiply in no wider type; stock eager attention has no float64 mask that its softmax can take."""


def _family(name: str, **changes):
    torch.manual_seed(1)
    config = AutoConfig.for_model(name, **(_SMALL | FAMILIES[name] | changes))
    model = AutoModelForCausalLM.from_config(config).to(
        torch.float32 if name in IN_FLOAT32 else torch.float64
    )
    if name == "gemma2":
        model.set_attn_implementation("eager")  # the only stock one that caps scores
    return model.train()


def _batch(mask, columns: int = 9):
    torch.manual_seed(2)
    ids = torch.randint(3, 384, (3, columns))
    if mask is None:
        return {"input_ids": ids}
    mask = torch.tensor(mask)
    return {"input_ids": ids * mask, "attention_mask": mask}


def _run(model, batch, **kwargs):
    """Logits at real tokens and all gradients of a fixed function of them."""
    logits = model(**batch, **kwargs).logits
    mask = batch.get("attention_mask")
    real = torch.ones(logits.shape[:2], dtype=bool) if mask is None else mask.bool()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits)
    (logits * weights)[real].sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return logits.detach()[real], grads


def _same(ours, theirs, tolerance: float) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=tolerance, rtol=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    assert ours[1]
    for name, gradient in ours[1].items():
        # a bias of keys has no gradient but for rounding
        error = (gradient - theirs[1][name]).norm() / (theirs[1][name].norm() + 1e-3)
        assert error < 10 * tolerance, name


def _adapted(**changes):
    """A tiny Llama with a LoRA adapter whose B is not zero, in training."""
    model = add_lora(
        tiny_llama(initializer_range=0.2, **changes),
        rank=3, alpha=6.0, dropout=0.0, targets="all-linear", seed=1,
    )  # fmt: skip
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


# float64 but for norms and softmax, which some families take in float32
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_those_of_the_padded_batch(family, mask):
    model, batch = _family(family), _batch(MASKS[mask])
    expected = _run(model, batch)
    attached = attach(model)
    assert (attached.door.shut, attached.door.restart) == (None, family in RESTARTING)
    _same(_run(model, batch), expected, 1e-5 if family in IN_FLOAT32 else 2e-6)
    assert attached.door.packed == 1
    assert not attached.door.stock
    ones = 27 if MASKS[mask] is None else sum(map(sum, MASKS[mask]))
    assert (attached.door.tokens, attached.door.padding) == (ones, 27 - ones)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["off", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mask", ["left", "both", "none"])
def test_adapters_with_and_without_fused_layers(mask, fused, checkpointing):
    """`checkpointing` is reentrant, non-reentrant or off; a recomputed layer runs behind the door."""
    model, batch = _adapted(), _batch(MASKS[mask])
    if checkpointing is not None:
        model.enable_input_require_grads()
    expected = _run(model, batch)
    attached = attach(model, fused=fused)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    _same(_run(model, batch), expected, 1e-5)
    assert attached.door.packed == 1
    if fused:
        assert attached.installed.policy.name == ("keep" if checkpointing is None else "recompute")
        assert len(attached.installed.fused) == 2
        assert not attached.installed.fallbacks


def test_a_recomputed_layer_would_mix_documents_without_its_switch():
    model, batch = _adapted(), _batch(MASKS["left"])
    model.enable_input_require_grads()
    attach(model)
    for module in model.modules():
        if type(module).__name__ == "LlamaAttention":
            del vars(module)["forward"]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        _run(model, batch)


def test_embeddings_instead_of_ids():
    model, batch = _family("llama"), _batch(MASKS["both"])
    embeds = torch.randn(3, 9, 32, dtype=torch.float64)
    inputs = [embeds.clone().requires_grad_() for _ in range(2)]
    results = []
    for leaf in inputs:
        call = {"inputs_embeds": leaf, "attention_mask": batch["attention_mask"]}
        results.append(_run(model, call))
        attached = attach(model)
    _same(results[1], results[0], 2e-6)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(inputs[1].grad[real], inputs[0].grad[real], atol=2e-6, rtol=2e-6)
    assert not inputs[1].grad[~real].any()
    assert attached.door.packed == 0  # the second door saw nothing: the first took the call


def test_hidden_states_are_zero_at_padding():
    model = _family("llama")
    attach(model)
    mask = torch.tensor(MASKS["both"])
    hidden = model.model(**_batch(MASKS["both"])).last_hidden_state
    assert hidden.shape == (3, 9, 32)
    assert not hidden[mask == 0].any()
    assert hidden[mask == 1].any(-1).all()


PADDING_FREE = {
    "positions": {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0]])},
    "boundaries": {
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0]]),
        "cu_seq_lens_q": torch.tensor([0, 5, 8, 9], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 5, 8, 9], dtype=torch.int32),
        "max_length_q": 5,
        "max_length_k": 5,
        "seq_idx": torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 2]], dtype=torch.int32),
    },
    "boundaries alone": {"cu_seq_lens_q": torch.tensor([0, 5, 5, 8, 9, 9], dtype=torch.int32)},
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("form", PADDING_FREE)
def test_rows_that_come_packed_already(form, fused):
    """Every document computes what it computes alone; stock transformers with its default cache would mix them."""
    model = _adapted()
    ids = _batch(None)["input_ids"][:1]
    with torch.no_grad():
        parts = [model(input_ids=part, use_cache=False).logits for part in ids.split([5, 3, 1], dim=1)]
        mixed = model(input_ids=ids, **PADDING_FREE[form]).logits
        attached = attach(model, fused=fused)
        ours = model(input_ids=ids, **PADDING_FREE[form]).logits
    expected = torch.cat(parts, dim=1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert (mixed - expected).abs().max() > 1e-3
    assert (attached.door.packed, attached.door.tokens) == (1, 9)
    assert attached.installed is None or not attached.installed.fallbacks


def test_positions_that_come_with_a_mask_are_kept():
    model, batch = _family("gpt2"), _batch(MASKS["left"])
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0) + 3
    expected = _run(model, batch)
    attached = attach(model)
    _same(_run(model, batch), expected, 2e-6)
    assert attached.door.packed == 1


def _mask_4d():
    return torch.ones(9, 9).tril().bool().expand(3, 1, 9, 9)


_HOLES = [[1, 1, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [1] * 9]
STOCK_CALLS = {
    "a mask with holes": {"attention_mask": torch.tensor(_HOLES)},
    "a mask without a real token": {"attention_mask": torch.zeros(3, 9, dtype=torch.int64)},
    "a mask that is not one of padding": {"attention_mask": _mask_4d()},
    "attention weights are asked for": {"output_attentions": True},
    "all hidden states are asked for": {"output_hidden_states": True},
    "a KV cache is asked for": {"use_cache": True},
    "a tuple is asked for": {"return_dict": False},
    "document boundaries that do not cover one row": {"cu_seq_lens_q": torch.tensor([0, 9])},
    "the argument token_type_ids": {"token_type_ids": torch.zeros(3, 9, dtype=torch.int64)},
}


@pytest.mark.parametrize("reason", STOCK_CALLS)
def test_what_is_not_a_padded_batch_takes_the_stock_way_and_is_counted(reason):
    model = tiny_llama().train()
    if "weights" in reason:
        model.set_attn_implementation("eager")
    arguments = _batch(None) | STOCK_CALLS[reason]
    with torch.no_grad():
        expected = model.model(**arguments)
        attached = attach(model)
        output = model.model(**arguments)
    assert dict(attached.door.stock) == {reason: 1}
    assert attached.door.packed == 0
    assert torch.equal(output[0], expected[0])
    assert type(output) is type(expected)
    assert len(output) == len(expected)


def test_evaluation_packs_unless_a_cache_may_be_wanted():
    model, batch = tiny_llama(), _batch(MASKS["right"])
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        attached = attach(model)
        packed = model(**batch, use_cache=False).logits
        cached = model(**batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(packed[real], expected[real], atol=1e-6, rtol=1e-6)
    assert attached.door.packed == 1
    assert dict(attached.door.stock) == {"a KV cache is asked for": 1}
    assert cached.past_key_values.get_seq_length() == 9
    model.config.use_cache = False  # as Trainer sets it
    with torch.no_grad():
        model(**batch)
    assert attached.door.packed == 2


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("fused", [False, True])
def test_generation_gives_the_same_tokens(fused, cache):
    model = _adapted().eval()
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    ids = torch.randint(3, 384, (2, 6), generator=torch.Generator().manual_seed(4)) * mask
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "eos_token_id": -1}
    options |= {"use_cache": False} if cache is None else {"cache_implementation": cache}
    expected = model.generate(ids, **options)
    attached = attach(model, fused=fused)
    assert torch.equal(model.generate(ids, **options), expected)
    assert expected.shape == (2, 18)
    if cache is None:
        assert attached.door.packed == 12
    else:
        assert attached.door.packed == 0
        assert attached.door.stock == {"a KV cache": 12}
    assert model.config._attn_implementation == "sdpa"


def test_undo_brings_everything_back():
    model, batch = _adapted(), _batch(MASKS["left"])
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    expected = _run(model, batch)
    attached = attach(model, fused=True)
    _run(model, batch)
    attached.undo()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    again = _run(model, batch)
    assert torch.equal(again[0], expected[0])
    assert attached.door.packed == 1


def test_a_deep_copy_computes_with_its_own_weights():
    model, batch = _adapted(), _batch(MASKS["left"])
    attached = attach(model, fused=False)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.05)
    ours, _ = _run(twin, batch)
    plain = _adapted()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.05)
    theirs, _ = _run(plain, batch)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (ours - _run(model, batch)[0]).abs().max() > 1e-2
    assert attached.door.packed == 2


def test_a_deep_copy_is_undone_without_the_original():
    model, batch = _adapted(), _batch(MASKS["left"])
    attached = attach(model, fused=True)
    twin, its = copy.deepcopy((model, attached))
    its.undo()
    assert all("forward" not in vars(module) for module in twin.modules())
    _run(model, batch)
    assert attached.door.packed == 1
    assert its.door.packed == 0


def test_the_backbone_takes_the_same_arguments_by_place_and_name():
    model, batch = tiny_llama().train(), _batch(MASKS["left"])
    before = inspect.signature(model.model.forward)
    attached = attach(model)
    assert inspect.signature(model.model.forward) == before
    by_name = model.model(**batch).last_hidden_state
    assert torch.equal(model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state, by_name)
    assert attached.door.packed == 2


def test_what_is_saved_does_not_change(tmp_path):
    model = tiny_llama()
    keys = list(model.state_dict())
    attach(model)
    assert list(model.state_dict()) == keys
    model(**_batch(MASKS["left"]), use_cache=False)
    model.save_pretrained(tmp_path)
    assert "tunesmith" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_an_adapter_that_is_added_later_goes_through_the_door():
    model, batch = tiny_llama(initializer_range=0.2).train(), _batch(MASKS["both"])
    attached = attach(model)
    model = add_lora(model, rank=3, alpha=6.0, dropout=0.0, targets="all-linear", seed=1)
    ours = _run(model, batch)
    assert attached.door.packed == 1
    attached.undo()
    _same(ours, _run(model, batch), 1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_score_head_reads_the_last_real_token(fused):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **(_SMALL | {"num_labels": 1}))
    model = AutoModelForSequenceClassification.from_config(config).train()
    if fused:
        model.model.requires_grad_(False)
    batch = _batch([[1] * 9, [1] * 4 + [0] * 5, [0] * 3 + [1] * 6])
    expected = model(**batch).logits
    attached = attach(model, fused=fused)
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    assert attached.door.packed == 1
    assert not fused or len(attached.installed.fused) == 3


def test_router_logits_come_back_in_the_order_of_the_batch():
    """The balancing loss of a mixture of experts weighs them by the mask."""
    model, batch = (
        _family("mixtral", output_router_logits=True, router_aux_loss_coef=0.5),
        _batch(MASKS["both"]),
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(**batch, labels=labels)
    attached = attach(model)
    ours = model(**batch, labels=labels)
    assert attached.door.packed == 1
    torch.testing.assert_close(ours.aux_loss, expected.aux_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.loss, expected.loss, atol=1e-6, rtol=1e-6)


def test_noise_on_embeddings_is_scaled_by_the_padded_batch():
    from transformers.integrations.neftune import neftune_post_forward_hook

    model, batch = _family("llama"), _batch(MASKS["both"])
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(7)
    expected = _run(model, batch)
    attach(model)
    torch.manual_seed(7)
    _same(_run(model, batch), expected, 2e-6)


def test_float32_embeddings_on_a_model_in_16_bits():
    """As trained embeddings are: such a model runs under autocast only, in the proof as in a trainer."""
    model, batch = tiny_llama(dtype=torch.bfloat16, initializer_range=0.2), _batch(MASKS["both"])
    model.get_input_embeddings().float()
    attached = attach(model)
    assert attached.door.shut is None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        packed = model(**batch, use_cache=False).logits
        attached.undo()
        expected = model(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    assert attached.door.packed == 1
    assert (packed - expected)[real].norm() / expected[real].norm() < 2e-2  # 8 bits, a few layers


PICKS_KEYS = {
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
}  # fmt: skip

SHUT = {
    "mamba": ({"state_size": 8}, "its attention does not go through the attention interface"),
    "lfm2": ({"layer_types": ["conv", "full_attention", "conv"]}, "its hidden states differ in a packed row"),
    "bloom": ({}, "its attention does not go through the attention interface"),
    "llama4_text": ({"attention_chunk_size": 8192, "intermediate_size_mlp": 48, "num_local_experts": 2},
                    "its attention mask has a pattern of its own"),
    "nemotron": ({}, "its attention is not told where documents begin"),
    "deepseek_v32": (PICKS_KEYS, "its attention picks the keys of each token"),
    "deepseek_v4": (PICKS_KEYS, "its attention picks the keys of each token"),
}  # fmt: skip


@pytest.mark.parametrize("family", SHUT)
def test_the_door_stays_shut_for_models_that_cannot_pack(family):
    changes, reason = SHUT[family]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(_SMALL | changes))).train()
    batch = _batch(MASKS["left"])
    expected = model(**batch).logits
    attached = attach(model)
    assert reason in attached.door.shut
    assert attached.table() == [("padded batches", "stock", attached.door.shut)]
    torch.testing.assert_close(model(**batch).logits, expected)
    assert attached.door.packed == 0


def test_an_encoder_and_a_decoder_that_looks_at_one_are_shut_out():
    from transformers import AutoModel, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    small = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    encoder = AutoModel.from_config(AutoConfig.for_model("bert", num_hidden_layers=2, **small))
    t5 = AutoConfig.for_model("t5", vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    assert attach(encoder).door.shut is not None
    assert attach(AutoModelForSeq2SeqLM.from_config(t5)).door.shut == "its decoder looks at an encoder"


def test_one_look_at_the_device_per_batch(monkeypatch):
    """Lengths come from one copy to the host; nothing below asks the device for a number again."""
    model, batch = _adapted(), _batch(MASKS["both"])
    attach(model, fused=False)
    looks = []
    for name in ("cpu", "item", "tolist", "nonzero", "__bool__", "__int__"):
        stock = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, _n=name, _s=stock, **k: (looks.append(_n), _s(self, *a, **k))[1],
        )
    model(**batch)
    assert looks == ["cpu"]


def test_threads_that_share_a_model_wait_for_each_other():
    """How to attend is one name in the config: a thread must neither change nor read it while another computes."""
    model = tiny_llama(initializer_range=0.2)
    batches = [(_batch(MASKS["left"]), {"use_cache": False}), (_batch(MASKS["both"]), {"use_cache": True})]
    with torch.no_grad():
        expected = [model(**batch, **options).logits for batch, options in batches]
    attach(model)
    wrong: list[float] = []

    def work(number: int) -> None:
        batch, options = batches[number % 2]
        real = batch["attention_mask"].bool()
        for _ in range(40):
            with torch.no_grad():
                off = (model(**batch, **options).logits - expected[number % 2])[real].abs().max().item()
            if off > 1e-4:
                wrong.append(off)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert model.config._attn_implementation == "sdpa"


def test_a_compiled_model_takes_the_stock_way_in_one_graph():
    model, batch = tiny_llama(initializer_range=0.2), _batch(MASKS["left"])
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        attached = attach(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**batch, use_cache=False).logits, expected)
    assert dict(attached.door.stock) == {"the model is being compiled": 1}


def test_a_model_that_is_let_go_of_is_gone():
    """The proof registers a function with transformers, which outlives the model."""
    model = tiny_llama()
    attach(model)
    held = weakref.ref(model.model.layers[0].self_attn)
    del model
    gc.collect()
    assert held() is None


def test_a_model_is_as_it_was_where_its_layers_cannot_be_fused(monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("tunesmith.models.attach.install", out_of_memory)
    model = tiny_llama()
    with pytest.raises(torch.OutOfMemoryError):
        attach(model, fused=True)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
