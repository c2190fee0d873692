"""What a name given to `chat`, `generate` or `merge` stands for. Torch-free, so that a wrong name is told at once.

A name is a run directory (its `adapter/` or `model/` is taken), one of these folders, any folder with an adapter of
PEFT or a model of transformers, or an id on the hub. A result of ours has its run file beside it, which says how the
base was held in training; nothing in it is followed that could run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config.yaml_source import parse_yaml
from tunesmith.contracts.errors import UserError
from tunesmith.contracts.model_folder import looks_like_path, near_folder
from tunesmith.settings.rope import RopeScaling, scaling_problems

_HELD = ("none", "nf4", "int8")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundResult:
    """A result before it is loaded.

    Attributes:
        name: what the user wrote.
        folder: the folder of adapter or model; None for an id on the hub.
        adapter: whether the folder holds an adapter.
        quantize: how the run held the base, as `model.quantize` has it; `none` where no run file says.
        dtype: the run's compute type, as `model.dtype` has it.
        date: the day that the run's chat template wrote; None where no run file says.
        rope_scaling: how the run stretched the base's positions, as transformers has it; None where it did not.
    """

    name: str
    folder: Path | None
    adapter: bool = False
    quantize: str = "none"
    dtype: str = "auto"
    date: str | None = None
    rope_scaling: Mapping[str, Any] | None = None


def find_result(name: str) -> FoundResult:
    """The result that a name stands for.

    Raises:
        UserError: nothing has that name, the folder holds no result, or its run file is damaged.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise UserError(
            f"{path} is a file.", hint="Give the run directory, or the folder of adapter or model."
        )
    if not path.is_dir():
        _refuse_path(name, path)
        return FoundResult(name=name, folder=None)
    for folder in (path, path / "adapter", path / "model"):
        for file, adapter in (("adapter_config.json", True), ("config.json", False)):
            if (folder / file).is_file():
                return FoundResult(name=name, folder=folder, adapter=adapter, **_of_run(folder))
    raise _no_result(path)


def _refuse_path(name: str, path: Path) -> None:
    """Refuse what looks like a path and is none, before the hub is asked for it."""
    if not looks_like_path(name) and ("/" not in name or not path.parent.is_dir()):
        return
    near = near_folder(path)
    hint = f"Did you mean {near}?" if near else "Relative paths start at the current folder."
    raise UserError(f"There is no folder {path}.", hint=hint)


def _no_result(path: Path) -> UserError:
    """Why a folder holds nothing that can be loaded, and what to do."""
    if (path / "run.yaml").is_file():
        return UserError(
            f"The run in {path} has left no adapter or model yet.",
            hint=f"Let it end, or go on with it: `tunesmith train {path / 'run.yaml'}`.",
        )
    runs = sorted(
        entry.name
        for entry in path.iterdir()
        if any((entry / inner / "run.yaml").is_file() for inner in (".", "adapter", "model"))
    )
    return UserError(
        f"{path} holds neither an adapter (adapter_config.json) nor a model (config.json).",
        hint=f"Did you mean {path / runs[0]}?" if runs else "Give the output.dir of a run.",
    )


def _of_run(folder: Path) -> dict[str, Any]:
    """What the run file beside a result says about how its model is held.

    Raises:
        UserError: it cannot be read, or says what nobody knows.
    """
    path = folder / "run.yaml"
    if not path.is_file():
        return {}
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    model, data = (_section(document.data, name) for name in ("model", "data"))
    found = {"quantize": model.get("quantize", "none"), "dtype": model.get("dtype", "auto")}
    refusal = UserError(
        f"{path} is not the run file of a result.",
        hint="Delete it if it does not belong there; it says how the base model is held.",
    )
    for key, known in (("quantize", _HELD), ("dtype", _DTYPES)):
        if document.problems or found[key] not in known:
            raise refusal
    try:
        scaling = _scaling(model.get("rope_scaling"))
    except ValueError:
        raise refusal from None
    return found | {"date": data.get("date"), "rope_scaling": scaling}


def _scaling(given: Any) -> dict[str, Any] | None:
    """A scaling of positions out of a run file.

    Raises:
        ValueError: it is none.
    """
    if given is None:
        return None
    scaling = RopeScaling.model_validate(given).parameters()
    if any(scaling_problems(scaling)):
        raise ValueError(given)
    return scaling


def scaling_of_run(folder: Path) -> Mapping[str, Any] | None:
    """How the run that left this folder stretched its model's positions; None where it did not, or nothing says.

    Raises:
        UserError: its run file is damaged.
    """
    scaling: Mapping[str, Any] | None = _of_run(folder).get("rope_scaling")
    return scaling


def _section(data: Any, name: str) -> dict[str, Any]:
    section = data.get(name) if isinstance(data, dict) else None
    return section if isinstance(section, dict) else {}


def base_of_adapter(folder: Path) -> tuple[str, str | None]:
    """Name and revision of the model that an adapter was trained on.

    Raises:
        UserError: its config cannot be read or names no model.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not the configuration of an adapter: {error}.") from error
    if not base:
        raise UserError(
            f"The adapter in {folder} does not say which model it was trained on.",
            hint=f"Write that model into base_model_name_or_path of {path}.",
        )
    return str(base), config.get("revision")
