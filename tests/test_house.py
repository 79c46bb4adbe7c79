"""The arrows between the rooms run one way."""

import ast
import graphlib
import os
import signal
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


def test_the_trunk_stays_short():
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


# Slow to import, or not everywhere installed.
OPTIONAL = [
    "wandb",
    "trackio",
    "datasets",
    "transformers",
    "matplotlib",
    "scipy",
    "tiktoken",
    "tokenizers",
    "gigatoken",
]


def loaded(code: str, *names: str) -> set[str]:
    """Those of the modules that are loaded when a new process has run the code."""
    code = f"import contextlib, io, sys\nwith contextlib.redirect_stdout(io.StringIO()):\n {code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(names) & set(done.stdout.split())


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_needs_no_torch(script):
    code = f"import runpy; sys.argv = ['{script}', '--help']\n with contextlib.suppress(SystemExit): "
    code += f"runpy.run_path('{script}', run_name='__main__')"
    assert loaded(code, "torch", "numpy", "pydantic", *OPTIONAL) == set()


def test_a_dry_run_loads_little_but_torch(tmp_path):
    code = f"import sample, train; train.cli(['config/demo.py', '--dry_run=True', '--data_dir={tmp_path}'])"
    assert loaded(code, "torch._dynamo", "torch._inductor", "sympy", *OPTIONAL) == set()


@pytest.mark.parametrize("script", ["train.py", "sample.py", "scripts/matched.py", "scripts/probes/norms.py"])
def test_ctrl_c_ends_without_a_word_while_torch_is_imported(script, tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
