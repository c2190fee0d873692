"""Loss parity: the same training with fused layers, with stock transformers and PEFT, and in float32.

    python benchmarks/loss_parity.py --model MODEL --data gsm8k/train.jsonl --steps 200 --out runs/parity
    python benchmarks/loss_parity.py --plot-only runs/parity

Three runs see the same rows in the same order, and start from the same weights and the same adapter:

- `fused`: what `tunesmith train` runs: rows without padding, hand-written layers, chunked head, its own step.
- `stock`: right-padded rows through transformers' layers, PEFT's adapter and transformers' loss under autocast,
  torch's clipping and AdamW. Nothing of this project computes in it.
- `float32`: the stock run in float32 with attention as plain products, from the same weights as the other two, that
  is rounded to the compute type first: what differs from it is rounding of the computation and nothing else.

Two runs in bfloat16 never agree to the last digit. They are equally good where both stay equally close to float32,
so that is what is measured, step by step and on held-out rows. `OUT/losses.json` holds everything; the figure is
drawn from it, also on another machine.

Shape suffixes: R rows, T tokens of the longest row.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":  # as a script: the root of the project instead of this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.parity_report import compare, draw, report

RANK, ALPHA = 16, 32.0
HELD_OUT_ROWS_AT_ONCE = 16

Losses = dict[str, Any]
"""`losses` and `grad_norms` of each step, `held_out` as [before, after], `seconds` of all steps."""


# ---------------------------------------------------------------------- the run that all three repeat


def run_settings(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    """The run file of the fused run; the stock runs take their numbers from it."""
    return {
        "model": {"name": model, "dtype": arguments.dtype},
        "adapter": {"kind": "lora", "rank": RANK, "alpha": ALPHA, "dropout": 0.0, "targets": "all-linear"},
        "data": {
            "train": [{"path": arguments.data}],
            "eval": {"fraction": 0.5, "max_rows": arguments.held_out},
        },
        "train": {
            "sequence_length": 1024,
            "packing": False,
            "global_batch": arguments.rows,
            "steps": arguments.steps,
            "learning_rate": arguments.learning_rate,
            "warmup": 0.05,
            "scheduler": "cosine",
            "max_grad_norm": 1.0,
            "seed": arguments.seed,
        },
        "output": {"save_every": None, "eval_every": arguments.steps},
    }


def rows_of_steps(trainer: Any, steps: int) -> list[list[int]]:
    """The documents of every step, over as many epochs as it takes."""
    from tunesmith.data.feed import Position

    return [[d for row in step.rows for d in row] for step in islice(trainer.feed.steps(Position()), steps)]


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def copied(model: Any) -> dict[str, Tensor]:
    """Their values, on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in trained(model).items()}


@torch.no_grad()
def load_adapter(model: Any, values: Mapping[str, Tensor]) -> None:
    """Write the values of another model's adapter into this one's."""
    parameters = trained(model)
    assert parameters.keys() == values.keys(), "adapters of the same model have the same names"
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def say(name: str, step: int, loss: float) -> None:
    """A line of progress, at the first step and every twentieth."""
    if step == 0 or (step + 1) % 20 == 0:
        print(f"{name:8} step {step + 1:4} loss {loss:.4f}", flush=True)


# ---------------------------------------------------------------------- fused


