"""Sample answers while a run goes on: what is asked, when, and that training does not notice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import build, train
from tunesmith.config import prepare_data
from tunesmith.contracts.errors import ConfigError, UserError
from tunesmith.data.sources import open_source
from tunesmith.models.generate import Stop
from tunesmith.training.metrics import read_events
from tunesmith.training.sample import sample_answers


@pytest.fixture
def settings(settings: Callable[..., dict[str, Any]]):
    def make(**sections: dict[str, Any]) -> dict[str, Any]:
        sections["output"] = {"sample_every": 2, "sample_tokens": 5} | sections.get("output", {})
        return settings(**sections)

    return make


def _weights(run) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in run.backend.trained_parameters().items()}


def test_training_is_the_same_bit_for_bit_with_and_without_samples(settings, tmp_path):
    """With dropout, and with generation that draws random numbers of its own and leaves modes behind."""
    outcomes = []
    for name, every in (("with", 2), ("without", None)):
        made = settings(adapter={"dropout": 0.3}, output={"sample_every": every, "dir": str(tmp_path / name)})
        run, recorder = build(made)
        original = run.causal.model.generate

        def draws(*args: Any, _original=original, **kwargs: Any) -> Any:
            torch.rand(7)
            return _original(*args, **kwargs)

        run.causal.model.generate = draws
        with run.packed():
            run.trainer.train()
        outcomes.append((_weights(run), [event.loss for event in recorder.of("step")]))
        assert bool(recorder.of("sample")) is (every is not None)
    (weights, losses), (others, other_losses) = outcomes
    assert losses == other_losses
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_samples_before_during_and_at_the_end_of_a_run(settings):
    run, recorder = build(settings(train={"steps": 5}, output={"sample_prompts": ["Hello?", "How many?"]}))
    with run.packed():
        run.trainer.train()
    samples = recorder.of("sample")
    assert [(event.step, event.prompt) for event in samples] == [
        (step, prompt) for step in (0, 2, 4, 5) for prompt in ("Hello?", "How many?")
    ]
    assert all(event.seconds > 0 for event in samples)
    kinds = [event.kind for event in recorder.events if event.step == 2]
    assert kinds.index("step") < kinds.index("sample")


def test_a_sample_is_what_the_model_answers_through_its_stock_path(settings, tiny_model_dir):
    """The answer of the trained weights, generated after the run, without packed attention."""
    run, recorder = build(settings(output={"sample_prompts": ["natalia sold"]}))
    assert run.causal.base.config._attn_implementation == "sdpa"
    with run.packed():
        inside = run.causal.base.config._attn_implementation
        seen = []
        run.causal.base.register_forward_hook(
            lambda module, *_: seen.append(module.config._attn_implementation)
        )
        run.trainer.train()
        assert run.causal.base.config._attn_implementation == inside
    assert inside != "sdpa"
    assert set(seen) == {"sdpa"}, "only generation calls the whole model"
    assert run.causal.model.training, "and leaves it in training mode"
    text = run.data.renderer.prompt([{"role": "user", "content": "natalia sold"}])
    ids = run.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    run.causal.model.eval()
    output = run.causal.model.generate(
        input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=run.tokenizer.eos_token_id
    )
    answer = run.tokenizer.decode(output[0][ids.shape[1] :], skip_special_tokens=True).strip()
    assert recorder.of("sample")[-1].answer == answer


def test_the_first_prompts_that_are_held_out_are_asked(settings):
    run, _ = build(settings(data={"eval": {"fraction": 0.2}}))
    rows = [json.loads(line) for line in Path(run.settings.data.train[0].path).read_text().splitlines()]
    places = [run.data.corpus.where(document) for document in run.data.held_out_N[:3]]
    expected = [rows[int(place.rpartition(":")[2]) - 1]["question"] for place in places]
    prompts = run.trainer.sampler.prompts
    assert [prompt.shown for prompt in prompts] == expected
    for prompt, document in zip(prompts, run.data.held_out_N, strict=False):
        source, index = run.data.corpus.locate(int(document))
        first = int(source.trained(index).argmax())
        assert list(prompt.ids) == source.ids(index)[:first].tolist(), "what the document begins with"


def test_prompts_of_several_sources_and_of_training_rows_where_nothing_is_held_out(settings, tmp_path):
    made = settings(data={"eval": {"fraction": 0.0}})
    first = tmp_path / "two.jsonl"
    first.write_text("".join(json.dumps({"question": f"q{n}", "answer": "a"}) + "\n" for n in range(2)))
    made["data"]["train"].insert(0, {"path": str(first)})
    run, _ = build(made)
    shown = [prompt.shown for prompt in run.trainer.sampler.prompts]
    assert shown[:2] == ["q0", "q1"]
    assert len(shown) == 3


def test_sources_are_opened_once(settings, monkeypatch):
    opened = []

    def count(path: str, **options: Any) -> Any:
        opened.append(path)
        return open_source(path, **options)

    monkeypatch.setattr(prepare_data, "open_source", count)
    made = settings(data={"eval": {"fraction": 0.2}})
    run, _ = build(made)
    assert len(run.trainer.sampler.prompts) == 3
    assert opened == [made["data"]["train"][0]["path"]]


def test_a_text_is_asked_by_its_beginning(settings, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("natalia sold clips to her friends in april and then half as many in may\n" * 8)
    made = settings()
    made["data"]["train"] = [{"path": str(texts)}]
    run, _ = build(made)
    prompt = run.trainer.sampler.prompts[0]
    assert 1 <= len(prompt.ids) <= 16
    assert "natalia sold clips to her friends".startswith(prompt.shown.strip()[:20])


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("p.txt", "What is 2+2?\n\nSay hi.\n", ["What is 2+2?", "Say hi."]),
        ("p.jsonl", '{"prompt": "Hi?"}\n', ["Hi?"]),
        ("p.jsonl", '{"question": "Hi?", "answer": "Yes."}\n', ["Hi?"]),
        (
            "p.jsonl",
            '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}, '
            '{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "No?"}, '
            '{"role": "assistant", "content": "No."}]}\n',
            ["Hi?"],
        ),
    ],
)
def test_prompts_of_a_file(settings, tmp_path, name, text, shown):
    (tmp_path / name).write_text(text)
    run, _ = build(settings(output={"sample_prompts": str(tmp_path / name)}))
    prompts = run.trainer.sampler.prompts
    assert [prompt.shown for prompt in prompts] == shown
    written = run.tokenizer.decode(prompts[0].ids)
    assert written.endswith(f"<|im_start|>user\n{shown[0]}<|im_end|>\n<|im_start|>assistant\n")
    assert ("Be brief." in written) == ("Be brief." in text)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "0 prompts; a run asks between 1 and 16"),
        (["a"] * 17, "17 prompts"),
        ("nowhere.txt", r"there is no file nowhere\.txt.\nA prompt itself is written in a list"),
        ("bad.jsonl", r"bad\.jsonl:2 is no prompt"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(settings, tmp_path, monkeypatch, prompts, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Hi?"}\n{"prompt": \n')
    with pytest.raises(UserError, match=message):
        build(settings(output={"sample_prompts": prompts}))


def test_a_stream_needs_prompts_or_rows_that_are_held_out(settings):
    made = settings(data={"streaming": True, "eval": {"fraction": 0.0}})
    with pytest.raises(ConfigError, match=r"write output\.sample_prompts"):
        train(made)
    made["output"]["sample_prompts"] = ["Hi?"]
    result = train(made)
    asked = [e["step"] for e in read_events(result.dir / "events.jsonl") if e["event"] == "sample"]
    assert asked == [0, 2, 4, 6]


def test_a_run_that_goes_on_does_not_ask_again(settings):
    train(settings(train={"steps": 4}, output={"sample_prompts": ["Hi?"]}))
    result = train(settings(train={"steps": 4}, output={"sample_prompts": ["Hi?"]}))
    result = train(settings(train={"steps": 6}, output={"sample_prompts": ["Hi?"]}))
    samples = [e for e in read_events(result.dir / "events.jsonl") if e["event"] == "sample"]
    assert [event["step"] for event in samples] == [0, 2, 4, 6]
    assert set(samples[0]) == {"event", "step", "prompt", "answer", "seconds"}


def test_a_prompt_longer_than_the_model_loses_its_beginning(settings):
    run, _ = build(settings())
    lengths = []
    run.causal.base.register_forward_pre_hook(
        lambda _module, _args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    (answer,) = sample_answers(
        run.causal.model, run.tokenizer, [list(range(3, 300)) * 4], max_new_tokens=12, stop=Stop()
    )
    assert lengths[0] == 512 - 12
    assert isinstance(answer, str)
