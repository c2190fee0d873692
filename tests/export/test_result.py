"""A result, read fresh from disk by plain transformers and PEFT, is the model that was trained."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.support.runs import build, run_settings
from tests.support.tiny import CHATML, save_tiny_model, tiny_llama, tiny_tokenizer
from tunesmith.config.leave_result import leave_result
from tunesmith.config.load import load_settings
from tunesmith.contracts.errors import StorageError
from tunesmith.export import result
from tunesmith.export.card import Facts
from tunesmith.export.result import save_result

IDS = torch.arange(3, 60)[None]


def trained(settings: dict[str, Any]) -> tuple[Any, Path]:
    """A trained run and the folder of its result."""
    run, _ = build(settings)
    with run.packed():
        outcome = run.trainer.train()
    folder = leave_result(run, Path(settings["output"]["dir"]), outcome, Console(quiet=True)).path
    return run, folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def keys(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> tuple[Any, Path, Path]:
    """A trained LoRA run, its result, and the base model's folder."""
    folder = tmp_path_factory.mktemp("lora")
    base = save_tiny_model(folder / "base")
    return *trained(run_settings(base, folder)), base


# ---------------------------------------------------------------- the same model


def test_an_adapter_gives_the_trainers_logits(lora) -> None:
    run, folder, base = lora
    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    expected = logits(run.causal.model)
    torch.testing.assert_close(logits(fresh), expected, rtol=0, atol=1e-6)
    untrained = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (untrained - expected).abs().max() > 1e-2, "training changed nothing, so nothing was tested"


def test_an_adapter_over_four_bits(wide_model_dir: Path, tmp_path: Path) -> None:
    run, folder = trained(run_settings(wide_model_dir, tmp_path, model={"quantize": "nf4"}))
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        wide_model_dir, dtype=torch.float32, quantization_config=four_bits
    )
    for module in base.modules():  # bitsandbytes would round the scales to bfloat16 on CPUs that have it
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, folder)), logits(run.causal.model), rtol=0, atol=1e-6
    )
    assert "4-bit (NF4)" in (folder / "README.md").read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_in_float32_gives_the_trainers_logits(tmp_path: Path, tied: bool) -> None:
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    run, folder = trained(run_settings(base, tmp_path, adapter={"kind": "none"}))
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    assert folder.name == "model"
    assert fresh.dtype == torch.float32
    torch.testing.assert_close(logits(fresh), logits(run.causal.model), rtol=0, atol=1e-6)
    assert keys(folder / "model.safetensors") == keys(base / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("optimizer", "held"), [("adamw", torch.bfloat16), ("sgd", torch.float32)], ids=["rounding", "plain"]
)
def test_a_whole_model_in_bfloat16_is_saved_in_its_own_type(
    tmp_path: Path, tied: bool, optimizer: str, held: torch.dtype
) -> None:
    """What an optimizer that rounds stochastically trains in bfloat16, and others in float32."""
    base = save_tiny_model(tmp_path / "base", dtype=torch.bfloat16, tie_word_embeddings=tied)
    train = {"steps": 2, "optimizer": optimizer}
    run, folder = trained(
        run_settings(base, tmp_path, adapter={"kind": "none"}, model={"dtype": "bfloat16"}, train=train)
    )
    assert {p.dtype for p in run.causal.model.parameters()} == {held}
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in fresh.parameters()} == {torch.bfloat16}
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, run.causal.model.get_parameter(name).to(torch.bfloat16)), name
    assert keys(folder / "model.safetensors") == keys(base / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert (folder / "model.safetensors").stat().st_size < 1.1 * (base / "model.safetensors").stat().st_size
    assert {p.dtype for p in run.causal.model.parameters()} == {held}, "saving left the model alone"


# ---------------------------------------------------------------- the files


def test_names_of_tensors_are_pefts_own(lora, tmp_path: Path) -> None:
    _, folder, _ = lora
    get_peft_model(
        tiny_llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    ).save_pretrained(tmp_path)
    assert keys(folder / "adapter_model.safetensors") == keys(tmp_path / "adapter_model.safetensors")
    ours, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (folder, tmp_path))
    assert ours.keys() == theirs.keys()
    assert (ours["r"], ours["lora_alpha"], ours["peft_type"]) == (4, 8.0, "LORA")
    assert ours["inference_mode"] is True


def test_the_folder_holds_these_files_and_no_pickle(lora) -> None:
    _, folder, _ = lora
    names = {path.name for path in folder.rglob("*")}
    assert names == {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "README.md", "run.yaml",
    }  # fmt: skip
    for path in folder.rglob("*"):
        assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04"), path


def test_the_tokenizer_and_its_template_round_trip(lora) -> None:
    _, folder, _ = lora
    fresh, own = AutoTokenizer.from_pretrained(folder), tiny_tokenizer()
    text = "Natalia sold 48 clips.<|im_end|>\n🎉 größer"
    assert fresh(text)["input_ids"] == own(text)["input_ids"]
    assert (fresh.eos_token, fresh.pad_token) == (own.eos_token, own.pad_token)
    assert (folder / "chat_template.jinja").read_text() == CHATML
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert fresh.apply_chat_template(messages, tokenize=False) == own.apply_chat_template(
        messages, tokenize=False
    )


