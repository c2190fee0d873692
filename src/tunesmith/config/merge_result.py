"""`tunesmith merge`: a result's adapter merged into its base, checked, and put in its place by one rename."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.config.find_result import FoundResult
from tunesmith.config.load_result import (
    Place,
    about,
    base_refusal,
    compute_dtype,
    fetched,
    load_parts,
    load_tokenizer_of,
    place_of,
)
from tunesmith.config.prompting import Prompter
from tunesmith.contracts.errors import StorageError, UserError
from tunesmith.contracts.sizes import file_size, memory_size
from tunesmith.export.merged import write_merged
from tunesmith.export.merged_base import NotStreamableError, streamed
from tunesmith.export.merged_card import merged_card
from tunesmith.export.merged_files import bytes_of, write_json, write_manifest, writing
from tunesmith.export.merged_weights import from_memory
from tunesmith.export.verify import Verification, compare, log_probabilities
from tunesmith.models.loader import choose_device, load_model, load_skeleton
from tunesmith.planning.host import free_host_memory

_QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "A train goes 60 kilometres in 45 minutes. How fast is it?",
    "Write one sentence about the sea.",
)
_TEXT = "The quick brown fox jumps over the lazy dog. 1 + 1 = 2, and def f(x): return x * x"
_LARGEST_PROMPT = 256

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge left behind.

    Attributes:
        folder: the merged model.
        bytes: size of its weights.
        verification: the comparison with base and adapter; None where it was left out.
    """

    folder: Path
    bytes: int
    verification: Verification | None


