"""Lines that are plain are split fast, and to the same fields as any others."""

import hashlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_schemas.errors import BadInput
from data_schemas.layout import Layout, known_layouts, load_layout
from hospital_node import delimited
from hospital_node.delimited import _any_table, _plain_table
from hospital_node.export_files import ExportFile

FIELD = st.text(st.sampled_from("019,.;-+aé NUL\t\u2028"), max_size=4) | st.sampled_from(
    ["NA", "null", "nan", "None", "", "1e5", "Low", "#N/A", "-1.#IND", "2024-01-01T00:00:00Z"]
)


def file_of(body: str) -> ExportFile:
    from pathlib import Path

    content = body.encode()
    digest = hashlib.sha256(content).hexdigest()
    return ExportFile(Path("a.csv"), "file 1", len(content), 0, digest, digest, content)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(FIELD, FIELD, FIELD), min_size=1, max_size=6), st.sampled_from(",;\t|"), st.booleans())
def test_plain_lines_have_the_fields_that_any_lines_have(
    rows: list[tuple[str, str, str]], delimiter: str, crlf: bool
) -> None:
    """Whatever is read fast is what pandas reads, absent values included; the rest is left to pandas."""
    body = "".join(delimiter.join(row) + ("\r\n" if crlf else "\n") for row in rows)

    fast = _plain_table(body, delimiter, 3, [0, 2])

    if fast is not None:
        slow = _any_table(file_of(body), body, delimiter, 3, [0, 2])
        assert (
            fast.to_numpy(dtype=object, na_value=None).tolist() == slow.to_numpy(dtype=object, na_value=None).tolist()
        )


@pytest.mark.parametrize(
    "body",
    [
        "a,b,c\n1,2\n",
        "a,b,c,d\n",
        '1,"2",3\n',
        "1, 2,3\n",
        "1,2,3\n\n4,5,6\n",
        "1,2\n3,4,5,6\n",
        " 1,2,3\n",
        "1,2,3\r4,5,6",
    ],
)
def test_what_is_not_plain_is_left_to_the_other_reader(body: str) -> None:
    """Missing or surplus fields, quotes, spaces, empty lines and odd line ends take more than splitting."""
    assert _plain_table(body, ",", 3, [0, 1, 2]) is None


def test_plain_lines_are_read_without_a_line_end_and_in_any_column_order() -> None:
    """The last line may lack its end; columns come in the order of their places."""
    table = _plain_table("1,,3\r\n4,x,6", ",", 3, [1, 2])

    assert table is not None
    want = pd.DataFrame({"a": [np.nan, "x"], "b": ["3", "6"]}, dtype="str")
    assert table.set_axis(["a", "b"], axis=1).equals(want)


def test_the_layouts_are_asked_once_which_names_they_know_however_wide_a_first_line_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def asking(name: str) -> Layout:
        asked.append(name)
        return load_layout(name)

    monkeypatch.setattr(delimited, "load_layout", asking)
    wide = file_of(",".join(["time"] * 500 + [f"x{number}" for number in range(5000)]))
    wanted = delimited.Wanted(("stamp",), False, ("glucose",), ())
    with pytest.raises(BadInput, match=r"5500 fields, of which Islet knows 'time'$"):
        delimited.read_delimited(wide, load_layout("canonical"), wanted)
    assert sorted(asked) == sorted(known_layouts())
