"""Steps laid out by the planner, each beside what it foresees: the fastest within a budget, or one policy throughout.

    python benchmarks/plans.py --budgets 0.92 8 12 16 24 32 48 64 76     tokens/s by memory, in GiB or a share
    python benchmarks/plans.py --policies keep_all keep recompute        picked by hand
    python benchmarks/plans.py --shape 70b --layers 4 8 --batch 1x4096 --policies offload_attention \\
        --embedding host --optimizer adamw_8bit
    python benchmarks/plans.py --batch 1x500000 --budgets 0.97 --host-gib 112 --steps 1 --warm 0
    python benchmarks/plans.py --table --account 80 --picture curve.png  what all that came to

The model has random weights of a published shape. One model serves all layouts of a depth, one after the other; a
row of results is written as soon as it is there, so that a sitting that is cut off leaves what it measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script: the root of the project instead of this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import plan_report
from benchmarks.batches import documents
from benchmarks.peers.processes import find_card
from benchmarks.peers.tables import OPTIMIZERS
from benchmarks.planned import GIB, card_name, facts_of, foreseen, plan_step, work_of
from benchmarks.shapes import SHAPES, batch_size
from tunesmith.planning.plan import Plan
from tunesmith.training.allocator import grow_segments

BATCHES = 4
"""Different batches, taken in turn."""


def asked(arguments: argparse.Namespace) -> list[tuple[str, str, float]]:
    """(name, policy, budget) of every layout that is wanted; one that is picked by hand may use the whole card."""
    budgets = [(text, "auto", float(text)) for text in arguments.budgets]
    within = [(f"within {text}", policy, size if size <= 1 else size * GIB) for text, policy, size in budgets]
    return within + [(policy, policy, 1.0) for policy in arguments.policies]


def host_bytes_of(arguments: argparse.Namespace) -> int:
    """Memory of the host that layouts may pin: what is said, or the share that runs take of what is free."""
    if arguments.host_gib is not None:
        return int(arguments.host_gib * GIB)
    from tunesmith.planning.fit import pinnable
    from tunesmith.planning.host import free_host_memory

    return pinnable(free_host_memory())


def plans_of(arguments: argparse.Namespace, layers: int, card: str) -> list[tuple[str, Plan]]:
    """The layouts for a depth of the model, by name; those that are alike once, under the first name."""
    from benchmarks.batches import random_documents

    config = SHAPES[arguments.shape] | {"num_hidden_layers": layers}
    lengths = documents(*arguments.batch, arguments.mean)
    supervised = random_documents(lengths, arguments.supervised, 0).supervised
    work = work_of(arguments.adapter, lengths, supervised, optimizer=arguments.optimizer)
    facts, host = facts_of(config), host_bytes_of(arguments)
    found: dict[tuple[str, tuple[str, ...]], tuple[str, Plan]] = {}
    for name, policy, budget in asked(arguments):
        plan = plan_step(
            facts,
            work,
            card=card,
            budget=budget,
            policy=policy,
            embedding=arguments.embedding,
            host_bytes=host,
        )
        found.setdefault((plan.embedding, plan.policies), (name, plan))
    return list(found.values())


def measured(
    arguments: argparse.Namespace, model: Any, plans: list[tuple[str, Plan]]
) -> Iterator[dict[str, Any]]:
    """A row of results for each layout, on one model."""
    from benchmarks.batches import random_batch
    from benchmarks.loop import release
    from benchmarks.shapes import device_and_dtype

    lengths = documents(*arguments.batch, arguments.mean)
    batches = [random_batch(lengths, arguments.supervised, seed) for seed in range(BATCHES)]
    for name, plan in plans:
        yield {"asked": name, **foreseen(plan), **_outcome(arguments, model, plan, batches)}
        model.zero_grad(set_to_none=True)
        release(device_and_dtype()[0])


def _outcome(arguments: argparse.Namespace, model: Any, plan: Plan, batches: list[Any]) -> dict[str, Any]:
    """What one layout takes; the model is as it was when this returns, but for what it learned."""
    import torch

    from benchmarks.loop import time_steps
    from benchmarks.peers.with_tunesmith import report, training_step
    from benchmarks.shapes import device_and_dtype

    (device, dtype), tokens = device_and_dtype(), batches[0].tokens
    with training_step(
        model,
        plan.policies,
        device,
        dtype,
        tokens=tokens,
        adapter=arguments.adapter,
        embedding=plan.embedding,
        optimizer_name=arguments.optimizer,
    ) as (
        step,
        installed,
    ):
        assert installed is not None
        try:
            timing = time_steps(
                lambda number: step(batches[number % BATCHES]),
                steps=arguments.steps,
                warm=arguments.warm,
                device=device,
            )
            return {"status": "ok", **timing.row(tokens), **report(installed)}
        except torch.OutOfMemoryError as error:
            return {"status": "oom", "reason": str(error).partition("\n")[0][:200]}
        finally:
            installed.undo()


def measure(arguments: argparse.Namespace) -> None:
    """Build each model, run its layouts, write and print a row for each."""
    from benchmarks.shapes import random_model

    grow_segments()
    card = find_card()
    for layers in arguments.layers or [SHAPES[arguments.shape]["num_hidden_layers"]]:
        plans = plans_of(arguments, layers, card_name(card.name))
        for name, plan in plans:
            print(f"{layers} layers, {name}: {json.dumps(foreseen(plan))}", flush=True)
        if arguments.foresee:
            continue
        model = random_model(arguments.shape, arguments.adapter, layers=layers)
        for row in measured(arguments, model, plans):
            record = {
                "shape": arguments.shape,
                "layers": layers,
                "adapter": arguments.adapter,
                "rows": arguments.batch[0],
                "length": arguments.batch[1],
                "mean": arguments.mean,
                "supervised": arguments.supervised,
                "optimizer": arguments.optimizer or OPTIMIZERS[arguments.adapter][0],
                **row,
                "card": card.name,
                "driver": card.driver,
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            }
            print("RESULT", json.dumps(record), flush=True)
            plan_report.append(arguments.out, record)
        del model


def main(words: list[str] | None = None) -> None:
    """Measure what the command line names, or report what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="8b", choices=tuple(SHAPES), metavar="SHAPE")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="depths of the model; without it the shape's own"
    )
    parser.add_argument("--adapter", choices=("lora", "qlora", "full"), default="qlora")
    parser.add_argument("--batch", type=batch_size, default=(2, 4096), help="rows x length, such as 2x4096")
    parser.add_argument("--mean", type=int, help="pack documents of this mean length instead of equal rows")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of positions that train")
    parser.add_argument("--budgets", nargs="*", default=[], help="GiB, or shares of the card (at most 1)")
    parser.add_argument("--policies", nargs="*", default=[], help="rows of POLICIES, each for all layers")
    parser.add_argument("--host-gib", type=float, help="memory of the host that may be pinned")
    parser.add_argument("--embedding", choices=("auto", "device", "host"), default="auto")
    parser.add_argument("--optimizer", help="another one than the benchmarks' own")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--foresee", action="store_true", help="only say what the planner foresees")
    parser.add_argument("--out", type=Path, default=Path("runs/plans.jsonl"), help="rows are added to it")
    parser.add_argument("--table", action="store_true", help="what was measured, as Markdown")
    parser.add_argument("--account", type=int, metavar="LAYERS", help="peaks worked out for so many layers")
    parser.add_argument("--picture", type=Path, help="draw tokens/s over memory, of --shape; a .png")
    parser.add_argument(
        "--peers", type=Path, default=Path("runs/compare/results.jsonl"), help="of compare.py"
    )
    arguments = parser.parse_args(words)
    if arguments.table or arguments.account or arguments.picture:
        plan_report.show(arguments)
    elif arguments.budgets or arguments.policies:
        measure(arguments)
    else:
        parser.error("name --budgets or --policies")


if __name__ == "__main__":
    main()
