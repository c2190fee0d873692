"""`SFTTrainer`: arguments of 2024 and of today, and what TRL would do to adapters and memory."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub.utils import build_hf_headers
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainingArguments
from trl import SFTConfig

from tunesmith import FastLanguageModel, SFTTrainer, UserError, add_new_tokens
from tunesmith.api import memory
from tunesmith.api.facts import facts_of
from tunesmith.api.trainer_arguments import MOVED, TRAINING
from tunesmith.models.attach import attach
from tunesmith.training.fused_adamw import FusedAdamW
from tunesmith.training.fused_adamw_8bit import FusedAdamW8bit


def rows(count: int = 8) -> Dataset:
    return Dataset.from_dict({
        "question": [f"How many apples are {n}?" for n in range(count)],
        "text": [f"How many apples are {n}? The answer is {n}. " * (1 + n % 3) for n in range(count)],
    })  # fmt: skip


def make(folder: Path, loading: dict[str, Any] | None = None, **changes: Any) -> Any:
    loading = {"load_in_4bit": False, "quiet": True, "max_seq_length": 48} | (loading or {})
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), **loading)
    if not loading.get("full_finetuning"):
        options = {
            name: changes.pop(name)
            for name in ("modules_to_save", "use_gradient_checkpointing")
            if name in changes
        }
        model = FastLanguageModel.get_peft_model(model, r=4, **options)
    return SFTTrainer(model=model, **({"tokenizer": tokenizer, "train_dataset": rows()} | changes))


def plain(folder: Path, **changes: Any) -> TrainingArguments:
    values = {"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
    return TrainingArguments(**(values | changes))


def today(folder: Path, **changes: Any) -> SFTConfig:
    return SFTConfig(
        **({"output_dir": str(folder), "max_steps": 2, "bf16": False, "logging_steps": 1} | changes)
    )


def test_arguments_of_2024(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = make(
        tiny_model_dir, args=plain(tmp_path, hub_token="secret"), dataset_text_field="question", max_seq_length=24,
        packing=True, dataset_num_proc=1, neftune_noise_alpha=5.0, eval_packing=False, dataset_batch_size=100,
    )  # fmt: skip
    args = trainer.args
    assert isinstance(args, SFTConfig)
    assert (args.dataset_text_field, args.max_length, args.packing, args.eval_packing) == (
        "question",
        24,
        True,
        False,
    )
    assert (args.dataset_num_proc, args.neftune_noise_alpha, args.hub_token) == (1, 5.0, "secret")
    assert (args.max_steps, args.per_device_train_batch_size) == (2, 2)


def test_tokens_of_the_hub_are_in_no_file(tiny_model_dir: Path, tmp_path: Path) -> None:
    """transformers writes a trainer's arguments as a pickle beside each checkpoint and model, and uploads it."""
    token = "hf_OfNobodyAtAll"
    for args in (
        plain(tmp_path / "0", hub_token=token, save_steps=1),
        today(tmp_path / "1", hub_token=token, save_steps=1, model_init_kwargs={"token": token}),
    ):
        trainer = make(tiny_model_dir, {"token": token}, args=args)
        trainer.train()
        trainer.save_model()
        trainer.model.save_pretrained_merged(Path(args.output_dir) / "merged", trainer.processing_class)
        # whoever uploads gets it, also from a copy
        sent = build_hf_headers(token=copy.deepcopy(trainer.args).hub_token)
        assert sent["authorization"] == f"Bearer {token}"
        assert token not in str(trainer.args.model_init_kwargs)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.name == "training_args.bin" for path in files) == 6
    assert not [path for path in files if token.encode() in path.read_bytes()]


