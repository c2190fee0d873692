"""Rows of `tunesmith doctor` about the machine: processor, memory, disks, GPUs, their driver, and the hub's login."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from tunesmith.config.doctor_row import Check, Finding, State, Subject
from tunesmith.contracts.plural import counted
from tunesmith.contracts.sizes import memory_size
from tunesmith.data.cache import cache_folder
from tunesmith.planning.host import LIMITS, number_in

PYTHONS = ((3, 11), (3, 14))
"""The first version of Python that runs tunesmith, and the first that does not any more."""
_MIB, _GIB = 2**20, 2**30
_FULL, _SCARCE = 100 * _MIB, 10 * _GIB
"""Bytes of a disk without which nothing can be written, and below which models and checkpoints soon fill it."""
_LITTLE_MEMORY = 4 * _GIB


def _python(_: Subject) -> Finding:
    version = platform.python_version()
    if PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        return Finding(version)
    first, last = f"{PYTHONS[0][0]}.{PYTHONS[0][1]}", f"{PYTHONS[1][0]}.{PYTHONS[1][1] - 1}"
    return Finding(version, "broken", f"Tunesmith runs on Python {first} to {last}: install one of these.")


def _platform(_: Subject) -> Finding:
    return Finding(f"{platform.system()} {platform.release()}, {platform.machine()}")


def _processor(_: Subject) -> Finding:
    return Finding(f"{counted(usable_cores(), 'core')} for this process, {os.cpu_count()} in the machine")


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory(_: Subject) -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    limit = number_in(*LIMITS)
    value = f"{memory_size(memory.available)} free of {memory_size(memory.total)}"
    usable = memory.available
    if limit is not None and limit < memory.total:
        value += f"; this container may use {memory_size(limit)}"
        usable = min(usable, limit)
    if usable < _LITTLE_MEMORY:
        return Finding(value, "note", "Models of more than a few hundred million parameters will not fit.")
    return Finding(value)


def _disk_of_the_run(subject: Subject) -> Finding:
    from tunesmith.contracts.errors import UserError

    try:
        settings = subject.settings
    except UserError:
        settings = None  # the row of the run file says what is wrong
    return disk(Path(settings.output.dir if settings is not None else "."), needed=True)


def _disk_of_the_cache(_: Subject) -> Finding:
    return disk(cache_folder(""), needed=False)


def disk(folder: Path, *, needed: bool) -> Finding:
    """Free space where a folder is or will be made, and whether it can be written there.

    Args:
        needed: whether training is impossible without.
    """
    place = folder.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    bad: State = "broken" if needed else "note"
    if not os.access(place, os.W_OK):
        return Finding(f"{place} cannot be written", bad, "Change its permissions, or choose another folder.")
    free = shutil.disk_usage(place).free
    value = f"{memory_size(free)} free in {place}"
    if free < _FULL:
        return Finding(value, bad, "The disk is full: free some space.")
    if free < _SCARCE:
        return Finding(value, "note", "Models and checkpoints may fill it.")
    return Finding(value)


def _gpus(subject: Subject) -> Finding:
    cards = subject.cards
    if not cards:
        return Finding(
            "no NVIDIA GPU found", "note", "Runs are on the CPU: right for small models, slow for others."
        )
    lines = [
        f"{card['name']}, {memory_size(int(card['memory.free']) * _MIB)} free of "
        f"{memory_size(int(card['memory.total']) * _MIB)}, compute capability {card['compute_cap']}"
        for card in cards
    ]
    if len(lines) > 1:
        return Finding(
            "; ".join(lines), "note", "A run uses the first one that it may see (CUDA_VISIBLE_DEVICES)."
        )
    return Finding(lines[0])


def _driver(subject: Subject) -> Finding | None:
    return Finding(f"NVIDIA {subject.cards[0]['driver_version']}") if subject.cards else None


def _hub(_: Subject) -> Finding:
    from huggingface_hub import constants, get_token

    token = "a token is set" if get_token() else "no token is set"  # never the token itself
    offline = "offline by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "asked where a name is a hub id"
    advice = "" if get_token() else "Gated and private models need one: `hf auth login`, or HF_TOKEN."
    return Finding(f"{offline}; {token}", advice=advice)


MACHINE: tuple[Check, ...] = (
    Check("machine", "platform", _platform),
    Check("machine", "Python", _python),
    Check("machine", "processor", _processor),
    Check("machine", "memory", _memory),
    Check("machine", "disk of the run", _disk_of_the_run),
    Check("machine", "disk of the cache", _disk_of_the_cache),
    Check("machine", "GPU", _gpus),
    Check("machine", "driver", _driver),
    Check("machine", "Hugging Face hub", _hub),
)
