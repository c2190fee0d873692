"""`tunesmith merge`: says what was written and how well it agrees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tunesmith.config.find_result import find_result
from tunesmith.contracts.errors import UserError
from tunesmith.contracts.sizes import file_size

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """What the command was asked for."""

    output: str
    directory: str | None
    dtype: str
    max_shard_size: str
    verify: bool
    trust_remote_code: bool


def merge(options: MergeOptions, console: Console) -> None:
    """Merge and say what came of it.

    Raises:
        UserError: there is nothing to merge, the folder is not empty, or the merged model is not good.
    """
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype} is none of {', '.join(DTYPES)}.", hint="Use one of them.")
    found = find_result(options.output)
    if found.folder is not None and not found.adapter:
        raise UserError(
            f"{found.folder} is a model without an adapter: there is nothing to merge.",
            hint="It loads as it is, see its README.md.",
        )

    import torch

    from tunesmith.config.merge_result import merge_result
    from tunesmith.training.quiet import quiet_libraries

    quiet_libraries()

    def say(text: str) -> None:
        console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    merged = merge_result(
        found,
        Path(options.directory).expanduser() if options.directory is not None else None,
        dtype=getattr(torch, options.dtype),
        max_shard_size=options.max_shard_size,
        verify=options.verify,
        trust_remote_code=options.trust_remote_code,
        say=say,
    )
    lines = [f"merged    {merged.folder} ({file_size(merged.bytes)} in {options.dtype})"]
    checked = merged.verification
    if checked is None:
        lines.append("checked   no (--no-verify)")
    else:
        lines.append(
            f"checked   log-probabilities differ from base and adapter by {checked.largest_difference:.2g} at most; "
            f"up to {checked.tolerance:.2g} is rounding"
        )
        if not checked.telling:
            lines.append(
                f"          the adapter itself changes these prompts by {checked.adapter_effect:.2g} only, so this "
                "says little: compare answers as well"
            )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
