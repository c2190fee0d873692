"""What an adapter's options name is looked up in the model, so that a misspelt name is a sentence and not a guess.

PEFT passes over many of these in silence: a rank for a layer that is not there, a module to train that no name
ends in, a layer number past the last.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from tunesmith.contracts.errors import UserError
from tunesmith.models.adapter_targets import (
    ALL,
    all_linear,
    ends_in,
    gives_a_product,
    stacked_experts,
    taken_for_experts,
)

STARTS = ("gaussian", "pissa", "olora", "loftq")
"""Values of `init_lora_weights` by name; True and False besides."""

_REWRITING = ("pissa", "olora", "corda")
"""Starts that take a part of the base's weights into the adapter, also with more behind it: `pissa_niter_16`."""


def rewrites_base(start: object) -> bool:
    """Whether an adapter with this `init_lora_weights` changes the base when it is loaded."""
    return isinstance(start, str) and start.split("_")[0] in _REWRITING


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


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}."


def check_targets(model: nn.Module, targets: str | Sequence[str]) -> set[str]:
    """The names of the layers that targets match; refuses those that match no linear layer, or the head.

    Raises:
        UserError: with the nearest name.
    """
    head = _head(model)
    if targets == ALL:
        return all_linear(model)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(targets, str):
        matched = _matching(targets, modules, "adapter.targets")
    else:
        matched = set()
        for target in targets:
            found = {name for name in modules if ends_in(name, target)}
            if not found and _is_embedding(model, target):
                whole = [name for name in targets if _is_embedding(model, name)]
                whole += [
                    name
                    for name in targets
                    if any(modules[at] is head for at in modules if ends_in(at, name))
                ]
                raise UserError(
                    f"adapter.targets: an adapter cannot be put on {target}, which trains whole or not at all.",
                    hint=f"Name {' and '.join(whole)} in modules_to_save in place of here.",
                )
            if not found and not _names_experts(model, target):
                raise UserError(
                    f"adapter.targets: no linear layer of {type(model).__name__} is called {target!r}.",
                    hint=_near(target, linear_names(model)),
                )
            matched |= found
    for name in sorted(matched):
        if modules[name] is head:
            raise UserError(
                f"adapter.targets: {name} is the language-model head, which an adapter cannot be put on.",
                hint="Leave it out; modules_to_save trains it whole.",
            )
        if not gives_a_product(modules[name]):
            raise UserError(
                f"adapter.targets: {name} is a {type(modules[name]).__name__}, which computes more than a product, "
                "and an adapter cannot stand on it.",
                hint="Leave it out, or use all-linear, which does.",
            )
    return matched


def _is_embedding(model: nn.Module, target: str) -> bool:
    return any(
        isinstance(module, nn.Embedding) and ends_in(name, target) for name, module in model.named_modules()
    )


def _names_experts(model: Any, target: str) -> bool:
    """Whether a target that no layer is called is what PEFT knows experts by that are in one tensor."""
    known = taken_for_experts(model.config.model_type, target.rpartition(".")[2])
    return known and bool(stacked_experts(model))


def check_patterns(setting: str, patterns: Iterable[str], targeted: set[str]) -> None:
    """Refuse a rank or alpha for layers that get no adapter; PEFT would pass over it.

    Args:
        setting: named in the message.
        patterns: name endings or regular expressions, as PEFT matches them.
        targeted: names of the layers that get an adapter.

    Raises:
        UserError: with the nearest name.
    """
    for pattern in patterns:
        try:
            found = any(re.match(rf"(.*\.)?({pattern})$", name) for name in targeted)
        except re.error as error:
            raise UserError(f"{setting}: {pattern!r} is not a regular expression: {error}.") from error
        if not found:
            raise UserError(
                f"{setting}: no layer that gets an adapter is called {pattern!r}.",
                hint=_near(pattern, sorted({name.rsplit(".", 1)[-1] for name in targeted})),
            )


def check_excluded(excluded: str | Sequence[str] | None, targeted: set[str]) -> None:
    """Refuse layers to leave out that would get no adapter anyway, or that leave none.

    Raises:
        UserError: with the nearest name.
    """
    if isinstance(excluded, str):  # an expression that whole names match, as with targets
        _matching(excluded, targeted, "adapter.exclude_modules")
    for ending in () if isinstance(excluded, str) else excluded or ():
        if not any(ends_in(name, ending) for name in targeted):
            raise UserError(
                f"adapter.exclude_modules: no layer that would get an adapter is called {ending!r}.",
                hint=_near(ending, sorted({name.rsplit(".", 1)[-1] for name in targeted})),
            )


def check_rows(model: Any, indices: Any) -> None:
    """Refuse ids of tokens that the embeddings have no row for.

    Args:
        indices: PEFT's `trainable_token_indices`: ids, or a dict of them.

    Raises:
        UserError: with how many rows there are.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    for ids in indices.values() if isinstance(indices, Mapping) else [indices or ()]:
        wrong = [number for number in ids if not 0 <= number < rows]
        if wrong:
            raise UserError(
                f"adapter.trainable_token_indices: there is no token {wrong[0]}.",
                hint=f"The embeddings have rows 0 to {rows - 1}.",
            )


def _matching(pattern: str, names: Collection[str], setting: str) -> set[str]:
    try:
        matched = {name for name in names if re.fullmatch(pattern, name)}
    except re.error as error:
        raise UserError(
            f"{setting}: {pattern!r} is not a regular expression: {error}.",
            hint="Write all-linear, a list of name endings, or an expression that whole names match.",
        ) from error
    if not matched:
        raise UserError(
            f"{setting}: no linear layer's whole name matches the regular expression {pattern!r}.",
            hint=f"Names are like {next(iter(names), '')!r}: begin with `.*`, or give a list of name endings.",
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
    endings = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if name and any(True for _ in module.parameters(recurse=False))
    }
    for wanted in names:
        if not any(ends_in(name, wanted) for name, _ in model.named_modules()):
            raise UserError(
                f"adapter.modules_to_save: no module of {type(model).__name__} is called {wanted!r}.",
                hint=_near(wanted, sorted(endings)),
            )
