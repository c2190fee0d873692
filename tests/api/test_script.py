"""A script written for Unsloth and TRL trains with its two import lines changed, on a CPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from tests.api.scripts import replaced, run_script

ROOT = Path(__file__).parents[2]
ARTICLE = ROOT.parent / "shared" / "spec" / "unsloth_llama4.py"


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"\{'loss': '?([\d.]+)", output)]


def check_adapter(folder: Path) -> None:
    """It loads in plain PEFT, and has been trained."""
    weights = load_file(folder / "adapter_model.safetensors")
    b = [tensor for name, tensor in weights.items() if "lora_B" in name]
    assert len(b) == 2 * 7
    assert all(tensor.abs().max() > 0 for tensor in b)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    AutoPeftModelForCausalLM.from_pretrained(folder)


def test_the_example(wide_model_dir: Path, tmp_path: Path) -> None:
    text = (ROOT / "examples" / "fast_language_model.py").read_text(encoding="utf-8")
    rows = (ROOT / "examples" / "data" / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    changes = {
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': repr(str(wide_model_dir)),
        '"examples/data/gsm8k.jsonl"': '"rows.jsonl"',
        "max_steps=60": "max_steps=2",
    }
    output = run_script(replaced(text, changes), tmp_path)
    assert len(losses(output)) == 2
    assert "tunesmith: fp16 is for GPUs; this CPU computes in float32." in output
    assert output.splitlines()[-1] == "GPU memory at the peak: 0.00 GiB"
    check_adapter(tmp_path / "runs" / "fast-language-model" / "adapter")


@pytest.mark.skipif(not ARTICLE.is_file(), reason="the article's script is not part of the repository")
@pytest.mark.parametrize(
    "first",
    ["tunesmith", *(pytest.param(name, marks=pytest.mark.slow) for name in ("torch", "transformers"))],
)
def test_the_script_of_the_article(wide_model_dir: Path, tmp_path: Path, first: str) -> None:
    text = ARTICLE.read_text(encoding="utf-8")
    ours = "from tunesmith import FastLanguageModel, SFTTrainer\n"
    changes = {
        "from unsloth import FastLanguageModel\n": "" if first != "tunesmith" else ours,
        "from trl import SFTTrainer\n": "" if first == "tunesmith" else ours,
        '"meta-llama/Llama-4-8B-Instruct"': repr(str(wide_model_dir)),
        '"tatsu-lab/alpaca", ': '"json", data_files="rows.jsonl", ',
    }
    text = replaced(text, changes)
    if first == "transformers":
        text = "import transformers.trainer, trl\n" + text
    rows = [{"instruction": f"Count to {n}.", "output": "one two three " * (1 + n % 5)} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = re.sub(r"max_steps = \d+", "max_steps = 3", text)
    output = run_script(text + '\nmodel.save_pretrained("adapter")\n', tmp_path)
    assert len(losses(output)) == 3
    assert "Peak VRAM used: 0.00 GB" in output
    check_adapter(tmp_path / "adapter")
