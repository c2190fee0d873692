"""Options of adapters: each does what it says, and what is saved loads in plain PEFT with the same logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.hub import cached_file

from tests.support.tiny import tiny_llama, tiny_tokenizer
from tunesmith.contracts.errors import UserError
from tunesmith.models.adapter import add_lora, load_lora
from tunesmith.models.loader import load_model
from tunesmith.models.vocabulary import extend_tokenizer, resize, trainable_rows

CPU = torch.device("cpu")
IDS = torch.arange(3, 40)[None]


def base(folder: Path, quantize: str = "none", dtype: torch.dtype = torch.float32) -> Any:
    return load_model(str(folder), device=CPU, dtype=dtype, quantize=quantize)


def lora(model: Any, **changes: Any) -> Any:
    values = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "seed": 1}
    return add_lora(model, **(values | changes))


def ranks(model: Any) -> dict[str, int]:
    """Rank of each layer that carries an adapter, by its name."""
    found = {n: m.r["default"] for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    return {name.removeprefix("model.layers."): rank for name, rank in found.items()}


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def disturb(model: Any) -> Any:
    """What a few steps of training would do."""
    torch.manual_seed(7)
    for parameter in trained(model).values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


# ---------------------------------------------------------------- which layers


def test_a_regular_expression_chooses_by_whole_names() -> None:
    assert [*ranks(lora(tiny_llama(), targets=r".*layers\.1\..*(q|up)_proj"))] == [
        "1.self_attn.q_proj",
        "1.mlp.up_proj",
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"q_proj", "no linear layer's whole name matches"),
        (r"(q_proj", "is not a regular expression"),
        (r".*lm_head", "which an adapter cannot be put on"),
    ],
)
def test_a_pattern_that_chooses_wrongly(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lora(tiny_llama(), targets=pattern)


def test_layers_beside_a_pattern() -> None:
    with pytest.raises(UserError, match="beside a regular expression"):
        lora(tiny_llama(), targets=".*_proj", layers_to_transform=[1])


@pytest.mark.parametrize("layers", [1, [1], range(1, 2)])
def test_some_decoder_layers_only(layers: Any) -> None:
    names = [*ranks(lora(tiny_llama(), layers_to_transform=layers))]
    assert len(names) == 7
    assert all(name.startswith("1.") for name in names)


def test_a_decoder_layer_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"there is no decoder layer 2.\nThis model has layers 0 to 1"):
        lora(tiny_llama(), layers_to_transform=[1, 2])


def test_ranks_and_alphas_of_their_own() -> None:
    model = lora(
        tiny_llama(), targets=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 6.0}
    )
    assert ranks(model) == {
        "0.self_attn.q_proj": 4, "0.self_attn.v_proj": 2, "1.self_attn.q_proj": 4, "1.self_attn.v_proj": 2,
    }  # fmt: skip
    attention = model.get_base_model().model.layers[0].self_attn
    assert attention.q_proj.scaling["default"] == 8.0 / 4
    assert attention.v_proj.scaling["default"] == 6.0 / 2


# ---------------------------------------------------------------- what is computed


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    layer = lora(tiny_llama(), use_rslora=True).get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(8.0 / math.sqrt(4))


def test_dropout_is_drawn_in_training_only() -> None:
    model = disturb(lora(tiny_llama(), dropout=0.5))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("lora_only", 2), ("all", 2 * 7)])
def test_biases_train(bias: str, count: int) -> None:
    model = lora(tiny_llama(attention_bias=True, mlp_bias=True), targets=["q_proj"], bias=bias)
    assert len([name for name in trained(model) if name.endswith("bias")]) == count


def test_dora_trains_a_length_of_each_row(tmp_path: Path) -> None:
    model = lora(tiny_llama(), use_dora=True)
    lengths = [p for name, p in trained(model).items() if "lora_magnitude_vector" in name]
    assert len(lengths) == 2 * 7
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    torch.testing.assert_close(lengths[0], torch.linalg.norm(weight, dim=1))


def test_dora_on_eight_bits_of_a_cpu(tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match="use_dora: PEFT starts it from the lengths"):
        lora(base(tiny_model_dir, "int8"), use_dora=True)


# ---------------------------------------------------------------- where it starts


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_the_weights_changes_what_trains_and_not_what_is_computed(start: str) -> None:
    plain = tiny_llama()
    expected, before = logits(plain), plain.model.layers[0].self_attn.q_proj.weight.clone()
    model = lora(tiny_llama(), init_lora_weights=start)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)  # float32 sums in another order
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_B["default"].weight.abs().max() > 0
    assert not torch.allclose(layer.base_layer.weight, before)


def test_pissa_takes_the_largest_singular_values() -> None:
    weight = tiny_llama().model.layers[0].self_attn.q_proj.weight
    layer = lora(tiny_llama(), init_lora_weights="pissa").get_base_model().model.layers[0].self_attn.q_proj
    left = torch.linalg.svdvals(layer.base_layer.weight)
    torch.testing.assert_close(left[:4], torch.linalg.svdvals(weight)[4:8], rtol=1e-4, atol=1e-6)


def test_gaussian_start() -> None:
    plain, gaussian = (
        lora(tiny_llama(), init_lora_weights=start)
        .get_base_model()
        .model.layers[0]
        .mlp.down_proj.lora_A["default"]
        for start in (True, "gaussian")
    )
    # uniform within ±1/√64, against a normal distribution of deviation 1/4
    assert plain.weight.abs().max() <= 1 / 8
    assert gaussian.weight.detach().std() == pytest.approx(0.25, rel=0.2)


def test_loftq_makes_up_for_rounding(wide_model_dir: Path) -> None:
    exact = base(wide_model_dir)
    rounded = base(wide_model_dir, "nf4")
    model = lora(base(wide_model_dir, "nf4"), rank=16, alpha=64.0, init_lora_weights="loftq")
    wanted = logits(exact)
    assert (logits(model) - wanted).norm() < 0.75 * (logits(rounded) - wanted).norm()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    weight = exact.model.layers[0].self_attn.q_proj.weight
    held = rounded.model.layers[0].self_attn.q_proj(torch.eye(64)).T
    lost = torch.linalg.svdvals(weight - held)
    left = torch.linalg.svdvals(weight - held - layer.get_delta_weight("default"))
    torch.testing.assert_close(left[0], lost[16], rtol=1e-3, atol=1e-6)  # the 16 largest are gone


@pytest.mark.parametrize("dora", [False, True])
def test_loftq_of_a_rank_that_no_matrix_has_gives_the_base_back(wide_model_dir: Path, dora: bool) -> None:
    model = lora(base(wide_model_dir, "nf4"), rank=100, init_lora_weights="loftq", use_dora=dora)
    torch.testing.assert_close(logits(model), logits(base(wide_model_dir)), rtol=0, atol=1e-5)


def test_loftq_reads_the_commit_that_was_loaded(
    wide_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def cached(*args: Any, revision: str | None = None, **options: Any) -> Any:
        asked.append(revision)
        return cached_file(*args, **options)

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached)
    model = base(wide_model_dir, "nf4")
    model.config._commit_hash = "5f0b02c75b57c5855da9ae460ce51323ea669d8a"
    asked.clear()
    lora(model, init_lora_weights="loftq")
    assert set(asked) == {model.config._commit_hash}


@pytest.mark.parametrize(
    ("quantize", "start", "message"),
    [
        ("none", "loftq", "makes up for the rounding of a 4-bit base"),
        ("nf4", "pissa", "which a quantised base does not allow"),
        ("none", "pissa_niter_4", "draws anew"),
        ("none", "pisa", "there is no start 'pisa'"),
    ],
)
def test_a_start_that_is_not_possible(wide_model_dir: Path, quantize: str, start: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lora(base(wide_model_dir, quantize), init_lora_weights=start)


# ---------------------------------------------------------------- embeddings, head, tokens


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_train(tied: bool) -> None:
    model = lora(tiny_llama(tie_word_embeddings=tied), modules_to_save=["embed_tokens", "lm_head"])
    whole = [name for name in trained(model) if "lora" not in name]
    assert len(whole) == (1 if tied else 2)
    ends = (
        model.get_base_model().get_input_embeddings().weight,
        model.get_base_model().get_output_embeddings().weight,
    )
    assert (ends[0] is ends[1]) == tied
    model(IDS, labels=IDS).loss.backward()
    assert all(end.grad is not None for end in ends)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_embeddings_are_float32_beside_half_precision_layers(tied: bool) -> None:
    model = tiny_llama(dtype=torch.bfloat16, tie_word_embeddings=tied)
    model = lora(model, modules_to_save=["embed_tokens", "lm_head"])
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    hidden = model.get_base_model().model(IDS).last_hidden_state
    assert hidden.dtype == torch.bfloat16
    model(IDS, labels=IDS).loss.backward()


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(
        UserError, match=r"no module of LlamaForCausalLM is called 'embed_token'.\nDid you mean"
    ):
        lora(tiny_llama(), modules_to_save=["embed_token"])


def add(model: Any, tokens: list[str]) -> tuple[Any, list[int]]:
    tokenizer = tiny_tokenizer()
    ids = extend_tokenizer(tokenizer, tokens)
    resize(model, tokenizer, ids)
    return tokenizer, ids


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [384, 360])
def test_new_tokens_start_at_the_mean(tied: bool, rows: int) -> None:
    tokenizer = tiny_tokenizer()
    rows = max(rows, len(tokenizer))
    model = tiny_llama(tie_word_embeddings=tied, vocab_size=rows)
    before = model.get_input_embeddings().weight.clone()
    tokenizer, ids = add(model, ["<call>", "</call>", "<|im_end|>"])
    assert len(ids) == 2, "one was a token already"
    assert tokenizer("<call>", add_special_tokens=False)["input_ids"] == ids[:1]
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.testing.assert_close(end.weight[ids[1]], end.weight[: ids[0]].mean(dim=0))
    torch.testing.assert_close(
        model.get_input_embeddings().weight[: ids[0]], before[: ids[0]], rtol=0, atol=0
    )
    assert model.config.vocab_size >= len(tokenizer)


def test_the_same_token_twice() -> None:
    with pytest.raises(UserError, match="given twice"):
        extend_tokenizer(tiny_tokenizer(), ["<a>", "<a>"])


def test_rows_train_where_their_modules_do_not() -> None:
    tied, apart = tiny_llama(), tiny_llama(tie_word_embeddings=False)
    both = {"embed_tokens": [5], "lm_head": [5]}
    assert trainable_rows(apart, [5]) == both
    assert trainable_rows(apart, [5], ["norm"]) == both
    assert trainable_rows(apart, [5], ["lm_head"]) == {"embed_tokens": [5]}
    assert trainable_rows(apart, [5], ["model.embed_tokens", "lm_head"]) is None
    assert trainable_rows(tied, [5], ["norm"]) == {"embed_tokens": [5]}
    assert trainable_rows(tied, [5], ["lm_head"]) is trainable_rows(tied, [5], ["embed_tokens"]) is None
    assert trainable_rows(apart, []) is None


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_of_which_rows_train_has_the_bias_of_the_head(bias: bool) -> None:
    """TRL computes the head from its weight and bias, and PEFT's wrapper shows the weight alone."""
    model = tiny_llama(tie_word_embeddings=False)
    model.lm_head = torch.nn.Linear(32, 384, bias=bias)
    own = model.lm_head.bias
    adapted = lora(model, trainable_token_indices=trainable_rows(model, [5]))
    head = adapted.get_base_model().get_output_embeddings()
    assert type(head).__name__ == "TrainableTokensWrapper"
    assert head.bias is own
    names = [name for name in adapted.state_dict() if name.endswith("bias")]
    assert len(names) == bias


