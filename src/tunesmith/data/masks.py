"""Which characters of a rendered conversation train: whose turns, from where to where, with which end.

Where a turn starts and ends:

- It starts behind its header. For the assistant that is the text which a generation prompt puts there when the
  model is asked to answer, in order: the whole generation prompt; its leading whole lines, longest first (a
  prompt that opens a thinking block, in front of a turn without one); what stands before the answer in a probe,
  if that is more than blanks. For other roles only the last. A turn that begins with none of them is supervised
  from its first character.
- It ends behind its last control token (a special or added token), if only blanks follow it in the turn; else
  with the turn. An EOS right behind the last turn belongs to it.
- `{% generation %}` blocks, where the template has them, are taken as they are.

A template may end an earlier turn with another token than the last one (harmony: `<|end|>`, `<|return|>`). The
model would learn to go on where it has to stop, so such an end is context.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tunesmith.data.chat import RowProblem
from tunesmith.data.template import ChatTemplate, Span, Trace

EndOfTurn = Literal["turn", "all", "last", "none"]
Message = dict[str, Any]

NOTE_END = "earlier turns end with another token than the last one: that token is context"

_ANSWER = "tunesmith answer"


@dataclass(frozen=True)
class MaskRule:
    """What trains.

    Attributes:
        train_on: `assistant`, `last` (the assistant's last turn), `all` (every token), or roles.
        end_of_turn: tokens that end a turn and train: those of the turns that train, of all turns, of the
            last trained turn, or none.
    """

    train_on: str | tuple[str, ...] = "assistant"
    end_of_turn: EndOfTurn = "turn"

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles whose turns train."""
        return self.train_on if isinstance(self.train_on, tuple) else ("assistant",)


class Turn(NamedTuple):
    """What of one message may train; a tuple, because every row makes some.

    Attributes:
        number: of the message.
        begin: where its header starts.
        start: where its text starts.
        stop: where the token that ends it starts; `end` where it has none.
        end: the character behind it.
        prompt: length of a server's prompt for it; at most `start`.
    """

    number: int
    begin: int
    start: int
    stop: int
    end: int
    prompt: int = -1


def chosen_messages(
    messages: Sequence[Mapping[str, Any]], rule: MaskRule, last_only: bool = False
) -> list[int]:
    """Numbers of the messages that train: by their own `train` or a weight of 0 where they have it, else by role."""
    everything = rule.train_on == "all"
    chosen = {n for n, message in enumerate(messages) if everything or message["role"] in rule.roles}
    for number, message in enumerate(messages):
        flag = message.get("train")
        if message.get("weight") == 0:
            flag = False
        if flag is not None:
            (chosen.add if flag else chosen.discard)(number)
    return sorted(chosen)[-1:] if last_only or rule.train_on == "last" else sorted(chosen)


class Masker:
    """Finds the turns that train in what one template writes.

    Args:
        template: the compiled template.
        variables: what every rendering gets, such as `bos_token`.
        rule: what trains.
        eos: the tokenizer's EOS.
        control: special and added tokens.
    """

    def __init__(
        self,
        template: ChatTemplate,
        variables: Mapping[str, Any],
        rule: MaskRule,
        eos: str | None,
        control: Sequence[str],
    ) -> None:
        self.rule = rule
        self._eos = eos
        self._control = tuple(control)
        self._known = frozenset(control)
        self._lengths = sorted({len(token) for token in control}, reverse=True)
        self._template = template
        self._variables = variables
        self._headers: dict[str, tuple[str, ...]] = {}
        self._earlier_end = self._find_earlier_end(template, variables)

    def headers(self, role: str) -> tuple[str, ...]:
        """What may stand in front of the text of a turn of this role; found out once."""
        if role not in self._headers:
            self._headers[role] = find_headers(self._template, self._variables, role)
        return self._headers[role]

    def _find_earlier_end(self, template: ChatTemplate, variables: Mapping[str, Any]) -> str:
        """The token that ends the assistant's turns but the last one, where it is another one."""
        talk: list[Message] = [
            {"role": role, "content": f"tunesmith {role}"} for role in ("user", "assistant") * 2
        ]
        try:
            trace = template.render(talk, variables=variables)
        except RowProblem:
            return ""
        first, last = (self._bounds(trace.text, talk, number, *trace.messages[number]) for number in (1, 3))
        ends = [trace.text[turn.stop : turn.end] for turn in (first, last)]
        return ends[0] if ends[0] and ends[1] and ends[0] != ends[1] else ""

    def turns(
        self, trace: Trace, messages: Sequence[Message], spans: Sequence[Span], chosen: Sequence[int]
    ) -> list[Turn]:
        """The turns of `chosen`, in order; spans of messages that are unknown are left out."""
        if trace.generation:
            return self._generation(trace, messages, spans, chosen)
        return [self._bounds(trace.text, messages, number, *spans[number]) for number in chosen]

    def _generation(
        self, trace: Trace, messages: Sequence[Message], spans: Sequence[Span], chosen: Sequence[int]
    ) -> list[Turn]:
        known = sorted((span, number) for number, span in enumerate(spans) if span[0] < span[1])
        assistants = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        turns = []
        for place, (start, end) in enumerate(merge(trace.generation)):
            before = bisect_right(known, ((start, 1 << 60), 0)) - 1
            if before >= 0 and start < known[before][0][1]:
                number = known[before][1]
            else:  # written outside a loop over the messages: in order
                number = assistants[min(place, len(assistants) - 1)]
            if number in chosen:
                turns.append(Turn(number, start, start, self._stop(trace.text, start, end), end))
        return turns

    def _bounds(self, text: str, messages: Sequence[Message], number: int, start: int, end: int) -> Turn:
        headers = self.headers(messages[number]["role"])
        header = next((header for header in headers if text.startswith(header, start, end)), "")
        body = text[start + len(header) : end]
        kept = body.rstrip()
        if number == len(messages) - 1 and self._eos and text.startswith(self._eos, end):
            end += len(self._eos)
        elif kept.endswith(self._control):
            end -= len(body) - len(kept)
        return Turn(number, start, start + len(header), self._stop(text, start + len(header), end), end)

    def _stop(self, text: str, start: int, end: int) -> int:
        for length in self._lengths:
            if length <= end - start and text[end - length : end] in self._known:
                return end - length
        return end

    def spans(
        self, trace: Trace, messages: Sequence[Message], spans: Sequence[Span], turns: Sequence[Turn]
    ) -> tuple[list[Span], tuple[str, ...]]:
        """Supervised characters of the trained turns, and notes."""
        text, rule = trace.text, self.rule.end_of_turn
        notes: tuple[str, ...] = ()
        supervised = []
        for place, turn in enumerate(turns):
            with_end = rule in ("turn", "all") or (rule == "last" and place == len(turns) - 1)
            earlier = bool(self._earlier_end) and turn.number < len(messages) - 1
            if with_end and earlier and text[turn.stop : turn.end] == self._earlier_end:
                with_end, notes = False, (NOTE_END,)
            supervised.append((turn.start, turn.end if with_end else turn.stop))
        if rule == "all":
            for number, (start, end) in enumerate(spans):
                if start < end:
                    turn = self._bounds(text, messages, number, start, end)
                    supervised.append((turn.stop, turn.end))
        return merge(supervised), notes


def prompted(turn: Turn, prompt: int) -> Turn:
    """The turn behind a server's prompt of this length, which may reach into its text."""
    start = max(turn.start, prompt)
    return Turn(turn.number, turn.begin, start, max(start, turn.stop), max(start, turn.end), prompt)


def merge(spans: Iterable[Span]) -> list[Span]:
    """The same characters as spans in order that neither are empty nor overlap."""
    merged: list[Span] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def find_headers(template: ChatTemplate, variables: Mapping[str, Any], role: str) -> tuple[str, ...]:
    """What may stand in front of a role's text in its turn, in the order in which it is tried."""
    question: Message = {"role": "user", "content": "tunesmith question"}
    headers: list[str] = []
    if role == "assistant":
        try:
            without = template.render([question], variables=variables).text
            prompted = template.render([question], variables=variables, add_generation_prompt=True).text
            prompt = prompted.removeprefix(without) if prompted.startswith(without) else ""
            lines = prompt.splitlines(keepends=True)
            headers = ["".join(lines[:count]) for count in range(len(lines), 0, -1)]
        except RowProblem:
            pass  # a template that refuses the probe has no generation prompt to go by
    probes: dict[str, list[Message]] = {
        "assistant": [question],
        "user": [question, {"role": "assistant", "content": "tunesmith"}],
        "tool": [question, {"role": "assistant", "content": "tunesmith"}],
    }
    talk = [*probes.get(role, []), {"role": role, "content": _ANSWER}]
    try:
        trace = template.render(talk, variables=variables)
        start, end = trace.messages[-1]
        answer = trace.text.find(_ANSWER, start, end)
        if answer >= 0:
            headers.append(trace.text[start:answer])
    except RowProblem:
        pass  # as above
    return tuple(dict.fromkeys(header for header in headers if header.strip()))
