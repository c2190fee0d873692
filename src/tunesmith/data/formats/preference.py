"""Rows that hold worse answers, judged answers or none: data for objectives that compare or reward.

A run that imitates answers refuses them, unless a format says which answers to imitate: `chosen` the better
one of each pair, `approved` those labelled good. Their prompts are context: who preferred an answer did not
judge the turns before it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from tunesmith.data.chat import read_tools
from tunesmith.data.formats.contract import (
    Column,
    Conversation,
    Format,
    Labelled,
    Message,
    Preference,
    Prompt,
    Stepwise,
    has,
    need,
    never,
    prefers,
    take,
)
from tunesmith.data.formats.conversation import CHAT, convert_chat, with_system
from tunesmith.data.formats.instruction import (
    ALPACA,
    PAIR,
    SYSTEM,
    convert_alpaca,
    convert_pair,
    detect_pair,
    read_side,
    refuse_empty,
    system_message,
    untrained,
)
from tunesmith.data.reading import AS_USUAL, Reading, RowProblem, as_flag, as_number, as_text, parse_json

_ASKED = (
    "question", "query", "instruction", "input", "problem", "messages", "conversations", "conversation",
)  # fmt: skip
_TOOLS = CHAT["tools"]
PREFERENCE = {
    "chosen": Column(
        True,
        "the better answer, or a conversation that ends with it",
        ("chosen_messages", "chosen_response", "preferred_output", "response_j"),
    ),
    "rejected": Column(
        True,
        "the worse answer, or a conversation that ends with it",
        ("rejected_messages", "rejected_response", "non_preferred_output", "response_k"),
    ),
    "prompt": Column(False, "what both answer; without it, what both conversations begin with", _ASKED),
    "system": SYSTEM,
    "tools": _TOOLS,
    "margin": Column(False, "by how much the first is better"),
    "score_chosen": Column(False, "a score of the better answer; the margin is the difference"),
    "score_rejected": Column(False, "a score of the worse answer"),
}
_LABELLED = {
    "label": Column(True, "whether the answer is a good one", ("kto_tag",)),
    "messages": Column(False, "a conversation that ends with the answer", CHAT["messages"].aliases),
    "prompt": Column(False, "what the answer is for", PAIR["prompt"].aliases),
    "response": Column(False, "the answer", PAIR["response"].aliases),
    "context": PAIR["context"],
    "history": ALPACA["history"],
    "system": SYSTEM,
    "tools": _TOOLS,
}
_STEPWISE = {
    "prompt": Column(True, "what is to be solved", ("question", "query", "instruction", "problem")),
    "completions": Column(True, "list of the steps", ("steps",)),
    "labels": Column(True, "list that says of each step whether it is right"),
    "system": SYSTEM,
}
_PROMPT = {
    "prompt": Column(
        True,
        "what is asked, a text or a list of messages",
        ("question", "query", "instruction", "problem", "messages", "conversations"),
    ),
    "system": SYSTEM,
    "tools": _TOOLS,
}
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


# ---------------------------------------------------------------- sides


def _hh_messages(text: str) -> list[Message] | None:
    """Turns of a text in the layout of HH-RLHF, `\\n\\nHuman: ...\\n\\nAssistant: ...`; None where it is none."""
    if not text.lstrip().startswith("Human:"):
        return None
    pieces = _HH_TURN.split("\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[name], "content": body.strip()}
        for name, body in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def _side(value: Any, role: str, what: str, reading: Reading) -> list[Message]:
    """A prompt or an answer as messages, whatever it is written in."""
    if isinstance(value, str):
        if value.lstrip().startswith("[{"):
            with contextlib.suppress(RowProblem):  # it may be a text that begins like a list
                value = parse_json(value, "not text", what)
        else:
            turns = _hh_messages(value)
            if turns is not None:
                return turns
    return read_side(value, role, what, reading)


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages both begin with; the next one is an assistant's on both sides.

    Raises:
        RowProblem: "no common prompt".
    """
    most = min(len(chosen), len(rejected)) - 1
    count = next((n for n in range(most) if not _alike(chosen[n], rejected[n])), most)
    while count > 0 and "tool" in (chosen[count]["role"], rejected[count]["role"]):
        count -= 1  # the same call with other results: the answers begin with the call
    if chosen[count]["role"] != "assistant" or rejected[count]["role"] != "assistant":
        raise RowProblem("no common prompt", "the answers are to different prompts")
    return count


def _alike(one: Message, other: Message) -> bool:
    """Whether two messages say the same; how they would train does not matter."""
    keys = (one.keys() | other.keys()) - {"train", "weight"}
    return all(one.get(key) == other.get(key) for key in keys)


