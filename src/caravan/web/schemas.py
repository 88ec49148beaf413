"""The shapes of JSON at the edge: camelCase outside, snake_case inside; nothing unstorable comes in."""

from __future__ import annotations

import math
from datetime import date
from typing import Annotated, Any, cast

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

DEPTH_MAX = 20


def refuse_unstorable(value: Any, depth: int = 0) -> None:
    """Raise ValueError for what PostgreSQL can't keep as text or jsonb: NUL characters, halves of surrogate pairs,
    NaN and the infinities (which Python's JSON knows), and nesting deeper than anybody means. For texts that don't
    come through an `In`."""
    if depth > DEPTH_MAX:
        raise ValueError("is nested too deeply")
    if isinstance(value, str):
        if "\x00" in value:
            raise ValueError("holds a NUL character")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair") from None
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("holds a number that is none")
    elif isinstance(value, dict):
        for key, inner in cast("dict[Any, Any]", value).items():
            refuse_unstorable(key, depth + 1)
            refuse_unstorable(inner, depth + 1)
    elif isinstance(value, list):
        for inner in cast("list[Any]", value):
            refuse_unstorable(inner, depth + 1)


class In(BaseModel):
    """A request's body. Unknown fields are ignored: adding is free, on both sides."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        frozen=True,
        str_strip_whitespace=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _is_storable(cls, value: Any) -> Any:
        refuse_unstorable(value)
        return value


class Out(BaseModel):
    """An answer's body; `model_validate` makes it of whatever has such attributes. A dataclass that holds nothing but
    what is answered may be a field as it is: its names become camelCase too."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, from_attributes=True)


def _storable(text: str) -> str:
    refuse_unstorable(text)
    return text


Storable = AfterValidator(_storable)  # for texts of forms: a multipart part may name any encoding that Python knows
# A free text of a query or a path (`q=`): bounded and storable.
QueryText = Annotated[str, Field(max_length=200), Storable]
Name = Annotated[str, Field(min_length=1, max_length=200)]
# What an operator writes to say why; `audit.require_note` refuses an empty one with NOTE_REQUIRED.
Note = Annotated[str, Field(max_length=2000)]
Instant = AwareDatetime


def _written(value: Any) -> Any:
    """A date is written, never a number of seconds, which pydantic would take too."""
    if not isinstance(value, str | date):
        raise ValueError("must be a date such as 2026-01-09")
    return value


CalendarDate = Annotated[date, BeforeValidator(_written)]
