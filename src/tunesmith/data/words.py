r"""Tokens from remembered words: most words of a text were tokenised before.

A BPE tokenizer merges within the pieces that its pre-tokenizer cuts, so the tokens of a text are those of its pieces,
one behind the other. Words return: of the 104 of a row of GSM8K, 8 are new. So the tokens of words are remembered, a
text is cut into words by `str.split` and looked up, and Rust gets what is new, many words as one text.

It has to be exact. So cuts are made only where the pre-tokenizer cuts as well, and where either side is read alone
as it is read beside the other. With \S as Python has it, which calls more characters blank than the patterns do:

- At control tokens, which are found before anything else.
- Before blanks, `\S| `: no alternative of the patterns goes on from \S over a blank.
- Behind a single line break, `\S\n|\S`, where no `/` follows: no alternative goes on from a break to \S, except those
  that end in breaks and slashes. (Beside \S the break is left by `\s+(?!\S)` and taken by `\s+`; alone by the first.)

Whether all cuts of a text were good can be told from its words alone: each has to begin with \S and to end with \S
or with \S and a break, and no other word is remembered under the key that the quick cut gives it. Texts with other
words, as around two blanks, are cut again by a pattern that joins what belongs together.

Rejected: the `regex` module and the tokenizer's own pattern, which takes 60 microseconds for a row of GSM8K where
the quick cut takes 10; a table of all words that ever come, because memory would grow with the data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_FIRST, _AS_IS, _TWO = "\x01", "\x02", "\x03"
"""What a key begins with: `_FIRST` a word without a blank before it, `_TWO` one with two, `_AS_IS` text that is
taken as it stands. All others are words behind a blank."""
_BEGINS = frozenset((_FIRST, _AS_IS, _TWO))

_BREAK, _TWO_BREAKS = f"\n {_FIRST}", f"\n {_FIRST}\n {_FIRST}"
_CLEAN = re.compile(r"(?:\x01(?!/)|\x03)?[^\s\x01-\x03](?:.*\S)?\n?|\x02.*", re.DOTALL)
_JOINED = re.compile(r"\s*\S+(?:(?! |\n[^\s/])\s+\S*)*(?:\n(?=[^\s/]))?|\s+")
_ASCII = re.compile(r" ?[!-&(-~]+\n?")
_SMALLER = re.compile(r" ?[0-9]+|[^A-Za-z0-9]*[A-Za-z]+|[^A-Za-z0-9]+")

_MOST_WORDS, _LONGEST = 1 << 16, 48
"""Words that are remembered, and the longest key among them, in characters: some 15 MB."""
_SHORT = 4
_TEXTS = 32
"""Texts between which new words are learnt: in 512 of Alpaca's a new word comes three times."""
_AT_ONCE = 64
_TRIAL = 1 << 18
"""Characters before the share of new words is asked for: at first all words are new."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
ALTERNATIVES = frozenset(
    {
        *["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"],
        _CONTRACTIONS,
        r" ?\p{L}+",
        r" ?\p{N}+",
        r" ?[^\s\p{L}\p{N}]+",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        *_CASED,
        *[f"{cased}{_CONTRACTIONS}?" for cased in _CASED],
        r"\p{N}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    }
)
"""Alternatives of pre-tokenizers' patterns that were read for what is said above: those of GPT-2, Llama 3, Qwen 2 and
3, gpt-oss and Mistral's Tekken. A pattern with another one is not taken."""


