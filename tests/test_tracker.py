"""engine/tracker.py with the real packages: wandb offline, and trackio on this machine.

What wandb wrote is read back by its own reader (`wandb leet inspect`), what trackio wrote from its SQLite file.
"""

import inspect
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import pytest
from conftest import ROOT, TINY, make_tiny_data
from wandb_server import WandbServer

import configurator
import train
from data import DataError
from data.files import Lock
from engine import metrics, tracker
from engine.errors import RunError
from engine.metrics import read_metrics
from scripts.analysis import numbers, runs

wandb = pytest.importorskip("wandb")
KEYS = TINY | {"max_iters": 30, "ckpt_interval": 10}
ARMS = {"bpe_tied": {"tie_weights": True}, "bpe_untied": {"tie_weights": False}}

KILLED = """
import os, signal, sys
import configurator, train
from engine.metrics import Metrics

log = Metrics.log

def log_and_die(self, row):
    log(self, row)
    if row["iter"] == 17:
        os.kill(os.getpid(), signal.SIGKILL)

Metrics.log = log_and_die
train.main(configurator.load(sys.argv[1:]))
"""


def flags(out_dir, data_dir, **changes) -> list[str]:
    return [f"--{k}={v}" for k, v in (KEYS | {"data_dir": data_dir, "out_dir": out_dir} | changes).items()]


