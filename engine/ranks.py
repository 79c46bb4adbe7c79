"""Ranks, devices and number formats: one process or torchrun's many."""

import atexit
import ctypes
import os
import secrets
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from data.console import first_line
from engine.errors import RunError


@dataclass
class Ranks:
    rank: int
    world: int
    device: torch.device
    group: object = None  # gloo group for host-side words between ranks: no GPU has to be waited for

    @property
    def master(self) -> bool:
        return self.rank == 0

    def print0(self, *words, **how) -> None:
        """print() of rank 0; the others are silent."""
        if self.master:
            print(*words, **how)

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is on one."""
        if self.world == 1:
            return flag
        word = torch.tensor(int(flag))
        dist.all_reduce(word, dist.ReduceOp.MAX, group=self.group)
        return bool(word)

    def broadcast(self, value):
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def agree(self, ours: dict, advice: str) -> None:
        """Refuse to go on where a rank's values are not rank 0's; every rank hears which one differs in what."""
        if self.world == 1:
            return
        everyone = [None] * self.world
        dist.all_gather_object(everyone, ours, group=self.group)
        for rank, theirs in enumerate(everyone):
            for key in [*everyone[0], *theirs]:
                mine, first = theirs.get(key), everyone[0].get(key)
                if mine != first:
                    raise RunError(f"rank {rank} has {key}={mine!r}, but rank 0 has {first!r}: {advice}")

    def on_master(self, work, *args):
        """work(*args) of rank 0 alone; what goes wrong there is raised on all ranks, so that none waits for ever."""
        outcome = None
        if self.master:
            try:
                outcome = (work(*args), None)
            except Exception as e:
                outcome = (None, e)
        value, error = self.broadcast(outcome)
        if error is not None:
            raise error
        return value


def start(device: str) -> Ranks:
    """Join torchrun's group if there is one, on the device of that name; see `choose_device`."""
    world, rank = world_size(), from_environment("RANK", 0)
    if not 0 <= rank < world:
        raise RunError(f"WORLD_SIZE={world} and RANK={rank} do not fit: start with torchrun, or unset both")
    chosen = take_device(device)
    if world == 1:
        return Ranks(0, 1, chosen)
    patience = timedelta(minutes=30)
    try:
        store, rank, world = next(rendezvous("env://", timeout=patience))
    except ValueError as e:  # MASTER_ADDR or MASTER_PORT is missing, or is none
        raise RunError(f"{first_line(e)}: start with torchrun, or unset WORLD_SIZE and RANK") from None
    store = fresh_store(store, rank, world)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    return Ranks(rank, world, chosen, dist.new_group(backend="gloo"))


def take_device(name: str) -> torch.device:
    """`choose_device`, made ready for this process alone."""
    chosen = choose_device(name)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if chosen.type == "cpu":
        keep_heap()
    return chosen


def choose_device(name: str) -> torch.device:
    """The device of a name: "auto" is cuda, else mps, else cpu; "cuda" is the rank's own. RunError if it is not here."""
    if name == "auto":
        mps = getattr(torch.backends, "mps", None)
        name = "cuda" if torch.cuda.is_available() else "mps" if mps and mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{from_environment('LOCAL_RANK', 0)}"
    chosen = None
    with suppress(RuntimeError):
        chosen = torch.device(name)
    if chosen is None or chosen.type not in ("cpu", "cuda", "mps"):
        raise RunError(f"device {name!r} is unknown: use auto, cpu, cuda, cuda:N or mps")
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and not (torch.cuda.is_available() and chosen.index < count):
        raise RunError(f"device {name} is not here ({count} GPUs are): use fewer ranks or --device=cpu")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise RunError("device mps is not here: use --device=cpu")
    return chosen


def world_size() -> int:
    """How many ranks torchrun has started, 1 without it."""
    return from_environment("WORLD_SIZE", 1)


def from_environment(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.lstrip("-").isdigit()):
        raise RunError(f"{name}={text!r} is no whole number: start with torchrun, or unset it")
    return int(text)


