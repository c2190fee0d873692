"""Rendering: which characters and tokens train, under every family of templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.chat_templates import (
    ALL,
    GEMMA,
    INDEXED,
    LLAMA,
    MISTRAL,
    QWEN,
    SMOL,
    chat_tokenizer,
)
from tests.support.tiny import tiny_tokenizer
from tunesmith.contracts.errors import DataError
from tunesmith.data.chat import RowProblem
from tunesmith.data.formats import Conversation, Text
from tunesmith.data.render import (
    NOTE_CHATML,
    NOTE_DATE,
    NOTE_PREFIXES,
    Rendered,
    Renderer,
    resolve_template,
)
from tunesmith.data.template import CHATML

TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "Yes?"},
]


ROLES = ("user", "assistant")


def supervised(renderer: Renderer, messages: list[dict[str, Any]]) -> list[str]:
    row = renderer.render(Conversation(messages))
    return [row.text[start:end] for start, end in row.spans]


def trained_text(renderer: Renderer, row: Rendered) -> str:
    (encoded,) = renderer.encode([row])
    return str(renderer.tokenizer.decode(encoded.ids[encoded.trained], skip_special_tokens=False))


EXPECTED = {
    "smol": ["Hello!<|im_end|>", "Yes?<|im_end|>"],
    "llama": ["Hello!<|eot_id|>", "Yes?<|eot_id|>"],
    "mistral": [" Hello!</s>", " Yes?</s>"],
    "gemma": ["Hello!<end_of_turn>", "Yes?<end_of_turn>"],
    "qwen": ["Hello!<|im_end|>", "<think>\n\n</think>\n\nYes?<|im_end|>"],
    "indexed": ["Hello!<|im_end|>", "Yes?<|im_end|>"],
    "generation": ["Hello!<|im_end|>", "Yes?<|im_end|>"],
}


@pytest.mark.parametrize("name", ALL)
def test_the_assistant_and_the_end_of_its_turn_train(name: str) -> None:
    eos = "</s>" if name == "mistral" else "<|im_end|>"
    renderer = Renderer(chat_tokenizer(ALL[name], eos), ALL[name])
    assert supervised(renderer, TALK) == EXPECTED[name]
    row = renderer.render(Conversation(TALK))
    assert trained_text(renderer, row) == "".join(EXPECTED[name])
    assert row.text == renderer.tokenizer.apply_chat_template(TALK, tokenize=False)


@pytest.mark.parametrize("name", ALL)
def test_all_trains_every_token_but_the_first(name: str) -> None:
    renderer = Renderer(chat_tokenizer(ALL[name]), ALL[name], "all")
    (encoded,) = renderer.encode([renderer.render(Conversation(TALK))])
    assert not encoded.trained[0]
    assert encoded.trained[1:].all()


words = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), max_size=30)
turns = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(turns=turns, system=st.none() | words)
def test_trained_tokens_decode_to_the_answers(turns: list[tuple[str, str]], system: str | None) -> None:
    renderer = chatml_renderer()
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row = renderer.render(Conversation(messages))
    assert trained_text(renderer, row) == "".join(f"{answer}<|im_end|>" for _, answer in turns)
    assert row.text == renderer.tokenizer.apply_chat_template(messages, tokenize=False)


_RENDERERS: list[Renderer] = []


def chatml_renderer() -> Renderer:
    if not _RENDERERS:
        _RENDERERS.append(Renderer(tiny_tokenizer(), CHATML))
    return _RENDERERS[0]


def test_one_rendering_a_row_and_quadratic_work_only_where_noted() -> None:
    renderer = Renderer(chat_tokenizer(SMOL), SMOL)
    assert renderer.template is not None
    renderer.render(Conversation(TALK * 25))
    before = renderer.template.renderings
    row = renderer.render(Conversation(TALK * 25))
    assert renderer.template.renderings == before + 1, "the shape is proved"
    assert NOTE_PREFIXES not in row.notes
    indexed = Renderer(chat_tokenizer(INDEXED), INDEXED)
    assert NOTE_PREFIXES not in indexed.render(Conversation(TALK)).notes
    silent = [*TALK, {"role": "user", "content": " "}, {"role": "assistant", "content": "Well?"}]
    assert NOTE_PREFIXES in indexed.render(Conversation(silent)).notes, "a blank turn cannot be marked"


@pytest.mark.parametrize("content", [" a ", "a\n", "\n a", "a"])
def test_hidden_turns_keep_the_blanks_around_their_text(content: str) -> None:
    talk = [{"role": role, "content": content} for role in ROLES * 2]
    hidden = Renderer(chat_tokenizer(INDEXED), INDEXED)
    row = hidden.render(Conversation(talk))
    assert [row.text[start:end] for start, end in row.spans] == [f"{content}<|im_end|>"] * 2
    assert NOTE_PREFIXES not in row.notes
    trimmed = INDEXED.replace("messages[i].content +", "messages[i].content | trim +")
    row = Renderer(chat_tokenizer(trimmed), trimmed).render(Conversation(talk))
    assert [row.text[start:end] for start, end in row.spans] == ["a<|im_end|>"] * 2


@pytest.mark.parametrize("name", ALL)
def test_rendered_characters_are_linear_in_the_number_of_turns(name: str) -> None:
    renderer = Renderer(chat_tokenizer(ALL[name]), ALL[name])
    assert renderer.template is not None

    def written(count: int) -> int:
        before = renderer.template.written  # type: ignore[union-attr]
        # another question each time, so that no shape is remembered
        talk = [{"role": role, "content": f"{role} {count}", "name": str(count)} for role in ROLES * count]
        length = len(renderer.render(Conversation(talk)).text)
        assert renderer.template.written - before < 12 * length  # type: ignore[union-attr]
        return renderer.template.written - before  # type: ignore[union-attr]

    assert written(400) < 2.2 * written(200)


def test_prefixes_that_disagree_are_a_problem_of_the_row() -> None:
    template = (
        "{% for i in range(messages|length) %}{{ messages|length }}{{ messages[i].content }}{% endfor %}"
    )
    renderer = Renderer(chat_tokenizer(template), template)
    with pytest.raises(RowProblem, match="template gives no assistant span"):
        renderer.render(Conversation(TALK))


def test_a_dropped_assistant_turn_is_a_problem_of_the_row() -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}"
    renderer = Renderer(chat_tokenizer(template), template)
    with pytest.raises(RowProblem, match="template gives no assistant span"):
        renderer.render(Conversation(TALK))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # a role header without a generation prompt is learned from a probe
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}",
            ["Hello!</s>", "Yes?</s>"],
        ),
        # no control token: the turn ends where its iteration ends
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ["Hello!\n", "Yes?\n"]),
        # EOS behind the loop belongs to the last turn
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}",
            ["Hello!\n", "Yes?\n</s>"],
        ),
        # a generation prompt that opens a block which past turns do not have
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
            ["Hello!</s>", "Yes?</s>"],
        ),
        # the same, where the last turn does have the block
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n"
            "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n{% endif %}{{ m.content }}</s>"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
            ["Hello!</s>", "\n</think>\nYes?</s>"],
        ),
        # spans from prefixes, each of which ends with EOS
        (
            "{% for i in range(messages|length) %}<|im_start|>{{ messages[i].role }}\n"
            "{{ messages[i].content }}\n{% endfor %}{{ eos_token }}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            ["Hello!\n", "Yes?\n</s>"],
        ),
    ],
    ids=[
        "learned header",
        "no control token",
        "eos behind the loop",
        "thinking prompt",
        "thinking in the last turn",
        "prefixes that end",
    ],
)
def test_bounds_of_a_turn(template: str, expected: list[str]) -> None:
    renderer = Renderer(chat_tokenizer(template, "</s>"), template, prefix_mismatch="allow")
    assert supervised(renderer, TALK) == expected


def test_a_control_token_inside_an_answer_does_not_end_it() -> None:
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a <s> b"}]
    assert supervised(Renderer(chat_tokenizer(template), template), talk) == ["a <s> b\n"]


# ---- what a template cannot write -------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "zwölf"}}}
TOOL_TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "I should add."},
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "three"},
    {"role": "assistant", "content": "It is 3."},
]


def test_tools_are_not_lost_where_the_template_ignores_them() -> None:
    row = Renderer(chat_tokenizer(SMOL), SMOL).render(Conversation(TOOL_TALK, TOOLS))
    assert row.text.startswith("<|im_start|>system\nYou can call functions")
    assert '{"type": "function", "function": {"name": "add"' in row.text
    answers = [row.text[start:end] for start, end in row.spans]
    assert answers == [
        "<think>\nI should add.\n</think>\n\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "zwölf"}}\n</tool_call><|im_end|>',
        "It is 3.<|im_end|>",
    ]
    assert "<|im_start|>tool\n<tool_response>\n3\n</tool_response><|im_end|>" in row.text
    assert len(row.notes) == 4
    assert TOOL_TALK[1]["content"] == "", "the row itself stays as it is"


def test_results_become_one_user_turn_where_the_role_is_refused() -> None:
    row = Renderer(chat_tokenizer(GEMMA), GEMMA).render(
        Conversation([{"role": "system", "content": "Be brief."}, *TOOL_TALK], TOOLS)
    )
    assert row.text.startswith("<s><start_of_turn>user\nBe brief.\n\nYou can call functions")
    both = "<tool_response>\n3\n</tool_response>\n<tool_response>\nthree\n</tool_response>"
    assert f"<start_of_turn>user\n{both}<end_of_turn>" in row.text
    assert any("no system turn" in note for note in row.notes)


def test_native_tools_are_left_to_the_template() -> None:
    for template in (QWEN, LLAMA):
        row = Renderer(chat_tokenizer(template), template).render(
            Conversation([m for m in TOOL_TALK if m.get("content") != "three"], TOOLS)
        )
        assert "<tool_response>\n3" in row.text or '<|end_header_id|>\n\n"3"' in row.text
        assert "You can call functions" not in row.text
        assert '"a": 1, "b": "zwölf"' in row.text
    assert not Renderer(chat_tokenizer(QWEN), QWEN).render(Conversation(TOOL_TALK, TOOLS)).notes


def test_missing_call_ids_are_made_where_the_template_demands_them() -> None:
    row = Renderer(chat_tokenizer(MISTRAL, "</s>"), MISTRAL).render(
        Conversation(TOOL_TALK[:3] + TOOL_TALK[4:])
    )
    assert "[TOOL_CALLS]" in row.text
    assert "result call00000 3" in row.text


def test_arguments_are_json_where_the_template_prints_them_as_they_are() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}CALL {{ c.function.arguments }}{% endfor %}<|im_end|>{% endfor %}"
        "{{ tools and '' }}"
    )
    row = Renderer(chat_tokenizer(template), template).render(Conversation(TOOL_TALK, TOOLS))
    assert 'CALL {"a": 1, "b": "zwölf"}' in row.text


def test_reasoning_goes_to_the_key_that_the_template_reads() -> None:
    template = "{% for m in messages %}{{ m.thinking }}|{{ m.content }}</s>{% endfor %}"
    talk = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": "why"},
    ]
    assert "why|a</s>" in Renderer(chat_tokenizer(template, "</s>"), template).render(Conversation(talk)).text


# ---- tokens -----------------------------------------------------------------------------------------------


def test_plain_text_trains_and_ends_with_eos_once() -> None:
    renderer = chatml_renderer()
    plain, ended = renderer.encode([renderer.render(Text("ab")), renderer.render(Text("ab<|im_end|>"))])
    eos = renderer.tokenizer.eos_token_id
    assert plain.ids.tolist() == ended.ids.tolist()
    assert plain.ids[-1] == eos
    assert plain.ids[-2] != eos
    assert plain.trained.tolist() == [False] + [True] * (len(plain.ids) - 1)


def test_encoding_keeps_the_order_of_mixed_rows() -> None:
    renderer = chatml_renderer()
    rows = [renderer.render(Text("one")), renderer.render(Conversation(TALK)), renderer.render(Text("two"))]
    encoded = renderer.encode(rows)
    assert [renderer.tokenizer.decode(e.ids) for e in encoded] == [
        "one<|im_end|>",
        rows[1].text,
        "two<|im_end|>",
    ]
    for row in encoded:
        assert row.ids.dtype == np.int32
        assert row.trained.dtype == np.bool_
        assert row.offsets.shape == (len(row.ids), 2)


def test_lone_surrogates_are_replaced_one_for_one() -> None:
    renderer = chatml_renderer()
    talk = [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a\udfffb"}]
    row = renderer.render(Conversation(talk))
    assert trained_text(renderer, row) == "a\ufffdb<|im_end|>"
    assert renderer.render(Text("\ud800")).text == "\ufffd"


def test_template_setting(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("{{ 1 }}")
    assert resolve_template("auto", tokenizer) == "{{ 1 }}"
    assert resolve_template("chatml", tokenizer) == CHATML
    assert resolve_template("auto", tiny_tokenizer(None)) == CHATML
    tokenizer.chat_template = {"rag": "{{ 3 }}", "default": "{{ 4 }}"}
    assert resolve_template("auto", tokenizer) == "{{ 4 }}"
    (tmp_path / "own.jinja").write_text("{{ 2 }}")
    assert resolve_template(str(tmp_path / "own.jinja"), tokenizer) == "{{ 2 }}"
    with pytest.raises(DataError, match=str(tmp_path / "none.jinja")):
        resolve_template(str(tmp_path / "none.jinja"), tokenizer)


def test_fingerprint_follows_everything_that_decides_tokens() -> None:
    base = Renderer(tiny_tokenizer(), CHATML)
    same = Renderer(tiny_tokenizer(), CHATML)
    same.tokenizer("x", truncation=True, max_length=4)  # leaves its trace in the backend
    others = [
        Renderer(tiny_tokenizer(), CHATML + " "),
        Renderer(tiny_tokenizer(), CHATML, "all"),
        Renderer(tiny_tokenizer(), None),
        Renderer(chat_tokenizer(), CHATML),
    ]
    assert base.fingerprint() == same.fingerprint()
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def test_notes_of_the_template_itself() -> None:
    foreign = tiny_tokenizer()
    foreign._tokenizer = type(foreign._tokenizer).from_str(
        foreign.backend_tokenizer.to_str().replace("<|im_end|>", "<|other|>")
    )
    foreign = type(foreign)(tokenizer_object=foreign._tokenizer, eos_token="<|endoftext|>")
    assert NOTE_CHATML in Renderer(foreign, CHATML).render(Conversation(TALK)).notes
    assert chatml_renderer().render(Conversation(TALK)).notes == ()
    dated = "{{ strftime_now('%Y') }}" + CHATML
    assert NOTE_DATE in Renderer(tiny_tokenizer(), dated).render(Conversation(TALK)).notes


def test_a_slow_tokenizer_is_refused() -> None:
    tokenizer = tiny_tokenizer()

    class Slow(type(tokenizer)):  # type: ignore[misc]
        is_fast = False

    tokenizer.__class__ = Slow
    with pytest.raises(DataError, match="slow tokenizer"):
        Renderer(tokenizer, CHATML)


def test_a_conversation_without_a_template_is_refused() -> None:
    with pytest.raises(DataError, match="no chat template"):
        Renderer(tiny_tokenizer(), None).render(Conversation(TALK))
