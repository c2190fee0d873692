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
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.contracts.errors import DataError
from tunesmith.data.adapt import Message, adapt, probe
from tunesmith.data.chat import RowProblem
from tunesmith.data.control import ControlText
from tunesmith.data.encoder import Encoder, Mismatch
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
from tunesmith.data.rendered import NOTE_SOME as NOTE_SOME
from tunesmith.data.rendered import NOTE_SPLIT as NOTE_SPLIT
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
)
from tunesmith.data.seams import Seams
from tunesmith.data.template import CHATML, FIXED_DATE, ChatTemplate, Span, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE_VERSION = 3
"""Raise it when the same row would become other tokens: it invalidates every cached table."""


class Renderer:
    """Renders rows with one tokenizer and one chat template.

    Args:
        tokenizer: a fast tokenizer.
        template: text of the chat template; None where there are no conversations.
        train_on: the assistant's turns (`assistant`), its last one (`last`), every token (`all`), or roles.
        end_of_turn: which tokens that end a turn train: of the turns that train, of all, of the last, of none.
        prefix_mismatch: what becomes of a turn whose prompt is not the beginning of the row: the row is refused,
            the turn is context, it trains, or the row is split into one document for each turn (`documents`).
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
        prefix_mismatch: Mismatch | Literal["split"] = "refuse",
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
        self._variables = dict(tokenizer.special_tokens_map)
        added = list(tokenizer.added_tokens_decoder.values())
        control = {str(token) for token in added} | {self._eos or ""}
        self._control = tuple(token for token in control if token.strip())
        special = [str(token) for token in added if token.special]
        self._literal = ControlText([] if allow_control_tokens else special)
        seams = Seams(tokenizer, self._control)
        # a turn in the middle of a document whose tokens merge with its prompt's cannot be mended by a split
        within = "context" if prefix_mismatch == "split" else prefix_mismatch
        self.encoder = Encoder(tokenizer, seams, self._control, within)
        self.template = ChatTemplate(template, self._date) if template is not None else None
        if self.template is not None:
            self._can = probe(self.template, self._variables)
            self._masker = Masker(self.template, self._variables, self.rule, self._eos, self._control)
            self._proof = PrefixProof(self.template, self._variables, seams.describe)
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

    def prompt(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """What a server would show the model to have it answer `messages`.

        Args:
            tools: signatures of the tools that it may call.

        Raises:
            RowProblem: "template error".
            DataError: there is no chat template.
        """
        if self.template is None:
            raise DataError("There is no chat template to write a prompt with.")
        adapted, tools, _ = adapt(Conversation(list(messages), tools), self._can)
        return self.template.render(
            adapted, tools=tools, variables=self._variables, add_generation_prompt=True
        ).text

    def fingerprint(self) -> str:
        """SHA-256 over all that decides which tokens a row becomes."""
        dated = self.template is not None and "strftime_now" in self.template.names
        parts = {
            "version": CODE_VERSION,
            "template": self.template.source if self.template is not None else None,
            "date": str(self._date) if dated else None,
            "train_on": self.train_on,
            "end_of_turn": self.rule.end_of_turn,
            "prefix_mismatch": self._mismatch,
            "literal": self._literal.strings,
            "backend": _backend_digest(self.tokenizer.backend_tokenizer.to_str()),
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

    def documents(self, item: Conversation | Text | Segments | Tokens) -> list[Rendered]:
        """The documents of a row: one, or several where `prefix_mismatch` is `split` and one would not hold.

        One does not hold where a turn's prompt is not its beginning, or where the template leaves out the reasoning
        of a turn that trains. Then the turns behind each question are a document that ends with the last of them,
        as a server shows it, and each turn one where that does not hold either.

        Raises:
            RowProblem, DataError: as `render`.
        """
        if self._mismatch != "split" or not isinstance(item, Conversation):
            return [self.render(item)]
        chosen = chosen_messages(item.messages, self.rule, item.train_last_only)
        whole = self._holding(item)
        if whole is not None:
            return [whole]
        questions = list(accumulate(int(message["role"] == "user") for message in item.messages))
        turns = [list(group) for _, group in groupby(chosen, key=questions.__getitem__)]
        documents = [text for numbers in turns for text in self._turns(item, numbers)]
        return [replace(text, notes=(*text.notes, NOTE_SPLIT)) for text in documents]

    def _holding(self, item: Conversation) -> Rendered | None:
        """The row as one document; None where it does not hold."""
        try:
            text = self.render(item)
        except RowProblem as problem:
            if problem.reason != REASON:
                raise
            return None
        return None if NOTE_THINKING in text.notes else text

    def _turns(self, item: Conversation, numbers: Sequence[int]) -> list[Rendered]:
        """Some turns in one document that ends with the last of them, or each in its own."""
        messages = [
            {**message, "train": number in numbers}
            for number, message in enumerate(item.messages[: numbers[-1] + 1])
        ]
        part = Conversation(messages, item.tools)
        if len(numbers) == 1:
            return [self.render(part)]
        together = self._holding(part)
        if together is not None:
            return [together]
        return [text for number in numbers for text in self._turns(item, [number])]

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
            elif self._mismatch in ("refuse", "split") or (
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
        """Tokens and mask of many rows, with the characters of each token.

        Plain text gets the tokenizer's own special tokens, and EOS at its end if it has none there.
        """
        batch = self.encoder.start(rendered, with_offsets=True)
        return self.encoder.finish(batch, batch.encode(), with_offsets=True)


def _backend_digest(text: str) -> str:
    """SHA-256 of a tokenizer as JSON, without what whoever called it last has set: truncation and padding.

    They stand in front of the added tokens, and a quoted key cannot stand inside of a JSON string. Parsing the
    vocabulary to leave them out costs 0.3 s.
    """
    start, end = text.find('"truncation":'), text.find('"added_tokens":')
    assert 0 <= start < end, "a tokenizer is written in another order"
    digest = hashlib.sha256(text[:start].encode())
    digest.update(text[end:].encode())
    return digest.hexdigest()
