"""The node's commands about readings: import, validate, quarantine, layouts. Part of the composition root."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_schemas.errors import BadInput, IsletError

if TYPE_CHECKING:
    from collections.abc import Container

    from hospital_node.folder import NodeFolder
    from hospital_node.importing import Export, Intake
    from hospital_node.settings import NodeSettings, Source
    from hospital_node.store import Store
    from hospital_node.suites import Suite

node = typer.Typer(no_args_is_help=True, help="A hospital's node: readings, privacy budget, forecasts.")
layout_app = typer.Typer(no_args_is_help=True, help="Layouts: how exports look.")
node.add_typer(layout_app, name="layout")
quarantine_app = typer.Typer(no_args_is_help=True, help="Rows that were set aside.")
node.add_typer(quarantine_app, name="quarantine")

NodePath = Annotated[Path, typer.Argument(metavar="NODE", help="The node's folder.")]


def say(line: str = "") -> None:
    """Print one line at once, so that long work shows its progress."""
    typer.echo(line)
    sys.stdout.flush()


def make_node(
    path: Path,
    *,
    name: str,
    federation: str,
    training: int,
    heldout: int,
    aggregator_key: str | None,
    exports: Path | None,
    layout: str | None,
    zone: str | None,
) -> None:
    """Make a node folder from what the command line gave. Raises BadInput naming what cannot be used."""
    from pydantic import ValidationError

    from hospital_node.folder import NodeFolder
    from hospital_node.settings import NodeSettings, Source

    if (exports is None) != (layout is None):
        raise BadInput("--exports and --layout go together", "give both, or neither and edit node.toml later")
    try:
        settings = NodeSettings(
            name=name,
            federation=federation,
            aggregator_public_key=aggregator_key,
            sources=() if exports is None else (Source(path=str(exports.resolve()), layout=str(layout), zone=zone),),
            declared_training_patients=training,
            declared_heldout_patients=heldout,
        )
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise BadInput(f"not a node's settings: {wrong}", "see the command's --help") from error
    NodeFolder.create(path, settings)


def _sources(settings: NodeSettings) -> tuple[Source, ...]:
    if not settings.sources:
        raise BadInput("the node has no sources", "add a [[sources]] block with path, layout and zone to node.toml")
    return settings.sources


@node.command("import")
def node_import(
    path: NodePath,
    watch: Annotated[bool, typer.Option("--watch", help="Go on and take new files as they arrive.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks.")] = 5.0,
) -> None:
    """Read, validate and store the exports that node.toml names."""
    from hospital_node.folder import NodeFolder
    from hospital_node.store import Store
    from hospital_node.suites import suite_of

    with NodeFolder.open(path) as home:
        suite, store = suite_of(path), Store(home.store)
        if watch:
            _watch(home, suite, store, interval)
            return
        for source in _sources(home.settings):
            say(f"importing {source.path} ({source.layout})")
            _import(home, source, suite, store)


def _import(home: NodeFolder, source: Source, suite: Suite, store: Store, only: Container[Path] | None = None) -> None:
    """Import one source, print the account, and keep its report when something was stored."""
    from hospital_node.importing import take_in
    from hospital_node.intake_report import summary

    export = _export(home, source, only)
    taken = take_in(export, store, suite)
    say(summary(taken))
    if only is None:
        _say_passed_over(export)
    if taken.number is not None:
        _keep_report(home, f"import-{taken.number:04d}", taken, suite, f"Import {taken.number}", source)


def _say_passed_over(export: Export) -> None:
    """A file that the layout does not read, a spreadsheet say, must not look imported."""
    from hospital_node.export_files import passed_over

    globs = export.layout.globs
    if counts := passed_over(export.folder, globs):
        endings = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in counts.items())
        say(f"not read: {endings}; layout {export.layout.name} reads {', '.join(dict.fromkeys(globs))}")


def _export(home: NodeFolder, source: Source, only: Container[Path] | None = None) -> Export:
    from data_schemas.layout import load_layout
    from hospital_node.importing import Export

    return Export(Path(source.path), load_layout(source.layout), source.zone, home.pseudonym_key, only)


def _keep_report(home: NodeFolder, name: str, intake: Intake, suite: Suite, title: str, source: Source) -> None:
    from datetime import UTC, datetime

    from hospital_node.intake_report import report_page
    from pipeline.signing import write_durably

    when = f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC"
    page = report_page(intake, suite, title, f"Node {home.settings.name} · layout {source.layout} · {when}")
    path = home.reports / f"{name}.html"
    write_durably(path, page.encode(), mode=0o600)
    say(f"report: {path}")


def _watch(home: NodeFolder, suite: Suite, store: Store, interval: float) -> None:
    """Watch every source until SIGINT or SIGTERM; an import that has begun is finished."""
    import signal
    from threading import Event, Lock, Thread

    from data_schemas.layout import load_layout
    from hospital_node.watching import watch

    stop, one_at_a_time = Event(), Lock()
    failed: list[Exception] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())

    def follow(source: Source) -> None:
        folder, layout = Path(source.path), load_layout(source.layout)

        def take(file: Path) -> None:
            with one_at_a_time:
                say(f"importing a file of {folder}")
                _import(home, source, suite, store, {file})

        def refused(error: BadInput) -> None:
            say(f"refused: {error.message}\n  what to do: {error.hint}")

        try:
            watch(folder, layout, take, refused, stop, interval)
        except IsletError as error:
            failed.append(error)
            stop.set()

    threads = [Thread(target=follow, args=(source,)) for source in _sources(home.settings)]
    for thread in threads:
        thread.start()
    say(f"watching {len(threads)} folders; stop with Ctrl-C")
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    say("stopped")


@node.command("validate")
def node_validate(path: NodePath) -> None:
    """Check the exports that node.toml names and store nothing; exit 1 when a row would be quarantined.

    Writes a report for each source into the node's folder: reports/validation-1.html and so on.
    """
    from hospital_node.folder import NodeFolder
    from hospital_node.importing import look_at
    from hospital_node.intake_report import summary
    from hospital_node.store import Store
    from hospital_node.suites import suite_of

    clean = True
    with NodeFolder.open(path) as home:
        suite, past = suite_of(path), Store(home.store).past()
        for number, source in enumerate(_sources(home.settings), start=1):
            export = _export(home, source)
            looked = look_at(export, past, suite)
            say(f"{source.path} ({source.layout})\n{summary(looked)}")
            _say_passed_over(export)
            _keep_report(home, f"validation-{number}", looked, suite, "Validation, nothing stored", source)
            clean = clean and not looked.account.report.quarantined
    raise typer.Exit(0 if clean else 1)


@quarantine_app.command("list")
def quarantine_list(path: NodePath) -> None:
    """Count what was set aside, by rule, and say why."""
    from hospital_node.folder import NodeFolder
    from hospital_node.store import Store
    from hospital_node.suites import suite_of

    with NodeFolder.open(path) as home:
        suite = suite_of(path)
        counts = Store(home.store).quarantined()["rule"].value_counts().sort_index()
        for rule, count in counts.items():
            say(f"{count:>8,}  {rule}: {suite.explanation(str(rule))}")
        say(f"{counts.sum():>8,}  rows in quarantine")


@quarantine_app.command("show")
def quarantine_show(
    path: NodePath,
    rule: Annotated[str | None, typer.Option(help="Rows that broke this rule only.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 20,
) -> None:
    """Show rows that were set aside, for the hospital's own eyes: id, rule, pseudonym, time and value."""
    from hospital_node.folder import NodeFolder
    from hospital_node.store import Store, quarantine_ids

    with NodeFolder.open(path) as home:
        held = Store(home.store).quarantined()
        held = held.assign(id=quarantine_ids(held))
        chosen = held if rule is None else held[held["rule"] == rule]
        for row in chosen.head(limit).itertuples():
            say(f"{row.id:<24} {row.rule:<22} {row.patient}  {row.measured_at}  {row.glucose_mg_dl:g} mg/dL")
        say(f"{min(limit, len(chosen)):,} of {len(chosen):,} rows")