class Words:
    """Tokenises texts by their words, for byte-level BPE without a normaliser (`anchors.Anchors.usable`).

    Args:
        tokenizer: a fast tokenizer.
        control: its special and added tokens.

    Attributes:
        usable: whether what is said above holds for the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        ordered = sorted(control, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, ordered)) or '(?!)'})")
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ordered}
        self._fixed = {_AS_IS + token: np.array([id_], np.int32).tobytes() for token, id_ in ids.items()}
        self._table, self._pieces = dict(self._fixed), dict[str, bytes]()
        self._between, self._between_id = next(iter(ids.items()), ("", -1))
        self._seen = self._new = 0
        self.usable = bool(control) and cuts_at_words(tokenizer.backend_tokenizer)

    @property
    def pays(self) -> bool:
        """Whether words return often enough: not in texts without blanks, as in Chinese."""
        return self._seen < _TRIAL or self._new * 2 < self._seen

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Tokens of each text, int32 `[T]` and read-only, as the tokenizer gives them without tokens of its own."""
        return [
            ids_T
            for start in range(0, len(texts), _TEXTS)
            for ids_T in self._encode(texts[start : start + _TEXTS])
        ]

    def _encode(self, texts: Sequence[str]) -> Iterator[NDArray[np.int32]]:
        get = self._table.get
        new: dict[str, bytes] = {}
        rows: list[tuple[list[bytes | None], list[tuple[int, str]]]] = []
        for text in texts:
            keys = self._cut(text)
            parts = list(map(get, keys))
            missing: list[tuple[int, str]] = []
            if None in parts:
                missing = _missing(keys, parts)
                if not all(key in new or _is_clean(key) for _, key in missing):
                    keys = self._cut_again(text)
                    parts = list(map(get, keys))
                    missing = _missing(keys, parts)
                new.update([(key, b"") for _, key in missing])
            rows.append((parts, missing))
        self._seen += sum(map(len, texts))
        if new:
            self._learn(new)
        for found, missing in rows:
            for place, key in missing:
                found[place] = new[key]
            yield np.frombuffer(b"".join(found), dtype=np.int32)  # type: ignore[arg-type]

    def _segments(self, text: str) -> Iterator[tuple[str, bool]]:
        """What stands between control tokens, and these, which can be taken as they stand."""
        plain = any(mark in text for mark in _BEGINS)
        for number, part in enumerate(self._control.split(text)):
            if part:
                yield part, plain or number % 2 == 1 or len(part) <= _SHORT

    def _cut(self, text: str) -> list[str]:
        """Keys of a text by the quick cut."""
        keys: list[str] = []
        for part, is_whole in self._segments(text):
            if is_whole:
                keys.append(_AS_IS + part)
            else:
                lines = part.replace("  ", f" {_TWO}").replace("\n", _BREAK).replace(_TWO_BREAKS, "\n\n")
                keys += (_FIRST + lines).split(" ")
        return keys

    def _cut_again(self, text: str) -> list[str]:
        """Keys of a text, all of which are clean."""
        keys: list[str] = []
        for part, is_whole in self._segments(text):
            if is_whole:
                keys.append(_AS_IS + part)
                continue
            keys += map(_key, _JOINED.findall(part))
        return keys

    def _learn(self, new: dict[str, bytes]) -> None:
        """Fill in the tokens of new keys, and remember them and those of their pieces."""
        known = self._pieces  # another thread may begin new ones
        words = [_word(key) for key in new]
        pieces = [_SMALLER.findall(word) if _ASCII.fullmatch(word) else [word] for word in words]
        unknown = list({piece: None for some in pieces for piece in some if piece not in known})
        found = dict(zip(unknown, self._tokens(unknown), strict=True))
        self._new += sum(map(len, unknown))
        for key, some in zip(new, pieces, strict=True):
            new[key] = b"".join([found[piece] if piece in found else known[piece] for piece in some])
        self._table = _joined(self._table, new, self._fixed)
        self._pieces = _joined(known, found, {})

    def _tokens(self, words: list[str]) -> list[bytes]:
        """The tokens of words, from the tokenizer: many as one text, between control tokens."""
        groups = [words[start : start + _AT_ONCE] for start in range(0, len(words), _AT_ONCE)]
        joined = self._ids([self._between.join(group) for group in groups])
        found: list[bytes] = []
        for group, ids_T in zip(groups, joined, strict=True):
            ends = np.flatnonzero(ids_T == self._between_id).tolist()
            if len(ends) == len(group) - 1:
                content = ids_T.tobytes()
                found += [content[4 * (s + 1) : 4 * e] for s, e in pairwise([-1, *ends, len(ids_T)])]
            else:  # a word and the control token behind it make another one
                found += [ids_T.tobytes() for ids_T in self._ids(group)]
        return found

    def _ids(self, texts: list[str]) -> list[NDArray[np.int32]]:
        encodings = self._tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


def _is_clean(key: str) -> bool:
    return _CLEAN.fullmatch(key) is not None


def _missing(keys: list[str], parts: list[bytes | None]) -> list[tuple[int, str]]:
    return [(place, keys[place]) for place, part in enumerate(parts) if part is None]


def _word(key: str) -> str:
    """The text behind a key."""
    begin = key[:1]
    return f" {key}" if begin not in _BEGINS else f"  {key[1:]}" if begin == _TWO else key[1:]


def _key(word: str) -> str:
    """The key of a text."""
    key = _FIRST + word
    if word[0] == " ":
        key = _TWO + word[2:] if word[1:2] == " " else word[1:]
    return key if _is_clean(key) else _AS_IS + word


def _joined(old: dict[str, bytes], more: dict[str, bytes], fixed: dict[str, bytes]) -> dict[str, bytes]:
    """A table with more entries, or a new one of these where it would grow too large."""
    if len(old) + len(more) > _MOST_WORDS:
        old = dict(fixed)
    short = ((key, part) for key, part in more.items() if len(key) <= _LONGEST)
    old.update(islice(short, _MOST_WORDS))
    return old


def cuts_at_words(backend: Tokenizer) -> bool:
    """Whether the pre-tokenizer cuts at words as is said above."""
    if backend.pre_tokenizer is None:
        return False
    state: dict[str, Any] = json.loads(backend.pre_tokenizer.__getstate__())
    steps = state.get("pretokenizers", [state])
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds[:-1] or not all(kind in _STEPS for kind in kinds):
        return False
    cuts = [_STEPS[kind](step) for kind, step in zip(kinds, steps, strict=True)]
    return None not in cuts and True in cuts


def _byte_level_cuts(step: dict[str, Any]) -> bool | None:
    return None if step["add_prefix_space"] else bool(step["use_regex"])


def _split_cuts(step: dict[str, Any]) -> bool | None:
    if step["behavior"] != "Isolated" or step["invert"] or "Regex" not in step["pattern"]:
        return None
    found = re.split(r"\|(?![^(]*\))", step["pattern"]["Regex"])  # not those in parentheses
    return True if ALTERNATIVES.issuperset(found) else None


_STEPS: dict[str, Callable[[dict[str, Any]], bool | None]] = {
    "ByteLevel": _byte_level_cuts,
    "Split": _split_cuts,
    "Digits": lambda _: False,
}
"""Steps of pre-tokenizers: whether one makes the cuts; None where it may do otherwise. Digits are cut out of a text
wherever they stand, so what is said of a text is true of what is left between them."""
