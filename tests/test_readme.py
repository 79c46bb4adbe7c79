"""Every command that a README gives names a file that is here and flags that it knows, and starts."""

import re
import runpy
import shlex
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = ["README.md", "scripts/slurm/README.md", "results/124m/README.md", "data/README.md"]
LAUNCHERS = ("python", "torchrun", "sbatch")


def commands() -> list[list[str]]:
    """The words of all commands in code blocks and between backticks; a command may go on over lines."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.M | re.S)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += [
            " ".join(code.split())
            for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        ]
        for line in lines:
            words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else line.split()
            words = [w for w in words if not re.fullmatch(r"[A-Z_]+=\S*", w)]  # variables before it
            if words and words[0] in LAUNCHERS:
                found.append(words)
    return found


def target(words: list[str]) -> tuple[str, list[str]]:
    """(file that a command runs, its own arguments)."""
    if words[:2] == ["python", "-m"]:
        return words[2].replace(".", "/") + ".py", words[3:]
    at = next(i for i, w in enumerate(words) if w.endswith((".py", ".sbatch")))
    return words[at], words[at + 1 :]


COMMANDS = [target(words) for words in commands()]
SCRIPTS = sorted({script for script, _ in COMMANDS})


def test_the_pages_hold_commands():
    assert {
        "train.py",
        "sample.py",
        "scripts/matched.py",
        "scripts/compare.py",
        "scripts/gpu/recipe.py",
    } <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_command_starts_and_knows_the_flags_that_the_pages_give_it(script, monkeypatch, capsys):
    path = ROOT / script
    assert path.is_file()
    flags = {
        w.partition("=")[0] for s, words in COMMANDS if s == script for w in words if re.match(r"--\w", w)
    }
    if script.endswith(".py"):
        monkeypatch.setattr(sys, "argv", [str(path), "--help"])
        monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
        monkeypatch.setattr(signal, "signal", lambda *_: None)  # a command would change this process's
        with pytest.raises(SystemExit) as leaving:
            runpy.run_path(str(path), run_name="__main__")
        help_text = capsys.readouterr().out
        assert leaving.value.code in (0, None) and len(help_text) > 100
    else:
        help_text = path.read_text()
    also = (
        (ROOT / "configurator.py").read_text() if "--key=value" in help_text else ""
    )  # passed on to train.py
    for flag in flags - {"--help"}:
        known = re.search(rf"{flag}\b", help_text) or re.search(rf"^    {flag[2:]}: ", also, flags=re.M)
        assert known, f"{script} does not know {flag}"


def test_make_runs_files_that_are_here():
    """`make -n` shows what its targets would run."""
    shown = subprocess.run(
        ["make", "-n", "demo", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    scripts = re.findall(r"\S+\.py\b", shown)
    assert len(scripts) >= 5
    for script in scripts:
        assert (ROOT / script).is_file(), script
