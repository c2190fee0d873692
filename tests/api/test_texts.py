"""What `SFTTrainer` trains on: the text that a script names, each with one beginning and one end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from tokenizers.processors import TemplateProcessing
from trl import SFTConfig

from tests.support.tiny import tiny_tokenizer
from tunesmith import FastLanguageModel, SFTTrainer, UserError, standardize_sharegpt
from tunesmith.api.texts import as_tokens

TURNS = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four."}]
SHAREGPT = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Four."}]
TOKENIZER = tiny_tokenizer()
BEGIN, END = "<|endoftext|>", "<|im_end|>"


def with_beginning() -> Any:
    """A tokenizer that puts its first token in front of a text, as Llama's does."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.bos_token = BEGIN
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.convert_tokens_to_ids(BEGIN))]
    )
    assert tokenizer.decode(tokenizer("a")["input_ids"]) == f"{BEGIN}a"
    return tokenizer


def config(**changes: Any) -> SFTConfig:
    return SFTConfig(output_dir="unused", bf16=False, **changes)


def texts(dataset: Any, formatting: Any = None, tokenizer: Any = TOKENIZER, **changes: Any) -> list[str]:
    """The rows as the trainer would get them."""
    said: list[str] = []
    found = as_tokens("train_dataset", dataset, config(**changes), formatting, tokenizer, said.append)
    assert found.column_names is None or found.column_names == ["input_ids"]
    return [*said, *(tokenizer.decode(row["input_ids"]) for row in found)]


@pytest.mark.parametrize(
    "other", [{"messages": [TURNS]}, {"prompt": ["a"], "completion": ["b"]}, {"conversations": [SHAREGPT]}]
)
def test_a_text_trains_and_not_what_stands_beside_it(other: dict[str, Any]) -> None:
    said, text = texts(Dataset.from_dict({"text": ["MARK"], **other}))
    assert said.startswith(f"tunesmith: train_dataset trains on its column 'text'; {next(iter(other))!r}")
    assert text == f"MARK{END}"


def test_other_columns_stay_for_a_collator_of_ones_own() -> None:
    rows = Dataset.from_dict({"text": ["a"], "weight": [0.5]})
    found = as_tokens("train_dataset", rows, config(), None, TOKENIZER, print)
    assert set(found.column_names) == {"input_ids", "weight"}


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_what_a_formatting_function_makes_trains(column: str) -> None:
    rows = Dataset.from_dict({column: [TURNS, TURNS[:1]]})
    made = texts(rows, lambda batch: [f"MARK {len(turns)}" for turns in batch[column]])
    assert made == [f"MARK 2{END}", f"MARK 1{END}"]
    assert texts(rows, lambda row: f"MARK {len(row[column])}") == made


def test_a_function_of_a_batch_makes_as_many_texts_as_it_likes() -> None:
    rows = Dataset.from_dict({"question": ["a", "b", "c"], "answer": ["1", "2", "3"]})

    def both(batch: dict[str, list[str]]) -> list[str]:
        return [text for pair in zip(batch["question"], batch["answer"], strict=True) for text in pair]

    def some(batch: dict[str, list[str]]) -> list[str]:
        return [text for text in batch["question"] if text != "a"]

    assert texts(rows, both) == [f"{text}{END}" for text in "a1b2c3"]
    assert texts(rows, some) == [f"b{END}", f"c{END}"]


def test_a_function_that_fails_on_one_row_takes_batches() -> None:
    rows = Dataset.from_dict({"messages": [TURNS, TURNS]})

    def batch(rows: dict[str, Any]) -> list[str]:
        return [TOKENIZER.apply_chat_template(turns, tokenize=False) for turns in rows["messages"]]

    assert texts(rows, batch) == [TOKENIZER.apply_chat_template(TURNS, tokenize=False)] * 2
    with pytest.raises(KeyError, match="absent"):
        texts(rows, lambda row: row["absent"])


@pytest.mark.parametrize("made", [{"text": "a"}, None, 3])
@pytest.mark.parametrize("listed", [False, True])
def test_what_is_no_text_is_one_sentence(made: Any, listed: bool) -> None:
    kind = type(made).__name__
    with pytest.raises(UserError, match=f"formatting_func returned a {kind} for a text"):
        texts(Dataset.from_dict({"a": ["b"]}), lambda _: [made] if listed else made)
    with pytest.raises(UserError, match="train_dataset row 1: 'text' is None, and has to be text"):
        texts(Dataset.from_dict({"text": ["a", None]}))


