"""The import arrows of the house, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("clipserve", "training", "service", "index")
ALLOWED = {
    "clipserve": {"clipserve"},
    "index": {"index", "clipserve"},
    "training": {"training", "clipserve"},
    "service": {"service", "index", "clipserve"},
}
HOMES = {"webdataset": "training", "faiss": "index", "fastapi": "service", "uvicorn": "service"}
FILES = [file for package in OURS for file in sorted((ROOT / package).rglob("*.py"))]


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_follow_the_arrows(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    if file.parent == ROOT / "clipserve" / "cli":
        return  # imports the other three inside its subcommands; see the next test
    assert imports(file) & set(OURS) <= ALLOWED[package]


@pytest.mark.parametrize("file", sorted((ROOT / "clipserve" / "cli").glob("*.py")))
def test_cli_imports_the_other_packages_only_inside_functions(file: Path) -> None:
    tree = ast.parse(file.read_text())
    top = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert {(name or "").split(".")[0] for name in top} & set(OURS) <= {"clipserve"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_heavy_packages_stay_at_home(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    away = {name for name in imports(file) if HOMES.get(name, package) != package}
    assert not away


def test_every_package_with_code_is_installed_by_pyproject() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in FILES}
    assert found <= set(listed)


# In a process of its own: no handler, no seed, no thread, no device.
SILENT = """
import importlib, logging, sys, threading
import numpy, torch
modules = sys.argv[1:]
before = (threading.active_count(), torch.get_rng_state().tolist())
for module in modules:
    importlib.import_module(module)
after = (threading.active_count(), torch.get_rng_state().tolist())
assert before == after, "threads or generators changed"
assert not logging.getLogger().handlers, "logging was set up"
assert not torch.cuda.is_initialized(), "a device was opened"
"""


def test_importing_does_nothing() -> None:
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in FILES
        if file.name != "__main__.py"
    ]
    done = subprocess.run(
        [sys.executable, "-c", SILENT, *modules], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_help_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; sys.argv = ['clipserve', '--help']\n"
        "from clipserve.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Captioned pictures in" in done.stdout
