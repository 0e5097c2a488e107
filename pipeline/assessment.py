"""`islet evaluate`: who is scored, beside what, by which protocol, and where the results go."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_schemas.errors import BadInput
from pipeline.scorecard import Fold, Scorecard, alike, baselines, folds_by_person, merged, read_series, score
from pipeline.scored import Predict
from pipeline.windows import Series, Windows, WindowSpec, cut_windows

if TYPE_CHECKING:
    from pipeline.export import LoadedModel

OURS, PERSONAL = "model", "model, personal"
PROTOCOLS = ("by-patient", "glucobench")


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked.

    model None is the public start. Either readings are files, one a site, or nodes are (training, held-out) windows
    by hospital. protocol: None, by-patient or glucobench.
    """

    model: LoadedModel | None
    readings: tuple[Path, ...]
    nodes: Mapping[str, tuple[Windows, Windows]]
    protocol: str | None
    out: Path
    zone: str


def assess(request: Request, say: Callable[[str], None]) -> str:
    """Score, write the results into request.out, and return the tables as text. Raises BadInput."""
    from pipeline import protocols
    from pipeline.score_tables import as_text, tables, write

    if request.protocol is not None and request.protocol not in PROTOCOLS:
        raise BadInput(f"there is no protocol {request.protocol}", f"use one of {', '.join(PROTOCOLS)}")
    sites = _series(request)
    if request.protocol == "glucobench":
        return protocols.glucobench_text(sites, _predictor(request), _history(request), request.out)
    if request.protocol == "by-patient":
        card, about = protocols.by_patient(sites, _predictor(request), _history(request), say)
    else:
        card, about = _ordinary(request, sites, say)
    write(card, request.out, about, OURS)
    return f"{as_text(tables(card))}\nwritten to {request.out}: scores.json, scores.html and pictures"


def _ordinary(
    request: Request, sites: Mapping[str, Series], say: Callable[[str], None]
) -> tuple[Scorecard, dict[str, str]]:
    if request.nodes:
        folds = [Fold([t for t, _ in request.nodes.values()], [(n, h) for n, (_, h) in request.nodes.items()])]
        who = "held-out people of nodes; baselines fitted on the nodes' training people"
    else:
        spec = WindowSpec(history_minutes=_history(request))
        folds = folds_by_person({name: cut_windows(series, spec) for name, series in sites.items()})
        who = f"everybody in the files; baselines fitted on the others, in {len(folds)} folds of people"
    say(f"scoring {who}")
    models = {} if request.model is None else {"public-only": public_start()}
    models[OURS] = _predictor(request)

    def fitted(fold: Fold) -> dict[str, Sequence[Predict]]:
        say("fitting the baselines and the LSTM without privacy, of each site alone and of all pooled")
        return {**alike(baselines(fold.training), fold), **_open_models(fold), **alike(models, fold)}

    return score(folds, fitted, (OURS, PERSONAL)), {"scored": who, "model": _name(request)}


def _open_models(fold: Fold) -> dict[str, Sequence[Predict]]:
    """Our LSTM trained without privacy on the readings of each site alone, and of all sites pooled."""
    from pipeline.comparison import fit_local, fit_pooled, lstm
    from pipeline.warm_start import SPEC, load

    local = [lstm(fit_local(own, load(), SPEC), SPEC) for own in fold.training]
    return {"local-only": local, **alike({"pooled": lstm(fit_pooled(fold.training, load(), SPEC), SPEC)}, fold)}


def _series(request: Request) -> dict[str, Series]:
    """Readings by site: of nodes everybody's, because the published protocols make their own splits."""
    if request.nodes:
        return {n: merged(training.series, heldout.series) for n, (training, heldout) in request.nodes.items()}
    names = [path.name.split(".")[0] for path in request.readings]
    if len(set(names)) < len(names):
        raise BadInput("two files have the same name", "each file is one site: give them different names")
    with tempfile.TemporaryDirectory() as scratch:
        return {
            name: read_series(path, request.zone, Path(scratch))
            for name, path in zip(names, request.readings, strict=True)
        }


def _history(request: Request) -> int:
    from pipeline.warm_start import WINDOWS

    return request.model.spec.history_minutes if request.model else WINDOWS.history_minutes


def _predictor(request: Request) -> Predict:
    if (model := request.model) is None:
        return public_start()
    return lambda batch: model.predict(batch.x, batch.last)


def public_start() -> Predict:
    """The public warm start, which never saw a hospital."""
    from pipeline.comparison import lstm
    from pipeline.warm_start import SPEC, load

    return lstm(load(), SPEC)


def _name(request: Request) -> str:
    return request.model.model_hash if request.model else "public start"
