"""A conversation: what of it the model is shown, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.results import save_run
from tests.support.tiny import CHATML
from tunesmith.config.chat_session import ChatSession
from tunesmith.config.find_result import find_result
from tunesmith.config.load_result import Loaded, load_result
from tunesmith.contracts.errors import UserError
from tunesmith.models.generate import Sampling

CONTEXT = 128


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    refusing = CHATML.replace(
        "{% for message", "{% if messages[-1]['content'] == 'no' %}{{ raise_exception('not that') }}{% endif %}"
        "{% for message", 1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("chat") / "run"
    run = save_run(folder, template=refusing, base={"max_position_embeddings": CONTEXT})
    return load_result(find_result(str(run)))


def session(loaded: Loaded, **options: Any) -> ChatSession:
    return ChatSession(loaded, Sampling(max_tokens=16), **options)


def shown(chat: ChatSession, ids: list[int]) -> str:
    return chat.loaded.tokenizer.decode(ids)


def test_all_turns_are_shown_with_the_system_prompt(loaded: Loaded) -> None:
    chat = session(loaded, system="brief")
    chat.ask("one")
    chat.reply("two")
    prompted = chat.ask("three")
    expected = [
        {"role": "system", "content": "brief"}, {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"},
    ]  # fmt: skip
    assert prompted.ids == loaded.prompter.ids(expected)
    assert (prompted.left_out, prompted.most) == (0, 16)


def test_the_oldest_turns_are_left_out_where_they_do_not_fit(loaded: Loaded) -> None:
    chat = session(loaded, system="brief")
    for number in range(6):
        prompted = chat.ask(f"q{number} a b c d")
        assert len(prompted.ids) + 16 <= CONTEXT
        chat.reply(f"a{number} e f g h")
    assert prompted.left_out % 2 == 0
    assert prompted.left_out > 0
    text = shown(chat, prompted.ids)
    first = prompted.left_out // 2
    assert f"q{first} " in text
    assert f"q{first - 1} " not in text
    assert "brief" in text
    one_more = [{"role": "system", "content": "brief"}, *chat.messages[prompted.left_out - 2 : -1]]
    assert len(loaded.prompter.ids(one_more)) + 16 > CONTEXT, "no more is left out than has to be"
    assert len(chat.messages) == 12, "what is saved is the whole conversation"


def test_a_long_question_leaves_a_shorter_answer_or_is_refused(loaded: Loaded) -> None:
    chat = session(loaded)
    chat.ask("first")
    chat.reply("answer")
    overhead = len(loaded.prompter.ids([{"role": "user", "content": ""}]))
    prompted = chat.ask(" 8" * ((CONTEXT - overhead - 5) // 2))
    assert prompted.left_out == 2
    assert prompted.most == CONTEXT - len(prompted.ids)
    assert 0 < prompted.most < 16
    chat.take_back()
    with pytest.raises(UserError, match=f"the model takes {CONTEXT}"):
        chat.ask(" 8" * CONTEXT)
    assert [message["content"] for message in chat.messages] == ["first", "answer"]


def test_a_question_that_the_template_refuses_is_not_kept(loaded: Loaded) -> None:
    chat = session(loaded)
    with pytest.raises(UserError, match="refuses this conversation: not that"):
        chat.ask("no")
    assert chat.messages == []


def test_an_answer_is_streamed_and_the_bases_is_another(loaded: Loaded) -> None:
    chat = session(loaded)
    prompted = chat.ask("How many apples are left?")
    pieces: list[str] = []
    answer = chat.answer(prompted, pieces.append)
    assert "".join(pieces).strip() == answer
    base = chat.answer(prompted, lambda _: None, base=True)
    assert base != answer
    assert chat.answer(prompted, lambda _: None) == answer, "the adapter is on again"


def test_a_saved_conversation_is_a_row_that_trains(loaded: Loaded, tmp_path: Path) -> None:
    from tunesmith.data.formats import FORMATS, convert

    chat, path = session(loaded, system="brief"), tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match="nothing to save"):
        chat.save(path)
    chat.ask("one")
    chat.reply("zwei ü")
    chat.save(path)
    chat.save(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2
    messages = convert(FORMATS["chat"], rows[1], {}).messages  # type: ignore[union-attr]
    assert [message["content"] for message in messages] == ["brief", "one", "zwei ü"]


def test_draws_repeat_with_the_seed_and_change_with_the_turn(loaded: Loaded) -> None:
    def talk(seed: int) -> list[str]:
        chat = ChatSession(loaded, Sampling(max_tokens=12, temperature=2.0), seed)
        answers = []
        for _ in range(2):
            answers.append(chat.answer(chat.ask("again"), lambda _: None))
            chat.reply("same")
        return answers

    assert talk(1) == talk(1)
    assert talk(1) != talk(2)
