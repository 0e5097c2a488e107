"""One test for each way in which training that looks private is not, as far as it applies here."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from data_schemas.messages import Refusal, RefusalCode, SignedUpdate
from data_schemas.plan import PrivacyEvent, TrainingPlan
from data_schemas.units import DELTA
from hospital_node import local_round
from hospital_node.budget import epsilon
from hospital_node.folder import NodeFolder
from hospital_node.randomness import noise_kind, noise_source
from pipeline.forecaster import Forecaster, ForecasterSpec, flatten, unflatten
from pipeline.horizon_curves import projection
from pipeline.noise import SecureNoise, SeededNoise
from pipeline.private_training import LocalPlan, train_steps
from pipeline.windows import Windows, cut_windows
from tests.hospital_node.small_node import NOW, base_weights, fill, make_node, plan, settings, train_task
from tests.privacy.cohort import cohort

SPEC = ForecasterSpec(hidden_size=4)
START = flatten(Forecaster(SPEC, seed=1))
PLAN = LocalPlan(
    steps=1,
    learning_rate=5.0,
    sample_rate=1.0,
    noise_multiplier=0.0,
    max_grad_norm=0.01,
    windows_per_patient=8,
)
UNSEEDED = plan().model_copy(update={"seed": None})


class Scripted:
    """Chosen uniforms for who joins, the first window always, and noise of one everywhere or nowhere."""

    def __init__(self, joins: npt.NDArray[np.float64] | None = None, noise: float = 0.0) -> None:
        self.joins, self.noise, self.normals = joins, noise, 0

    def normal(self, count: int) -> torch.Tensor:
        """The same value in every coordinate."""
        self.normals += count
        return torch.full((count,), self.noise, dtype=torch.float64)

    def uniform(self, count: int) -> torch.Tensor:
        """Who joins where it was given, else zero."""
        if self.joins is not None and count == len(self.joins):
            return torch.from_numpy(self.joins)
        return torch.zeros(count, dtype=torch.float64)


def moved(
    windows: Windows, changed: LocalPlan = PLAN, declared: int = 4, source: Any = None
) -> npt.NDArray[np.float64]:
    delta = train_steps(START, SPEC, windows, changed, declared, source or Scripted()).delta
    return delta.astype(np.float64)


def only(windows: Windows, *people: int) -> Windows:
    return cut_windows(windows.series.select([windows.series.patients[p] for p in people]), windows.spec)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    path = make_node(tmp_path / "north", seed=None)
    fill(path, patients=14)
    return path


def train(path: Path, asked: TrainingPlan, **changes: Any) -> tuple[SignedUpdate, npt.NDArray[np.float32]] | Refusal:
    weights = base_weights(asked)
    with NodeFolder.open(path) as opened:
        return local_round.train(opened, train_task(asked, weights, **changes), weights, NOW)


def test_unit_of_privacy_a_person_with_more_windows_counts_no_more() -> None:
    """However many windows a person has or a step takes, they move a step by one clip at most."""
    bound = PLAN.learning_rate * PLAN.max_grad_norm / 4
    for hours, k in ((3, 1), (6, 8), (24, 32)):
        influence = moved(cohort(1, hours), replace(PLAN, windows_per_patient=k))

        assert 0.9 * bound < np.linalg.norm(influence) <= bound * (1 + 1e-3)


def test_unit_of_privacy_a_weaker_unit_is_refused(node: Path) -> None:
    """A plan that would account per day or per window is declined before anything is spent."""
    weaker = plan(privacy__unit="window (weaker than patient)").model_copy(update={"seed": None})

    assert train(node, weaker) == Refusal(code=RefusalCode.PLAN_EXCEEDS_CEILING)
    with NodeFolder.open(node) as opened:
        assert opened.budget().spent("training") == 0.0


def test_the_relation_is_adding_or_removing_one_person() -> None:
    """Whoever leaves a cohort takes one clip with them at most; somebody else in their place moves a step by two."""
    people, bound = cohort(4), PLAN.learning_rate * PLAN.max_grad_norm / 4
    everybody = moved(people)
    for gone in range(4):
        without = moved(only(people, *(p for p in range(4) if p != gone)))

        assert 0.9 * bound < np.linalg.norm(everybody - without) <= bound * (1 + 1e-3)
    exchanged = moved(only(people, 0, 1, 2)) - moved(only(people, 1, 2, 3))
    assert np.linalg.norm(exchanged) <= 2 * bound * (1 + 1e-3)


def test_sampling_is_poisson_each_person_by_a_coin_of_their_own() -> None:
    """A step takes exactly the people whose own uniform lies below the rate: none, one or all, never a fixed number."""
    people, half = cohort(3), replace(PLAN, sample_rate=0.5)
    for low in ((), (1,), (0, 2), (0, 1, 2)):
        joins = np.where(np.isin(np.arange(3), low), 0.25, 0.75)
        expected = sum((moved(only(people, p), half) for p in low), np.zeros(len(START)))

        np.testing.assert_allclose(moved(people, half, source=Scripted(joins)), expected, atol=2e-6)


def test_examples_do_not_see_each_other() -> None:
    """What a person contributes does not depend on who else was sampled: no batch statistics anywhere."""
    people = cohort(3)

    together = moved(people)

    np.testing.assert_allclose(together, sum(moved(only(people, p)) for p in range(3)), atol=2e-6)


def test_the_divisor_is_public() -> None:
    """The step is divided by sample_rate x declared patients, whoever is in the store or was drawn."""
    people = cohort(3)

    np.testing.assert_allclose(moved(people, declared=4), 5 * moved(people, declared=20), atol=2e-6)


def test_noise_has_the_size_of_the_clip_before_the_division() -> None:
    """Each trained coordinate gets noise_multiplier x max_grad_norm, then the divisor and the rate of the update."""
    noisy = replace(PLAN, noise_multiplier=2.0, sample_rate=0.5, trainable="head")
    people = cohort(3)

    shift = moved(people, noisy, source=Scripted(noise=1.0)) - moved(people, noisy, source=Scripted())

    size = -noisy.learning_rate * 2.0 * noisy.max_grad_norm / (0.5 * 4)
    np.testing.assert_allclose(shift[shift != 0], size, rtol=1e-3)
    assert (shift != 0).sum() == sum(
        p.numel() for n, p in Forecaster(SPEC).named_parameters() if n.split(".")[0].endswith("head")
    )


def test_smoothing_over_the_horizons_comes_after_the_noise() -> None:
    """A step that may bend forecasts along two curves only is the noisy step, projected; no draw is left out."""
    noisy = replace(PLAN, noise_multiplier=2.0, trainable="head")
    people, sources = cohort(3), [SeededNoise(5), SeededNoise(5)]

    free, smooth = (
        unflatten((START + moved(people, p, source=s)).astype(np.float32), SPEC)
        for p, s in zip((noisy, replace(noisy, horizon_curves=2)), sources, strict=True)
    )

    start, kept = unflatten(START, SPEC), projection(2)
    with torch.no_grad():
        expected = start.mean_head.weight + kept @ (free.mean_head.weight - start.mean_head.weight)
        by_quantile = (free.quantile_head.bias - start.quantile_head.bias).view(12, 5)
        bias = start.quantile_head.bias + (kept @ by_quantile).flatten()
    torch.testing.assert_close(smooth.mean_head.weight, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(smooth.quantile_head.bias, bias, rtol=0, atol=1e-5)
    assert sources[0].uniform(1) == sources[1].uniform(1)


def test_gradients_accumulated_in_parts_get_noise_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample too large for one pass goes through person by person: same clip for each, one draw of noise for all."""
    noisy, people, sources = replace(PLAN, noise_multiplier=2.0), cohort(3), [Scripted(noise=1.0), Scripted(noise=1.0)]
    at_once = moved(people, noisy, source=sources[0])
    monkeypatch.setattr("pipeline.book_keeping._PART_NUMBERS", 1)

    np.testing.assert_allclose(moved(people, noisy, source=sources[1]), at_once, atol=2e-6)
    assert sources[0].normals == sources[1].normals


