"""The report: one file that loads nothing, says everything and escapes its input; the terminal table; the pictures."""

from __future__ import annotations

import dataclasses
import html.parser
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from data_schemas.errors import StorageFailed
from data_schemas.units import HORIZON_MINUTES
from pipeline import plots
from pipeline.evaluation import Scored, evaluate
from pipeline.report import (
    LEAVES,
    NEVER_LEAVES,
    PUBLIC_DATA_NOTE,
    CreditRow,
    Illustration,
    IntakeLine,
    LedgerStatus,
    ModelColumn,
    PrivacyLine,
    ReportData,
    ResultRow,
    render_html,
    render_table,
    write_report,
)

LABELS = ("persistence", "ridge", "local only", "public only", "federated", "pooled")


def scored() -> Scored:
    draw = np.random.default_rng(0)
    truth = draw.uniform(50, 300, (400, 12))
    forecast = np.clip(truth + draw.normal(0, 20, truth.shape), 40, 400)
    levels = np.sort(forecast[..., None] + draw.normal(0, 25, (400, 12, 5)), axis=-1)
    zero = np.zeros(400, dtype=np.int64)
    return Scored(truth, np.ones(truth.shape, bool), forecast, truth[:, 0], zero, zero, ("north",), levels)


def pictures() -> list[plots.Picture]:
    s = scored()
    rounds = [(r, 1.0 * r) for r in range(1, 9)]
    example = plots.Example([(-5, 100), (0, 104)], [(30, 120)], s.forecast[0], s.quantiles[0])  # type: ignore[index]
    return [
        plots.forecast_examples([example, example]),
        plots.error_grid(s.truth[:, 5], s.forecast[:, 5], kind="clarke", horizon_minutes=30),
        plots.error_grid(s.truth[:, 11], s.forecast[:, 11], kind="parkes", horizon_minutes=60),
        plots.calibration({"30 min": [(0.05, 0.07), (0.5, 0.5), (0.95, 0.9)]}),
        plots.rmse_by_horizon({"ridge": [(h, 2.0 * h) for h in HORIZON_MINUTES], "lstm": [(15, 9.0), (60, 30.0)]}),
        plots.convergence({"federated": rounds}, {"persistence": 5.0}),
        plots.credit_bars([("north", 1.0, 0.5, 1.5), ("south", -0.2, -0.6, 0.2)]),
        plots.privacy_spend({"north": rounds}, {"ceiling": 9.0}),
    ]


def report() -> ReportData:
    return ReportData(
        run="demo",
        generated_at="2026-11-23 22:00 UTC",
        model_hash="9f" * 32,
        rounds=8,
        headline="Two hospitals & one <model>",
        columns=tuple(ModelColumn(name, f"what {name} is", name == "federated") for name in LABELS),
        rows=(
            ResultRow("north", 4, (22.81, 20.4, 20.3, 20.2, 19.96, 20.04), (36.7, 33.0, 32.9, 32.8, 32.7, 32.6)),
            ResultRow(
                "south-with-a-long-name",
                120,
                (15.0, 14.0, None, 13.5, 13.4, 13.3),
                (20.0, 19.0, None, 18.0, 17.9, 17.8),
            ),
            ResultRow(
                "pooled", 124, (20.0, 19.0, 18.0, 17.0, 16.0, 16.5), (30.0, 29.0, 28.0, 27.0, 26.5, 26.0), summary=True
            ),
        ),
        detail=evaluate(scored()),
        privacy=(PrivacyLine("north", 8, 5.694, 8.0, 4, 2.1), PrivacyLine("south", 40, 3.1, 8.0, 0, None)),
        intake=(IntakeLine("north", 1_000_010, 1_000_000, 7, 3, 12),),
        credit=(CreditRow("north", 1.31, 0.9, 1.7, 3_410_000), CreditRow("south", -0.2, -0.6, 0.2, 0)),
        ledger=LedgerStatus(58, "ab" * 32, ("north", "south")),
        illustrations=tuple(Illustration(f"title {p.name}", "caption", p) for p in pictures()[:3]),
    )


