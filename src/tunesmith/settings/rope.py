"""How rotary positions are stretched for rows longer than a model was made for, in transformers' own words.

A kind of scaling has its own parameters; `KINDS` says which it needs and which it takes. What a mapping lacks, or
says for nothing, is found here, before a model is: `scaling_problems` serves the run file and the Python interface.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from tunesmith.settings.base import Section

Factors = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False)]
"""One number for each pair of rotated channels."""


class Kind(NamedTuple):
    """Parameters of a kind of scaling: those it cannot do without, and those that have a default."""

    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "linear": Kind(("factor",)),
    "dynamic": Kind(("factor",)),
    "yarn": Kind(
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "llama3": Kind(("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "longrope": Kind(
        ("short_factor", "long_factor"), ("factor", "original_max_position_embeddings", "attention_factor")
    ),
}
"""Every kind of scaling."""


class RopeScaling(Section):
    """How rotary positions are stretched for rows longer than the model was made for. Names are transformers'."""

    rope_type: Literal["linear", "dynamic", "yarn", "llama3", "longrope"]
    """`linear` divides positions by `factor`; `dynamic` raises the base of the frequencies with the length of each
    document; `yarn` (https://arxiv.org/abs/2309.00071) and `llama3` slow down the slow frequencies only; `longrope`
    (https://arxiv.org/abs/2402.13753) has a divisor for each frequency."""
    factor: float | None = Field(default=None, ge=1)
    """How many times longer rows may be than the model was made for."""
    original_max_position_embeddings: int | None = Field(default=None, ge=1)
    """Length in tokens that the model was made for; by default its config says it."""
    attention_factor: float | None = Field(default=None, gt=0)
    """Factor on cosines and sines (`yarn`, `longrope`); by default it follows from `factor`."""
    beta_fast: float | None = Field(default=None, gt=0)
    """`yarn`: frequencies that turn more often than this over the original length stay as they are. Default 32."""
    beta_slow: float | None = Field(default=None, gt=0)
    """`yarn`: frequencies that turn less often than this are divided by `factor`. Default 1."""
    mscale: float | None = Field(default=None, gt=0)
    """`yarn`: weight of the length in `attention_factor`, over that of `mscale_all_dim`."""
    mscale_all_dim: float | None = Field(default=None, gt=0)
    """`yarn`: see `mscale`."""
    truncate: bool | None = None
    """`yarn`: round the bounds between frequencies to whole channels. Default true."""
    low_freq_factor: float | None = Field(default=None, gt=0)
    """`llama3`: frequencies that turn less often than this over the original length are divided by `factor`."""
    high_freq_factor: float | None = Field(default=None, gt=0)
    """`llama3`: frequencies that turn more often than this stay as they are."""
    short_factor: Factors | None = None
    """`longrope`: divisors of the frequencies in documents of up to the original length."""
    long_factor: Factors | None = None
    """`longrope`: divisors of the frequencies in longer documents."""

    def parameters(self) -> dict[str, Any]:
        """What is set, as transformers has it in `rope_parameters`."""
        return self.model_dump(mode="json", exclude_none=True)


def scaling_problems(scaling: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What is wrong between the parameters of a scaling whose values are each valid.

    Yields:
        The parameter, what stood there, and what was expected.
    """
    kind = str(scaling["rope_type"])
    needs, takes = KINDS[kind]
    missing = [name for name in needs if name not in scaling]
    if missing:
        yield "rope_type", f"{kind} without {' and '.join(missing)}", f"it needs {' and '.join(needs)}"
    for name in scaling:
        if name not in (*needs, *takes, "rope_type"):
            users = [other for other, each in KINDS.items() if name in (*each.needs, *each.takes)]
            yield name, f"{kind} with {name}", f"that is of {' and '.join(users)}: remove it"
    if not missing:
        yield from _wrong_values(kind, scaling)


def _wrong_values(kind: str, scaling: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Values that contradict each other, where all that a kind needs is there."""
    if kind == "yarn" and ("mscale" in scaling) != ("mscale_all_dim" in scaling):
        yield "mscale", "one of mscale and mscale_all_dim", "only their ratio counts: set both, or neither"
    if kind == "yarn" and not scaling.get("beta_fast", 32) > scaling.get("beta_slow", 1):
        yield (
            "beta_fast",
            "beta_fast is not above beta_slow",
            "fast frequencies turn more often than slow ones",
        )
    if kind == "llama3" and not scaling["high_freq_factor"] > scaling["low_freq_factor"]:
        yield (
            "high_freq_factor",
            "high_freq_factor is not above low_freq_factor",
            "high frequencies turn more often than low ones: Llama 3.1 has 4 and 1",
        )
    if kind == "longrope" and len(scaling["short_factor"]) != len(scaling["long_factor"]):
        yield (
            "long_factor",
            f"short_factor has {len(scaling['short_factor'])} numbers and long_factor {len(scaling['long_factor'])}",
            "both have one for each pair of rotated channels",
        )
