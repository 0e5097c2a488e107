"""A moment in a request: RFC 3339 text with a UTC offset, and nothing that merely could be read as one."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import AwareDatetime, GetCoreSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

# Seconds may be missing: some platforms leave out what is zero.
RFC_3339 = r"^\d{4}-\d\d-\d\d[Tt]\d\d:\d\d(:\d\d(\.\d+)?)?([Zz]|[+-]\d\d:\d\d)$"

EXPECTED = "A moment with a UTC offset (RFC 3339), such as 2026-01-05T08:00:00+01:00"


class _Text:
    """Refuses numbers, and text of numbers, which pydantic would take for seconds or milliseconds since 1970."""

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        # Once the text has its form, reading it as a moment need not be strict about its type.
        read = core_schema.datetime_schema(tz_constraint="aware", strict=False)
        text = core_schema.custom_error_schema(
            core_schema.chain_schema([core_schema.str_schema(pattern=RFC_3339), read]),
            "moment",
            custom_error_message=EXPECTED,
        )
        moment = core_schema.datetime_schema(tz_constraint="aware", strict=True)
        return core_schema.json_or_python_schema(text, core_schema.union_schema([moment, text]))


Moment: TypeAlias = Annotated[AwareDatetime, _Text, WithJsonSchema({"type": "string", "format": "date-time"})]
