"""`tunesmith merge`: what it writes loads anywhere and is checked, and what fails leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.cli.command import exit_code, succeed
from tests.support.results import save_run
from tests.support.runs import run_settings, train
from tunesmith.config import merge_result
from tunesmith.config.find_result import find_result
from tunesmith.config.load_result import load_result
from tunesmith.export import merged as merged_module
from tunesmith.export.verify import Verification

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = save_run(tmp_path_factory.mktemp("merge") / "run")
    (run / "adapter" / "README.md").write_text("# A\n\n## Training\n\n| rows | 96 |\n\n## Use\n\nNot this.\n")
    GenerationConfig(eos_token_id=[2, 0], temperature=0.7).to_json_file(
        run.with_name("run-base") / "generation_config.json"
    )
    return run


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def agree(run: Path, folder: Path, atol: float) -> None:
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = logits(load_result(find_result(str(run))).model)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=atol)


def test_a_merged_model_with_all_that_belongs_to_it(run: Path, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "merged"
    succeed("merge", run, target, "--max-shard-size", "100KB")
    out = capsys.readouterr().out
    assert re.search(rf"merged    {re.escape(str(target))} \(\d+ kB in bfloat16\)", out)
    assert "checked   log-probabilities differ from base and adapter by" in out
    assert "one weight at a time" in out
    agree(run, target, 0.02)
    saved = json.loads((target / "verification.json").read_text())
    assert saved["good"] is True
    assert 0 < saved["largest_difference"] <= saved["tolerance"] < saved["adapter_effect"]
    assert (
        AutoTokenizer.from_pretrained(target).chat_template
        == (run / "adapter/chat_template.jinja").read_text()
    )
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    card = (target / "README.md").read_text()
    assert "| rows | 96 |" in card
    assert "Not this." not in card
    assert len(list(target.glob("model-*.safetensors"))) > 1


def test_the_manifest_names_every_file(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    succeed("merge", run, target, "--no-verify")
    manifest = json.loads((target / "manifest.json").read_text())["files"]
    assert set(manifest) == {path.name for path in target.iterdir()} - {"manifest.json"}
    for name, entry in manifest.items():
        content = (target / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert "verification.json" not in manifest


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_types(run: Path, tmp_path: Path, dtype: str) -> None:
    succeed("merge", run, tmp_path / "merged", "--dtype", dtype)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype
    agree(run, tmp_path / "merged", {"float16": 3e-3, "float32": 1e-5}[dtype])


def test_a_base_in_four_bits(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", quantize="nf4", use_dora=True)
    succeed("merge", run, "--dtype", "float32")
    assert (run / "merged" / "config.json").is_file()
    agree(run, run / "merged", 1e-5)
    assert "rounded to 4 bits" in (run / "merged" / "README.md").read_text()
    assert load_result(find_result(str(run / "merged"))).quantize == "none"


def test_a_base_that_has_to_be_loaded(tmp_path: Path, capsys: Any) -> None:
    run = save_run(tmp_path / "run", init_lora_weights="pissa")
    succeed("merge", run, "--dtype", "float32")
    assert "the base is loaded whole, because the adapter changes it" in capsys.readouterr().out
    assert json.loads((run / "merged" / "verification.json").read_text())["adapter_effect"] is None
    agree(run, run / "merged", 1e-4)


def test_new_tokens(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", trainable_token_indices=[5, 383])
    succeed("merge", run, "--dtype", "float32")
    agree(run, run / "merged", 1e-5)


def test_a_wrong_merge_is_not_kept(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = merged_module.merged_tensors

    def spoilt(*args: Any) -> Any:
        for name, tensor in plain(*args):
            yield name, tensor * 1.5 if name.endswith("o_proj.weight") else tensor

    monkeypatch.setattr(merged_module, "merged_tensors", spoilt)
    target = tmp_path / "merged"
    assert exit_code("merge", run, target) == 1
    error = capsys.readouterr().err
    assert "The merged model is not what base and adapter are" in error
    assert "Nothing was kept." in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["write_merged", "compare", "merged_card"])
def test_what_fails_leaves_nothing_behind(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("on the way")

    monkeypatch.setattr(merge_result, stage, fail)
    assert exit_code("merge", run, tmp_path / "merged") == 70
    assert list(tmp_path.iterdir()) == []


def test_refusals(run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "note.txt").write_text("mine")
    base = run.with_name("run-base")
    cases: list[tuple[list[object], str]] = [
        ([run, full], "is not empty, and a merge replaces nothing"),
        ([run, full / "note.txt"], "is a file"),
        ([base], "is a model without an adapter"),
        ([run, tmp_path / "x", "--dtype", "int8"], "--dtype int8 is none of bfloat16"),
        ([run, tmp_path / "x", "--max-shard-size", "big"], "is no size of a file"),
        ([tmp_path / "gone"], "There is no folder"),
    ]
    for words, message in cases:
        assert exit_code("merge", *words) == 2, words
        assert message in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))  # type: ignore[attr-defined]
    assert exit_code("merge", run, tmp_path / "x") == 1
    assert "has 10 bytes left" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert (full / "note.txt").read_text() == "mine"


def test_too_little_memory_to_check_is_told_at_once(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_result, "free_host_memory", lambda: 1000)
    assert exit_code("merge", run, tmp_path / "merged") == 2
    assert "Add --no-verify" in capsys.readouterr().err
    succeed("merge", run, tmp_path / "merged", "--no-verify")


def test_an_adapter_too_weak_to_tell(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weak = Verification(0.1, 0.0, 0.2, 0.1, 0.15, "bfloat16", "float32", 3)
    monkeypatch.setattr(merge_result, "compare", lambda *_, **__: weak)
    succeed("merge", run, tmp_path / "merged")
    assert "the adapter itself changes these prompts by 0.15 only" in " ".join(
        capsys.readouterr().out.split()
    )


def test_an_empty_folder_is_taken(run: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    succeed("merge", run, tmp_path / "merged", "--no-verify")
    assert (tmp_path / "merged" / "config.json").is_file()


def test_a_run_that_added_tokens(tiny_model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    added = [f"<t{number}>" for number in range(12)]  # more than the rows that the model has to spare
    settings = run_settings(tiny_model_dir, tmp_path, train={"steps": 2}, adapter={"new_tokens": added})
    run = train(settings).dir
    capsys.readouterr()
    succeed("merge", run, "--dtype", "float32")
    assert "the adapter has more tokens than it" in capsys.readouterr().out
    agree(run, run / "merged", 1e-5)
    assert AutoTokenizer.from_pretrained(run / "merged").convert_tokens_to_ids("<t11>") >= 384
