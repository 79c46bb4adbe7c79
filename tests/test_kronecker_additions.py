"""What the package adds to the paper's method: initial scale, n-grams, residual, regulariser. All off by default."""

import math

import pytest
import torch

from kronecker import KroneckerEmbedding
from kronecker.additions import EMPTY, ngram_buckets, row_entropy_penalty

TOKENS = [b"", b"a", b"ab", b"bab", b"string", b"sing", b"\xff\x00\xff", b"ing"]


def build(seed=0, **kwargs):
    torch.manual_seed(seed)
    return KroneckerEmbedding(len(TOKENS), 6, tokenizer=TOKENS, pos_dim=6, **kwargs)


def test_off_by_default_leaves_the_state_alone():
    assert {name: p.shape for name, p in build().state_dict().items()} == {"projection.weight": (6, 1536)}


@pytest.mark.parametrize("options", [{"ngrams": 32}, {"rank": 3}, {"ngrams": 32, "rank": 3}])
def test_additions_start_at_the_paper_s_embedding(options):
    plain, more = build(), build(**options)
    ids = torch.arange(len(TOKENS))
    assert torch.equal(plain(ids), more(ids))
    n_plain, n_more = (sum(p.numel() for p in emb.parameters()) for emb in (plain, more))
    assert n_more - n_plain == options.get("ngrams", 0) * 6 + options.get("rank", 0) * (len(TOKENS) + 6)


def filled(**options):
    emb = build(**options)
    with torch.no_grad():
        for p in emb.parameters():
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    return emb


def by_hand(emb, token_id):
    """One token, with plain Python sums."""
    raw = TOKENS[token_id][: emb.pos_dim]
    e = torch.zeros(emb.d_model, dtype=torch.float64)
    rows = []
    for n in (2, 3):
        for start in range(len(raw) - n + 1):
            gram = raw[start : start + n]
            padded = torch.tensor([list(gram.ljust(3, b"\0"))], dtype=torch.uint8)
            buckets = ngram_buckets(padded, torch.tensor([n]), emb.ngrams)[0]
            rows.append(int(buckets[0 if n == 2 else 2]))
    for row in rows:
        e += emb.ngram.weight[row].detach().double() / math.sqrt(len(rows))
    return e + emb.residual_u[token_id].detach().double() @ emb.residual_v.detach().double()


def test_values_in_forward_and_table():
    emb, plain = filled(ngrams=32, rank=3), filled()
    plain.load_state_dict({"projection.weight": emb.projection.weight.detach()})
    ids = torch.tensor([[7, 0, 3], [4, 5, 6]])
    out = emb(ids)
    assert out.shape == (2, 3, 6)
    for row in range(2):
        for column in range(3):
            token = int(ids[row, column])
            expected = plain(ids)[row, column].double() + by_hand(emb, token)
            torch.testing.assert_close(out[row, column].double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(emb.table()[ids], out)


@pytest.mark.parametrize("init", ["normal", "xavier"])
def test_init_rms_scales_the_start_and_nothing_else(init):
    plain, small = build(projection_init=init), build(projection_init=init, init_rms=0.02, ngrams=32, rank=3)
    torch.testing.assert_close(small.projection.weight, 0.02 * plain.projection.weight)
    assert small.residual_u.std().item() == pytest.approx(3**-0.5, rel=0.5)
    assert not small.residual_v.any()
    small.load_state_dict(small.state_dict() | plain.state_dict())
    assert torch.equal(small(torch.arange(8)), plain(torch.arange(8)))


def test_init_rms_is_the_rms_and_a_generator_a_name_decides_the_numbers():
    def of(name):
        return torch.Generator().manual_seed(len(name))

    def drawn(**options):
        emb = KroneckerEmbedding(len(TOKENS), 400, tokenizer=TOKENS, pos_dim=7, init_rms=0.3, **options)
        emb.reset_parameters(of)
        return emb

    emb, other = drawn(rank=3), drawn(rank=3, row_major=True)
    assert emb.table()[1:].square().mean().sqrt().item() == pytest.approx(0.3, rel=0.05)  # id 0 has no bytes
    for name, std in emb.init_std().items():
        expected = torch.empty(emb.get_parameter(name).shape).normal_(0, std, generator=of(name))
        assert torch.equal(emb.get_parameter(name), expected)
        assert torch.equal(other.get_parameter(name), expected)


def test_override_has_ngrams_but_no_residual():
    emb = filled(ngrams=32, rank=3)
    ids = torch.tensor([1, 2])
    out = emb.forward_with_byte_override(ids, {1: TOKENS[4]})
    residual = emb.residual_u[4] @ emb.residual_v
    torch.testing.assert_close(out[1] + residual, emb(torch.tensor(4)), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out[0], emb(torch.tensor(1)))


def test_every_parameter_learns_and_compiles():
    emb = filled(ngrams=32, rank=3)
    torch._dynamo.reset()
    compiled = torch.compile(emb, fullgraph=True, backend="aot_eager")
    ids = torch.arange(len(TOKENS))
    torch.testing.assert_close(compiled(ids), emb(ids))
    compiled(ids).square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in emb.parameters())
    assert float(emb.ngram.weight.grad[EMPTY].abs().sum()) == 0


def test_cached_table_follows_every_parameter():
    emb = filled(ngrams=32, rank=3, mode="cached").eval()
    ids = torch.arange(len(TOKENS))
    with torch.no_grad():
        emb(ids)
        emb.residual_v.add_(1)
        torch.testing.assert_close(emb(ids), emb.table())


def test_ngrams_do_not_see_positions():
    bytes_ = torch.tensor([list(b"string"), list(b"sing".ljust(6, b"\0"))], dtype=torch.uint8)
    buckets = ngram_buckets(bytes_, torch.tensor([6, 4]), 1 << 20)
    assert buckets.shape == (2, 9)
    assert set(buckets[1].tolist()) - {EMPTY} - set(buckets[0].tolist()) == {
        int(buckets[1, 0]),  # "si"
        int(buckets[1, 5]),  # "sin"
    }
    assert int((buckets[1] != EMPTY).sum()) == 3 + 2


@pytest.mark.parametrize(
    ("options", "says"),
    [({"ngrams": 1}, "ngrams is 1"), ({"rank": -1}, "rank is -1"), ({"ngrams": -5}, "-5")],
)
def test_bad_options(options, says):
    with pytest.raises(ValueError, match=says):
        build(**options)


def test_row_entropy_penalty():
    assert float(row_entropy_penalty(torch.eye(5))) == pytest.approx(0, abs=1e-6)
    one_row = torch.zeros(5, 7)
    one_row[2] = 3
    assert float(row_entropy_penalty(one_row)) == pytest.approx(1)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(row_entropy_penalty, (weight,))
    p = weight.detach().square().sum(1) / weight.detach().square().sum()
    expected = 1 + float((p * p.log()).sum()) / math.log(4)
    assert float(row_entropy_penalty(weight.detach())) == pytest.approx(expected)
    assert float(row_entropy_penalty(torch.zeros(3, 3))) == pytest.approx(1)
    with pytest.raises(ValueError, match="two rows or more"):
        row_entropy_penalty(torch.ones(1, 3))
