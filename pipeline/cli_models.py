"""The data scientist's commands: backtest, evaluate."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from data_schemas.errors import BadInput
from pipeline.cli_node import say


def register(app: typer.Typer) -> None:
    """Add the commands to `islet`."""
    app.command("backtest")(backtest_command)
    app.command("evaluate")(evaluate_command)


def backtest_command(
    readings: Annotated[Path, typer.Option(help="CSV or CSV.gz with patient_id,time,glucose_mg_dl.")],
    model: Annotated[str, typer.Option(help="Folder of an exported model, or models:/NAME@ALIAS.")],
    out: Annotated[Path, typer.Option(help="CSV or CSV.gz to write.")],
    stride_minutes: Annotated[int, typer.Option(help="Minutes between two forecasts of a patient.")] = 15,
    zone: Annotated[str, typer.Option(help="IANA zone of times that carry none.")] = "UTC",
    personal: Annotated[
        bool, typer.Option("--personal/--plain", help="Learn each person's own past on the way, or the model alone.")
    ] = True,
) -> None:
    """Forecast a file of past readings, each forecast from what was known when it was issued."""
    from pipeline.backtest import backtest
    from pipeline.demo import load_any

    started = time.monotonic()
    summary = backtest(
        readings, load_any(model), out, zone, stride_minutes=stride_minutes, personal=personal, progress=_bar()
    )
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in summary.skipped.items()) or "none"
    say(f"{summary.readings:,} readings of {summary.patients:,} patients, {summary.forecasts:,} forecasts "
        f"in {time.monotonic() - started:.0f} s; skipped rows: {skipped}")  # fmt: skip


def _bar() -> Callable[[float], None]:
    """Progress on a terminal's error stream, in tenths; nothing when the output is not watched."""
    shown = -1

    def tick(share: float) -> None:
        nonlocal shown
        if sys.stderr.isatty() and int(share * 10) > shown:
            shown = int(share * 10)
            sys.stderr.write(f"\r{shown * 10:3d} %" + ("\n" if shown >= 10 else ""))
            sys.stderr.flush()

    return tick


def evaluate_command(
    model: Annotated[str | None, typer.Option(help="Folder of an exported model, or models:/NAME@ALIAS.")] = None,
    readings: Annotated[
        list[Path] | None, typer.Option(help="CSV or CSV.gz with patient_id,time,glucose_mg_dl; one a site, repeat.")
    ] = None,
    nodes: Annotated[
        list[Path] | None, typer.Option("--nodes", help="Node folder on this machine; repeat for each.")
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="A published protocol: by-patient or glucobench.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for scores.json, scores.html and pictures.")] = Path("evaluation"),
    zone: Annotated[str, typer.Option(help="IANA zone of times that carry none.")] = "UTC",
) -> None:
    """Score a model beside every baseline, on people nobody trained on."""
    from pipeline.assessment import Request, assess
    from pipeline.demo import load_any, windows_of_nodes

    if bool(readings) == bool(nodes):
        raise BadInput("give readings or nodes", "use --readings FILE for files, or --nodes FOLDER for local nodes")
    loaded = load_any(model) if model else None
    sites = {} if not nodes else windows_of_nodes(nodes, loaded.spec.history_minutes if loaded else 120)
    say(assess(Request(loaded, tuple(readings or ()), sites, protocol, out, zone), say))