def _shared_text(chosen: str, rejected: str) -> str:
    """What two texts begin with, up to the last blank of it."""
    most = min(len(chosen), len(rejected))
    count = next((n for n in range(most) if chosen[n] != rejected[n]), most)
    return chosen[: max(chosen.rfind(blank, 0, count) for blank in " \n") + 1]


def _bare(chosen: str, rejected: str) -> tuple[list[Message], list[Message], list[Message]]:
    prompt = _shared_text(chosen, rejected)
    if not prompt.strip():
        raise RowProblem("no common prompt", "the answers have no prompt and begin differently")
    answers = [[{"role": "assistant", "content": text[len(prompt) :]}] for text in (chosen, rejected)]
    return [{"role": "user", "content": prompt.strip()}], answers[0], answers[1]


def _split(
    record: Mapping[str, Any], reading: Reading
) -> tuple[list[Message], list[Message], list[Message], Any]:
    """Prompt, better and worse answer, and tools that stand inside the prompt."""
    raw = [need(record, PREFERENCE, name) for name in ("chosen", "rejected")]
    chosen, rejected = (
        _side(value, "assistant", name, reading)
        for value, name in zip(raw, ("chosen", "rejected"), strict=True)
    )
    asked = take(record, PREFERENCE, "prompt")
    tools = asked.get("tools") if isinstance(asked, Mapping) else None
    if asked is None and all(isinstance(value, str) for value in raw) and len(chosen) == len(rejected) == 1:
        return *_bare(*(messages[0]["content"] for messages in (chosen, rejected))), tools
    whole = bool(chosen) and bool(rejected) and "assistant" not in (chosen[0]["role"], rejected[0]["role"])
    if whole:
        for messages, name in ((chosen, "chosen"), (rejected, "rejected")):
            refuse_empty(messages, name)
        count = _shared(chosen, rejected)
        if count == 0:
            raise RowProblem("no common prompt", "the answers are to different prompts")
        return chosen[:count], chosen[count:], rejected[count:], tools
    if asked is None:
        raise RowProblem("missing column", "prompt")
    return _side(asked, "user", "prompt", reading), chosen, rejected, tools


def _margin(record: Mapping[str, Any]) -> float | None:
    if record.get("margin") is not None:
        return as_number(record["margin"], "bad margin", "margin")
    scores = [record.get("score_chosen"), record.get("score_rejected")]
    if any(score is None for score in scores):
        return None
    better, worse = (as_number(score, "bad margin", "a score") for score in scores)
    return better - worse


# ---------------------------------------------------------------- formats


def _detect_preference(keys: Collection[str]) -> bool:
    return has(keys, PREFERENCE, "chosen") and has(keys, PREFERENCE, "rejected")


def convert_preference(record: Mapping[str, Any], reading: Reading = AS_USUAL, /) -> Preference:
    """A row with a better and a worse answer as a pair."""
    prompt, chosen, rejected, tools = _split(record, reading)
    refuse_empty(chosen, "chosen")
    refuse_empty(rejected, "rejected")
    if len(chosen) == len(rejected) and all(map(_alike, chosen, rejected)):
        raise RowProblem("same answers", "chosen and rejected do not differ")
    prompt = with_system(system_message(record, PREFERENCE), prompt)
    tools = read_tools(take(record, PREFERENCE, "tools") or tools)
    return Preference(prompt, chosen, rejected, tools, _margin(record))


def _convert_chosen(record: Mapping[str, Any], reading: Reading = AS_USUAL, /) -> Conversation:
    pair = convert_preference(record, reading)
    return Conversation(untrained(pair.prompt) + pair.chosen, pair.tools)


def _detect_labelled(keys: Collection[str]) -> bool:
    without = [key for key in keys if key not in ("label", "kto_tag")]
    answered = (
        has(without, CHAT, "messages") or detect_pair(without) or {"instruction", "output"} <= {*without}
    )
    return has(keys, _LABELLED, "label") and answered and not prefers(without)


def _convert_labelled(record: Mapping[str, Any], reading: Reading = AS_USUAL, /) -> Labelled:
    label = as_flag(need(record, _LABELLED, "label"), "bad label", "label")
    if take(record, _LABELLED, "messages") is not None:
        conversation = convert_chat(record, reading)
    elif record.get("instruction") is not None and record.get("output") is not None:
        conversation = convert_alpaca(record, reading)
    else:
        conversation = convert_pair(record, reading)
    messages = conversation.messages
    refuse_empty(messages, "the conversation")
    answer = len(messages) - 1
    while answer > 0 and messages[answer - 1]["role"] in ("assistant", "tool"):
        answer -= 1
    tools = conversation.tools or read_tools(take(record, _LABELLED, "tools"))
    return Labelled(messages[:answer], messages[answer:], label, tools)


