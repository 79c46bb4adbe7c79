"""Fixtures that several test modules share."""

import os
import socket
import subprocess
import sys
from pathlib import Path

# Tiny models gain nothing from threads, and two of them on a busy machine can run ten times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if wanted:
        import torch

        if not torch.cuda.is_available():
            for item in wanted:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU here"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real text and tokenizer files; tests that want it skip where it is absent."""
    path = Path(os.environ.get("KNG_SHARED", ROOT.parent / "shared"))
    if not (path / "tokenizers").is_dir():
        pytest.skip("real text and tokenizers are not here (point KNG_SHARED at them)")
    return path


@pytest.fixture(scope="session")
def gpt2_encoding(shared_dir):
    """tiktoken's GPT-2 encoding, read from the local cache instead of the network."""
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(shared_dir / "tokenizers" / "tiktoken_cache"))
    import tiktoken

    return tiktoken.get_encoding("gpt2")


def make_tiny_data(folder: Path, letters: str = "abcdefghijklmnopqrstuvwxyz") -> Path:
    """Write a character-level set of 30,000 training and 3,000 validation tokens, the same wherever it is made."""
    from data.meta import characters_meta, write_meta
    from data.shards import write_shard

    folder.mkdir(parents=True, exist_ok=True)
    characters = list("\n " + letters)
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(characters[2:], rng.integers(1, 7))) for _ in range(60)]
    text = " ".join(rng.choice(words, 12_000))
    tokens = np.array([characters.index(c) for c in text], np.uint16)
    write_shard(folder / "tiny_val_000000.bin", tokens[:3_000])
    write_shard(folder / "tiny_train_000001.bin", tokens[3_000:18_000])
    write_shard(folder / "tiny_train_000002.bin", tokens[18_000:33_000])
    write_meta(folder, characters_meta("tiny", characters))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A prepared set of characters, without any download."""
    return make_tiny_data(tmp_path_factory.mktemp("tiny"))


TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 4, "global_batch_size": 8,
    "max_iters": 12, "eval_interval": 5, "eval_tokens": 512, "log_interval": 1, "warmup_iters": 2,
    "learning_rate": 3e-3, "device": "cpu", "dtype": "float32", "pos_dim": 4, "keep": 5,
}  # fmt: skip


@pytest.fixture
def tiny_flags(tiny_data):
    """Function that makes train.py's arguments for a run of a few steps: tiny_flags(out_dir, key=value, ...)."""

    def flags(out_dir, **changes) -> list[str]:
        keys = TINY | {"data_dir": tiny_data, "out_dir": out_dir} | changes
        return [f"--{k}={v}" for k, v in keys.items()]

    return flags


@pytest.fixture
def train_tiny(tiny_flags):
    """Function that trains a run of a few steps in this process and returns its metrics' rows."""

    def run(out_dir, **changes) -> list[dict]:
        import configurator
        import train
        from engine.metrics import read_metrics

        train.main(configurator.load(tiny_flags(out_dir, **changes)))
        return read_metrics(out_dir)

    return run


def arm_keys(name: str) -> dict:
    """What the file of an arm lays over a recipe."""
    import configurator

    return configurator.load([str(ROOT / "config" / "arms" / f"{name}.py")], quiet=True).given


def model_keys(arm: str) -> dict:
    """Those of an arm's keys that the model takes."""
    from model import GPTConfig

    return {k: v for k, v in arm_keys(arm).items() if k in GPTConfig.__dataclass_fields__}


def all_logits(model, idx):
    """Logits (B, T, V) of every position, by one hook on ln_f and a plain product with the head."""
    seen = []
    hook = model.transformer.ln_f.register_forward_hook(lambda m, i, o: seen.append(o))
    model(idx)
    hook.remove()
    table = model.wte_table() if model.lm_head is None else model.lm_head.weight
    scale = 1.0 if model.head_scale is None else model.head_scale
    return seen[0] * scale @ table.T


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(*words) -> list[str]:
    """The command of torchrun's agent; words: its options, then the script with its own."""
    return [sys.executable, "-m", "torch.distributed.run", *map(str, words)]


def two_ranks(first: list[str], second: list[str]) -> list[subprocess.Popen]:
    """train.py as ranks 0 and 1 without torchrun, each with arguments of its own; their errors can be read."""
    meet = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "train.py", *flags], cwd=ROOT, env=os.environ | meet | {"RANK": str(rank)}, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank, flags in enumerate((first, second))
    ]  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """Function that mounts a disk of a size ("450k", "3m") and gives its folder; skips where that is not allowed."""
    disk = tmp_path / "disk"

    def mounted(size: str) -> Path:
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("only root may mount the small file system that is to be full")
        return disk

    yield mounted
    if disk.is_mount():
        subprocess.run(["umount", "-l", disk], check=True)


def losses(rows: list[dict]) -> dict:
    """{(iter, key): loss} of train and validation rows: what two equal runs share."""
    return {(r["iter"], k): r[k] for r in rows for k in ("train/loss", "val/loss", "val/bpb") if k in r}


@pytest.fixture(scope="session")
def gpt2_runs(tmp_path_factory, gpt2_encoding) -> Path:
    """Runs of three steps, two arms with two seeds, over GPT-2's vocabulary; the text is of Python's own help."""
    from pydoc_data.topics import topics

    import configurator
    import train
    from data.meta import write_meta
    from data.shards import write_shard
    from data.tokenizers import load_tokenizer

    root = tmp_path_factory.mktemp("gpt2")
    folder = root / "help"
    folder.mkdir()
    tokenizer = load_tokenizer("gpt2")
    tokens = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics))[:25_000])
    write_shard(folder / "help_val_000000.bin", np.array(tokens[:1500], np.uint16))
    write_shard(folder / "help_train_000001.bin", np.array(tokens[1500:] * 4, np.uint16))
    meta = {
        "format": 1,
        "dataset": "help",
        "complete": True,
        "tokenizer": tokenizer.spec,
        "vocab_size": 50257,
    }
    lengths = tokenizer.byte_lengths().tolist()
    write_meta(folder, meta | {"eot": tokenizer.eot, "dtype": "uint16", "byte_lengths": lengths})
    small = {"n_embd": 16, "block_size": 128, "eval_tokens": 512, "batch_size": 2, "global_batch_size": 2}
    for arm in ("bpe_tied", "kronecker"):
        for seed in (1, 2):
            keys = {"data_dir": folder, "out_dir": root / "runs" / f"{arm}_s{seed}", "seed": seed}
            keys = TINY | small | keys | arm_keys(arm) | {"max_iters": 3, "eval_interval": 3, "pos_dim": 16}
            train.main(configurator.load([f"--{k}={v}" for k, v in keys.items()]))
    return root / "runs"


@pytest.fixture(scope="session")
def probed_runs(tmp_path_factory) -> Path:
    """A folder of untrained runs of three arms and two seeds, which the probes' tests share."""
    from probe_runs import make_runs

    return make_runs(tmp_path_factory.mktemp("probes") / "tiny")
