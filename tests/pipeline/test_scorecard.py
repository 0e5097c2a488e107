"""The scorecard end to end: folds, files, tables, and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_schemas.errors import BadInput
from data_schemas.units import HORIZON_MINUTES
from pipeline import comparison
from pipeline.adaptation import past_of, replayed
from pipeline.assessment import Request, assess
from pipeline.fitting import FitPlan
from pipeline.score_tables import metrics
from pipeline.scorecard import Fold, baselines, folds_by_person, merged, read_series, restricted, score
from pipeline.windows import Batch, Float32, Series, WindowSpec, cut_windows


def frame(people: int, points: int = 260, seed: int = 0) -> pd.DataFrame:
    """Wavy days of several people, a reading every five minutes."""
    draw = np.random.default_rng(seed)
    t = np.arange(points)
    parts = []
    for p in range(people):
        curve = 140 + 75 * np.sin(t / 19 + p) + 12 * np.sin(t / 5) + draw.normal(0, 2, points)
        stamps = pd.Timestamp("2026-01-01", tz="UTC") + pd.to_timedelta(t * 5, unit="min")
        parts.append(pd.DataFrame({"patient_id": f"s{seed}p{p}", "time": stamps, "glucose_mg_dl": curve.round(1)}))
    return pd.concat(parts)


def series(people: int, seed: int = 0) -> Series:
    return Series.from_frame(frame(people, seed=seed).rename(columns={"time": "measured_at"}))


def test_nobody_is_scored_by_what_was_fitted_on_them() -> None:
    """Each fold's training windows and scored windows share no person, and every window is scored once."""
    sites = {"a": cut_windows(series(7), WindowSpec()), "b": cut_windows(series(3, 1), WindowSpec())}
    folds = folds_by_person(sites)
    assert len(folds) == 5
    for name, whole in sites.items():
        position = list(sites).index(name)
        seen = np.concatenate([dict(f.scored)[name].anchors for f in folds])
        assert np.array_equal(np.sort(seen), whole.anchors)
        for fold in folds:
            assert not set(fold.training[position].anchors) & set(dict(fold.scored)[name].anchors)


def test_one_person_alone_is_refused() -> None:
    """Baselines cannot be fitted when the only person is the one to be scored."""
    with pytest.raises(BadInput, match="one person"):
        folds_by_person({"a": cut_windows(series(1), WindowSpec())})


def test_restricted_windows_keep_the_numbers_of_people() -> None:
    """Person 2 stays person 2 when the others are left out."""
    windows = cut_windows(series(4), WindowSpec())
    kept = restricted(windows, np.array([False, False, True, False]))
    assert np.diff(kept.offsets).tolist() == [0, 0, np.diff(windows.offsets)[2], 0]
    assert np.array_equal(kept.anchors, windows.anchors[windows.offsets[2] : windows.offsets[3]])


def test_merged_series_hold_both_groups() -> None:
    """Two groups of people become one series without a reading lost."""
    both = merged(series(2), series(3, 1))
    assert len(both.patients) == 5
    assert both.starts[-1] == len(both.time_s) == 5 * 260


def test_every_learning_baseline_beats_persistence_on_other_people() -> None:
    """AR, ridge and trees, fitted on some people, forecast others better than the last reading does."""
    windows = cut_windows(series(6), WindowSpec())
    training = restricted(windows, np.arange(6) < 4)
    test = restricted(windows, np.arange(6) >= 4)
    batch = test.gather(test.anchors)
    error = {
        label: float(np.sqrt(np.mean((predict(batch)[0] - batch.y)[batch.mask] ** 2)))
        for label, predict in baselines([training]).items()
    }
    assert error["AR"] < error["persistence"]
    assert error["ridge"] < error["persistence"]
    assert error["trees"] < error["persistence"]


def widened(batch: Batch) -> tuple[Float32, Float32]:
    """The last reading, and quantiles around it."""
    stay = np.repeat(batch.last[:, None], len(HORIZON_MINUTES), axis=1)
    return stay, stay[..., None] + np.array([-30, -10, 0, 10, 30], np.float32)


