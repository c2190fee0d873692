"""The backbone's door: padded batches go in, one packed row without padding goes through all layers.

Trainers that know nothing of packed rows call a causal model with `input_ids [B, T]` and `attention_mask [B, T]`.
The door stands where the causal model calls its backbone: it takes the padding out, tells attention where documents
begin, and spreads the final hidden states over `[B, T, D]` again, so nothing above it changes: labels, heads,
`logits_to_keep`, a trainer's own forward. Calls that are more than a forward pass over padded rows (generation with
a cache, ready-made masks, attention weights to be returned) take the stock way, and are counted with the reason.

`open_door` proves on a small padded batch that the model computes the same both ways, and otherwise leaves the door
shut. docs/adr/0009-door.md says why attention is switched where it is.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from tunesmith.contracts.errors import UserError
from tunesmith.models.attention import ATTENTION, attending, register_attention
from tunesmith.models.base_of import base_of
from tunesmith.models.door_check import prove
from tunesmith.models.override import override, stock_forward
from tunesmith.models.packed_call import layout_of, run_packed
from tunesmith.models.text_only import callers_mask, remember_masks
from tunesmith.models.unpad import NotPackableError


@dataclass
class Door:
    """What stands before a backbone.

    Attributes:
        attention: the row of `ATTENTION` by which packed rows attend.
        shut: why every call takes the stock way, or None where padded batches are packed.
        restart: whether positions are counted anew in each document; otherwise they are columns of the batch.
        packed: number of calls that were packed.
        tokens: tokens that went through in packed rows.
        padding: places of padding that did not.
        stock: how often a call took the stock way, by reason.
    """

    attention: str
    shut: str | None = None
    restart: bool = False
    packed: int = 0
    tokens: int = 0
    padding: int = 0
    stock: Counter[str] = field(default_factory=Counter)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def table(self) -> list[tuple[str, str, str]]:
        """Rows (what, how, why) for people."""
        if self.shut is not None:
            return [("padded batches", "stock", self.shut)]
        return [("padded batches", "packed", f"attention of stock layers: {self.attention}")]

    def undo(self) -> None:
        """Take the door away; the backbone is called as it was before."""
        while self._undo:
            self._undo.pop()()


def _find_backbone(model: Any) -> Any:
    """The decoder of a model, with or without a PEFT adapter and whatever head stands on it.

    Raises:
        UserError: it has none.
    """
    base = base_of(model)
    if getattr(base.config, "is_encoder_decoder", False):
        raise UserError("its decoder looks at an encoder")
    backbone = base.get_decoder() if hasattr(base, "get_decoder") else base
    if backbone is base and base.get_output_embeddings() is not None:
        inner = [child for child in base.children() if isinstance(child, PreTrainedModel)]
        if len(inner) != 1:
            raise UserError("it does not tell its backbone from its head")
        backbone = inner[0]
    return backbone


_Lock = AbstractContextManager[Any]


def _alone(lock: _Lock) -> _Lock:
    """One thread at a time: the name in the config that says how to attend is the same for all of them."""
    return nullcontext() if torch.compiler.is_compiling() else lock  # a lock cannot be compiled


def _stand_before(backbone: Any, stock: Callable[..., Any], door: Door, lock: _Lock) -> None:
    names = tuple(inspect.signature(backbone.forward).parameters)
    registered = ATTENTION[door.attention][0]

    @functools.wraps(stock)  # whoever asks for the backbone's arguments finds its own
    def enter(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("document_lengths") is not None:  # a packed row already
            with _alone(lock), attending(self.config, registered):
                return stock(self, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        given["attention_mask"] = callers_mask(given.get("attention_mask"))
        try:
            layout = layout_of(self, given)
        except NotPackableError as error:
            door.stock[str(error)] += 1
            with _alone(lock):
                return stock(self, *args, **kwargs)
        door.packed += 1
        door.tokens += layout.tokens
        door.padding += layout.shape[0] * layout.shape[1] - layout.tokens
        with _alone(lock):
            return run_packed(stock, self, given, layout, attention=registered, restart=door.restart)

    override(backbone, "forward", enter, door._undo)


def _attend_packed(module: Any, door: Door, lock: _Lock) -> None:
    """Have an attention module switch its config for the length of each call that has document boundaries.

    The door switches it as well, for the masks that the backbone builds. But a layer that is recomputed runs again
    in backward, behind the door.
    """
    stock, registered = stock_forward(module), ATTENTION[door.attention][0]

    def attend(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("document_lengths") is None:
            return stock(self, *args, **kwargs)
        with _alone(lock), attending(self.config, registered):
            return stock(self, *args, **kwargs)

    override(module, "forward", attend, door._undo)


def open_door(model: Any, *, attention: str) -> Door:
    """Pack padded batches at the door of a model's backbone, in place and reversibly; call it before `install`.

    Args:
        model: a model of transformers, with or without a PEFT adapter, and with any head.
        attention: the row of `ATTENTION` for layers that are not fused.

    Returns:
        The door; `shut` says why where the model cannot take packed rows. `undo()` takes it away.
    """
    door = Door(attention)
    try:
        backbone = _find_backbone(model)
        stock = stock_forward(backbone)
        proof = prove(backbone, stock)
    except torch.OutOfMemoryError:
        raise
    except UserError as error:
        door.shut = error.message
        return door
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # what anybody's model makes of arguments that it does not know
        door.shut = f"it does not run a packed row: {type(error).__name__} {str(error).partition(chr(10))[0]}"
        return door
    register_attention()
    door.restart = proof.restart
    lock = threading.RLock()  # not in the door, which a deep copy of the model may copy
    for module in proof.modules:
        _attend_packed(module, door, lock)
    _stand_before(backbone, stock, door, lock)
    remember_masks(base_of(model), backbone, door._undo)
    return door
