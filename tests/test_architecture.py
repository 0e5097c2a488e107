"""The house rules that a reader relies on: one door per heavy library, small modules and functions, clean texts."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("data_schemas", "pipeline", "hospital_node", "aggregator")
DOORS = {
    "flwr": {
        "pipeline/bundle.py",
        "pipeline/wire.py",
        "hospital_node/client_app.py",
        "hospital_node/gate.py",
        "hospital_node/supernode.py",
        "aggregator/server_app.py",
        "aggregator/rounds.py",
        "aggregator/grid_exchange.py",
        "aggregator/embedded_grid.py",
    },
    "opacus": {"pipeline/private_training.py", "pipeline/accounting.py"},
    "pytorch_lightning": {"pipeline/private_training.py", "pipeline/fitting.py"},
    "mlflow": {"aggregator/registry.py"},
    "great_expectations": {"hospital_node/judgement.py"},
    "cryptography": {"pipeline/certificates.py", "pipeline/masking.py", "pipeline/signing.py"},
    "fastapi": {
        "aggregator/federation_page.py",
        "aggregator/desk.py",
        "hospital_node/endpoint.py",
        "hospital_node/exchange_routes.py",
        "hospital_node/forecast_routes.py",
        "hospital_node/page_routes.py",
        "hospital_node/reading_routes.py",
        "hospital_node/switch_routes.py",
    },
    "jwt": {"hospital_node/tokens.py"},
    "sklearn": {"pipeline/baselines.py"},
    "onnxruntime": {"pipeline/export.py"},
    "onnx": {"pipeline/export.py"},
    "web3": {"aggregator/anchoring.py"},
}
BROAD_EXCEPT_ALLOWED = {
    "hospital_node/client_app.py": 1,
    "hospital_node/supernode.py": 1,
    "aggregator/embedded_grid.py": 1,
    "aggregator/grid_exchange.py": 1,
    "aggregator/rounds.py": 1,
}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).glob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def imported(tree: ast.Module) -> set[str]:
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    return {name.split(".")[0] for name in names}


def test_each_heavy_library_has_its_doors() -> None:
    """A heavy library is imported only in the modules named for it, and each door is in use."""
    used: dict[str, set[str]] = {library: set() for library in DOORS}
    for name, tree in sources():
        for library in imported(tree) & used.keys():
            used[library].add(name)

    assert used == DOORS


def test_modules_and_functions_stay_small() -> None:
    """No module has more than 400 lines and no function more than 60 lines of body."""
    long_modules = [n for n, _ in sources() if len((ROOT / n).read_text().splitlines()) > 400]
    long_functions = [
        f"{name}:{node.name}"
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_lines(node) > 60
    ]

    assert long_modules == []
    assert long_functions == []


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return 0 if not body else (body[-1].end_lineno or 0) - body[0].lineno + 1


def test_broad_excepts_stand_only_at_the_boundaries() -> None:
    """`except Exception` stands only where a failure of one party must not become a failure of all."""
    found: dict[str, int] = {}
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and swallows_everything(node):
                found[name] = found.get(name, 0) + 1

    assert found == BROAD_EXCEPT_ALLOWED


def swallows_everything(handler: ast.ExceptHandler) -> bool:
    """Tell whether a handler is broad; one that ends by raising again only cleans up."""
    broad = handler.type is None or ast.unparse(handler.type) in {"Exception", "BaseException"}
    return broad and not isinstance(handler.body[-1], ast.Raise)


def test_import_contracts_hold() -> None:
    """The rooms import each other only in the directions of the design."""
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout


def test_help_answers_without_heavy_imports() -> None:
    """`islet --help` loads none of the heavy libraries."""
    code = (
        "import sys; sys.argv = ['islet', '--help']\n"
        "from pipeline.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'flwr', 'mlflow', 'great_expectations', 'pandas', 'opacus', 'fastapi', 'matplotlib'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert "LOADED []" in done.stdout


@pytest.mark.parametrize("pattern", [r"\b[Tt]odo\b", r"/work/", r"\bissue #?\d", r"\.\./shared"])
def test_the_text_speaks_of_the_project_alone(pattern: str) -> None:
    """No file of the project holds a to-do, a path of one machine or a number of a tracker."""
    every = (p for p in ROOT.rglob("*") if p.suffix in {".py", ".md", ".toml"})
    texts = [p for p in every if not p.relative_to(ROOT).parts[0].startswith(".venv")]
    hits = [p.name for p in texts if p != Path(__file__) and re.search(pattern, p.read_text(errors="replace"))]

    assert hits == []
