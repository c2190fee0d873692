"""Every file in examples/ loads, and trains on a tiny model.

Data that the repository does not hold is generated in the format that the example names, so that a format or a
setting that stops working is seen here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.runs import train
from tunesmith.config.load import load_settings
from tunesmith.data.formats import FORMATS

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
ROWS = 24

_WORDS = "natalia sold clips to her friends in april and then half as many in may".split()  # noqa: SIM905


def _words(rng: random.Random) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(2, 6)))


def _alpaca(rng: random.Random) -> dict[str, Any]:
    return {"instruction": _words(rng), "input": rng.choice(["", _words(rng)]), "output": _words(rng)}


def _glaive(rng: random.Random) -> dict[str, Any]:
    call = {"name": "count", "arguments": {"what": rng.choice(_WORDS)}}
    tool = {
        "name": "count",
        "description": _words(rng),
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
    }
    turns = [
        ("human", _words(rng)),
        ("function_call", json.dumps(call)),
        ("observation", json.dumps({"count": rng.randint(1, 9)})),
        ("gpt", _words(rng)),
    ]
    conversations = [{"from": who, "value": text} for who, text in turns]
    return {"conversations": conversations, "tools": json.dumps([tool])}


GENERATED = {"alpaca_en_demo.json": _alpaca, "glaive_toolcall_en_demo.json": _glaive}
"""Files that the user supplies, and how a row of each looks."""


def _data_file(path: str, folder: Path) -> Path:
    """A few rows of the data that an example names, from the repository or made up."""
    target = folder / Path(path).name
    if (ROOT / path).is_file():
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines(keepends=True)
        target.write_text("".join(lines[:ROWS]), encoding="utf-8")
    else:
        rng = random.Random(0)
        target.write_text(json.dumps([GENERATED[target.name](rng) for _ in range(ROWS)]), encoding="utf-8")
    return target


def _small(example: Path, model: Path, folder: Path) -> dict[str, Any]:
    """The example with its model, its data and its sizes replaced; everything else stays."""
    run: dict[str, Any] = yaml.safe_load(example.read_text(encoding="utf-8"))
    run["model"]["name"] = str(model)
    for source in run["data"]["train"]:
        source["path"] = str(_data_file(source["path"], folder))
    run["data"]["cache_dir"] = str(folder / "tokens")
    run["train"] |= {"sequence_length": 768, "global_batch": 2, "steps": 2}
    run["train"].pop("epochs", None)
    run["output"]["dir"] = str(folder / "run")
    return run


def _comments(example: Path) -> Iterator[str]:
    for line in example.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            yield line.removeprefix("#").strip()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_as_it_is_and_says_how_to_start_it(example: Path) -> None:
    settings = load_settings(example)

    assert all(source.format in {"auto", *FORMATS} for source in settings.data.train)
    assert f"tunesmith train examples/{example.name}" in list(_comments(example))
    assert settings.output.dir == f"runs/{example.stem}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains(example: Path, wide_model_dir: Path, tmp_path: Path) -> None:
    result = train(_small(example, wide_model_dir, tmp_path))

    assert (result.reason, result.steps) == ("complete", 2)
    assert result.result is not None
    assert (result.result / "adapter_model.safetensors").is_file()
    assert result.first_eval is not None
    assert result.last_eval is not None
    assert result.last_eval < result.first_eval


def _plain_loss(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Mean loss over the answers and the token that ends them, by transformers alone."""
    total, count = 0.0, 0
    for row in rows:
        question = [{"role": "user", "content": row["question"]}]
        answer = [{"role": "assistant", "content": row["answer"]}]
        prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(question + answer, tokenize=False).removesuffix("\n")
        before = len(tokenizer(prompt)["input_ids"])
        ids_1T = torch.tensor([tokenizer(whole)["input_ids"]])
        logprob_TV = torch.log_softmax(model(input_ids=ids_1T).logits[0, :-1].float(), -1)
        picked_T = logprob_TV.gather(-1, ids_1T[0, 1:, None])[before - 1 :, 0]
        total, count = total - float(picked_T.sum()), count + len(picked_T)
    return total / count


@torch.no_grad()
def test_the_adapter_gives_the_same_loss_in_plain_peft(wide_model_dir: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    run = _small(ROOT / "examples" / "gsm8k-lora.yaml", wide_model_dir, tmp_path)
    lines = (ROOT / "examples" / "data" / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines()[100:103]
    (tmp_path / "held.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run["data"]["eval"] = [{**run["data"]["train"][0], "path": str(tmp_path / "held.jsonl")}]
    run["train"]["learning_rate"] = 1.0e-2
    with torch.enable_grad():
        result = train(run)

    model = AutoPeftModelForCausalLM.from_pretrained(result.result)
    loss = _plain_loss(model, AutoTokenizer.from_pretrained(result.result), [json.loads(x) for x in lines])

    assert result.first_eval is not None
    assert abs(loss - result.first_eval) > 1e-3, (
        "the adapter has learned nothing, so the next line proves nothing"
    )
    assert loss == pytest.approx(result.last_eval, abs=1e-5)  # float32, sums in another order