def test_every_step_draws_noise_of_its_own() -> None:
    """Three steps over d trained coordinates draw 3 d Gaussians, also where nobody was sampled."""
    source, nobody = Scripted(), replace(PLAN, steps=3, sample_rate=1e-9, noise_multiplier=1.0)
    source.joins = np.full(2, 0.5)

    moved(cohort(2), nobody, source=source)

    trained = sum(p.numel() for n, p in Forecaster(SPEC).named_parameters() if not n.startswith("mix"))
    assert source.normals == 3 * trained


@pytest.mark.parametrize("trainable", ["all", "head"])
def test_a_gradient_that_is_not_finite_is_no_way_around_the_clip(trainable: Literal["all", "head"]) -> None:
    """Base weights chosen so that gradients overflow make every patient contribute exactly nothing."""
    model = Forecaster(SPEC, seed=1)
    with torch.no_grad():
        model.mean_head.bias.fill_(1e30)

    delta = train_steps(flatten(model), SPEC, cohort(2), replace(PLAN, trainable=trainable), 4, Scripted()).delta

    assert not delta.any()


def test_noise_is_drawn_and_added_in_double_precision() -> None:
    """Gaussians are float64 sums of four draws, so the gaps of float32 are not those of the noise (Mironov 2012)."""
    draws = SecureNoise().normal(1000).numpy()

    assert draws.dtype == np.float64
    assert (draws != draws.astype(np.float32)).mean() > 0.99


def test_randomness_is_not_used_twice() -> None:
    """Even seeded, every round, run and hospital has noise of its own; only the same task repeats."""
    one = settings()

    def first(node: Any = one, run: str = "run-1", purpose: str = "round 1") -> float:
        return float(noise_source(node, plan(), run, purpose).normal(1)[0])

    different = {first(), first(run="run-2"), first(purpose="round 2"), first(settings(name="south"))}

    assert len(different) == 4
    assert first() == first()


