"""`train_on_responses_only`: answers train, in every turn, found by characters and not by a marker's own tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainingArguments
from trl.trainer.sft_config import SFTConfig

from tests.support.tiny import tiny_tokenizer
from tunesmith import FastLanguageModel, SFTTrainer, UserError, train_on_responses_only
from tunesmith.api.responses import Answers

ASK, ANSWER = "### Instruction:\n", "### Response:\n"
USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"


def trained_text(text: str, ask: str = ASK, answer: str = ANSWER, **options: Any) -> list[str]:
    """What trains of a text, as one string for each run of tokens."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    labels = Answers(tokenizer, ask, answer, **options).labels(ids, ids)
    runs: list[list[int]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        assert label in (token, -100)
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


def test_one_answer() -> None:
    assert trained_text(f"Below is a task.\n\n{ASK}Add.\n\n{ANSWER}Four.<|im_end|>") == ["Four.<|im_end|>"]


def test_every_turn_trains_or_the_last_alone() -> None:
    text = "".join(f"{USER}q{n}<|im_end|>\n{ASSISTANT}a{n}<|im_end|>\n" for n in range(3))
    answers = [f"a{n}<|im_end|>\n" for n in range(3)]
    assert trained_text(text, USER, ASSISTANT) == answers
    assert trained_text(text, USER, ASSISTANT, last_only=True) == answers[-1:]


def test_answers_that_begin_in_the_middle_of_a_token() -> None:
    """` The` is one token: a marker that ends in a space has no tokens of its own there."""
    tokenizer = tiny_tokenizer()
    merged = tokenizer.tokenize("Answer: The quick")
    assert "ĠThe" in merged
    assert trained_text("Ask: 2? Answer: The quick", "Ask: ", "Answer: ") == [" quick"]
    assert trained_text("Ask: 2? Answer: The quick", "Ask: ", "Answer:") == [" The quick"]


def test_text_without_an_answer_and_text_that_is_none_but() -> None:
    assert trained_text(f"{ASK}Add.") == []
    assert trained_text(f"{ANSWER}Four.") == ["Four."]
    assert trained_text(f"{ANSWER}{ASK}Add.") == []
    assert trained_text("") == []


def test_characters_of_several_bytes() -> None:
    assert trained_text(f"{ASK}Größe? 数\n{ANSWER}Vier 四 🙂.") == ["Vier 四 🙂."]


def test_a_row_that_was_cut_within_a_character() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(f"{ASK}a\n{ANSWER}Four 🙂", add_special_tokens=False)["input_ids"][:-2]
    labels = Answers(tokenizer, ASK, ANSWER).labels(ids, ids)
    first = next(place for place, label in enumerate(labels) if label != -100)
    assert tokenizer.decode(ids[first:]).startswith("Four ")
    assert all(label != -100 for label in labels[first:])


def test_what_did_not_train_stays_so() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(f"{ANSWER}Four.", add_special_tokens=False)["input_ids"]
    assert set(Answers(tokenizer, ASK, ANSWER).labels(ids, [-100] * len(ids))) == {-100}


def test_tokens_of_another_tokenizer() -> None:
    class Other:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "ab" if len(ids) > 1 else "xyz"

        def __call__(self, *_: Any, **__: Any) -> dict[str, Any]:
            return {"input_ids": [9], "offset_mapping": [(0, 2)]}

    with pytest.raises(UserError, match="cannot be placed in its text"):
        Answers(Other(), ASK, ANSWER).labels([1, 2], [1, 2])


# ---------------------------------------------------------------- trainers


@pytest.fixture
def make(tiny_model_dir: Path, tmp_path: Path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_model_dir), load_in_4bit=False, quiet=True)
    model = FastLanguageModel.get_peft_model(model, r=4)
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2)

    def build(texts: list[str], **changes: Any) -> Any:
        data = Dataset.from_dict({"text": texts})
        changes = {"args": args} | changes
        return SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=data, **changes)

    return build


def trained_of(trainer: Any, dataset: Any) -> list[str]:
    decode = trainer.processing_class.decode
    return [decode([token for token, label in zip(*row, strict=True) if label != -100])
            for row in zip(dataset["input_ids"], dataset["labels"], strict=True)]  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
def test_a_trainer_trains_on_answers(make, packing: bool) -> None:
    texts = [f"{ASK}Add {n}.\n\n{ANSWER}It is {n}." for n in range(3)]
    trainer = make(texts, packing=packing, eval_dataset={"held": Dataset.from_dict({"text": texts[:1]})})
    assert train_on_responses_only(trainer, ASK, ANSWER) is trainer
    answers = [f"It is {n}.<|im_end|>" for n in range(3)]
    found = trained_of(trainer, trainer.train_dataset)
    assert sorted("".join(found).split(">")) == sorted("".join(answers).split(">"))
    assert trained_of(trainer, trainer.eval_dataset["held"]) == answers[:1]
    trainer.train()


def test_an_answer_ends_where_its_document_does(make) -> None:
    """What comes next in a packed row is another text, which may begin with something else than a question."""
    texts = [f"Be kind.\n{ASK}Add {n}.\n\n{ANSWER}It is {n}." for n in range(3)]
    trainer = train_on_responses_only(make(texts, packing=True), ASK, ANSWER)
    assert [len(lengths) for lengths in trainer.train_dataset["seq_lengths"]] == [3]
    found = "".join(trained_of(trainer, trainer.train_dataset))
    assert sorted(found.split("<|im_end|>")) == ["", *(f"It is {n}." for n in range(3))]


def test_packing_that_cuts_texts(make, tmp_path: Path) -> None:
    args = SFTConfig(output_dir=str(tmp_path), packing=True, packing_strategy="wrapped", bf16=False)
    trainer = make([f"{ASK}Add.\n\n{ANSWER}Four."], args=args)
    with pytest.raises(UserError, match="packing_strategy='wrapped' cuts texts"):
        train_on_responses_only(trainer, ASK, ANSWER)


def test_rows_without_an_answer_are_counted(make, capsys) -> None:
    trainer = make([f"{ASK}Add.\n\n{ANSWER}Four.", "Nothing here."])
    train_on_responses_only(trainer, instruction_part=ASK, response_part=ANSWER, num_proc=1)
    assert "1 of 2 rows of train_dataset have no answer" in capsys.readouterr().out


def test_what_is_refused(make) -> None:
    trainer = make(["Nothing here.", "Nor here."])
    for options, message in (
        ({"instruction_part": ASK}, "needs instruction_part and response_part"),
        (
            {"instruction_part": ASK, "response_part": ANSWER, "force_match": False},
            "would train on questions",
        ),
        ({"instruction_part": ASK, "response_part": ANSWER}, "no row of train_dataset has an answer"),
    ):
        with pytest.raises(UserError, match=message):
            train_on_responses_only(trainer, **options)


def test_a_collator_that_makes_labels(make) -> None:
    from transformers import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    with pytest.raises(UserError, match="makes its own labels"):
        train_on_responses_only(make([f"{ANSWER}Four."], data_collator=collator), ASK, ANSWER)


def test_the_function_alone() -> None:
    tokenizer = tiny_tokenizer()
    relabel = train_on_responses_only(None, ASK, ANSWER, tokenizer=tokenizer, return_function=True)
    ids = tokenizer(f"{ASK}Add.\n{ANSWER}Four.")["input_ids"]
    labels = relabel({"input_ids": [ids]})["labels"][0]
    assert tokenizer.decode([label for label in labels if label != -100]) == "Four."
