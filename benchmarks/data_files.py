"""Rows and a tokenizer for the benchmarks of the data layer, made on the spot: no hub, no files of ours."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

_COMMON = (
    "the of and to in is that for it as was with be by on not he this are or his from at which but have an had "
    "they you were there one all we can her has their been if more when will would who so no out up into them"
)


def small_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 1,000 tokens with ChatML's control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    control = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([_sentence(random.Random(0), 20_000)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=control
    )


def _sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(_COMMON.split(), k=words))


def write_rows(
    path: Path, *, rows: int | None = None, megabytes: float | None = None, longest: int = 280
) -> int:
    """Write question and answer rows up to a number or a size; returns their number.

    Answers have 20 to `longest` words; a row of the default length takes some 700 bytes.
    """
    rng = random.Random(0)
    answers = [_sentence(rng, 20 + n % (longest - 20)) for n in range(1000)]
    written = size = 0
    limit = None if megabytes is None else megabytes * 1e6
    with path.open("w", encoding="utf-8") as stream:
        while (rows is None or written < rows) and (limit is None or size < limit):
            question = f"question {written}: {answers[written * 7 % 1000][:100]}"
            size += stream.write(json.dumps({"prompt": question, "response": answers[written % 1000]}) + "\n")
            written += 1
    return written