def test_saved_arguments_load_without_tunesmith(tiny_model_dir: Path, tmp_path: Path) -> None:
    make(tiny_model_dir, args=plain(tmp_path, hub_token="hf_OfNobodyAtAll")).save_model()
    program = (
        "import sys, torch; sys.modules['tunesmith'] = None\n"
        "args = torch.load('training_args.bin', weights_only=False); print(args.hub_token, args.max_steps)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    assert run.stdout.split() == ["None", "2"]


def test_arguments_of_today(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_model_dir), load_in_4bit=False, quiet=True)
    model = FastLanguageModel.get_peft_model(model, r=4)
    args = today(tmp_path, max_length=40, eos_token="<|im_end|>", packing=True)
    trainer = SFTTrainer(model, args, None, rows(), None, tokenizer)
    assert (trainer.args.max_length, trainer.args.eos_token, trainer.args.packing) == (40, "<|im_end|>", True)
    assert trainer.train().training_loss > 0


def test_rows_are_as_long_as_the_model_was_told(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert make(tiny_model_dir, args=plain(tmp_path)).args.max_length == 48
    assert make(tiny_model_dir, args=today(tmp_path, max_length=32)).args.max_length == 32
    monkey = make(tiny_model_dir, args=today(tmp_path), max_seq_length=40)
    assert monkey.args.max_length == 40


def test_no_arguments_at_all(tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = make(tiny_model_dir).args
    assert args.output_dir == "model-SFT"
    assert not args.bf16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_text_field": "a", "args": {"dataset_text_field": "b"}}, "args has dataset_text_field='b'"),
        ({"max_seq_length": 30, "args": {"max_length": 31}}, "max_seq_length=30, and args has max_length=31"),
        ({"packing": False, "args": {"packing": True}}, "packing=False, and args has packing=True"),
        ({"infinite": True}, "infinite=True is not possible"),
        ({"model_init": len}, "model_init=.* is not possible. The model is made by FastLanguageModel"),
    ],
)  # fmt: skip
def test_contradictions_are_one_sentence(
    tiny_model_dir: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    args = today(tmp_path, **changes.pop("args", {}))
    with pytest.raises(UserError, match=message):
        make(tiny_model_dir, args=args, **changes)


def test_other_mistakes(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match="takes no argument 'dataset_text_feild'; did you mean 'dataset_text_field'"
    ):
        make(tiny_model_dir, args=plain(tmp_path), dataset_text_feild="text")
    with pytest.raises(UserError, match="two names of one thing"):
        make(tiny_model_dir, args=plain(tmp_path), processing_class=object())
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_model_dir), load_in_4bit=False, quiet=True)
    with pytest.raises(UserError, match="nothing of this model trains"):
        SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows(), args=plain(tmp_path))
    with pytest.raises(UserError, match="puts on with peft_config gets no fused layers"):
        SFTTrainer(
            model=model,
            tokenizer=tokenizer,
            train_dataset=rows(),
            args=plain(tmp_path),
            peft_config=LoraConfig(),
        )
    with pytest.raises(UserError, match="takes a model, and 'some/name' is a name"):
        SFTTrainer(model="some/name", train_dataset=rows())
    with pytest.raises(
        UserError, match="gradient_checkpointing=True, and the model use_gradient_checkpointing=False"
    ):
        make(
            tiny_model_dir,
            args=plain(tmp_path, gradient_checkpointing=True),
            use_gradient_checkpointing=False,
        )


def test_mistakes_that_trl_meets_too_late(tiny_model_dir: Path, tmp_path: Path) -> None:
    args = plain(tmp_path)
    for wrong, kind in (((1, 2), "tuple"), (None, "NoneType")):
        with pytest.raises(UserError, match=f"takes a model, and this is a {kind}"):
            SFTTrainer(model=wrong, train_dataset=rows())
    with pytest.raises(UserError, match=r"train_dataset has no column 'txt'.\nIt has question, text"):
        make(tiny_model_dir, args=args, dataset_text_field="txt")
    with pytest.raises(UserError, match="eval_dataset has no column 'text'"):
        make(tiny_model_dir, args=args, eval_dataset={"test": rows().select_columns("question")})
    with pytest.raises(UserError, match="train_dataset has no rows"):
        make(tiny_model_dir, args=args, train_dataset=rows().select([]))
    with pytest.raises(UserError, match="loraplus_lr_ratio is -1, and has to be a number above 0"):
        make(tiny_model_dir, args=args, loraplus_lr_ratio=-1)
    with pytest.raises(UserError, match="embedding_learning_rate is given, and neither"):
        make(tiny_model_dir, args=args, embedding_learning_rate=1e-5)


