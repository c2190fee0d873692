# ruff: noqa: E501
"""The template compiler: the same text as transformers, exact spans, one rendering, and bounds."""

from __future__ import annotations

import tracemalloc
from datetime import datetime
from typing import Any

import jinja2
import pytest

from tests.data.chat_templates import ALL, GENERATION, LLAMA, MISTRAL, QWEN, SMOL, chat_tokenizer
from tunesmith.contracts.errors import DataError
from tunesmith.data.chat import RowProblem
from tunesmith.data.template import CHATML, ChatTemplate

TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi, who are you? <|im_start|>assistant"},
    {"role": "assistant", "content": "A model – für dich."},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": " user said <b>'assistant'</b> "},
]
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"type": "object"}}}]
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "größe", "arguments": {"of": "<house> & 'é'"}},
}
TOOL_TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How big?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "12 m", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "12 m."},
]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("prompt", [False, True])
def test_text_is_what_transformers_writes(name: str, prompt: bool) -> None:
    tokenizer = chat_tokenizer(ALL[name])
    expected = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=prompt)
    trace = ChatTemplate(ALL[name]).render(
        TALK, variables=tokenizer.special_tokens_map, add_generation_prompt=prompt
    )
    assert trace.text == expected


@pytest.mark.parametrize("template", [LLAMA, MISTRAL, QWEN], ids=["llama", "mistral", "qwen"])
def test_tools_are_written_as_transformers_writes_them(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    expected = tokenizer.apply_chat_template(TOOL_TALK, tools=TOOLS, tokenize=False)
    trace = ChatTemplate(template).render(TOOL_TALK, tools=TOOLS, variables=tokenizer.special_tokens_map)
    assert trace.text == expected
    assert "größe" in trace.text
    assert "<house> & 'é'" in trace.text


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"indexed"}))
def test_spans_hold_each_message_and_follow_each_other(name: str) -> None:
    trace = ChatTemplate(ALL[name]).render(TALK, variables={"bos_token": "<s>", "eos_token": "</s>"})
    for message, (start, end) in zip(TALK, trace.messages, strict=True):
        assert message["content"].strip() in trace.text[start:end]
    for before, after in zip(trace.messages, trace.messages[1:], strict=False):
        assert before[1] <= after[0]


def test_spans_of_chatml_by_hand() -> None:
    trace = ChatTemplate(CHATML).render(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    )
    first = "<|im_start|>user\na<|im_end|>\n"
    assert trace.messages == [(0, len(first)), (len(first), len(trace.text))]


def test_equal_messages_are_told_apart() -> None:
    turn = {"role": "user", "content": "same"}
    trace = ChatTemplate(CHATML).render([dict(turn), dict(turn)])
    half = len(trace.text) // 2
    assert trace.messages == [(0, half), (half, 2 * half)]


def test_loop_controls_do_not_leak_spans() -> None:
    template = (
        "{% for m in messages %}[{{ m.content }}{% if m.role == 'tool' %}{% continue %}{% endif %}]"
        "{% if m.content == 'stop' %}{% break %}{% endif %}{% endfor %} end of text"
    )
    talk = [
        {"role": "tool", "content": "t"},
        {"role": "user", "content": "stop"},
        {"role": "user", "content": "x"},
    ]
    trace = ChatTemplate(template).render(talk)
    assert [trace.text[a:b] for a, b in trace.messages] == ["[t", "[stop]", ""]


def test_nested_scans_keep_the_span_that_writes() -> None:
    template = (
        "{% for m in messages %}{{ m.content }}"
        "{% for other in messages %}{% if other.role == 'never' %}{% break %}{% endif %}{% endfor %}"
        ";{% endfor %}"
    )
    trace = ChatTemplate(template).render([{"role": "a", "content": "one"}, {"role": "b", "content": "two"}])
    assert [trace.text[a:b] for a, b in trace.messages] == ["one;", "two;"]


@pytest.mark.parametrize(
    "template",
    [
        "{% set all %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ all }}",
        "{% macro w() %}{% for m in messages %}{{ m.content }}{% endfor %}{% endmacro %}{{ w() }}",
        "{% for m in messages recursive %}{{ m.content }}{% if false %}{{ loop([]) }}{% endif %}{% endfor %}",
    ],
    ids=["set", "macro", "recursive"],
)
def test_buffered_output_gives_no_false_span(template: str) -> None:
    trace = ChatTemplate(template).render([{"role": "user", "content": "one"}])
    assert trace.text == "one"
    assert trace.messages[0] in [(0, 0), (0, 3)]


def test_generation_blocks_give_their_spans_and_keep_their_scope() -> None:
    trace = ChatTemplate(GENERATION).render(TALK)
    assert [trace.text[a:b] for a, b in trace.generation] == [
        "A model – für dich.<|im_end|>",
        " user said <b>'assistant'</b> <|im_end|>",
    ]
    scoped = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert ChatTemplate(scoped).render([]).text == "21"


