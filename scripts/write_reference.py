"""Writes docs/reference.md from the settings and the commands, docs/families.md, and the tree of files in README.md.

    .venv/bin/python scripts/write_reference.py            write all
    .venv/bin/python scripts/write_reference.py --check    exit 1 where one is out of date

A setting's text is the docstring below its field, a file's line is the first sentence of its docstring. The
page is made from the objects, not from the printed help, whose layout changes with the width of a terminal
and with the version of a library.
"""

from __future__ import annotations

import ast
import datetime
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tunesmith.settings.run import RunSettings

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference.md"
FAMILIES = ROOT / "docs" / "families.md"
README = ROOT / "README.md"
TREE_BEGIN, TREE_END = "<!-- tree: begin -->\n", "<!-- tree: end -->\n"
_LONGEST_LINE = 100

HEAD = """\
# Reference

Every setting and every command of this version. Written by `scripts/write_reference.py` from the code; edits
by hand are lost.

A run file is YAML with the sections below. Unknown names are refused, and values are not coerced: `"16"` is
not `16`. `model.name` and `data.train` have no default. Any setting can be replaced on the command line with
`section.key=value`, an entry of a list by its number: `data.train.0.path=rows.jsonl`.
"""

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_NAMES: dict[Any, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true, false",
    datetime.date: "date",
}


# ---------------------------------------------------------------- settings


_TITLES = {
    "HeldOutSettings": "held-out rows",
    "EarlyStoppingSettings": "early stopping",
    "RopeScaling": "rotary positions",
}
"""Groups of settings that stand inside a section, and the titles of their tables."""


def describe_type(annotation: Any, metadata: tuple[Any, ...] | list[Any] = ()) -> str:
    """What may stand in the file for an annotation, in the words of YAML."""
    bounds = "".join(
        f" {sign} {getattr(item, name)}"
        for item in metadata
        for name, sign in _BOUNDS.items()
        if getattr(item, name, None) is not None
    )
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        if any("token" in getattr(getattr(item, "func", None), "__name__", "") for item in arguments[1:]):
            return "`N tokens`"
        return describe_type(arguments[0], [*arguments[1:], *metadata])
    if annotation is type(None):
        return "null"
    if origin in (Union, types.UnionType):
        return " or ".join(
            describe_type(argument) for argument in arguments if argument is not type(None)
        ) + (f"{bounds} or null" if type(None) in arguments else bounds)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        inner = arguments[0]
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            return f"list of [sources](#{_anchor('a source')})"
        return f"list of {describe_type(inner)}"
    if origin is tuple:
        return "[" + ", ".join(describe_type(argument) for argument in arguments) + "]"
    if origin is dict:
        return "names and values"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        title = _TITLES.get(annotation.__name__)
        return "section" if title is None else f"[section](#{_anchor(title)})"
    return _NAMES[annotation] + bounds


