"""The arrows between the rooms run one way."""

import ast
import graphlib
import subprocess
import sys

import pytest
from conftest import ROOT

import configurator
from scripts import experiment

ROOMS = {
    "configurator.py": set(),
    "data": {"data", "kronecker"},
    "kronecker": {"kronecker"},
    "engine": {"engine", "data"},
    "model.py": {"kronecker", "engine"},
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


def test_the_main_scripts_stay_below_400_lines():
    for name in ("train.py", "model.py", "sample.py", "configurator.py"):
        assert len((ROOT / name).read_text().splitlines()) < 400


def test_recipes_are_short_and_know_their_keys():
    for path in (ROOT / "config").rglob("*.py"):
        if path.parent.name == "experiments":
            experiment.read(str(path))
        else:
            assert len(path.read_text().splitlines()) <= 40, path
            configurator.load([str(path)])


def test_no_two_modules_import_each_other():
    """graphlib finds a circle, also one over several modules; imports inside functions count."""
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = {
        name[:-3].replace("/", ".").removesuffix(".__init__"): ROOT / name for name in files.stdout.split()
    }
    graph = {}
    for name, path in modules.items():
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                wanted |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
            elif isinstance(node, ast.Import):
                wanted |= {a.name for a in node.names}
        # a package's own file is imported by all that lies in it, and may name parts of itself
        graph[name] = {w for w in wanted & modules.keys() if w != name and not name.startswith(w + ".")}
    graphlib.TopologicalSorter(graph).prepare()


def test_modules_load_without_optional_libraries():
    """`import train` must not import wandb, datasets or transformers: slow, and not everywhere installed."""
    code = "import sys, train, sample; print([m for m in ('wandb', 'datasets', 'transformers', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