def test_a_plan_without_seed_draws_from_the_systems_generator(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole round reads its noise from os.urandom: 32 bytes a Gaussian and more, and the book says secure."""
    real, asked = os.urandom, []

    def counted(count: int) -> bytes:
        asked.append(count)
        return real(count)

    monkeypatch.setattr("pipeline.noise.os.urandom", counted)
    monkeypatch.setattr(SeededNoise, "normal", None)

    assert not isinstance(train(node, UNSEEDED), Refusal)

    trained = sum(p.numel() for n, p in Forecaster(SPEC).named_parameters() if not n.startswith("mix"))
    assert sum(asked) >= 32 * trained * UNSEEDED.local.steps_per_round
    with NodeFolder.open(node) as opened:
        assert [row.noise for row in opened.budget().rows()] == ["secure"]


def test_a_server_cannot_make_the_noise_repeatable(node: Path) -> None:
    """A plan with a seed is declined by a hospital that named none; with both, the book says seeded."""
    assert train(node, plan()) == Refusal(code=RefusalCode.PLAN_MISMATCH)
    assert (noise_kind(settings(seed=None), UNSEEDED), noise_kind(settings(), plan())) == ("secure", "seeded")


def test_epsilon_does_not_restart_each_round(node: Path) -> None:
    """After every round the hospital reports the epsilon of all rounds so far, over runs too."""
    reported = []
    for run, number in (("run-1", 1), ("run-1", 2), ("run-2", 1)):
        outcome = train(node, UNSEEDED.model_copy(update={"rounds": 3}), run=run, round=number)
        assert not isinstance(outcome, Refusal)
        reported.append(outcome[0].manifest.spend.epsilon_after)

    expected = [epsilon([UNSEEDED.round_event] * n, DELTA) for n in (1, 2, 3)]
    assert reported == pytest.approx(expected, abs=1e-12)


def test_the_book_stops_what_the_checks_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the checks before it fail, the budget book keeps to the hospital's ceiling, and nothing is spent."""
    path = make_node(tmp_path / "north", seed=None, max_epsilon_training=0.1)
    fill(path, patients=14)
    monkeypatch.setattr(local_round, "check_training", lambda *_: None)

    assert train(path, UNSEEDED) == Refusal(code=RefusalCode.BUDGET_EXHAUSTED)
    with NodeFolder.open(path) as opened:
        assert opened.budget().rows() == ()


def test_a_plan_that_understates_its_epsilon_is_refused(node: Path) -> None:
    """The claim is held against what noise, rate and rounds really give."""
    lies = plan(privacy__epsilon=0.5).model_copy(update={"seed": None})

    assert train(node, lies) == Refusal(code=RefusalCode.PLAN_MISMATCH)


def test_no_noise_is_never_some_privacy() -> None:
    """An event without noise costs infinitely much, so that no ceiling admits it."""
    assert epsilon([PrivacyEvent(sample_rate=0.1, noise_multiplier=0.0, steps=1)], DELTA) == math.inf


def test_a_round_leaves_no_loss_and_no_norm_behind(
    node: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Beside its reply a round writes book, seal, duration and its lock; it prints and logs nothing."""
    before = {path: path.read_bytes() for path in node.rglob("*") if path.is_file()}
    with caplog.at_level(logging.INFO):
        assert not isinstance(train(node, UNSEEDED), Refusal)

    written = {p.name for p in node.rglob("*") if p.is_file() and before.get(p) != p.read_bytes()}
    assert written == {"budget.db", "budget.head", "last_round.json", "lock"}
    assert caplog.messages == []
    assert "".join(capfd.readouterr()) == ""


def test_what_is_released_does_not_tell_how_many_people_there_are(tmp_path: Path) -> None:
    """Two hospitals with 5 and 14 people that declare the same number send the same fields but for the update."""
    told = []
    for people in (5, 14):
        path = make_node(tmp_path / str(people), seed=None)
        fill(path, patients=people)
        outcome = train(path, UNSEEDED)
        assert not isinstance(outcome, Refusal)
        value = outcome[0].manifest.model_dump()
        told.append({k: v for k, v in value.items() if k not in ("update_hash", "budget_head")})

    assert told[0] == told[1]


def test_a_plan_that_means_nothing_cannot_be_made() -> None:
    """Rates, clip, noise, trained part and declared patients are checked before a reading is touched."""
    wrong = [{"max_grad_norm": 0.0}, {"sample_rate": 1.1}, {"noise_multiplier": math.nan}, {"trainable": "nothing"}]
    for change in [*wrong, {"horizon_curves": 0}]:
        with pytest.raises(ValueError, match="must be"):
            replace(PLAN, **change)
    with pytest.raises(ValueError, match="declared_patients"):
        moved(cohort(1), declared=0)
