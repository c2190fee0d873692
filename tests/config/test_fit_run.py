"""The plan that a run follows: what the planner is asked of a loaded model, and how layers and warnings follow it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.support.runs import Recorder, build, run_settings
from tests.support.tiny import save_tiny_model, tiny_llama
from tunesmith.config import assemble, fit_run, summary
from tunesmith.config.assemble import Run
from tunesmith.config.fall_back import Measured
from tunesmith.config.fit_run import Planned, heaviest_row, plan_fit
from tunesmith.config.load import load_settings
from tunesmith.contracts.errors import ConfigError, UserError
from tunesmith.data.feed import TableFeed
from tunesmith.models import host_embedding
from tunesmith.models.adapter import add_lora
from tunesmith.models.calibrate import Calibration
from tunesmith.models.device_memory import Room
from tunesmith.models.head import CausalModel
from tunesmith.models.host_embedding import HostEmbedding
from tunesmith.models.host_memory import NoHostMemoryError
from tunesmith.models.install import Installed, install
from tunesmith.planning.cards import CARDS
from tunesmith.planning.facts import Work
from tunesmith.planning.fit import pinnable
from tunesmith.planning.read_facts import read_facts
from tunesmith.settings.quantities import share_or_bytes
from tunesmith.settings.run import RunSettings

GIB = 2**30
LAYERS = 6
CARD = CARDS["H100-80GB"]


def settings(**sections: Any) -> RunSettings:
    values: dict[str, Any] = {"model": {"name": "x"}, "data": {"train": [{"path": "a"}]}}
    values["train"] = {"sequence_length": 4096, "global_batch": 4} | sections.pop("train", {})
    return load_settings(values | sections)


def fused_model(**changes: Any) -> tuple[CausalModel, Installed]:
    lora: dict[str, Any] = {"rank": 4, "alpha": 4, "dropout": 0.0, "targets": "all-linear", "seed": 0}
    lora |= {name: changes.pop(name) for name in list(changes) if name in ("targets", "dropout", "use_dora")}
    with torch.device("cpu"):
        model = tiny_llama(num_hidden_layers=LAYERS, hidden_size=256, intermediate_size=768, **changes)
    model = add_lora(model, **lora)
    return CausalModel(model, torch.bfloat16), install(model)


@pytest.fixture(scope="module")
def fused() -> tuple[CausalModel, Installed]:
    return fused_model()


DATA: Any = SimpleNamespace(feed=None, corpus=SimpleNamespace(lengths=np.array([7, 60])))


def allocated(causal: CausalModel) -> int:
    return sum(p.nbytes for p in causal.model.parameters())


def planned(
    causal: CausalModel,
    installed: Installed,
    *,
    usable: int = 80 * GIB,
    host: int = 0,
    total: int = 80 * GIB,
    note: str = "",
    **sections: Any,
) -> Planned:
    found = plan_fit(
        settings(**sections), causal, DATA, installed, card=CARD, room=Room(total, usable, allocated(causal)),
        host_bytes=host, rates=lambda _facts, _work: Calibration(CARD.rates(), note),
    )  # fmt: skip
    assert found is not None
    return found


def tight(causal: CausalModel, installed: Installed, share: float, **sections: Any) -> Planned:
    """A plan with room for so much between the leanest and the richest layout of one row."""
    rich = planned(causal, installed, memory={"policy": "keep_all"}, train={"micro_batch": 1})
    lean = planned(causal, installed, memory={"policy": "recompute"}, train={"micro_batch": 1})
    low, high = lean.solution.peak, rich.solution.peak
    room = int(low + share * (high - low))
    return planned(causal, installed, usable=room, total=room, memory={"budget": 1.0}, **sections)


def test_the_layers_follow_the_plan(fused):
    causal, installed = fused
    found = tight(causal, installed, 0.5)
    assert found.solution.fits
    assert len(set(found.solution.policies)) > 1
    assert tuple(policy.name for policy in installed.policies) == found.solution.policies
    assert found.plan.peak_bytes <= found.budget
    fit = found.fit()
    assert fit.policy == "auto"
    assert fit.tokens == found.plan.tokens == 4096 * found.solution.rows
    assert found.forecast().peak_bytes == found.plan.peak_bytes
    assert not list(found.warnings())


def test_the_planner_is_asked_with_the_model_that_is_there():
    causal, installed = fused_model(targets=["q_proj", "down_proj"], dropout=0.1)
    found = planned(
        causal, installed, host=10 * GIB, train={"optimizer": "adamw_8bit"}, memory={"budget": "24 GiB"}
    )
    work = found.request.work
    assert (work.rank, work.adapted, work.dropout, work.quantize) == (4, ("qkv", "down"), True, "none")
    assert (work.itemsize, work.trained_itemsize, work.optimizer) == (2, 4, "adamw_8bit")
    assert found.request.rows == 4
    assert found.request.host_bytes == pinnable(10 * GIB)
    assert found.budget == 24 * GIB
    assert planned(causal, installed, train={"global_batch": "10000 tokens"}).request.rows == 3


def test_full_fine_tuning_has_no_rank():
    model = tiny_llama(num_hidden_layers=2).train()
    causal = CausalModel(model, torch.bfloat16)
    work = planned(causal, install(model)).request.work
    assert work.full
    assert work.adapted == ()


def test_what_the_facts_do_not_tell_is_measured(fused):
    """The plan stands on the bytes that are there, and on what trains in fact."""
    causal, installed = fused
    plain = planned(causal, installed, train={"micro_batch": 1}, memory={"policy": "keep"})
    taken = plain.solution.frame.fixed.weights + plain.solution.frame.fixed.adapter + plain.beside
    assert taken == allocated(causal)
    other, layers = fused_model(targets=["q_proj"])
    few = planned(other, layers, train={"micro_batch": 1}, memory={"policy": "keep"})
    trained = sum(p.numel() for p in other.model.parameters() if p.requires_grad)
    fixed = few.solution.frame.fixed
    # q alone trains where the facts know of q, k and v: gradient and moments in float32
    assert fixed.weights + fixed.adapter + few.beside + fixed.optimizer + fixed.gradients == pytest.approx(
        allocated(other) + 12 * trained, abs=8
    )


def test_what_the_user_fixed_is_held_to(fused):
    causal, installed = fused
    found = planned(causal, installed, memory={"policy": "recompute"}, train={"micro_batch": 2})
    assert found.solution.policies == ("recompute",) * LAYERS
    assert found.solution.rows == 2
    assert found.fit().policy == "recompute"
    assert found.down(2 * 4096, 4096) is None


def test_what_could_not_be_measured_of_the_card_is_said(fused):
    causal, installed = fused
    assert list(planned(causal, installed, note="Rates that cannot be.").warnings()) == [
        "Rates that cannot be."
    ]
    assert not list(planned(causal, installed).warnings())


@pytest.mark.parametrize("estimated", [True, False])
def test_a_card_is_measured_where_the_table_only_estimates(fused, monkeypatch, estimated):
    """What the measurement says reaches the run whole; a card whose steps were measured is not asked again."""
    causal, _ = fused
    asked, answer = [], Calibration(CARD.rates(), "It could not be measured.")
    monkeypatch.setattr(fit_run, "calibrate", lambda *args, **_options: asked.append(args) or answer)
    facts = read_facts(causal.base.config.to_dict(), "tiny")
    found = fit_run.rates_of(replace(CARD, estimated=estimated), causal)(facts, Work((64,), 64))
    assert found == (answer if estimated else Calibration(replace(CARD, estimated=False).rates()))
    assert len(asked) == estimated


def test_what_does_not_fit_is_tried_with_a_warning(fused):
    causal, installed = fused
    found = planned(causal, installed, usable=2**20)
    assert not found.solution.fits
    (warning,) = found.warnings()
    assert "it is tried all the same" in warning
    assert installed.policies[0].name == found.solution.policies[0]


def test_a_model_that_cannot_be_counted_is_not_planned():
    causal, installed = fused_model(use_dora=True)
    room = Room(80 * GIB, 80 * GIB, 0)
    rates: Any = lambda *_: Calibration(CARD.rates())  # noqa: E731
    assert (
        plan_fit(settings(), causal, DATA, installed, card=CARD, room=room, host_bytes=0, rates=rates) is None
    )


def test_on_a_cpu_nothing_is_planned(fused):
    causal, installed = fused
    assert fit_run.planned_here(settings(), causal, DATA, installed) is None


def test_what_others_hold_of_the_card_is_not_in_the_budget():
    alone = Room(80 * GIB, 79.5 * GIB, 0)
    assert alone.budget(0.5) == 40 * GIB, "a context of its own is in the share that is left"
    shared = Room(80 * GIB, 49 * GIB, 0)
    assert shared.budget(0.5) == 10 * GIB
    assert shared.budget(30 * GIB) == 0
    assert Room(24 * GIB, 23.5 * GIB, 0).budget(500.0 * GIB) == 23.5 * GIB


def test_memory_tells_apart_cards_that_are_called_the_same(monkeypatch):
    def of(gib: float) -> str:
        said = SimpleNamespace(
            name="NVIDIA GeForce RTX 4060 Ti", total_memory=int(gib * GIB), major=8, minor=9
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: said)
        return fit_run.card_of(torch.device("cuda", 0)).name

    assert of(7.6) == "RTX-4060-TI-8GB"
    assert of(15.6) == "RTX-4060-TI-16GB"


# ---------------------------------------------------------------- leaner layouts


def test_leaner_plans_take_ever_less_and_end(fused):
    causal, installed = fused
    found = tight(causal, installed, 6.0, train={"global_batch": 8})
    assert found.solution.rows > 2
    peaks, sizes, halved = [found.solution.peak], [found.solution.rows], []
    while (leaner := found.down(4096 * found.solution.rows, 4096)) is not None:
        peaks.append(found.solution.peak)
        sizes.append(found.solution.rows)
        halved.append(leaner.max_tokens)
        assert tuple(policy.name for policy in installed.policies) == found.solution.policies
        assert len(peaks) < 60
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)
    assert sizes[1] == sizes[0], "policies first, which change no bit"
    assert sizes[-1] == 1
    assert sizes == sorted(sizes, reverse=True)
    assert [tokens is not None for tokens in halved] == [
        a != b for a, b in zip(sizes[1:], sizes, strict=False)
    ]
    # what a step makes shrinks by LESS at least, as long as something fits
    standing = found.solution.frame.standing
    assert (peaks[1] - standing) <= (1 - fit_run.LESS) * (peaks[0] - standing) + 1


def test_tensors_on_their_way_are_let_go(fused):
    causal, installed = fused
    found, before = tight(causal, installed, 1.0), installed.offloader
    assert found.down(4096 * found.solution.rows, 4096) is not None
    assert installed.offloader is not before


def test_a_run_that_goes_on_is_planned_for_its_micro_batches(fused):
    causal, installed = fused
    found = planned(causal, installed, train={"global_batch": 8})
    rows = found.solution.rows
    assert rows > 1
    found.regroup(4096)
    assert found.solution.rows == 1
    found = planned(causal, installed, train={"global_batch": 8, "micro_batch": 2})
    found.regroup(4096)
    assert found.solution.rows == 2


def test_measured_runs_recompute_then_halve_down_to_a_row():
    said: list[str] = []
    ladder = Measured(
        "keep", fixed_policy=False, fixed_micro_batch=False, recompute=lambda: said.append("done")
    )
    assert ladder.down(1000, 300).what == "all layers recomputed in backward"
    assert said == ["done"]
    assert [ladder.down(size, 300).max_tokens for size in (1000, 500)] == [500, 300]
    assert ladder.down(300, 300) is None


# ---------------------------------------------------------------- rows, and words


def test_the_heaviest_row_is_the_one_with_most_padding():
    lengths = [100, 10, 10, 10, 60, 60]
    rows = [[0, 1, 2, 3], [4, 5]]
    feed = TableFeed.__new__(TableFeed)
    feed.epoch = lambda _number: (rows, [])  # type: ignore[method-assign]
    data: Any = SimpleNamespace(feed=feed, corpus=SimpleNamespace(lengths=np.array(lengths)))
    assert heaviest_row(settings(train={"sequence_length": 140}), data) == (100, 10, 10, 10, 10)
    assert heaviest_row(settings(train={"packing": False}), data) == (100,)
    assert heaviest_row(settings(), DATA) == (4096,)


def test_the_summary_says_what_the_run_follows(fused):
    causal, installed = fused
    plan = tight(causal, installed, 0.5).plan
    strip = summary._strip(plan)
    assert all(f"{count} × {name}" in strip for name, count in plan.strip)
    foreseen = summary._foreseen(plan)
    assert f"at most {plan.peak_bytes / GIB:.1f} of {plan.budget_bytes / GIB:.1f} GiB" in foreseen
    alike = replace(plan, policies=("keep",) * LAYERS)
    assert summary._strip(alike) == summary._KEPT["keep"]


# ---------------------------------------------------------------- a whole run


def planned_run(
    folder: Path, model_dir: Path, monkeypatch: Any, share: float, **train: Any
) -> tuple[Run, Recorder]:
    """A run as on a GPU with little room, on the CPU: layers fused, and planned with a card's memory made up."""

    def plan(found: RunSettings, causal: CausalModel, data: Any, installed: Any) -> Planned | None:
        def within(room: int, policy: str) -> Planned:
            sections = {"policy": policy, "budget": 1.0}
            memory = found.memory.model_copy(update=sections)
            return plan_fit(
                found.model_copy(update={"memory": memory}), causal, data, installed, card=CARD,
                room=Room(room, room, allocated(causal)), host_bytes=0, rates=lambda *_: Calibration(CARD.rates()),
            )  # type: ignore[return-value]  # fmt: skip

        low, high = (within(GIB, policy).solution.peak for policy in ("recompute", "keep_all"))
        return within(int(low + share * (high - low)), "auto")

    monkeypatch.setattr(assemble, "_fuse", lambda causal, _device: (install(causal.model), ()))
    monkeypatch.setattr(assemble, "planned_here", plan)
    values = run_settings(
        model_dir, folder, rows=60, adapter={"dropout": 0.2},
        train={"steps": 3, "packing": True, "global_batch": 4} | train, output={"eval_every": None},
    )  # fmt: skip
    return build(values)


