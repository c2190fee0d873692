"""What `from tunesmith import …` gives, and what it says of names that other libraries have."""

from __future__ import annotations

import pytest

import tunesmith
from tunesmith._elsewhere import INSTEAD


@pytest.mark.parametrize("name", tunesmith.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(tunesmith, name) is not None
    assert name in dir(tunesmith)


def test_names_of_other_libraries_say_what_to_do() -> None:
    with pytest.raises(ImportError, match=r"^tunesmith has no PatchDPOTrainer\. Nothing is patched here"):
        from tunesmith import PatchDPOTrainer  # noqa: F401
    with pytest.raises(ImportError, match=r"Use is_bfloat16_supported\.$"):
        from tunesmith import is_bf16_supported  # noqa: F401
    assert not INSTEAD.keys() & set(tunesmith.__all__)


def test_what_nobody_has_is_no_attribute() -> None:
    assert not hasattr(tunesmith, "FastLanguageModle")
    with pytest.raises(ImportError, match="cannot import name"):
        from tunesmith import FastLanguageModle  # noqa: F401