def test_a_text_begins_once() -> None:
    tokenizer = with_beginning()
    said, *begun = texts(Dataset.from_dict({"text": [f"{BEGIN}a", "b"]}), tokenizer=tokenizer)
    assert (
        said
        == "tunesmith: the texts of train_dataset begin with <|endoftext|> already; no second one is added."
    )
    assert begun == [f"{BEGIN}a{END}", f"{BEGIN}b{END}"]
    rows = Dataset.from_dict({"text": [f"{BEGIN}a", "b"]})
    plain = texts(rows, tokenizer=tokenizer, dataset_kwargs={"add_special_tokens": False})
    assert plain == [f"{BEGIN}a{END}", f"b{END}"]


def test_a_text_ends_once() -> None:
    rows = Dataset.from_dict({"text": [f"a{END}\n", "b"]})
    assert texts(rows) == [f"a{END}\n", f"b{END}"]
    assert texts(rows, dataset_kwargs={"append_concat_token": False}) == [f"a{END}\n", "b"]


def test_conversations_train_where_there_is_no_text() -> None:
    said: list[str] = []
    rows = Dataset.from_dict({"conversations": [SHAREGPT]})
    with pytest.raises(UserError, match="holds conversations of ShareGPT, whose roles"):
        as_tokens("train_dataset", rows, config(), None, TOKENIZER, said.append)
    found = as_tokens("train_dataset", standardize_sharegpt(rows), config(), None, TOKENIZER, said.append)
    assert found[0]["messages"] == TURNS
    both = Dataset.from_dict({"text": ["MARK"], "messages": [TURNS]})
    for option in ({"assistant_only_loss": True}, {"completion_only_loss": True}):
        assert as_tokens("train_dataset", both, config(**option), None, TOKENIZER, said.append) is both
    assert not said


def test_what_is_tokens_already_or_streams() -> None:
    tokens = Dataset.from_dict({"input_ids": [[1, 2]], "text": ["a"]})
    assert as_tokens("train_dataset", tokens, config(), None, TOKENIZER, print) is tokens
    rows = Dataset.from_dict({"text": ["a"]})
    skipped = config(dataset_kwargs={"skip_prepare_dataset": True})
    assert as_tokens("train_dataset", rows, skipped, None, TOKENIZER, print) is rows
    stream = IterableDataset.from_generator(
        lambda: iter([{"text": "a", "other": 1}, {"text": "b", "other": 2}])
    )
    assert texts(stream) == [f"a{END}", f"b{END}"]
    assert texts(stream, lambda batch: [f"{text}!" for text in batch["text"]]) == [f"a!{END}", f"b!{END}"]
    parts = {"one": rows, "two": rows}
    assert set(as_tokens("eval_dataset", parts, config(), None, TOKENIZER, print)) == {"one", "two"}


def test_a_key_that_nothing_reads() -> None:
    with pytest.raises(UserError, match="dataset_kwargs has 'nonsense', which nothing reads"):
        texts(Dataset.from_dict({"text": ["a"]}), dataset_kwargs={"nonsense": 1})


def trainer(folder: Path, *, length: int, **changes: Any) -> Any:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=length, load_in_4bit=False, quiet=True
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    rows = Dataset.from_dict({"text": ["How many apples? " * 600]})
    return SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, **changes)


@pytest.mark.parametrize("length", [64, 2048])
def test_rows_are_as_long_as_the_model_was_loaded_for(
    tiny_model_dir: Path, tmp_path: Path, length: int
) -> None:
    args = SFTConfig(output_dir=str(tmp_path), bf16=False)
    made = trainer(tiny_model_dir, length=length, args=args)
    assert made.args.max_length == length
    assert len(made.train_dataset[0]["input_ids"]) == length
    assert trainer(tiny_model_dir, length=length, args=args, max_seq_length=1024).args.max_length == 1024
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, max_length=32)
    assert trainer(tiny_model_dir, length=length, args=args).args.max_length == 32


def test_arguments_of_another_type(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="args is a dict, and has to be an SFTConfig or TrainingArguments"):
        trainer(tiny_model_dir, length=64, args={"max_steps": 2})
    args = SFTConfig(output_dir=str(tmp_path), bf16=False)
    with pytest.raises(
        UserError, match=r"dataset_text_field is .'text'., and has to be the name of a column"
    ):
        trainer(tiny_model_dir, length=64, args=args, dataset_text_field=["text"])


def test_an_optimizer_has_its_rates_already(tiny_model_dir: Path, tmp_path: Path) -> None:
    args = SFTConfig(output_dir=str(tmp_path), bf16=False)
    with pytest.raises(UserError, match="optimizers brings an optimizer, which has its rates already"):
        trainer(tiny_model_dir, length=64, args=args, optimizers=(object(), None), loraplus_lr_ratio=16.0)
