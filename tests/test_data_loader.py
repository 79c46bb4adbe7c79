"""The loader: every window once an epoch, the same rows however they are asked for, and no growing memory."""

import hashlib
import threading
import time

import numpy as np
import pytest
import torch

from data import DataError
from data.loader import TrainBatches, ValWindows, check_ids, fingerprint, may_open, permute, prefetch
from data.meta import characters_meta, write_meta
from data.shards import open_shard, write_shard

# windows of the first three steps of the folder below under seed 1337
GOLDEN = [[8, 14, 9, 12, 5], [1, 7, 6, 13, 3], [4, 2, 11, 10, 0]]


@pytest.fixture
def folder(tmp_path):
    """Two training shards whose tokens say where they are: shard * 10000 + position."""
    write_shard(tmp_path / "x_val_000000.bin", np.arange(1000, dtype=np.uint16))
    write_shard(tmp_path / "x_train_000001.bin", np.arange(10_000, 10_101, dtype=np.uint16))
    write_shard(tmp_path / "x_train_000002.bin", np.arange(20_000, 20_055, dtype=np.uint16))
    return tmp_path


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000, 12_345])
@pytest.mark.parametrize("epoch", [0, 5])
def test_permute_is_a_permutation(n, epoch):
    assert sorted(permute(np.arange(n), n, 1337, epoch).tolist()) == list(range(n))