def _convert_approved(record: Mapping[str, Any], reading: Reading = AS_USUAL, /) -> Conversation:
    row = _convert_labelled(record, reading)
    if not row.label:
        raise RowProblem("labelled bad")
    return Conversation(untrained(row.prompt) + row.answer, row.tools)


def _detect_stepwise(keys: Collection[str]) -> bool:
    return all(has(keys, _STEPWISE, name) for name in ("prompt", "completions", "labels"))


def _convert_stepwise(record: Mapping[str, Any], reading: Reading = AS_USUAL, /) -> Stepwise:
    steps, labels = (
        parse_json(need(record, _STEPWISE, name), "malformed steps", name)
        for name in ("completions", "labels")
    )
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels):
        raise RowProblem("malformed steps", "completions and labels are not lists of one length")
    if not steps:
        raise RowProblem("empty answer", "there are no steps")
    prompt = _side(need(record, _STEPWISE, "prompt"), "user", "prompt", reading)
    return Stepwise(
        with_system(system_message(record, _STEPWISE), prompt),
        [as_text(step, f"step {number}") for number, step in enumerate(steps)],
        [as_flag(label, "bad label", f"the label of step {number}") for number, label in enumerate(labels)],
    )


def _detect_prompt(keys: Collection[str]) -> bool:
    answered = has(keys, PAIR, "response") or "text" in keys or has(keys, _STEPWISE, "completions")
    return "prompt" in keys and not answered and not has(keys, CHAT, "messages") and not prefers(keys)


def _convert_prompt(record: Mapping[str, Any], reading: Reading = AS_USUAL, /) -> Prompt:
    raw = need(record, _PROMPT, "prompt")
    if raw == []:
        raise RowProblem("no messages", "prompt")
    prompt = _side(raw, "user", "prompt", reading)
    if not prompt[-1]["content"].strip():
        raise RowProblem("empty prompt")
    own = next(name for name in ("prompt", *_PROMPT["prompt"].aliases) if record.get(name) is not None)
    used = {own, "tools", "functions", "system", *SYSTEM.aliases}
    rest = {key: value for key, value in record.items() if key not in used}
    system = system_message(record, _PROMPT)
    return Prompt(with_system(system, prompt), read_tools(take(record, _PROMPT, "tools")), rest)


_PAIR_EXAMPLE = {"prompt": "What is 6 times 7?", "chosen": "42", "rejected": "About 40."}
_LABEL_EXAMPLE = {"prompt": "What is 6 times 7?", "completion": "42", "label": True}

PREFERENCE_FORMAT = Format(
    "preference",
    Preference,
    "a better and a worse answer, as texts, messages or conversations",
    PREFERENCE,
    _detect_preference,
    convert_preference,
    _PAIR_EXAMPLE,
    instead="`format: chosen` trains on the better answer of each row.",
)
CHOSEN_FORMAT = Format(
    "chosen",
    Conversation,
    "rows of `preference`, `compared` or `scored`, of which the better answer trains",
    PREFERENCE,
    never,
    _convert_chosen,
    _PAIR_EXAMPLE,
)
LABELLED_FORMAT = Format(
    "labelled",
    Labelled,
    "an answer, and whether it is a good one",
    _LABELLED,
    _detect_labelled,
    _convert_labelled,
    _LABEL_EXAMPLE,
    instead="`format: approved` trains on the answers that are labelled good.",
)
APPROVED_FORMAT = Format(
    "approved",
    Conversation,
    "rows of `labelled`, of which the answers labelled good train",
    _LABELLED,
    never,
    _convert_approved,
    _LABEL_EXAMPLE,
)
STEPWISE_FORMAT = Format(
    "stepwise",
    Stepwise,
    "steps of an answer, and for each whether it is right",
    _STEPWISE,
    _detect_stepwise,
    _convert_stepwise,
    {
        "prompt": "6 times 7 plus 1?",
        "completions": ["6 times 7 is 42.", "Plus 1 is 44."],
        "labels": [True, False],
    },
)
PROMPT_FORMAT = Format(
    "prompt",
    Prompt,
    "a prompt without an answer; the other columns are for a reward",
    _PROMPT,
    _detect_prompt,
    _convert_prompt,
    {"prompt": "What is 6 times 7?", "ground_truth": "42"},
)
