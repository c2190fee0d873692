"""Places of tokens from control tokens alone, for tokens that came without their characters.

`encode_batch_fast` leaves out which characters a token has, and takes three quarters of the time of
`encode_batch`. Masks ask for few places, and nearly all are known without: a control token of the text is one
control token of the ids, so where a span begins or ends at one, its place is known; and behind a header that has
in the row the tokens that it has alone, the header's length is known. A row of which a place is not known so is
tokenised again, with characters: `find` never guesses.

It holds for byte-level BPE without a normaliser, of which every token is bytes of the text in order, and control
tokens that are found before anything else and take no blanks with them. Others are not `usable`. Blanks in front
of a place are left to the characters as well: some tokenizers give a token of blanks the place behind them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.seams import Offsets, Seams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_HEADER = 256


class Bare:
    """Tokens without their characters.

    Args:
        ids_T: int32 `[T]`.

    Attributes:
        ids: as a list.
        ids_T: int32 `[T]`, the same.
    """

    __slots__ = ("ids", "ids_T")

    def __init__(self, ids_T: NDArray[np.int32]) -> None:
        self.ids_T = ids_T
        self.ids: list[int] = ids_T.tolist()

    @property
    def offsets(self) -> Offsets:
        raise AssertionError("these tokens came without characters")

    def place(self, character: int) -> int:
        raise AssertionError(f"these tokens came without characters, and {character} was asked for")


class Placed(Bare):
    """Tokens with the places that were asked for.

    Attributes:
        checked: the places before which the tokens were compared, from the last control token on, as `Seams.check`
            does.
    """

    __slots__ = ("_places", "checked")

    def __init__(self, tokens: Bare, places: dict[int, int], checked: set[int]) -> None:
        self.ids, self.ids_T = tokens.ids, tokens.ids_T
        self._places = places
        self.checked = checked

    def place(self, character: int) -> int:
        """As in `seams.Tokenised`, for the characters that `Anchors.find` was given."""
        return self._places[character]


class Anchors:
    """Finds places by the control tokens of one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        seams: gives the tokens of headers.
        control: its special and added tokens.

    Attributes:
        usable: whether what is said above holds for the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seams: Seams, control: Sequence[str]) -> None:
        self._seams = seams
        added = tokenizer.added_tokens_decoder
        self.usable = _is_byte_level(tokenizer) and {str(token) for token in added.values()} == set(control)
        self._is_control_V: NDArray[np.bool_] = np.zeros(max([len(tokenizer), *added]) + 1, dtype=np.bool_)
        self._is_control_V[list(added)] = True

    def find(self, text: str, tokens: Bare, characters: Iterable[int]) -> Placed | None:
        """The tokens with the places of some characters; None where one cannot be told.

        Args:
            text: the row.
            tokens: those of it as one text, without special tokens around.
            characters: bounds of spans and ends of prompts.
        """
        ids = tokens.ids
        matches = self._seams.control_spans(text)
        positions = np.flatnonzero(self._is_control_V[tokens.ids_T]).tolist()
        if len(positions) != len(matches):
            return None
        starts = [start for start, _ in matches]
        places = {}
        checked = set()
        for character in characters:
            if character == 0:
                places[character] = 0
                continue
            number = bisect_right(starts, character) - 1
            if number < 0 or text[character - 1] == " ":
                return None
            place = positions[number]
            if starts[number] < character:
                header = text[starts[number] : character]
                if len(header) > _LONGEST_HEADER and matches[number][1] != character:
                    return None
                if matches[number][1] == character:
                    place += 1
                else:
                    tail = self._seams.header(header)
                    if ids[place : place + len(tail)] != tail:
                        return None
                    place += len(tail)
                    checked.add(character)
            places[character] = place
        return Placed(tokens, places, checked)


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    from tokenizers import decoders, models

    backend = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is None or backend.normalizer is not None:
        return False
    steps = backend.pre_tokenizer.__getstate__()
    return (
        isinstance(backend.model, models.BPE)
        and not backend.model.dropout
        and isinstance(backend.decoder, decoders.ByteLevel)
        and b'"ByteLevel"' in steps
        and b'"Removed"' not in steps
        and not any(
            token.lstrip or token.rstrip or token.single_word or token.normalized
            for token in tokenizer.added_tokens_decoder.values()
        )
    )
