"""What was found out about a card, remembered: a file for each card, versions of what computes on it, and question.

The canary and the calibration of rates ask a card for seconds what it would answer again tomorrow. Whatever cannot be
written or read again is asked anew: no run stops for a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from tunesmith._version import __version__
from tunesmith.kernels import launch

T = TypeVar("T")


def outcome_file(folder: Path | None, device: torch.device, **asked: Any) -> Path | None:
    """Where the outcome is remembered; None without a folder.

    Args:
        asked: what it depends on beside the card and the versions, as JSON knows it.
    """
    if folder is None:
        return None
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    parts = {
        "card": f"{properties.name} {properties.major}.{properties.minor}" if properties else device.type,
        "driver": torch.version.cuda,
        "torch": torch.__version__,
        "triton": launch.TRITON_VERSION,
        "tunesmith": __version__,
        **asked,
    }
    return folder / f"{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]}.json"


def recall(file: Path | None, read: Callable[[Any], T]) -> T | None:
    """What `read` makes of a remembered outcome; None where there is none, or none that it can read.

    Args:
        read: may fail over what it does not know, as over a key that is not there, and raise ValueError.
    """
    if file is None or not file.is_file():
        return None
    try:
        return read(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, LookupError):
        return None  # a damaged file is no outcome


def remember(file: Path | None, outcome: Any) -> None:
    """Write an outcome, whole or not at all.

    Args:
        outcome: as JSON knows it.
    """
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(outcome), encoding="utf-8")
        temporary.replace(file)
    except OSError:
        return  # it is asked anew next time
