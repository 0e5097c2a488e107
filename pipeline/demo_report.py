"""What the demo shows at its end: comparison, export, registry, endpoint, verified ledger, one table and one report."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_schemas.errors import IsletError, StorageFailed
from pipeline.comparison import COLUMNS, OURS, Cohort, Comparison, compare, fit_local, fit_pooled, margins, rows
from pipeline.demo_votes import vote_champion
from pipeline.report import (
    CreditRow,
    Illustration,
    IntakeLine,
    LedgerStatus,
    PrivacyLine,
    ReportData,
    render_table,
    write_report,
)
from pipeline.score_tables import files, metrics
from pipeline.signing import write_durably

POOLED = Path("baselines") / "pooled.npy"

if TYPE_CHECKING:
    from aggregator.rounds import FederationResult
    from aggregator.settings import AggregatorFolder
    from aggregator.verification import VerifyReport
    from data_schemas.reading import QualityReport
    from pipeline.demo import RunRecord, Say, Stage
    from pipeline.forecaster import ForecasterSpec
    from pipeline.model_card import CardResult
    from pipeline.windows import Float32


def finish(
    out: Path,
    folder: AggregatorFolder,
    cohorts: Sequence[Cohort],
    intake: Mapping[str, QualityReport],
    result: FederationResult,
    record: RunRecord,
    nodes: Mapping[str, Path],
    stage: Stage,
) -> None:
    """Compare, export, publish, serve once, verify, and write what people look at."""
    from aggregator.release import export_model

    compared = _compare(out, folder, cohorts, result, stage)
    results = _card_results(compared)
    export_model(out / "model", folder, result, results, compared.membership)
    stage(f"model {result.model_hash[:12]} exported to {out / 'model'}, ONNX equal to torch")
    verified = _verify(folder, nodes)
    stage(
        f"ledger verified: {verified.head.size} entries, root {verified.head.root_hex[:16]}, "
        f"cosigned by {len(verified.cosigned_by)} of {len(nodes)} hospitals"
    )
    pictures = _illustrations(cohorts, compared, record, result, nodes)
    _publish(out, record, result, _evaluation(compared, result.model_hash, pictures), metrics(compared.card), stage)
    sitting = vote_champion(folder, nodes, result.model_hash, Path.cwd())
    stage(f"vote: {len(nodes)} hospitals made it the champion; {len(sitting.installed)} nodes serve it")
    stage(ask_endpoint(nodes[cohorts[0].name], cohorts[0]))
    data = _report_data(folder, compared, intake, result, nodes, verified, pictures)
    write_report(data, out / "report.html")
    summary = _summary(out, data, compared, verified)
    write_durably(out / "result.json", json.dumps({"text": summary, "model_hash": result.model_hash}).encode())
    stage.say("\n" + summary)


def show_again(out: Path, say: Say) -> None:
    """Print the end of a finished run."""
    say(json.loads((out / "result.json").read_text())["text"])


def _compare(
    out: Path, folder: AggregatorFolder, cohorts: Sequence[Cohort], result: FederationResult, stage: Stage
) -> Comparison:
    """Fit the non-private models a comparison needs, once, and score everything on held-out people."""
    from aggregator.server_app import load_initial_weights

    spec, start = _shape(folder), load_initial_weights(folder)
    local = {}
    for cohort in cohorts:
        local[cohort.name] = _kept(
            out / "baselines" / f"{cohort.name}.npy", lambda c=cohort: fit_local(c.training, start, spec)
        )
        stage(f"comparison: {cohort.name} alone, without privacy")
    pooled = _kept(out / POOLED, lambda: fit_pooled([c.training for c in cohorts], start, spec))
    stage("comparison: all readings pooled, without privacy")
    compared = compare(cohorts, spec, public=start, federated=result.weights, pooled=pooled, local=local)
    stage(f"scored {len(compared.ours.last):,} forecasts of {compared.evaluations[OURS].pooled.people} held-out people")
    return compared


def _shape(folder: AggregatorFolder) -> ForecasterSpec:
    from pipeline.forecaster import ForecasterSpec

    return ForecasterSpec(hidden_size=folder.load_plan().model.hidden_size)


def _kept(path: Path, fit: Any) -> Float32:
    """Weights of a fit, from the file where it was kept by an earlier call."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part.npy")
        np.save(temporary, fit())
        temporary.replace(path)
    weights: Float32 = np.load(path, allow_pickle=False)
    return weights