@lru_cache
def records(folder) -> list[dict]:
    """All records of a wandb run's folder, by the package's own reader."""
    read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(read, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def of_kind(found: list[dict], kind: str) -> list[dict]:
    return [r[kind] for r in found if r["type"] == kind]


def history(found: list[dict]) -> list[dict]:
    """The rows that a wandb file holds, without what wandb adds to each."""
    return [{k: v for k, v in h["item"].items() if k[0] != "_"} for h in of_kind(found, "history")]


def by_iter(rows: list[dict]) -> list[dict]:
    """Rows of metrics.jsonl as wandb keeps them: one an iter, so an evaluation and its step share one."""
    merged: dict = {}
    for row in rows:
        merged.setdefault(row["iter"], {}).update(row)
    return list(merged.values())


def wandb_folders(out_dir) -> list[Path]:
    return sorted((out_dir / "wandb").glob("offline-run-*"))


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited for ever"
        time.sleep(0.1)
    return found


def is_sent(out_dir) -> bool:
    """Whether a tracker's process has begun in this folder and is gone again."""
    try:
        if (out_dir / ".tracker.lock").exists():
            Lock(out_dir / ".tracker.lock", "held").close()
            return bool(wandb_folders(out_dir))
    except DataError:
        pass
    return False


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Two arms and two seeds, trained with wandb offline; one run of them killed at step 17 and resumed."""
    folder = tmp_path_factory.mktemp("tracked")
    data_dir = make_tiny_data(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr(tracker, "FINISH", 120)  # a machine that is busy with other tests is slow
        for arm, keys in ARMS.items():
            for seed in (1, 2):
                out_dir = folder / "cmp" / f"{arm}_s{seed}"
                given = flags(out_dir, data_dir, arm=arm, seed=seed, wandb_log=True, init_from="auto", **keys)
                if (arm, seed) == ("bpe_untied", 2):
                    died = subprocess.run([sys.executable, "-c", KILLED, *given], cwd=ROOT)
                    assert died.returncode == -signal.SIGKILL
                    wait_for(lambda d=out_dir: is_sent(d))
                train.main(configurator.load(given))
    return folder / "cmp"


def test_wandb_holds_every_row_once_in_order_under_names_that_overlay_the_arms(comparison):
    seen = set()
    for out_dir in sorted(comparison.iterdir()):
        found = records(wandb_folders(out_dir)[-1])
        assert history(found) == by_iter(read_metrics(out_dir))
        assert [h["iter"] for h in history(found)] == list(range(31))
        assert [h["step"]["num"] for h in of_kind(found, "history")] == list(range(31))
        (run,) = of_kind(found, "run")
        arm, seed = out_dir.name.split("_s")
        assert (run["project"], run["run_group"]) == ("kronecker-nanogpt", "cmp")
        assert (run["display_name"], run["job_type"]) == (f"{arm}-s{seed}", "train")
        assert run["tags"] == [arm, f"seed {seed}"]
        assert run["run_id"] == json.loads((out_dir / "run.json").read_text())["wandb_id"]
        assert not run.get("resumed")
        (exit_record,) = of_kind(found, "exit")
        assert exit_record.get("exit_code", 0) == 0
        axes = {m.get("name") or m["glob_name"]: m.get("step_metric") for m in of_kind(found, "metric")}
        assert axes == {"iter": None, "tokens": None, "*": "iter"}
        seen.add(run["run_id"])
    assert len(seen) == 4


def test_a_kill_costs_no_row_and_a_resume_repeats_none(comparison):
    first, second = (records(f) for f in wandb_folders(comparison / "bpe_untied_s2"))
    assert [h["iter"] for h in history(first)] == list(range(18))  # the last row before the kill is there
    assert [h["iter"] for h in history(second)] == list(range(31))
    assert of_kind(first, "run")[0]["run_id"] == of_kind(second, "run")[0]["run_id"]


class ApiOfFiles:
    """wandb.Api as the comparison uses it, over the files that the real package wrote."""

    def __init__(self, comparison):
        self.all = [RunOfFile(wandb_folders(d)[-1]) for d in sorted(comparison.iterdir())]
        stranger = RunOfFile(wandb_folders(comparison / "bpe_tied_s1")[-1])
        stranger.config = {"lr": 1}  # another program's run in the same project
        self.all.insert(0, stranger)

    def runs(self, *args, **keys):
        given = inspect.signature(wandb.Api.runs).bind(self, *args, **keys).arguments
        assert given["path"] == "someone/project"
        group = (given.get("filters") or {}).get("group")
        return [r for r in self.all if group in (None, r.group)]


class RunOfFile:
    def __init__(self, folder):
        self.found = records(folder)
        (run,) = of_kind(self.found, "run")
        self.name, self.group = run["display_name"], run["run_group"]
        self.config = {k: v for k, v in run["config"]["update"].items() if k != "_wandb"}

    def scan_history(self, *args, **keys):
        inspect.signature(wandb.apis.public.Run.scan_history).bind(self, *args, **keys)
        # wandb fills with None what a row lacks
        return (dict.fromkeys(("mfu", "val/loss")) | h["item"] for h in of_kind(self.found, "history"))


def test_the_comparison_from_wandb_is_that_of_the_records(comparison, monkeypatch):
    monkeypatch.setattr(runs, "wandb_api", lambda: ApiOfFiles(comparison))
    ours = numbers.compare([runs.load_folder(d) for d in sorted(comparison.iterdir())])
    for group in ("cmp", None):
        theirs = numbers.compare(runs.load_wandb("someone/project", group))
        assert ours.keys() == theirs.keys()
        for key in ("final", "pairs", "speed", "decomposition"):
            assert ours[key] == theirs[key]
    with pytest.raises(RunError, match="group other"):
        runs.load_wandb("someone/project", "other")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pseudo-terminal")
def test_the_comparison_asks_for_no_key_on_a_terminal(tracked):
    ours, its = os.openpty()
    command = [sys.executable, "scripts/compare.py", "--wandb", "someone/project"]
    done = subprocess.run(
        command, cwd=ROOT, stdin=its, stdout=its, stderr=subprocess.PIPE, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: wandb is not logged in")
    os.close(its)
    os.close(ours)


def test_what_is_called_has_the_signature_of_the_locked_package():
    inspect.signature(wandb.login).bind(prompt=False, verify=False)
    inspect.signature(wandb.Api).bind(timeout=30)
    inspect.signature(wandb.Run.finish).bind(None)
    inspect.signature(wandb.Run.log).bind(None, {}, step=1)
    inspect.signature(wandb.Run.define_metric).bind(None, "*", step_metric="iter")
    assert {"name", "config", "scan_history"} <= set(dir(wandb.apis.public.Run))
    wandb.Settings(init_timeout=30.0, finish_timeout=300, silent=True, console="off")


# ---- what may go wrong


@pytest.fixture
def tracked(monkeypatch, tmp_path):
    """Trackers that a test starts, none of which outlives it; no key, no settings of the person who runs this."""
    started = []

    def start(*args):
        started.append(tracker.Tracker(*args))
        return started[-1]

    monkeypatch.setattr(metrics, "Tracker", start)
    monkeypatch.setattr(tracker, "FINISH", 120)  # a machine that is busy with other tests is slow
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield started
    for t in started:
        if hasattr(t, "process"):
            t.process.kill()


def a_run(folder, rows) -> Path:
    """A run's folder with these rows, as train.py leaves it."""
    folder.mkdir(parents=True)
    config = {"wandb_project": "p", "wandb_group": "", "wandb_run_name": ""}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps({"arm": "a", "seed": 1, "wandb_id": "abcd1234"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


ROWS = [{"iter": i, "tokens": 10 * i, "train/loss": 3.0 if i else None} for i in range(5)]


def broken_package(folder, code) -> str:
    folder.mkdir()
    for name in ("wandb", "trackio"):
        (folder / f"{name}.py").write_text(code)
    return str(folder)


@pytest.fixture
def server(tracked, monkeypatch):
    """wandb online, with a key, against a server on this machine."""
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    yield server
    server.close()


def test_online_a_resume_sends_what_the_server_lacks_and_nothing_twice(server, train_tiny, tmp_path, capsys):
    out_dir = tmp_path / "cmp" / "run"
    keys = {"arm": "bpe_tied", "tracker": "wandb", "init_from": "auto", "ckpt_interval": 5}
    first = train_tiny(out_dir, **keys)
    (run_id,) = server.runs
    run = server.runs[run_id]
    assert (run["displayName"], run["groupName"], run["jobType"]) == ("bpe_tied-s1337", "cmp", "train")
    assert server.rows(run_id) == by_iter(first)
    assert f"note: wandb shows this run at {server.url}/someone/" in capsys.readouterr().out
    for lost in (
        range(0),
        range(4, 13),
    ):  # the server has the rows that are made again; or a kill kept them from it
        for step in (10, 12):
            shutil.rmtree(out_dir / f"ckpt/step_{step:06d}", ignore_errors=True)
        for i in lost:
            del server.history[run_id][i]
        again = train_tiny(out_dir, **keys)
        assert list(server.runs) == [run_id]
        assert [r["iter"] for r in server.rows(run_id)] == list(range(13))
        assert without_clock(server.rows(run_id)) == without_clock(by_iter(again))
    assert server.rows(run_id)[4:] == by_iter(again)[4:]


def without_clock(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in ("tok_per_sec", "mem_gb")} for r in rows]


def test_uploading_the_files_of_a_killed_and_resumed_run_gives_its_rows_once(comparison, server):
    """`wandb sync` of all that two starts wrote offline, in one go."""
    out_dir = comparison / "bpe_untied_s2"
    folders = [str(f) for f in wandb_folders(out_dir)]
    sync = [sys.executable, "-m", "wandb", "sync", "--include-synced", "--yes"]
    done = subprocess.run([*sync, *folders], cwd=out_dir, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    (run_id,) = server.runs
    assert server.rows(run_id) == by_iter(read_metrics(out_dir))


@pytest.mark.parametrize("to", ["wandb", "trackio"])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)", "{} is not installed: pip install {}"),
        ("raise RuntimeError('broken\\ninstallation')", "{} failed (broken)"),
        ("import os; os._exit(3)", "the process that sends rows to {} died (3)"),
    ],
)  # fmt: skip
def test_a_package_that_is_missing_or_broken_is_said_once(
    to, code, words, tracked, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PYTHONPATH", broken_package(tmp_path / "packages", code))
    t = tracker.Tracker(a_run(tmp_path / "run", ROWS), to)
    tracked.append(t)
    t.close()
    t.close()
    said = capsys.readouterr().out
    assert words.format(to, to) in said
    assert said.count("note:") == said.count("\n") == 1


def test_a_run_ends_in_time_beside_a_server_that_never_answers(
    tracked, train_tiny, tmp_path, monkeypatch, capsys
):
    """wandb online with a key: the run is not kept waiting, and what could not be sent is written offline."""
    server = socket.create_server(("127.0.0.1", 0))  # takes connections and says nothing
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    monkeypatch.setattr(tracker, "FINISH", 0.5)
    rows = train_tiny(tmp_path / "run", tracker="wandb")
    assert rows[-1]["iter"] == TINY["max_iters"]
    said = capsys.readouterr().out
    assert "wandb has not taken all rows within 0.5 seconds; they are in metrics.jsonl" in said
    assert tracked[0].process.wait(120) == 0
    server.close()
    assert history(records(wandb_folders(tmp_path / "run")[-1])) == by_iter(rows)


def test_a_process_that_stands_still_is_left_behind(tracked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracker, "FINISH", 0.5)
    t = tracker.Tracker(a_run(tmp_path / "run", ROWS), "wandb")
    tracked.append(t)
    t.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    t.close()
    assert time.monotonic() - began < 5
    assert capsys.readouterr().out.count("note: wandb has not taken all rows within 0.5 seconds") == 1


def test_wandb_dying_in_the_middle_is_said_once(tracked, tmp_path, monkeypatch, capsys):
    """wandb-core, the package's own process, is killed under a run that is being followed."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = a_run(tmp_path / "run", ROWS)
    t = tracker.Tracker(run, "wandb")
    tracked.append(t)
    wait_for(lambda: wandb_folders(run))

    def core() -> int | None:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, _, rest = stat.read_text().rpartition(")")
            except OSError:
                continue
            if int(rest.split()[1]) == t.process.pid and "wandb-core" in name:
                return int(stat.parent.name)

    if not Path("/proc").is_dir():
        pytest.skip("processes are looked up in /proc")
    os.kill(wait_for(core), signal.SIGKILL)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"iter": 5, "train/loss": 2.0}) + "\n")
    t.close()
    said = capsys.readouterr().out
    assert said.count("\n") == said.count("note: wandb failed (") == 1


def test_without_a_key_the_run_is_written_offline_and_nobody_is_asked(tracked, tmp_path, capsys):
    run = a_run(tmp_path / "run", ROWS)
    t = tracker.Tracker(run, "wandb")
    tracked.append(t)
    t.close()
    said = capsys.readouterr().out
    assert said.startswith(
        "note: wandb cannot be reached (nobody is logged in: wandb login); the run is written"
    )
    assert said.count("\n") == 1
    found = history(records(wandb_folders(run)[-1]))
    assert [h["iter"] for h in found] == [0, 1, 2, 3, 4]
    assert found[0]["train/loss"] == "NaN"  # null in the record


def test_a_folder_that_cannot_be_written_is_said(tmp_path, capsys):
    t = tracker.Tracker(tmp_path / "nowhere", "wandb")
    t.close()
    assert "note: wandb did not start" in capsys.readouterr().out


def test_sending_a_folder_that_is_no_run_is_one_sentence(tmp_path):
    send = [sys.executable, "-m", "engine.tracker", "--to=wandb", str(tmp_path)]
    done = subprocess.run(send, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "config.json" in done.stderr and done.stderr.count("\n") == 1


def test_follow_waits_for_whole_lines_and_for_the_end(tmp_path):
    class Over:
        """An event that comes after three looks, each of which finds more in the file."""

        looks = 0

        def is_set(self):
            return self.looks == 3

        def wait(self, seconds):
            with open(path, "a", encoding="utf-8") as file:
                file.write(['{"iter": 1, "x"', ': null}\n{"iter": 2}\n', '{"iter": 3}\n{"it'][self.looks])
            self.looks += 1

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iter": 0}\n')
    rows = list(tracker.follow(path, Over()))
    assert [r["iter"] for r in rows] == [0, 1, 2, 3]
    assert math.isnan(rows[1]["x"])


def test_neither_torch_nor_a_tracker_is_imported_with_it():
    code = "import sys, engine.tracker; print([m for m in ('torch', 'wandb', 'trackio') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# ---- trackio


def trackio_rows(folder, project="kronecker-nanogpt") -> dict:
    """{(name, group): rows in the order in which they were written}."""
    with sqlite3.connect(folder / f"{project}.db") as db:
        runs = {
            i: (n, json.loads(c)) for i, n, c in db.execute("SELECT run_id, run_name, config FROM configs")
        }
        found: dict = {}
        for run_id, text, step in db.execute("SELECT run_id, metrics, step FROM metrics ORDER BY id"):
            name, config = runs[run_id]
            row = json.loads(text)
            assert row["iter"] == step
            found.setdefault((name, config["_Group"]), []).append(row)
    return found


def test_trackio_lays_two_arms_over_each_other(comparison, tmp_path, train_tiny, tracked, monkeypatch):
    """Runs trained without it are sent afterwards, one of them twice; one more while it trains, and is resumed."""
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9/?write_token=x")  # is not asked
    send = [sys.executable, "-m", "engine.tracker", "--to=trackio"]
    for name in ("bpe_tied_s1", "bpe_untied_s2", "bpe_tied_s1"):
        done = subprocess.run([*send, comparison / name], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "trackio show --project kronecker-nanogpt" in done.stdout
    again = tmp_path / "again" / "run"  # another comparison's run of the same arm and seed
    keys = {"arm": "bpe_tied", "seed": 1, "tracker": "trackio", "init_from": "auto", "ckpt_interval": 5}
    train_tiny(again, **keys)
    for step in (10, 12):
        shutil.rmtree(again / f"ckpt/step_{step:06d}", ignore_errors=True)
    train_tiny(again, **keys)
    found = trackio_rows(tmp_path / "trackio")
    folders = {
        ("bpe_tied-s1", "cmp"): comparison / "bpe_tied_s1",
        ("bpe_untied-s2", "cmp"): comparison / "bpe_untied_s2",
        ("bpe_tied-s1", "again"): again,
    }
    assert found.keys() == folders.keys()
    for key, out_dir in folders.items():
        assert found[key] == read_metrics(out_dir)