def merge_result(
    found: FoundResult,
    directory: Path | None,
    *,
    dtype: torch.dtype,
    max_shard_size: str,
    verify: bool,
    trust_remote_code: bool = False,
    say: Say,
) -> Merged:
    """Merge, check and put in place; what fails leaves nothing behind.

    Args:
        directory: where to; None is a folder `merged` beside the adapter.
        dtype: floating-point type of the files.
        max_shard_size: largest file, such as `5GB`.
        verify: compare the files with base and adapter.
        say: is told what goes on.

    Raises:
        UserError: there is no adapter, the folder is not empty, the adapter cannot be merged, or the merged model
            does not compute what base and adapter do.
        StorageError: the folder cannot be written.
    """
    most = bytes_of(max_shard_size)
    found = fetched(found)
    place = place_of(found)
    if place.adapter is None:
        raise UserError(
            f"There is nothing to merge: {found.name} is no folder with an adapter here, and no adapter on the hub.",
            hint="Give the run directory; `tunesmith runs` lists those that are there.",
        )
    target = directory if directory is not None else _beside(found)
    _check_target(target)
    device = choose_device()
    with about(place, found):
        skeleton = load_skeleton(place.base, revision=place.revision, trust_remote_code=trust_remote_code)
    parameters = skeleton.num_parameters()
    _check_disk(target, parameters * dtype.itemsize)
    computed_in = _computed_in(found, device, parameters, verify)
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    work = _Work(found, place, dtype, device, computed_in, trust_remote_code, say)
    try:
        with writing(target):
            temporary.mkdir(parents=True)
        model = work.write(temporary, most)
        verification = work.verify(temporary, model) if verify else None
        del model
        if verification is not None and not verification.good:
            raise _not_good(verification)
        with writing(target):
            work.finish(temporary, verification)
            _put(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    return Merged(target, size, verification)


def _beside(found: FoundResult) -> Path:
    """A folder beside the adapter, in the run directory; in the current folder for one of the hub."""
    assert found.folder is not None, "an adapter has been fetched"
    if not Path(found.name).expanduser().is_dir():
        return Path(f"{found.name.rsplit('/', 1)[-1]}-merged")
    folder = found.folder.resolve()
    return folder.parent / ("merged" if folder.name == "adapter" else f"{folder.name}-merged")


def _check_target(target: Path) -> None:
    if target.is_file() or target.is_symlink():
        raise UserError(f"{target} is a file.", hint="Give a folder that is not there yet.")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(
            f"{target} is not empty, and a merge replaces nothing.",
            hint="Name another folder: `tunesmith merge OUTPUT DIRECTORY`.",
        )


def _check_disk(target: Path, need: int) -> None:
    folder = target.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        raise StorageError(
            f"The merged model takes {file_size(need)}, and {folder} has {file_size(free)} left.",
            hint="Free some space, or name a folder on another disk.",
        )


def _computed_in(found: FoundResult, device: torch.device, parameters: int, verify: bool) -> torch.dtype:
    """The type in which both models are computed: float32 where that fits and the base is not quantised.

    Raises:
        UserError: the check takes more memory than there is.
    """
    held = compute_dtype(found, device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_memory()
    if found.quantize == "none" and parameters * 4 <= 0.9 * free:
        return torch.float32
    need = parameters * held.itemsize
    if verify and need > 0.95 * free:
        raise UserError(
            f"Checking the merged model takes {memory_size(need)} of memory, and {memory_size(free)} are free.",
            hint="Add --no-verify to merge without the check; merging itself takes little.",
        )
    return held


def _put(temporary: Path, target: Path) -> None:
    """Give the finished folder its name; an empty folder may stand there."""
    if target.is_dir():
        target.rmdir()
    temporary.rename(target)


def _not_good(found: Verification) -> UserError:
    return UserError(
        f"The merged model is not what base and adapter are: log-probabilities differ by "
        f"{found.largest_difference:.3g}, where rounding to {found.dtype} explains {found.tolerance:.3g}. "
        "Nothing was kept.",
        hint="Try --dtype float32; if that differs as well, please report it. --no-verify keeps the files.",
        exit_code=1,
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """The steps of one merge, in order."""

    found: FoundResult
    place: Place
    dtype: torch.dtype
    device: torch.device
    computed_in: torch.dtype
    trust: bool
    say: Say

    def write(self, folder: Path, most: int) -> Any:
        """Write the merged weights; the model with its adapter, where it had to be loaded for that."""
        assert self.place.adapter is not None, "checked before"
        generation = self._generation_config()
        try:
            with about(self.place, self.found):
                model, read = streamed(
                    self.place.base,
                    self.place.revision,
                    self.place.adapter,
                    quantize=self.found.quantize,
                    dtype=compute_dtype(self.found, self.device),
                    device=self.device,
                    trust_remote_code=self.trust,
                    rope_scaling=self.found.rope_scaling,
                )
        except NotStreamableError as reason:
            self.say(f"note: the base is loaded whole, because {reason}")
            model = self._load()
            write_merged(model, folder, self.dtype, most=most, read=from_memory, generation_config=generation)
            return model
        self.say("merging, one weight at a time")
        write_merged(model, folder, self.dtype, most=most, read=read, generation_config=generation)
        return None

    def verify(self, folder: Path, model: Any) -> Verification:
        """Compare the files with base and adapter. One model is in memory at a time."""
        self.say("checking the files against base and adapter")
        prompts = self._prompts()
        model = self._load() if model is None else model
        expected = log_probabilities(model, prompts)
        base: Tensor | None = None
        if base_refusal(model) is None:
            with model.disable_adapter():
                base = log_probabilities(model, prompts)
        model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        merged = load_model(
            str(folder), device=self.device, dtype=self.computed_in, trust_remote_code=self.trust
        ).eval()
        return compare(
            merged,
            prompts,
            expected=expected,
            base=base,
            dtype=self.dtype,
            computed_in=self.computed_in,
            quantize=self.found.quantize,
        )

    def finish(self, folder: Path, verification: Verification | None) -> None:
        """Put tokenizer, template, card, figures and manifest beside the weights."""
        tokenizer = self._tokenizer()
        tokenizer.save_pretrained(folder)
        assert self.place.adapter is not None, "checked before"
        own = self.place.adapter / "README.md"
        card = merged_card(
            base=self.place.base,
            quantize=self.found.quantize,
            dtype=str(self.dtype).removeprefix("torch."),
            adapter_card=own.read_text(encoding="utf-8") if own.is_file() else None,
            verification=verification,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        if verification is not None:
            write_json(folder / "verification.json", verification.as_json())
        write_manifest(folder)

    def _load(self) -> Any:
        return load_parts(
            self.found,
            self.place,
            dtype=self.computed_in,
            device=self.device,
            trust_remote_code=self.trust,
        )

    def _tokenizer(self) -> Any:
        return load_tokenizer_of(self.found, self.place, trust_remote_code=self.trust)

    def _prompts(self) -> Sequence[Sequence[int]]:
        tokenizer = self._tokenizer()
        prompter = Prompter(tokenizer, self.found.date)
        asked = [prompter.ids([{"role": "user", "content": question}]) for question in _QUESTIONS]
        return [ids[:_LARGEST_PROMPT] for ids in [*asked, tokenizer(_TEXT)["input_ids"]]]

    def _generation_config(self) -> Any:
        """What the base's files say of generation; None where they say nothing."""
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(self.place.base, revision=self.place.revision or "main")
        except (OSError, ValueError):
            return None
