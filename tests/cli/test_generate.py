"""`tunesmith generate`: files of prompts, answers that go on where they ended, and rows that cannot be answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import exit_code, succeed
from tests.support.results import save_run
from tests.support.runs import run_settings, train
from tunesmith.config.find_result import find_result
from tunesmith.config.load_result import load_result

PROMPTS: list[dict[str, Any]] = [
    {"prompt": "How many apples are left?"},
    {"messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi"}]},
    {"question": "And in May?", "answer": "half"},
    {"messages": [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}]},
    {"instruction": "Say it.", "input": "fox", "output": "dog"},
]
MESSAGES = [
    [{"role": "user", "content": "How many apples are left?"}],
    [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "And in May?"}],
    [{"role": "user", "content": "One"}],
    [{"role": "user", "content": "Say it.\n\nfox"}],
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    varied = {"tie_word_embeddings": False, "initializer_range": 0.2, "max_position_embeddings": 128}
    return save_run(tmp_path_factory.mktemp("generate") / "run", base=varied)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


def generate(run: Path, prompts: Path, out: Path, *words: object, code: int = 0) -> list[dict[str, Any]]:
    assert exit_code("generate", run, prompts, "--out", out, "--max-tokens", 6, *words) == code
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_rows_of_all_forms_are_answered(run: Path, prompts: Path, tmp_path: Path) -> None:
    lines = generate(run, prompts, tmp_path / "out.jsonl", "--base")
    assert [line["messages"] for line in lines] == MESSAGES
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[2]["where"] == f"{prompts}:3"
    loaded = load_result(find_result(str(run)))
    for line in lines:
        for key, base in (("answer", False), ("base", True)):
            assert line[key] == by_hand(loaded, line["messages"], base)
    assert any(line["answer"] != line["base"] for line in lines)


def by_hand(loaded: Any, messages: list[dict[str, Any]], base: bool) -> str:
    """The answer as a few lines of transformers give it."""
    import torch

    ids = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    model = loaded.model.get_base_model() if base else loaded.model
    with loaded.model.disable_adapter() if base else torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0
        )
    return loaded.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


def test_answers_do_not_depend_on_the_batch(run: Path, prompts: Path, tmp_path: Path) -> None:
    words = ("--temperature", 1.0, "--samples", 2, "--seed", 7, "--batch-size")
    one, many = (generate(run, prompts, tmp_path / f"{size}.jsonl", *words, size) for size in (1, 4))
    assert one == many
    assert [(line["row"], line["sample"]) for line in one[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert any(one[n]["answer"] != one[n + 1]["answer"] for n in range(0, 10, 2))


def test_answers_that_are_there_are_kept(run: Path, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    whole = generate(run, prompts, tmp_path / "whole.jsonl")
    out = tmp_path / "out.jsonl"
    generate(run, prompts, out, "--limit", 2)
    text = out.read_text(encoding="utf-8")
    marked = text.replace('"answer": "', '"answer": "kept ')
    out.write_text(marked + '{"row": 2, "torn', encoding="utf-8")
    lines = generate(run, prompts, out)
    assert [line["answer"].startswith("kept ") for line in lines] == [True, True, False, False, False]
    assert lines[2:] == whole[2:]
    before = out.read_bytes()
    capsys.readouterr()
    generate(run, prompts, out)
    assert out.read_bytes() == before
    assert "holds all answers already" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--max-tokens", 7), "of another model or of other settings"),
        (("--seed", 1), "of another model or of other settings"),
        ("prompts", "answers another prompt as row 0"),
        ("file", ":1 is not an answer of `tunesmith generate`"),
    ],
)
def test_other_answers_are_not_mixed_in(
    run: Path, prompts: Path, tmp_path: Path, capsys: Any, change: Any, message: str
) -> None:
    out = tmp_path / "out.jsonl"
    generate(run, prompts, out, "--limit", 1)
    words: tuple[object, ...] = ()
    if change == "prompts":
        prompts.write_text('{"prompt": "Another"}\n')
    elif change == "file":
        out.write_text('{"foo": 1}\n')
    else:
        words = change
    before = out.read_bytes()
    assert exit_code("generate", run, prompts, "--out", out, "--max-tokens", 6, *words) == 2
    assert message in capsys.readouterr().err
    assert out.read_bytes() == before


def test_bad_rows_are_named_and_the_others_answered(run: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "bad.jsonl"
    rows = ['{"prompt": "a"}', "oops", '{"foo": 1}', json.dumps({"prompt": "8 " * 200}), '{"prompt": "b"}']
    path.write_text("\n".join(rows))
    lines = generate(run, path, tmp_path / "out.jsonl", code=1)
    assert [line["row"] for line in lines] == [0, 4]
    error = " ".join(capsys.readouterr().err.split())
    assert f"{path}:2: invalid JSON" in error
    assert f"{path}:3: no prompt" in error
    assert f"{path}:4: the prompt has" in error
    assert "the model takes 128" in error
    assert "3 rows of 5 could not be answered." in error


def test_lines_of_a_text_to_standard_output(run: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("How many?\n\nHow much?\n")
    succeed("generate", run, path, "--max-tokens", 4)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["messages"][0]["content"] for line in lines] == ["How many?", "How much?"]


def test_many_samples_of_the_same_answer(run: Path, prompts: Path, capsys: Any) -> None:
    assert exit_code("generate", run, prompts, "--samples", 2) == 2
    assert "the same answer 2 times" in capsys.readouterr().err


def test_the_result_of_a_real_run(tiny_model_dir: Path, prompts: Path, tmp_path: Path) -> None:
    result = train(run_settings(tiny_model_dir, tmp_path, train={"steps": 1}, adapter={"kind": "none"}))
    lines = generate(result.dir, prompts, tmp_path / "out.jsonl")
    assert len(lines) == 5
    assert exit_code("generate", result.dir, prompts, "--base") == 2
