"""What `tunesmith data check` counts and renders of a row, for every kind that a row may become.

What trains today is one document a row. The other kinds are data only so far: an answer to be compared or judged
is rendered behind its prompt, as an objective would see it, and the prompt does not train.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tunesmith.data.formats import (
    Conversation,
    Item,
    Labelled,
    Preference,
    Prompt,
    RowProblem,
    Segments,
    Stepwise,
    Text,
    Tokens,
)
from tunesmith.data.render import Encoded, Rendered, Renderer

Counts = dict[str, int]


def _answer(
    renderer: Renderer, prompt: Sequence[dict[str, Any]], answer: Sequence[dict[str, Any]], tools: Any
) -> Rendered:
    context = [message | {"train": False} for message in prompt]
    return renderer.render(Conversation([*context, *answer], tools))


def _alone(item: Any, renderer: Renderer) -> tuple[list[Rendered], Counts]:
    return renderer.documents(item), {}


def _segments(item: Segments, renderer: Renderer) -> tuple[list[Rendered], Counts]:
    counts = {"segments": len(item.parts), "that train": sum(trains for _, trains in item.parts)}
    return [renderer.render(item)], counts


def _preference(item: Preference, renderer: Renderer) -> tuple[list[Rendered], Counts]:
    answers = [_answer(renderer, item.prompt, answer, item.tools) for answer in (item.chosen, item.rejected)]
    return answers, {
        "pairs": 1,
        "with equal answers": int(item.chosen == item.rejected),
    }


def _labelled(item: Labelled, renderer: Renderer) -> tuple[list[Rendered], Counts]:
    counts = {"good answers": int(item.label), "bad answers": int(not item.label)}
    return [_answer(renderer, item.prompt, item.answer, item.tools)], counts


def _stepwise(item: Stepwise, renderer: Renderer) -> tuple[list[Rendered], Counts]:
    answer = {"role": "assistant", "content": "\n".join(item.steps)}
    counts = {"right steps": sum(item.labels), "wrong steps": len(item.labels) - sum(item.labels)}
    return [_answer(renderer, item.prompt, [answer], None)], counts


def _prompt(item: Prompt, renderer: Renderer) -> tuple[list[Rendered], Counts]:
    text = renderer.prompt(item.messages).encode("utf-8", "replace").decode()
    return [Rendered(text, [])], {"prompts": 1}


KINDS: dict[type, Callable[[Any, Renderer], tuple[list[Rendered], Counts]]] = {
    Conversation: _alone,
    Text: _alone,
    Segments: _segments,
    Tokens: _alone,
    Preference: _preference,
    Labelled: _labelled,
    Stepwise: _stepwise,
    Prompt: _prompt,
}
"""For each kind of row how its documents are made, and what is counted of it."""


def documents_of(item: Item, renderer: Renderer) -> tuple[list[Rendered], Counts]:
    """The documents of a row and what is worth counting of it.

    Raises:
        RowProblem: the row cannot be rendered.
    """
    return KINDS[type(item)](item, renderer)


def foreign(rendered: Rendered, encoded: Encoded, tokenizer: Any) -> RowProblem | None:
    """What is wrong with a row that was tokenised elsewhere with another tokenizer, where it shows."""
    if rendered.tokens is None:
        return None
    known, highest = len(tokenizer), int(encoded.ids.max(initial=0))
    if highest < known:
        return None
    return RowProblem("bad tokens", f"token {highest} is none of the {known:,} of this tokenizer")


def legible(rendered: Rendered, encoded: Encoded, tokenizer: Any) -> tuple[Rendered, Encoded]:
    """A row to be shown: one that came as tokens gets a text, its tokens one by one; others stay as they are.

    Decoded alone, a token that is part of a character is a replacement mark.
    """
    if rendered.tokens is None:
        return rendered, encoded
    pieces = [tokenizer.decode([token]) for token in encoded.ids.tolist()]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int32)
    offsets_T2 = np.stack([np.concatenate([[0], ends[:-1]]).astype(np.int32), ends], axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], encoded.trained, [False]]))).reshape(-1, 2)
    spans = [(int(offsets_T2[first, 0]), int(ends[last - 1])) for first, last in edges]
    return replace(rendered, text="".join(pieces), spans=spans), replace(encoded, offsets=offsets_T2)
