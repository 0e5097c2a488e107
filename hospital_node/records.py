"""Exports that are trees, JSON, FHIR bundles and XML, as tables of text columns."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any
from xml.etree import ElementTree as ET

import pandas as pd

from data_schemas.errors import BadInput
from data_schemas.layout import Layout
from hospital_node.delimited import Wanted, read_delimited
from hospital_node.export_files import ExportFile, text_of

_AGAIN = "export it again from the source and import the whole file"
_LOINC = "http://loinc.org"
Record = dict[str, Any]


def read_table(file: ExportFile, layout: Layout, wanted: Wanted) -> pd.DataFrame:
    """Return the wanted columns that the file has, as text, by the layout's reader; a missing value is NaN.

    Raises BadInput when the file is not what the reader reads or has none of the columns.
    """
    if layout.reader == "delimited":
        return read_delimited(file, layout, wanted)
    table = pd.DataFrame(_RECORDS[layout.reader](file, layout, wanted.names), dtype="str")
    present = [name for name in wanted.names if name in table.columns]
    if len(table) and not wanted.heads(present) and not wanted.sparse:
        raise BadInput(
            f"{file.label} has records without {' or '.join(repr(name) for name in wanted.stamp)}, or without "
            f"{' or '.join(repr(name) for name in wanted.quantity)}",
            "choose the layout of this export",
        )
    return table.reindex(columns=present or list(wanted.names)).astype("str")


def _json_records(file: ExportFile, layout: Layout, names: tuple[str, ...]) -> list[Record]:
    """One record for each object; a column is a dotted path."""
    paths = {name: name.split(".") for name in names}
    found = _objects(_json_documents(file, layout), layout.records)
    return [_flat(record, paths) for record in found if isinstance(record, dict)]


def _json_documents(file: ExportFile, layout: Layout) -> list[Any]:
    """Return the file's JSON document, or those of its lines (ndjson)."""
    text = text_of(file, layout.encoding)
    if not text.strip():
        raise BadInput(f"{file.label} is empty", _AGAIN)
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError):
        lines = [line for line in text.splitlines() if line.strip()]
    try:
        return _lines(lines)
    except (ValueError, RecursionError):
        raise BadInput(f"{file.label} is not JSON, or is cut off", _AGAIN) from None


def _lines(lines: list[str]) -> list[Any]:
    if len(lines) < 2:
        raise ValueError("one line that is not JSON")
    return [json.loads(line) for line in lines]


def _objects(documents: list[Any], keys: tuple[str, ...]) -> Iterator[Any]:
    """Yield the records: the members of a list, of the list under one of the keys, or the documents themselves."""
    for document in documents:
        inside = next((document[key] for key in keys if isinstance(document, dict) and key in document), document)
        if isinstance(inside, list):
            yield from inside
        else:
            yield inside


def _flat(record: Record, paths: dict[str, list[str]]) -> Record:
    flat: Record = {}
    for name, path in paths.items():
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, dict | list):
            flat[name] = _text(value)
    return flat


def _text(value: Any) -> str:
    """Return the shortest text of a value: 1705449360000 and not 1.70544936e12."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value)


def _fhir_records(file: ExportFile, layout: Layout, _names: tuple[str, ...]) -> list[Record]:
    """One record for each Observation of the bundles (FHIR R4): subject, effective, value, unit and code."""
    records = []
    for document in _json_documents(file, layout):
        entries = document.get("entry") if isinstance(document, dict) and "entry" in document else [document]
        for entry in entries if isinstance(entries, list) else []:
            resource = entry.get("resource", entry) if isinstance(entry, dict) else {}
            if isinstance(resource, dict) and resource.get("resourceType") == "Observation":
                records.append(_observation(resource))
    if not records:
        raise BadInput(f"{file.label} holds no Observation", "give FHIR R4 bundles, or ndjson of Observations")
    return records


def _observation(resource: Record) -> Record:
    """Flatten one Observation; without a value (dataAbsentReason) it stays as a row without one."""
    quantity = _under(resource, "valueQuantity")
    word = {"<": "Low", "<=": "Low", ">": "High", ">=": "High"}.get(str(quantity.get("comparator")))
    coding = _under(resource, "code").get("coding")
    codes = [c for c in coding if isinstance(c, dict)] if isinstance(coding, list) else []
    loinc = [str(c.get("code")) for c in codes if c.get("system") == _LOINC]
    subject = _under(resource, "subject")
    fields = {
        "subject": subject.get("reference") or _under(subject, "identifier").get("value"),
        "effective": resource.get("effectiveDateTime") or resource.get("effectiveInstant"),
        "value": word or quantity.get("value"),
        "unit": quantity.get("code") or quantity.get("unit"),
        "code": "|".join(loinc),
    }
    return {name: _text(value) for name, value in fields.items() if value is not None}


def _under(resource: Record, key: str) -> Record:
    value = resource.get(key)
    return value if isinstance(value, dict) else {}


def _xml_records(file: ExportFile, layout: Layout, _names: tuple[str, ...]) -> list[Record]:
    """One record for each element without children: its attributes, `table` (its parent) and the root's, dotted.

    Entities are refused: they can expand to any size.
    """
    if b"<!ENTITY" in file.content or "<!ENTITY" in text_of(file, layout.encoding):
        raise BadInput(f"{file.label} declares XML entities", "export it again from the source")
    records: list[Record] = []
    above: list[ET.Element] = []
    root: Record = {}
    try:
        for event, element in ET.iterparse(io.BytesIO(file.content), events=("start", "end")):  # noqa: S314 (entities are refused above)
            if event == "start":
                root = root or {f"{element.tag}.{name}": value for name, value in element.attrib.items()}
                above.append(element)
                continue
            above.pop()
            if above and not len(element) and element.attrib:
                records.append({**element.attrib, **root, "table": above[-1].tag})
            if len(above) > 1:
                element.clear()
    except (ET.ParseError, ValueError, LookupError):
        raise BadInput(f"{file.label} is not XML, or is cut off", _AGAIN) from None
    if not records:
        raise BadInput(f"{file.label} holds no events", _AGAIN)
    return records


_RECORDS: dict[str, Callable[[ExportFile, Layout, tuple[str, ...]], list[Record]]] = {
    "json": _json_records,
    "fhir": _fhir_records,
    "xml": _xml_records,
}
