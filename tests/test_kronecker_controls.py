"""The controls against their written-out definitions, and the promises of nn.Embedding."""

from collections import Counter

import numpy as np
import pytest
import torch

from kronecker import build_byte_buffer
from kronecker.controls import (
    HashEmbedding,
    LowRankEmbedding,
    hash_buckets,
    hash_rows,
    lowrank_rank,
    permute_bytes,
    splitmix64,
)

V, D_MODEL = 50_304, 768
BUDGET = 4096 * D_MODEL  # the codec's projection of the 124M setting


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def make(kind, vocab_size=40, d_model=6, **options):
    torch.manual_seed(0)
    if kind == "lowrank":
        return LowRankEmbedding(vocab_size, d_model, rank=3, **options)
    return HashEmbedding(vocab_size, d_model, buckets=7, **options)


def randomised(kind):
    """With all parameters drawn, so that nothing rests on the start (a hash embedding's weights are 1 there)."""
    emb = make(kind)
    with torch.no_grad():
        for p in emb.parameters():
            p.normal_()
    return emb


def by_hand(emb, token: int) -> torch.Tensor:
    """One token's embedding as the papers write it, with plain sums in float64."""
    if isinstance(emb, LowRankEmbedding):
        return sum(emb.u[token, r].double() * emb.v[r].double() for r in range(emb.rank))
    chosen = hash_rows(emb.num_embeddings, emb.buckets, emb.n_hashes, emb.seed)[token]
    return sum(emb.weights[token, i].double() * emb.rows[row].double() for i, row in enumerate(chosen))


# ---- sizes ----


def test_sizes_within_the_codec_s_budget():
    with torch.device("meta"):
        lowrank = LowRankEmbedding(V, D_MODEL, lowrank_rank(V, D_MODEL, BUDGET))
        hashed = HashEmbedding(V, D_MODEL, hash_buckets(V, D_MODEL, BUDGET))
    assert (lowrank.rank, parameters(lowrank)) == (61, 3_115_392)
    assert (hashed.buckets, parameters(hashed)) == (3_965, 3_145_728)


@pytest.mark.parametrize(("vocab_size", "d_model", "budget"), [(50, 8, 300), (1000, 16, 2100), (7, 3, 53)])
def test_sizes_are_the_largest_within_any_budget(vocab_size, d_model, budget):
    for cls, size in ((LowRankEmbedding, lowrank_rank), (HashEmbedding, hash_buckets)):
        n = size(vocab_size, d_model, budget)
        assert parameters(cls(vocab_size, d_model, n)) <= budget < parameters(cls(vocab_size, d_model, n + 1))


def test_what_cannot_be_had_is_refused():
    with pytest.raises(ValueError, match="table of rank 1: 51,072"):
        lowrank_rank(V, D_MODEL, 51_071)
    with pytest.raises(ValueError, match=r"2 rows"):
        hash_buckets(100, 10, 219)
    with pytest.raises(ValueError, match="rank is 0"):
        LowRankEmbedding(10, 4, 0)
    with pytest.raises(ValueError, match="1 rows, 2 hashes"):
        HashEmbedding(10, 4, 1)


# ---- nn.Embedding's contract ----


@pytest.mark.parametrize("kind", ["lowrank", "hash"])
def test_lookup_and_table_equal_the_written_out_sum(kind):
    emb = randomised(kind)
    expected = torch.stack([by_hand(emb, t) for t in range(40)])
    assert (emb.num_embeddings, emb.embedding_dim) == (40, 6)
    torch.testing.assert_close(emb.table().double(), expected, rtol=1e-5, atol=1e-5)
    for shape in ((), (5,), (2, 3), (2, 0), (2, 1, 4)):
        ids = torch.randint(0, 40, shape)
        for kind_of_int in (torch.int64, torch.int32):
            out = emb(ids.to(kind_of_int))
            assert out.shape == (*shape, 6)
            torch.testing.assert_close(out.double(), expected[ids], rtol=1e-5, atol=1e-5)
    for wrong in (-1, 40):
        with pytest.raises(IndexError):
            emb(torch.tensor([wrong]))


@pytest.mark.parametrize("kind", ["lowrank", "hash"])
def test_gradients_of_lookup_and_table(kind):
    emb = randomised(kind).double()
    ids = torch.tensor([[3, 3, 0], [39, 5, 3]])
    g = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = torch.autograd.grad(
        (torch.stack([by_hand(emb, int(t)) for t in ids.flatten()]) * g.view(6, 6)).sum(), [*emb.parameters()]
    )
    for out in (emb(ids), emb.table()[ids]):
        got = torch.autograd.grad((out * g).sum(), [*emb.parameters()])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["lowrank", "hash"])
def test_saved_moved_and_started_on_meta(kind):
    emb = randomised(kind)
    with torch.device("meta"):
        other = make(kind)
    other = other.to_empty(device="cpu")
    other.load_state_dict(emb.state_dict())
    ids = torch.arange(40)
    assert torch.equal(other(ids), emb(ids))
    assert set(emb.state_dict()) == {name for name, _ in emb.named_parameters()}
    torch.testing.assert_close(emb.double()(ids).float(), other(ids))


# ---- the start ----


