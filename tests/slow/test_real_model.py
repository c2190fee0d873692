"""The main job on real weights and real data: the demo, QLoRA, the fused layers, and common data sets.

What the fast tests show on a model of two layers and random weights is shown here where people meet it: on the
demo's model in float32 on the CPU. Minutes, not seconds; `make test-slow` runs it.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.runs import build, train
from tunesmith.cli import demo
from tunesmith.config.result import RunResult
from tunesmith.contracts.errors import UserError
from tunesmith.data.batches import collate
from tunesmith.models.install import install
from tunesmith.objectives.table import OBJECTIVES
from tunesmith.training.metrics import read_events
from tunesmith.training.step import ObjectiveLoss

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DATA_SETS = ROOT.parent / "shared" / "data"
DEMO_DATA = Path(str(files("tunesmith.config.demo")))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model as a Hugging Face folder: from the cache that TUNESMITH_CACHE names, else converted once."""
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("the package gguf is not installed, which reads the demo's weights")
    try:
        demo._weights()
    except UserError:
        pytest.skip(f"the package {demo._CARRIER} is not installed, which carries the demo's weights")
    with pytest.MonkeyPatch.context() as patch:
        if "TUNESMITH_CACHE" not in os.environ:
            patch.setenv("TUNESMITH_CACHE", str(tmp_path_factory.mktemp("cache")))
        return demo.model_folder(Console(quiet=True))


