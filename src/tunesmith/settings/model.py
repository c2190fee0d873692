"""Settings of the model and of the adapter that is trained on top of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.settings.base import Section

Patterns = Annotated[tuple[str, ...], Field(strict=False)]
"""A YAML list of names or glob patterns."""


class ModelSettings(Section):
    """Which model is trained, and in which form its weights are held."""

    name: str = Field(min_length=1)
    """A Hugging Face id or a local folder with `config.json`, weights and tokenizer."""
    quantize: Literal["none", "nf4"] = "none"
    """Hold the frozen weights of the linear layers in 4 bits (`nf4`, QLoRA) or as they are (`none`)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type. `auto`: bfloat16 on a GPU that has it, float16 on an older one, float32 on CPU.
    Parameters that are trained are held in float32 whatever this says."""
    attention: Literal["auto", "sdpa", "varlen"] = "auto"
    """Attention over packed documents: torch's variable-length FlashAttention (`varlen`, GPU with
    bfloat16 or float16), one exact SDPA call per document (`sdpa`), or the first that fits (`auto`)."""
    freeze: Patterns = ()
    """Glob patterns of parameter names that stay frozen in full fine-tuning, such as `model.embed_tokens.*`
    or `model.layers.[0-5].*`."""
    revision: str | None = None
    """Branch, tag or commit on the Hugging Face hub."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships. Off unless you have read that code."""


class AdapterSettings(Section):
    """The adapter that is trained, or `kind: none` for full fine-tuning."""

    kind: Literal["lora", "none"] = "lora"
    """`lora` trains low-rank adapters (https://arxiv.org/abs/2106.09685); `none` trains the model itself."""
    rank: int = Field(default=16, ge=1)
    """Rank of the two adapter matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | Patterns = "all-linear"
    """Which linear layers get an adapter: `all-linear` (the head excepted) or a list of name endings."""
    path: str | None = None
    """Continue from this adapter directory; rank, alpha, dropout and targets are then the adapter's own."""