def raised(batch: Batch) -> tuple[Float32, None]:
    """50 mg/dL above the last reading."""
    return widened(batch)[0] + 50, None


def test_a_site_may_have_a_model_of_its_own_and_each_person_a_correction() -> None:
    """Predictors are taken site by site, and the personal scores are those of each person's own replayed past."""
    windows = cut_windows(series(2), WindowSpec())
    fold = Fold([windows, windows], [("a", windows), ("b", windows)])
    card = score([fold], lambda _: {"local": [widened, raised], "ours": [widened, widened]}, ("ours", "personal"))
    found = metrics(card)
    assert found["rmse_30/a/local"] == found["rmse_30/a/ours"] == found["rmse_30/b/ours"]
    assert found["bias_30/pooled/local"] == pytest.approx(found["bias_30/pooled/ours"] + 25, abs=0.01)
    assert all(math.isfinite(v) for v in found.values())
    first = slice(0, windows.offsets[1])
    expected, _ = replayed(past_of(windows, windows.anchors[first], lambda x, last: widened(Batch(x, x, x, last))))
    assert np.array_equal(card.scored["personal"].forecast[first], expected)
    assert not np.array_equal(expected, card.scored["ours"].forecast[first])


def test_reading_order_does_not_matter(tmp_path: Path) -> None:
    """A shuffled file is the same series; of two readings in one second the lower stays."""
    plain, shuffled = tmp_path / "a.csv", tmp_path / "b.csv"
    table = frame(2, 40)
    table.to_csv(plain, index=False)
    higher = table.head(5).assign(glucose_mg_dl=399.0)
    pd.concat([table, higher]).sample(frac=1.0, random_state=1).to_csv(shuffled, index=False)
    first, second = (read_series(p, "UTC", tmp_path) for p in (plain, shuffled))
    assert first.patients == second.patients
    assert np.array_equal(first.time_s, second.time_s)
    assert np.array_equal(first.glucose_mg_dl, second.glucose_mg_dl)


def test_an_evaluation_of_files_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate` on two files scores every model by site and people, and writes valid JSON, a page and pictures."""
    for name in ("LOCAL_FIT", "POOLED_FIT"):
        monkeypatch.setattr(comparison, name, FitPlan(steps=2))
    paths = [tmp_path / "north.csv", tmp_path / "south.csv"]
    for seed, path in enumerate(paths):
        frame(2, 150, seed=seed).to_csv(path, index=False)
    text = assess(Request(None, tuple(paths), {}, None, tmp_path / "out", "UTC"), lambda _: None)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    learned = ["AR", "ridge", "trees", "local-only", "pooled"]
    assert list(scores["models"]) == ["persistence", "linear", *learned, "model", "model, personal"]
    for model in scores["models"].values():
        assert [s["name"] for s in model["evaluation"]["sites"]] == ["north", "south"]
        assert model["evaluation"]["pooled"]["people"] == 4
        assert math.isfinite(model["evaluation"]["mean_over_people"][1]["rmse_low"])
    ours = scores["models"]["model"]
    assert {i["nominal"] for i in ours["evaluation"]["pooled"]["intervals"]} == {0.5, 0.8, 0.9}
    assert [e["name"] for e in ours["alarms_by_probability"]] == ["below 70", "below 54", "above 180", "above 250"]
    page = (tmp_path / "out" / "scores.html").read_text()
    assert page.count("<figure>") == 6
    assert "s0p0" not in page + json.dumps(scores) + text
    assert (tmp_path / "out" / "clarke-30.png").read_bytes()[:4] == b"\x89PNG"


def test_an_unknown_protocol_is_refused(tmp_path: Path) -> None:
    """The refusal names the protocols there are."""
    with pytest.raises(BadInput) as refused:
        assess(Request(None, (), {}, "by-window", tmp_path, "UTC"), lambda _: None)
    assert "by-patient" in (refused.value.hint or "")
