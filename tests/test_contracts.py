"""The import contracts of pyproject.toml hold, and each of them can fail.

A contract that nothing violates proves little: a misspelt module or a forgotten option passes as well. So a
copy of the sources gets one offending import at a time, and `lint-imports` has to name the contract.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")

# The contract by its id, the module that offends, what stands in it, and words of the report.
OFFENCES = [
    pytest.param("layers", "kernels/offender.py", "import tunesmith.data", "tunesmith.kernels", id="upwards"),
    pytest.param("layers", "cli/offender.py", "import tunesmith.api", "tunesmith.cli", id="sibling"),
    pytest.param("layers", "newcomer.py", "", "tunesmith.newcomer", id="package-without-a-layer"),
    pytest.param("torch-free", "settings/offender.py", "import torch", "tunesmith.settings", id="torch"),
    pytest.param(
        "torch-free",
        "planning/offender.py",
        "import tunesmith.contracts.batch",  # which imports torch
        "tunesmith.planning",
        id="indirect-torch",
    ),
    pytest.param("torch-free", "config/load.py", "import numpy", "tunesmith.config.load", id="numpy"),
    pytest.param("independent", "data/offender.py", "import tunesmith.models", "tunesmith.data", id="reach"),
    pytest.param("acyclic", "data/offender.py", "import tunesmith.data.offender_b", "offender", id="cycle"),
]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what `lint-imports` reads."""
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    # The other half of a cycle; harmless on its own.
    (tmp_path / "src/tunesmith/data/offender_b.py").write_text("import tunesmith.data.offender\n")
    (tmp_path / "src/tunesmith/data/offender.py").write_text("")
    return tmp_path


def lint_imports(sources: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `lint-imports` over the copy; PYTHONPATH comes before the editable installation."""
    environment = {**os.environ, "PYTHONPATH": str(sources / "src"), "COLUMNS": "200"}
    command = [str(LINT_IMPORTS), "--no-logo", "--no-cache", *arguments]
    return subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, timeout=120)


def test_the_sources_keep_every_contract(sources: Path) -> None:
    result = lint_imports(sources)

    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"Contracts: [4-9] kept, 0 broken", result.stdout)


@pytest.mark.parametrize(("contract", "module", "statement", "named"), OFFENCES)
def test_an_offending_import_breaks_its_contract(
    sources: Path, contract: str, module: str, statement: str, named: str
) -> None:
    path = sources / "src/tunesmith" / module
    before = path.read_text() if path.exists() else '"""Not documented."""\n'
    path.write_text(f"{before}\n{statement}\n")

    result = lint_imports(sources, "--contract", contract)

    assert result.returncode == 1, result.stdout + result.stderr
    assert "0 kept, 1 broken" in result.stdout, result.stdout + result.stderr
    assert named in result.stdout.partition("Broken contracts")[2]