def test_permute_looks_random_and_depends_on_seed_and_epoch():
    n = 10_000
    orders = [permute(np.arange(n), n, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    for order in orders:
        # serial correlation and displacement of a random permutation: about 0 and n/3
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.05
        assert abs(np.abs(order - np.arange(n)).mean() / n - 1 / 3) < 0.02
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (orders[a] == orders[b]).sum() < 15  # 1 expected
    # each of 5 places takes each of 5 values equally often over seeds: chi-square with 16 degrees of freedom
    counts = np.zeros((5, 5))
    for seed in range(2000):
        counts[np.arange(5), permute(np.arange(5), 5, seed, 0)] += 1
    assert ((counts - 400) ** 2 / 400).sum() < 45  # p about 1e-4


def test_the_order_is_lazy_enough_for_100_billion_tokens():
    n = 100_000_000_000 // 1024
    ids = permute(np.array([0, 1, n - 1]), n, 1, 0)
    assert ids.dtype == np.int64 and len(set(ids.tolist())) == 3 and ids.min() >= 0 and ids.max() < n


def test_an_epoch_has_every_window_once_and_no_window_crosses_shards(folder):
    batches = TrainBatches(folder, block_size=10, global_batch=5, seed=3)
    assert batches.n_windows == 10 + 5 and batches.n_tokens == 101 + 55
    expected = [10_000 + 10 * k for k in range(10)] + [20_000 + 10 * k for k in range(5)]
    for epoch in range(2):
        starts = []
        for step in range(3 * epoch, 3 * epoch + 3):
            x, y = batches.rows(step, 0, 5)
            assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (5, 10)
            assert x.is_contiguous() and y.is_contiguous()
            assert torch.equal(x, x[:, :1] + torch.arange(10)) and torch.equal(y, x + 1)
            starts += x[:, 0].tolist()
        assert sorted(starts) == expected and starts != expected


def test_rows_do_not_depend_on_how_they_are_asked_for(folder):
    batches = TrainBatches(folder, 10, 7, seed=3)  # 7 does not divide 15: batches straddle epochs
    again = TrainBatches(folder, 10, 7, seed=3)
    for step in (4, 0, 10**12):
        whole = batches.rows(step, 0, 7)[0]
        parts = [again.rows(step, lo, hi)[0] for lo, hi in ((5, 7), (0, 2), (2, 5))]
        assert torch.equal(whole, torch.cat([parts[1], parts[2], parts[0]]))
        assert len(batches.window_ids(step)) == 7
    assert not np.array_equal(batches.window_ids(0), TrainBatches(folder, 10, 7, seed=4).window_ids(0))
    stream = np.concatenate([batches.window_ids(step) for step in range(15)])
    assert all(sorted(stream[k : k + 15].tolist()) == list(range(15)) for k in range(0, 105, 15))
    # a batch of several epochs
    assert sorted(TrainBatches(folder, 10, 30, seed=0).window_ids(2).tolist()) == sorted([*range(15)] * 2)
    with pytest.raises(DataError, match="outside a global batch"):
        batches.rows(0, 3, 8)
    assert batches.rows(0, 3, 3)[0].shape == (0, 10)


def test_the_order_never_changes_between_versions(folder):
    """A golden order: change it only on purpose, because resumed and compared runs depend on it."""
    batches = TrainBatches(folder, 10, 5, seed=1337)
    assert [batches.window_ids(step).tolist() for step in range(3)] == GOLDEN


def test_validation_windows_are_the_first_of_shard_zero(folder):
    val = ValWindows(folder, 10, 205)
    assert val.n_windows == 20
    x, y = val.rows(3, 5)
    assert x[:, 0].tolist() == [30, 40] and torch.equal(y, x + 1)
    assert ValWindows(folder, 10, 10**9).n_windows == 99
    digest = val.sha256()
    write_shard(folder / "x_val_000003.bin", np.arange(5000, dtype=np.uint16))  # more shards change nothing
    assert ValWindows(folder, 10, 205).sha256() == digest != ValWindows(folder, 10, 215).sha256()
    for block_size, tokens in ((1000, 10**6), (10, 9)):
        with pytest.raises(DataError, match="lower block_size"):
            ValWindows(folder, block_size, tokens)


def test_empty_and_mixed_folders_are_refused(tmp_path, folder):
    with pytest.raises(DataError, match="less than one window"):
        TrainBatches(folder, 200, 1, 0)
    write_shard(folder / "x_train_000003.bin", np.arange(99, dtype=np.uint32))
    with pytest.raises(DataError, match="two tokenizers"):
        TrainBatches(folder, 10, 1, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no train shards"):
        TrainBatches(tmp_path / "empty", 10, 1, 0)


def test_nanogpt_folders_and_uint32(tmp_path):
    np.arange(500, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "val.bin")
    assert TrainBatches(tmp_path, 50, 2, 0).n_windows == 9 and ValWindows(tmp_path, 50, 1000).n_windows == 1
    wide = tmp_path / "wide"
    wide.mkdir()
    write_shard(wide / "w_train_000001.bin", np.arange(100_000, 100_101, dtype=np.uint32))
    x, _ = TrainBatches(wide, 100, 1, 0).rows(0, 0, 1)
    assert x[0].tolist() == list(range(100_000, 100_100))


def test_fingerprint_follows_contents_with_and_without_meta(folder):
    first = fingerprint(folder)
    assert first == fingerprint(folder)
    tokens = np.arange(20_000, 20_055, dtype=np.uint16)
    tokens[30] = 5
    write_shard(folder / "x_train_000002.bin", tokens)
    assert fingerprint(folder) != first
    records = [
        {"file": p.name, "split": "train", "tokens": n, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p, n in ((folder / "x_train_000001.bin", 101), (folder / "x_train_000002.bin", 55))
    ]
    known = fingerprint(folder)
    write_meta(folder, characters_meta("x", ["a"]) | {"shards": records})
    assert fingerprint(folder) == known  # the record changes nothing while it is true
    records[1]["sha256"] = "c" * 64
    write_meta(folder, characters_meta("x", ["a"]) | {"shards": records})
    with pytest.raises(DataError, match=r"x_train_000002\.bin is not what was prepared"):
        fingerprint(folder)


def test_ids_beyond_the_vocabulary_are_reported(folder):
    check_ids(folder, 20_055)
    with pytest.raises(DataError, match="20,054"):
        check_ids(folder, 20_054)
    write_meta(folder, characters_meta("x", ["a"] * 20_055))
    check_ids(folder, 20_055)
    with pytest.raises(DataError, match="vocab_size is 20,054"):
        check_ids(folder, 20_054)
    write_meta(folder, characters_meta("x", ["a"] * 300))  # the model may have more ids than the tokenizer
    with pytest.raises(DataError, match="its vocabulary ends at 299"):
        check_ids(folder, 30_000)


def test_prefetch_keeps_order_hands_on_errors_and_stops():
    before = set(threading.enumerate())  # a training that another test saw fail may still hold its own
    items = [(torch.tensor([k]), torch.tensor([-k])) for k in range(20)]
    assert [(int(a), int(b)) for a, b in prefetch(iter(items), "cpu")] == [(k, -k) for k in range(20)]

    def failing():
        yield items[0]
        raise DataError("disk gone")

    stream = prefetch(failing(), "cpu")
    next(stream)
    with pytest.raises(DataError, match="disk gone"):
        next(stream)
    produced = []
    endless = prefetch(((produced.append(k), items[0])[1] for k in range(10**9)), "cpu")
    next(endless)
    endless.close()
    time.sleep(0.05)
    seen = len(produced)
    assert seen <= 4 and not [t for t in set(threading.enumerate()) - before if t.name.startswith("prefetch")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefetch_moves_batches_to_the_gpu(folder):
    batches = TrainBatches(folder, 10, 5, seed=3)
    for step, (x, y) in enumerate(prefetch((batches.rows(s, 0, 5) for s in range(3)), "cuda")):
        assert x.device.type == y.device.type == "cuda" and torch.equal(x.cpu(), batches.rows(step, 0, 5)[0])


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr("data.loader.MAX_OPEN", 3)
    for k in range(1, 12):
        write_shard(tmp_path / f"x_train_{k:06d}.bin", np.full(101, k, np.uint16))
    batches = TrainBatches(tmp_path, 10, 110, seed=0)
    x, _ = batches.rows(0, 0, 110)
    assert sorted(x[:, 0].tolist()) == sorted(k for k in range(1, 12) for _ in range(10))
    assert batches._files._file.cache_info().currsize == 3


def test_more_shards_than_the_system_lets_a_process_open(tmp_path):
    resource = pytest.importorskip("resource")
    for k in range(1, 302):
        write_shard(tmp_path / f"x_train_{k:06d}.bin", np.full(11, k, np.uint16))
    batches = TrainBatches(tmp_path, 10, 301, seed=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        x, _ = batches.rows(0, 0, 301)
        assert fingerprint(tmp_path)
        assert may_open() == 100
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        assert may_open() == 32
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(x[:, 0].tolist()) == list(range(1, 302))


def test_an_unfinished_set_is_not_read(folder):
    write_meta(folder, characters_meta("x", ["a"]) | {"complete": False})
    for reader in (lambda: TrainBatches(folder, 10, 1, 0), lambda: ValWindows(folder, 10, 100)):
        with pytest.raises(DataError, match=r"is not finished: run its prepare\.py again"):
            reader()


def test_reading_does_not_grow_memory(tmp_path):
    """nanoGPT #287: a memory map's pages pile up in the process. 16 MiB of shard, read over and over."""
    from pathlib import Path

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")

    def rss() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    write_shard(tmp_path / "x_train_000001.bin", np.zeros(8 << 20, np.uint16))
    batches = TrainBatches(tmp_path, 1024, 64, seed=0)
    for step in range(20):
        batches.rows(step, 0, 64)
    before = rss()
    for step in range(20, 300):  # every page more than once
        batches.rows(step, 0, 64)
    assert rss() - before < 4 << 20


def test_nanogpt_sets_whose_tokenizer_nobody_knows_train(tmp_path, tiny_data, train_tiny):
    """meta.pkl with vocab_size alone, which is all that nanoGPT asks for; and --vocab_size without any."""
    import pickle

    data = tmp_path / "data"
    data.mkdir()
    for split, name in (("train", "tiny_train_000001.bin"), ("val", "tiny_val_000000.bin")):
        open_shard(tiny_data / name).tokens.tofile(data / f"{split}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 28}))
    rows = train_tiny(tmp_path / "a", data_dir=data, max_iters=2)
    assert any("val/loss" in row for row in rows) and not any("val/bpb" in row for row in rows)
    (data / "meta.pkl").unlink()
    again = train_tiny(tmp_path / "b", data_dir=data, max_iters=2, vocab_size=64)
    assert [row.get("val/loss") for row in again] == [row.get("val/loss") for row in rows]
    with pytest.raises(DataError, match="does not say which tokenizer"):
        train_tiny(tmp_path / "c", data_dir=data, max_iters=2, wte="kronecker", vocab_size=64)
