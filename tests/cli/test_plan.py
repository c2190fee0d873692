"""`tunesmith plan`: what it prints, writes and refuses, with plans made by hand; and that it stays light."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.cli.command import exit_code
from tunesmith.cli.plan import plan_and_print
from tunesmith.config import plan_card, plan_model, plan_run
from tunesmith.planning import plan as planning
from tunesmith.planning.cards import CARDS
from tunesmith.planning.facts import ModelFacts
from tunesmith.planning.plan import Alternative, Plan, PlanRequest, Summary

GIB = 2**30

RUN = """
model: {name: meta-llama/Llama-3.1-8B, quantize: nf4}
adapter: {rank: 8}
data: {train: [{path: rows.jsonl}]}
train: {sequence_length: 4096, global_batch: 16, steps: 300}
"""


def timeline(layers: int) -> tuple[tuple[str, dict[str, int]], ...]:
    """Activations that rise in forward and fall in backward, with the head in between."""
    fixed = {"weights": 6 * GIB, "adapter": GIB // 8, "optimizer": GIB // 4, "reserve": GIB}
    moments: list[tuple[str, dict[str, int]]] = []
    for number in range(layers):
        moments.append((f"forward {number}", {**fixed, "activations": (number + 1) * GIB // 2}))
    moments.append(("head", {**fixed, "activations": layers * GIB // 2, "head": 2 * GIB}))
    for number in reversed(range(layers)):
        kept = (number + 1) * GIB // 2
        moments.append((f"backward {number}", {**fixed, "activations": kept, "workspace": GIB // 2}))
    moments.append(("step", {**fixed, "gradients": GIB // 8}))
    return tuple(moments)


def handmade(facts: ModelFacts, request: PlanRequest, *, fits: bool = True) -> Plan:
    """A plan with round figures, whatever the model."""
    moments = timeline(len(facts.layers))
    peak = max(sum(parts.values()) for _, parts in moments)
    lean = len(facts.layers) // 4
    summary = Summary("H200", True, 0, 40 * GIB, 4, 2.5, 26_214.4, 750.0)
    return Plan(
        card=request.card,
        budget_bytes=72 * GIB if fits else 20 * GIB,
        parts={name: max(parts.get(name, 0) for _, parts in moments) for name in planning.PARTS},
        host_bytes=0,
        micro_batch_rows=3,
        tokens=3 * sum(request.work.documents),
        policies=("recompute",) * lean + ("keep",) * (len(facts.layers) - lean),
        embedding="device",
        chunks={"head": 1024},
        peak_bytes=peak,
        step_seconds=4.0,
        tokens_per_second=request.rows * sum(request.work.documents) / 4.0,
        total_seconds=None if request.steps is None else 4.0 * request.steps,
        timeline=moments,
        fits=fits,
        missing_bytes=0 if fits else peak - 20 * GIB,
        nearest=()
        if fits
        else (
            Alternative(
                "a shorter row", ("train.sequence_length=2048",), replace(summary, card=request.card)
            ),
        ),
        alternatives=(Alternative("the next larger card, H200", (), summary),) if fits else (),
    )


@pytest.fixture(autouse=True)
def no_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_card, "ask_nvidia_smi", list)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ModelFacts, PlanRequest]]:
    """What the planner was asked; it answers with a plan made by hand."""
    questions: list[tuple[ModelFacts, PlanRequest]] = []

    def answer(facts: ModelFacts, request: PlanRequest) -> Plan:
        questions.append((facts, request))
        return handmade(facts, request)

    monkeypatch.setattr(plan_run, "make_plan", answer)
    return questions


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    return file


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = exit_code("plan", *words)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


# ---------------------------------------------------------------------- the report


def test_the_report_says_what_is_planned_and_what_it_comes_to(asked, run_file, capsys):
    code, text = printed(capsys, run_file, "--gpu", "h100 80gb")

    assert code == 0
    for line in (
        "meta-llama/Llama-3.1-8B: 8.03 billion parameters in 32 layers (llama, from the table of public models)",
        "LoRA of rank 8: 21.0 million parameters, the base in 4 bits (NF4), computed in bfloat16, with adamw",
        "H100-80GB, 79.1 GiB, speeds measured on such a card",
        "16 rows of 4,096 tokens a step",
        "3 rows, 12,288 tokens; 6 micro-batches a step",
        "8 × recompute, 24 × keep",
        "head 1,024 tokens at once",
        "4 s, 16,384 tokens/s",
        "20 minutes for 300 steps",
        "It fits: at most 25.4 of 72.0 GiB.",
        "Rows are taken to be full: 4,096 tokens, one document, all of it trained on.",
    ):
        assert line in text
    table = [line.split() for line in text.splitlines()]
    assert ["as", "it", "is", "yes", "3", "rows", "25.4", "16,384", "4", "s"] in table
    assert [
        "the",
        "next",
        "larger",
        "card,",
        "H200",
        "yes",
        "4",
        "rows",
        "40.0",
        "26,214",
        "2.5",
        "s",
    ] in table
    bars = {words[0]: words[2].count("█") for words in table if len(words) == 3 and "█" in words[2]}
    assert bars["activations"] == 40
    assert bars["weights"] == 15
    assert "gradients" in bars or ["gradients", "0.12"] in table


def test_what_does_not_fit_is_said_with_what_does(run_file, capsys, monkeypatch):
    monkeypatch.setattr(plan_run, "make_plan", lambda facts, request: handmade(facts, request, fits=False))

    code, text = printed(capsys, run_file)

    assert code == 1
    assert "It does not fit: 25.4 GiB are needed and 20.0 may be used; 5.4 GiB are missing." in text
    assert "nearest settings that fit" in text
    assert "\n  train.sequence_length=2048\n" in text
    assert "5.4 GiB missing" in text
    assert "no GPU is here; name another with --gpu" in text


def test_where_nothing_fits_that_is_near_this_is_said(run_file, capsys, tmp_path, monkeypatch):
    def answer(facts: ModelFacts, request: PlanRequest) -> Plan:
        return replace(handmade(facts, request, fits=False), nearest=())

    monkeypatch.setattr(plan_run, "make_plan", answer)
    code, text = printed(capsys, run_file, "--picture", tmp_path / "plan.html")

    assert code == 1
    assert "nearest settings" not in text
    assert "Nothing near fits: no two settings changed at once, and no other card alone." in text
    assert "Nothing near fits" in (tmp_path / "plan.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("known", [True, False])
def test_a_host_that_has_too_little_is_what_is_said_to_be_missing(known, run_file, capsys, monkeypatch):
    def answer(facts: ModelFacts, request: PlanRequest) -> Plan:
        assert request.host_bytes == 4 * GIB
        fits = handmade(facts, request)
        lacking = replace(fits.summary, fits=False)
        return replace(
            fits, fits=False, host_bytes=24 * GIB, nearest=(Alternative("another", ("a.b=c",), lacking),)
        )

    monkeypatch.setattr(plan_run, "make_plan", answer)
    monkeypatch.setattr(
        "tunesmith.cli.plan.choose_card",
        lambda *_: plan_card.ChosenCard(CARDS["RTX-4090"], "this machine's", 4 * GIB, known),
    )
    code, text = printed(capsys, run_file)

    assert code == 1
    free = "is free" if known else "such a card's machine is taken to have free; see --host-memory"
    assert (
        f"It does not fit: 24.0 GiB of host memory would be pinned, and 4.0 may be, half of what {free}."
        in text
    )
    assert "lacks host memory" in text
    assert ("host memory  24.0 GiB pinned\n" in text) == known


def test_pinned_memory_of_another_machine_comes_with_what_that_asks_of_it(run_file, capsys, monkeypatch):
    def answer(facts: ModelFacts, request: PlanRequest) -> Plan:
        return replace(handmade(facts, request), host_bytes=3 * GIB)

    monkeypatch.setattr(plan_run, "make_plan", answer)
    _, text = printed(capsys, run_file)

    assert "host memory  3.0 GiB pinned, of a machine with at least 6.0 GiB free\n" in text


def test_no_line_of_a_report_is_wider_than_the_terminal(run_file):
    """What would be too wide goes on in the next line; settings stay whole, to be copied."""
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    words = ["model.name=meta-llama/Llama-3.1-70B", "adapter.kind=none", "model.quantize=none"]
    plan_and_print(str(run_file), words, console, gpu="H100-80GB")
    lines = [line.rstrip() for line in out.getvalue().splitlines()[1:]]  # the first is the run file's

    assert max(map(len, lines)) <= 80
    assert "LoRA instead of all" in "\n".join(lines)
    assert "  adapter.kind=lora model.quantize=nf4" in lines
    heads = next(line for line in lines if line.startswith("nearest settings"))
    others = [line for line in lines if line.endswith(" s") and "/s" not in line]
    assert len(others) > 1
    assert {len(line) for line in others} == {len(heads)}


def test_a_run_without_steps_is_planned_by_the_thousand(asked, run_file, capsys):
    _, text = printed(capsys, run_file, "train.steps=null")

    assert asked[0][1].steps is None
    assert "66.7 minutes for each 1,000 steps" in text


def test_json_has_all_of_it(asked, run_file, capsys):
    assert exit_code("plan", run_file, "--json") == 0
    said = json.loads(capsys.readouterr().out)

    assert said["model"]["parameters"] == 8_030_261_248
    assert said["model"]["trained_parameters"] == 20_971_520
    assert said["model"]["unfused"] is None
    assert said["request"]["work"]["quantize"] == "nf4"
    assert said["card"] == {
        "name": "H100-80GB",
        "memory_bytes": CARDS["H100-80GB"].memory_bytes,
        "figures_from": "NVIDIA H100 data sheet, SXM",
        "estimated": False,
        "computes_in": "bfloat16",
    }
    assert said["plan"]["fits"] is True
    assert said["plan"]["parts"]["weights"] == 6 * GIB
    assert said["plan"]["policies"].count("recompute") == 8
    assert said["plan"]["alternatives"][0]["summary"]["card"] == "H200"
    assert len(said["plan"]["timeline"]) == 66
    assert said["seconds_of_1000_steps"] == 4000.0


# ---------------------------------------------------------------------- what the planner is asked


def question(asked: list[Any], run_file: Path, *words: str) -> tuple[ModelFacts, PlanRequest]:
    asked.clear()
    assert exit_code("plan", run_file, *words) == 0
    return asked[-1]


def test_settings_become_the_question(asked, run_file):
    facts, request = question(asked, run_file, "--gpu", "RTX-4090")
    work = request.work

    assert (request.card, request.rows, request.steps, request.micro_batch) == ("RTX-4090", 16, 300, None)
    assert (work.documents, work.supervised, work.quantize, work.rank) == ((4096,), 4096, "nf4", 8)
    assert (work.adapted, work.dropout, work.optimizer) == (
        ("qkv", "output", "gate_up", "down"),
        False,
        "adamw",
    )
    assert (work.itemsize, work.trained_itemsize, request.policy) == (2, 4, "auto")
    assert facts.unfused == ""
    assert request.work_of(3).documents == (4096,) * 3
    assert request.work_of(3).supervised == 3 * 4096


@pytest.mark.parametrize(
    ("override", "seen"),
    [
        ("train.global_batch='100000 tokens'", lambda r: r.rows == 25),
        ("train.global_batch='10 tokens'", lambda r: r.rows == 1),
        ("train.steps='1_000_000 tokens'", lambda r: r.steps == 16),
        ("train.micro_batch=4", lambda r: r.micro_batch == 4),
        ("memory.policy=recompute", lambda r: r.policy == "recompute"),
        ("memory.budget=0.5", lambda r: r.budget == 0.5),
        ("memory.budget='24 GiB'", lambda r: r.budget == 24 * GIB),
        ("train.optimizer=adamw_8bit", lambda r: r.work.optimizer == "adamw_8bit"),
        ("adapter.dropout=0.1", lambda r: r.work.dropout),
        ("adapter.targets=[q_proj, down_proj]", lambda r: r.work.adapted == ("qkv", "down")),
        (r"adapter.targets='.*\.(1|2)\.mlp\..*_proj'", lambda r: r.work.adapted == ("gate_up", "down")),
        ("model.dtype=float32", lambda r: r.work.itemsize == 4),
    ],
)
def test_each_setting_counts(asked, run_file, override, seen):
    _, request = question(asked, run_file, override)

    assert seen(request)


@pytest.mark.parametrize(
    ("gpu", "more", "itemsize"),
    [
        ("H100-80GB", (), 2),  # 8 billion parameters do not fit in float32
        ("H100-80GB", ("model.dtype=float32",), 4),
        ("H100-80GB", ("train.optimizer=lion_32bit",), 4),
        ("H100-80GB", ("model.name=HuggingFaceTB/SmolLM2-135M",), 4),
        ("H100-80GB", ("model.name=HuggingFaceTB/SmolLM2-135M", "model.dtype=bfloat16"), 2),
        ("V100-32GB", (), 4),  # it has no bfloat16
        ("V100-32GB", ("model.dtype=bfloat16",), 2),  # and computes in it where it is asked to, slowly
        ("H100-80GB", ("model.dtype=float16",), 4),
    ],
)
def test_full_fine_tuning_trains_weights_in_the_type_that_a_run_takes(asked, run_file, gpu, more, itemsize):
    _, request = question(asked, run_file, "adapter.kind=none", "model.quantize=none", *more, "--gpu", gpu)

    assert request.work.full
    assert request.work.adapted == ()
    assert request.work.trained_itemsize == itemsize


def test_the_rank_of_an_adapter_that_is_continued_is_its_own(asked, run_file, tmp_path, capsys):
    (tmp_path / "old").mkdir()
    saved = {"r": 64, "target_modules": ["o_proj"], "peft_type": "LORA"}
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(saved))
    _, request = question(asked, run_file, f"adapter.path={tmp_path / 'old'}")

    assert (request.work.rank, request.work.adapted) == (64, ("output",))
    code, text = printed(capsys, run_file, f"adapter.path={tmp_path}")
    assert code == 2
    assert "holds no adapter_config.json of a LoRA adapter" in text


@pytest.mark.parametrize(
    ("override", "note"),
    [
        ("train.sequence_length=200000", "longer than the 131,072 positions that the model was made for"),
        ("model.quantize=int8", "Its layers are not fused (its weights are held in 8 bits)"),
        ("adapter.use_dora=true", "Its layers are not fused (its adapter has DoRA)"),
        ("model.name=google/gemma-3-4b-it", "Its vision tower, 0.4 billion parameters"),
        ("adapter.targets=[q_proj]", "counted on all projections of each group that it touches"),
        ("adapter.last_layers=4", "adapter.last_layers is not counted"),
        ("adapter.modules_to_save=[lm_head]", "What adapter.modules_to_save trains besides is not counted"),
        (
            "memory.budget='100 GB'",
            "memory.budget is 93.1 GiB, and the card has 79.1: all of it is planned with",
        ),
        (
            "model.name=mistralai/Mixtral-8x7B-v0.1",
            "model.quantize leaves them as they are, and all-linear puts",
        ),
    ],
)
def test_what_the_plan_does_not_know_is_said(asked, run_file, capsys, override, note):
    _, text = printed(capsys, run_file, override)
    _, plain = printed(capsys, run_file)

    assert note in text
    assert note not in plain


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("all-linear", False),
        ("[q_proj, o_proj]", False),
        ("[q_proj, down_proj]", True),
        ("[q_proj, w1, w2, w3]", True),
        (r"'.*_proj'", True),
    ],
)
def test_adapters_that_targets_put_on_experts_are_said_not_to_be_counted(
    asked, run_file, capsys, targets, said
):
    override = f"adapter.targets={targets}"
    _, text = printed(capsys, run_file, "model.name=mistralai/Mixtral-8x7B-v0.1", override)
    assert ("Adapters that adapter.targets puts on experts by name are not counted" in text) == said
    _, text = printed(
        capsys, run_file, "adapter.kind=none", "model.name=mistralai/Mixtral-8x7B-v0.1", "model.quantize=none"
    )
    assert "and the others as weights." in text
    assert "model.quantize leaves them" not in text


@pytest.mark.parametrize(
    ("gpu", "more", "computed", "note"),
    [
        ("RTX-4090", (), "bfloat16", ""),
        ("T4", (), "float16", "T4 has no bfloat16: the run computes in float16, with a loss scale."),
        ("T4", ("model.dtype=bfloat16",), "bfloat16", "T4 has no bfloat16, and model.dtype asks for it"),
        ("T4", ("model.dtype=float32",), "float32", ""),
    ],
)
def test_the_type_that_a_run_computes_in_is_said(asked, run_file, capsys, gpu, more, computed, note):
    _, text = printed(capsys, run_file, "--gpu", gpu, *more)

    assert f", computed in {computed}, with adamw" in text
    assert note in text
    assert ("no bfloat16" in text) == bool(note)


def test_weights_that_were_published_quantised_are_said_to_be_counted_in_16_bits(
    asked, run_file, tmp_path, capsys
):
    folder = write_model(tmp_path / "mine", quantization_config={"quant_method": "awq", "bits": 4})
    note = "Its weights are published in awq and counted in 16 bits"
    _, text = printed(capsys, run_file, f"model.name={folder}", "model.quantize=none")

    assert note in text
    assert asked[-1][1].work.quantize == "none"
    own = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    _, text = printed(
        capsys, run_file, f"model.name={write_model(tmp_path / 'own', quantization_config=own)}"
    )
    assert "published in" not in text
    assert asked[-1][1].work.quantize == "nf4"
    assert [request.published_quantized for _, request in asked] == [False, True]


# ---------------------------------------------------------------------- where the config is from


def write_model(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    config = {"model_type": "qwen3", "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_a_folders_own_config_comes_first(asked, run_file, tmp_path, capsys):
    folder = write_model(tmp_path / "mine")
    code, text = printed(capsys, run_file, f"model.name={folder}")

    assert code == 0
    assert len(asked[-1][0].layers) == 3
    assert f"from {folder})" in text


def test_the_hubs_cache_comes_before_the_table(asked, run_file, tmp_path, capsys, monkeypatch):
    cached = write_model(tmp_path / "cached") / "config.json"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file, revision: str(cached))
    _, text = printed(capsys, run_file)

    assert "from the Hugging Face cache)" in text
    assert len(asked[-1][0].layers) == 3


def test_the_hub_is_asked_for_what_is_nowhere_else(asked, run_file, tmp_path, capsys, monkeypatch):
    fetched = write_model(tmp_path / "fetched") / "config.json"
    calls: list[Any] = []

    def fetch(name: str, file: str, *, revision: str | None) -> str:
        calls.append((name, file, revision))
        return str(fetched)

    monkeypatch.setattr(plan_model, "offline_if_unreachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    _, text = printed(capsys, run_file, "model.name=somebody/new", "model.revision=v2")

    assert calls == [("somebody/new", "config.json", "v2")]
    assert "from the Hugging Face hub)" in text
    printed(capsys, run_file, "model.revision=v2")  # the table is of the main branch
    assert calls[-1] == ("meta-llama/Llama-3.1-8B", "config.json", "v2")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("somebody/new", "the Hugging Face hub cannot be reached.\nCheck the network"),
        ("Qwen/Qwen3-8b-Bse", "Did you mean Qwen/Qwen3-8B-Base?"),
        ("gpt2", "neither a local folder nor a model on the Hugging Face hub"),
        ("./nowhere", "model.name: there is no folder nowhere."),
    ],
)
def test_a_model_that_is_nowhere_is_a_sentence(run_file, capsys, monkeypatch, name, said):
    monkeypatch.setattr(plan_model, "offline_if_unreachable", lambda: True)
    code, text = printed(capsys, run_file, f"model.name={name}")

    assert code == 2
    assert said in text


def test_a_gated_model_says_how_to_get_it(run_file, capsys, monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_: Any, **__: Any) -> str:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(plan_model, "offline_if_unreachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    code, text = printed(capsys, run_file, "model.name=somebody/gated")

    assert code == 2
    assert "is gated on the Hugging Face hub" in text
    assert "https://huggingface.co/somebody/gated" in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "it is no JSON, from line 1, column 2 on"),
        ("x" * 10_000_000, "it is no JSON, from line 1, column 1 on"),
        ("[" * 100_000, "it is no JSON that a model has"),
        ("1" * 100_000, "it is no JSON that a model has"),
        ("[1]", "it holds no names and values"),
        ("\xff", "it is no text in UTF-8"),
    ],
    ids=["cut", "junk", "deep", "digits", "list", "binary"],
)
def test_a_config_that_is_damaged_is_a_sentence(run_file, tmp_path, capsys, content, reason):
    folder = write_model(tmp_path / "mine")
    (folder / "config.json").write_text(content, encoding="latin-1")
    code, text = printed(capsys, run_file, f"model.name={folder}")

    assert code == 2
    assert f"error: model.name: the config.json of {folder} cannot be read: {reason}.\n" == text


def test_links_that_lead_in_a_circle_are_a_sentence(run_file, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").symlink_to("config.json")
    code, text = printed(capsys, run_file, f"model.name={tmp_path / 'mine'}")

    assert code == 2
    assert "holds no config.json" in text


def test_a_target_that_is_nowhere_names_those_that_are(asked, run_file, capsys):
    code, text = printed(capsys, run_file, "adapter.targets=[q_prj]")

    assert code == 2
    assert "no linear layer of meta-llama/Llama-3.1-8B is called so" in text
    assert "q_proj" in text


# ---------------------------------------------------------------------- the card


def test_positions_that_are_stretched_are_no_remark(asked, run_file, capsys):
    stretched = "model.rope_scaling={rope_type: yarn, factor: 2.0}"
    _, text = printed(capsys, run_file, "train.sequence_length=200000", stretched)

    assert len(asked) == 1
    assert "positions that the model was made for" not in text


def test_the_card_of_this_machine_is_taken_where_there_is_one(asked, run_file, capsys, monkeypatch):
    monkeypatch.setattr(
        plan_card, "ask_nvidia_smi", lambda: [{"name": "NVIDIA GeForce RTX 4090", "memory.total": "24564"}]
    )
    _, text = printed(capsys, run_file)

    assert "RTX-4090" in text
    assert "(this machine's)" in text
    assert asked[-1][1].host_bytes > 0
    printed(capsys, run_file, "--gpu", "H100-80GB")
    assert (asked[-1][1].card, asked[-1][1].host_bytes) == ("H100-80GB", CARDS["H100-80GB"].memory_bytes)
    printed(capsys, run_file, "--gpu", "H100-80GB", "--host-memory", "10 GiB")
    assert asked[-1][1].host_bytes == 5 * GIB
    code, text = printed(capsys, run_file, "--host-memory", "plenty")
    assert code == 2
    assert "--host-memory 'plenty' is no size.\nWrite one such as 64GiB, in MiB, GiB, TiB or GB." in text


def test_a_card_that_is_not_in_the_table_is_a_sentence(run_file, capsys, monkeypatch):
    code, text = printed(capsys, run_file, "--gpu", "voodoo 2")
    assert code == 2
    assert "There is no GPU called 'voodoo 2'" in text

    monkeypatch.setattr(
        plan_card, "ask_nvidia_smi", lambda: [{"name": "NVIDIA Riva TNT", "memory.total": "16"}]
    )
    code, text = printed(capsys, run_file)
    assert code == 2
    assert "This machine's GPU cannot be planned for. There is no GPU called 'NVIDIA Riva TNT'" in text


# ---------------------------------------------------------------------- the picture


def test_a_page_shows_the_memory_of_a_step(asked, run_file, tmp_path, capsys):
    page = tmp_path / "plan.html"
    code, text = printed(capsys, run_file, "--picture", page)
    html = page.read_text(encoding="utf-8")

    assert code == 0
    assert str(page) in text
    assert "default-src 'none'" in html
    assert html.count("<polygon") == 8
    assert html.count('class="spot"') == 66
    assert "<title>forward 0: 7.9 GiB (weights 6.0, adapter 0.12" in html
    assert "72.0 GiB may be used" in html
    for phase in ("forward", "backward"):
        assert f">{phase}</text>" in html
    assert "It fits: at most 25.4 of 72.0 GiB." in html
    assert "8 × recompute, 24 × keep" in html
    assert "the next larger card, H200" in html
    assert "src=" not in html
    assert "<script" not in html


def test_areas_lie_on_each_other_and_under_the_budget(asked, run_file, tmp_path):
    """The highest point of the highest area is the peak, to the scale that the budget's line is drawn in."""
    from xml.etree import ElementTree

    page = tmp_path / "plan.html"
    exit_code("plan", run_file, "--picture", page)
    html = page.read_text(encoding="utf-8")
    svg = ElementTree.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])
    areas = [
        [tuple(map(float, point.split(","))) for point in area.attrib["points"].split()]
        for area in svg.iter("polygon")
    ]
    ground = max(y for _, y in areas[0])
    line = next(each for each in svg.iter("line") if each.attrib.get("class") == "limit")
    scale = (ground - float(line.attrib["y1"])) / 72.0
    for below, above in pairwise(areas):
        half = len(below) // 2
        assert below[:half] == above[half:][::-1]
    assert (ground - min(y for _, y in areas[-1])) / scale == pytest.approx(25.375, abs=0.02)


