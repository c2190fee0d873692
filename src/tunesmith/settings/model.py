"""Settings of the model and of the adapter that is trained on top of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from tunesmith.settings.base import Section
from tunesmith.settings.rope import RopeScaling

Patterns = Annotated[tuple[str, ...], Field(strict=False)]
"""A YAML list of names or glob patterns."""


_OF_EXPRESSIONS = ".*[(|"


def _check_expression(value: str) -> str:
    """A name alone would match no layer's whole name, and is probably a misspelt word."""
    if not set(value) & set(_OF_EXPRESSIONS):
        raise ValueError("a regular expression (with . * [ ( or | in it)")
    return value


Expression = Annotated[
    str,
    AfterValidator(_check_expression),
    WithJsonSchema({"type": "string", "pattern": "[" + _OF_EXPRESSIONS.replace("[", r"\[") + "]"}),
]
"""A regular expression that a whole name matches."""


class ModelSettings(Section):
    """Which model is trained, and in which form its weights are held."""

    name: str = Field(min_length=1)
    """A Hugging Face id or a local folder with `config.json`, weights and tokenizer."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Hold the frozen weights of the linear layers in 4 bits (`nf4`, QLoRA), in 8 bits (`int8`, not fused), or as
    they are (`none`)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type. `auto`: bfloat16 on a GPU that has it, float16 on an older one, float32 on CPU.
    Parameters that are trained are held in float32 whatever this says, but for full fine-tuning with `adamw`,
    `adamw_8bit` or torchao's, which round stochastically: there `bfloat16` holds the weights in bfloat16 as well, and
    `auto` does on a GPU where float32 would not fit."""
    attention: Literal["auto", "sdpa", "varlen"] = "auto"
    """Attention over packed documents: torch's variable-length FlashAttention (`varlen`, GPU with
    bfloat16 or float16), one exact SDPA call per document (`sdpa`), or the first that fits (`auto`)."""
    rope_scaling: RopeScaling | None = None
    """Stretch the rotary positions for rows longer than the model was made for, such as
    `{rope_type: yarn, factor: 4.0}`. In place of a scaling that the model has."""
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
    targets: Literal["all-linear"] | Expression | Patterns = "all-linear"
    """Which linear layers get an adapter: `all-linear` (the head excepted), a list of name endings, or a regular
    expression that a layer's whole name matches."""
    path: str | None = None
    """Continue from this adapter directory; rank, alpha, dropout, targets and start are then the adapter's own."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Train biases as well: all of the model's, or those of the layers with an adapter."""
    use_rslora: bool = False
    """Scale the output by alpha / √rank (https://arxiv.org/abs/2312.03732)."""
    use_dora: bool = False
    """Train the length of each weight row apart from its direction (DoRA, https://arxiv.org/abs/2402.09353). Layers
    with it are not fused."""
    init_lora_weights: bool | Literal["gaussian", "pissa", "olora", "loftq"] = True
    """Start of the adapter. `true`: B is zero. `pissa` (https://arxiv.org/abs/2404.02948) and `olora` take the
    largest part of each weight; `loftq` makes up for what a 4-bit base lost by rounding."""
    modules_to_save: Patterns = ()
    """Modules that train whole beside the adapter, by name endings: `embed_tokens`, `lm_head`."""
    layers_to_transform: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    """Numbers of the decoder layers that get an adapter, from 0."""
    last_layers: int | None = Field(default=None, ge=1)
    """Put the adapter on the last so many decoder layers only."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Ranks of their own for some layers: name ending or regular expression to rank."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Alphas of their own for some layers."""
    new_tokens: Patterns = ()
    """Tokens to add; their rows start at the mean of the others and train, alone or with `embed_tokens`."""
    loraplus_lr_ratio: float | None = Field(default=None, gt=0)
    """Learning rate of the B matrices over that of the A matrices (LoRA+, https://arxiv.org/abs/2402.12354)."""
    embedding_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of what trains of embeddings and head, where it is not `train.learning_rate`."""
