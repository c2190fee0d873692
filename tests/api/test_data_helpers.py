"""`get_chat_template` and `standardize_sharegpt`."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from tests.support.tiny import tiny_tokenizer
from tunesmith import UserError, get_chat_template, is_bfloat16_supported, standardize_sharegpt
from tunesmith.api.data_helpers import ALIASES
from tunesmith.data.named_templates import TEMPLATES

TURNS = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Four."}]
SHAREGPT = [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "Four."}]
MAPPING = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}


def test_a_template_by_name() -> None:
    tokenizer = tiny_tokenizer(template=None)
    assert get_chat_template(tokenizer, "chatml") is tokenizer
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert text == "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"


def test_the_token_that_ends_an_answer() -> None:
    tokenizer = tiny_tokenizer(template=None)
    tokenizer.eos_token = "<|endoftext|>"
    assert get_chat_template(tokenizer, "qwen-2.5", map_eos_token=False).eos_token == "<|endoftext|>"
    assert get_chat_template(tokenizer, "qwen-2.5").eos_token == "<|im_end|>"
    plain = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert get_chat_template(tokenizer, (plain, "<|endoftext|>")).eos_token == "<|endoftext|>"
    assert get_chat_template(tokenizer, plain).eos_token == "<|endoftext|>"


def test_a_mapping_reads_other_keys_and_roles() -> None:
    plain, mapped = tiny_tokenizer(), get_chat_template(tiny_tokenizer(), "chatml", mapping=MAPPING)
    get_chat_template(plain, "chatml")
    for turns, theirs in ((TURNS, SHAREGPT), (TURNS[:1], SHAREGPT[:1])):
        for prompt in (True, False):
            assert mapped.apply_chat_template(
                theirs, tokenize=False, add_generation_prompt=prompt
            ) == plain.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chat_template": "chatlm"}, "there is no template 'chatlm'.\nDid you mean 'chatml'"),
        (
            {"chat_template": "phi-3"},
            "there is no template 'phi-3'.\nThere are: .* keeps the template it came with",
        ),
        ({"chat_template": "yi-chat"}, "there is no template 'yi-chat'.\nThere are: "),
        ({"chat_template": "llama-3.1"}, "the tokenizer has no token '<.begin_of_text.>'"),
        ({"chat_template": ("{{ messages }}", "<end>")}, "has no token '<end>' to end an answer"),
        ({"mapping": {"rolle": "from"}}, "mapping has 'rolle'"),
    ],
)
def test_templates_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_chat_template(tiny_tokenizer(), **arguments)


def test_what_a_template_is_not() -> None:
    with pytest.raises(UserError, match="chat_template is None, and has to be a name or Jinja text"):
        get_chat_template(tiny_tokenizer(), None)
    with pytest.raises(UserError, match=r"system_message is not possible; .*\nBegin each conversation with"):
        get_chat_template(tiny_tokenizer(), "chatml", system_message="Be kind.")
    get_chat_template(tiny_tokenizer(), "chatml", system_message=None)


def test_other_names_are_of_templates() -> None:
    assert set(ALIASES.values()) <= TEMPLATES.keys()
    assert not ALIASES.keys() & TEMPLATES.keys()


def test_sharegpt_becomes_roles_and_contents() -> None:
    data = Dataset.from_dict({"conversations": [SHAREGPT, SHAREGPT[:1] * 3], "id": [1, 2]})
    read = standardize_sharegpt(data)
    assert read["conversations"][0] == TURNS
    assert len(read["conversations"][1]) == 3
    assert read["id"] == [1, 2]
    assert standardize_sharegpt(read, num_proc=1)["conversations"][0] == TURNS
    other = data.rename_column("conversations", "chat")
    assert standardize_sharegpt(other, column="chat")["chat"][0] == TURNS
    stream = standardize_sharegpt(data.to_iterable_dataset())
    assert next(iter(stream))["conversations"] == TURNS


def test_sharegpt_that_cannot_be_read() -> None:
    with pytest.raises(UserError, match=r"has no column 'conversations'.\nIt has text"):
        standardize_sharegpt(Dataset.from_dict({"text": ["a"]}))
    data = Dataset.from_dict({"conversations": [SHAREGPT, [{"from": "narrator", "value": "Once"}]]})
    with pytest.raises(UserError, match=r"row 1: .*narrator"):
        standardize_sharegpt(data)


def test_a_sentence_for_scripts_and_not_for_run_files() -> None:
    data = Dataset.from_dict({"conversations": [SHAREGPT, [{"from": "humman", "value": "Two?"}]]})
    with pytest.raises(UserError, match=r"the role 'humman'.\nRename it in the data, to user,"):
        standardize_sharegpt(data)
    empty = [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": None}]
    with pytest.raises(UserError, match=r"row 0: .*message 1.*\nMend the row, or leave it out"):
        standardize_sharegpt(Dataset.from_dict({"conversations": [empty]}), batch_size=1000)
    with pytest.raises(UserError, match="row 1 has no list of messages in 'conversations'"):
        standardize_sharegpt(Dataset.from_dict({"conversations": [SHAREGPT, None]}))


def test_bfloat16_is_not_for_cpus(monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not is_bfloat16_supported()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((9, 0), True), ((8, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=0, c=capability: c)
        assert is_bfloat16_supported() == expected


def test_a_tokenizer_is_as_it_was_where_something_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer.chat_template, tokenizer.eos_token
    with pytest.raises(UserError, match="no token '<end>'"):
        get_chat_template(
            tokenizer, ("{% for message in messages %}{{ message.content }}{% endfor %}", "<end>")
        )
    with pytest.raises(UserError, match="mapping has 'assistent'"):
        get_chat_template(tokenizer, "chatml", {"assistent": "gpt"})
    assert (tokenizer.chat_template, tokenizer.eos_token) == before
