"""What a server shows is the beginning of a row: in the text, in the tokens, and at what cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.chat_templates import QWEN, SMOL, chat_tokenizer
from tests.support.tiny import tiny_tokenizer
from tunesmith.data.chat import RowProblem
from tunesmith.data.formats import Conversation
from tunesmith.data.proof import REASON
from tunesmith.data.render import (
    NOTE_ALLOWED,
    NOTE_CONTEXT,
    NOTE_CUT,
    NOTE_SOME,
    NOTE_SPLIT,
    NOTE_THINKING,
    Encoded,
    Renderer,
    resolve_template,
)
from tunesmith.data.sources import open_source
from tunesmith.data.template import CHATML, ChatTemplate
from tunesmith.data.tokenize import tokenize_source

THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""Opens a thinking block for every answer, and writes it for the last one only."""


def talk(*contents: str, **extra: Any) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text, **extra} for n, text in enumerate(contents)]


def encode(renderer: Renderer, messages: list[dict[str, Any]]) -> Encoded:
    return renderer.encode([renderer.render(Conversation(messages))])[0]


def trained(renderer: Renderer, encoded: Encoded) -> str:
    return str(renderer.tokenizer.decode(encoded.ids[encoded.trained]))


def test_a_turn_that_a_server_asks_for_otherwise_is_refused_with_its_token() -> None:
    renderer = Renderer(chat_tokenizer(THINK), THINK)
    renderer.render(Conversation(talk("Hi", "Hello!", reasoning_content="w")))
    with pytest.raises(RowProblem) as caught:
        renderer.render(Conversation(talk("Hi", "Hello!", "Bye", "Ciao!", reasoning_content="why")))
    assert caught.value.reason == REASON
    prompt = renderer.tokenizer("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert caught.value.detail == f"message 1: token {len(prompt)} is 'H', in a server's prompt '<'"


def test_lone_surrogates_do_not_hinder_a_report() -> None:
    renderer = Renderer(chat_tokenizer(THINK), THINK)
    with pytest.raises(RowProblem, match="message 1: token"):
        renderer.render(Conversation(talk("\ud800", "\udfff", "Bye", "Ciao!", reasoning_content="\ud800")))


def test_such_turns_are_context_or_train_where_that_is_allowed() -> None:
    messages = talk("Hi", "Hello!", "Bye", "Ciao!", reasoning_content="why")
    context = Renderer(chat_tokenizer(THINK), THINK, prefix_mismatch="context")
    row = context.render(Conversation(messages))
    assert NOTE_CONTEXT in row.notes
    assert trained(context, context.encode([row])[0]) == "why\n</think>\nCiao!<|im_end|>"
    allowed = Renderer(chat_tokenizer(THINK), THINK, prefix_mismatch="allow")
    row = allowed.render(Conversation(messages))
    assert NOTE_ALLOWED in row.notes
    assert trained(allowed, allowed.encode([row])[0]).startswith("Hello!<|im_end|>why")


def test_a_row_without_a_turn_that_holds_is_refused_as_context_too() -> None:
    stripped = THINK.replace("loop.last and", "false and")
    renderer = Renderer(chat_tokenizer(stripped), stripped, prefix_mismatch="context")
    with pytest.raises(RowProblem, match=REASON):
        renderer.render(Conversation(talk("Hi", "Hello!")))


def test_a_shape_is_proved_once_and_what_the_template_looks_for_makes_another() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if '/no' in m.content %}!{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if '/no' in messages[-1].content %}<think>{% endif %}{% endif %}"
    )
    assert ChatTemplate(template).needles == ("/no",)
    assert ChatTemplate("{{ a.split('</x>') }}{{ 'y' not in a }}{{ 'z' == a }}").needles == ("</x>", "y")
    renderer = Renderer(chat_tokenizer(template), template)
    for number in range(20):
        renderer.render(Conversation(talk(f"question {number}", f"answer {number}")))
    assert renderer._proof.shapes == 1
    with pytest.raises(RowProblem, match="in a server's prompt '<'"):
        renderer.render(Conversation(talk("question /no", "answer")))
    assert renderer._proof.shapes == 2


