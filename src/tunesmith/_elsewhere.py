"""Names that scripts import from other libraries of this kind, and what stands in their place here."""

from __future__ import annotations

_PATCH = "Nothing is patched here: delete the import and the call."
_TRL = "Import it from trl: its trainers take models of FastLanguageModel as they are."

INSTEAD = {
    "PatchDPOTrainer": _PATCH,
    "PatchFastRL": _PATCH,
    "PatchKTOTrainer": _PATCH,
    "PatchORPOTrainer": _PATCH,
    "DPOConfig": _TRL,
    "DPOTrainer": _TRL,
    "GRPOConfig": _TRL,
    "GRPOTrainer": _TRL,
    "SFTConfig": _TRL,
    "FastVisionModel": "Models train on text here: FastLanguageModel.",
    "UnslothTrainer": "Use SFTTrainer, which takes embedding_learning_rate itself.",
    "UnslothTrainingArguments": "Use transformers' TrainingArguments; SFTTrainer takes embedding_learning_rate.",
    "apply_chat_template": "Use tokenizer.apply_chat_template in dataset.map.",
    "is_bf16_supported": "Use is_bfloat16_supported.",
    "standardize_data_formats": "Use standardize_sharegpt.",
    "unsloth_train": "Use trainer.train(), whose loss does not depend on accumulation.",
}
"""What to do, in a sentence, by the name."""
