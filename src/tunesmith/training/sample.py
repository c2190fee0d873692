"""Sample answers while a run goes on: greedy, for a few prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from tunesmith.models.generate import Sampling, Stop, generate
from tunesmith.training.state import restore_rng, rng_state


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """What the model is asked.

    Attributes:
        shown: the prompt as a person reads it.
        ids: its tokens, behind which the model goes on.
    """

    shown: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sampler:
    """Asks the model that trains; training is the same with and without, bit for bit.

    Attributes:
        model: a `PeftModel` or `PreTrainedModel`.
        tokenizer: its tokenizer.
        prompts: what it is asked, at least one.
        max_new_tokens: upper bound of each answer's length.
        stop: what ends an answer.
        context: in which it generates: stock attention and autocast.
    """

    model: Any
    tokenizer: Any
    prompts: tuple[SamplePrompt, ...]
    max_new_tokens: int
    stop: Stop
    context: Callable[[], AbstractContextManager[object]]

    def answers(self) -> list[str]:
        """The answer to each prompt."""
        ids = [prompt.ids for prompt in self.prompts]
        with _same_rng(), self.context():
            return sample_answers(
                self.model, self.tokenizer, ids, max_new_tokens=self.max_new_tokens, stop=self.stop
            )


def sample_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Stop
) -> list[str]:
    """Answers of the model to prompts, decoded without control tokens.

    Args:
        prompts: tokens of each prompt, that end where the model is to go on. Where the model has no position for
            the end of an answer, the prompt's first ones are left out.
        max_new_tokens: upper bound of each answer's length.
        stop: what ends an answer.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:
        prompts = [prompt[-max(1, positions - max_new_tokens) :] for prompt in prompts]
    answers = generate(model, tokenizer, prompts, sampling=Sampling(max_new_tokens), stop=stop)
    return [answer.text for answer in answers]


@contextmanager
def _same_rng() -> Iterator[None]:
    """Within the block random numbers may be drawn; afterwards every generator is where it was."""
    tensors, rng = rng_state()
    try:
        yield
    finally:
        restore_rng(tensors, rng)
