"""Arguments of `FastLanguageModel` that scripts in circulation pass, and what becomes of each.

An argument either does something here, or asks for what happens anyway (`HARMLESS`: the values that do), or is
refused with its reason. Nothing is swallowed: what is in no table raises a TypeError with the nearest name.
docs/fast-language-model.md prints the tables.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.contracts.errors import UserError


@dataclass(frozen=True, slots=True)
class Foreign:
    """An argument that does nothing here.

    Attributes:
        harmless: values that ask for nothing but what happens anyway, and are accepted; None for every value.
        reason: why another value is refused, or why every value is harmless, one sentence.
        instead: what to do, one sentence.
    """

    harmless: tuple[Any, ...] | None
    reason: str
    instead: str = ""

    def accepts(self, value: Any) -> bool:
        """Whether a value asks for nothing."""
        return self.harmless is None or any(
            type(value) is type(own) and value == own for own in self.harmless
        )


_VISION = Foreign((False, None), "Only language models train here.", "Leave it out.")
_ALL_LAYERS = Foreign((True, None), "Layers are chosen by name.", "List the layers in target_modules.")
_SERVING = Foreign(
    (False, None),
    "Nothing here serves a model: generation is that of transformers.",
    "Save the result and serve it with vLLM; it loads there as it is.",
)
_LEANEST = 'use_gradient_checkpointing="unsloth" needs the least memory.'

LOADING: dict[str, Foreign] = {
    "auto_model": Foreign((None,), "Causal language models are loaded.", "Leave it out."),
    "cache_dir": Foreign((None,), "Files lie where the Hub's own library keeps them.", "Set HF_HOME."),
    "disable_log_stats": Foreign((True, None), _SERVING.reason, "Leave it out."),
    "fast_inference": _SERVING,
    "fix_tokenizer": Foreign(
        (True, None),
        "The tokenizer is taken as its publisher made it.",
        "Leave it out and compare its tokens.",
    ),
    "float32_mixed_precision": Foreign(
        (None, True), "What trains is float32; with full_finetuning dtype may say bfloat16.", "Leave it out."
    ),
    "float8_kv_cache": _SERVING,
    "fullgraph": Foreign(None, "Nothing is compiled."),
    "gpu_memory_utilization": Foreign((0.5, 0.6, None), _SERVING.reason, "Leave it out."),
    "local_files_only": Foreign(
        (False, None), "A folder is read as it is, a name asks the Hub.", "Set HF_HUB_OFFLINE=1."
    ),
    "load_in_fp8": Foreign(
        (False, None),
        "No layer computes in 8-bit floats.",
        "Use load_in_4bit, load_in_8bit or load_in_16bit.",
    ),
    "max_lora_rank": Foreign((8, 16, 32, 64, 128, None), _SERVING.reason, "Leave it out; any rank trains."),
    "offload_embedding": Foreign(
        (False, None),
        "Embeddings stay on the device; memory.embedding of a run file moves them.",
        _LEANEST,
    ),
    "qat_scheme": Foreign(
        (None,), "Training with simulated rounding is not built in.", "Train, merge, then quantise."
    ),
    "random_state": Foreign((3407, None), "Loading draws nothing at random.", "Give it to get_peft_model."),
    "resize_model_vocab": Foreign(
        (None,), "A size alone says nothing about new tokens.", "Use add_new_tokens(model, tokenizer, [...])."
    ),
    "return_logits": Foreign(None, "A forward pass returns what transformers returns."),
    "text_only": Foreign((True, None), "Only language models train here.", "Leave it out."),
    "unsloth_force_compile": Foreign((False, None), "Nothing is compiled.", "Leave it out."),
    "unsloth_tiled_mlp": Foreign(
        (False, None),
        "The MLP is one fused computation.",
        _LEANEST,
    ),
    "use_exact_model_name": Foreign(None, "A name is always taken as it stands."),
    "whisper_language": Foreign((None,), "Only language models train here.", "Leave it out."),
    "whisper_task": Foreign((None,), "Only language models train here.", "Leave it out."),
}
"""What `from_pretrained` accepts or refuses besides its own arguments."""

ADAPTING: dict[str, Foreign] = {
    "ensure_weight_tying": Foreign(None, "Embeddings and head train as one where the model ties them."),
    "finetune_attention_modules": _ALL_LAYERS,
    "finetune_audio_layers": _VISION,
    "finetune_language_layers": _ALL_LAYERS,
    "finetune_mlp_modules": _ALL_LAYERS,
    "finetune_vision_layers": _VISION,
    "qat_scheme": LOADING["qat_scheme"],
    "target_parameters": Foreign(
        (None,), "Adapters are put on linear layers.", "Name layers in target_modules."
    ),
    "task_type": Foreign(("CAUSAL_LM", None), "Causal language models train here.", "Leave it out."),
    "temporary_location": Foreign(
        ("_unsloth_temporary_saved_buffers", None), "No buffers are written to the disk.", "Leave it out."
    ),
}  # fmt: skip
"""What `get_peft_model` accepts or refuses besides its own arguments."""


_NO_UPLOAD = Foreign((False, None), "Nothing is uploaded.", "Use `hf upload NAME FOLDER` on the folder.")

SAVING: dict[str, Foreign] = {
    "create_pr": _NO_UPLOAD,
    "is_main_process": Foreign((True, None), "The caller decides who saves.", "Call it in one process."),
    "max_shard_size": Foreign(None, "A file holds what fits the host's memory with ease."),
    "maximum_memory_usage": Foreign(None, "Tensors are written one by one, whatever memory there is."),
    "private": Foreign(None, _NO_UPLOAD.reason),
    "push_to_hub": _NO_UPLOAD,
    "safe_serialization": Foreign((True, None), "Nothing is written as a pickle.", "Leave it out."),
    "tags": Foreign(None, _NO_UPLOAD.reason),
    "temporary_location": ADAPTING["temporary_location"],
    "token": Foreign(None, _NO_UPLOAD.reason),
}
"""What `save_pretrained_merged` accepts or refuses besides its own arguments."""

CONVERTING: dict[str, Foreign] = {
    "aliases_for_assistant": Foreign(
        (None,), "The usual names of roles are known.", "Rename others in the data."
    ),
    "aliases_for_system": Foreign(
        (None,), "The usual names of roles are known.", "Rename others in the data."
    ),
    "aliases_for_user": Foreign((None,), "The usual names of roles are known.", "Rename others in the data."),
    "batch_size": Foreign(None, "It changes nothing but speed."),
    "tokenizer": Foreign(None, "Messages are read, not tokenised."),
}
"""What `standardize_sharegpt` accepts or refuses besides its own arguments."""


def check_foreign(
    function: Callable[..., Any],
    table: Mapping[str, Foreign],
    given: Mapping[str, Any],
    known: Iterable[str] = (),
) -> None:
    """Accept what is harmless, refuse the rest.

    Args:
        function: whose further keyword arguments `given` are.
        table: `LOADING` or `ADAPTING`.
        known: names of arguments that the function takes besides those of its signature.

    Raises:
        UserError: an argument that is known and asks for what is not there.
        TypeError: one that nobody knows.
    """
    for name, value in given.items():
        row = table.get(name)
        if row is None:
            own = [*inspect.signature(function).parameters, *known, *table]
            near = difflib.get_close_matches(name, own, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TypeError(f"{function.__name__}() takes no argument {name!r}{hint}")
        if not row.accepts(value):
            raise UserError(
                f"{function.__name__}: {name}={value!r} is not possible. {row.reason}", hint=row.instead
            )
