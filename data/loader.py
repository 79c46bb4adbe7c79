"""Batches as a pure function of (seed, step), straight from shards on the disk.

The training tokens are cut into windows of block_size + 1 tokens that start block_size apart, each inside one shard.
Global batches take the next `global_batch` windows of an endless stream in which every epoch is a fresh permutation of
all windows. It is computed, not stored (a keyed Feistel network): a resume needs no replay, any rank can ask for any
rows, and 100B tokens cost no memory.
"""

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from data import DataError
from data.identity import check_ids, fingerprint  # noqa: F401 - a loader's user finds them here
from data.meta import read_meta
from data.shards import Shard, find_shards, open_shard

ROUNDS = 6  # of the Feistel network; four already make it look random, see tests
MAX_OPEN = 100  # files kept open at most, or half of what the system allows a process (`ulimit -n`)


class TrainBatches:
    """All training windows of a folder in a shuffled, endless, reproducible order.

    data_dir: folder of shards; block_size: tokens a row; global_batch: rows a step, over all ranks and
    micro-steps; seed: of the order. Raises DataError where the folder has not one whole window.
    `.n_windows` windows in an epoch, `.n_tokens` tokens in the shards.
    """

    def __init__(self, data_dir, block_size: int, global_batch: int, seed: int):
        if min(block_size, global_batch) < 1:
            raise DataError(f"block_size {block_size} and global_batch {global_batch} must be at least 1")
        self.block_size, self.global_batch, self.seed = block_size, global_batch, seed
        self._shards = _open_split(data_dir, "train")
        windows = [max(0, (shard.n_tokens - 1) // block_size) for shard in self._shards]
        self._first_window = np.concatenate([[0], np.cumsum(windows, dtype=np.int64)])
        self.n_windows = int(self._first_window[-1])
        self.n_tokens = sum(shard.n_tokens for shard in self._shards)
        if self.n_windows == 0:
            longest = max(shard.n_tokens for shard in self._shards)
            window = f"one window of block_size + 1 = {block_size + 1:,}: prepare more data or lower it"
            raise DataError(
                f"the longest training shard in {data_dir} has {longest:,} tokens, less than {window}"
            )
        self._files = _Files(self._shards)

    def rows(self, step: int, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows lo..hi-1 of global batch `step`: inputs and targets, int64 (hi - lo, block_size) each."""
        if not 0 <= lo <= hi <= self.global_batch:
            raise DataError(f"rows {lo} to {hi} are outside a global batch of {self.global_batch}")
        windows = self.window_ids(step, lo, hi)
        shards = np.searchsorted(self._first_window, windows, side="right") - 1
        starts = (windows - self._first_window[shards]) * self.block_size
        return self._files.read(shards, starts, self.block_size)

    def window_ids(self, step: int, lo: int = 0, hi: int | None = None) -> np.ndarray:
        """Window numbers of rows lo..hi-1, or all, of global batch `step`: int64, each in [0, n_windows)."""
        position = step * self.global_batch + lo  # Python integers: no limit here
        ids = np.empty((self.global_batch if hi is None else hi) - lo, np.int64)
        done = 0
        while done < len(ids):  # a batch may straddle the end of an epoch, or several
            epoch, index = divmod(position + done, self.n_windows)
            take = min(len(ids) - done, self.n_windows - index)
            ahead = np.arange(index, index + take)
            ids[done : done + take] = permute(ahead, self.n_windows, self.seed, epoch)
            done += take
        return ids


class ValWindows:
    """A fixed list of validation windows: eval_tokens // block_size of validation shard 0, after skip_tokens.

    Only shard 0, so that a loss does not depend on how many shards somebody has downloaded. Windows after a skip
    share no token with those before it, as inputs or as targets.
    Raises DataError where it holds less than one window. `.n_windows` of them.
    """

    def __init__(self, data_dir, block_size: int, eval_tokens: int, skip_tokens: int = 0):
        self.block_size = block_size
        self._shard = _open_split(data_dir, "val")[0]
        # the last window before the skip has a target behind it
        self._start = skip_tokens + (skip_tokens > 0)
        available = (self._shard.n_tokens - 1 - self._start) // block_size
        self.n_windows = min(eval_tokens // block_size, available)
        if self.n_windows < 1:
            skipped = f", of which {skip_tokens:,} are skipped" if skip_tokens else ""
            raise DataError(
                f"{self._shard.path} gives no validation window: it has {self._shard.n_tokens:,} tokens{skipped}, "
                f"eval_tokens is {eval_tokens:,}, and one window takes block_size + 1 = {block_size + 1:,}; "
                "lower block_size or give more"
            )
        self._files = _Files([self._shard])

    def rows(self, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows lo..hi-1: inputs and targets, int64 (hi - lo, block_size) each."""
        if not 0 <= lo <= hi <= self.n_windows:
            raise DataError(f"windows {lo} to {hi} are outside the {self.n_windows} validation windows")
        starts = self._start + np.arange(lo, hi, dtype=np.int64) * self.block_size
        return self._files.read(np.zeros(hi - lo, np.int64), starts, self.block_size)

    def sha256(self) -> str:
        """Identity of what is evaluated: the tokens of all windows and where they are cut."""
        digest = hashlib.sha256(f"{self.block_size} {self.n_windows} ".encode())
        tokens = self._shard.tokens[self._start :][: self.n_windows * self.block_size + 1]
        for start in range(0, len(tokens), 1 << 20):
            digest.update(tokens[start : start + (1 << 20)].astype("<u4").tobytes())
        return digest.hexdigest()


class _Files:
    """Reads windows out of shards by position, one pread a row, so that threads and forks may share the file.

    Not through a memory map: its pages count as the process's memory and stay (nanoGPT #287).
    """

    def __init__(self, shards: list[Shard]):
        self._shards, self._lock = shards, threading.Lock()
        # what falls out of the cache closes when nobody reads it any more
        self._file = lru_cache(may_open())(lambda shard: open(shards[shard].path, "rb", buffering=0))  # noqa: SIM115

    def read(self, shards: np.ndarray, starts: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows_BxT = np.empty((len(starts), length + 1), self._shards[0].dtype)
        for row, shard, start in zip(rows_BxT, shards.tolist(), starts.tolist(), strict=True):
            self._read_into(shard, row, self._shards[shard].offset + start * row.itemsize)
        # astype makes both halves contiguous and their own
        x, y = (torch.from_numpy(half.astype(np.int64)) for half in (rows_BxT[:, :-1], rows_BxT[:, 1:]))
        return x, y

    def _read_into(self, shard: int, row: np.ndarray, offset: int) -> None:
        file = self._file(shard)
        if hasattr(os, "preadv"):
            n = os.preadv(file.fileno(), [row], offset)
        else:  # Windows: no positional read, so seek and read belong together
            with self._lock:
                file.seek(offset)
                n = file.readinto(row)
        if n != row.nbytes:
            raise DataError(f"{self._shards[shard].path} became shorter while it was read; prepare it again")


def may_open() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return MAX_OPEN
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_OPEN if soft == resource.RLIM_INFINITY else max(1, min(MAX_OPEN, soft // 2))


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a permutation of range(n), drawn by (seed, epoch), sends each index: int64, any shape.

    A Feistel network on an a x b grid just larger than n; results outside range(n) are sent through again until they
    fall inside ("cycle walking": Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    a = max(1, int(np.ceil(np.sqrt(n))))
    b = -(-n // a)
    name = f"{seed}/{epoch}".encode()
    keys = np.frombuffer(hashlib.blake2b(name, digest_size=8 * ROUNDS).digest(), "<u8")
    out = np.array(index, dtype=np.uint64)
    todo = np.ones(out.shape, bool)
    while todo.any():
        left, right = np.divmod(out[todo], np.uint64(b))
        for i in range(0, ROUNDS, 2):
            left = (left + _mix(right ^ keys[i])) % np.uint64(a)
            right = (right + _mix(left ^ keys[i + 1])) % np.uint64(b)
        out[todo] = left * np.uint64(b) + right
        todo[todo] = out[todo] >= n
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finishing steps of splitmix64, less the top bit so that adding a small number never wraps."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


def _open_split(data_dir, split: str) -> list[Shard]:
    if not (read_meta(data_dir) or {}).get("complete", True):  # its shards may be of two makings
        raise DataError(f"{data_dir} is not finished: run its prepare.py again with the same options")
    paths = find_shards(data_dir, split)
    if not paths:
        raise DataError(
            f"{data_dir} has no {split} shards (looked for *_{split}_*.bin, {split}.bin, "
            f"*_{split}_*.npy): run that data set's prepare.py, or point dataset/data_dir at prepared data"
        )
    shards = [open_shard(path) for path in paths]
    if len({shard.dtype for shard in shards}) > 1:
        raise DataError(f"{data_dir} mixes shards of uint16 and uint32 tokens: they come from two tokenizers")
    return shards


def token_counts(data_dir, vocab_size: int, limit: int = 100_000_000) -> np.ndarray:
    """How often each id stands in the first `limit` training tokens: int64 (vocab_size,)."""
    counts = np.zeros(vocab_size, np.int64)
    for shard in _open_split(data_dir, "train"):
        tokens = shard.tokens[: max(0, limit)]
        limit -= len(tokens)
        for lo in range(0, len(tokens), 1 << 22):
            counts += np.bincount(tokens[lo : lo + (1 << 22)], minlength=vocab_size)[:vocab_size]
    return counts


def prefetch(iterator, device):
    """Yield the tuples of tensors of an iterator on a device, prepared one ahead by a thread.

    On CUDA they go through pinned memory without waiting for the copy. An exception of the iterator is raised
    here; leaving the loop early stops the thread.
    """
    device, iterator = torch.device(device), iter(iterator)
    on_cuda = device.type == "cuda"

    def fetch() -> tuple | None:
        item = next(iterator, None)
        return tuple(t.pin_memory() for t in item) if item and on_cuda else item

    with ThreadPoolExecutor(1, "prefetch") as thread:
        ready = thread.submit(fetch)
        while (item := ready.result()) is not None:
            ready = thread.submit(fetch)
            # from this thread, so that the copy queues on the stream that will use it
            yield tuple(t.to(device, non_blocking=on_cuda) for t in item)