class Outline(html.parser.HTMLParser):
    """Collects tags, attributes that could load something, ids, and whether tags are balanced."""

    VOID = frozenset({"meta", "br", "img", "link", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.targets: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open a tag."""
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.targets += [v or "" for k, v in attrs if k in {"src", "href", "xlink:href", "action", "data"}]
        self.ids += [v or "" for k, v in attrs if k == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open and close a tag."""
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        """Close the tag that was opened last."""
        assert self.open.pop() == tag


def test_report_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    """No script, no link, no address outside the file; tags are closed, ids unique, references land."""
    write_report(report(), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    assert not {"script", "link", "iframe", "object", "form"} & set(outline.tags)
    assert outline.targets
    assert all(t.startswith(("#", "data:image/")) for t in outline.targets)
    assert {t[1:] for t in outline.targets if t.startswith("#")} <= set(outline.ids)
    assert len(outline.ids) == len(set(outline.ids))
    assert not re.search(r"url\((?!#)|@import", text)
    assert outline.tags.count("svg") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_report_says_everything_that_was_promised() -> None:
    """Figures, privacy statement, intake, credit, ledger, what leaves and what never does, the note on public data."""
    text = render_html(report())
    plain = re.sub(r"[ \n]+", " ", re.sub(r"<[^>]+>", " ", text.split("</style>")[1]))
    for words in (
        "Two hospitals &amp; one &lt;model&gt;",
        "δ = 1e-05",
        "add or remove one patient&#39;s whole record at one hospital",
        "5.69",
        "1\u202f000\u202f010",
        "3.410",
        "−0.60 to 0.20",
        "ab" * 32,
        "Verified.",
        "Dosing decisions should not be made",
        PUBLIC_DATA_NOTE,
        *(item.replace("'", "&#39;") for item in (*LEAVES, *NEVER_LEAVES)),
    ):
        assert words in plain
    assert "prefers-color-scheme: dark" in text


def test_best_of_each_row_is_highlighted() -> None:
    """Lowest to the shown decimal, per row and horizon: ties share it, a missing model has none."""
    text = render_html(report()).split("</table>")[0]
    rows = re.findall(
        r"<tr[^>]*><th scope=\"row\">(north|pooled|south-with-a-long-name)</th><td>\d+</td>(.*?)</tr>", text, re.S
    )
    best = {name: re.findall(r'class="[^"]*best">([^<]+)<', cells) for name, cells in rows}
    assert best == {
        "north": ["19.96", "32.60"],
        "south-with-a-long-name": ["13.30", "17.80"],
        "pooled": ["16.00", "26.00"],
    }


def test_a_problem_of_the_ledger_is_shown() -> None:
    """A ledger that did not verify is never called verified."""
    broken = dataclasses.replace(
        report(), ledger=LedgerStatus(3, "00" * 32, (), "entry 2 does not match its signature")
    )
    text = render_html(broken)
    assert "entry 2 does not match its signature" in text
    assert "Verified.</span>" not in text
    assert "nobody yet" in text


def test_report_without_optional_parts() -> None:
    """A run without private training, credit, pictures or detail still gets its page."""
    bare = dataclasses.replace(report(), detail=None, privacy=(), credit=(), intake=(), illustrations=())
    outline = Outline()
    outline.feed(render_html(bare))
    assert outline.open == []


def test_terminal_table() -> None:
    """The same numbers within 114 columns, * at the lowest, a dash where there is no model."""
    table = render_table(report())
    lines = table.splitlines()
    assert max(map(len, lines)) <= 114
    assert [label for label in LABELS if label in lines[1]] == list(LABELS)
    north = next(line for line in lines if line.startswith("north"))
    shown = "4 22.81 36.70 20.40 33.00 20.30 32.90 20.20 32.80 19.96* 32.70 20.04 32.60*"
    assert re.findall(r"[\d.]+\*?", north) == shown.split()
    assert "–" in next(line for line in lines if line.startswith("south"))
    assert lines[-1].startswith("pooled")


def test_figures_that_do_not_add_up_are_refused() -> None:
    """Rows that went missing, or a value for no model, never reach a page."""
    with pytest.raises(ValueError, match="every row"):
        IntakeLine("north", 10, 8, 1, 0, 1)
    with pytest.raises(ValueError, match="one value per model"):
        dataclasses.replace(report(), columns=report().columns[:5])


def test_unwritable_folder_is_a_storage_error(tmp_path: Path) -> None:
    """Where the report cannot be written, the error says so and what to do."""
    with pytest.raises(StorageFailed) as caught:
        write_report(report(), tmp_path / "none" / "report.html")
    assert caught.value.hint


def test_every_picture_is_sound_in_both_forms() -> None:
    """Each figure is a PNG, and an SVG that parses, keeps text as text, carries units and the page's own colours."""
    for picture in pictures():
        assert picture.png().startswith(b"\x89PNG\r\n")
        text = picture.svg()
        root = ElementTree.fromstring(text)  # noqa: S314 - our own drawing
        assert root.get("viewBox")
        assert root.get("width") is None
        words = " ".join(t for t in root.itertext() if t.strip())
        assert any(unit in words for unit in ("mg/dL", "epsilon", "share of readings"))
        assert "var(--ink)" in text
        assert plots.INK not in text


def test_pictures_are_the_same_every_time() -> None:
    """The same numbers give the same bytes."""
    assert [p.svg() for p in pictures()] == [p.svg() for p in pictures()]
