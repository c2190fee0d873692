"""Proofs on a few tokens, before a run starts, that a model computes what this project assumes of it.

A family that computes its logits in a way that is not known, an encoder, or a model with layers that carry state
from one document of a row into the next would train without an error and learn the wrong thing. None of this is
looked up in a list of names: it is tried.

Shape suffixes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch

from tunesmith.contracts.errors import UserError
from tunesmith.models.head import CausalModel
from tunesmith.models.modes import evaluating
from tunesmith.models.probe import probe_batch


@torch.no_grad()
def check_head(causal: CausalModel) -> None:
    """Compare our head with the model's own logits on a few tokens, and see that no token sees later ones.

    Raises:
        UserError: they differ, so this family computes its logits in a way that is not known here; or the
            model is an encoder.
    """
    ids = torch.arange(8, device=causal.device)[None] % causal.config.vocab_size
    other = ids.clone()
    other[0, -1] = 0
    with evaluating(causal.model):
        own_TV = causal.base(input_ids=ids, use_cache=False).logits[0].float()
        other_TV = causal.base(input_ids=other, use_cache=False).logits[0].float()
        hidden_TD = causal.backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
    targets_T = own_TV.argmax(-1)
    ours_T = causal.scorer(hidden_TD, targets_T).logprob()
    theirs_T = torch.log_softmax(own_TV, -1).gather(-1, targets_T[:, None]).squeeze(-1)
    exact = causal.compute_dtype in (torch.float32, torch.float64)
    tolerance = 1e-3 if exact else 5e-2
    changed = own_TV.log_softmax(-1)[:-1] - other_TV.log_softmax(-1)[:-1]
    if float(changed.abs().max()) > (1e-4 if exact else tolerance):  # 0 but for rounding in a causal model
        raise UserError(
            f"{type(causal.base).__name__} is no causal language model: its tokens see the ones behind them.",
            hint="Encoders such as BERT cannot be trained to generate; choose a decoder model.",
        )
    difference = float((ours_T - theirs_T).abs().max())
    if not difference <= tolerance:
        raise UserError(
            f"{type(causal.base).__name__} computes its logits in a way that is not supported: "
            f"log-probabilities differ by {difference:.2g} from its own head's."
        )


@torch.no_grad()
def check_packing(causal: CausalModel) -> None:
    """See that a document computes the same inside a packed row as alone; call it under packed attention.

    Attention is told where documents begin. Layers that mix neighbouring tokens in another way, such as state-space
    and convolution layers, are not, and would carry one document into the next.

    Raises:
        UserError: the second document of a row sees the first, or the model refuses packed rows.
    """
    with evaluating(causal.model):
        try:
            packed = causal.hidden(probe_batch((9, 7)).to(causal.device))[9:].float()
            alone = causal.hidden(probe_batch((7,)).to(causal.device)).float()
        except ValueError as error:  # some layers of transformers see the boundaries, and say what they lack
            raise UserError(f"{type(causal.base).__name__} cannot run packed rows: {error}") from error
    difference = float((packed - alone).norm() / alone.norm().clamp_min(1e-30))
    if not difference <= (1e-4 if causal.compute_dtype in (torch.float32, torch.float64) else 5e-2):
        raise UserError(
            f"{type(causal.base).__name__} carries one document of a row into the next "
            f"(hidden states differ by {difference:.2g}), so its rows cannot be packed.",
            hint="Models with state-space or convolution layers cannot be trained yet.",
        )
