"""A result, loaded to answer: the one place for `chat`, `generate` and `merge`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tunesmith.config.find_result import FoundResult, base_of_adapter, find_result
from tunesmith.config.prompting import Prompter
from tunesmith.contracts.errors import UserError
from tunesmith.models.adapter import load_lora
from tunesmith.models.adapter_checks import rewrites_base
from tunesmith.models.generate import Stop
from tunesmith.models.loader import choose_device, choose_dtype, find_adapter, load_model, load_tokenizer

_WORDS = {
    "then set model.trust_remote_code: true.": "then add --trust-remote-code.",
    "Set model.name to the model that it was trained on.": (
        "Write the model that it was trained on into base_model_name_or_path of its adapter_config.json."
    ),
    "A LoRA adapter goes to adapter.path.": "Name the model that this adapter was trained on.",
    "adapter.path: ": "",
}
"""What errors of the loader say of a run file, and what they say here."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that answers.

    Attributes:
        model: of transformers, or of PEFT where the result is an adapter; frozen and in evaluation mode.
        tokenizer: the one saved with the result.
        prompter: writes prompts with the template that was trained with.
        stop: what ends an answer.
        context: how many tokens the model was made for; None where its config does not say.
        adapter: whether the model carries an adapter.
        quantize: how the base is held.
        no_base: why the answers of the base alone cannot be had; None where they can.
    """

    model: Any
    tokenizer: Any
    prompter: Prompter
    stop: Stop
    context: int | None
    adapter: bool
    quantize: str
    no_base: str | None

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Within the block the adapter is switched off.

        Raises:
            UserError: the result has no base to show, or not as it was.
        """
        if self.no_base is not None:
            raise UserError(f"--base: {self.no_base}")
        with self.model.disable_adapter():
            yield


@dataclass(frozen=True, slots=True)
class Place:
    """Where the parts of a result lie.

    Attributes:
        base: folder or hub id of the model.
        revision: its revision on the hub.
        adapter: folder of the adapter; None for a model without one.
        tokenizer: folder or hub id whose tokenizer is taken.
    """

    base: str
    revision: str | None
    adapter: Path | None
    tokenizer: str


@contextmanager
def about(place: Place | None, found: FoundResult) -> Iterator[None]:
    """Within the block errors of the loader speak of the result and not of a run file."""
    try:
        yield
    except UserError as error:
        whose = f"The base model of {found.name}: " if place is not None and place.adapter else ""
        message = error.message.replace("model.name: ", whose).replace("model.revision: ", whose)
        hint = error.hint
        for said, meant in _WORDS.items():
            message = message.replace(said, meant)
            hint = hint.replace(said, meant) if hint else None
        raise UserError(_capital(message), hint=hint, exit_code=error.exit_code) from error.__cause__


def _capital(sentence: str) -> str:
    """A sentence that lost its first words; names of models keep their letters."""
    for word in ("the ", "there "):
        if sentence.startswith(word):
            return sentence[0].upper() + sentence[1:]
    return sentence


def fetched(found: FoundResult) -> FoundResult:
    """The same with the folder of an adapter that is on the hub, which is fetched; no weights of a model are.

    Raises:
        UserError: the adapter does not say what it was trained on.
    """
    if found.folder is not None:
        return found
    with about(None, found):
        source = find_adapter(found.name)
    return found if source is None else replace(find_result(str(source.folder)), name=found.name)


def place_of(found: FoundResult) -> Place:
    """Where the parts of a result lie.

    Raises:
        UserError: an adapter does not say what it was trained on.
    """
    if found.folder is None or not found.adapter:
        name = found.name if found.folder is None else str(found.folder)
        return Place(name, None, None, name)
    base, revision = base_of_adapter(found.folder)
    own = (found.folder / "tokenizer_config.json").is_file()
    return Place(base, revision, found.folder, str(found.folder) if own else base)


def compute_dtype(found: FoundResult, device: torch.device) -> torch.dtype:
    """The compute type of a result on a device: the run's, or the fastest that is safe."""
    return choose_dtype(found.dtype, device)


def load_parts(
    found: FoundResult,
    place: Place,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> Any:
    """The model of a result with its adapter, frozen.

    Raises:
        UserError: a part is missing, damaged or does not fit.
    """
    with about(place, found):
        model = load_model(
            place.base,
            device=device,
            dtype=dtype,
            quantize=found.quantize,
            revision=place.revision,
            trust_remote_code=trust_remote_code,
            rope_scaling=found.rope_scaling
            if place.adapter is not None
            else None,  # a model's config has its own
        )
    if place.adapter is not None:
        with about(None, found):
            model = load_lora(model, str(place.adapter))
    return model.requires_grad_(False).eval()


def load_tokenizer_of(found: FoundResult, place: Place, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a result.

    Raises:
        UserError: it cannot be loaded.
    """
    revision = place.revision if place.tokenizer == place.base else None
    with about(place if place.tokenizer == place.base else None, found):
        return load_tokenizer(place.tokenizer, revision=revision, trust_remote_code=trust_remote_code)


def load_result(found: FoundResult, *, trust_remote_code: bool = False) -> Loaded:
    """Load a result to answer with it.

    Raises:
        UserError: anything about it that the user can mend.
    """
    device = choose_device()
    found = fetched(found)
    place = place_of(found)
    tokenizer = load_tokenizer_of(found, place, trust_remote_code=trust_remote_code)
    prompter = Prompter(tokenizer, found.date)
    model = load_parts(
        found,
        place,
        dtype=compute_dtype(found, device),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    base = model.get_base_model() if place.adapter is not None else model
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        prompter=prompter,
        stop=stop_of(base, tokenizer, prompter),
        context=getattr(base.config.get_text_config(), "max_position_embeddings", None),
        adapter=place.adapter is not None,
        quantize=found.quantize,
        no_base=base_refusal(model)
        if place.adapter is not None
        else "the result is a whole model, not an adapter.",
    )


def stop_of(model: Any, tokenizer: Any, prompter: Prompter) -> Stop:
    """What ends an answer: every end that the generation config, the tokenizer and the template name."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = named if isinstance(named, list) else [named]
    turn, text = prompter.ends()
    ends = [number for number in (*ids, tokenizer.eos_token_id, *turn) if number is not None]
    return Stop(tuple(dict.fromkeys(ends)), text)


def base_refusal(model: Any) -> str | None:
    """Why a model with its adapter switched off would not be its base; None where it is."""
    config = model.peft_config[model.active_adapters[0]]
    start = config.init_lora_weights
    if rewrites_base(start):
        return f"this adapter took a part of the base's weights into itself ({start}), so both act together only."
    biases = any(name.endswith(".bias") for name, _ in model.get_base_model().named_parameters())
    if config.bias != "none" and biases:
        return "this adapter changed the biases of the base itself, so it cannot be switched off."
    return None


def only_base(loaded: Loaded, wanted: bool) -> Any:
    """`base_only` where it is wanted, or a block in which nothing changes."""
    return loaded.base_only() if wanted else nullcontext()
