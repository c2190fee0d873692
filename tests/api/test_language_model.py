"""`FastLanguageModel`: models of transformers and PEFT, and arguments that do something or are refused."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import tunesmith
from tests.support.tiny import save_tiny_model
from tunesmith import FastLanguageModel, UserError
from tunesmith.api import memory
from tunesmith.api.arguments import ADAPTING, LOADING
from tunesmith.api.facts import facts_of
from tunesmith.api.prepared import NOT_HERE

IDS = torch.arange(3, 40)[None]


def load(folder: Path, **changes: Any) -> tuple[Any, Any]:
    return FastLanguageModel.from_pretrained(
        str(folder), **({"load_in_4bit": False, "quiet": True} | changes)
    )


def adapted(folder: Path, loading: dict[str, Any] | None = None, **changes: Any) -> Any:
    model, _ = load(folder, **(loading or {}))
    return FastLanguageModel.get_peft_model(model, **({"r": 4, "lora_alpha": 8} | changes))


def disturb(model: Any) -> Any:
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


# ---------------------------------------------------------------- loading


def test_an_adapter_names_the_folder_of_its_base_from_everywhere(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model_dir.parent)
    adapted(Path(tiny_model_dir.name)).save_pretrained(tmp_path / "adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tiny_model_dir.resolve())
    monkeypatch.chdir(tmp_path)
    assert isinstance(load(Path("adapter"))[0], PeftModel)


def test_a_model_of_transformers_and_its_tokenizer(tiny_model_dir: Path) -> None:
    model, tokenizer = load(tiny_model_dir, max_seq_length=128)
    assert type(model) is LlamaForCausalLM
    assert (model.dtype, model.max_seq_length) == (torch.float32, 128)
    assert tokenizer.eos_token == "<|im_end|>"
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tiny_model_dir)))


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        ({}, "float32"),
        ({"dtype": torch.float32}, "float32"),
        ({"dtype": torch.float16}, "float32"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": torch.bfloat16, "float32_mixed_precision": True}, "float32"),
    ],
)
def test_what_trains_in_full_fine_tuning(tiny_model_dir: Path, asked: dict, held: str, capsys) -> None:
    model, _ = load(tiny_model_dir, load_in_4bit=None, full_finetuning=True, quiet=False, **asked)
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{held}"}
    assert f"the weights themselves, in {held}" in capsys.readouterr().out
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ({}, "Linear4bit"),
        ({"load_in_4bit": True}, "Linear4bit"),
        ({"load_in_8bit": True}, "Linear8bitLt"),
        ({"load_in_16bit": True}, "Linear"),
        ({"load_in_4bit": False}, "Linear"),
        ({"full_finetuning": True}, "Linear"),
    ],
)
def test_how_weights_are_held(wide_model_dir: Path, asked: dict[str, bool], kind: str) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(wide_model_dir), quiet=True, **asked)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == kind
    assert all(p.requires_grad == ("full_finetuning" in asked) for p in model.parameters())


def test_a_checkpoint_that_is_in_four_bits_already(wide_model_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(wide_model_dir), quiet=True)
    model.save_pretrained(tmp_path / "four")
    tokenizer.save_pretrained(tmp_path / "four")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "four"), quiet=True)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "four", load_in_4bit=True)
    with pytest.raises(UserError, match=r"load_in_8bit: .* is quantised to 4 bits already, and stays so"):
        load(tmp_path / "four", load_in_4bit=None, load_in_8bit=True)
    with pytest.raises(UserError, match="are quantised, and cannot be trained themselves"):
        load(tmp_path / "four", load_in_4bit=None, full_finetuning=True)


def test_types_and_devices_as_scripts_name_them(tiny_model_dir: Path) -> None:
    for dtype in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        assert load(tiny_model_dir, dtype=dtype)[0].dtype == torch.bfloat16
    for device_map in (
        "auto",
        "sequential",
        "cpu",
        {"": "cpu"},
        torch.device("cpu"),
        {"a": "cpu", "b": "cpu"},
    ):
        assert load(tiny_model_dir, device_map=device_map)[0].device.type == "cpu"


def test_attention_and_scaled_positions(tiny_model_dir: Path, capsys) -> None:
    model, _ = load(
        tiny_model_dir, attn_implementation="eager", max_seq_length=1024, quiet=False,
        rope_scaling={"type": "linear", "factor": 2.0},
    )  # fmt: skip
    assert model.config._attn_implementation == "eager"
    assert model.config.max_position_embeddings == 1024
    assert capsys.readouterr().out == ""
    load(tiny_model_dir, max_seq_length=1024, quiet=False)
    assert "the model was made for 512 positions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": "no/such/folder"}, "model_name: there is no folder"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit cannot both be True"),
        (
            {"load_in_4bit": True, "full_finetuning": True},
            "load_in_4bit and full_finetuning cannot both be True",
        ),
        ({"dtype": "int4"}, "dtype='int4' is no compute type"),
        ({"device_map": "balanced"}, "device_map='balanced' does not name one device"),
        ({"device_map": {"a": "cpu", "b": "disk"}}, "does not name one device"),
        ({"device_map": "cuda:0"}, "there is no CUDA device here"),
        (
            {"use_gradient_checkpointing": "mostly", "full_finetuning": True},
            "is none of 'unsloth', True, False",
        ),
        ({"fast_inference": True}, "fast_inference=True is not possible. Nothing here serves a model"),
    ],
)
def test_what_cannot_be_loaded(
    tiny_model_dir: Path, monkeypatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    changes = {"model_name": str(tiny_model_dir), "load_in_4bit": None, "quiet": True} | changes
    with pytest.raises(UserError, match=message):
        FastLanguageModel.from_pretrained(**changes)


# ---------------------------------------------------------------- arguments of others


@pytest.mark.parametrize(("function", "table"), [("from_pretrained", LOADING), ("get_peft_model", ADAPTING)])
def test_an_argument_stands_in_one_place_and_says_what_to_do(function: str, table: dict[str, Any]) -> None:
    own = inspect.signature(getattr(FastLanguageModel, function)).parameters
    assert not own.keys() & table.keys()
    for row in table.values():
        assert row.reason.endswith(".")
        assert row.harmless is None or row.instead.endswith(".")


@pytest.mark.parametrize("name", LOADING)
def test_what_is_harmless_passes_and_what_is_not_says_why(tiny_model_dir: Path, name: str) -> None:
    row = LOADING[name]
    for value in (True,) if row.harmless is None else row.harmless:
        load(tiny_model_dir, **{name: value})
    if row.harmless is not None:
        with pytest.raises(UserError) as caught:
            load(tiny_model_dir, **{name: "else"})
        assert (row.reason in caught.value.message, caught.value.hint) == (True, row.instead)


def test_an_argument_that_nobody_knows(tiny_model_dir: Path) -> None:
    with pytest.raises(
        TypeError, match=r"from_pretrained\(\) takes no argument 'max_seq_len'; did you mean 'max_seq_length'"
    ):
        load(tiny_model_dir, max_seq_len=5)
    with pytest.raises(TypeError, match="takes no argument 'rank'"):
        adapted(tiny_model_dir, rank=5)
    with pytest.raises(UserError, match=r"finetune_vision_layers=True is not possible. Only language models"):
        adapted(tiny_model_dir, finetune_vision_layers=True)


# ---------------------------------------------------------------- adapters


def test_a_peft_model_that_starts_where_the_base_is(tiny_model_dir: Path, capsys) -> None:
    model = adapted(tiny_model_dir, quiet=False, max_seq_length=64)
    assert isinstance(model, PeftModel)
    assert model.max_seq_length == 64
    assert torch.equal(logits(model), logits(load(tiny_model_dir)[0]))
    said = capsys.readouterr().out
    assert "4,096 parameters: a LoRA adapter" in said
    assert "decoder layers  stock: fused layers need a GPU" in said
    assert "padded batches  packed" in said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj"]}, {"target_modules": {"q_proj"}}),
        ({"target_modules": r".*\.0\..*_proj"}, {"target_modules": r".*\.0\..*_proj"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"layers_to_transform": [1]}),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, {"layers_pattern": "layers"}),
        ({"use_rslora": True}, {"use_rslora": True}),
        ({"use_dora": True}, {"use_dora": True}),
        ({"bias": "all"}, {"bias": "all"}),
        ({"lora_dropout": 0.1}, {"lora_dropout": 0.1}),
        ({"trainable_token_indices": [5, 6]}, {"trainable_token_indices": {"embed_tokens": [5, 6]}}),
        ({"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"q_proj": 2}}),
        ({"alpha_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2}}),
        ({"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa"}),
        ({"exclude_modules": ["q_proj"]}, {"exclude_modules": {"q_proj"}}),
        ({"trainable_token_indices": {"lm_head": [5]}}, {"trainable_token_indices": {"lm_head": [5]}}),
        ({"lora_bias": True}, {"lora_bias": True}),
    ],
    ids=str,
)  # fmt: skip
def test_options_reach_peft(tiny_model_dir: Path, options: dict[str, Any], expected: dict[str, Any]) -> None:
    config = adapted(tiny_model_dir, **options).peft_config["default"]
    for name, value in expected.items():
        assert getattr(config, name) == value


def test_embeddings_train_whole(tiny_model_dir: Path) -> None:
    model = adapted(tiny_model_dir, modules_to_save=["embed_tokens"])
    assert model.get_base_model().get_input_embeddings().weight.requires_grad


def test_the_seed_decides_the_first_values(tiny_model_dir: Path) -> None:
    def first(seed: int) -> torch.Tensor:
        return next(p for p in adapted(tiny_model_dir, random_state=seed).parameters() if p.requires_grad)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["qproj"]},
            "target_modules: no linear layer of LlamaForCausalLM is called 'qproj'",
        ),
        ({"layers_to_transform": 7}, "layers_to_transform: there is no decoder layer 7"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: loftq makes up for the rounding"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config is for init_lora_weights='loftq'"),
        ({"loftq_config": {"loftq_bits": 2}, "init_lora_weights": "loftq"}, "loftq_bits=2 is not possible"),
        ({"use_gradient_checkpointing": 1}, "use_gradient_checkpointing=1 is none of"),
    ],
)
def test_what_an_adapter_cannot_be(tiny_model_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapted(tiny_model_dir, **options)


def test_models_of_others_and_models_that_train_whole(tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"get_peft_model takes a model of FastLanguageModel.from_pretrained"):
        FastLanguageModel.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir))
    model, _ = load(tiny_model_dir, load_in_4bit=None, full_finetuning=True)
    with pytest.raises(UserError, match="its own weights are trained"):
        FastLanguageModel.get_peft_model(model)


def test_an_adapter_whose_base_is_gone(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapted(tiny_model_dir).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}), encoding="utf-8"
    )
    with pytest.raises(
        UserError, match=r"there is no folder .*gone.* It is the base of the adapter .*adapter\."
    ):
        load(tmp_path / "adapter")


def test_an_adapter_directory_trains_on(tiny_model_dir: Path, tmp_path: Path) -> None:
    first = disturb(adapted(tiny_model_dir))
    first.save_pretrained(tmp_path / "adapter")
    model, tokenizer = load(tmp_path / "adapter")
    assert isinstance(model, PeftModel)
    assert torch.equal(logits(model), logits(first))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4096
    assert tokenizer.eos_token == "<|im_end|>"
    assert facts_of(model).attached is not None
    same = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, use_gradient_checkpointing=False)
    assert same is model
    with pytest.raises(UserError, match="carries an adapter with r=4 already, and r=8 asks for another"):
        FastLanguageModel.get_peft_model(model, r=8, lora_alpha=8)
    with pytest.raises(UserError, match="is an adapter, whose base stays frozen"):
        load(tmp_path / "adapter", load_in_4bit=None, full_finetuning=True)


OTHERS = {
    "target_modules": (["q_proj"], r".*\.q_proj"),
    "modules_to_save": (["lm_head"],),
    "rank_pattern": ({"q_proj": 2},),
    "layers_to_transform": ([0], 1),
    "exclude_modules": (["q_proj"],),
    "trainable_token_indices": ([5],),
    "lora_bias": (True,),
}


def test_an_adapter_that_is_there_is_compared_in_everything_that_is_given(tiny_model_dir: Path) -> None:
    model, _ = load(tiny_model_dir)
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(model, r=4)
    for targets in (None, "all-linear", every, r".*_proj"):
        assert FastLanguageModel.get_peft_model(model, r=4, target_modules=targets) is model
    for name, values in OTHERS.items():
        for value in values:
            with pytest.raises(UserError, match=f"carries an adapter with {name}="):
                FastLanguageModel.get_peft_model(model, r=4, **{name: value})
    options: dict[str, Any] = {
        "target_modules": every[:2], "modules_to_save": ["embed_tokens", "lm_head"], "rank_pattern": {"q_proj": 2},
        "layers_to_transform": range(1),
    }  # fmt: skip
    for some in (options, {"trainable_token_indices": [5, 6]}):
        model = FastLanguageModel.get_peft_model(load(tiny_model_dir)[0], r=4, **some)
        assert FastLanguageModel.get_peft_model(model, r=4, **some) is model


def test_embeddings_among_the_targets_name_the_argument_that_trains_them(tiny_model_dir: Path) -> None:
    targets = ["q_proj", "embed_tokens", "lm_head"]
    with pytest.raises(
        UserError, match=r"cannot be put on embed_tokens.*\nName embed_tokens and lm_head in modules_to"
    ):
        FastLanguageModel.get_peft_model(load(tiny_model_dir)[0], target_modules=targets)


def test_a_wrong_word_changes_nothing(tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match="use_gradient_checkpointing='unslot' is none of"):
        load(tiny_model_dir, use_gradient_checkpointing="unslot")
    model, _ = load(tiny_model_dir)
    with pytest.raises(UserError, match="use_gradient_checkpointing=1 is none of"):
        FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=1)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_model_is_as_it_was_where_it_cannot_be_measured(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError

    model = adapted(tiny_model_dir)
    monkeypatch.setattr("tunesmith.api.memory.set_policy", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        FastLanguageModel.for_training(model, use_gradient_checkpointing=True)
    assert facts_of(model).attached is None
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_new_tokens(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_model_dir)
    tokens = [f"<t{n}>" for n in range(12)]
    ids = tunesmith.add_new_tokens(model, tokenizer, tokens, method="mean", interpolation=0.5)
    assert len(ids) == 12
    model = FastLanguageModel.get_peft_model(model, r=4, trainable_token_indices=ids)
    disturb(model).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again, tokens = load(tmp_path / "adapter")
    text = tokens("<t3> and <t11>", return_tensors="pt")["input_ids"]
    assert torch.equal(logits(again, text), logits(model, text))
    with pytest.raises(UserError, match="carries an adapter already"):
        tunesmith.add_new_tokens(model, tokenizer, ["<x>"])
    with pytest.raises(UserError, match="new_tokens: a token is empty or given twice"):
        tunesmith.add_new_tokens(load(tiny_model_dir)[0], tokenizer, [""])


# ---------------------------------------------------------------- memory, modes


@pytest.mark.parametrize(
    ("value", "recomputes"), [("unsloth", True), (True, True), (False, False), ("auto", False)]
)
def test_what_is_kept(tiny_model_dir: Path, value: bool | str, recomputes: bool) -> None:
    model = adapted(tiny_model_dir, use_gradient_checkpointing=value)
    assert model.get_base_model().is_gradient_checkpointing == recomputes


def test_nothing_is_measured_where_there_is_no_choice(tiny_model_dir: Path, monkeypatch) -> None:
    """Stock layers have one policy that moves or recomputes, so that no forward pass need tell."""

    def measured(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(memory, "policy_costs", measured)
    model = adapted(tiny_model_dir, use_gradient_checkpointing="unsloth")
    assert model.get_base_model().is_gradient_checkpointing
    with pytest.raises(AssertionError):
        FastLanguageModel.for_training(model, use_gradient_checkpointing="auto")


def test_auto_recomputes_what_does_not_fit(tiny_model_dir: Path, monkeypatch) -> None:
    gradient_and_moments = 4096 * 12
    for free, recomputes in ((gradient_and_moments + 10**5, True), (gradient_and_moments + 10**8, False)):
        monkeypatch.setattr(memory, "free_host_memory", lambda free=free: free)
        model = adapted(tiny_model_dir, use_gradient_checkpointing="auto", max_seq_length=512)
        assert model.get_base_model().is_gradient_checkpointing == recomputes


@pytest.mark.parametrize("value", ["unsloth", False])
def test_gradients_are_those_of_plain_peft(tiny_model_dir: Path, value: bool | str) -> None:
    """Two rows of different lengths, padded: through the door and the policy, and without either."""
    ids = torch.arange(3, 43).reshape(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    model = disturb(adapted(tiny_model_dir, use_gradient_checkpointing=value)).train()
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    facts_of(model).attached.undo()
    model.zero_grad()
    model.get_base_model().gradient_checkpointing_disable()
    plain = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    plain.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_generation_is_that_of_the_stock_model(wide_model_dir: Path, tmp_path: Path) -> None:
    model = disturb(adapted(wide_model_dir))
    model.save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(wide_model_dir), tmp_path / "adapter"
    )
    tokenizer = AutoTokenizer.from_pretrained(wide_model_dir, padding_side="left")
    batch = tokenizer(
        ["How many apples", "The quick brown fox jumps over the"], return_tensors="pt", padding=True
    )
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    FastLanguageModel.for_training(model)
    model.config.use_cache = False  # as trainers leave it
    answers = FastLanguageModel.for_inference(model).generate(
        **batch, **options, return_dict_in_generate=True
    )
    assert answers.past_key_values is not None
    assert model(IDS).past_key_values is not None
    assert torch.equal(answers.sequences, stock.eval().generate(**batch, **options))
    assert not model.training
    assert model.for_training(use_gradient_checkpointing=False).training
    assert not model.get_base_model().is_gradient_checkpointing


def test_full_fine_tuning(tiny_model_dir: Path, tmp_path: Path, capsys) -> None:
    model, tokenizer = load(tiny_model_dir, load_in_4bit=None, full_finetuning=True, quiet=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    said = capsys.readouterr().out
    assert "the weights themselves" in said
    assert "padded batches  packed" in said
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    disturb(model).save_pretrained_merged(tmp_path / "merged", tokenizer)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(saved), logits(model), rtol=0, atol=0.05)  # bfloat16 weights


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("held", [{"load_in_4bit": True}, {"load_in_16bit": True, "load_in_4bit": None}])
def test_a_merged_model_loads_in_plain_transformers(
    wide_model_dir: Path, tmp_path: Path, held: dict[str, Any]
) -> None:
    model = disturb(adapted(wide_model_dir, held))
    _, tokenizer = load(wide_model_dir)
    FastLanguageModel.save_pretrained_merged(model, tmp_path / "merged", tokenizer)
    assert model.save_pretrained_merged(tmp_path / "again", tokenizer, "merged_16bit") == tmp_path / "again"
    for folder in ("merged", "again"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert merged.dtype == torch.bfloat16
        expected = logits(model)
        torch.testing.assert_close(
            logits(merged.float()), expected, rtol=0, atol=0.03 * expected.abs().max().item()
        )
        AutoTokenizer.from_pretrained(tmp_path / folder)


def test_other_ways_to_save(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = disturb(adapted(tiny_model_dir))
    harmless = {"push_to_hub": False, "token": None, "maximum_memory_usage": 0.5, "safe_serialization": None}
    model.save_pretrained_merged(tmp_path / "lora", save_method="lora", **harmless)
    with pytest.raises(UserError, match=r"push_to_hub=True is not possible\. Nothing is uploaded"):
        model.save_pretrained_merged(tmp_path / "hub", push_to_hub=True)
    with pytest.raises(TypeError, match="takes no argument 'save_methode'; did you mean 'save_method'"):
        model.save_pretrained_merged(tmp_path / "hub", save_methode="lora")
    assert not (tmp_path / "hub").exists()
    with pytest.raises(UserError, match="holds an adapter, and what loads the folder would take that"):
        model.save_pretrained_merged(tmp_path / "lora")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file"):
        model.save_pretrained_merged(tmp_path / "file")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "lora")
    assert torch.equal(logits(plain), logits(model))
    for method, message in (
        ("merged_4bit", "loses more than"),
        ("gguf", "is none of 'merged_16bit', 'lora'"),
    ):
        with pytest.raises(UserError, match=message):
            model.save_pretrained_merged(tmp_path / "no", save_method=method)
    assert not (tmp_path / "no").exists()


def test_a_gguf_file(tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    """Converted once, into the cache."""
    from tunesmith.api import loading

    calls = []

    def convert(source: Path, folder: Path) -> Path:
        calls.append(source)
        return save_tiny_model(folder)

    monkeypatch.setattr(loading, "convert_gguf", convert)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    model, _ = load(tmp_path / "tiny.gguf")
    assert type(model) is LlamaForCausalLM
    assert calls == [tmp_path / "tiny.gguf"]


def test_names_are_lazy_and_complete() -> None:
    assert tunesmith.FastModel is FastLanguageModel
    for name in tunesmith.__all__:
        assert getattr(tunesmith, name) is not None


# ---------------------------------------------------------------- what scripts for Unsloth call


@pytest.mark.parametrize("name", NOT_HERE)
def test_a_method_that_is_not_here_says_what_to_do(tiny_model_dir: Path, name: str) -> None:
    model = copy.deepcopy(adapted(tiny_model_dir))
    with pytest.raises(UserError, match=f"{name} is not here.\nUse save_pretrained_merged"):
        getattr(model, name)("folder", None, quantization_method="q4_k_m")


def test_the_table_names_what_trains(tiny_model_dir: Path, capsys) -> None:
    def said(**options: Any) -> str:
        adapted(tiny_model_dir, quiet=False, **options)
        return capsys.readouterr().out.splitlines()[1].split(": ")[1]

    assert said() == "a LoRA adapter"
    assert (
        said(modules_to_save=["embed_tokens", "lm_head"]) == "a LoRA adapter, embed_tokens"
    )  # which are the head
    assert said(trainable_token_indices=[5], bias="all") == "a LoRA adapter, rows of the embeddings, biases"


def test_ids_of_tokens_train_in_the_head_as_well(tmp_path: Path) -> None:
    model = adapted(
        save_tiny_model(tmp_path / "model", tie_word_embeddings=False), trainable_token_indices=[5]
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert len(trained) == 2
    assert {"lm_head" in name for name in trained} == {True, False}
    assert FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, trainable_token_indices=[5]) is model
    with pytest.raises(UserError, match=r"trainable_token_indices=\[5\] already, and .*=\[6\] asks"):
        FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, trainable_token_indices=[6])


def test_one_new_token_needs_no_list(tiny_model_dir: Path) -> None:
    model, tokenizer = load(tiny_model_dir)
    (number,) = tunesmith.add_new_tokens(model, tokenizer, "<call>")
    assert tokenizer.convert_ids_to_tokens(number) == "<call>"
