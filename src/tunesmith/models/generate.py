"""Answers of a model to prompts, through the stock attention and its KV cache.

Greedy, or drawn with a random stream for each row: the noise of a row depends on its seed and on nothing else, so
that an answer is the same alone and in a batch, up to rounding. transformers' own sampling draws all rows of a batch
from one stream, in which each answer would depend on its neighbours. The draw is Gumbel's: the largest of the logits
plus -log(-log u) is a sample of their softmax (https://arxiv.org/abs/1611.01144).

Legend: `B` rows of a batch, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)

from tunesmith.models.modes import evaluating


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and how many there are at most.

    Attributes:
        max_tokens: upper bound of an answer's length.
        temperature: the logits are divided by it; 0 always takes the most likely token.
        top_p: draw from the most likely tokens that have this much of the probability together.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Stop:
    """What ends an answer.

    Attributes:
        ids: tokens, each of which ends it.
        text: a text that ends it, for templates whose end of a turn is no token of the tokenizer; empty for none.
    """

    ids: tuple[int, ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: without control tokens and without what ended it.
        tokens: how many it took, with the one that ended it.
        complete: whether it ended by itself, and not at the bound of its length.
    """

    text: str
    tokens: int
    complete: bool


class _Draw(LogitsProcessor):
    """Adds Gumbel noise to the logits of each row, from the row's own stream."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators

    def __call__(self, _ids: Tensor, scores_BV: Tensor) -> Tensor:
        size, device = scores_BV.shape[-1], scores_BV.device
        uniform = [torch.rand(size, generator=each, device=device) for each in self._generators]
        noise_BV = -torch.log(-torch.log(torch.stack(uniform).clamp(1e-20, 1.0 - 6e-8)))
        return scores_BV.float() + noise_BV


def _processors(sampling: Sampling, seeds: Sequence[int], device: torch.device) -> LogitsProcessorList:
    """Temperature, nucleus and noise; greedy search over the result is a draw."""
    if sampling.temperature == 0.0:
        return LogitsProcessorList()
    steps: list[Any] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_p < 1.0:
        steps.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([*steps, _Draw([torch.Generator(device).manual_seed(seed) for seed in seeds])])


@dataclass
class _Until:
    """Hands text on as it comes, but for what may be the beginning of the text that ends it."""

    stop: str
    hand_on: Callable[[str], None]
    held: str = ""
    done: bool = field(default=False)

    def add(self, text: str, *, last: bool = False) -> None:
        if self.done:
            return
        self.held += text
        end = self.held.find(self.stop) if self.stop else -1
        if end >= 0:
            self.done = True
            ready, self.held = self.held[:end], ""
        elif last or not self.stop:
            ready, self.held = self.held, ""
        else:
            most = min(len(self.held), len(self.stop) - 1)
            keep = next((n for n in range(most, 0, -1) if self.held.endswith(self.stop[:n])), 0)
            ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        if ready:
            self.hand_on(ready)


class Stream(TextStreamer):
    """Hands the text of one answer on while it is written.

    Args:
        tokenizer: decodes the tokens.
        hand_on: is called with each piece of text, in order.
        stop: where the answer ends, see `Stop.text`.
    """

    def __init__(self, tokenizer: Any, hand_on: Callable[[str], None], stop: str = "") -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._until = _Until(stop, hand_on)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """What transformers calls with text that will not change any more."""
        self._until.add(text, last=stream_end)


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    stop: Stop,
    seeds: Sequence[int] = (),
    most: Sequence[int] | None = None,
    streamer: Stream | None = None,
) -> list[Answer]:
    """Answers to prompts, in one batch that is padded on the left.

    Args:
        model: a causal model of transformers or PEFT; its own settings of generation are not used.
        tokenizer: decodes, and pads where it has a token for that.
        prompts: token ids, at least one for each.
        seeds: one for each prompt, where the temperature is above 0.
        most: tokens that each answer may have, where that is fewer than `sampling.max_tokens`.
        streamer: for one prompt alone.
    """
    pad = next(
        (
            number
            for number in (tokenizer.pad_token_id, tokenizer.eos_token_id, *stop.ids)
            if number is not None
        ),
        0,
    )
    longest = max(map(len, prompts))
    most = [sampling.max_tokens] * len(prompts) if most is None else most
    ids_BT = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts]).to(model.device)
    with evaluating(model):
        output_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            logits_processor=_processors(sampling, seeds, model.device),
            streamer=streamer,
            **_options(max(most), stop, tokenizer, pad),
        )
    return [
        _answer(row[longest : longest + bound].tolist(), tokenizer, stop)
        for row, bound in zip(output_BT, most, strict=True)
    ]


def _options(most: int, stop: Stop, tokenizer: Any, pad: int) -> dict[str, Any]:
    """Everything that a model's own settings of generation could say otherwise."""
    options: dict[str, Any] = {
        "max_new_tokens": most,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "use_cache": True,
        "pad_token_id": pad,
        "eos_token_id": list(stop.ids) or None,
    }
    if stop.text:
        options |= {"stop_strings": [stop.text], "tokenizer": tokenizer}
    return options


def _answer(ids: list[int], tokenizer: Any, stop: Stop) -> Answer:
    """The answer in what was generated, which is padded behind its end."""
    end = next((place for place, number in enumerate(ids) if number in stop.ids), None)
    if end is not None:
        ids = ids[: end + 1]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    complete = end is not None
    if stop.text and stop.text in text:
        text, complete = text[: text.index(stop.text)], True
        ids = _shortest(ids, tokenizer, stop.text)
    return Answer(text.strip(), len(ids), complete)


def _shortest(ids: list[int], tokenizer: Any, stop: str) -> list[int]:
    """The first tokens that hold the text which ends an answer."""
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        if stop in tokenizer.decode(ids[:middle], skip_special_tokens=True):
            high = middle
        else:
            low = middle + 1
    return ids[:low]