def _card_results(compared: Comparison) -> tuple[CardResult, ...]:
    from pipeline.model_card import CardResult

    return tuple(
        CardResult(
            site=group.name,
            model=column.label,
            horizon_minutes=minutes,
            patients=group.people,
            forecasts=group.at(minutes).pairs,
            rmse_mg_dl=group.at(minutes).rmse,
            mae_mg_dl=group.at(minutes).mae,
            mard_percent=group.at(minutes).mard_percent,
        )
        for column in COLUMNS
        for group in (*compared.evaluations[column.label].sites, compared.evaluations[column.label].pooled)
        for minutes in (30, 60)
    )


def _verify(folder: AggregatorFolder, nodes: Mapping[str, Path]) -> VerifyReport:
    from aggregator.verification import verify_ledger
    from hospital_node.witness import witnessed_note

    notes = [note for home in nodes.values() if (note := witnessed_note(home))]
    return verify_ledger(folder.path / "ledger.db", folder.key().public.hex, notes)


def _publish(
    out: Path,
    record: RunRecord,
    result: FederationResult,
    found: Mapping[str, bytes],
    results: Mapping[str, float],
    stage: Stage,
) -> None:
    """Register the model in MLflow; an outage is said and costs nothing else."""
    if record.recorder.registry is None:
        return
    try:
        published = record.recorder.registry.finish(
            record.recorder.run_id,
            out / "model",
            files=found,
            privacy={"unit": "patient", "epsilon_by_node": result.epsilon_by_node},
            credit={f"epoch {c.epoch}": [line.model_dump(mode="json") for line in c.lines] for c in result.credits},
            results=results,
        )
        stage(f"MLflow: registered {published.uri} as {published.alias}")
    except IsletError as error:
        stage(f"MLflow did not take the model, everything else is in {out}: {error.message}")


def _evaluation(compared: Comparison, model_hash: str, pictures: Sequence[Illustration]) -> dict[str, bytes]:
    """Files of the MLflow run: the pictures of this report, and what `islet evaluate` writes of these people."""
    about = {"scored": "held-out people of all hospitals", "model": model_hash}
    written = files(compared.card, about, OURS).items()
    drawn = {f"plots/{i.picture.name}.png": i.picture.png() for i in pictures}
    return drawn | {f"evaluation/{name}": data for name, data in written if not name.endswith(".png")}


def ask_endpoint(home: Path, cohort: Cohort) -> str:
    """Start the node's endpoint, ask it for a held-out patient's forecast as an app would, and stop it."""
    from hospital_node.api_keys import create_key, revoke_key
    from hospital_node.endpoint import Running, serve

    series = cohort.heldout.series
    person = int(np.argmax(np.diff(cohort.heldout.offsets)))
    moment = int(series.time_s[cohort.heldout.anchors[cohort.heldout.offsets[person + 1] - 1]])
    key, secret = create_key(home, series.patients[person], moment)
    running: list[Running] = []
    up = threading.Event()

    def ready(server: Running) -> None:
        running.append(server)
        up.set()

    thread = threading.Thread(target=serve, args=(home, None, "127.0.0.1", 0, ready), daemon=True)
    thread.start()
    if not up.wait(30):
        raise StorageFailed("the forecast endpoint did not start within 30 s", "run `islet node serve` to see why")
    try:
        as_of = datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        url = f"{running[0].url}/v1/patients/{series.patients[person]}/forecast?as_of={as_of}"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {secret}"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=30) as reply:  # noqa: S310
            point = json.loads(reply.read())["points"][5]
    finally:
        running[0].stop()
        thread.join(15)
        revoke_key(home, key.key_id)
    return (
        f"endpoint: a held-out patient of {cohort.name} asked; in 30 min {point['p25']:.0f} to {point['p75']:.0f} "
        f"mg/dL (1 in 2), {point['p05']:.0f} to {point['p95']:.0f} (9 in 10)"
    )


def _illustrations(
    cohorts: Sequence[Cohort],
    compared: Comparison,
    record: RunRecord,
    result: FederationResult,
    nodes: Mapping[str, Path],
) -> tuple[Illustration, ...]:
    from aggregator.server_app import load_initial_weights
    from pipeline.demo import SITES
    from pipeline.illustrations import Story, illustrate
    from pipeline.other_epsilons import OTHER_EPSILONS, train_at

    plan, start = record.folder.load_plan(), load_initial_weights(record.folder)
    declared = {site.name: site.people - site.heldout for site in SITES}
    others = {}
    for epsilon in OTHER_EPSILONS:
        path = record.curve_file.parent / "baselines" / f"epsilon-{epsilon:g}.npy"
        others[epsilon] = _kept(path, lambda e=epsilon: train_at(e, cohorts, declared, plan, start))
        record.stage(f"comparison: the same plan at epsilon {epsilon:g}")
    pooled = np.load(record.curve_file.parent / POOLED, allow_pickle=False)
    story = Story(
        spec=_shape(record.folder),
        weights=result.weights,
        references={"public-only": start, "pooled, no privacy": pooled},
        curve={int(number): errors for number, errors in record.curve().items()},
        spend={n: [(s.round, s.epsilon_by_node.get(n, 0.0)) for s in result.rounds] for n in nodes},
        ceiling=plan.privacy.epsilon,
        credit=_credit(result),
        at_epsilon={**others, plan.privacy.epsilon: result.weights},
    )
    return illustrate(cohorts, compared, story)


