"""Which projections of a model an adapter is on, from its settings and the family's names. Torch-free."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tunesmith.contracts.errors import UserError
from tunesmith.planning.architectures import ARCHITECTURES
from tunesmith.planning.facts import ModelFacts
from tunesmith.settings.model import AdapterSettings

GROUPS = ("qkv", "output", "gate_up", "down")
_USUAL_NAMES = {
    "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"),
    "output": ("o_proj", "out_proj", "dense"),
    "gate_up": ("gate_proj", "up_proj", "gate_up_proj", "dense_h_to_4h", "c_fc", "fc1"),
    "down": ("down_proj", "dense_4h_to_h", "fc2"),
}
"""Names of projections in families without a row."""


class Adapted(NamedTuple):
    """What an adapter is on.

    Attributes:
        rank: of its matrices, 0 where all weights train.
        groups: of `GROUPS`, that carry it.
        parts: whether only some of a group's projections do, or only some layers.
        beyond: whether names are given that are not of attention, by which PEFT also finds experts in one tensor.
    """

    rank: int
    groups: tuple[str, ...]
    parts: bool = False
    beyond: bool = False


def adapted_groups(adapter: AdapterSettings, facts: ModelFacts) -> Adapted:
    """Rank of an adapter, and the groups of projections that it is on.

    Raises:
        UserError: a target names none of the model's layers, or `adapter.path` holds no adapter.
    """
    if adapter.kind == "none":
        return Adapted(0, ())
    rank: int = adapter.rank
    targets: str | Sequence[str] = adapter.targets
    if adapter.path is not None:
        rank, targets = _saved(adapter.path)
    if targets == "all-linear":
        return Adapted(rank, GROUPS)
    names = {group: _names(facts, group) for group in GROUPS}
    hit = {group: [name for name in names[group] if _matches(name, targets)] for group in GROUPS}
    groups = tuple(group for group in GROUPS if hit[group])
    if not groups:
        known = sorted({name.rpartition(".")[2] for group in names.values() for name in group})
        raise UserError(
            f"adapter.targets: no linear layer of {facts.name} is called so.",
            hint=f"There are: {', '.join(known)}."
            if facts.model_type in ARCHITECTURES
            else "Use all-linear.",
        )
    known_names = facts.model_type in ARCHITECTURES
    parts = known_names and any(len(hit[group]) < len(names[group]) for group in groups)
    return Adapted(rank, groups, parts, _beyond_attention(targets))


def _beyond_attention(targets: str | Sequence[str]) -> bool:
    """Whether targets may mean more than the projections of attention."""
    attention = (*_USUAL_NAMES["qkv"], *_USUAL_NAMES["output"])
    return isinstance(targets, str) or any(target.rpartition(".")[2] not in attention for target in targets)


def _saved(path: str) -> tuple[int, str | Sequence[str]]:
    """Rank and targets of an adapter that is there."""
    file = Path(path).expanduser() / "adapter_config.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return int(saved["r"]), saved.get("target_modules") or "all-linear"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"adapter.path: {path} holds no adapter_config.json of a LoRA adapter.",
            hint="Give the folder of an adapter saved by PEFT.",
        ) from None


def _names(facts: ModelFacts, group: str) -> list[str]:
    """Whole names of a group's projections in all layers."""
    row = ARCHITECTURES.get(facts.model_type)
    if row is None:
        return list(_USUAL_NAMES[group])
    paths = getattr(row, group)
    paths = [paths] if isinstance(paths, str) else paths
    return [f"model.layers.{number}.{path}" for number in range(len(facts.layers)) for path in paths]


def _matches(name: str, targets: str | Sequence[str]) -> bool:
    """Whether PEFT puts an adapter on a layer: an expression matches its whole name, or a name ends it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
