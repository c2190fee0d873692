"""`Section`: the base of every group of settings.

Unknown names are refused, values are not coerced (`"16"` is not 16), instances are frozen, and the
docstring below each field is its help text and its line in the reference.
"""

from __future__ import annotations

from typing import Any, get_args

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


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation allows, through unions, lists and Annotated, in the order of the annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_of(argument)]