def test_a_proof_does_not_hold_for_a_row_with_another_header() -> None:
    # the header is a part of what is remembered: a prompt that ends in blanks which only some answers have
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    renderer = Renderer(chat_tokenizer(template), template)
    row = renderer.render(Conversation(talk("Hi", "<think>\nwhy</think>")))
    assert [row.text[a:b] for a, b in row.spans] == ["why</think><|im_end|>"]
    with pytest.raises(RowProblem, match=REASON):
        renderer.render(Conversation(talk("Hi", "why")))


def test_many_turns_are_proved_by_kind() -> None:
    renderer = Renderer(chat_tokenizer(QWEN), QWEN)
    before = renderer.template.renderings  # type: ignore[union-attr]
    row = renderer.render(Conversation(talk(*["a b"] * 600)))
    assert len(row.turns) == 300
    assert renderer.template.renderings - before < 10  # type: ignore[union-attr]
    with pytest.raises(RowProblem, match="message 1:"):
        Renderer(chat_tokenizer(THINK), THINK).render(Conversation(talk(*["a b"] * 60)))


def merging_tokenizer() -> Any:
    """The tiny tokenizer with one token for two line breaks, as most have."""
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.add_tokens(["\n\n"])
    return tokenizer


def test_tokens_do_not_merge_across_the_end_of_the_last_prompt() -> None:
    renderer = Renderer(merging_tokenizer(), CHATML)
    # `\n\n` is an added token here, so it counts as control and ends where a prompt's line break should
    messages = talk("Hi", "\nHello!")
    encoded = encode(renderer, messages)
    prompt = renderer.tokenizer(renderer.prompt(messages[:1]))["input_ids"]
    assert encoded.problem is None
    assert NOTE_CUT in encoded.notes
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert trained(renderer, encoded) == "\nHello!<|im_end|>"
    assert NOTE_CUT not in encode(renderer, talk("Hi", "Hello!")).notes


def test_an_earlier_turn_that_merges_is_refused_or_context() -> None:
    messages = talk("Hi", "\nHello!", "Bye", "Ciao!")
    problem = encode(Renderer(merging_tokenizer(), CHATML), messages).problem
    assert problem is not None
    assert problem.reason == REASON
    assert problem.detail.startswith("message 1: token ")
    assert "is '\\n\\n', in a server's prompt '\\n'" in problem.detail
    context = Renderer(merging_tokenizer(), CHATML, prefix_mismatch="context")
    encoded = encode(context, messages)
    assert encoded.problem is None
    assert trained(context, encoded) == "Ciao!<|im_end|>"
    allowed = Renderer(merging_tokenizer(), CHATML, prefix_mismatch="allow")
    assert trained(allowed, encode(allowed, messages)).endswith("Ciao!<|im_end|>")


@pytest.mark.parametrize("template", [CHATML, SMOL, QWEN], ids=["chatml", "smol", "qwen"])
def test_every_prompt_is_a_prefix_of_the_tokens(template: str) -> None:
    renderer = Renderer(chat_tokenizer(template), template)
    messages = talk("Hi", "Hello!", "How?", " So. ", "And?", "ok\n")
    encoded = encode(renderer, messages)
    for number in (1, 3, 5):
        prompt = renderer.tokenizer(renderer.prompt(messages[:number]), add_special_tokens=False)["input_ids"]
        assert encoded.ids[: len(prompt)].tolist() == prompt
        assert encoded.trained[len(prompt)]


# ---------------------------------------------------------------- a document for each turn

