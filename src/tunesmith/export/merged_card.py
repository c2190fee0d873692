"""The model card of a merged model: what it was made of, how that was checked, and the lines that load it."""

from __future__ import annotations

from pathlib import Path

from tunesmith._version import __version__
from tunesmith.export.verify import Verification

_LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```"""


def merged_card(
    *, base: str, quantize: str, dtype: str, adapter_card: str | None, verification: Verification | None
) -> str:
    """The text of `README.md` of a merged model.

    Args:
        base: id or folder of the base.
        quantize: how the base was held in training.
        dtype: floating-point type of the files.
        adapter_card: the adapter's own card, whose section on training is taken over.
        verification: the comparison with base and adapter; None where it was left out.
    """
    local = Path(base).expanduser()
    name = local.name if local.is_dir() else base  # a folder of this machine tells nobody anything
    lines = ["---", *([] if local.is_dir() else [f"base_model: {base}", "base_model_relation: finetune"])]
    lines += [
        "pipeline_tag: text-generation",
        "library_name: transformers",
        "tags:",
        "- tunesmith",
        "---",
        "",
    ]
    held = {"nf4": " rounded to 4 bits (NF4), as in training", "int8": " rounded to 8 bits, as in training"}
    lines += [
        f"# {name} with a LoRA adapter merged into it",
        "",
        f"The weights of `{name}`{held.get(quantize, '')}, with an adapter added to them in float32 and rounded once "
        f"to {dtype}, made with tunesmith {__version__}. `manifest.json` has the SHA-256 of every file.",
        "",
    ]
    if verification is not None:
        lines += [
            f"Compared with base and adapter at {verification.tokens} places of a few prompts, log-probabilities "
            f"differ by {verification.largest_difference:.2g} at most; rounding to {dtype} explains up to "
            f"{verification.tolerance:.2g} (`verification.json`).",
            "",
        ]
    lines += [*_training(adapter_card or ""), "## Use", "", _LOAD, ""]
    return "\n".join(lines)


def _training(card: str) -> list[str]:
    """The section on training of an adapter's card; nothing where there is none."""
    section = card.partition("\n## Training\n")[2].partition("\n## ")[0].strip()
    kept = [line for line in section.splitlines() if "`run.yaml` beside this file" not in line]
    return ["## Training", "", *kept, ""] if kept else []