def _credit(result: FederationResult) -> tuple[CreditRow, ...]:
    """Credit by hospital over all epochs; intervals of independent noise add up as squares."""
    totals: dict[str, list[float]] = {}
    for epoch in result.credits:
        for line in epoch.lines:
            row = totals.setdefault(line.node, [0.0, 0.0, 0.0, 0.0])
            row[0] += line.shapley_mg_dl
            row[1] += (line.shapley_mg_dl - line.interval_low_mg_dl) ** 2
            row[2] += (line.interval_high_mg_dl - line.shapley_mg_dl) ** 2
            row[3] += line.micro_credits
    return tuple(
        CreditRow(node, value, value - low**0.5, value + high**0.5, int(micro))
        for node, (value, low, high, micro) in sorted(totals.items())
    )


def _report_data(
    folder: AggregatorFolder,
    compared: Comparison,
    intake: Mapping[str, QualityReport],
    result: FederationResult,
    nodes: Mapping[str, Path],
    verified: VerifyReport,
    pictures: tuple[Illustration, ...],
) -> ReportData:
    plan = folder.load_plan()
    ours = compared.evaluations[OURS].pooled.at(30)
    return ReportData(
        run=result.run,
        generated_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        model_hash=result.model_hash,
        rounds=plan.rounds,
        headline=(
            f"Pooled over held-out people, the federated private model errs by {ours.rmse:.2f} mg/dL (RMSE) 30 minutes "
            f"ahead, {100 * ours.skill:.0f}% less than the last reading does."
        ),
        columns=COLUMNS,
        rows=rows(compared.evaluations),
        detail=compared.evaluations[OURS],
        privacy=tuple(_privacy_line(name, home) for name, home in nodes.items()),
        intake=tuple(_intake_line(name, report) for name, report in intake.items()),
        credit=_credit(result),
        ledger=LedgerStatus(verified.head.size, verified.head.root_hex, verified.cosigned_by),
        illustrations=pictures,
    )


def _privacy_line(name: str, home: Path) -> PrivacyLine:
    from hospital_node.folder import NodeFolder

    with NodeFolder.open(home) as node:
        book, settings = node.budget(), node.settings
        return PrivacyLine(
            name,
            settings.declared_training_patients,
            book.spent("training"),
            settings.max_epsilon_training,
            settings.declared_heldout_patients,
            book.spent("heldout"),
        )


def _intake_line(name: str, report: QualityReport) -> IntakeLine:
    held, dropped = sum(report.quarantined.values()), sum(report.duplicates.values())
    return IntakeLine(name, report.rows_in, report.accepted, held, dropped, report.patients)


def _summary(out: Path, data: ReportData, compared: Comparison, verified: VerifyReport) -> str:
    """The ONE table, what it cost in privacy, who earned what, and where to look next."""
    losses = [f"{label} at {m} min ({how}) by {d:.2f}" for label, m, how, d in margins(compared.evaluations) if d >= 0]
    beaten = "beats persistence, ridge and public-only at 30 and 60 min, as mean over hospitals and pooled"
    epsilon = max(line.epsilon for line in data.privacy)
    earned = "  ".join(f"{line.node} {line.micro_credits / 1e6:.2f}" for line in data.credit)
    return "\n".join(
        (
            render_table(data),
            "",
            "The federated private model " + (beaten if not losses else "does NOT beat " + "; ".join(losses)) + ".",
            f"Privacy: epsilon {epsilon:.2f} at delta {data.delta:g}, unit {data.unit} ({data.relation}), "
            "full noise at each hospital.",
            f"Credit (credits): {earned}",
            f"Ledger: verified, {verified.head.size} entries, cosigned by {len(verified.cosigned_by)} hospitals.",
            data.note,
            f"Report: {out / 'report.html'}   Model: {out / 'model'}   Runs: islet review",
        )
    )