def test_the_budget_can_be_read_where_it_lies_on_areas(run_file, tmp_path, monkeypatch):
    """A plan that does not fit is higher than its budget: the line and its words have paper below them."""
    from xml.etree import ElementTree

    monkeypatch.setattr(plan_run, "make_plan", lambda facts, request: handmade(facts, request, fits=False))
    page = tmp_path / "plan.html"
    exit_code("plan", run_file, "--picture", page)
    html = page.read_text(encoding="utf-8")
    svg = ElementTree.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])
    drawn = list(svg)
    place = next(number for number, one in enumerate(drawn) if one.attrib.get("class") == "limit")
    ends = ("x1", "x2", "y1", "y2")

    assert "stroke:var(--paper)" in drawn[place - 1].attrib["style"]
    assert [drawn[place - 1].attrib[end] for end in ends] == [drawn[place].attrib[end] for end in ends]
    assert "paint-order:stroke" in drawn[place + 1].attrib["style"]
    assert drawn[place + 1].text == "20.0 GiB may be used"
    assert all(one.tag != "polygon" for one in drawn[place:])


def test_a_png_is_drawn_by_matplotlib(asked, run_file, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.PNG"

    assert exit_code("plan", run_file, "--picture", picture) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.glob(".tmp*")) == []


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("plan.pdf", "a picture is a PNG or an HTML page"),
        ("missing/plan.html", "there is no folder"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_a_sentence(asked, run_file, tmp_path, capsys, file, said):
    code, text = printed(capsys, run_file, "--picture", tmp_path / file)

    assert code == 2
    assert said in text
    assert asked == [], "nothing is planned for a picture that cannot be drawn"


def test_a_png_that_cannot_be_put_in_place_leaves_nothing(asked, run_file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "plan.png").mkdir()
    code, text = printed(capsys, run_file, "--picture", tmp_path / "plan.png")

    assert code == 2
    assert "plan.png cannot be written" in text
    assert list(tmp_path.glob(".tmp*")) == []


def test_without_matplotlib_a_page_is_offered(asked, run_file, capsys, monkeypatch):
    monkeypatch.setattr("tunesmith.export.plot.find_spec", lambda name: None)
    code, text = printed(capsys, run_file, "--picture", "plan.png")

    assert code == 2
    assert "name a file that ends in .html" in text
    assert asked == []


# ---------------------------------------------------------------------- light

SHAPES = (
    "HuggingFaceTB/SmolLM2-135M",
    "Qwen/Qwen3-0.6B",
    "meta-llama/Llama-3.2-1B",
    "google/gemma-2-2b",
    "mistralai/Mistral-7B-v0.3",
    "microsoft/phi-4",
    "Qwen/Qwen2.5-32B",
    "meta-llama/Llama-3.1-70B",
)
HEAVY = {"torch", "transformers", "numpy", "peft", "datasets", "accelerate", "bitsandbytes", "matplotlib"}


def test_public_models_are_planned_without_network_and_without_torch(run_file, tmp_path):
    """All in one fresh interpreter; what costs time is what is imported."""
    program = (
        "import json, socket, sys, tunesmith.cli.main as m\n"
        "def refuse(*_): raise AssertionError('the network is asked')\n"
        "socket.create_connection = socket.socket.connect = refuse\n"
        "def plan(name):\n"
        "    try: m.run(['plan', sys.argv[1], f'model.name={name}', '--gpu', 'H100-80GB', '--json'])\n"
        "    except SystemExit as end: return end.code\n"
        "codes = [plan(name) for name in sys.argv[2:]]\n"
        "print(json.dumps([codes, *{name.partition('.')[0] for name in sys.modules}]), file=sys.stderr)"
    )
    environment = {"PATH": "", "HF_HOME": str(tmp_path / "empty"), "HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", program, str(run_file), *SHAPES],
        capture_output=True, text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip
    codes, *modules = json.loads(run.stderr.splitlines()[-1])
    plans = [json.loads("{" + text) for text in ("\n" + run.stdout).split("\n{")[1:]]

    assert codes == [0] * len(SHAPES), run.stderr
    assert set(modules) & HEAVY == set()
    assert [plan["model"]["name"] for plan in plans] == list(SHAPES)
    assert {plan["model"]["config_from"] for plan in plans} == {"the table of public models"}
    sizes = [plan["model"]["parameters"] for plan in plans]
    assert sizes == sorted(sizes)