def test_rows_of_new_tokens_train(tiny_model_dir: Path, tmp_path: Path) -> None:
    """With a tied head, whose weight and bias TRL asks for."""
    text = Dataset.from_dict({"text": ["<call> four apples", "<call> five apples"] * 4})
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_model_dir), load_in_4bit=False, quiet=True)
    ids = add_new_tokens(model, tokenizer, ["<call>"])
    model = FastLanguageModel.get_peft_model(model, r=4, trainable_token_indices=ids)
    row = model.get_base_model().get_input_embeddings().weight[ids].detach().clone()
    args = plain(tmp_path, learning_rate=1e-2)
    SFTTrainer(
        model=model, tokenizer=tokenizer, train_dataset=text, args=args, embedding_learning_rate=1e-2
    ).train()
    assert not torch.equal(model.get_base_model().get_input_embeddings().weight[ids], row)


def test_tables_do_not_overlap() -> None:
    assert not MOVED.keys() & TRAINING.keys()
    assert set(MOVED.values()) <= set(SFTConfig.__dataclass_fields__)


def test_the_model_says_what_is_kept(tiny_model_dir: Path, tmp_path: Path) -> None:
    for value in (False, True):
        trainer = make(tiny_model_dir, args=today(tmp_path), use_gradient_checkpointing=value)
        trainer.train()
        assert trainer.model.get_base_model().is_gradient_checkpointing == value


def test_half_precision_is_not_asked_of_a_cpu(tiny_model_dir: Path, tmp_path: Path, capsys) -> None:
    trainer = make(tiny_model_dir, {"quiet": False}, args=plain(tmp_path, fp16=True))
    assert not trainer.args.fp16
    assert "fp16 is for GPUs; this CPU computes in float32." in capsys.readouterr().out
    trainer.train()


def test_one_gpu_of_several(tiny_model_dir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """transformers would multiply the batch by their number, and copy a model whose layers stay on the first."""
    stock = SFTConfig.__post_init__

    def two_gpus(self: Any) -> None:
        stock(self)
        self._n_gpu = 2

    monkeypatch.setattr(SFTConfig, "__post_init__", two_gpus)
    trainer = make(
        tiny_model_dir, args=today(tmp_path, per_device_train_batch_size=2), loading={"quiet": False}
    )
    assert (trainer.args.n_gpu, trainer.args.train_batch_size) == (1, 2)
    assert "a process trains on one GPU" in capsys.readouterr().out


def test_adapters_on_a_quantised_base_stay_float32(wide_model_dir: Path, tmp_path: Path) -> None:
    trainer = make(wide_model_dir, {"load_in_4bit": True}, args=plain(tmp_path))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in before.values()} == {torch.float32}
    assert any((p != p.to(torch.bfloat16)).any() for p in before.values()), (
        "a rounded start would not be seen"
    )
    trainer.train()
    after = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in after.values()} == {torch.float32}
    assert all(not torch.equal(after[name], start) for name, start in before.items() if "lora_B" in name)