def fresh_store(store, rank: int, world: int):
    """A part of torchrun's store that no earlier attempt has written to.

    torchrun keeps one store over its restarts, so a worker can read the address of one that is dead, and hang.
    Rank 0 draws a name; each rank makes sure that rank 0 has heard its own draw and not its predecessor's, and
    rank 0 that each has heard the name; then all meet under it.
    """
    mine, deadline = secrets.token_hex(8), time.monotonic() + 300
    others = range(1, world)
    if rank > 0:
        store.set(f"hello/{rank}", mine)
    heard = None
    while time.monotonic() < deadline:
        if rank == 0:
            hellos = [store.get(f"hello/{r}").decode() for r in others]
            if hellos != heard:
                store.set("welcome", " ".join([mine, *hellos]))
                heard = hellos
            ready = [f"ready/{r}" for r in others]
            if store.check(ready) and all(store.get(key).decode() == mine for key in ready):
                return dist.PrefixStore(mine, store)
        else:
            name, *echoes = store.get("welcome").decode().split()
            if echoes[rank - 1] == mine:
                store.set(f"ready/{rank}", name)
                return dist.PrefixStore(name, store)
        time.sleep(0.02)
    raise RunError(f"not all of the {world} ranks came within 300 s: look at the others' output")


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(end: SystemExit) -> None:
    """End as `end` says; where a group is still held, without the interpreter's last steps, which its threads may abort."""
    if not dist.is_initialized():
        raise end
    atexit._run_exitfuncs()  # a tracker's last rows, among others
    with suppress(OSError):  # nobody listens any more
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(1 if isinstance(end.code, str) else end.code or 0)


def keep_heap() -> None:
    """Tell glibc to keep up to 2 GiB of freed memory instead of handing it back.

    The page faults of fresh memory cost a small CPU run up to a third of its time. What is larger than 1 GiB still goes
    back: a process that kept all of it could no longer fork.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another libc: slower, nothing else
            mallopt, m_trim_threshold, m_mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
            if not mallopt(m_mmap_threshold, 1 << 30):  # glibc before 2.35 takes no more than 32 MiB
                mallopt(m_mmap_threshold, 32 << 20)
            mallopt(m_trim_threshold, (1 << 31) - 1)


def number_format(dtype: str, device: torch.device) -> tuple[str, object]:
    """(name, autocast context) for the matmuls; 'auto' takes bfloat16 where the hardware multiplies it."""
    kind = device.type
    if dtype == "auto":
        if kind == "cuda":
            dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        else:
            fast = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # private, and so asked for politely
            dtype = "bfloat16" if kind == "cpu" and fast() else "float32"
    if dtype == "float16" and kind != "cuda":
        raise RunError(f"dtype float16 needs a CUDA GPU, not {kind}: use bfloat16 or float32")
    if dtype == "float32":
        return dtype, nullcontext()
    return dtype, torch.autocast(kind, dtype=getattr(torch, dtype))


def choose_attention(name: str, config_dtype: str, deterministic: bool, device: torch.device) -> None:
    """Leave scaled_dot_product_attention one kernel on CUDA, 'flash' or 'cudnn'; 'auto' leaves it torch's choice."""
    if name == "auto" or device.type != "cuda":
        return
    if config_dtype == "float32" or (name == "cudnn" and deterministic):
        what = "deterministic" if deterministic else "float32"
        raise RunError(f"attention={name} has no {what} kernel: use --attention=auto")
    for kernel in ("flash", "cudnn", "mem_efficient", "math"):
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(kernel == name)


def set_arithmetic(config, device: torch.device):
    """Choose kernels and number format as the (resolved) configuration asks; the autocast context of the matmuls."""
    _, autocast = number_format(config.dtype, device)
    choose_attention(config.attention, config.dtype, config.deterministic, device)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")  # float32 matmuls on CUDA may use TF32
    return autocast


def settle(device: torch.device) -> float:
    """Wait until the device has done what it was given; the seconds that took."""
    began = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - began


class StopSignal:
    """SIGTERM, Ctrl-C and the end of the terminal (SIGHUP) are remembered for the loop, which looks between two steps.

    A second Ctrl-C ends at once; a second SIGTERM does not, since torchrun hands on its own beside Slurm's.
    """

    def __init__(self):
        self.number: int | None = None
        names = ("SIGTERM", "SIGINT", "SIGHUP")  # Windows has no SIGHUP
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self.heeded = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]
        for number in self.heeded:
            signal.signal(number, self.note)

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number else "another rank"

    def leave(self) -> None:
        """End the process as the signal asks; another one on the way out must not change the exit status."""
        for number in self.heeded:
            signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + (self.number or signal.SIGTERM))

    def note(self, number: int, frame) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise SystemExit(128 + number)
        self.number = self.number or number
