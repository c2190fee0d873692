"""Groups of parameters that share a learning rate and a weight decay: what an optimizer is given.

Weight decay is for matrices and not for biases, norm weights and other vectors. Beyond that a rate may be an
embedding's, a LoRA+ matrix's, or that of the first pattern which a parameter's name matches.

The order of the groups is part of a checkpoint, where the state of a parameter is known by its number. It depends on
the patterns and not on the rates within one, so that a run may go on with another learning rate.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from torch import nn

from tunesmith.contracts.errors import UserError
from tunesmith.models.base_of import base_of


@dataclass(frozen=True, slots=True)
class Pattern:
    """Parameters by name, with a rate or a decay of their own.

    Attributes:
        match: a regular expression that is looked for anywhere in the name.
        learning_rate: peak of what it matches; None is that of the rest.
        weight_decay: of everything that it matches, vectors too; None is that of the rest.
    """

    match: str
    learning_rate: float | None = None
    weight_decay: float | None = None


class _Key(NamedTuple):
    """What parameters of one group share; groups stand in this order.

    Attributes:
        pattern: number of their pattern, -1 without one.
        ratio: their rate over that of most.
        vector: they are no matrices, and decay only where a pattern says so.
        apart: see `parameter_groups`.
    """

    pattern: int
    ratio: float
    vector: bool
    apart: bool


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    learning_rate: float,
    loraplus_lr_ratio: float | None = None,
    embedding_learning_rate: float | None = None,
    patterns: Sequence[Pattern] = (),
    apart: Collection[int] = (),
) -> list[dict[str, Any]]:
    """The trained parameters by weight decay and learning rate; empty groups are left out.

    Matrices decay, the rest does not. A group whose rate is not `learning_rate` has it as `lr_ratio`, a multiple; one
    of a pattern has it as `match`.

    Args:
        learning_rate: the peak of most parameters.
        loraplus_lr_ratio: rate of the B matrices of LoRA adapters over that of the A matrices beside them (LoRA+,
            https://arxiv.org/abs/2402.12354).
        embedding_learning_rate: peak of what trains of the embeddings and the head.
        patterns: rates and decays by name, of which the first that matches counts; its rate is in place of
            `embedding_learning_rate`.
        apart: identities of parameters that get groups of their own, marked `apart`.

    Raises:
        UserError: a pattern matches nothing that trains.
    """
    embeddings = _embedding_parameters(model)
    chosen = _chosen(model, patterns)
    groups: dict[_Key, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        number = chosen.get(id(parameter), -1)
        pattern = patterns[number] if number >= 0 else Pattern("")
        rate = embedding_learning_rate if id(parameter) in embeddings else None
        rate = rate if pattern.learning_rate is None else pattern.learning_rate
        ratio = 1.0 if rate is None else rate / learning_rate
        ratio *= loraplus_lr_ratio or 1.0 if ".lora_B." in name else 1.0
        key = _Key(number, ratio, parameter.ndim < 2, id(parameter) in apart)
        groups.setdefault(key, []).append(parameter)
    return [_group(key, groups[key], weight_decay, patterns) for key in sorted(groups)]


def _group(
    key: _Key, parameters: list[nn.Parameter], weight_decay: float, patterns: Sequence[Pattern]
) -> dict[str, Any]:
    """A group as an optimizer takes it."""
    group: dict[str, Any] = {"params": parameters, "weight_decay": 0.0 if key.vector else weight_decay}
    if key.pattern >= 0:
        pattern = patterns[key.pattern]
        group["match"] = pattern.match
        group["weight_decay"] = (
            group["weight_decay"] if pattern.weight_decay is None else pattern.weight_decay
        )
    return (
        group | ({"lr_ratio": key.ratio} if key.ratio != 1.0 else {}) | ({"apart": True} if key.apart else {})
    )


def _embedding_parameters(model: Any) -> set[int]:
    """Identities of the parameters of embeddings and head, adapters excepted."""
    base = base_of(model)
    modules = [getattr(base, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    return {
        id(parameter)
        for module in modules
        if module is not None
        for name, parameter in module.named_parameters()
        if "lora_" not in name
    }


def _chosen(model: nn.Module, patterns: Sequence[Pattern]) -> dict[int, int]:
    """Number of the pattern of each trained parameter that has one, by identity.

    A parameter that is tied has several names, and any of them may match.

    Raises:
        UserError: a pattern has no parameter.
    """
    names: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False)) if patterns else {}
    trained = {name: p for name, p in names.items() if p.requires_grad}
    chosen: dict[int, int] = {}
    for number, pattern in enumerate(patterns):
        for name, parameter in trained.items():
            if re.search(pattern.match, name):
                chosen.setdefault(id(parameter), number)
    without = [number for number in range(len(patterns)) if number not in chosen.values()]
    if without:
        reasons = [_reason(patterns[number].match, names) for number in without]
        named = [
            f"train.groups.{number}.match: {patterns[number].match!r} {reason}"
            for number, reason in zip(without, reasons, strict=True)
        ]
        near = dict.fromkeys(name for number in without for name in _nearest(patterns[number].match, trained))
        raise UserError(f"{'; '.join(named)}.", hint=f"The nearest names that train: {', '.join(near)}.")
    return chosen


def _reason(pattern: str, names: Mapping[str, nn.Parameter]) -> str:
    """Why a pattern got no parameter."""
    matched = {name: parameter for name, parameter in names.items() if re.search(pattern, name)}
    if not matched:
        return "matches no parameter"
    if any(parameter.requires_grad for parameter in matched.values()):
        return "matches nothing that the groups before it leave"
    return f"matches only what does not train, such as {next(iter(matched))}"


def _nearest(pattern: str, names: Collection[str], count: int = 3) -> list[str]:
    """Names whose parts look most like the words of the pattern; one stands for its likes in other layers."""
    words = re.findall(r"[A-Za-z_]\w+", pattern) or [pattern]
    of_each_kind: dict[str, str] = {}
    for name in names:
        of_each_kind.setdefault(re.sub(r"\d+", "0", name), name)

    def likeness(name: str) -> float:
        parts = name.split(".")
        return sum(max(SequenceMatcher(None, word, part).ratio() for part in parts) for word in words)

    return heapq.nlargest(count, of_each_kind.values(), key=likeness)