def test_losses_are_those_of_plain_trl(tiny_model_dir: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer as Stock

    args = plain(tmp_path, max_steps=5, learning_rate=1e-2, seed=5)
    trainer = make(tiny_model_dir, args=args)
    trainer.train()
    torch.manual_seed(3407)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    config = today(
        tmp_path, max_steps=5, learning_rate=1e-2, seed=5, max_length=48, per_device_train_batch_size=2
    )
    stock = Stock(
        model, config, train_dataset=rows(), processing_class=AutoTokenizer.from_pretrained(tiny_model_dir)
    )
    stock.train()
    ours, theirs = ([log["loss"] for log in t.state.log_history if "loss" in log] for t in (trainer, stock))
    assert len(ours) == 5
    assert ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_formatting_functions_of_2024(tiny_model_dir: Path, tmp_path: Path) -> None:
    def batch(examples: dict[str, list[str]]) -> list[str]:
        return [f"Q: {examples['question'][n]}" for n in range(len(examples["question"]))]

    def single(example: dict[str, str]) -> str:
        return f"Q: {example['question']}"

    data = rows().select_columns(["question"])
    for function in (batch, single):
        trainer = make(tiny_model_dir, args=plain(tmp_path), formatting_func=function, train_dataset=data)
        text = trainer.processing_class.decode(trainer.train_dataset[1]["input_ids"])
        assert text == "Q: How many apples are 1?<|im_end|>"


def test_rates_of_their_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = make(
        tiny_model_dir, args=plain(tmp_path, learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.1),
        loraplus_lr_ratio=8.0, embedding_learning_rate=1e-5, modules_to_save=["embed_tokens"],
    )  # fmt: skip
    trainer.train()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    rates = {names[p]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for part, rate in (("lora_A", 1e-3), ("lora_B", 8e-3), ("embed_tokens", 1e-5)):
        found = [r for name, r in rates.items() if part in name]
        assert found == pytest.approx([rate] * len(found))
        assert found
    assert len(rates) == sum(p.requires_grad for p in trainer.model.parameters())


def test_full_fine_tuning_trains(tiny_model_dir: Path, tmp_path: Path) -> None:
    loading = {"load_in_4bit": None, "full_finetuning": True}
    trainer = make(tiny_model_dir, loading, args=plain(tmp_path, max_steps=3, learning_rate=1e-2))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize(
    ("optim", "kind"),
    [("adamw_torch_fused", FusedAdamW), ("adamw_8bit", FusedAdamW8bit), ("adafactor", None)],
)
def test_weights_in_bfloat16_are_rounded_stochastically(
    tiny_model_dir: Path, tmp_path: Path, capsys, optim: str, kind: type | None
) -> None:
    """A step of 1e-5 is less than a sixth of what a weight above 0.01 can move by in bfloat16."""
    loading = {"load_in_4bit": None, "full_finetuning": True, "dtype": torch.bfloat16, "quiet": False}
    args = plain(tmp_path, optim=optim, learning_rate=1e-5, weight_decay=0.0, lr_scheduler_type="constant")
    trainer = make(tiny_model_dir, loading, args=args)
    said = f"args.optim={optim} rounds to the nearest" in capsys.readouterr().out
    assert said == (kind is None)
    if kind is None:
        return
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    trainer.train()
    assert type(trainer.optimizer.optimizer) is kind
    share = (weight != before)[before.abs() > 0.01].float().mean()
    assert 0.02 < share < 0.4  # rounded to the nearest it would be none
    trainer.save_model(str(tmp_path / "model"))
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_a_missing_trl_is_one_sentence() -> None:
    program = (
        "import sys; sys.modules['trl'] = None\n"
        "try:\n    from tunesmith import SFTTrainer\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert run.stdout.startswith("UserError SFTTrainer needs TRL, which is not installed.")


@pytest.mark.parametrize(
    ("value", "policy"),
    [("unsloth", "offload_attention"), (True, "recompute"), (False, "keep"), ("auto", "keep_all")],
)
def test_fused_layers_train_to_the_same_losses(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch, value: bool | str, policy: str
) -> None:
    """The layers of a GPU, computed by the references of their kernels."""
    args = plain(tmp_path, max_steps=3, learning_rate=1e-2, seed=5)
    stock = make(tiny_model_dir, args=args)
    stock.train()
    monkeypatch.setattr(memory, "attach", partial(attach, fused=True))
    fused = make(tiny_model_dir, args=args, use_gradient_checkpointing=value)
    installed = facts_of(fused.model).attached.installed
    assert (len(installed.fused), installed.policy.name) == (2, policy)
    fused.train()
    assert not installed.fallbacks
    assert installed.policy.name == policy
    ours, theirs = ([log["loss"] for log in t.state.log_history if "loss" in log] for t in (fused, stock))
    assert ours == pytest.approx(theirs, rel=1e-5)
    FastLanguageModel.for_inference(fused.model)
    batch = {
        "input_ids": torch.arange(3, 12)[None],
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
    }
    answer = fused.model.generate(**batch)
    facts_of(fused.model).attached.undo()
    assert torch.equal(answer, fused.model.generate(**batch))