def fail_at(run: Run, *calls: int) -> None:
    """The last layer runs out of memory at these calls."""
    seen = iter(range(1, 10**6))

    def hook(*_: Any) -> None:
        if next(seen) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. And so on")

    run.causal.base.model.layers[-1].register_forward_pre_hook(hook)


def train(run: Run) -> None:
    with run.packed():
        run.trainer.train()


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: Any) -> Path:
    # a small vocabulary and long layers, so that layers and not the head are what takes memory
    return save_tiny_model(tmp_path_factory.mktemp("wide"), num_hidden_layers=8, intermediate_size=512)


def test_a_run_follows_its_plan_and_a_leaner_one_gives_the_same_bits(wide_model, tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    plain, expected = planned_run(folders[0], wide_model, monkeypatch, 0.9, micro_batch=1)
    train(plain)
    run, found = planned_run(folders[1], wide_model, monkeypatch, 0.9, micro_batch=1)
    assert run.planned is not None
    before = run.planned.solution
    assert [policy.name for policy in run.installed.policies] == list(before.policies)
    fail_at(run, 3, 7)
    train(run)
    warnings = [event.message for event in found.of("warning")]
    assert len(warnings) == 2
    assert "from now on with layers " in warnings[0]
    assert run.planned.solution.peak < before.peak
    assert [policy.name for policy in run.installed.policies] == list(run.planned.solution.policies)
    steps = [[(e.loss, e.grad_norm) for e in recorder.of("step")] for recorder in (expected, found)]
    assert steps[0] == steps[1]
    there = plain.backend.trained_parameters()
    assert all(torch.equal(there[name], p) for name, p in run.backend.trained_parameters().items())


def test_a_planned_run_says_its_plan_before_it_starts(wide_model, tmp_path, monkeypatch):
    run, _ = planned_run(tmp_path, wide_model, monkeypatch, 0.5)
    page = io.StringIO()
    summary.print_plan(Console(file=page, width=300), run)
    plan = run.planned.plan
    assert all(f"{count} × {name}" in page.getvalue() for name, count in plan.strip)
    assert "foreseen: at most" in page.getvalue()
    assert run.trainer.grouping.max_tokens == plan.tokens
    assert [type(observer).__name__ for observer in run.trainer.observers] == ["Foresight", "Recorder"]


@pytest.mark.parametrize(
    ("written", "asked"),
    [(0.5, 0.5), (1, 1.0), ("24 GiB", 24.0 * GIB), ("1.5GB", 1.5e9), ("900 MiB", 900.0 * 2**20)],
)
def test_a_budget_is_a_share_or_an_amount(written, asked):
    assert share_or_bytes(settings(memory={"budget": written}).memory.budget) == asked


@pytest.mark.parametrize("written", [0, 1.5, 24, -1, "24", "half", "0 GiB", "24 gb"])
def test_another_budget_is_refused(written):
    with pytest.raises(ConfigError, match=r"memory\.budget is .*; expected .* or a size such as '24 GiB'"):
        settings(memory={"budget": written})


def test_the_embedding_follows_the_plan():
    """To the host and, with a layout that has it there, back."""
    causal, installed = fused_model(tie_word_embeddings=False)
    table = causal.base.get_input_embeddings().weight
    found = planned(causal, installed, host=GIB, memory={"embedding": "host"})
    assert found.plan.embedding == "host"
    assert installed.embedding is not None
    assert installed.embedding.bytes == table.nbytes
    assert found.plan.host_bytes >= 2 * table.numel(), "a run holds it in its compute type"
    assert "with the input embedding" in summary._foreseen(found.plan)
    back = planned(causal, installed, host=GIB, memory={"embedding": "device"})
    assert back.plan.embedding == "device"
    assert installed.embedding is None
    assert causal.base.get_input_embeddings().weight is table


def test_the_embedding_stays_where_it_trains_or_is_the_head():
    causal, installed = fused_model()
    assert tight(causal, installed, 0.2).plan.embedding == "device"
    with pytest.raises(
        UserError, match=r"memory\.embedding: host is not possible: the input embedding shares"
    ):
        planned(causal, installed, memory={"embedding": "host"})


def test_a_host_that_pins_nothing_more_keeps_the_embedding_on_the_device(monkeypatch):
    causal, installed = fused_model(tie_word_embeddings=False)

    def refuse(_table):
        raise NoHostMemoryError("cannot pin 1 GiB\nmore words")

    monkeypatch.setattr(host_embedding, "pinned_copy", refuse)
    rich = planned(causal, installed, memory={"policy": "keep_all"}, train={"micro_batch": 1})
    found = planned(
        causal, installed, host=GIB, total=rich.solution.peak // 2, usable=rich.solution.peak // 2,
        memory={"budget": 1.0},
    )  # fmt: skip
    assert found.request.embedding == "device", "it was to be moved"
    assert found.plan.embedding == "device"
    assert installed.embedding is None
    assert tuple(policy.name for policy in installed.policies) == found.solution.policies
    assert "The input embedding stays on the GPU: cannot pin 1 GiB." in found.warnings()
    with pytest.raises(UserError, match="host is not possible: cannot pin 1 GiB"):
        planned(causal, installed, host=GIB, memory={"embedding": "host"})
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), model=causal.model)
    with pytest.raises(UserError, match="host is not possible: cannot pin 1 GiB"):
        fit_run.place_embedding(settings(memory={"embedding": "host"}), on_gpu, installed)


