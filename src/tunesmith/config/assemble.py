"""The only place that builds the graph of objects: from settings to a `Run` that is ready to train."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.config.cadence import count_steps, make_cadence
from tunesmith.config.check_card import check_card
from tunesmith.config.fall_back import replanner_of
from tunesmith.config.fit_run import Planned, place_embedding, planned_here
from tunesmith.config.make_model import NewTokens, make_model, position_warnings
from tunesmith.config.prepare_data import PreparedData, Progress, prepare_data
from tunesmith.config.samples import make_sampler
from tunesmith.contracts.errors import UserError
from tunesmith.data.remote import Tell
from tunesmith.data.stream import StreamFeed
from tunesmith.data.table import TokenTable
from tunesmith.distributed.single import SingleDevice
from tunesmith.models.attention import choose_attention, packed_attention
from tunesmith.models.device_memory import room_of
from tunesmith.models.head import CausalModel
from tunesmith.models.head_check import check_head, check_packing
from tunesmith.models.install import Installed, install
from tunesmith.models.loader import choose_device, choose_dtype, load_tokenizer
from tunesmith.models.neftune import noisy_embeddings
from tunesmith.models.policy import POLICIES
from tunesmith.models.probe import fixed_bytes, policy_costs
from tunesmith.models.vocabulary import extend_tokenizer
from tunesmith.objectives.table import OBJECTIVES
from tunesmith.planning.fit import STATE_BYTES, STOCK_POLICIES, USABLE, Fit, fit_micro_batch
from tunesmith.planning.graphs import graphs_pay, graphs_refusal
from tunesmith.planning.host import free_host_memory
from tunesmith.settings.model import AdapterSettings
from tunesmith.settings.run import RunSettings
from tunesmith.training.allocator import grow_segments
from tunesmith.training.cadence import Cadence, MicroBatching
from tunesmith.training.checkpoint import CheckpointStore
from tunesmith.training.groups import Pattern
from tunesmith.training.noise_scale import Gauges
from tunesmith.training.optim import Schedule, build_optimizer, check_installed
from tunesmith.training.step import ObjectiveLoss
from tunesmith.training.trainer import Trainer, exact_cuda_algorithms


@dataclass(frozen=True)
class Run:
    """Everything of a run, built and not yet started.

    Attributes:
        causal: the model as backbone and head.
        attention: the row of `models.attention.ATTENTION` in use.
        fit: what a micro-batch holds, and what is kept of it until backward.
        installed: which decoder layers run the hand-written computation; None on a CPU, where it is not faster.
        planned: the plan that it follows; None where a token was measured instead.
        no_graphs: why no CUDA graphs are recorded, or None where they are.
        warnings: kernels that failed their check on this card, and rows longer than the model was made for.
    """

    settings: RunSettings
    tokenizer: Any
    data: PreparedData
    causal: CausalModel
    attention: str
    backend: SingleDevice
    fit: Fit
    installed: Installed | None
    no_graphs: str | None
    warnings: tuple[str, ...]
    trainer: Trainer
    store: CheckpointStore
    planned: Planned | None = None

    @contextmanager
    def packed(self) -> Iterator[None]:
        """The context of training: the model attends over packed rows, and has noise on its embeddings if asked."""
        with (
            packed_attention(self.causal.base, self.attention),
            noisy_embeddings(self.causal.backbone, self.settings.train.neftune_alpha),
        ):
            yield


def _free_bytes(device: torch.device) -> int:
    """Memory for further tensors."""
    return room_of(device).free if device.type == "cuda" else free_host_memory()


def _fit(
    settings: RunSettings,
    causal: CausalModel,
    backend: SingleDevice,
    data: PreparedData,
    installed: Installed | None,
) -> Fit:
    """Measure what a token takes, choose what is kept of it, and make the layers do so: where nothing is planned."""
    whole_rows = settings.train.packing or settings.data.streaming
    longest = settings.train.sequence_length if whole_rows else int(data.corpus.lengths.max())
    fit = fit_micro_batch(
        policy=settings.memory.policy,
        costs=policy_costs(causal, backend.autocast(), installed),
        device=backend.device.type,
        free_bytes=_free_bytes(backend.device) - fixed_bytes(causal, settings.train.optimizer, installed),
        free_host_bytes=free_host_memory(),
        row_tokens=longest,
    )
    if not POLICIES[fit.policy].keep:  # also for stock layers, of which a fused model may have some
        causal.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if installed is not None:
        installed.set_policy(fit.policy)
    return fit


def _check_policy(settings: RunSettings, device: torch.device, installed: Installed | None) -> None:
    """Refuse a policy that only fused layers have where none can be or is fused.

    Raises:
        UserError: with what is in the way.
    """
    policy = settings.memory.policy
    if policy in ("auto", *STOCK_POLICIES):
        return
    if device.type != "cuda":
        raise UserError(
            f"memory.policy: {policy} needs fused layers on a GPU, and this run is on a CPU.",
            hint="Use auto, keep or recompute.",
        )
    if installed is not None and not installed.fused:
        reason = installed.stock[0][1] if installed.stock else "it has no decoder layers"
        raise UserError(
            f"memory.policy: {policy} needs fused layers, and none of this model is fused: {reason}.",
            hint="Use auto, keep or recompute.",
        )


def _record(
    settings: RunSettings, backend: SingleDevice, installed: Installed | None, fit: Fit
) -> str | None:
    """Have the backend record CUDA graphs where they are wanted and possible; returns why not.

    Raises:
        UserError: they are asked for and not possible.
    """
    train, wanted = settings.train, settings.train.cuda_graphs
    reason = graphs_refusal(
        wanted,
        gpu=backend.device.type == "cuda" and installed is not None,
        loss_scale=backend.scaler.is_enabled(),
        neftune=train.neftune_alpha is not None,
        deterministic=train.deterministic,
    )
    if reason is None:
        assert installed is not None, "there is a GPU"
        reason = installed.recordable()
    if wanted == "always" and reason is not None:
        raise UserError(f"train.cuda_graphs: always is not possible here: {reason}.", hint="Set it to auto.")
    if reason is None and wanted == "auto":
        assert installed is not None
        full, parameters = settings.adapter.kind == "none", installed.layer_parameters()
        if not graphs_pay(tokens=fit.tokens, layer_parameters=parameters, full=full):
            reason = "the model keeps the GPU busy without"
        elif 2 * (fit.bytes_per_token * fit.tokens + _gradient_bytes(installed)) > USABLE * (
            _free_bytes(backend.device) - fit.unpacked
        ):
            reason = "activations and gradients would have to fit twice, in the graphs and beside them"
    backend.use_graphs = reason is None
    return reason


def _gradient_bytes(installed: Installed) -> int:
    return sum(p.nbytes for p in installed.model.parameters() if p.requires_grad)


_FIXED = {
    "model": ("name", "revision", "quantize", "dtype", "freeze"),
    "adapter": ("kind", "rank", "alpha", "dropout", "targets", "path"),
    "objective": ("kind",),
    "train": ("sequence_length", "packing", "global_batch", "optimizer", "weight_decay", "betas", "seed"),
}
"""Settings that a run keeps from its first step to its last; the others may change when it goes on."""

_FIXED_WHERE_SET = tuple(name for name in AdapterSettings.model_fields if name not in _FIXED["adapter"])
"""The same for those of the adapter that came later: runs that do not use them go on with any version."""


def _identity(settings: RunSettings, data: PreparedData, causal: CausalModel) -> dict[str, Any]:
    """What must stay the same when a run goes on, or its place in the data would mean something else."""
    digest = hashlib.sha256(data.fingerprint.encode())
    digest.update(data.train_N.tobytes())
    digest.update(repr(data.corpus.weights).encode())
    plain = settings.model_dump(mode="json")
    fixed = {f"{section}.{name}": plain[section][name] for section, names in _FIXED.items() for name in names}
    defaults = AdapterSettings().model_dump(mode="json")
    fixed |= {
        f"adapter.{name}": plain["adapter"][name]
        for name in _FIXED_WHERE_SET
        if plain["adapter"][name] != defaults[name]
    }
    if any(p.requires_grad and p.dtype == torch.bfloat16 for p in causal.model.parameters()):
        fixed["type of the trained weights"] = "bfloat16"  # `auto` may choose another on another card
    if settings.model.rope_scaling is not None:
        fixed["model.rope_scaling"] = plain["model"]["rope_scaling"]
    if settings.train.groups:
        fixed["train.groups"] = plain["train"]["groups"]
    if settings.data.mix.strategy != "concatenate":
        fixed["data.mix"] = plain["data"]["mix"]
    if settings.data.streaming:
        fixed["data.buffer_tokens"] = settings.data.buffer_tokens
    commit = getattr(causal.base.config, "_commit_hash", None)
    return fixed | {"data": digest.hexdigest(), "model commit": commit}


def _check_space(
    settings: RunSettings, store: CheckpointStore, causal: CausalModel, cadence: Cadence
) -> None:
    """Foresee a full disk: parameters and optimizer in each checkpoint, those that are kept and one in the making."""
    state = STATE_BYTES[settings.train.optimizer]
    trained = sum(int(p.nbytes + state * p.numel()) for p in causal.model.parameters() if p.requires_grad)
    most = settings.output.keep + 2
    saves = 1 + (cadence.total_steps // cadence.save_every if cadence.save_every else 0)
    if cadence.save_seconds is not None or cadence.save_best:  # nobody knows how many
        saves = most
    to_come = min(saves, most) - len(store.all())
    store.ensure_space(trained * max(1, to_come))


def _check_vocabulary(tokenizer: Any, data: PreparedData, causal: CausalModel) -> None:
    """A tokenizer with more tokens than the model is common, and harmless until the data uses one of them.

    Raises:
        UserError: it does; a stream says so when it gets there.
    """
    rows = causal.base.get_input_embeddings().weight.shape[0]
    if isinstance(data.feed, StreamFeed):
        data.feed.vocabulary = rows
    if all(table.largest < rows for table in data.corpus.sources if isinstance(table, TokenTable)):
        return
    for document in range(len(data.corpus)):
        source, index = data.corpus.locate(document)
        largest = int(source.ids(index).max())
        if largest >= rows:
            token = tokenizer.convert_ids_to_tokens(largest)
            named = f" ({token!r})" if token is not None else ""
            raise UserError(
                f"model.name: the tokenizer makes token {largest}{named} "
                f"of {data.corpus.where(document)}, and the model has embeddings for {rows} tokens only.",
                hint="Use the tokenizer that belongs to the model, or resize its embeddings and save it first.",
            )


def _gauges(settings: RunSettings) -> Gauges:
    every = settings.train.noise_scale
    return Gauges(noise_every=int(every) or None, layers_every=settings.train.layer_grad_norms)


def _schedule(settings: RunSettings, total_steps: int) -> Schedule:
    train = settings.train
    return Schedule(
        train.scheduler, learning_rate=train.learning_rate, warmup=train.warmup, total_steps=total_steps
    )


def _model_and_backend(
    settings: RunSettings, device: torch.device, tokens: NewTokens, tell: Tell | None
) -> tuple[CausalModel, SingleDevice]:
    train = settings.train
    dtype = choose_dtype(settings.model.dtype, device)
    model = make_model(settings, device, dtype, tokens, tell)
    causal = CausalModel(model, dtype)
    optimizer = build_optimizer(
        train.optimizer,
        model,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        betas=train.betas,
        loraplus_lr_ratio=settings.adapter.loraplus_lr_ratio,
        embedding_learning_rate=settings.adapter.embedding_learning_rate,
        patterns=[Pattern(group.match, group.learning_rate, group.weight_decay) for group in train.groups],
    )
    backend = SingleDevice(model, optimizer, device, dtype)
    with backend.autocast():
        check_head(causal)
    return causal, backend


def _fuse(causal: CausalModel, device: torch.device) -> tuple[Installed | None, tuple[str, ...]]:
    """On a GPU give the decoder layers their hand-written computation, once its kernels are checked on this card."""
    if device.type != "cuda":
        return None, ()
    installed = install(causal.model)
    return installed, check_card(causal.model, installed, causal.compute_dtype)


def assemble(
    settings: RunSettings, run_dir: Path, progress: Progress | None = None, tell: Tell | None = None
) -> Run:
    """Build everything, cheapest checks first; nothing is trained and no checkpoint is loaded.

    Args:
        progress: called with a source's name and the number of its rows that are prepared.
        tell: gets lines about downloads from addresses and about the loading of weights.

    Raises:
        UserError: anything that the user can mend: data, model, disk, device.
    """
    train = settings.train
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        exact_cuda_algorithms()
    check_installed(train.optimizer)
    device = choose_device()
    if device.type == "cuda":
        grow_segments()
    _check_policy(settings, device, None)
    attention = choose_attention(settings.model.attention, device, choose_dtype(settings.model.dtype, device))
    torch.manual_seed(train.seed)
    tokenizer = load_tokenizer(
        settings.model.name,
        revision=settings.model.revision,
        trust_remote_code=settings.model.trust_remote_code,
    )
    tokens = NewTokens(tokenizer, extend_tokenizer(tokenizer, settings.adapter.new_tokens))
    data = prepare_data(settings, tokenizer, progress, tell)
    total_steps = count_steps(settings, data)
    cadence = make_cadence(settings, data, total_steps)
    causal, backend = _model_and_backend(settings, device, tokens, tell)
    _check_vocabulary(tokenizer, data, causal)
    installed, warnings = _fuse(causal, device)
    warnings = (*warnings, *position_warnings(settings, causal.base.config))
    _check_policy(settings, device, installed)
    store = CheckpointStore(run_dir / "checkpoints", keep=settings.output.keep)
    _check_space(settings, store, causal, cadence)
    with packed_attention(causal.base, attention):
        with backend.autocast():
            check_packing(causal)
        planned = planned_here(settings, causal, data, installed)
        if planned is None:
            place_embedding(settings, causal, installed)
        fit = planned.fit() if planned is not None else _fit(settings, causal, backend, data, installed)
        no_graphs = _record(settings, backend, installed, fit)
    trainer = Trainer(
        backend=backend,
        loss=ObjectiveLoss(causal, OBJECTIVES[settings.objective.kind]),
        feed=data.feed,
        corpus=data.corpus,
        held_out_N=data.held_out_N,
        grouping=MicroBatching(train.micro_batch if isinstance(train.micro_batch, int) else None, fit.tokens),
        schedule=_schedule(settings, total_steps),
        cadence=cadence,
        store=store,
        identity=_identity(settings, data, causal),
        run_dir=run_dir,
        gauges=_gauges(settings),
        replanner=replanner_of(settings, causal, backend, planned, fit.policy),
        forecast=planned.forecast() if planned is not None and no_graphs is not None else None,
        sampler=make_sampler(settings, data, tokenizer, causal, backend, installed),
    )
    warnings = (*warnings, *(planned.warnings() if planned is not None else ()))
    return Run(
        settings, tokenizer, data, causal, attention, backend, fit, installed, no_graphs, warnings, trainer, store,
        planned,
    )  # fmt: skip
