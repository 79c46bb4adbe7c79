"""scripts/ray_pool.py on a real cluster: two Ray nodes on loopback whose GPUs are made up."""

import re
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from conftest import TINY, losses

from engine.errors import RunError
from engine.metrics import read_metrics
from scripts import matched, pool, ray_pool

ray = pytest.importorskip("ray")
SMALL = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": 80 << 20}


@contextmanager
def time_limit(seconds: int):
    """Ray on a busy machine may wait for ever: a test fails instead."""

    def give_up(number, frame):
        raise TimeoutError(f"the cluster did not do its part within {seconds} s")

    old = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@pytest.fixture(autouse=True)
def no_hanging(cluster):
    with time_limit(420):
        yield


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    with time_limit(180):
        cluster = Cluster(initialize_head=True, head_node_args=SMALL | {"include_dashboard": False})
        cluster.doomed = cluster.add_node(**SMALL)
    yield cluster
    with time_limit(60):
        ray.shutdown()
        cluster.shutdown()


def kill_in_the_middle(cluster, out_dir) -> str:
    """Kill the second node once a run on it has made some steps; the run's name, or what went wrong."""
    deadline = time.time() + 300
    while time.time() < deadline:
        for log in out_dir.glob("*/train.log"):
            here = f"Ray node {cluster.doomed.node_id[:8]}" in log.read_text()
            if here and 25 <= len(read_metrics(log.parent)) < 200:
                cluster.remove_node(cluster.doomed, allow_graceful=False)
                return log.parent.name
        time.sleep(0.05)
    return "no run has come to the second node"


def test_eight_runs_lose_a_node_in_the_middle_and_end_as_if_nothing_had_been(
    cluster, tiny_data, train_tiny, tmp_path
):
    keys = {"max_iters": 300, "eval_interval": 150, "ckpt_interval": 20, "keep": 2}
    recipe = tmp_path / "recipe.py"
    everything = TINY | {"data_dir": str(tiny_data)} | keys | {"device": "auto"}
    recipe.write_text("".join(f"{k} = {v!r}\n" for k, v in everything.items()))
    out = tmp_path / "out"
    victim = []
    watcher = threading.Thread(target=lambda: victim.append(kill_in_the_middle(cluster, out)), daemon=True)
    watcher.start()
    args = ["--arms=bpe_tied,kronecker", "--seeds=1,2,3,4", "--retries=3", "--minutes=8"]
    status = matched.main(
        [str(recipe), f"--out={out}", *args, "--engine=ray", f"--ray_address={cluster.address}"]
    )
    watcher.join(5)
    folders = sorted(out.glob("*_s*"))
    assert len(folders) == 8 and status == 0
    log = (out / victim[0] / "train.log").read_text()
    nodes = re.findall(r"Ray node (\w+), GPUs [01]: ", log)
    assert len(nodes) == 2 and nodes[0] != nodes[1], log
    assert "resuming    at step" in log
    for folder in folders:
        arm, seed = folder.name.split("_s")
        codec = {"wte": "kronecker", "tie_weights": False} if arm == "kronecker" else {}
        twin = train_tiny(tmp_path / "twin" / folder.name, seed=seed, **codec, **keys)
        assert losses(read_metrics(folder)) == losses(twin), folder  # bit for bit


def test_a_run_that_is_stopped_on_ray_saves(cluster, tmp_path, monkeypatch):
    """Only what Ray does is tested here, so the child is no training."""
    child = (
        "import pathlib, signal, sys, time\n"
        "def save(*a): pathlib.Path('saved').write_text('x'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('begun').write_text('x')\n"
        "time.sleep(100)"
    )
    monkeypatch.chdir(tmp_path)
    ray.shutdown()
    engine = ray_pool.OnRay(cluster.address)
    ref = engine.start(pool.Job("a", [sys.executable, "-c", child], tmp_path / "a", 5))
    deadline = time.time() + 180
    while not (tmp_path / "begun").exists():
        assert time.time() < deadline
        time.sleep(0.05)
    assert engine.poll(ref) is None
    engine.stop(ref)
    while (code := engine.poll(ref)) is None:
        assert time.time() < deadline
        time.sleep(0.05)
    assert code == 143 and (tmp_path / "saved").exists()
    # a node that cannot write the run's folder says so, and its neighbours go on
    (tmp_path / "file").write_text("")
    ref = engine.start(pool.Job("b", ["true"], tmp_path / "file" / "b", 5))
    while (code := engine.poll(ref)) is None:
        assert time.time() < deadline
        time.sleep(0.05)
    assert "a part of this path is a file" in code


def test_what_ray_cannot_do_is_one_sentence(cluster):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # nobody listens there
        with pytest.raises(RunError, match=r"no Ray cluster answers at 127.0.0.1:\d+ .*check --ray_address"):
            ray_pool.OnRay(f"127.0.0.1:{s.getsockname()[1]}")
    ray.shutdown()
    with pytest.raises(
        RunError, match="a run on 16 GPUs needs more than the 2 of the cluster's largest node"
    ):
        ray_pool.OnRay(cluster.address, ranks=16)
