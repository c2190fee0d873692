"""Nothing under `kernels/` escapes the tests that walk the catalog: every Triton kernel compiles for all three
generations of cards, and every operator is checked for its schema, its fake tensors and its gradients.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.library import CustomOpDef

import tunesmith.kernels
from tests.kernels import test_compile, test_operators
from tests.kernels.compile_only import recorded
from tunesmith.kernels.catalog import CATALOG

triton = pytest.importorskip("triton")


def modules() -> list[ModuleType]:
    names = [info.name for info in pkgutil.iter_modules(tunesmith.kernels.__path__)]
    return [importlib.import_module(f"tunesmith.kernels.{name}") for name in names]


def kernels() -> list[Any]:
    """Every function under `kernels/` that Triton compiles."""
    found = [(m, value) for m in modules() for value in vars(m).values()]
    return [v for m, v in found if isinstance(v, triton.JITFunction) and v.__module__ == m.__name__]


def name_of(kernel: Any) -> str:
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def launched() -> set[str]:
    """The kernels that the real sizes of the catalog launch: those that `test_compile` compiles."""
    names = set()
    for row in CATALOG.values():
        for size in row.large:
            with recorded() as launches:
                row.op(**row.cases(size, torch.bfloat16, torch.device("meta")))
            names |= {name_of(launch.kernel) for launch in launches}
    return names


def uncompiled(names: set[str]) -> set[str]:
    """Kernels that are neither among those names nor called by one that is compiled."""
    compiled, rest = set(), {name_of(kernel): kernel for kernel in kernels()}
    wave = {name: rest[name] for name in names & rest.keys()}
    while wave:
        compiled |= wave.keys()
        called = {word for kernel in wave.values() for word in re.findall(r"\b(\w+)\(", kernel.src)}
        wave = {n: k for n, k in rest.items() if n not in compiled and k.fn.__name__ in called}
    return rest.keys() - compiled


def parameters(test: Any) -> dict[str | tuple[str, ...], list[Any]]:
    return {mark.args[0]: list(mark.args[1]) for mark in test.pytestmark if mark.name == "parametrize"}


def test_every_kernel_is_compiled() -> None:
    assert len(kernels()) > 10
    assert uncompiled(launched()) == set()


def test_a_kernel_that_nothing_launches_would_be_seen() -> None:
    names = launched()
    assert "rope._rope_kernel" in names
    assert uncompiled(names - {"rope._rope_kernel"}) == {"rope._rope_kernel"}
    assert "launch.dot" in uncompiled(set())


def test_they_are_compiled_for_three_generations() -> None:
    """Ampere, Hopper and Blackwell; the variants that take long when slow tests are asked for."""
    cases = parameters(test_compile.test_kernels_of_real_sizes_compile)["name", "capability"]
    assert sorted(case.values for case in cases) == sorted(
        (name, capability) for name in CATALOG for capability in (80, 90, 100)
    )
    fast = {case.values for case in cases if not case.marks}
    assert {(name, 90) for name in CATALOG} <= fast


def operators() -> dict[str, CustomOpDef]:
    found = [value for module in modules() for value in vars(module).values()]
    return {str(value): value for value in found if isinstance(value, CustomOpDef)}


def test_every_operator_is_checked() -> None:
    """`opcheck` finds a wrong schema, a fake that differs from the real result, and a gradient that is not traced."""
    tables = test_operators.DIFFERENTIABLE | test_operators.IN_PLACE | test_operators.FROZEN
    checked = {str(case[0]) for case in tables.values()}
    assert len(checked) >= 9
    assert operators().keys() - checked == set()


def test_every_operator_that_could_be_differentiated_is() -> None:
    """All but those that write into their arguments, that read nothing that trains, and the backward passes."""
    tables = test_operators.DIFFERENTIABLE | test_operators.FROZEN
    differentiated = {str(case[0]) for case in tables.values()}
    names = {name.partition("::")[2].rstrip(")>") for name in operators().keys() - differentiated}
    assert {name for name in names if not name.endswith(("_", "_backward"))} == set()
