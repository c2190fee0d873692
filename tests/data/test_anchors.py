"""Places from control tokens are those of the characters, or none at all."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, processors
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import tiny_tokenizer
from tunesmith.data.anchors import Anchors, Bare
from tunesmith.data.chat import RowProblem
from tunesmith.data.formats import Conversation
from tunesmith.data.render import Renderer
from tunesmith.data.seams import Seams
from tunesmith.data.template import CHATML

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def trimming_tokenizer() -> PreTrainedTokenizerFast:
    """Gives tokens of blanks the place behind them, as GPT-2's and Llama 3's do."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


TOKENIZERS = {"plain": tiny_tokenizer(), "trimming": trimming_tokenizer()}
PIECES = st.sampled_from(
    [*CONTROL, "<|im", "assistant", " ", "\n", "  a", "é🙂", "user\n", "<|im_end|><|im_end|>"]
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_what_is_found_is_true(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    anchors = Anchors(tokenizer, Seams(tokenizer, CONTROL), CONTROL)
    assert anchors.usable
    called = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    for character in range(len(text) + 1):
        placed = anchors.find(text, Bare(np.array(called.ids, dtype=np.int32)), [character])
        if placed is not None:
            assert placed.place(character) == bisect_left(called.offsets, (character,))


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.sampled_from(["turn", "all", "none"]))
def test_rows_become_the_same_with_and_without_characters(
    kind: str, talk: list[tuple[str, str]], end: str
) -> None:
    renderer = Renderer(TOKENIZERS[kind], CHATML, end_of_turn=end)  # type: ignore[arg-type]
    turns = [
        {"role": role, "content": text}
        for pair in talk
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    try:
        row = renderer.render(Conversation(turns))
    except RowProblem:
        return
    batch = renderer.encoder.start([row], with_offsets=False)
    (fast,) = renderer.encoder.finish(batch, batch.encode(), with_offsets=False)
    (exact,) = renderer.encode([row])
    assert np.array_equal(fast.ids, exact.ids)
    assert np.array_equal(fast.trained, exact.trained)
    assert fast.notes == exact.notes
    assert str(fast.problem) == str(exact.problem)


def test_chats_are_found_by_their_control_tokens() -> None:
    """Without a second look at the text, or nothing is gained."""
    tokenizer = tiny_tokenizer()
    renderer = Renderer(tokenizer, CHATML)
    row = renderer.render(
        Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    )
    anchors = Anchors(tokenizer, Seams(tokenizer, CONTROL), CONTROL)
    ids = tokenizer(row.text, add_special_tokens=False)["input_ids"]
    placed = anchors.find(
        row.text, Bare(np.array(ids, dtype=np.int32)), [place for span in row.spans for place in span]
    )
    assert placed is not None
    (start, end) = row.spans[0]
    assert tokenizer.decode(ids[placed.place(start) : placed.place(end)]) == "b<|im_end|>"
    assert anchors.find(row.text, Bare(np.array(ids, dtype=np.int32)), [row.text.index("b") + 1]) is not None
    assert anchors.find(row.text, Bare(np.array(ids[:-2], dtype=np.int32)), [0]) is None, (
        "a control token of the text is not in the ids"
    )


@pytest.mark.parametrize("change", ["normaliser", "greedy token", "no byte level"])
def test_tokenizers_of_which_it_is_not_true_are_left_alone(change: str) -> None:
    tokenizer = tiny_tokenizer()
    if change == "normaliser":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    elif change == "greedy token":
        tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", lstrip=True, normalized=False)})
    else:
        tokenizer.backend_tokenizer.decoder = None
    control = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    assert not Anchors(tokenizer, Seams(tokenizer, control), control).usable