def test_work_is_linear_in_the_number_of_messages() -> None:
    template = ChatTemplate(SMOL)

    def events(count: int) -> int:
        return template.render([{"role": "user", "content": "x"} for _ in range(count)]).events

    assert events(400) - events(200) == events(200) - events(0) == 200
    assert template.renderings == 4


def test_what_a_template_reads_is_known() -> None:
    template = ChatTemplate(QWEN)
    assert "tools" in template.names
    assert {"reasoning_content", "tool_calls", "tool"} <= template.keys
    assert "tools" not in ChatTemplate(SMOL).names


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 'x' * 10**9 }}",
        "{{ 9 ** 99999 }}",
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% for a, b in [(1, 2)] * 90000 %}{% for c in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'secret' %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_what_a_template_must_not_do_is_a_problem_of_the_row(
    hostile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.data.template._MOST_EVENTS", 20_000)
    with pytest.raises(RowProblem, match="template error"):
        ChatTemplate(hostile).render([{"role": "user", "content": "x"}])


BOMBS = [
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "{% macro f(x, n) %}{% if n %}{{ f(x + x, n - 1) }}{% endif %}{% endmacro %}{{ f('ab', 60) }}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% else %}{{ 'x' * 99999 }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% if ('a' ~ ('b' * 999999) * 1) | replace('b', 'c' * 999999) %}{% endif %}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ ('%s' * 99999) % (['x' * 99999] * 99999) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 999999999) }}",
    "{{ 'a'.center(999999999) }}",
    "{{ 'a'['ljust'](999999999) }}",
    "{{ ('a' | attr('zfill'))(999999999) }}",
    "{{ 'a' | center(999999999) }}",
    "{{ 'a' | indent(999999999, true) }}",
    "{{ '\t'.expandtabs(999999999) }}",
    "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "{{ ('a' * 99999).join(['b'] * 99999) }}",
    "{{ (['b'] * 99999) | join('a' * 99999) }}",
    "{{ [1] | tojson(indent=999999999) }}",
    "{{ lipsum(n=999999) }}",
    "{% set n = namespace(x=10) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
]
LONG = [
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for i in range(10000) %}{% for j in range(10000) %}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("bomb", BOMBS)
def test_text_that_grows_inside_a_template_is_stopped_before_it_is_made(bomb: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RowProblem, match="template error"):
            ChatTemplate(bomb).render([{"role": "user", "content": "x"}])
        assert tracemalloc.get_traced_memory()[1] < 1.2e9
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bomb", LONG)
def test_a_template_that_does_not_end_is_stopped(bomb: str) -> None:
    with pytest.raises(RowProblem, match="template error"):
        ChatTemplate(bomb).render([{"role": "user", "content": "x"}])


def test_what_is_bounded_still_computes_as_jinja_does() -> None:
    source = (
        "{% set a = 'x' ~ 1 ~ none %}{% set b = [1] + [2] %}{% set c = 1 + 2 %}{{ a ~ b ~ c }}|{{ 'p' + 'q' ~ 1 }}|"
        "{{ 'a-b'.replace('-', '+') }}|{{ 'aaa' | replace('a', 'b', 2) }}|{{ [1, 2] | join(', ') }}|"
        "{{ '{:>5}'.format(3) }}|{{ '%05.1f' % 2.5 }}|{{ 7 % 4 }}|{{ 'a\nb' | indent }}|{{ '-'.join(['x', 'y']) }}|"
        "{{ 'q' | center(3) }}|{{ '%s' | format('y') }}|{{ [{'k': 'v'}] | join(',', attribute='k') }}|"
        "{% set d %}in {{ a }}{% endset %}{{ d }}|{{ 'a,b'.split(',')[1].upper() }}|{{ {'a': 'b' ~ 'c'}['a'] }}"
    )
    expected = jinja2.Environment(trim_blocks=True).from_string(source).render()
    assert ChatTemplate(source).render([]).text == expected


def test_a_row_of_ten_megabytes_is_written() -> None:
    template = "{% for m in messages %}{% set t = m.content + '!' %}{{ t | replace('a', 'b') | trim ~ 'end' }}{% endfor %}"
    trace = ChatTemplate(template).render([{"role": "user", "content": "a" * 10_000_000}])
    assert len(trace.text) == 10_000_004


def test_the_date_is_the_one_that_is_set() -> None:
    template = "{{ strftime_now('%d %b %Y') }}"
    assert ChatTemplate(template).render([]).text == "01 Jan 2025"
    assert ChatTemplate(template, datetime(2031, 5, 6)).render([]).text == "06 May 2031"


def test_endless_text_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.data.template._MOST_CHARACTERS", 1000)
    with pytest.raises(RowProblem, match="more than 1000 characters"):
        ChatTemplate("{% for a in range(99) %}{{ '-' * 99 }}{% endfor %}").render([])


@pytest.mark.parametrize(
    "broken", ["{% for m in messages %}", "{{ nope | no_such_filter }}", "{% generation %}"]
)
def test_a_template_that_is_not_jinja_names_the_line(broken: str) -> None:
    with pytest.raises(DataError, match="line 2"):
        ChatTemplate("\n" + broken)