def _settle(path: Path, ids: list[str] | None, rule: str | None, *, release: bool) -> None:
    from hospital_node.folder import NodeFolder
    from hospital_node.store import Store, quarantine_ids

    if bool(ids) == (rule is not None):
        raise BadInput("give ids, or --rule for all rows of one rule", "see `islet node quarantine show`")
    with NodeFolder.open(path) as home:
        store = Store(home.store)
        held = store.quarantined()
        chosen = ids or quarantine_ids(held[held["rule"] == rule]).tolist()
        done = store.settle(chosen, release=release)
        say(f"{done:,} rows {'are readings now' if release else 'were discarded'}")


Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Rows, as `quarantine show` names them.")]
OfRule = Annotated[str | None, typer.Option("--rule", help="Every row that broke this rule.")]


@quarantine_app.command("release")
def quarantine_release(path: NodePath, ids: Ids = None, rule: OfRule = None) -> None:
    """Make rows readings after all."""
    _settle(path, ids, rule, release=True)


@quarantine_app.command("discard")
def quarantine_discard(path: NodePath, ids: Ids = None, rule: OfRule = None) -> None:
    """Delete rows for good."""
    _settle(path, ids, rule, release=False)


@layout_app.command("list")
def layout_list() -> None:
    """List the layouts that come with Islet."""
    from data_schemas.layout import known_layouts, load_layout

    for name in known_layouts():
        say(f"{name:<18} {load_layout(name).title}")


@layout_app.command("propose")
def layout_propose(file: Annotated[Path, typer.Argument(help="One export file.")]) -> None:
    """Name the layouts of Islet that read a file; when none does, draft one."""
    from hospital_node.proposal import fitting_layouts, propose

    if not file.is_file():
        raise BadInput(f"{file} is not a file", "give one export file")
    fitting = fitting_layouts(file)
    say("\n".join(f"# Islet's layout {name!r} reads this file" for name in fitting) if fitting else propose(file))


@layout_app.command("check")
def layout_check(
    files: Annotated[list[Path], typer.Argument(help="Export files.")],
    zone: Annotated[str, typer.Option(help="IANA zone of clock times without an offset.")] = "UTC",
) -> None:
    """Say, as a table, how many rows of each file would go in and out by the layouts that read it; store nothing."""
    from hospital_node.suites import load_suite
    from hospital_node.trial import markdown, try_file

    if missing := [file for file in files if not file.is_file()]:
        raise BadInput(f"{missing[0]} is not a file", "give export files")
    suite = load_suite()
    say(markdown([trial for file in files for trial in try_file(file, zone, suite)]))