def demo_rows(name: str) -> list[dict[str, str]]:
    text = (DEMO_DATA / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def demo_settings(model_dir: Path, folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The demo's run file with its folders filled in; keyword arguments are merged into its sections."""
    text = (DEMO_DATA / "demo.yaml").read_text(encoding="utf-8")
    places = {"DEMO_MODEL": str(model_dir), "DEMO_DATA": str(DEMO_DATA)}
    settings: dict[str, Any] = demo._filled_in(yaml.safe_load(text), places)
    settings["output"]["dir"] = str(folder)
    for section, changes in sections.items():
        settings.setdefault(section, {}).update(changes)
    return settings


def step_losses(result: RunResult) -> list[float]:
    events = read_events(result.dir / "events.jsonl")
    return [event["loss"] for event in events if event["event"] == "step"]


# ---------------------------------------------------------------- the demo


@torch.no_grad()
def loss_by_hand(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Mean cross-entropy of the answers with their end-of-turn token, one row at a time, from the model's logits."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    total, count = 0.0, 0
    for row in rows:
        question = [{"role": "user", "content": row["question"]}]
        answered = [*question, {"role": "assistant", "content": row["answer"]}]
        prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(answered, tokenize=False)
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids[: len(before)] == before
        stop = len(ids) - ids[::-1].index(end)  # behind the answer's <|im_end|>, before the line break
        logits_TV = model(input_ids=torch.tensor([ids[:stop]])).logits[0].double()
        answer = slice(len(before), stop)
        shifted = slice(len(before) - 1, stop - 1)  # token t is predicted at t − 1
        total += float(cross_entropy(logits_TV[shifted], torch.tensor(ids[answer]), reduction="sum"))
        count += stop - len(before)
    return total / count


def test_the_demo_learns_and_its_adapter_gives_the_same_loss_in_peft(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    results: list[RunResult] = []
    execute: Callable[..., RunResult] = partial(demo.execute, answer_tokens=2)
    monkeypatch.setattr(demo, "model_folder", lambda _console: model_dir)
    monkeypatch.setattr(demo, "execute", lambda *a, **options: results.append(execute(*a, **options)))
    demo.run_demo(Console(quiet=True), [f"output.dir={tmp_path / 'run'}"])

    (result,) = results
    assert result.first_eval is not None
    assert result.last_eval is not None
    assert result.result is not None
    assert result.reason == "complete"
    assert result.last_eval <= 0.75 * result.first_eval

    stock = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(result.result)
    rows = demo_rows("held_out.jsonl")
    # float32 on both sides, sums in another order; with the line break in the mask it would be 0.015 off
    assert loss_by_hand(stock.eval(), tokenizer, rows) == pytest.approx(result.first_eval, abs=1e-4)
    adapted = PeftModel.from_pretrained(stock, str(result.result)).eval()
    assert loss_by_hand(adapted, tokenizer, rows) == pytest.approx(result.last_eval, abs=1e-4)


# ---------------------------------------------------------------- QLoRA


def test_qlora_learns_and_repeats_bit_for_bit(model_dir: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in demo_rows("train.jsonl")[:2]), encoding="utf-8")
    columns = {"prompt": "question", "response": "answer"}
    source = {"path": str(rows), "format": "pair", "columns": columns}

    def losses(name: str) -> list[float]:
        settings = demo_settings(
            model_dir,
            tmp_path / name,
            model={"quantize": "nf4"},
            data={"train": [source], "eval": {"fraction": 0.0}},
            train={"packing": False, "global_batch": 2, "steps": 3, "warmup": 0.0, "scheduler": "constant"},
        )
        return step_losses(train(settings))

    first, second = losses("first"), losses("second")
    assert len(first) == 3
    assert first == second
    assert first[0] > first[1] > first[2]  # every step learns from the same two rows


# ---------------------------------------------------------------- the fused layers


def test_fused_layers_give_the_stock_models_loss_and_gradients(model_dir: Path, tmp_path: Path) -> None:
    run, _ = build(demo_settings(model_dir, tmp_path / "run"))
    torch.manual_seed(5)
    for name, parameter in run.causal.model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide what the adapters add
            torch.nn.init.normal_(parameter, std=0.02)
    objective = ObjectiveLoss(run.causal, OBJECTIVES["sft"])
    batches = [collate(run.data.corpus, run.data.held_out_N[at : at + 4]) for at in range(0, 16, 4)]
    supervised = sum(objective.count(batch) for batch in batches)
    assert len(run.data.held_out_N) == 16

    @torch.no_grad()
    def held_out() -> float:
        return float(sum(objective(batch, supervised) for batch in batches))

    def gradients() -> dict[str, torch.Tensor]:
        objective(batches[0], objective.count(batches[0])).backward()
        parameters = run.causal.model.named_parameters()
        found = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
        run.causal.model.zero_grad(set_to_none=True)
        return found

    with run.packed():
        loss, grads = held_out(), gradients()
        for policy in ("keep", "recompute"):
            installed = install(run.causal.model, policy=policy)
            assert len(installed.fused) == run.causal.config.num_hidden_layers
            ours, our_grads = held_out(), gradients()
            installed.undo()
            assert not installed.fallbacks
            # float32 sums of some hundred terms in another order, through 30 layers
            assert ours == pytest.approx(loss, rel=1e-5)
            assert our_grads.keys() == grads.keys()
            assert grads
            worst = max(float((our_grads[n] - grads[n]).norm() / grads[n].norm()) for n in grads)
            assert worst < 1e-4


# ---------------------------------------------------------------- data sets


@pytest.mark.parametrize(
    ("example", "data", "share"),
    [
        ("alpaca-lora.yaml", "alpaca_en_demo.json", 0.004),
        ("glaive-tools-lora.yaml", "glaive_toolcall_en_demo.json", 0.01),
        ("gsm8k-lora.yaml", "gsm8k/train.jsonl", 0.0005),
    ],
)
def test_an_example_trains_on_the_whole_data_set(
    model_dir: Path, tmp_path: Path, example: str, data: str, share: float
) -> None:
    """`share` is held out: a few rows, so that measuring does not take longer than training."""
    if not (DATA_SETS / data).is_file():
        pytest.skip(f"{DATA_SETS / data} is not there")
    settings = yaml.safe_load((EXAMPLES / example).read_text(encoding="utf-8"))
    settings["model"]["name"] = str(model_dir)
    settings["data"]["train"][0]["path"] = str(DATA_SETS / data)
    settings["data"]["eval"] = {"fraction": share}
    settings["train"] |= {"steps": 2, "global_batch": 2, "sequence_length": 256, "warmup": 0.0}
    settings["output"] = {"dir": str(tmp_path / "run"), "save_every": None}

    result = train(settings)
    losses = step_losses(result)
    assert len(losses) == 2
    assert all(0.0 < loss < 5.0 for loss in losses)  # log V = 10.8 is what a model gives that knows nothing
    assert result.first_eval is not None
    assert result.last_eval is not None
    assert result.result is not None
    assert (result.result / "adapter_model.safetensors").is_file()