@pytest.mark.parametrize("kind", ["lowrank", "hash"])
@pytest.mark.parametrize("init_rms", [0.02, 1.0])
def test_init_rms_is_the_rms_of_the_output(kind, init_rms):
    torch.manual_seed(1)
    if kind == "lowrank":
        emb = LowRankEmbedding(2000, 100, 20, init_rms=init_rms)
    else:
        emb = HashEmbedding(2000, 100, 500, init_rms=init_rms)
        assert (emb.weights == 1).all()
    assert emb.table().square().mean().sqrt().item() == pytest.approx(init_rms, rel=0.05)


@pytest.mark.parametrize("kind", ["lowrank", "hash"])
def test_a_generator_a_name_decides_the_numbers(kind):
    emb, asked = make(kind, init_rms=0.3), []

    def of(name):
        asked.append(name)
        return torch.Generator().manual_seed(len(asked))

    torch.manual_seed(5)
    emb.reset_parameters(of)
    assert asked == list(emb.init_std())
    for n, (name, std) in enumerate(emb.init_std().items(), 1):
        expected = torch.empty(emb.get_parameter(name).shape).normal_(
            0, std, generator=torch.Generator().manual_seed(n)
        )
        assert torch.equal(emb.get_parameter(name), expected)


# ---- what is fixed at random ----


def test_splitmix64_gives_the_published_numbers():
    """The first numbers for seed 1234567, as other implementations publish them; and in Python's own integers."""
    assert splitmix64(1234567, 3).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]

    def in_python(seed, n):
        mask, out = 2**64 - 1, []
        for i in range(1, n + 1):
            z = (seed + i * 0x9E3779B97F4A7C15) & mask
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            out.append(z ^ (z >> 31))
        return out

    for seed in (0, -1, 2**63, 2**64 + 5):
        assert splitmix64(seed, 20).tolist() == in_python(seed, 20)


@pytest.mark.parametrize(("buckets", "n_hashes"), [(2, 2), (3, 3), (50, 1), (50, 2), (50, 4)])
def test_hashes_of_a_token_differ_and_fall_evenly(buckets, n_hashes):
    rows_Vxk = hash_rows(20_000, buckets, n_hashes, seed=3)
    assert rows_Vxk.min() >= 0 and rows_Vxk.max() < buckets
    assert all(len(set(row)) == n_hashes for row in rows_Vxk.tolist())
    for i in range(n_hashes):  # each hash alone: within six standard deviations of even
        counts = np.bincount(rows_Vxk[:, i], minlength=buckets)
        assert abs(counts - 20_000 / buckets).max() < 6 * (20_000 / buckets) ** 0.5
    if buckets == 50 and n_hashes > 1:  # and a pair takes each of the ordered pairs
        pairs = np.bincount(rows_Vxk[:, 0] * 50 + rows_Vxk[:, 1], minlength=2500).reshape(50, 50)
        assert not pairs.diagonal().any() and (pairs > 0).sum() > 0.99 * 50 * 49


def test_hashes_are_the_same_on_every_machine():
    assert hash_rows(4, 3_965, 2, seed=0).tolist() == [[945, 989], [3459, 1436], [1837, 1334], [1323, 292]]
    assert torch.equal(HashEmbedding(9, 2, 5, seed=1)._hashed_Vxk, torch.from_numpy(hash_rows(9, 5, 2, 1)))
    assert (hash_rows(100, 50, 2, 0) != hash_rows(100, 50, 2, 1)).any()


def strings(buffers) -> list[bytes]:
    return [bytes(row[:n]) for row, n in zip(buffers[0].numpy(), buffers[1].tolist(), strict=True)]


def test_permutation_keeps_lengths_and_strings():
    rng = np.random.default_rng(0)
    pieces = [bytes(rng.integers(0, 256, rng.integers(0, 9), dtype=np.uint8)) for _ in range(500)]
    pieces += [b"", b"the only one of 12", b""]
    buffers = build_byte_buffer(pieces, 12)
    permuted = permute_bytes(*buffers, seed=7)
    before, after = strings(buffers), strings(permuted)
    assert [len(s) for s in before] == [len(s) for s in after] == permuted[1].tolist()
    assert Counter(before) == Counter(after)
    assert after[501] == b"the only one"  # cut to 12 bytes, and no other has so many
    assert torch.equal(permuted[0].sum(1), torch.tensor([sum(s) for s in after]))  # nothing past the length
    moved = sum(a != b for a, b in zip(before, after, strict=True))
    assert moved > 400  # about one string of each length finds its old place again
    assert torch.equal(permuted[0], permute_bytes(*buffers, seed=7)[0])
    assert not torch.equal(permuted[0], permute_bytes(*buffers, seed=8)[0])
    assert strings(buffers) == before  # the given buffers are left alone


def test_permutation_is_the_same_on_every_machine():
    buffers = build_byte_buffer([b"a", b"bb", b"c", b"", b"dd", b"e", b"ff", b"g"], 4)
    assert b" ".join(strings(permute_bytes(*buffers, seed=1337))) == b"g dd c  ff e bb a"


def test_every_dealing_is_equally_likely():
    buffers = build_byte_buffer([b"a", b"bb", b"c", b"d"], 2)
    seen = Counter(b"".join(strings(permute_bytes(*buffers, seed=s))) for s in range(600))
    assert len(seen) == 6 and all(60 < n < 145 for n in seen.values())