def test_the_template_of_the_run_goes_with_the_result(tiny_model_dir: Path, tmp_path: Path) -> None:
    own = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}"
    (tmp_path / "own.jinja").write_text(own)
    settings = run_settings(
        tiny_model_dir, tmp_path, data={"template": str(tmp_path / "own.jinja")}, train={"steps": 1}
    )
    _, folder = trained(settings)
    assert AutoTokenizer.from_pretrained(folder).chat_template == own


def test_the_run_file_beside_the_weights_repeats_the_run(lora) -> None:
    run, folder, _ = lora
    assert load_settings(folder / "run.yaml") == run.settings


def test_paths_of_this_machine_do_not_leave_it(tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    """The base model's folder must be absolute, or PEFT would look for it beside the reader; nothing else is."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_dir, "base")
    settings = run_settings(Path("base"), Path(), train={"steps": 1})
    _, folder = trained(settings)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    for path in folder.rglob("*"):
        content = path.read_bytes().replace(str(tmp_path / "base").encode(), b"")
        assert str(tmp_path).encode() not in content, path
        assert b".tmp-" not in content, path
    monkeypatch.chdir("/")
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / folder).peft_config["default"].r == 4


# ---------------------------------------------------------------- the card


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_the_cards_snippet_runs(tiny_model_dir: Path, tmp_path: Path, kind: str) -> None:
    run, folder = trained(run_settings(tiny_model_dir, tmp_path, adapter={"kind": kind}))
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert snippet.count('"FOLDER"') == 2
    names: dict[str, Any] = {}
    exec(snippet.replace("FOLDER", str(folder)), names)
    torch.testing.assert_close(logits(names["model"]), logits(run.causal.model), rtol=0, atol=1e-6)
    assert names["tokenizer"].chat_template == CHATML


def test_the_card_states_what_happened(lora) -> None:
    run, folder, base = lora
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    # the base is a folder of this machine: its name is said, its path is nobody else's business
    assert front == {"pipeline_tag": "text-generation", "library_name": "peft", "tags": ["tunesmith", "lora"]}
    assert f"# A LoRA adapter for {base.name}" in card
    assert str(base) not in card
    assert "| optimizer steps | 6 |" in card
    assert "| rows | 36 |" in card
    assert f"| held-out loss before | {run.trainer.evals[0]:.4f} |" in card
    assert f"| held-out loss after | {run.trainer.evals[6]:.4f} |" in card
    assert "rows.jsonl`: 40 of 40 rows" in card
    assert "| learning_rate | 0.005 |" in card
    assert f"| torch | {torch.__version__} |" in card


# ---------------------------------------------------------------- replacing an older result

FACTS = Facts(
    base_model="base", base_revision=None, adapter=True, quantize="none", sources=[], rows=1, steps=1, tokens=1,
    first_eval=None, last_eval=None, hyperparameters={}, versions={},
)  # fmt: skip


def save(folder: Path, text: str, model: Any = None) -> Path:
    model = model or get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    return save_result(
        folder, model=model, tokenizer=tiny_tokenizer(), chat_template=None, dtype=torch.float32, facts=FACTS,
        files={"run.yaml": text},
    )  # fmt: skip


def test_an_older_result_is_replaced_whole(tmp_path: Path) -> None:
    save(tmp_path / "adapter", "first")
    (tmp_path / "adapter" / "stale.txt").write_text("of the first run")
    save(tmp_path / "adapter", "second")
    assert (tmp_path / "adapter" / "run.yaml").read_text() == "second"
    assert not (tmp_path / "adapter" / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


class _Fails:
    """A model whose saving fails halfway."""

    peft_config: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, error: Exception) -> None:
        self.error = error

    def save_pretrained(self, folder: Path, **_: object) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise self.error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device"), "cannot be written: No space left on device."),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (PermissionError(13, "Permission denied"), "cannot be written: Permission denied."),
    ],
)
def test_a_save_that_fails_leaves_the_older_result(tmp_path: Path, error: Exception, sentence: str) -> None:
    save(tmp_path / "adapter", "first")
    with pytest.raises(StorageError) as caught:
        save(tmp_path / "adapter", "second", _Fails(error))
    assert sentence in caught.value.message
    assert "checkpoint is intact" in (caught.value.hint or "")
    assert (tmp_path / "adapter" / "run.yaml").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_rename_that_fails_brings_the_older_result_back(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path / "adapter", "first")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == ".tmp-adapter":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="Input/output error"):
        save(tmp_path / "adapter", "second")
    assert (tmp_path / "adapter" / "run.yaml").read_text() == "first"


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    """Every moment of a save has a whole result under the final name or set aside; the next save mends it."""
    save(tmp_path / "adapter", "first")

    class Killed(BaseException):
        pass

    rename = Path.rename

    def die(self: Path, target: Path) -> Path:
        if self.name == ".tmp-adapter":
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", die)
    monkeypatch.setattr(result.shutil, "rmtree", lambda *_a, **_k: None)  # a killed process cleans up nothing
    with pytest.raises(Killed):
        save(tmp_path / "adapter", "second")
    monkeypatch.undo()
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(StorageError):
        save(tmp_path / "adapter", "third", _Fails(OSError(28, "No space left on device")))
    assert (tmp_path / "adapter" / "run.yaml").read_text() == "first"
    save(tmp_path / "adapter", "fourth")
    assert (tmp_path / "adapter" / "run.yaml").read_text() == "fourth"
    assert os.listdir(tmp_path) == ["adapter"]  # noqa: PTH208


def test_peft_still_writes_what_this_file_relies_on() -> None:
    assert peft.utils.SAFETENSORS_WEIGHTS_NAME == "adapter_model.safetensors"
