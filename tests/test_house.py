"""Rules of the house that no linter checks: sizes, what an import costs, and what no source may contain.

Every rule is a function of source text, and each has a test beside it that sees the rule say no.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"
SOURCES = sorted((SRC / "tunesmith").rglob("*.py"))
# A kernel file keeps kernel, launcher, autograd and reference together, so it may be long.
SIZED = [path for path in SOURCES if "kernels" not in path.relative_to(SRC).parts]

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# They run code out of a file; checkpoints and caches are safetensors and JSON instead.
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADERS = {("torch", "load"), ("torch", "save")}


def name(path: Path) -> str:
    return str(path.relative_to(SRC))


def offences(paths: list[Path], rule: Callable[[str], Iterator[str]]) -> dict[str, list[str]]:
    """What the rule finds, by file; files without a finding are left out."""
    found = {name(path): list(rule(path.read_text())) for path in paths}
    return {path: findings for path, findings in found.items() if findings}


def long_functions(source: str, limit: int = MAX_FUNCTION_LINES) -> Iterator[str]:
    """Functions above the limit, docstrings not counted: a long explanation is no reason to cut it."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = _lines_of(node)
        if ast.get_docstring(node, clean=False) is not None:
            lines -= _lines_of(node.body[0])
        if lines > limit:
            yield f"{node.name}, line {node.lineno}: {lines} lines"


def _lines_of(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def unsafe_uses(source: str) -> Iterator[str]:
    """Imports of pickle and its kin, torch.load and torch.save, and calls of the builtins eval and exec."""
    for node in ast.walk(ast.parse(source)):
        for found in _imported(node):
            if found.partition(".")[0] in PICKLES or tuple(found.rsplit(".", 1)) in LOADERS:
                yield f"line {node.lineno}: imports {found}"  # type: ignore[attr-defined]
        match node:
            case ast.Call(func=ast.Name(id="eval" | "exec" as builtin)):
                yield f"line {node.lineno}: {builtin}()"
            case ast.Attribute(value=ast.Name(id=module), attr=attribute) if (module, attribute) in LOADERS:
                yield f"line {node.lineno}: {module}.{attribute}"
            case ast.keyword(arg="allow_pickle", value=value) if not _is_false(value):
                yield f"line {value.lineno}: allow_pickle"


def _imported(node: ast.AST) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), names=names, level=0):
            return [f"{module}.{alias.name}" for alias in names]
    return []


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def test_there_are_sources() -> None:
    assert len(SOURCES) > 10, f"the rules below read {SRC}"


def test_a_file_holds_one_idea() -> None:
    lines = {name(path): len(path.read_text().splitlines()) for path in SIZED}

    assert {path: count for path, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_a_function_is_read_without_scrolling() -> None:
    assert offences(SIZED, long_functions) == {}


def test_a_long_function_is_seen_and_a_long_docstring_is_not() -> None:
    body = "    x = 1\n" * 3

    assert list(long_functions(f"def f():\n{body}", limit=3)) == ["f, line 1: 4 lines"]
    assert list(long_functions(f'def f():\n    """One.\n\n    Two.\n    """\n{body}', limit=4)) == []


def test_no_source_runs_code_from_data() -> None:
    assert offences(SOURCES, unsafe_uses) == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, dill.source",
        "from pickle import loads",
        "from torch import load",
        "def f():\n    import cloudpickle",
        "state = torch.load('x')",
        "reader = torch.load",
        "eval('1')",
        "exec(text)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_uses_are_seen(source: str) -> None:
    assert len(list(unsafe_uses(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "from safetensors.torch import load",
        "numpy.load(path, allow_pickle=False)",
        "'exec(1)'",
    ],
)
def test_harmless_uses_are_not(source: str) -> None:
    assert list(unsafe_uses(source)) == []


def test_every_package_says_what_it_is_for() -> None:
    inits = [folder / "__init__.py" for folder in sorted({path.parent for path in SOURCES})]
    missing = [name(init) for init in inits if not init.exists()]
    silent = [
        name(init) for init in inits if init.exists() and not ast.get_docstring(ast.parse(init.read_text()))
    ]

    assert missing == []
    assert silent == []


HEAVY = {"torch", "transformers", "datasets", "numpy", "peft", "accelerate", "bitsandbytes"}

# What an import may not load. Import-linter follows the graph of imports; this sees what really happens.
LIGHT = {
    "tunesmith": HEAVY | {"pydantic"},
    "tunesmith.contracts.errors": HEAVY | {"pydantic"},
    "tunesmith.contracts.events": HEAVY,
    "tunesmith.settings.run": HEAVY,
    "tunesmith.planning": HEAVY,
    "tunesmith.cli.main": HEAVY,
    "tunesmith.cli.runs": HEAVY,
}


def loaded_by(module: str) -> set[str]:
    """Top-level modules that are loaded once `module` has been imported by a fresh interpreter."""
    program = f"import {module}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_an_import_that_should_be_cheap_is(module: str) -> None:
    assert loaded_by(module) & LIGHT[module] == set()


def test_a_heavy_import_would_be_seen() -> None:
    assert importlib.util.find_spec("numpy") is not None
    assert "numpy" in loaded_by("numpy")
