"""Any series, written as a source writes it, comes back equal; any bytes are read or refused, never a crash."""

from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_schemas.errors import BadInput
from data_schemas.layout import known_layouts, load_layout
from hospital_node.intake import read_exports
from tests.hospital_node.written_exports import START, WRITERS, Series, put, written

KEY = b"k" * 32
QUICK = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])

series = st.lists(
    st.tuples(st.integers(0, 17 * 1440), st.integers(40, 400)), min_size=1, max_size=30, unique_by=lambda pair: pair[0]
).map(lambda pairs: [(START + timedelta(minutes=minute), value) for minute, value in pairs])


def test_every_layout_has_a_writer() -> None:
    """What comes with Islet is tested; the one layout without dates has a test of its own."""
    assert set(WRITERS) == set(known_layouts()) - {"mostoles"}


@pytest.mark.parametrize("layout", WRITERS)
@QUICK
@given(rows=series)
def test_any_series_in_any_layout_comes_back_equal(layout: str, rows: Series) -> None:
    """Times to the second and values to a float's precision, in file order."""
    with TemporaryDirectory() as folder:
        put(Path(folder), layout, written(layout, rows))
        frame = read_exports(Path(folder), load_layout(layout), "Europe/Madrid", KEY).frame

    assert frame["measured_at"].tolist() == [when for when, _ in rows]
    assert frame["glucose_mg_dl"].tolist() == pytest.approx([value for _, value in rows], rel=1e-6)


@QUICK
@given(st.integers(0, 1439), st.lists(st.tuples(st.integers(1, 700), st.integers(40, 400)), min_size=1, max_size=30))
def test_a_series_of_clock_times_keeps_its_steps(first: int, steps: list[tuple[int, int]]) -> None:
    """Without dates, the minutes between rows come back, over any number of midnights."""
    at, total = [], first
    for step, value in steps:
        at.append((total, value))
        total += step
    lines = "".join(f"{m // 60 % 24:02d}:{m % 60:02d}:00,{value}\n" for m, value in at)
    with TemporaryDirectory() as folder:
        (Path(folder) / "case  1.csv").write_text("timestamp,glucose_value_mg_dl\n" + lines)
        frame = read_exports(Path(folder), load_layout("mostoles"), "UTC", KEY).frame

    elapsed = (frame["measured_at"] - frame["measured_at"].iloc[0]).dt.total_seconds() / 60
    assert elapsed.tolist() == [m - first for m, _ in at]
    assert frame["glucose_mg_dl"].tolist() == [value for _, value in at]


@pytest.mark.parametrize("layout", WRITERS)
@settings(QUICK, max_examples=20)
@given(rows=series, at=st.integers(0, 5000), put_in=st.binary(max_size=8), drop=st.integers(0, 200))
def test_damaged_bytes_are_read_or_refused(layout: str, rows: Series, at: int, put_in: bytes, drop: int) -> None:
    """Whatever is overwritten or lost in a file, the reader returns rows or says why not."""
    content = written(layout, rows)
    at %= len(content)
    with TemporaryDirectory() as folder:
        put(Path(folder), layout, content[:at] + put_in + content[at + drop :])
        try:
            frame = read_exports(Path(folder), load_layout(layout), "Europe/Madrid", KEY).frame
        except BadInput as refusal:
            assert refusal.hint  # noqa: PT017 (a refusal is one of the two right outcomes)
            return

    assert frame["patient"].notna().all()
