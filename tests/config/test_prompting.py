"""Prompts are what the template writes, and its end of a turn is found."""

from __future__ import annotations

import pytest

from tests.support.tiny import CHATML, tiny_tokenizer
from tunesmith.config.prompting import Prompter
from tunesmith.contracts.errors import DataError

USER = [{"role": "user", "content": "How many apples?"}]
PLAIN = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)


def test_a_prompt_is_what_transformers_writes() -> None:
    tokenizer = tiny_tokenizer()
    expected = tokenizer.apply_chat_template(
        USER, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert Prompter(tokenizer).ids(USER) == expected


@pytest.mark.parametrize(
    ("template", "ids", "text"),
    [
        (CHATML, (2,), ""),
        (CHATML.replace("'<|im_end|>'", "eos_token"), (2,), ""),
        (CHATML.replace("<|im_end|>", "<|stop|>"), (), "<|stop|>"),
        (PLAIN, (), ""),
        # the last turn ends otherwise than earlier ones: both are ends
        (CHATML.replace("'<|im_end|>'", "('<|endoftext|>' if loop.last else '<|im_end|>')"), (2, 0), ""),
    ],
    ids=["chatml", "eos", "a token that the tokenizer lacks", "no end", "two ends"],
)
def test_the_end_of_a_turn(template: str, ids: tuple[int, ...], text: str) -> None:
    assert Prompter(tiny_tokenizer(template)).ends() == (ids, text)


def test_what_the_template_cannot_write_is_moved() -> None:
    no_system = CHATML.replace("{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}"
                               "{% endif %}{% for", 1)  # fmt: skip
    written = Prompter(tiny_tokenizer(no_system)).text([{"role": "system", "content": "Be brief."}, *USER])
    assert "user\nBe brief.\n\nHow many apples?" in written


def test_chatml_where_there_is_no_template() -> None:
    prompter = Prompter(tiny_tokenizer(None))
    assert not prompter.has_template
    assert prompter.text(USER).startswith("<|im_start|>user\n")


def test_the_day_is_the_runs() -> None:
    dated = "{{ strftime_now('%Y-%m-%d') }}" + CHATML
    assert Prompter(tiny_tokenizer(dated), "2026-03-04").text(USER).startswith("2026-03-04")


@pytest.mark.parametrize("template", ["{{ raise_exception('never') }}", "nothing"])
def test_a_template_that_writes_no_question(template: str) -> None:
    with pytest.raises(DataError, match="question"):
        Prompter(tiny_tokenizer(template))
