"""The model card of a result: what it is, how it was trained, and the few lines that load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the card states.

    Attributes:
        base_model: id or folder of the model that was trained.
        base_revision: its revision on the hub.
        adapter: whether the result is a LoRA adapter.
        quantize: how the base was held in training (`none`, `nf4`, `int8`).
        sources: one line for each training source.
        rows: training rows.
        steps: optimizer steps.
        tokens: tokens seen in training.
        first_eval: held-out loss before training, where it was measured.
        last_eval: held-out loss afterwards.
        hyperparameters: name to value, as the run file gives them.
        versions: package to version.
        positions: names and values of the config that stretch rotary positions; None where the run did not.
    """

    base_model: str
    base_revision: str | None
    adapter: bool
    quantize: str
    sources: Sequence[str]
    rows: int
    steps: int
    tokens: int
    first_eval: float | None
    last_eval: float | None
    hyperparameters: Mapping[str, object]
    versions: Mapping[str, str]
    positions: Mapping[str, object] | None = None


_HELD = {"nf4": "4-bit (NF4)", "int8": "8-bit"}

_LOAD_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""

_LOAD_STRETCHED = """\
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

config = AutoConfig.from_pretrained({base!r}, revision={revision!r})
{changes}
model = AutoModelForCausalLM.from_pretrained({base!r}, revision={revision!r}, config=config)
model = PeftModel.from_pretrained(model, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""

_LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""


def _front_matter(facts: Facts) -> list[str]:
    on_hub = not Path(facts.base_model).expanduser().is_dir()
    lines = ["---", *([f"base_model: {facts.base_model}"] if on_hub else []), "pipeline_tag: text-generation"]
    lines += [f"library_name: {'peft' if facts.adapter else 'transformers'}"]
    lines += ["tags:", "- tunesmith", *(["- lora"] if facts.adapter else []), "---"]
    return lines


def _table(rows: Mapping[str, object], left: str, right: str) -> list[str]:
    return [f"| {left} | {right} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def model_card(facts: Facts) -> str:
    """The text of `README.md` beside the weights."""
    kind = "A LoRA adapter for" if facts.adapter else "A fine-tuned version of"
    bits = _HELD.get(facts.quantize)
    held = f", trained on {bits} base weights" if bits else ""
    local = Path(facts.base_model).expanduser()
    name = (
        local.name if local.is_dir() else facts.base_model
    )  # a folder of this machine tells nobody anything
    lines = [*_front_matter(facts), "", f"# {kind} {name}", ""]
    lines += [
        f"{kind} `{name}`{held}, made with tunesmith {facts.versions.get('tunesmith', '')}.",
        "",
    ]
    lines += ["## Training", ""]
    figures: dict[str, object] = {
        "rows": f"{facts.rows:,}",
        "optimizer steps": f"{facts.steps:,}",
        "tokens": f"{facts.tokens:,}",
    }
    if facts.first_eval is not None and facts.last_eval is not None:
        figures["held-out loss before"] = f"{facts.first_eval:.4f}"
        figures["held-out loss after"] = f"{facts.last_eval:.4f}"
    lines += [
        *_table(figures, "figure", "value"),
        "",
        "Data:",
        *(f"- {source}" for source in facts.sources),
        "",
    ]
    lines += [*_table(facts.hyperparameters, "setting", "value"), ""]
    lines += ["`run.yaml` beside this file repeats the run: `tunesmith train run.yaml`.", ""]
    lines += ["## Use", "", *_note(facts), "```python", _loading(facts), "```", ""]
    lines += ["## Versions", "", *_table(facts.versions, "package", "version"), ""]
    return "\n".join(lines)


def _note(facts: Facts) -> list[str]:
    if facts.positions is None or not facts.adapter:
        return []
    return [
        "It was trained with rotary positions stretched beyond the base's own (`model.rope_scaling` in `run.yaml`). "
        "An adapter cannot carry that, so the base's config has to say it, as below; `tunesmith chat` and "
        "`tunesmith merge` see to it, and a merged model's config says it.",
        "",
    ]


def _loading(facts: Facts) -> str:
    """The lines that load the result."""
    if not facts.adapter:
        return _LOAD_MODEL
    if facts.positions is None:
        return _LOAD_ADAPTER
    changes = [f"config.get_text_config().{name} = {value!r}" for name, value in facts.positions.items()]
    base, revision = facts.base_model, facts.base_revision or "main"
    return _LOAD_STRETCHED.format(base=base, revision=revision, changes="\n".join(changes))
