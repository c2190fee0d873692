"""The head of a causal language model, found once and run over supervised positions only.

`CausalModel` splits any transformers causal model into backbone and head. What stands between the final hidden
state and the logits differs by family (a soft cap, a factor); it is data here (`_LOGIT_RULES`), and
`head_check.check_head` proves on a few tokens that our head gives the model's own logits, so a family with a rule
that we do not know is refused instead of trained wrongly.

Shape suffixes: T tokens, S supervised tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.contracts.batch import TokenBatch
from tunesmith.contracts.errors import UserError
from tunesmith.kernels.linear_logprob import linear_cross_entropy, linear_logprob
from tunesmith.models.attention import document_kwargs
from tunesmith.models.base_of import base_of

FEW = 0.75
"""Share of a row's positions up to which taking them out of it in the last layer saves time."""

_LOGIT_RULES: dict[str, tuple[str, bool]] = {
    # attribute of the config: (what it is, whether it divides)
    "logit_scale": ("scale", False),  # Cohere
    "logits_scaling": ("scale", True),  # Granite
    "final_logit_softcapping": ("softcap", False),  # Gemma 2
}


@dataclass(frozen=True)
class HeadScorer:
    """`objectives.api.Scorer` over the hidden states `[S, D]` at the supervised positions of one batch."""

    hidden_SD: Tensor
    targets_S: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None

    def logprob(self) -> Tensor:
        """Log-probability of every supervised token, float32 `[S]`, differentiable."""
        return linear_logprob(
            self.hidden_SD,
            self.weight_VD,
            self.targets_S,
            bias_V=self.bias_V,
            scale=self.scale,
            softcap=self.softcap,
        )

    def cross_entropy(self, weights_S: Tensor) -> Tensor:
        """Σ_s −weights_s · logprob_s as a scalar."""
        return linear_cross_entropy(
            self.hidden_SD, self.weight_VD, self.targets_S, weights_S,
            bias_V=self.bias_V, scale=self.scale, softcap=self.softcap,
        )  # fmt: skip


class CausalModel:
    """A transformers causal model, with or without a PEFT adapter, as backbone and head.

    Args:
        model: the model whose parameters are trained (a `PeftModel` or a `PreTrainedModel`).
        compute_dtype: type of the head's GEMMs, and of autocast where it differs from the weights' type.

    Raises:
        UserError: the model has no linear output head, no backbone of its own, or an adapter on its head.
    """

    def __init__(self, model: Any, compute_dtype: torch.dtype) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        self.base = base_of(model)
        if self.base.get_output_embeddings() is None:
            raise UserError(f"{type(self.base).__name__} has no language-model head to train against.")
        name = type(self.base).__name__
        if hasattr(self.base.get_output_embeddings(), "lora_A"):
            raise UserError(
                f"An adapter sits on the language-model head of {name}, where it would not be trained.",
                hint="Use an adapter without lm_head among its target modules.",
            )
        self.backbone = self.base.get_decoder()
        if self.backbone is self.base or not hasattr(self.backbone, "get_input_embeddings"):
            raise UserError(f"{name} does not tell its backbone from its head, so it cannot be trained here.")
        self.config = self.base.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """Where the head's weight lives."""
        weight: Tensor = self._head_module().weight
        return weight.device

    def _head_module(self) -> Any:
        head = self.base.get_output_embeddings()
        if hasattr(head, "modules_to_save"):  # PEFT keeps a trained copy of the head beside the original
            head = head.modules_to_save[head.active_adapters[0]]
        return head

    def hidden(self, batch: TokenBatch, rows_S: Tensor | None = None) -> Tensor:
        """Final hidden states `[T, D]` of a packed row, each document seeing itself only.

        Args:
            rows_S: positions that the caller is going to read. A fused last layer computes only these after its
                attention, and the result is then `[S, D]` in their order.
        """
        wanted = {} if rows_S is None else {"wanted_rows": rows_S}
        output = self.backbone(
            input_ids=batch.ids_T[None],
            position_ids=batch.position_ids_T[None],
            use_cache=False,
            **document_kwargs(batch),
            **wanted,
        )
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD

    def score(self, batch: TokenBatch) -> HeadScorer:
        """Run the backbone and return the scorer of the batch's supervised tokens."""
        rows_S = batch.logit_index_S
        few = batch.supervised <= FEW * batch.tokens
        hidden_TD = self.hidden(batch, rows_S if few else None)
        if few and hidden_TD.shape[0] == batch.supervised:
            return self.scorer(hidden_TD, batch.targets_S)
        return self.scorer(hidden_TD.index_select(0, rows_S), batch.targets_S)

    def scorer(self, hidden_SD: Tensor, targets_S: Tensor) -> HeadScorer:
        """The head over given hidden states `[S, D]`; reads the head's parameters anew at every call."""
        head = self._head_module()
        rules: dict[str, float | None] = {"scale": 1.0, "softcap": None}
        for attribute, (rule, divides) in _LOGIT_RULES.items():
            value = getattr(self.config, attribute, None)
            if value is not None:
                rules[rule] = 1.0 / value if divides else float(value)
        scale = rules["scale"]
        assert scale is not None
        dtype = self.compute_dtype
        bias = getattr(head, "bias", None)
        return HeadScorer(
            hidden_SD.to(dtype), targets_S, head.weight.to(dtype), bias, scale=scale, softcap=rules["softcap"]
        )
