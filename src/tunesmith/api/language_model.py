"""`FastLanguageModel`: a transformers model with a PEFT adapter, its layers fused, in two calls.

The names and arguments are those of scripts written for Unsloth. What comes back is a model of transformers and PEFT:
it trains in anybody's loop, and its files load without this package. Nothing is patched but this one model.
"""

from __future__ import annotations

from tunesmith.api.adapting import get_peft_model
from tunesmith.api.loading import from_pretrained
from tunesmith.api.prepared import for_inference, for_training, save_pretrained_merged


class FastLanguageModel:
    """The functions under the name that scripts know; there are no instances."""

    from_pretrained = staticmethod(from_pretrained)
    get_peft_model = staticmethod(get_peft_model)
    for_training = staticmethod(for_training)
    for_inference = staticmethod(for_inference)
    save_pretrained_merged = staticmethod(save_pretrained_merged)


FastModel = FastLanguageModel
"""The same under the name that newer scripts know."""