def test_a_leaner_layout_whose_embedding_finds_no_room_on_the_host_says_so(monkeypatch):
    causal, installed = fused_model(tie_word_embeddings=False)
    found = planned(causal, installed, host=GIB, memory={"embedding": "device"})
    found.request = replace(found.request, embedding="auto")

    def refuse(_table):
        raise NoHostMemoryError("cannot pin 1 GiB")

    monkeypatch.setattr(host_embedding, "pinned_copy", refuse)
    said = []
    while (leaner := found.down(4096 * found.solution.rows, 4096)) is not None and len(said) < 20:
        said.append(leaner.what)
    (only,) = [what for what in said if "stays" in what]
    assert only.endswith(" rows. The input embedding stays on the GPU: cannot pin 1 GiB")
    assert installed.embedding is None


def on_the_way_back(monkeypatch: pytest.MonkeyPatch) -> tuple[Planned, Installed]:
    """A plan whose next layout has the embedding on the device again, which has no room for it."""
    causal, installed = fused_model(tie_word_embeddings=False)
    found = planned(causal, installed, host=GIB, train={"global_batch": 8}, memory={"embedding": "host"})
    found.request = replace(found.request, embedding="device")

    def no_room(_moved: HostEmbedding) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(HostEmbedding, "undo", no_room)
    return found, installed


