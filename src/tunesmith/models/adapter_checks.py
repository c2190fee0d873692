"""What an adapter's options name is looked up in the model, so that a misspelt name is a sentence and not a guess.

PEFT passes over many of these in silence: a rank for a layer that is not there, a module to train that no name
ends in, a layer number past the last.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from tunesmith.contracts.errors import UserError

STARTS = ("gaussian", "pissa", "olora", "loftq")
"""Values of `init_lora_weights` by name; True and False besides."""


def _head(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of all linear layers, such as `q_proj`, without the head."""
    head = _head(model)
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return sorted(names)


def ends_in(name: str, ending: str) -> bool:
    """Whether a module's name is `ending` or ends in it after a dot."""
    return name == ending or name.endswith(f".{ending}")


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}."


def check_targets(model: nn.Module, targets: str | Sequence[str]) -> None:
    """Refuse targets that match no linear layer, or the head.

    Raises:
        UserError: with the nearest name.
    """
    if targets == "all-linear":
        return
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(targets, str):
        matched = _matching(targets, modules)
    else:
        matched = set()
        for target in targets:
            found = {name for name in modules if ends_in(name, target)}
            if not found:
                raise UserError(
                    f"adapter.targets: no linear layer of {type(model).__name__} is called {target!r}.",
                    hint=_near(target, linear_names(model)),
                )
            matched |= found
    head = _head(model)
    for name in matched:
        if modules[name] is head:
            raise UserError(
                f"adapter.targets: {name} is the language-model head, which an adapter cannot be put on.",
                hint="Leave it out; modules_to_save trains it whole.",
            )


def _matching(pattern: str, modules: dict[str, nn.Linear]) -> set[str]:
    try:
        matched = {name for name in modules if re.fullmatch(pattern, name)}
    except re.error as error:
        raise UserError(
            f"adapter.targets: {pattern!r} is not a regular expression: {error}.",
            hint="Write all-linear, a list of name endings, or an expression that whole names match.",
        ) from error
    if not matched:
        raise UserError(
            f"adapter.targets: no linear layer's whole name matches the regular expression {pattern!r}.",
            hint=f"Names are like {next(iter(modules), '')!r}: begin with `.*`, or give a list of name endings.",
        )
    return matched


def check_start(model: Any, start: bool | str) -> None:
    """Refuse a start that the base does not allow or that a saved adapter could not be loaded from.

    Raises:
        UserError: with what to do instead.
    """
    if isinstance(start, bool):
        return
    if start.startswith("pissa_niter"):
        raise UserError(
            f"adapter.init_lora_weights: {start} starts from a random approximation that PEFT draws anew when the "
            "adapter is loaded, so the result would not fit its base.",
            hint="Use pissa, which is exact.",
        )
    if start not in STARTS:
        raise UserError(
            f"adapter.init_lora_weights: there is no start {start!r}.",
            hint=f"There are: true, false, {', '.join(STARTS)}.",
        )
    four_bit, eight_bit = (getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    if start == "loftq" and not four_bit:
        raise UserError(
            "adapter.init_lora_weights: loftq makes up for the rounding of a 4-bit base, and this is none.",
            hint="Load it in 4 bits, or leave this at true.",
        )
    if start in ("pissa", "olora") and (four_bit or eight_bit):
        raise UserError(
            f"adapter.init_lora_weights: {start} takes the largest part of each weight out of the base, which a "
            "quantised base does not allow.",
            hint="Load the base in 16 bits, or use loftq on a 4-bit one.",
        )


def check_dora(model: Any) -> None:
    """Refuse DoRA where PEFT cannot measure the rows of the base.

    Raises:
        UserError: the base is in 8 bits, on a CPU.
    """
    if getattr(model, "is_loaded_in_8bit", False) and model.device.type == "cpu":
        raise UserError(
            "adapter.use_dora: PEFT starts it from the lengths of the base's rows, which bitsandbytes does not give "
            "for 8-bit weights on a CPU.",
            hint="Load the base in 4 or 16 bits.",
        )


def check_layers(model: Any, layers: Sequence[int] | int | None, targets: str | Sequence[str]) -> None:
    """Refuse numbers of decoder layers that the model does not have, or that a regular expression stands beside.

    Raises:
        UserError: with how many there are.
    """
    if layers is None:
        return
    if isinstance(targets, str) and targets != "all-linear":
        raise UserError(
            "adapter.layers_to_transform stands beside a regular expression, which chooses layers itself.",
            hint=r"Write the layers into the expression, such as `.*\.layers\.(30|31)\..*_proj`.",
        )
    count = model.config.get_text_config().num_hidden_layers
    wrong = [n for n in (layers if isinstance(layers, Sequence) else [layers]) if not 0 <= n < count]
    if wrong:
        raise UserError(
            f"adapter.layers_to_transform: there is no decoder layer {wrong[0]}.",
            hint=f"This model has layers 0 to {count - 1}.",
        )


def check_saved(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse modules to train that no name of the model ends in.

    Raises:
        UserError: with the nearest name.
    """
    endings = {name.rsplit(".", 1)[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters()}
    for wanted in names:
        if not any(ends_in(name, wanted) for name, _ in model.named_modules()):
            raise UserError(
                f"adapter.modules_to_save: no module of {type(model).__name__} is called {wanted!r}.",
                hint=_near(wanted, sorted(endings)),
            )