def describe_default(field: FieldInfo) -> str:
    """The default as YAML would write it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, dict):
        return "`{}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _anchor(title: str) -> str:
    return re.sub(r"[^\w-]", "", title.lower().replace(" ", "-"))


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _section_table(section: type[BaseModel]) -> Iterator[str]:
    yield "| setting | type | default | what it does |"
    yield "| --- | --- | --- | --- |"
    for name, field in section.model_fields.items():
        kind = describe_type(field.annotation, field.metadata).replace("|", "\\|")
        yield f"| `{name}` | {kind} | {describe_default(field)} | {_one_line(field.description)} |"
    yield ""


def settings_pages() -> Iterator[str]:
    """A table for each section of a run file, and for the groups of settings that sections hold."""
    from tunesmith.settings.data import HeldOutSettings, SourceSettings
    from tunesmith.settings.rope import RopeScaling
    from tunesmith.settings.run import EarlyStoppingSettings, GroupSettings

    parts: dict[str, tuple[tuple[str, type[BaseModel]], ...]] = {
        "model": (("Rotary positions", RopeScaling),),
        "data": (("A source", SourceSettings), ("Held-out rows", HeldOutSettings)),
        "train": (("Early stopping", EarlyStoppingSettings), ("A group of parameters", GroupSettings)),
    }
    yield "## Settings\n"
    for name, field in RunSettings.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        yield f"### {name}\n"
        yield f"{_one_line(section.__doc__)}\n"
        yield from _section_table(section)
        for title, part in parts.get(name, ()):
            yield f"#### {title}\n"
            yield f"{_one_line(part.__doc__)}\n"
            yield from _section_table(part)


# ---------------------------------------------------------------- commands


def command_pages() -> Iterator[str]:
    """Every command with its arguments and options."""
    import typer

    from tunesmith.cli.main import app

    group: Any = typer.main.get_command(app)
    yield "## Commands\n"
    yield f"{_one_line(group.help)}\n"
    yield from _parameters(group)
    yield from _commands(group, "tunesmith")
    yield "Exit status: 0 for a run that ended as asked, an interrupted and saved one included; 1 for an error"
    yield "after a run had started; 2 for input that was refused before anything started; 70 for a defect of"
    yield "tunesmith; 130 for a second Ctrl-C.\n"


def _commands(group: Any, prefix: str) -> Iterator[str]:
    for name, command in group.commands.items():
        full = f"{prefix} {name}"
        if getattr(command, "commands", None):
            yield from _commands(command, full)
            continue
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        words = [full, *(_argument(p) for p in arguments)]
        if any(p.param_type_name == "option" for p in command.params):
            words.insert(1, "[OPTIONS]")
        yield f"### {full}\n"
        yield f"{_one_line(command.help)}\n"
        yield f"```text\n{' '.join(words)}\n```\n"
        yield from _parameters(command)
        if command.epilog:
            label, _, example = _one_line(command.epilog).partition(": ")
            yield f"{label}: `{example}`\n"


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name.strip('[].')}]..."


def _parameters(command: Any) -> Iterator[str]:
    rows = []
    for parameter in command.params:
        if parameter.name == "help" or not parameter.help:
            continue
        argument = parameter.param_type_name == "argument"
        name = _argument(parameter) if argument else ", ".join(parameter.opts)
        default = parameter.default
        shown = (
            f" Default: {default}."
            if isinstance(default, int | str) and not isinstance(default, bool)
            else ""
        )
        rows.append(f"| `{name}` | {_one_line(parameter.help)}{shown} |")
    if rows:
        yield "| argument or option | what it is |"
        yield "| --- | --- |"
        yield from rows
        yield ""


def reference() -> str:
    """The text of docs/reference.md."""
    return "\n".join([HEAD, *settings_pages(), *command_pages()]).rstrip() + "\n"


# ---------------------------------------------------------------- families

FAMILIES_HEAD = """\
# Families with fused layers

Written by `scripts/write_reference.py` from `ARCHITECTURES` in `planning/architectures.py`; edits by hand are lost.

A model whose `model_type` (in its `config.json`) is in this table runs on a GPU with the hand-written layer
([memory and speed](memory-and-speed.md)). Each row is compared with transformers in `tests/models/test_families.py`:
logits and all gradients, of adapters and of weights that train, over packed documents and plain batches, every policy
giving the same bits. Fine-tuned models of any name have the type of the model that they come from: DeepSeek-R1's
distills are `llama` and `qwen2`.

Every other causal model, and one of these whose config holds what the last column names, trains on its stock layers,
with packed attention and the same loss.
"""

FAMILIES_TAIL = """
Biases of projections, partly rotated heads and scalings of RoPE (`rope_parameters`) are computed in every family.

