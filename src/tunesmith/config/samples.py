"""The prompts that a run has its model answer, and the sampler that asks them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.config.load_result import stop_of as ends_of
from tunesmith.config.prepare_data import Opened, PreparedData, reading_of
from tunesmith.config.prompting import Prompter
from tunesmith.contracts.errors import DataError, UserError
from tunesmith.data.formats import Conversation, Prompt, Supervised, Text, convert
from tunesmith.data.formats.table import resolve_format
from tunesmith.data.reading import RowProblem
from tunesmith.data.render import Renderer
from tunesmith.data.sources import open_source
from tunesmith.data.table import TokenTable
from tunesmith.data.tokenize import find_format, sample_columns
from tunesmith.distributed.single import SingleDevice
from tunesmith.models.attention import attending_all
from tunesmith.models.generate import Stop
from tunesmith.models.head import CausalModel
from tunesmith.models.install import Installed
from tunesmith.settings.run import RunSettings
from tunesmith.training.sample import SamplePrompt, Sampler

FIRST = 3
"""Prompts taken from the data where none are named."""
MOST = 16
"""Prompts that are asked at once; more would hold up training and fill the memory."""
_TEXT_TOKENS = 16
"""Tokens of a text that has no prompt, behind which the model goes on."""


def make_sampler(
    settings: RunSettings,
    data: PreparedData,
    tokenizer: Any,
    causal: CausalModel,
    backend: SingleDevice,
    installed: Installed | None,
) -> Sampler | None:
    """The sampler of a run that asks for sample answers; None where it does not.

    Raises:
        UserError: the prompts cannot be read, or there are none.
    """
    output = settings.output
    if output.sample_every is None:
        return None
    ask = output.sample_prompts
    if ask is None:
        prompts = _of_data(data, tokenizer)
    elif isinstance(ask, str):
        prompts = _of_file(Path(ask).expanduser(), data.renderer, tokenizer)
    else:
        prompts = [prompt_of_user(text, data.renderer, tokenizer) for text in ask]
    if not prompts or len(prompts) > MOST:
        raise UserError(
            f"output.sample_prompts: {len(prompts)} prompts; a run asks between 1 and {MOST}.",
            hint="Give a shorter list or file.",
        )
    longest = settings.train.sequence_length
    prompts = [replace(prompt, ids=prompt.ids[-longest:]) for prompt in prompts]
    # now, while the model attends as it was loaded
    context = partial(_as_stock, causal, causal.base.config._attn_implementation, backend, installed)
    stop = stop_of(causal, data.renderer, tokenizer)
    return Sampler(causal.model, tokenizer, tuple(prompts), output.sample_tokens, stop, context)


def stop_of(causal: CausalModel, renderer: Renderer, tokenizer: Any) -> Stop:
    """What ends an answer in the run's template, which the tokenizer gets only when the result is saved."""
    own = copy.copy(tokenizer)
    own.chat_template = renderer.template_source
    return ends_of(causal.base, own, Prompter(own))


def prompt_of_user(text: str, renderer: Renderer, tokenizer: Any) -> SamplePrompt:
    """A user's message as a server would show it to the model; without a chat template its text alone."""
    return _of_messages([{"role": "user", "content": text}], renderer, tokenizer)


def _of_messages(
    messages: Sequence[Mapping[str, Any]],
    renderer: Renderer,
    tokenizer: Any,
    tools: list[dict[str, Any]] | None = None,
) -> SamplePrompt:
    """A prompt of messages as a server would show it; without a chat template their text alone."""
    shown = str(messages[-1].get("content") or "")
    if renderer.template is None:
        return _of_text(shown, tokenizer)
    text = renderer.prompt([dict(message) for message in messages], tools)
    return SamplePrompt(shown, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))


def _of_text(text: str, tokenizer: Any) -> SamplePrompt:
    return SamplePrompt(text, tuple(tokenizer(text)["input_ids"]))


def _asked(item: Conversation | Prompt) -> list[dict[str, Any]]:
    """The messages before the first answer to something."""
    roles = [message["role"] for message in item.messages]
    end = roles.index("assistant", 1) if "assistant" in roles[1:] else len(roles)
    return item.messages[:end]


