"""Rows of `tunesmith doctor` about packages: those that every run needs, and those that would add something.

What every run needs is really imported, because a package that is installed and broken is what one looks for here.
The others are looked up only: importing them all would take half a minute.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version

from tunesmith.config.doctor_row import Check, Finding, Subject
from tunesmith.contracts.installed import is_installed
from tunesmith.training.tracker_rows import TRACKERS

ESSENTIAL: dict[str, str] = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "datasets": "datasets",
    "huggingface_hub": "huggingface_hub",
    "numpy": "numpy",
    "pydantic": "pydantic",
    "jinja2": "jinja2",
    "psutil": "psutil",
    "pyyaml": "yaml",
    "rich": "rich",
    "typer": "typer",
}
"""What every run needs: the package, and the module that is imported of it."""


@dataclass(frozen=True, slots=True)
class Optional:
    """A package that adds something.

    Attributes:
        module: what is imported of it.
        gives: what it adds, one line.
        extra: the extra of tunesmith that installs it; empty where it is installed by its own name.
        useful: whether it would add anything here, given whether there is a GPU.
    """

    module: str
    gives: str
    extra: str = ""
    useful: Callable[[bool], bool] = lambda _: True


def _on_gpus(gpu: bool) -> bool:
    return gpu


OPTIONAL: dict[str, Optional] = {
    "bitsandbytes": Optional(
        "bitsandbytes", "weights in 4 and 8 bits (model.quantize: nf4, int8), and its optimizers"
    ),
    "triton": Optional(
        "triton", "the kernels of fused layers; without it their torch forms compute", "kernels", _on_gpus
    ),
    "nvidia-cudnn-frontend": Optional(
        "cudnn", "cuDNN's attention in fused layers, the fastest on cards from Hopper on", useful=_on_gpus
    ),
    "deepspeed": Optional(
        "deepspeed", "ZeRO-3 for fused layers in a trainer that is not ours", "deepspeed", _on_gpus
    ),
    "torchao": Optional("torchao", "optimizers with states in 4 and 8 bits and in fp8", "optimizers"),
    "schedulefree": Optional("schedulefree", "schedule_free_adamw", "optimizers"),
    "matplotlib": Optional("matplotlib", "curves as pictures, such as loss.png", "plot"),
    "trl": Optional("trl", "tunesmith.SFTTrainer, for scripts that were written for TRL", "trl"),
    "gguf": Optional("gguf", "models in GGUF files, such as the demo's", "gguf"),
    "s3fs": Optional("s3fs", "data from s3:// addresses", "s3"),
    **{name: Optional(row.module, f"output.track: [{name}]", name) for name, row in TRACKERS.items()},
}
"""What a run can do without, and what it would add."""


def _essential(package: str, module: str, _: Subject) -> Finding:
    try:
        found = version(package)
    except PackageNotFoundError:
        return Finding("not installed", "broken", f"Install it: `pip install {package}`.")
    try:
        importlib.import_module(module)
    except Exception as error:  # a package may break in any way while it is imported
        reason = str(error).strip().splitlines()[:1] or [""]
        return Finding(
            f"{found}, and cannot be imported: {type(error).__name__}: {reason[0]}",
            "broken",
            f"Install it again: `pip install --force-reinstall {package}`.",
        )
    wanted = _wanted(package)
    if wanted and not _satisfies(found, wanted):
        return Finding(
            f"{found}, and tunesmith asks for {wanted}", "note", f'Run `pip install "{package}{wanted}"`.'
        )
    return Finding(found)


def _wanted(package: str) -> str:
    """The versions that tunesmith asks for, such as `>=2.11`; empty where it does not say."""
    try:
        listed = requires("tunesmith") or []
    except PackageNotFoundError:  # a checkout that is not installed
        return ""
    for requirement in listed:
        match = re.match(r"([\w.-]+)\s*([<>=!~][^;]*)?", requirement)
        if match and _same_name(match[1], package) and "extra ==" not in requirement:
            return (match[2] or "").strip()
    return ""


def _same_name(one: str, other: str) -> bool:
    return re.sub(r"[-_.]+", "-", one).lower() == re.sub(r"[-_.]+", "-", other).lower()


def _satisfies(found: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(found, prereleases=True)


def _optional(package: str, row: Optional, subject: Subject) -> Finding | None:
    if not is_installed(row.module):
        if not row.useful(bool(subject.cards)):
            return None
        command = f"pip install 'tunesmith[{row.extra}]'" if row.extra else f"pip install {package}"
        return Finding("not installed", "missing", f"it would give {row.gives}: {command}")
    try:
        return Finding(version(package), advice=f"gives {row.gives}")
    except PackageNotFoundError:
        return Finding("installed", advice=f"gives {row.gives}")


PACKAGES: tuple[Check, ...] = (
    *(Check("packages", name, partial(_essential, name, module)) for name, module in ESSENTIAL.items()),
    *(Check("optional", name, partial(_optional, name, row)) for name, row in OPTIONAL.items()),
)
