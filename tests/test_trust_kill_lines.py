"""scripts/trust/kill_lines.py: a sample of the lines; results/trust/kill_lines.md has more."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are not here")


def test_a_kill_at_any_line_leaves_no_trace(tmp_path):
    argv = ["--stride=103", f"--out={tmp_path}", f"--report={tmp_path / 'report'}"]
    command = [sys.executable, "scripts/trust/kill_lines.py", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "records.json").read_text())
    assert len(records) > 20
    assert all(r["trouble"] is None for r in records)
    assert {r["line"].split(":")[0] for r in records} >= {"train.py", "engine/checkpoint.py"}
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["kills"] == found["passed"] == len(records) and found["failed"] == []
    assert set(found["executed"]) == {"fresh", "resumed"} and min(found["executed"].values()) > 1000
    assert f"**{len(records)} of {len(records)}**" in (tmp_path / "report.md").read_text()
