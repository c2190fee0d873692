"""Whether `model.name` is a folder or can only be a hub id. Torch-free, and the hub is not asked."""

from __future__ import annotations

import difflib
from pathlib import Path

from tunesmith.contracts.errors import UserError


def local_folder(name: str) -> Path | None:
    """The local folder that `model.name` is; None for what can only be a hub id, which is not asked for.

    Raises:
        UserError: there is no such folder, or it holds no model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"model.name: the folder {path} holds no config.json, so it is not a Hugging Face model.",
                hint="A LoRA adapter goes to adapter.path."
                if (path / "adapter_config.json").is_file()
                else _inside(path),
            )
        return path
    if path.is_file():
        raise UserError(f"model.name: {path} is a file.", hint="Give the folder that holds config.json.")
    if looks_like_path(name):
        near = near_folder(path)
        raise UserError(
            f"model.name: there is no folder {path}.", hint=f"Did you mean {near}?" if near else None
        )
    return None


def looks_like_path(name: str) -> bool:
    """Whether a name can be no hub id, `owner/model` or `model`, by how it is written."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def near_folder(path: Path) -> Path | None:
    """The folder beside a missing one that is spelt almost so; None where there is none."""
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return path.parent / near[0] if near else None


def _inside(folder: Path) -> str | None:
    """A hint at a model or an adapter one folder further down, as a run leaves them."""
    found = [file.parent for kind in ("", "adapter_") for file in sorted(folder.glob(f"*/{kind}config.json"))]
    return f"Did you mean {found[0]}?" if found else None
