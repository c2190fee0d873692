"""Preference data as people publish it before anybody makes pairs of it: compared answers, and scored ones.

Each row becomes a pair, as a row of `preference`. Of several scored answers the best and the worst make the pair:
it is the same in every run, and the pair that is least likely to be an accident of the scores. Rejected: all pairs of
a row. A prompt with four answers would count six times as much as one with two.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from tunesmith.data.formats.contract import Column, Conversation, Format, Preference, has, need, take
from tunesmith.data.formats.instruction import SYSTEM, untrained
from tunesmith.data.formats.preference import CHOSEN_FORMAT, PREFERENCE, PREFERENCE_FORMAT, convert_preference
from tunesmith.data.reading import AS_USUAL, Reading, RowProblem, as_number, first_of, parse_json

_ASKED = ("history", "question", "query", "instruction", "input", "problem")
_COMPARED = {
    "first": Column(
        True,
        "an answer, or a conversation that ends with it",
        ("human_ref_A", "response_0", "answer_0", "response_a", "conversation_a"),
    ),
    "second": Column(
        True,
        "another one",
        ("human_ref_B", "response_1", "answer_1", "response_b", "conversation_b"),
    ),
    "prompt": Column(False, "what both answer", _ASKED),
    "better": Column(
        False,
        "which of them is better, in a word, or 0 for the first and 1 for the second",
        ("winner", "better_response_id"),
    ),
    "first_is_better": Column(False, "1 where the first is, 0 where the second is", ("labels",)),
    "score_first": Column(False, "a score of the first", ("score_A", "score_0")),
    "score_second": Column(False, "a score of the second", ("score_B", "score_1")),
    "system": SYSTEM,
    "tools": PREFERENCE["tools"],
}
_SCORED = {
    "prompt": Column(True, "what is answered", _ASKED[1:]),
    "completions": Column(
        True, "list of answers: texts, or objects with a score each", ("responses", "answers")
    ),
    "scores": Column(False, "list of their scores, where the answers are texts", ("ratings",)),
    "system": SYSTEM,
    "tools": PREFERENCE["tools"],
}
_BETTER: dict[str, bool | None] = {
    "first": True, "a": True, "model_a": True, "0": True, "second": False, "b": False, "model_b": False, "1": False,
    "tie": None, "tie (bothbad)": None, "both_bad": None,
}  # fmt: skip
"""What sets call the better answer, and whether it is the first; None where neither is."""
_ANSWERS = ("response", "answer", "text", "content", "completion", "output")
_SCORES = ("score", "fine-grained_score", "overall_score", "rating", "reward")
_RANK = "rank"
"""Of an answer, 1 for the best."""


def _first_wins(record: Mapping[str, Any]) -> bool:
    """Whether the first answer is better.

    Raises:
        RowProblem: "no preference" where neither is, "bad label" where it is said in unknown words.
    """
    said, counted = take(record, _COMPARED, "better"), take(record, _COMPARED, "first_is_better")
    if said is None and counted is None:
        scores = [take(record, _COMPARED, name) for name in ("score_first", "score_second")]
        if None in scores:
            raise RowProblem("missing column", "better")
        first, second = (as_number(score, "bad label", "a score") for score in scores)
        if first == second:
            raise RowProblem("no preference", "both answers have the same score")
        return first > second
    if said is None:
        first = int(counted) if isinstance(counted, bool) else counted
        said = {0.0: 1, 1.0: 0}.get(as_number(first, "bad label", "first_is_better"), counted)
    whole = isinstance(said, bool) or (isinstance(said, float) and said.is_integer())
    name = str(int(said) if whole else said).strip().casefold()
    if name not in _BETTER:
        raise RowProblem("bad label", f"better is {name[:40]!r}")
    wins = _BETTER[name]
    if wins is None:
        raise RowProblem("no preference", "neither answer is better")
    return wins


def _convert_compared(record: Mapping[str, Any], reading: Reading = AS_USUAL, /) -> Preference:
    answers = need(record, _COMPARED, "first"), need(record, _COMPARED, "second")
    wins = _first_wins(record)
    scores = [take(record, _COMPARED, name) for name in ("score_first", "score_second")]
    margin = None
    if None not in scores:
        values = [as_number(score, "bad margin", "a score") for score in scores]
        margin = values[0] - values[1] if wins else values[1] - values[0]
    return _pair(record, _COMPARED, answers if wins else answers[::-1], margin, reading)


def _convert_scored(record: Mapping[str, Any], reading: Reading = AS_USUAL, /) -> Preference:
    listed = parse_json(need(record, _SCORED, "completions"), "malformed answers", "completions")
    scores = parse_json(take(record, _SCORED, "scores"), "malformed answers", "scores")
    if not isinstance(listed, list) or (scores is not None and not isinstance(scores, list)):
        raise RowProblem("malformed answers", "the answers or their scores are not a list")
    if scores is not None and len(scores) != len(listed):
        raise RowProblem("malformed answers", f"{len(listed)} answers have {len(scores)} scores")
    rated = [_rated(one, scores[n] if scores is not None else None, n) for n, one in enumerate(listed)]
    if len(rated) < 2:
        raise RowProblem("no preference", "there are no two answers")
    # of equal ones the first, so that a row is the same pair in every run
    best, worst = max(rated, key=lambda one: one[0]), min(rated, key=lambda one: one[0])
    if best[0] == worst[0]:
        raise RowProblem("no preference", "all answers have the same score")
    return _pair(record, _SCORED, (best[1], worst[1]), best[0] - worst[0], reading)


def _rated(answer: Any, score: Any, number: int) -> tuple[float, Any]:
    """Score and text of an answer."""
    if isinstance(answer, Mapping):
        if score is None:
            score = first_of(answer, _SCORES)
        if score is None and answer.get(_RANK) is not None:
            score = -as_number(answer[_RANK], "malformed answers", f"the rank of answer {number}")
        answer = first_of(answer, _ANSWERS)
    if score is None or answer is None:
        raise RowProblem(
            "malformed answers", f"answer {number} has no {'score' if answer is not None else 'text'}"
        )
    if isinstance(score, str):
        try:
            score = float(score)
        except ValueError:
            raise RowProblem("malformed answers", f"the score of answer {number} is no number") from None
    return as_number(score, "malformed answers", f"the score of answer {number}"), answer


def _pair(
    record: Mapping[str, Any],
    columns: Mapping[str, Column],
    answers: tuple[Any, Any],
    margin: float | None,
    reading: Reading,
) -> Preference:
    """The row as one of `preference`."""
    named = {name: take(record, columns, name) for name in ("prompt", "system", "tools")}
    asked = named["prompt"]
    if isinstance(asked, Mapping) and isinstance(asked.get("full_text"), str):
        named["prompt"] = asked["full_text"]  # WebGPT's questions
    pair = {**named, "chosen": answers[0], "rejected": answers[1], "margin": margin}
    return convert_preference({key: value for key, value in pair.items() if value is not None}, reading)


def _detect_compared(keys: Collection[str]) -> bool:
    told = has(keys, _COMPARED, "better") or has(keys, _COMPARED, "first_is_better")
    rated = has(keys, _COMPARED, "score_first") and has(keys, _COMPARED, "score_second")
    return has(keys, _COMPARED, "first") and has(keys, _COMPARED, "second") and (told or rated)


def _detect_scored(keys: Collection[str]) -> bool:
    # the other names of `completions` are those of other things, too, such as the answers of SQuAD
    return has(keys, _SCORED, "prompt") and "completions" in keys and "labels" not in keys


COMPARED_FORMAT = Format(
    "compared",
    Preference,
    "two answers, and which of them is better",
    _COMPARED,
    _detect_compared,
    _convert_compared,
    {"history": "What is 6 times 7?", "human_ref_A": "About 40.", "human_ref_B": "42", "labels": 0},
    instead=PREFERENCE_FORMAT.instead,
)
SCORED_FORMAT = Format(
    "scored",
    Preference,
    "several answers with a score each; the best and the worst make a pair",
    _SCORED,
    _detect_scored,
    _convert_scored,
    {
        "instruction": "What is 6 times 7?",
        "completions": [
            {"response": "42", "overall_score": 9},
            {"response": "About 40.", "overall_score": 3},
        ],
    },
    instead=PREFERENCE_FORMAT.instead,
)
_PAIRS = (PREFERENCE_FORMAT, COMPARED_FORMAT, SCORED_FORMAT)


def chosen_format(keys: Collection[str]) -> Format:
    """`chosen` for rows with these columns: of whichever layout of pairs they are, the better answer trains."""
    pairs = next((row for row in _PAIRS if row.detect(keys)), None)
    if pairs is None and has(keys, _SCORED, "completions") and has(keys, _SCORED, "prompt"):
        pairs = SCORED_FORMAT
    if pairs is None or pairs is PREFERENCE_FORMAT:
        return CHOSEN_FORMAT

    def better(record: Mapping[str, Any], reading: Reading = AS_USUAL, /) -> Conversation:
        pair = pairs.convert(record, reading)
        assert isinstance(pair, Preference), "a layout of pairs gives pairs"
        return Conversation(untrained(pair.prompt) + pair.chosen, pair.tools)

    return replace(CHOSEN_FORMAT, columns=pairs.columns, convert=better)
