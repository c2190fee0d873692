"""Answers: what is generated is the model's own, alone and in a batch, and ends where it should."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.support.tiny import tiny_llama, tiny_tokenizer
from tunesmith.models import generate as module
from tunesmith.models.generate import Sampling, Stop, Stream, generate

PROMPTS = [[5, 6, 7], [20, 21, 22, 23, 24, 25, 26, 27, 28], [100]]


@pytest.fixture(scope="module")
def model() -> Any:
    return make()


def make() -> Any:
    """A model that does not say the same token again and again."""
    return tiny_llama(seed=4, tie_word_embeddings=False, initializer_range=0.3)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The most likely tokens, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_batch_holds_the_most_likely_tokens_of_each_prompt(model: Any, tokenizer: Any) -> None:
    answers = generate(model, tokenizer, PROMPTS, sampling=Sampling(12), stop=Stop())
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.text == tokenizer.decode(greedy(model, prompt, 12), skip_special_tokens=True).strip()
        assert (answer.tokens, answer.complete) == (12, False)


def test_an_answer_ends_with_the_first_of_its_ends(model: Any, tokenizer: Any) -> None:
    ids = greedy(model, PROMPTS[1], 12)
    last = next(place for place in range(11, 0, -1) if ids[place] not in ids[:place])
    answers = generate(model, tokenizer, PROMPTS, sampling=Sampling(12), stop=Stop((383, ids[last])))
    assert (answers[1].tokens, answers[1].complete) == (last + 1, True)
    assert answers[1].text == tokenizer.decode(ids[: last + 1], skip_special_tokens=True).strip()


def test_a_draw_does_not_depend_on_its_neighbours(model: Any, tokenizer: Any) -> None:
    options = {"sampling": Sampling(12, temperature=1.5, top_p=0.9), "stop": Stop()}
    together = generate(model, tokenizer, PROMPTS, seeds=[1, 2, 3], **options)
    alone = [
        generate(model, tokenizer, [prompt], seeds=[seed], **options)[0]
        for prompt, seed in zip(PROMPTS, (1, 2, 3), strict=True)
    ]
    assert together == alone
    other = generate(model, tokenizer, PROMPTS, seeds=[4, 2, 3], **options)
    assert other[0] != together[0]
    assert other[1:] == together[1:]


def test_draws_have_the_models_probabilities() -> None:
    count = 4000
    logits_BV = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0]).expand(count, 5)
    steps = module._processors(Sampling(1, temperature=2.0, top_p=0.85), range(count), torch.device("cpu"))
    drawn = steps(torch.zeros(count, 1, dtype=torch.long), logits_BV).argmax(-1)
    shares = torch.bincount(drawn, minlength=5) / count
    # at temperature 2 the shares are e^1, e^0.5, ...: the first three have 0.446 + 0.271 + 0.164 = 0.881 > 0.85
    wanted = torch.softmax(torch.tensor([1.0, 0.5, 0.0]), -1)
    assert shares[3:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(shares[:3], wanted, rtol=0, atol=0.03)  # four standard deviations


def test_the_models_own_settings_of_generation_are_not_used(tokenizer: Any) -> None:
    plain, strange = tiny_llama(seed=4), tiny_llama(seed=4)  # these repeat a token again and again
    strange.generation_config.update(
        repetition_penalty=5.0, do_sample=True, temperature=3.0, no_repeat_ngram_size=1, max_new_tokens=2
    )
    found = [
        generate(each, tokenizer, PROMPTS[:1], sampling=Sampling(12), stop=Stop())
        for each in (plain, strange)
    ]
    assert found[0] == found[1]


def test_bounds_of_their_own(model: Any, tokenizer: Any) -> None:
    whole = generate(model, tokenizer, PROMPTS, sampling=Sampling(12), stop=Stop())
    cut = generate(model, tokenizer, PROMPTS, sampling=Sampling(12), stop=Stop(), most=[3, 12, 5])
    assert [answer.tokens for answer in cut] == [3, 12, 5]
    assert cut[1] == whole[1]


def test_a_text_that_ends_an_answer(model: Any, tokenizer: Any) -> None:
    ids = greedy(model, PROMPTS[1], 12)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    end = text[len(text) // 2 : len(text) // 2 + 3]
    pieces: list[str] = []
    (answer,) = generate(
        model, tokenizer, PROMPTS[1:2], sampling=Sampling(12), stop=Stop((), end),
        streamer=Stream(tokenizer, pieces.append, end),
    )  # fmt: skip
    assert answer.text == text[: text.index(end)].strip()
    assert answer.complete
    assert end in tokenizer.decode(ids[: answer.tokens])
    assert end not in tokenizer.decode(ids[: answer.tokens - 1])
    assert "".join(pieces).strip() == answer.text


def test_a_stream_is_the_answer(model: Any, tokenizer: Any) -> None:
    pieces: list[str] = []
    (answer,) = generate(
        model, tokenizer, PROMPTS[:1], sampling=Sampling(24), stop=Stop(),
        streamer=Stream(tokenizer, pieces.append),
    )  # fmt: skip
    assert "".join(pieces).strip() == answer.text
    assert len(pieces) > 1


@pytest.mark.parametrize(
    ("pieces", "handed_on"),
    [
        (["a<|", "end|>b", "c"], "a"),
        (["a<", "|", "x<|end"], "a<|x<|end"),
        (["<<|end|>"], "<"),
        (["ab", "c"], "abc"),
    ],
)
def test_what_may_be_the_end_is_held_back(pieces: list[str], handed_on: str) -> None:
    got: list[str] = []
    until = module._Until("<|end|>", got.append)
    for piece in pieces:
        until.add(piece)
        assert "<|end|>".startswith(until.held) or not until.held
    until.add("", last=True)
    assert "".join(got) == handed_on