class Watcher:
    """Observer of the fused run: keeps its losses, and says how it goes."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.held_out: list[float] = []

    def on_event(self, event: Any) -> None:
        """Keep a step or a measurement."""
        if event.kind == "step":
            say("fused", len(self.steps), event.loss)
            self.steps.append(event)
        elif event.kind == "eval":
            self.held_out.append(event.loss)

    def losses(self) -> Losses:
        """What the run has shown."""
        return {
            "losses": [event.loss for event in self.steps],
            "grad_norms": [event.grad_norm for event in self.steps],
            "held_out": self.held_out,
            "seconds": round(sum(event.seconds for event in self.steps), 2),
        }


@dataclass(frozen=True)
class Fused:
    """The fused run after its end.

    Attributes:
        trainer: holds the data.
        steps: the documents of each step.
        rates: the learning rate of each step.
        losses: as of the other runs, with the layers' fallbacks and the canary's warnings.
        initial: the adapter before the first step.
        final: the adapter after the last.
    """

    trainer: Any
    steps: list[list[int]]
    rates: list[float]
    losses: Losses
    initial: dict[str, Tensor]
    final: dict[str, Tensor]


def train_fused(settings: Mapping[str, Any], folder: Path) -> Fused:
    """Assemble a run as `tunesmith train` does, and let its own loop train."""
    from tunesmith.config.assemble import assemble
    from tunesmith.config.load import load_settings
    from tunesmith.models.install import install

    run = assemble(load_settings(settings), folder)
    model, trainer, count = run.causal.model, run.trainer, settings["train"]["steps"]
    installed = run.installed or install(model)  # on a CPU `assemble` leaves the layers stock
    for warning in run.warnings:
        print("warning:", warning)
    assert installed.fused, f"no layer is fused: {installed.table()}"
    assert not installed.stock, f"layers that are not fused: {installed.table()}"
    steps, initial, watcher = rows_of_steps(trainer, count), copied(model), Watcher()
    trainer.observers.append(watcher)
    with run.packed():
        trainer.train()
    more = {"fallbacks": dict(installed.fallbacks), "warnings": list(run.warnings)}
    rates = [trainer.schedule.at(step) for step in range(count)]
    return Fused(trainer, steps, rates, watcher.losses() | more, initial, copied(model))


# ---------------------------------------------------------------------- stock


def padded(corpus: Any, documents: Sequence[int], device: torch.device) -> tuple[dict[str, Tensor], int]:
    """Right-padded rows as transformers takes them, and how many tokens they supervise.

    Returns:
        `input_ids`, `attention_mask` and `labels`, int64 `[R, T]`; labels are -100 where nothing trains, and not
        shifted, because transformers' loss does that.
    """
    located = [corpus.locate(document) for document in documents]
    rows = [torch.as_tensor(source.ids(index).astype("int64")) for source, index in located]
    masks = [torch.as_tensor(source.trained(index).copy()) for source, index in located]
    shape = len(rows), max(row.numel() for row in rows)
    ids_RT, mask_RT = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels_RT = torch.full(shape, -100)
    for number, (row, train) in enumerate(zip(rows, masks, strict=True)):
        ids_RT[number, : row.numel()] = row
        mask_RT[number, : row.numel()] = 1
        labels_RT[number, : row.numel()] = torch.where(train, row, -100)
    supervised = int((labels_RT[:, 1:] != -100).sum())
    inputs = {"input_ids": ids_RT, "attention_mask": mask_RT, "labels": labels_RT}
    return {name: tensor.to(device) for name, tensor in inputs.items()}, supervised


class Stock:
    """A model of transformers with PEFT's adapter, and the arithmetic that it trains in.

    Args:
        compute: type of the run.
        exact: compute in float32, from weights rounded to `compute`.
    """

    def __init__(self, name: str, *, device: torch.device, compute: torch.dtype, exact: bool) -> None:
        from tunesmith.models.adapter import add_lora
        from tunesmith.models.loader import load_model

        model = load_model(name, device=device, dtype=compute)
        model = model.float() if exact else model
        self.model = add_lora(model, rank=RANK, alpha=ALPHA, dropout=0.0, targets="all-linear", seed=0)
        self.device = device
        self._half = None if exact or compute == torch.float32 else compute
        self._exact = exact

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Autocast as transformers' own trainer uses it, or plain float32 products."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        stack = ExitStack()
        if self._half is not None:
            stack.enter_context(torch.autocast(self.device.type, dtype=self._half))
        if self._exact:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return stack

    @torch.no_grad()
    def held_out(self, corpus: Any, documents: Sequence[int]) -> float:
        """Mean loss in nats per supervised token of the held-out documents."""
        self.model.eval()
        summed, count = 0.0, 0
        for start in range(0, len(documents), HELD_OUT_ROWS_AT_ONCE):
            inputs, supervised = padded(corpus, documents[start : start + HELD_OUT_ROWS_AT_ONCE], self.device)
            with self.arithmetic():
                summed += float(self.model(**inputs, use_cache=False).loss) * supervised
            count += supervised
        return summed / count

    def train(
        self, name: str, trainer: Any, steps: Sequence[Sequence[int]], rates: Sequence[float], max_norm: float
    ) -> Losses:
        """The plain loop: forward with labels, backward, clip, AdamW."""
        held_out = [int(document) for document in trainer.held_out_N]
        before = self.held_out(trainer.corpus, held_out)
        parameters = list(trained(self.model).values())
        optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.999), weight_decay=0.0)
        losses, norms = [], []
        self.model.train()
        started = time.perf_counter()
        for step, documents in enumerate(steps):
            inputs, supervised = padded(trainer.corpus, documents, self.device)
            with self.arithmetic():
                loss = self.model(**inputs, use_cache=False, num_items_in_batch=supervised).loss
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, max_norm)))
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            say(name, step, losses[-1])
        seconds = time.perf_counter() - started
        after = self.held_out(trainer.corpus, held_out)
        found: Losses = {"losses": losses, "grad_norms": norms, "held_out": [before, after]}
        return found | {"seconds": round(seconds, 2)}


# ---------------------------------------------------------------------- the three runs


def environment(device: torch.device) -> dict[str, Any]:
    """Where the figures come from."""
    from tunesmith.config.run_dir import versions
    from tunesmith.kernels.launch import TRITON_VERSION

    return {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions() | {"triton": TRITON_VERSION},
    }


def measure(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    """Train all three and return what `losses.json` holds."""
    from tunesmith.models.loader import choose_device, choose_dtype

    torch.set_float32_matmul_precision("highest")
    device = choose_device()
    compute = choose_dtype(arguments.dtype, device)
    assert compute != torch.float16, "a stock loop without a loss scale does not train in float16"
    settings = run_settings(arguments, model)
    max_norm = settings["train"]["max_grad_norm"]
    with TemporaryDirectory(prefix="loss-parity-") as folder:  # for the checkpoint at its end
        fused = train_fused(settings, Path(folder))
    trainer, finals = fused.trainer, {"fused": fused.final}
    runs: dict[str, Losses] = {"fused": fused.losses}
    for name, exact in (("stock", False), ("float32", True)):
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        stock = Stock(model, device=device, compute=compute, exact=exact)
        load_adapter(stock.model, fused.initial)
        runs[name] = stock.train(name, trainer, fused.steps, fused.rates, max_norm)
        finals[name] = copied(stock.model)
    held_out = [int(document) for document in trainer.held_out_N]
    for name, final in finals.items():  # the last model is the one in float32
        load_adapter(stock.model, final)
        runs[name]["held_out_float32"] = stock.held_out(trainer.corpus, held_out)
    settings["model"]["name"] = Path(model).name
    settings["data"]["train"][0]["path"] = "/".join(Path(arguments.data).parts[-2:])
    return {
        **environment(device),
        "compute_dtype": str(compute).removeprefix("torch."),
        "settings": settings,
        "held_out_rows": len(held_out),
        "tokens": int(trainer.corpus.lengths[[d for step in fused.steps for d in step]].sum()),
        "runs": runs,
        "comparison": compare(runs),
    }


# ---------------------------------------------------------------------- the command


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or hub id; by default the demo's model from the cache")
    parser.add_argument("--gguf", type=Path, help="a GGUF file instead, converted into the cache once")
    parser.add_argument("--data", default="examples/data/gsm8k.jsonl")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--held-out", type=int, default=64, help="rows that measure and do not train")
    parser.add_argument("--learning-rate", type=float, default=1.0e-3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/parity"))
    parser.add_argument(
        "--plot-only", type=Path, metavar="DIR", help="draw DIR/losses.json and do nothing else"
    )
    parser.add_argument(
        "--figure", type=Path, help="file of the picture; by default loss-parity.png beside it"
    )
    return parser.parse_args(words)


def model_of(arguments: argparse.Namespace) -> str:
    """The folder or hub id to load."""
    from tunesmith.data.cache import cache_folder
    from tunesmith.models.gguf import convert_gguf

    if arguments.gguf is not None:
        return str(convert_gguf(arguments.gguf.resolve(), cache_folder("models") / arguments.gguf.stem))
    return arguments.model or str(cache_folder("models") / "SmolLM2-135M-Instruct")


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write, draw where matplotlib is installed."""
    arguments = parse(words)
    folder = arguments.plot_only or arguments.out
    file = folder / "losses.json"
    if arguments.plot_only is None:
        folder.mkdir(parents=True, exist_ok=True)
        record = measure(arguments, model_of(arguments))
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print("\n".join(report(record)), f"\n{file}", flush=True)
    try:
        path = arguments.figure or folder / "loss-parity.png"
        draw(json.loads(file.read_text(encoding="utf-8")), path)
    except ImportError:
        print(f"no picture: matplotlib is not installed here; --plot-only {folder} draws it elsewhere")
    else:
        print(path)


if __name__ == "__main__":
    sys.path.pop(
        0
    )  # this folder: its `kernels` would stand before the package of that name, which libraries try
    main()
