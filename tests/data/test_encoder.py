"""Tokens and masks as the tokenizer's own lists of characters give them, whatever was set on it before."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tiny import tiny_tokenizer
from tunesmith.data.formats import Conversation, Text
from tunesmith.data.render import Renderer
from tunesmith.data.rendered import Rendered
from tunesmith.data.seams import Whole
from tunesmith.data.template import CHATML

TOKENIZER = tiny_tokenizer()
RENDERER = Renderer(TOKENIZER, CHATML)
TALK = [{"role": "user", "content": "Grüße, 日本?"}, {"role": "assistant", "content": "é 🙂\n\n ok"}]

TEXTS = st.text(st.sampled_from("ab \n\té日🙂\u0301") | st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_a_place_is_the_number_of_tokens_that_start_before_it(text: str) -> None:
    whole = Whole(TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False))
    for character in range(len(text) + 2):
        assert whole.place(character) == bisect_left(whole.offsets, (character,))


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 60), max_size=6))
def test_the_mask_is_that_of_the_characters(text: str, places: list[int]) -> None:
    bounds = sorted({place for place in places if place <= len(text)})
    spans = list(zip(bounds[::2], bounds[1::2], strict=False))
    if spans == [(0, len(text))]:
        return  # everything trains, also tokens of no character
    (encoded,) = RENDERER.encode([Rendered(text, spans)])
    called = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    expected = [any(start <= first < end for start, end in spans) for first, _ in called["offset_mapping"]]
    assert encoded.ids.tolist() == called["input_ids"]
    assert encoded.offsets.tolist() == [list(pair) for pair in called["offset_mapping"]]
    assert encoded.trained.tolist() == [False, *expected[1:]][: len(expected)]


@pytest.mark.parametrize("item", [Conversation(TALK), Text("plain text")])
def test_offsets_are_made_only_where_they_are_asked_for(item: Conversation | Text) -> None:
    encoder = RENDERER.encoder
    batch = encoder.start([RENDERER.render(item)], with_offsets=False)
    (short,) = encoder.finish(batch, batch.encode(), with_offsets=False)
    (full,) = RENDERER.encode([RENDERER.render(item)])
    assert short.offsets.shape == (0, 2)
    assert full.offsets.shape == (len(full.ids), 2)
    assert short.ids.tolist() == full.ids.tolist()
    assert short.trained.tolist() == full.trained.tolist()


def test_what_others_set_on_the_tokenizer_changes_nothing() -> None:
    tokenizer = tiny_tokenizer()
    renderer = Renderer(tokenizer, CHATML)
    row, before = renderer.render(Conversation(TALK)), renderer.fingerprint()
    (expected,) = renderer.encode([row])
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    assert renderer.fingerprint() == before
    assert np.array_equal(renderer.encode([row])[0].ids, expected.ids)


def test_a_class_that_changes_text_in_python_is_called() -> None:
    class Shouting(type(TOKENIZER)):  # type: ignore[misc]
        def _encode_plus(self, text, *args, **kwargs):  # type: ignore[no-untyped-def]
            return super()._encode_plus([part.upper() for part in text], *args, **kwargs)

    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = Shouting
    renderer = Renderer(tokenizer, None)
    (encoded,) = renderer.encode([Rendered("loud", [(1, 3)])])
    assert tokenizer.decode(encoded.ids) == "LOUD"
    assert not renderer.encoder.start([], with_offsets=False).in_thread
