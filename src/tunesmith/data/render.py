"""From what a row says to tokens and their loss mask, both out of one rendering.

The text of a conversation is exactly what `tokenizer.apply_chat_template` writes. Its supervised part is
known by character (see `template.py` and `masks.py`), the fast tokenizer gives the characters of each token, and
a token trains where it starts inside a supervised span. One pass, linear in the conversation. Rejected: rendering
every prefix (quadratic), and looking for the tokens of a header (a user can quote it).

Two truths are held in every row: what a server shows the model before an answer is the beginning of the row
(`proof.py` for the text, `seams.py` for the tokens), and control tokens in the text of users and tools stay text
(`control.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tunesmith.contracts.errors import DataError
from tunesmith.data.adapt import Message, adapt, probe
from tunesmith.data.chat import RowProblem
from tunesmith.data.control import ControlText
from tunesmith.data.formats import Conversation, Segments, Text, Tokens
from tunesmith.data.hidden_turns import HiddenTurns
from tunesmith.data.masks import NOTE_END as NOTE_END
from tunesmith.data.masks import EndOfTurn, Masker, MaskRule, Turn, chosen_messages, prompted
from tunesmith.data.named_templates import missing_control
from tunesmith.data.named_templates import resolve_template as resolve_template
from tunesmith.data.proof import REASON, PrefixProof
from tunesmith.data.rendered import NOTE_ALLOWED as NOTE_ALLOWED
from tunesmith.data.rendered import NOTE_CHATML as NOTE_CHATML
from tunesmith.data.rendered import NOTE_CONTEXT as NOTE_CONTEXT
from tunesmith.data.rendered import NOTE_CUT as NOTE_CUT
from tunesmith.data.rendered import NOTE_DATE as NOTE_DATE
from tunesmith.data.rendered import NOTE_LITERAL as NOTE_LITERAL
from tunesmith.data.rendered import NOTE_PREFIXES as NOTE_PREFIXES
from tunesmith.data.rendered import NOTE_THINKING as NOTE_THINKING
from tunesmith.data.rendered import NOTE_WEIGHT as NOTE_WEIGHT
from tunesmith.data.rendered import Encoded as Encoded
from tunesmith.data.rendered import Rendered as Rendered
from tunesmith.data.rendered import (
    join,
    lost_reasoning,
    take_flags,
    without,
    without_surrogates,
    without_turns,
)
from tunesmith.data.seams import Offsets, Seams
from tunesmith.data.template import CHATML, FIXED_DATE, ChatTemplate, Span, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE_VERSION = 2
"""Raise it when the same row would become other tokens: it invalidates every cached table."""

Mismatch = Literal["refuse", "context", "allow"]


class Renderer:
    """Renders rows with one tokenizer and one chat template.

    Args:
        tokenizer: a fast tokenizer.
        template: text of the chat template; None where there are no conversations.
        train_on: the assistant's turns (`assistant`), its last one (`last`), every token (`all`), or roles.
        end_of_turn: which tokens that end a turn train: of the turns that train, of all, of the last, of none.
        prefix_mismatch: what becomes of a turn whose prompt is not the beginning of the row: the row is refused,
            the turn is context, or it trains.
        allow_control_tokens: control tokens in the text of users, tools and the system are control tokens.
        date: the day that a template writes, as year-month-day.

    Raises:
        DataError: where the tokenizer is not a fast one, or the template is not valid Jinja.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        train_on: str | Sequence[str] = "assistant",
        *,
        end_of_turn: EndOfTurn = "turn",
        prefix_mismatch: Mismatch = "refuse",
        allow_control_tokens: bool = False,
        date: str = FIXED_DATE,
    ) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which cannot tell the place of a token.",
                hint="Use a model that comes with tokenizer.json (a fast tokenizer).",
            )
        self.tokenizer = tokenizer
        self.rule = MaskRule(train_on if isinstance(train_on, str) else tuple(train_on), end_of_turn)
        self.train_on = self.rule.train_on
        self._mismatch = prefix_mismatch
        self._date = datetime.fromisoformat(date)
        self._eos = tokenizer.eos_token if isinstance(tokenizer.eos_token, str) else None
        self._eos_id = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else None
        self._variables = dict(tokenizer.special_tokens_map)
        added = list(tokenizer.added_tokens_decoder.values())
        control = {str(token) for token in added} | {self._eos or ""}
        self._control = tuple(token for token in control if token.strip())
        special = [str(token) for token in added if token.special]
        self._literal = ControlText([] if allow_control_tokens else special)
        self._seams = Seams(tokenizer, self._control)
        self._clean: bool | None = None
        self.template = ChatTemplate(template, self._date) if template is not None else None
        if self.template is not None:
            self._can = probe(self.template, self._variables)
            self._masker = Masker(self.template, self._variables, self.rule, self._eos, self._control)
            self._proof = PrefixProof(self.template, self._variables, self._seams.describe)
            self._hidden: HiddenTurns | None = None
            self._notes = tuple(self._constant_notes(self.template))

    def _constant_notes(self, template: ChatTemplate) -> Iterable[str]:
        missing = missing_control(template.source, self._control)
        if missing and template.source == CHATML:
            yield NOTE_CHATML
        elif missing:
            yield f"tokens of the template that this tokenizer lacks train as plain text: {', '.join(missing)}"
        if "strftime_now" in template.names:
            yield NOTE_DATE

    @property
    def template_source(self) -> str | None:
        """Text of the chat template, None where there is none."""
        return self.template.source if self.template is not None else None

    def prompt(self, messages: Sequence[Message]) -> str:
        """What a server would show the model to have it answer `messages`.

        Raises:
            RowProblem: "template error".
            DataError: there is no chat template.
        """
        if self.template is None:
            raise DataError("There is no chat template to write a prompt with.")
        return self.template.render(messages, variables=self._variables, add_generation_prompt=True).text

    def fingerprint(self) -> str:
        """SHA-256 over all that decides which tokens a row becomes."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for state in ("truncation", "padding"):  # set by whoever called the tokenizer last
            backend.pop(state, None)
        dated = self.template is not None and "strftime_now" in self.template.names
        parts = {
            "version": CODE_VERSION,
            "template": self.template.source if self.template is not None else None,
            "date": str(self._date) if dated else None,
            "train_on": self.train_on,
            "end_of_turn": self.rule.end_of_turn,
            "prefix_mismatch": self._mismatch,
            "literal": self._literal.strings,
            "backend": backend,
            "special": self._variables,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def render(self, item: Conversation | Text | Segments | Tokens) -> Rendered:
        """The text of a row and its supervised characters.

        Raises:
            RowProblem: "template error", "template gives no assistant span", or "prompt is not a prefix".
            DataError: for a conversation where there is no template.
        """
        if isinstance(item, Text):
            text = without_surrogates(item.text)
            return Rendered(text, [(0, len(text))], plain=True)
        if isinstance(item, Segments):
            return join(item)
        if isinstance(item, Tokens):
            return Rendered("", [], tokens=(item.ids, item.trained))
        if self.template is None:
            raise DataError("The data holds conversations, but there is no chat template.")
        hidden = self._literal.hide(item)
        messages, tools, notes = adapt(hidden, self._can)
        chosen = chosen_messages(messages, self.rule, item.train_last_only)
        notes = self._notes + notes + take_flags(messages)
        trace = self.template.render(messages, tools=tools, variables=self._variables)
        supervised, turns, spans, more = self._mask(trace, messages, tools, chosen)
        text = trace.text
        literal: list[Span] = []
        if hidden is not item:
            text, literal = self._literal.show(text)
            more += (NOTE_LITERAL,)
        # one character for one, so the spans stay true
        text = without_surrogates(text)
        return Rendered(text, supervised, spans, notes + more, turns=turns, literal=literal)

    def _mask(
        self,
        trace: Trace,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        chosen: list[int],
    ) -> tuple[list[Span], list[Turn], list[Span], tuple[str, ...]]:
        """Supervised characters, turns whose prompts are proved, spans of messages, notes."""
        spans = trace.messages
        notes: tuple[str, ...] = ()
        if self.train_on == "all":
            out = [spans[number] for number in range(len(messages)) if number not in chosen]
            return without(len(trace.text), out), [], spans, ()
        if not trace.generation and any(spans[number] == (0, 0) for number in chosen):
            spans, slow = self._find_hidden(trace.text, messages, tools, chosen)
            notes = (NOTE_PREFIXES,) if slow else ()
        turns = self._masker.turns(trace, messages, spans, chosen)
        turns, proved, more = self._prove(trace.text, messages, tools, turns)
        supervised, ends = self._masker.spans(trace, messages, spans, turns)
        return supervised, proved, spans, notes + more + ends

    def _find_hidden(
        self, text: str, messages: list[Message], tools: list[dict[str, Any]] | None, chosen: list[int]
    ) -> tuple[list[Span], bool]:
        assert self.template is not None, "turns are looked for without a template"
        if self._hidden is None:
            headers = self._masker.headers("assistant")
            self._hidden = HiddenTurns(self.template, self._variables, headers, self._eos)
        return self._hidden.spans(text, messages, tools, chosen)

    def _prove(
        self, text: str, messages: list[Message], tools: list[dict[str, Any]] | None, turns: list[Turn]
    ) -> tuple[list[Turn], list[Turn], tuple[str, ...]]:
        """All turns that train; the assistant's among them whose prompts begin the row; notes."""
        notes: list[str] = []
        asked = [turn for turn in turns if messages[turn.number]["role"] == "assistant"]
        kept = [turn for turn in turns if turn not in asked] if len(asked) < len(turns) else []
        proved = []
        for turn, prompt in zip(asked, self._proof.prompts(text, messages, tools, asked), strict=True):
            message = messages[turn.number]
            if lost_reasoning(message, text[turn.begin : turn.end]):
                notes.append(NOTE_THINKING)
            if not isinstance(prompt, RowProblem):
                proved.append(prompted(turn, prompt))
            elif self._mismatch == "refuse" or (
                self._mismatch == "context" and turn is asked[-1] and not proved and not kept
            ):
                raise prompt
            elif self._mismatch == "allow":
                kept.append(turn)
                notes.append(NOTE_ALLOWED)
            else:
                notes.append(NOTE_CONTEXT)
        return sorted(kept + proved), proved, tuple(dict.fromkeys(notes))

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Tokens and mask of many rows, with one call of the tokenizer for each kind of text.

        Plain text gets the tokenizer's own special tokens, and EOS at its end if it has none there.
        """
        encoded: dict[int, Encoded] = {}
        for number, row in enumerate(rendered):
            if row.tokens is not None:
                ids, trained = row.tokens
                trained_T = np.asarray(trained, dtype=np.bool_)
                trained_T[:1] = False
                offsets_T2 = np.zeros((len(ids), 2), dtype=np.int32)
                encoded[number] = Encoded(np.asarray(ids, dtype=np.int32), trained_T, offsets_T2)
            elif row.literal:
                encoded[number] = self._encode_literal(row)
        for plain in (False, True):
            numbers = [n for n, row in enumerate(rendered) if row.plain == plain and n not in encoded]
            if not numbers:
                continue
            batch = self.tokenizer(
                [rendered[number].text for number in numbers],
                add_special_tokens=plain,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            for number, ids, offsets in zip(
                numbers, batch["input_ids"], batch["offset_mapping"], strict=True
            ):
                encoded[number] = self._encode(rendered[number], ids, offsets)
        return [encoded[number] for number in range(len(rendered))]

    def _encode_literal(self, row: Rendered) -> Encoded:
        bounds = [place for span in row.literal for place in span]
        ids, offsets = self._seams.encode_pieces(row.text, bounds, row.literal)
        if self._is_clean():
            return self._encode(row, ids, offsets)
        detail = "this tokenizer cannot keep it plain text; data.allow_control_tokens lets it be one"
        problem = RowProblem("control token in text", detail)
        return replace(self._encode(row, ids, offsets), problem=problem)

    def _is_clean(self) -> bool:
        """Whether this tokenizer gives the same tokens in pieces; found out once, on a probe."""
        if self._clean is None:
            text = "tunesmith".join(["", *self._control[:4], "a b\n", *self._control[4:8], ""])
            spans = ControlText(self._control).spans(text)
            cuts = [place for span in spans for place in span]
            self._clean = self._seams.cuts_are_clean(text, [*cuts, text.index("a b")])
        return self._clean

    def _encode(self, row: Rendered, ids: list[int], offsets: Offsets) -> Encoded:
        if row.plain and self._eos_id is not None and ids[-1:] != [self._eos_id]:
            ids, offsets = [*ids, self._eos_id], [*offsets, (len(row.text), len(row.text))]
        spans = row.spans
        notes: tuple[str, ...] = ()
        problem: RowProblem | None = None
        failed = [turn for turn in row.turns if not self._seams.check(row.text, turn.prompt, ids, offsets)]
        if failed:
            ids, offsets, spans, notes, problem = self._mend(row, ids, offsets, failed)
        offsets_T2 = np.asarray(offsets, dtype=np.int32).reshape(-1, 2)
        if row.plain or spans == [(0, len(row.text))]:
            trained_T = np.ones(len(ids), dtype=np.bool_)
        else:
            # the bounds of all spans in a row: a position behind an odd number of them is inside one
            bounds = np.asarray(spans, dtype=np.int64).reshape(-1)
            trained_T = np.searchsorted(bounds, offsets_T2[:, 0], side="right") % 2 == 1
        trained_T[:1] = False
        return Encoded(np.asarray(ids, dtype=np.int32), trained_T, offsets_T2, notes, problem)

    def _mend(
        self, row: Rendered, ids: list[int], offsets: Offsets, failed: list[Turn]
    ) -> tuple[list[int], Offsets, list[Span], tuple[str, ...], RowProblem | None]:
        """What becomes of a row in which answers merge with the ends of their prompts.

        Behind the last prompt the tokens can be cut, because no later prompt tokenises that text again.
        """
        last = row.turns[-1]
        if failed == [last] and self._is_clean():
            bounds = [last.prompt, *[place for span in row.literal for place in span]]
            ids, offsets = self._seams.encode_pieces(row.text, bounds, row.literal)
            if self._seams.check(row.text, last.prompt, ids, offsets):
                return ids, offsets, row.spans, (NOTE_CUT,), None
        if self._mismatch == "allow":
            return ids, offsets, row.spans, (NOTE_ALLOWED,), None
        spans = without_turns(row.spans, failed)
        if self._mismatch == "context" and spans:
            return ids, offsets, spans, (NOTE_CONTEXT,), None
        turn = failed[0]
        detail = self._seams.describe(row.text[: turn.prompt], row.text)
        return ids, offsets, spans, (), RowProblem(REASON, f"message {turn.number}: {detail}")
