"""The pool's jobs on a Ray cluster: each run is a task that asks for its GPUs, on whatever node has them.

Every node must see the project, its Python and the runs' folders under the same paths (a shared file system). A
run whose node is lost is started again elsewhere and goes on from its last checkpoint. Needs `pip install ray`.
"""

import math
import os
import signal
import socket
import time
from contextlib import suppress

from data import DataError
from data.console import explain
from data.files import Lock
from engine.errors import RunError
from scripts import pool
from scripts.provenance import ROOT


class OnRay:
    """A Ray cluster as an engine of pool.run.

    address: of a cluster that runs ("auto": the one of this machine), or "" to start one on this machine alone.
    ranks: processes of a run. gpus: whether each of them needs a GPU; None: whether the cluster has any.
    at_a_time: runs that Ray may have at a time (0: all, and it keeps the queue).
    """

    def __init__(self, address="", ranks=1, gpus: bool | None = None, at_a_time: int = 0, nice: int = 0):
        self.ray = connect(address)
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        most = max(int(node.get("GPU", 0)) for node in nodes)
        gpus = most > 0 if gpus is None else gpus
        if 0 < most < ranks and gpus:
            there = f"the {most} of the cluster's largest node: lower --gpus_per_run"
            raise RunError(f"a run on {ranks} GPUs needs more than {there}")
        self.summary = f"{len(nodes)} Ray node{'s' * (len(nodes) > 1)}"
        self.summary += f", {int(self.ray.cluster_resources().get('GPU', 0))} GPUs" if gpus else ""
        # no retries of Ray's own: pool.run counts and names them
        wants = {"num_cpus": ranks, "num_gpus": ranks if gpus else 0, "max_retries": 0}
        self.task = self.ray.remote(train_here).options(**wants)
        self.room, self.nice = at_a_time or math.inf, nice

    def __str__(self) -> str:
        return self.summary

    def has_room(self) -> bool:
        return self.room > 0

    def start(self, job: pool.Job):
        self.room -= 1
        return self.task.remote(job, os.getcwd(), self.nice)

    def poll(self, ref) -> int | str | None:
        """The exit status of a run that has ended, what it was lost with, or None while it runs or waits."""
        if not self.ray.wait([ref], timeout=0)[0]:
            return None
        self.room += 1
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.TaskCancelledError:  # before it began
            return -signal.SIGTERM
        except self.ray.exceptions.RayTaskError as e:
            return explain(e.cause) or str(e).strip().splitlines()[-1]
        except self.ray.exceptions.RayError as e:
            return f"lost with its node: {str(e).splitlines()[0]}"

    def stop(self, ref, number: int = signal.SIGTERM) -> None:
        self.ray.cancel(ref, force=number == signal.SIGKILL)


def connect(address: str):
    """The ray module, connected; one sentence where that cannot be."""
    try:
        import ray
    except ImportError:
        raise RunError("--engine=ray needs Ray: pip install ray") from None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would try for a minute
            socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as e:
        why = f"no Ray cluster answers at {address} ({e.strerror or e})"
        raise RunError(f"{why}: check --ray_address") from None
    # tasks unpickle what they run from this project's modules
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address or None, runtime_env={"env_vars": {"PYTHONPATH": paths}}, **quiet)
    except (OSError, ValueError, RuntimeError) as e:
        sentence = " ".join(str(e).split())[:200]
        raise RunError(f"no Ray cluster at --ray_address={address or 'local'}: {sentence}") from None
    return ray


def train_here(job: pool.Job, folder: str, nice: int) -> int | str:
    """Run one job on this node, to its end; Ray cancels it by KeyboardInterrupt, and then it saves first."""
    import ray

    try:
        os.chdir(folder)
    except OSError as e:
        return f"{socket.gethostname()} does not see {folder} ({e.strerror}): all nodes need the same paths"
    with suppress(DataError):  # a trainer that lives on after its node was given up may save and leave
        Lock(job.out_dir / ".lock", "", patience=pool.GRACE).close()
    node = ray.get_runtime_context().get_node_id()[:8]
    child = pool.start_child(job, nice=nice, place=f"{socket.gethostname()}, Ray node {node}")
    asked = math.inf  # when Ray asked it to stop
    while True:
        try:
            if time.monotonic() - asked > pool.GRACE:
                pool.stop_child(child, signal.SIGKILL)
            if child.poll() is not None:
                return child.returncode
            time.sleep(0.1)
        except KeyboardInterrupt:
            asked = min(asked, time.monotonic())
            pool.stop_child(child, signal.SIGTERM)
