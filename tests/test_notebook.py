"""The notebook in examples/: sound as a file, true to the interface, clean in what it shows, and it runs."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAX_BYTES = 20_000


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_of(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def texts_of(notebook: Any) -> Iterator[str]:
    """Everything that a reader sees or that the file says: sources and outputs."""
    for cell in notebook.cells:
        yield cell.source
        for output in cell.get("outputs", []):
            yield str(output.get("text", "")) + "".join(map(str, output.get("data", {}).values()))


def unknown_uses(code: str) -> list[str]:
    """Imports that lead nowhere, and keywords that a function of tunesmith does not know by name."""
    found: list[str] = []
    ours: dict[str, Any] = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    found.append(f"{node.module}.{alias.name}")
                elif node.module == "tunesmith":
                    ours[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        name, *attributes = ast.unparse(node.func).split(".")
        function = ours.get(name)
        for attribute in attributes:
            function = getattr(function, attribute, None)
            if name in ours and function is None:
                found.append(ast.unparse(node.func))
        if name in ours and function is not None:
            found += [f"{ast.unparse(node.func)}({each})" for each in unknown_keywords(function, node)]
    return found


def unknown_keywords(function: Any, call: ast.Call) -> list[str]:
    from tunesmith.api.trainer_arguments import MOVED

    names = set(inspect.signature(function).parameters)
    if inspect.isclass(function):
        for base in function.__mro__:
            names |= set(inspect.signature(base.__init__).parameters)
        names |= set(MOVED)
    return [keyword.arg for keyword in call.keywords if keyword.arg is not None and keyword.arg not in names]


def test_the_notebook_is_valid_and_small(notebook: Any) -> None:
    nbformat.validate(notebook)

    assert NOTEBOOK.stat().st_size < MAX_BYTES
    assert notebook.metadata.kernelspec.name == "python3"


def test_its_outputs_are_stored_and_none_is_an_error_or_noise(notebook: Any) -> None:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]

    assert outputs
    assert {output.output_type for output in outputs} == {"stream"}
    assert {output.name for output in outputs} == {"stdout"}
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)], "run it from top to bottom before it is stored"


def test_it_names_no_place_of_a_machine(notebook: Any) -> None:
    found = [text for text in texts_of(notebook) if re.search(r"(?<![\w.])/\w+/|[A-Z]:\\|\x1b\[", text)]

    assert found == []


def test_its_code_compiles_and_calls_what_exists(notebook: Any) -> None:
    code = "\n".join(code_of(notebook))
    compile(code, str(NOTEBOOK), "exec")

    assert unknown_uses(code) == []
    assert MODEL in code


def test_an_unknown_name_or_keyword_would_be_seen() -> None:
    code = (
        "from tunesmith import FastLanguageModel, SFTTrainer\n"
        "from datasets import Nothing\n"
        "FastLanguageModel.from_pretraned('x')\n"
        "FastLanguageModel.get_peft_model(model, rank=16)\n"
        "SFTTrainer(model=model, tokenizr=1)\n"
    )

    assert unknown_uses(code) == [
        "datasets.Nothing",
        "FastLanguageModel.from_pretraned",
        "FastLanguageModel.get_peft_model(rank)",
        "SFTTrainer(tokenizr)",
    ]


def test_its_links_lead_somewhere(notebook: Any) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", "\n".join(texts_of(notebook)))

    assert len(links) >= 3
    assert [link for link in links if not (NOTEBOOK.parent / link).exists()] == []


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model as a Hugging Face folder: from the cache that TUNESMITH_CACHE names, else converted once."""
    from rich.console import Console

    from tunesmith.cli import demo
    from tunesmith.contracts.errors import UserError

    pytest.importorskip("gguf")
    with pytest.MonkeyPatch.context() as patch:
        if "TUNESMITH_CACHE" not in os.environ:
            patch.setenv("TUNESMITH_CACHE", str(tmp_path_factory.mktemp("cache")))
        try:
            return demo.model_folder(Console(quiet=True))
        except UserError:
            pytest.skip("the package that carries the demo's weights is not installed")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_and_the_loaded_adapter_answers_as_the_trained_one(
    notebook: Any, model_dir: Path, tmp_path: Path
) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    place = tmp_path / MODEL  # a folder of this name comes before the hub
    place.parent.mkdir(parents=True)
    place.symlink_to(model_dir)
    notebook = copy.deepcopy(notebook)

    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()

    said = ["".join(output.get("text", "") for output in cell.outputs if output.name == "stdout")
            for cell in notebook.cells if cell.cell_type == "code"]  # fmt: skip
    before, after, loaded = said[1], said[4], said[5]
    assert '"capital"' not in before
    assert '"capital": "Tokyo"' in after
    assert loaded == after
    losses = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", said[3])]
    assert losses[-1] < losses[0] / 4
    assert (tmp_path / "runs" / "quickstart" / "adapter" / "adapter_model.safetensors").is_file()