def _of_file(path: Path, renderer: Renderer, tokenizer: Any) -> list[SamplePrompt]:
    """A prompt of each row: its question or messages where it has some, its text otherwise.

    Raises:
        UserError: there is no such file, or a row is no prompt.
    """
    if not path.is_file():
        raise UserError(
            f"output.sample_prompts: there is no file {path}.",
            hint='A prompt itself is written in a list: ["What is a prime number?"].',
        )
    rows, sample = sample_columns(open_source(str(path)))
    found = resolve_format("auto", {}, sample, kinds=(Conversation, Prompt, Text))
    prompts = []
    for row in islice(rows, MOST + 1):
        try:
            item = convert(found, row.record, {}) if row.record is not None else row.problem
        except RowProblem as problem:
            item = str(problem)
        if isinstance(item, Conversation | Prompt):
            prompts.append(_of_messages(_asked(item), renderer, tokenizer, item.tools))
        elif isinstance(item, Text):
            prompts.append(prompt_of_user(item.text, renderer, tokenizer))
        else:
            raise DataError(f"output.sample_prompts: {row.where} is no prompt: {item}.")
    return prompts


def _of_data(data: PreparedData, tokenizer: Any) -> list[SamplePrompt]:
    """The first prompts that are held out, or that train where nothing is."""
    documents_N = data.held_out_N if len(data.held_out_N) else data.train_N
    prompts: list[SamplePrompt] = []
    for opened, own_N in zip(data.opened, data.corpus.by_source(documents_N), strict=True):
        first: dict[int, int] = {}  # the first document of each row
        for document in own_N.tolist():
            table, index = data.corpus.locate(document)
            assert isinstance(table, TokenTable), "what is held out lies in tables"
            first.setdefault(table.row(index), document)
            if len(first) + len(prompts) == FIRST:
                break
        prompts += [
            _of_document(item, document, data, tokenizer)
            for item, document in zip(_items(opened, list(first)), first.values(), strict=True)
        ]
    return prompts


def _items(opened: Opened, indices: Sequence[int]) -> Iterator[Supervised]:
    """What the rows of these indices, ascending, say; the source is read no further than the last of them."""
    source = opened.settings
    if not indices:
        return
    columns = dict(source.columns)
    rows, found = find_format(opened.source, source.format, columns, reading_of(source))
    wanted = set(indices)
    for row in rows:
        if row.index in wanted:
            assert row.record is not None, "it became a document"
            item = convert(found, row.record, columns)
            assert isinstance(item, Supervised), "it became a document"
            yield item
            if row.index == indices[-1]:
                return


def _of_document(item: Supervised, document: int, data: PreparedData, tokenizer: Any) -> SamplePrompt:
    """The prompt of a conversation; of other rows the tokens before the first that trains, or the beginning."""
    if isinstance(item, Conversation):
        return _of_messages(_asked(item), data.renderer, tokenizer, item.tools)
    table, index = data.corpus.locate(document)
    ids, trained = table.ids(index), table.trained(index)
    end = int(np.argmax(trained))
    if end < 2:  # all of it trains, behind a token that begins texts
        end = max(1, min(_TEXT_TOKENS, len(ids) // 2))
    return SamplePrompt(tokenizer.decode(ids[:end], skip_special_tokens=True), tuple(ids[:end].tolist()))


@contextmanager
def _as_stock(
    causal: CausalModel, attention: str, backend: SingleDevice, installed: Installed | None
) -> Iterator[None]:
    """Within the block the model generates as it was loaded; calls of stock layers are not counted."""
    counts = dict(installed.fallbacks) if installed is not None else {}
    if installed is not None and not backend.use_graphs:
        installed.forget_unpacked()  # stock layers read weights as they are, and long prompts need the room
    with attending_all(causal.base, attention), backend.autocast():
        yield
    if installed is not None:
        installed.fallbacks.clear()
        installed.fallbacks.update(counts)