def test_patterns_are_looked_up_in_what_gets_an_adapter() -> None:
    for setting in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(UserError, match=rf"{setting}: no layer .* 'v_prj'.\nDid you mean 'v_proj'"):
            lora(tiny_llama(), **{setting: {"v_prj": 2}})
        with pytest.raises(UserError, match=rf"{setting}: no layer .* 'v_proj'.\nDid you mean 'q_proj'"):
            lora(tiny_llama(), targets=["q_proj"], **{setting: {"v_proj": 2}})
        with pytest.raises(UserError, match=rf"{setting}: '\*' is not a regular expression"):
            lora(tiny_llama(), **{setting: {"*": 2}})
        lora(tiny_llama(), **{setting: {r"layers\.1\..*_proj": 2}})
    with pytest.raises(UserError, match=r"exclude_modules: no linear layer's whole name matches"):
        lora(tiny_llama(), exclude_modules="q_proj")
    assert "1.mlp.up_proj" not in ranks(lora(tiny_llama(), exclude_modules=r".*\.1\..*"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_new_tokens_come_back_with_the_adapter(tmp_path: Path, tied: bool, whole: bool) -> None:
    vocabulary = len(tiny_tokenizer())
    tiny_llama(vocab_size=vocabulary, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = base(tmp_path / "base")
    tokenizer, ids = add(model, ["<call>", "</call>"])
    options: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]}
    model = lora(model, **(options if whole else {"trainable_token_indices": trainable_rows(model, ids)}))
    disturb(model).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    model.eval()
    text = tokenizer("say <call> now </call>", return_tensors="pt")["input_ids"]
    assert set(ids) <= set(text[0].tolist())
    expected = model(text).logits
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(plain.eval()(text).logits, expected, rtol=0, atol=1e-6)
    again = load_lora(base(tmp_path / "base"), str(tmp_path / "adapter"))
    torch.testing.assert_close(again.eval()(text).logits, expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- what is saved


@pytest.mark.parametrize(
    "options",
    [
        {"targets": r".*(q|v)_proj"},
        {"layers_to_transform": [1]},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 3.0}},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"bias": "all"},
    ],
    ids=str,
)
def test_a_saved_adapter_loads_in_plain_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    tiny_llama(attention_bias=True).save_pretrained(tmp_path / "base")
    model = disturb(lora(base(tmp_path / "base"), **options))
    expected = logits(model)
    assert (expected - logits(base(tmp_path / "base"))).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("start", [True, "loftq"])
