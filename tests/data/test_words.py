"""Tokens of remembered words are those of the tokenizer, for every text."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import tiny_tokenizer
from tunesmith.data import words as words_module
from tunesmith.data.formats import Conversation, Text
from tunesmith.data.render import Renderer
from tunesmith.data.template import CHATML
from tunesmith.data.words import Words

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QWEN = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LOWER, UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
GPT_OSS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    by_pattern = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence(
        [by_pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE_TOKENIZERS: dict[str, pre_tokenizers.PreTokenizer] = {
    "gpt-2": BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
    "llama-3": split(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)),
    "qwen": split(QWEN),
    "gpt-oss": split(GPT_OSS),
}


def words_of(tokenizer: PreTrainedTokenizerFast) -> Words:
    return Words(tokenizer, [str(token) for token in tokenizer.added_tokens_decoder.values()])


ATOMS = [
    *(" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\xa0", "\u2028", "\x1c", "\x85", "\u200b", "\u3000"),
    *(
        "a",
        "The",
        "Don't",
        "'s",
        "'S",
        "x'",
        "20",
        "1,000",
        "3.5",
        "$",
        "/",
        "//",
        "(foo)",
        "...",
        '"',
        "word",
    ),
    *(
        "<<48/2=24>>24",
        "é",
        "日本",
        "\u0301",
        "🙂",
        "٣",
        "²",
        "wOrd,",
        "-",
        "=",
        "    ",
        "\x00",
        "\x01",
        "\x02",
        "\x03",
    ),
    *("<|im_end|>", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im", "<|endoftext|>"),
]


def greedy_backend() -> Tokenizer:
    """Merges over blanks, breaks and marks wherever a pre-tokenizer lets them: else no wrong cut would be seen."""
    rng = random.Random(0)
    backend = Tokenizer(models.BPE())
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    texts = ["".join(rng.choices(ATOMS[:-6], k=3)) for _ in range(6000)]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


GREEDY = greedy_backend().to_str()


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The greedy tokenizer with one of `PRE_TOKENIZERS`."""
    backend = Tokenizer.from_str(GREEDY)
    backend.pre_tokenizer = PRE_TOKENIZERS[name]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


CASES = {name: (tokenizer_of(name), words_of(tokenizer_of(name))) for name in PRE_TOKENIZERS}
"""Of all examples: what one text taught must not change another."""


def check(name: str, texts: list[str]) -> None:
    tokenizer, words = CASES[name]
    expected = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for text, encoding, ids_T in zip(texts, expected, words.encode(texts), strict=True):
        assert ids_T.tolist() == encoding.ids, repr(text)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from(ATOMS) | st.characters(codec="utf-8"), max_size=14), max_size=4))
def test_the_tokens_are_those_of_the_tokenizer(name: str, texts: list[list[str]]) -> None:
    assert CASES[name][1].usable
    check(name, ["".join(text) for text in texts])


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_texts_of_what_is_hard_to_cut(name: str) -> None:
    rng = random.Random(0)
    check(name, ["a...\n/a", "The Don't x", "a\n\n\nb", "a  20", "a...\n/a  ", "x\t\n y"])
    for _ in range(20):
        check(name, ["".join(rng.choices(ATOMS, k=rng.randrange(1, 12))) for _ in range(500)])


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_no_character_beside_a_cut_makes_a_difference(name: str) -> None:
    """Blanks of Python and of the patterns, marks and letters of all kinds: also those that nobody thought of."""
    rng = random.Random(0)
    rare = rng.sample([chr(code) for code in range(0x3100, 0x110000) if not 0xD800 <= code < 0xE000], 500)
    characters = [chr(code) for code in range(0x2100)] + rare + [chr(code) for code in range(0x2FF0, 0x3040)]
    for form in ("x{0} y", "x {0}y", "x  {0}y", "x{0}\ny", "x\n{0}y", "5{0} 6 {0}7"):
        check(name, [form.format(character) for character in characters])


@pytest.mark.parametrize(
    "make",
    [
        lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
        lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        lambda: split(r"\s+|\S+"),
        lambda: split(QWEN + r"|\w \w"),
        lambda: pre_tokenizers.Sequence([BYTE_LEVEL, pre_tokenizers.Digits()]),
        lambda: pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), BYTE_LEVEL]),
        lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "removed"), BYTE_LEVEL]),
    ],
)
def test_other_pre_tokenizers_are_left_alone(make: Callable[[], pre_tokenizers.PreTokenizer]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = make()
    assert not words_of(tokenizer).usable


def test_tables_stay_small_and_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_module, "_MOST_WORDS", 40)
    tokenizer = tokenizer_of("gpt-2")
    words = words_of(tokenizer)
    for start in range(0, 400, 20):
        texts = [
            f"word{number} some {number} <|im_end|> more. {'x' * 60}" for number in range(start, start + 20)
        ]
        expected = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        assert [ids_T.tolist() for ids_T in words.encode(texts)] == [encoding.ids for encoding in expected]
        assert len(words._table) <= 44
        assert len(words._pieces) <= 44
        assert all(len(key) <= 48 for key in words._table)


def test_text_whose_words_do_not_return_goes_to_the_tokenizer() -> None:
    """Chinese has no blanks: looking up its sentences would only cost time."""
    words = words_of(tokenizer_of("gpt-2"))
    rng = random.Random(0)
    for _ in range(27):
        assert words.pays, "at first all words are new"
        words.encode(["".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(10_000))])
    assert not words.pays
    english = words_of(tokenizer_of("gpt-2"))
    for _ in range(30):
        english.encode(["the same words again " * 500])
    assert english.pays


@pytest.mark.parametrize("changed", [False, True])
def test_rows_are_tokenised_by_words_where_that_is_exact(
    changed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of("gpt-2")
    if changed:
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    renderer = Renderer(tokenizer, CHATML)
    asked: list[str] = []
    encode = Words.encode
    monkeypatch.setattr(Words, "encode", lambda self, texts: asked.extend(texts) or encode(self, texts))
    talk = Conversation(
        [{"role": "user", "content": "Why  not?"}, {"role": "assistant", "content": "No\n\n."}]
    )
    rows = [renderer.render(talk), renderer.render(Text("plain text"))]
    batch = renderer.encoder.start(rows, with_offsets=False)
    made = renderer.encoder.finish(batch, batch.encode(), with_offsets=False)
    assert asked == ([] if changed else [row.text for row in rows])
    for one, exact in zip(made, renderer.encode(rows), strict=True):
        assert one.ids.tolist() == exact.ids.tolist()
        assert one.trained.tolist() == exact.trained.tolist()
