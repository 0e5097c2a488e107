"""The base of every value that crosses a room: immutable, and strict about unknown fields."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """An immutable value; an unknown field is an error, not a surprise."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def later(default: Any, **limits: Any) -> Any:
    """Field that a type got after values of it had been hashed, signed or logged.

    While it holds its default it is not written, so what was hashed before stays what it is: an upgrade in the middle
    of a run goes on with that run, and no hospital pays for its rounds again.
    """
    return Field(default=default, exclude_if=lambda value: value == default, **limits)
