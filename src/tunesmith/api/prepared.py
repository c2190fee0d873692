"""A model once it is loaded: its fused layers and door, its two modes, and its files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from tunesmith.api.arguments import SAVING, check_foreign
from tunesmith.api.facts import Facts, facts_of, need_facts
from tunesmith.api.memory import attach_with
from tunesmith.api.silence import without_bars
from tunesmith.config.check_card import check_card
from tunesmith.contracts.errors import UserError
from tunesmith.export.merged import save_merged
from tunesmith.models.base_of import base_of

SAVE_METHODS = ("merged_16bit", "lora")
_CONVERT = "Use save_pretrained_merged, and llama.cpp's convert_hf_to_gguf.py on its folder."
_UPLOAD = "Use save_pretrained_merged, and `hf upload NAME FOLDER`."
NOT_HERE = {
    "save_pretrained_gguf": _CONVERT,
    "push_to_hub_gguf": _CONVERT,
    "push_to_hub_merged": _UPLOAD,
}
"""Methods that scripts for Unsloth call on a model, and what to do in place of each."""


def put_on(model: Any, facts: Facts, checkpointing: Any) -> None:
    """Put fused layers and door on, and say what is fused and what is not."""
    if facts.attached is not None:
        facts.attached.undo()
        facts.attached = None  # what follows may fail
    facts.checkpointing = checkpointing
    facts.attached = attach_with(model, checkpointing, tokens=model.max_seq_length)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = [("trained", f"{trained:,} parameters", _what_trains(model, facts)), *facts.left_out]
    rows += facts.attached.table()
    if facts.attached.installed is None:
        rows.append(("decoder layers", "stock", "fused layers need a GPU"))
    installed = facts.attached.installed
    if installed is not None:
        rows += [
            ("kernels", "stock", failed) for failed in check_card(model, installed, base_of(model).dtype)
        ]
    width = max(len(what) for what, _, _ in rows)
    facts.say(f"tunesmith: {facts.name}", *(f"  {what:<{width}}  {how}: {why}" for what, how, why in rows))


def _what_trains(model: Any, facts: Facts) -> str:
    if facts.full:
        return f"the weights themselves, in {str(base_of(model).dtype).removeprefix('torch.')}"
    config = model.peft_config[model.active_adapters[0]]
    # a module that is tied to another stands there twice, under its own name and its path
    whole = dict.fromkeys(name.rsplit(".", 1)[-1] for name in config.modules_to_save or ())
    parts = ["a LoRA adapter", *whole]
    if config.trainable_token_indices:
        parts.append("rows of the embeddings")
    if config.bias != "none":
        parts.append("biases")
    return ", ".join(parts)


def note_length(facts: Facts, model: Any) -> None:
    """Say where rows may be longer than the model was made for."""
    made_for = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)
    if made_for is not None and model.max_seq_length > made_for and not facts.stretched:
        facts.say(
            f"tunesmith: max_seq_length is {model.max_seq_length:,}, and the model was made for {made_for:,} "
            "positions; rows longer than that need rope_scaling."
        )


def equip(model: Any, max_seq_length: int) -> None:
    """Give one model the attributes that scripts expect."""
    model.max_seq_length = max_seq_length
    model.save_pretrained_merged = MethodType(save_pretrained_merged, model)
    model.for_training = MethodType(for_training, model)
    model.for_inference = MethodType(for_inference, model)
    for name in NOT_HERE:
        setattr(model, name, partial(_refuse, name))


def _refuse(name: str, *_: Any, **__: Any) -> None:
    raise UserError(f"{name} is not here.", hint=NOT_HERE[name])


def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
    """Put a model into training mode, with what it keeps between forward and backward.

    Args:
        use_gradient_checkpointing: as in `get_peft_model`; None leaves it as it was.
    """
    facts = need_facts(model, "for_training")
    model.train()
    if use_gradient_checkpointing is not None:
        put_on(model, facts, use_gradient_checkpointing)
    return model


def for_inference(model: Any) -> Any:
    """Put a model into evaluation mode; `generate` then takes transformers' own way, with a KV cache."""
    need_facts(model, "for_inference")
    model.eval()
    base_of(model).config.get_text_config().use_cache = True  # trainers switch it off and leave it so
    return model


def save_pretrained_merged(
    model: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    **foreign: Any,
) -> Path:
    """Save base and adapter as one model that plain transformers loads, or the adapter alone.

    Args:
        save_directory: a folder; files of the same names are replaced.
        tokenizer: saved beside the weights.
        save_method: `merged_16bit`, or `lora` for the adapter as PEFT saves it.
        foreign: arguments of Unsloth that change nothing here, or are refused with their reason.

    Returns:
        The folder.

    Raises:
        UserError: the method is another, the folder is a file, or the model carries an adapter that cannot be merged
            exactly.
        StorageError: the merged model cannot be written.
    """
    check_foreign(save_pretrained_merged, SAVING, foreign)
    folder = Path(save_directory).expanduser()
    if folder.is_file():  # transformers would say so in its log, and save nothing
        raise UserError(f"save_directory: {folder} is a file.", hint="Give a folder.")
    if save_method.startswith("merged_4bit"):
        raise UserError(
            f"save_method={save_method!r}: rounding the sum to 4 bits loses more than most adapters change.",
            hint="Use merged_16bit and load that with load_in_4bit=True, or keep base and adapter apart (lora).",
        )
    if save_method not in SAVE_METHODS:
        raise UserError(
            f"save_method={save_method!r} is none of {', '.join(map(repr, SAVE_METHODS))}.",
            hint="Use one of them.",
        )
    if save_method == "lora":
        if not hasattr(model, "peft_config"):
            raise UserError("save_method='lora': the model carries no adapter.", hint="Use merged_16bit.")
        model.save_pretrained(folder)
    else:
        compute = base_of(model).dtype
        facts = facts_of(model)
        with without_bars(facts is not None and facts.quiet):
            save_merged(model, folder, torch.float16 if compute == torch.float16 else torch.bfloat16)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
