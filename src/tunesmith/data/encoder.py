"""From rendered text to tokens with their mask: the tokenizer's own batches, read only where the mask asks.

The Rust tokenizer works on a batch without Python's lock, so `start` hands one over and `Encoder.finish` reads
it later; between them the caller renders the next rows. What is read of a row are its ids and the tokens at the
bounds of its spans. A list of the characters of all tokens costs about half as much as the tokens (74 of 175
microseconds in a row of 190 tokens), so it is made only for those who show it.

Where control tokens tell the places (`anchors.py`), the tokenizer does not keep characters at all.

Rejected: `tokenizer(texts, return_offsets_mapping=True)`, which builds that list, a mapping of all its columns
and checks every text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.anchors import Anchors, Bare
from tunesmith.data.chat import RowProblem
from tunesmith.data.control import ControlText
from tunesmith.data.masks import Turn
from tunesmith.data.proof import REASON
from tunesmith.data.rendered import NOTE_ALLOWED, NOTE_CONTEXT, NOTE_CUT, Encoded, Rendered, without_turns
from tunesmith.data.seams import Pieces, Seams, Tokenised, Whole
from tunesmith.data.template import Span
from tunesmith.data.words import Words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mismatch = Literal["refuse", "context", "allow"]

_RARE = 16
"""One row in so many may be tokenised again, with characters, before all are at once."""


@dataclass(frozen=True)
class Batch:
    """Rows on their way through the tokenizer.

    Attributes:
        rows: as they were rendered.
        encode: works on their texts; gives tokens by the row's number.
        in_thread: `encode` is worth another thread: it leaves Python's lock and the tokenizer's state alone.
        is_alone: `finish` changes the tokenizer's state: no `encode` may run in another thread meanwhile.
    """

    rows: Sequence[Rendered]
    encode: Callable[[], dict[int, Tokenised]]
    in_thread: bool
    is_alone: bool


class Encoder:
    """Tokenises rows with one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        seams: compares and cuts its tokens.
        control: its special and added tokens.
        mismatch: what becomes of a turn whose answer merges with the end of its prompt.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, seams: Seams, control: Sequence[str], mismatch: Mismatch
    ) -> None:
        self._tokenizer = tokenizer
        self._seams = seams
        self._control = tuple(control)
        self._mismatch = mismatch
        self._eos_id = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else None
        self._is_direct = _is_plain_backend(tokenizer)
        self._anchors = Anchors(tokenizer, seams, control)
        self._words = Words(tokenizer, control)
        self._adds = tokenizer.num_special_tokens_to_add() > 0
        self._rows = self._again = 0
        self._clean: bool | None = None

    def start(self, rows: Sequence[Rendered], *, with_offsets: bool, by_words: bool = True) -> Batch:
        """A batch of rows, of which nothing is tokenised yet.

        Args:
            rows: as they were rendered.
            with_offsets: whether `finish` will be asked for the characters of tokens.
            by_words: remember the tokens of words, where that is exact and pays.
        """
        waiting = [(n, row) for n, row in enumerate(rows) if row.tokens is None and not row.literal]
        texts = {
            plain: [(n, row.text) for n, row in waiting if row.plain == plain] for plain in (False, True)
        }
        self._reset()
        by_words = by_words and self._words.usable and self._words.pays
        is_fast = not with_offsets and self._anchors.usable and self._again * _RARE <= self._rows + _RARE**2

        def encode() -> dict[int, Tokenised]:
            found: dict[int, Tokenised] = {}
            for plain, numbered in texts.items():
                if numbered:
                    tokens = self._texts([text for _, text in numbered], plain, is_fast, by_words)
                    found.update(zip([n for n, _ in numbered], tokens, strict=True))
            return found

        in_thread = (
            self._is_direct and not self._tokenizer.split_special_tokens and not (is_fast and by_words)
        )
        return Batch(rows, encode, in_thread, any(row.literal for row in rows))

    def finish(self, batch: Batch, tokens: dict[int, Tokenised], *, with_offsets: bool) -> list[Encoded]:
        """Tokens and masks of a batch, from what its `encode` gave."""
        encoded = []
        for number, row in enumerate(batch.rows):
            if row.tokens is not None:
                encoded.append(_given(row.tokens))
            elif row.literal:
                encoded.append(self._literal(row, with_offsets))
            else:
                encoded.append(self._row(row, self._placed(row, tokens[number]), with_offsets))
        return encoded

    def _placed(self, row: Rendered, tokens: Tokenised) -> Tokenised:
        """Tokens that know all places that the mask asks for."""
        if not isinstance(tokens, Bare) or row.plain:
            return tokens
        self._rows += 1
        asked = {turn.prompt for turn in row.turns}
        if row.spans != [(0, len(row.text))]:
            asked.update(place for span in row.spans for place in span)
        placed = self._anchors.find(row.text, tokens, asked)
        if placed is not None and all(
            turn.prompt in placed.checked or self._seams.check(row.text, turn.prompt, placed)
            for turn in row.turns
        ):
            return placed
        self._again += 1
        return Whole(self._tokenizer.backend_tokenizer.encode(row.text, add_special_tokens=False))

    def _reset(self) -> None:
        """Take back what others have set on the tokenizer, as its own calls do."""
        backend = self._tokenizer.backend_tokenizer
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens != self._tokenizer.split_special_tokens:
            backend.encode_special_tokens = self._tokenizer.split_special_tokens

    def _texts(self, texts: list[str], plain: bool, is_fast: bool, by_words: bool) -> Sequence[Tokenised]:
        if self._is_direct and is_fast:
            if by_words and not (plain and self._adds):
                return list(map(Bare, self._words.encode(texts)))
            encodings = self._tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=plain)
            return [Bare(np.array(encoding.ids, dtype=np.int32)) for encoding in encodings]
        if self._is_direct:
            encodings = self._tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=plain)
            return [Whole(encoding) for encoding in encodings]
        batch = self._tokenizer(
            texts,
            add_special_tokens=plain,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return list(map(Pieces, batch["input_ids"], batch["offset_mapping"]))

    def _literal(self, row: Rendered, with_offsets: bool) -> Encoded:
        bounds = [place for span in row.literal for place in span]
        tokens = self._seams.encode_pieces(row.text, bounds, row.literal)
        encoded = self._row(row, tokens, with_offsets)
        if self._is_clean():
            return encoded
        detail = "this tokenizer cannot keep it plain text; data.allow_control_tokens lets it be one"
        return replace(encoded, problem=RowProblem("control token in text", detail))

    def _is_clean(self) -> bool:
        """Whether this tokenizer gives the same tokens in pieces; found out once, on a probe."""
        if self._clean is None:
            text = "tunesmith".join(["", *self._control[:4], "a b\n", *self._control[4:8], ""])
            spans = ControlText(self._control).spans(text)
            cuts = [place for span in spans for place in span]
            self._clean = self._seams.cuts_are_clean(text, [*cuts, text.index("a b")])
        return self._clean

    def _row(self, row: Rendered, tokens: Tokenised, with_offsets: bool) -> Encoded:
        if row.plain and self._eos_id is not None and tokens.ids[-1:] != [self._eos_id]:
            end = len(row.text)
            offsets = [*tokens.offsets, (end, end)] if with_offsets else []
            tokens = Pieces([*tokens.ids, self._eos_id], offsets)
        spans = row.spans
        notes: tuple[str, ...] = ()
        problem: RowProblem | None = None
        failed: list[Turn] = []
        if not isinstance(tokens, Bare):  # `_placed` has checked those
            failed = [turn for turn in row.turns if not self._seams.check(row.text, turn.prompt, tokens)]
        if failed:
            tokens, spans, notes, problem = self._mend(row, tokens, failed)
        if row.plain or spans == [(0, len(row.text))]:
            trained_T = np.ones(len(tokens.ids), dtype=np.bool_)
        else:
            trained_T = np.zeros(len(tokens.ids), dtype=np.bool_)
            for start, end in spans:
                trained_T[tokens.place(start) : tokens.place(end)] = True
        trained_T[:1] = False
        ids_T = tokens.ids_T if isinstance(tokens, Bare) else np.array(tokens.ids, dtype=np.int32)
        return Encoded(ids_T, trained_T, _offsets(tokens) if with_offsets else _NONE, notes, problem)

    def _mend(
        self, row: Rendered, tokens: Tokenised, failed: list[Turn]
    ) -> tuple[Tokenised, list[Span], tuple[str, ...], RowProblem | None]:
        """What becomes of a row in which answers merge with the ends of their prompts.

        Behind the last prompt the tokens can be cut, because no later prompt tokenises that text again.
        """
        last = row.turns[-1]
        if failed == [last] and self._is_clean():
            bounds = [last.prompt, *[place for span in row.literal for place in span]]
            tokens = self._seams.encode_pieces(row.text, bounds, row.literal)
            if self._seams.check(row.text, last.prompt, tokens):
                return tokens, row.spans, (NOTE_CUT,), None
        if self._mismatch == "allow":
            return tokens, row.spans, (NOTE_ALLOWED,), None
        spans = without_turns(row.spans, failed)
        if self._mismatch == "context" and spans:
            return tokens, spans, (NOTE_CONTEXT,), None
        turn = failed[0]
        detail = self._seams.describe(row.text[: turn.prompt], row.text)
        return tokens, spans, (), RowProblem(REASON, f"message {turn.number}: {detail}")


_NONE: NDArray[np.int32] = np.zeros((0, 2), dtype=np.int32)


def _offsets(tokens: Tokenised) -> NDArray[np.int32]:
    return np.asarray(tokens.offsets, dtype=np.int32).reshape(-1, 2)


def _given(tokens: tuple[list[int], list[bool]]) -> Encoded:
    """A row that was tokenised elsewhere."""
    ids, trained = tokens
    trained_T = np.asarray(trained, dtype=np.bool_)
    trained_T[:1] = False
    return Encoded(np.asarray(ids, dtype=np.int32), trained_T, np.zeros((len(ids), 2), dtype=np.int32))


def _is_plain_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a call of the tokenizer is one of its backend: some classes change the text in Python before."""
    from transformers import PreTrainedTokenizerFast

    own, base = type(tokenizer), PreTrainedTokenizerFast
    return all(getattr(own, name, None) is getattr(base, name) for name in ("__call__", "_encode_plus"))
