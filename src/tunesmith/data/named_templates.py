"""Chat templates by name: the layout of ten families, for models that come without a template or with a wrong one.

Each text in `templates/` was written from the format that the publisher describes. Where a publisher's own
template would train on what a server never shows (DeepSeek-R1's drops the reasoning of the answer itself), ours
writes the turn as the model generates it. `TEMPLATES` is the whole list.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.contracts.errors import DataError
from tunesmith.data.template import CHATML

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class NamedTemplate:
    """One row of `TEMPLATES`.

    Attributes:
        name: its name in the settings.
        summary: one sentence.
        control: tokens that the tokenizer has to have, or the layout is plain text to the model.
        supports: what it writes of `system`, `tools` and `thinking`; the rest is moved into the content of
            turns, see `adapt.py`.
    """

    name: str
    summary: str
    control: tuple[str, ...]
    supports: tuple[str, ...]

    @property
    def text(self) -> str:
        """The Jinja text."""
        return _read(self.name)


@functools.cache
def _read(name: str) -> str:
    if name == "chatml":
        return CHATML
    return resources.files("tunesmith.data").joinpath(f"templates/{name}.jinja").read_text("utf-8")


_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_GEMMA_TOKENS = ("<bos>", "<start_of_turn>", "<end_of_turn>")

TEMPLATES: dict[str, NamedTemplate] = {
    "chatml": NamedTemplate("chatml", "ChatML, the smallest common layout", _CHATML_TOKENS, ("system",)),
    "llama-3": NamedTemplate(
        "llama-3",
        "Llama 3.1, 3.2 and 3.3",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("system", "tools"),
    ),
    "llama-4": NamedTemplate(
        "llama-4",
        "Llama 4",
        ("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"),
        ("system",),
    ),
    "mistral": NamedTemplate(
        "mistral",
        "Mistral's tokenizer v7 (tekken)",
        ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]",
         "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[TOOL_CONTENT]", "[/TOOL_RESULTS]"),
        ("system", "tools"),
    ),
    "gemma-2": NamedTemplate("gemma-2", "Gemma 2", _GEMMA_TOKENS, ()),
    "gemma-3": NamedTemplate("gemma-3", "Gemma 3", _GEMMA_TOKENS, ("system",)),
    "phi-4": NamedTemplate("phi-4", "Phi-4", (*_CHATML_TOKENS, "<|im_sep|>"), ("system",)),
    "qwen-2.5": NamedTemplate("qwen-2.5", "Qwen 2.5", _CHATML_TOKENS, ("system", "tools")),
    "qwen-3": NamedTemplate(
        "qwen-3", "Qwen 3, with and without thinking", _CHATML_TOKENS, ("system", "tools", "thinking")
    ),
    "deepseek-r1": NamedTemplate(
        "deepseek-r1",
        "DeepSeek-R1 and its distillations",
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        ("system", "thinking"),
    ),
    "gpt-oss": NamedTemplate(
        "gpt-oss",
        "gpt-oss, OpenAI's harmony",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"),
        ("system", "tools", "thinking"),
    ),
}  # fmt: skip
"""Every named template; `data.template` takes its key."""


def missing_control(source: str, tokens: Collection[str]) -> tuple[str, ...]:
    """Control tokens that a tokenizer with `tokens` lacks for a template; empty for one that has no name."""
    named = next((row for row in TEMPLATES.values() if row.text == source), None)
    return tuple(token for token in named.control if token not in tokens) if named else ()


def resolve_template(setting: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a chat template.

    Args:
        setting: `auto` for the tokenizer's own (ChatML where it has none), a key of `TEMPLATES`, or a Jinja file.
        tokenizer: whose template `auto` takes.

    Raises:
        DataError: where the file cannot be read.
    """
    if setting in TEMPLATES:
        return TEMPLATES[setting].text
    if setting == "auto":
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default") or next(iter(own.values()), None)
        return own or CHATML
    path = Path(setting).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        close = difflib.get_close_matches(setting, TEMPLATES, n=1)
        raise DataError(
            f"The chat template {path.absolute()} cannot be read ({getattr(error, 'strerror', error)}).",
            hint=(f"Did you mean {close[0]!r}? " if close else "")
            + f"data.template is auto, the path of a Jinja file, or one of {', '.join(TEMPLATES)}.",
        ) from error
