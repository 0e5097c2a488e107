"""The node's commands about readings: import, validate, quarantine, layouts. Part of the composition root."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_schemas.errors import BadInput

if TYPE_CHECKING:
    from hospital_node.settings import NodeSettings, Source

node = typer.Typer(no_args_is_help=True, help="A hospital's node: readings, privacy budget, forecasts.")
layout_app = typer.Typer(no_args_is_help=True, help="Layouts: how exports look.")
node.add_typer(layout_app, name="layout")

NodePath = Annotated[Path, typer.Argument(metavar="NODE", help="The node's folder.")]


def say(line: str = "") -> None:
    """Print one line at once, so that long work shows its progress."""
    typer.echo(line)
    sys.stdout.flush()


def _sources(settings: NodeSettings) -> tuple[Source, ...]:
    if not settings.sources:
        raise BadInput("the node has no sources", "add a [[sources]] block with path, layout and zone to node.toml")
    return settings.sources


@node.command("import")
def node_import(path: NodePath) -> None:
    """Read, validate and store the exports that node.toml names."""
    from data_schemas.layout import load_layout
    from hospital_node.folder import NodeFolder
    from hospital_node.importing import import_exports
    from hospital_node.store import Store
    from hospital_node.validation import render_report

    with NodeFolder.open(path) as home:
        for source in _sources(home.settings):
            say(f"importing {source.path} ({source.layout})")
            layout, store = load_layout(source.layout), Store(home.store)
            say(render_report(import_exports(Path(source.path), layout, source.zone, home.pseudonym_key, store)))


@node.command("validate")
def node_validate(path: NodePath) -> None:
    """Check the exports that node.toml names and store nothing; exit 1 when a row would be quarantined."""
    from data_schemas.layout import load_layout
    from hospital_node.folder import NodeFolder
    from hospital_node.intake import read_exports
    from hospital_node.validation import load_suite, render_report, validate

    clean = True
    with NodeFolder.open(path) as home:
        for source in _sources(home.settings):
            readings = read_exports(Path(source.path), load_layout(source.layout), source.zone, home.pseudonym_key)
            report = validate(readings, load_suite())[2]
            say(f"{source.path} ({source.layout})\n{render_report(report)}")
            clean = clean and not report.quarantined
    raise typer.Exit(0 if clean else 1)


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