def test_a_device_without_room_for_the_embedding_is_out_of_memory(monkeypatch):
    """Not taken for a host that pins nothing more."""
    found, installed = on_the_way_back(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        found.regroup(4096)
    assert installed.embedding is not None
    assert not found.stays


def test_a_leaner_layout_leaves_the_embedding_on_the_host_where_the_device_has_no_room(monkeypatch):
    found, installed = on_the_way_back(monkeypatch)
    before = found.solution
    leaner = found.down(4096 * before.rows, 4096)
    assert leaner is not None
    assert installed.embedding is not None
    assert found.plan.embedding == "host", "the plan says where it lies"
    assert found.solution.peak < before.peak
    assert tuple(policy.name for policy in installed.policies) == found.solution.policies


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error")])
def test_another_fault_of_the_move_goes_on_to_the_caller(error, monkeypatch):
    causal, installed = fused_model(tie_word_embeddings=False)

    def fail(_table):
        raise error

    monkeypatch.setattr(host_embedding, "pinned_copy", fail)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), model=causal.model)
    with pytest.raises(type(error), match=str(error)):
        planned(causal, installed, host=GIB, memory={"embedding": "host"})
    with pytest.raises(type(error), match=str(error)):
        fit_run.place_embedding(settings(memory={"embedding": "host"}), on_gpu, installed)
    assert installed.embedding is None


def test_the_embedding_is_moved_where_nothing_is_planned():
    causal, installed = fused_model(tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"memory\.embedding: host is not possible: this run is on a CPU"):
        fit_run.place_embedding(settings(memory={"embedding": "host"}), causal, installed)
    fit_run.place_embedding(settings(), causal, installed)
    assert installed.embedding is None
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), model=causal.model)
    with pytest.raises(UserError, match="layers are not fused"):
        fit_run.place_embedding(settings(memory={"embedding": "host"}), on_gpu, None)
    fit_run.place_embedding(settings(memory={"embedding": "host"}), on_gpu, installed)
    assert installed.embedding is not None
