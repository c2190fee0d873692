"""Tokens at seams: where a prompt ends and an answer begins, and around text that must stay plain.

A tokenizer merges across the end of a prompt: behind `assistant\\n` an answer that starts with a line break
becomes one token of two line breaks, which a server's prompt does not hold. `check` compares the tokens before
each seam with those of the prompt's end on its own. From the last control token on is enough, because a control
token cuts the text before anything merges; without one the whole prompt is tokenised.

`encode_pieces` tokenises a text in pieces: cut at a seam, or with pieces in which no control token is known. It
is for the few rows that need it; `cuts_are_clean` proves first that this tokenizer gives the same tokens in
pieces as in one.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from tunesmith.data.rendered import without_surrogates
from tunesmith.data.template import Span

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

Offsets = list[tuple[int, int]]
_WINDOW = 256
_MOST_DESCRIBED = 64
_MOST_TAILS = 1 << 12


class Tokenised(Protocol):
    """The tokens of a text and where they stand in it.

    Attributes:
        ids: the tokens.
    """

    ids: list[int]

    @property
    def offsets(self) -> Offsets:
        """First character of each token and the one behind its last."""
        ...

    def place(self, character: int) -> int:
        """How many tokens start before a character; where tokens start never goes back."""
        ...


class Whole:
    """A text that was tokenised as one: what the tokenizer knows of it is asked as it is needed."""

    __slots__ = ("_encoding", "ids")

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self.ids: list[int] = encoding.ids

    @property
    def offsets(self) -> Offsets:
        """As in `Tokenised`; made anew each time."""
        return list(self._encoding.offsets)

    def _start(self, token: int) -> int:
        characters = self._encoding.token_to_chars(token)
        assert characters is not None, "the tokenizer put a token of its own into a template's text"
        return int(characters[0])

    def place(self, character: int) -> int:
        """As in `Tokenised`; mostly a token starts right there."""
        token = self._encoding.char_to_token(character)
        if (
            token is not None
            and self._start(token) == character
            and (token == 0 or self._start(token - 1) < character)
        ):
            return int(token)
        return bisect_left(range(len(self.ids)), character, key=self._start)


class Pieces:
    """A text that was tokenised in pieces, or by a tokenizer that gives lists."""

    __slots__ = ("ids", "offsets")

    def __init__(self, ids: list[int], offsets: Offsets) -> None:
        self.ids = ids
        self.offsets = offsets

    def place(self, character: int) -> int:
        """As in `Tokenised`."""
        return bisect_left(self.offsets, (character,))


class Seams:
    """Compares and cuts tokens of one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        control: its special and added tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._pattern = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")
        self._tails: dict[str, list[int]] = {}
        self._described = 0

    def _ids(self, text: str) -> list[int]:
        text = without_surrogates(text)
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _tail(self, text: str, end: int) -> list[int]:
        """Tokens of the prompt `text[:end]` from its last control token on."""
        start = -1
        for width in (32, _WINDOW):
            for match in self._pattern.finditer(text, max(0, end - width), end):
                start = match.start()
            if start >= 0:
                break
        if start < 0:
            return self._ids(text[:end])
        return self.header(text[start:end])

    def header(self, text: str) -> list[int]:
        """Tokens of a short text that begins with a control token; remembered, not to be changed."""
        tail = self._tails.get(text)
        if tail is None:
            if len(self._tails) >= _MOST_TAILS:
                self._tails.clear()
            tail = self._tails[text] = self._ids(text)
        return tail

    def control_spans(self, text: str) -> list[Span]:
        """Where control tokens stand in a text, the longest of those that start at a place."""
        return [match.span() for match in self._pattern.finditer(text)]

    def check(self, text: str, end: int, tokens: Tokenised) -> bool:
        """Whether the tokens of a row before the character `end` are those of the prompt that ends there.

        Args:
            text: the row.
            end: length of the prompt.
            tokens: those of the row.
        """
        tail = self._tail(text, end)
        place = tokens.place(end)
        return place >= len(tail) and tokens.ids[place - len(tail) : place] == tail

    def describe(self, prompt: str, text: str) -> str:
        """Where a row leaves the prompt: the first token that differs, decoded. The first ones are exact."""
        self._described += 1
        if self._described > _MOST_DESCRIBED:
            return "the row goes on otherwise than a server's prompt"
        there, here = self._ids(prompt), self._ids(text)
        place = next(
            (n for n, pair in enumerate(zip(there, here, strict=False)) if pair[0] != pair[1]),
            min(len(there), len(here)),
        )
        expected, found = (
            repr(self._tokenizer.decode(ids[place : place + 1])) if place < len(ids) else "nothing"
            for ids in (there, here)
        )
        return f"token {place} is {found}, in a server's prompt {expected}"

    def cuts_are_clean(self, text: str, cuts: Iterable[int]) -> bool:
        """Whether `text` has the same tokens in pieces, cut at control tokens, as in one."""
        bounds = sorted({0, len(text), *cuts})
        pieces = [text[start:end] for start, end in pairwise(bounds)]
        return [token for piece in pieces for token in self._ids(piece)] == self._ids(text)

    def encode_pieces(self, text: str, cuts: Iterable[int], literal: Sequence[Span]) -> Pieces:
        """Tokens of a text with cuts between its pieces.

        Args:
            text: the row.
            cuts: characters before which a token must begin.
            literal: pieces in which control tokens are plain text.
        """
        bounds = sorted({0, len(text), *cuts, *[place for span in literal for place in span]})
        plain = {start for start, _ in literal}
        ids: list[int] = []
        offsets: Offsets = []
        inside = 0
        for start, end in pairwise(bounds):
            if start in plain:
                inside = next(last for first, last in literal if first == start)
            piece = self._tokenizer(
                text[start:end],
                add_special_tokens=False,
                return_offsets_mapping=True,
                split_special_tokens=start < inside,
                verbose=False,
            )
            ids += piece["input_ids"]
            offsets += [(first + start, last + start) for first, last in piece["offset_mapping"]]
        return Pieces(ids, offsets)
