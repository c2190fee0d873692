"""`Section`: the base of every group of settings.

Unknown names are refused, values are not coerced (`"16"` is not 16), instances are frozen, and the
docstring below each field is its help text and its line in the reference.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of settings that refuses unknown names and wrong types."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
