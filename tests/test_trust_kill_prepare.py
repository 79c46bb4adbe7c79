"""scripts/trust/kill_prepare.py: a few real kills, and proof that it would notice what they break."""

import json
import random
import subprocess
import sys

import pytest

from engine.errors import RunError
from scripts.trust import kill_prepare

pytest.importorskip("tiktoken")


def test_two_kills_leave_no_trace(shared_dir, gpt2_encoding, tmp_path, capsys):
    rng = random.Random(0)
    words = [" ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(200)) for _ in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    kill_prepare.main(
        [
            f"--input={tmp_path / 'text.jsonl'}",
            "--kills=2",
            "--shard-size=9000",
            f"--report={tmp_path / 'new' / 'a'}",
        ]
    )
    found = json.loads((tmp_path / "new" / "a.json").read_text())
    assert found["kills"] == 2 == sum(found["killed_while"].values())
    assert found["sets_finished"] == found["sets_identical_to_the_uninterrupted_one"] >= 1
    assert found["runs"] >= 3 and found["files_a_set"] >= 3
    assert "- kills: 2\n" in (tmp_path / "new" / "a.md").read_text()
    assert found["command"].startswith("python scripts/trust/kill_prepare.py --input=text.jsonl --kills=2")


@pytest.mark.parametrize(
    "found", [{"a.bin": "1", "b.bin": "3"}, {"a.bin": "1", "b.bin": "2", "c.bin": "3"}, {"c.bin": "2"}]
)
def test_a_file_that_differs_is_named(found):
    with pytest.raises(RunError, match=r"after kill 3 the set differs .* in [bc].bin"):
        kill_prepare.check(found, {"a.bin": "1", "b.bin": "2"}, "after kill 3")


def test_files_that_are_not_there_yet_do_not_differ():
    kill_prepare.check({"a.bin": "1"}, {"a.bin": "1", "b.bin": "2"}, "after kill 3")


def test_a_kill_falls_with_the_time_or_with_a_file_on_a_living_process(tmp_path):
    (tmp_path / "a.tmp").touch()
    for seed in range(6):
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        assert kill_prepare.strike(random.Random(seed), process, tmp_path, 0.05)
        process.stdin.close()
    done = subprocess.Popen([sys.executable, "-c", ""])
    assert done.wait() == 0 and not kill_prepare.strike(random.Random(0), done, tmp_path, 1e9)


def test_no_input_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="error: there is no input file"):
        kill_prepare.main([f"--input={tmp_path / 'none.jsonl'}"])