STRIPPED = THINK.replace("{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
                         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")  # fmt: skip
"""As `THINK`, and its prompt leaves it to the model to think: the proof holds, but reasoning is lost."""


def thoughts(count: int) -> list[dict[str, Any]]:
    turns = []
    for n in range(count):
        turns.append({"role": "user", "content": f"q{n}"})
        turns.append({"role": "assistant", "content": f"a{n}", "reasoning_content": f"t{n}"})
    return turns


@pytest.mark.parametrize("template", [THINK, STRIPPED])
def test_a_row_is_split_into_what_a_server_would_show(template: str) -> None:
    renderer = Renderer(chat_tokenizer(template), template, prefix_mismatch="split")
    messages = thoughts(3)
    texts = renderer.documents(Conversation(messages))

    assert len(texts) == 3
    for number, (text, tokens) in enumerate(zip(texts, renderer.encode(texts), strict=True)):
        assert text.text == renderer.template.render(messages[: 2 * number + 2], variables={}).text
        prompt = renderer.prompt(messages[: 2 * number + 1])
        assert text.text.startswith(prompt)
        answer = f"t{number}\n</think>\na{number}<|im_end|>"
        assert trained(renderer, tokens) == (answer if template == THINK else f"<think>\n{answer}")
        assert NOTE_SPLIT in text.notes
        assert NOTE_THINKING not in text.notes


def test_a_row_that_holds_stays_one_document() -> None:
    renderer = Renderer(chat_tokenizer(SMOL), SMOL, prefix_mismatch="split")
    (text,) = renderer.documents(Conversation(talk("Hi", "Hello!", "Bye", "Ciao!")))
    assert NOTE_SPLIT not in text.notes
    assert trained(renderer, renderer.encode([text])[0]) == "Hello!<|im_end|>Ciao!<|im_end|>"

    stripped = Renderer(chat_tokenizer(STRIPPED), STRIPPED, prefix_mismatch="split")
    assert len(stripped.documents(Conversation(talk("Hi", "Hello!", "Bye", "Ciao!")))) == 1


def test_turns_behind_one_question_stay_together_where_that_holds() -> None:
    """Qwen 3 shows the reasoning of a call until the next question."""
    template = resolve_template("qwen-3", chat_tokenizer(SMOL))
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    asked = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "Four.", "reasoning_content": "It says 4."},
    ]
    renderer = Renderer(chat_tokenizer(template), template, prefix_mismatch="split")
    texts = renderer.documents(Conversation([*asked, *asked]))

    assert [text.text.count("<|im_start|>assistant") for text in texts] == [2, 4]
    assert [len(text.turns) for text in texts] == [2, 2]
    for tokens in renderer.encode(texts):
        words = trained(renderer, tokens)
        assert words.count("I look.") == words.count("It says 4.") == words.count("Four.") == 1
    with pytest.raises(RowProblem, match="prompt is not a prefix"):
        Renderer(chat_tokenizer(template), template).render(Conversation([*asked, *asked]))


def test_what_trains_is_what_the_row_says() -> None:
    renderer = Renderer(chat_tokenizer(THINK), THINK, prefix_mismatch="split")
    messages = thoughts(3)
    messages[3]["train"] = False
    texts = renderer.documents(Conversation(messages))
    assert [trained(renderer, tokens)[-12:] for tokens in renderer.encode(texts)] == [
        "a0<|im_end|>",
        "a2<|im_end|>",
    ]

    (last,) = renderer.documents(Conversation(thoughts(3), train_last_only=True))
    assert NOTE_SPLIT not in last.notes


def test_the_documents_of_a_row_are_accounted_for_as_one_row(tmp_path: Path) -> None:
    rows = [thoughts(3), thoughts(1), thoughts(2)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    renderer = Renderer(chat_tokenizer(THINK), THINK, prefix_mismatch="split")
    options = {"renderer": renderer, "cache_dir": tmp_path}
    table = tokenize_source(open_source(path), sequence_length=256, **options)
    assert [table.row(n) for n in range(len(table))] == [0, 0, 0, 1, 2, 2]
    assert (table.report.rows_in, table.report.rows_kept) == (3, 3)
    assert table.report.notes == [f"{NOTE_SPLIT} (2 rows)"]

    room = int(table.lengths[0])
    short = tokenize_source(open_source(path), sequence_length=room, overlong="drop", **options)
    assert [short.row(n) for n in range(len(short))] == [0, 1, 2]
    assert f"{NOTE_SOME} (2 rows)" in short.report.notes
    assert short.report.rows_kept == 3
