"""The arrows between the rooms run one way."""

import ast
import sys

import pytest
from conftest import ROOT

ROOMS = {
    "configurator.py": set(),
    "data": {"data"},
    "kronecker": {"kronecker"},
    "engine": {"engine", "data"},
    "model.py": {"kronecker"},
    "train.py": {"model", "configurator", "engine", "data", "kronecker"},
    "sample.py": {"model", "configurator", "engine", "data", "kronecker"},
    "config": set(),
}
OURS = {
    "configurator",
    "data",
    "kronecker",
    "engine",
    "model",
    "train",
    "sample",
    "scripts",
    "tests",
    "config",
}


def imported(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room):
    path = ROOT / room
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        assert imported(file) & OURS <= ROOMS[room], file


def test_the_main_scripts_stay_near_350_lines():
    for name in ("train.py", "model.py"):
        assert len((ROOT / name).read_text().splitlines()) <= 420


def test_recipes_are_short_and_know_their_keys():
    import configurator

    for path in (ROOT / "config").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path
        configurator.load([str(path)])


def test_modules_load_without_optional_libraries():
    """`import train` must not import wandb, datasets or transformers: slow, and not everywhere installed."""
    import subprocess

    code = "import sys, train, sample; print([m for m in ('wandb', 'datasets', 'transformers', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
