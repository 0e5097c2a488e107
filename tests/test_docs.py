"""The documents keep their word: every command and option they show exists, every link leads somewhere."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer.main

from data_schemas.plan import TrainingPlan
from pipeline.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def shown_commands() -> list[tuple[str, str]]:
    """Lines of fenced blocks that start with `islet`, continuations joined."""
    return [
        (document.name, line)
        for document in DOCUMENTS
        for block in re.findall(r"```[a-z]*\n(.*?)```", document.read_text(), re.S)
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("islet ")
    ]


@pytest.mark.parametrize(("document", "line"), shown_commands())
def test_every_command_in_a_document_exists(document: str, line: str) -> None:
    """The command is known and takes each option that is shown with it."""
    words = shlex.split(line, comments=True)[1:]
    command: click.Command = typer.main.get_command(app)
    while isinstance(command, click.Group):
        name = words.pop(0)
        assert name in command.commands, f"{document}: {line}"
        command = command.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known | {"--help"}, f"{document}: {line}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file(document: Path) -> None:
    """Relative links of the documents point at files that are there."""
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text())

    assert [link for link in links if not (document.parent / link).exists()] == []


def test_every_key_of_a_plan_is_explained() -> None:
    """docs/plans.md names every setting that a plan may have."""
    text = (ROOT / "docs" / "plans.md").read_text()
    solved = {"noise_multiplier", "unit"}
    names = {
        name
        for field in TrainingPlan.model_fields.values()
        for name in getattr(field.annotation, "model_fields", {})
        if name not in solved
    }

    assert sorted(name for name in names | {"rounds", "name", "seed"} if name not in text) == []