def test_a_saved_adapter_loads_on_a_quantised_base(
    wide_model_dir: Path, tmp_path: Path, quantize: str, start: Any
) -> None:
    if (quantize, start) == ("int8", "loftq"):
        pytest.skip("for 4 bits only")
    model = disturb(lora(base(wide_model_dir, quantize), init_lora_weights=start))
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in trained(model).values())
    model.save_pretrained(tmp_path / "adapter")
    config = BitsAndBytesConfig(
        load_in_4bit=quantize == "nf4", load_in_8bit=quantize == "int8", bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(
        wide_model_dir, dtype=torch.float32, quantization_config=config
    )
    for module in plain.modules():  # bitsandbytes would round the scales to bfloat16 on CPUs that have it
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    plain = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)


def test_embeddings_of_another_name_grow_for_an_adapter(tmp_path: Path) -> None:
    """GPT-2 calls them `wte`."""

    def small(rows: int) -> Any:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "gpt2", n_embd=32, n_layer=1, n_head=4, n_positions=64, vocab_size=384, bos_token_id=None, eos_token_id=2
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        model.resize_token_embeddings(rows, mean_resizing=False)
        return model

    model = disturb(lora(small(390), targets="all-linear", modules_to_save=["wte"]))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_lora(small(384), str(tmp_path))), logits(model), rtol=0, atol=1e-6)
