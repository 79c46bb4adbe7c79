"""What `pip install .` gives: the package kronecker, whole, typed, and nothing else."""

import email
import shutil
import subprocess
import sys
import zipfile

from conftest import ROOT


def test_the_wheel(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "kronecker", source / "kronecker", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "import sys, setuptools.build_meta as build; build.build_wheel(sys.argv[1])"
    built = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=source, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        described = email.message_from_bytes(wheel.read(metadata))
    ours = {f"kronecker/{path.name}" for path in (ROOT / "kronecker").iterdir() if path.is_file()}
    assert names == ours
    assert "kronecker/py.typed" in names  # or type checkers would not look at the annotations
    needed = [line for line in described.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.partition(">")[0] for line in needed) == ["numpy", "torch"]