No family is fused if
"""

FAMILIES_COLUMNS: dict[str, Callable[[Any], str]] = {
    "family": lambda row: f"`{row.model_type}`",
    "models": lambda row: row.models,
    "norms": lambda row: _norms(row),
    "q and k": lambda row: _positions(row),
    "attention": lambda row: _attention(row),
    "MLP": lambda row: _mlp(row),
    "not fused if": lambda row: "; ".join(reason for _, reason in row.refused) or "–",
}


def _norms(row: Any) -> str:
    kind = {"rms": "RMS", "layer": "layer"}[row.norm]
    weight = f"{kind} norm of weight {row.norm_offset:g} + w" if row.norm_offset else f"{kind} norm"
    if row.parallel:
        return f"one {weight} before both blocks, which run in parallel"
    sides = {"before": row.norms[::2], "behind": row.norms[1::2]}
    return f"{weight} {' and '.join(side for side, paths in sides.items() if any(paths))} a block"


def _positions(row: Any) -> str:
    parts = []
    if row.qk_norms:
        parts.append("RMS norm over all heads" if row.qk_full else "RMS norm of each head")
    parts.append("RoPE on neighbouring columns" if row.interleaved else "RoPE on halves")
    if row.rope:
        parts.append("none in some layers")
    return ", ".join(parts)


def _attention(row: Any) -> str:
    parts = ["one matrix for q, k, v"] if len(row.qkv) == 1 else []
    parts += ["sliding windows"] if row.window else []
    parts += ["soft cap"] if row.softcap else []
    return ", ".join(parts) or "causal"


def _mlp(row: Any) -> str:
    parts = ["gated" if row.gated else "not gated"]
    parts += ["one matrix for gate and up"] if row.gated and len(row.gate_up) == 1 else []
    parts += ["factor on what a block adds"] if row.residual_multiplier else []
    return ", ".join(parts)


def families() -> str:
    """The text of docs/families.md."""
    from tunesmith.planning.architectures import ACTIVATIONS, ARCHITECTURES, REFUSED_EVERYWHERE

    names = list(FAMILIES_COLUMNS)
    lines = [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
    lines += [
        f"| {' | '.join(_one_line(text(row)) for text in FAMILIES_COLUMNS.values())} |"
        for row in ARCHITECTURES.values()
    ]
    everywhere = [f"- {reason}" for _, reason in REFUSED_EVERYWHERE]
    activations = ", ".join(f"`{name}`" for name in ACTIVATIONS)
    last = f"- its activation is not among {activations}\n"
    return "\n".join([FAMILIES_HEAD, *lines, FAMILIES_TAIL, *everywhere, last])


# ---------------------------------------------------------------- tree


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, cut at a clause where it is long."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<=[.])\s+(?=[A-Z`])", _one_line(text.split("\n\n")[0]))[0].rstrip(".")
    if len(sentence) <= _LONGEST_LINE:
        return sentence
    for marks in (r"[;:] ", r"[,] | and "):  # a clause, where there is one, else half of one
        cuts = [
            match.start() for match in re.finditer(marks, sentence) if 16 < match.start() <= _LONGEST_LINE
        ]
        if cuts:
            return sentence[: cuts[-1]]
    return sentence


def _sources() -> list[Path]:
    """The files of the package that are part of the project; what git does not know yet is work in progress."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "src/tunesmith"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        listed = ""
    known = [ROOT / name for name in listed.split("\0") if name]
    # an archive that was unpacked is in no repository
    everything = known or [p for p in (ROOT / "src" / "tunesmith").rglob("*") if "__pycache__" not in p.parts]
    return [path for path in everything if path.is_file()]


def tree() -> str:
    """The packages and files of src/tunesmith, one line each."""
    package, sources = ROOT / "src" / "tunesmith", _sources()
    lines = ["```text", "src/tunesmith/"]
    for folder in sorted({path.parent for path in sources}):
        depth = len(folder.relative_to(package).parts)
        inside = sorted(path for path in sources if path.parent == folder and path.name != "__init__.py")
        modules = [path for path in inside if path.suffix == ".py"]
        if not inside:
            continue  # nothing in it yet
        if depth:  # a package's line is what stands in front of the list of its contents
            line = first_sentence(folder / "__init__.py").partition(": ")[0]
            lines.append(f"{'  ' * depth}{folder.name + '/':<{24 - 2 * depth}}{line}")
        lines += [
            f"{'  ' * (depth + 1)}{path.name:<{22 - 2 * depth}}{first_sentence(path)}" for path in modules
        ]
    return "\n".join([*lines, "```"]) + "\n"


def readme() -> str:
    """README.md with its tree brought up to date."""
    before, begin, rest = README.read_text(encoding="utf-8").partition(TREE_BEGIN)
    _, end, after = rest.partition(TREE_END)
    if not (begin and end):
        sys.exit(f"{README} has lost the marks of its tree")
    return f"{before}{begin}{tree()}{end}{after}"


def main(arguments: list[str]) -> int:
    """Write what is out of date, or with `--check` name it."""
    wanted = {REFERENCE: reference(), FAMILIES: families(), README: readme()}
    stale = [p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    for path in stale:
        if "--check" in arguments:
            print(f"{path.relative_to(ROOT)} is out of date: run python scripts/write_reference.py")
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
