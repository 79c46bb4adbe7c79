"""The fast path against the dense definition, and everything that nn.Embedding promises."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import prefetch
from kronecker import KroneckerEmbedding, bag, kronecker_codec
from kronecker.codec import bag_coefficients

quick = settings(deadline=None, max_examples=40)


def random_embedding(V=50, d=8, pos_dim=5, char_dim=256, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, pos_dim + 1, V)
    lengths[:2] = (0, pos_dim)[:V]  # the two ends are always there
    buffer = rng.integers(0, char_dim, (V, pos_dim))
    torch.manual_seed(seed)
    return KroneckerEmbedding(
        V,
        d,
        char_dim=char_dim,
        pos_dim=pos_dim,
        byte_buffer=torch.from_numpy(buffer.astype(np.uint8)),
        length_buffer=torch.from_numpy(lengths.astype(np.int16)),
        **kwargs,
    )


def dense_table(emb, weight):
    """The definition: codec of every token, in float64, times the projection."""
    z_VxD = kronecker_codec(
        emb._byte_buffer,
        emb._length_buffer,
        emb.char_dim,
        emb.pos_dim,
        emb.length_normalize,
        emb.z_normalize,
        compute_dtype=torch.float64,
    )
    return z_VxD @ weight.double().t()


def relative(a, b, size=0.0):
    """Error over the norm of b, or over `size` where that is larger: what rows weigh before they cancel."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=max(float(size), 1e-30)))


# ---- the definition ----


@quick
@given(
    V=st.integers(2, 40),
    d=st.integers(1, 9),
    pos_dim=st.integers(1, 20),
    char_dim=st.sampled_from([1, 2, 7, 128, 256]),
    length_normalize=st.booleans(),
    z_normalize=st.booleans(),
    row_major=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    shape=st.lists(st.integers(0, 7), min_size=0, max_size=3),
    seed=st.integers(0, 10**6),
)
def test_sparse_path_equals_dense_definition(
    V, d, pos_dim, char_dim, length_normalize, z_normalize, row_major, dtype, shape, seed
):
    if z_normalize and char_dim == 1:
        char_dim = 3  # a codec full of ones has no deviation to divide by
    emb = random_embedding(
        V,
        d,
        pos_dim,
        char_dim,
        seed,
        length_normalize=length_normalize,
        z_normalize=z_normalize,
        row_major=row_major,
    ).to(dtype)
    ids = torch.from_numpy(np.random.default_rng(seed + 1).integers(0, V, shape))
    weight = emb.projection.weight.detach().double().requires_grad_()
    expected = dense_table(emb, weight)[ids]
    out = emb(ids)
    assert out.shape == (*shape, d) and out.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    usual = dense_table(emb, weight).detach().norm() / V**0.5
    size = usual * ids.numel() ** 0.5
    assert relative(out, expected, size) < tolerance
    assert relative(emb.table(), dense_table(emb, weight)) < tolerance

    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    out.backward(g)
    (expected_grad,) = torch.autograd.grad(expected, weight, g.double())
    assert emb.projection.weight.grad.shape == (d, emb.D)
    if float(expected_grad.norm()) > 1e-6:  # a mean that cancels exactly leaves nothing to compare with
        assert relative(emb.projection.weight.grad, expected_grad) < tolerance

    # the torch operations of every other device, run here
    if ids.numel():
        tokens = emb._byte_buffer, emb._length_buffer, emb._coef
        plan = bag._plan_device(ids.reshape(-1), tokens, emb.D)
        with torch.no_grad():
            on_device = plan.forward(emb.projection.weight.t().contiguous())
            grad = bag._backward(plan, g.reshape(-1, d))
        assert relative(on_device.view(out.shape), expected, size) < tolerance
        if float(expected_grad.norm()) > 1e-6:
            assert relative(grad.t(), expected_grad) < tolerance


@quick
@given(pos_dim=st.integers(1, 32), char_dim=st.integers(2, 256), length_normalize=st.booleans())
def test_moments_in_closed_form(pos_dim, char_dim, length_normalize):
    D, eps = char_dim * pos_dim, 1e-6
    for L, (scale, shift) in enumerate(bag_coefficients(char_dim, pos_dim, length_normalize)):
        kappa = np.zeros(D)
        kappa[:L] = (1 / math.sqrt(L) if length_normalize else 1.0) if L else 0
        if L == 0 or L == D:
            continue
        std = kappa.std(ddof=1) + eps
        assert scale == pytest.approx(kappa[0] / std, rel=1e-9)
        assert shift == pytest.approx(kappa.mean() / std, rel=1e-9)


@pytest.mark.parametrize("repeats", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_change_no_bit(repeats, dtype, monkeypatch):
    """Column parts, row chunks and blocks of slots, on both sides of the rule N >= 2 U, with the dense oracle."""
    V, d = 700, 768
    emb = random_embedding(V=V, d=d, pos_dim=6, char_dim=64).to(dtype)
    ids = torch.randperm(V, generator=torch.Generator().manual_seed(0)).repeat(repeats)
    g = torch.randn(len(ids), d, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run():
        emb.zero_grad()
        out = emb(ids)
        out.backward(g)
        return out.detach(), emb.projection.weight.grad.clone()

    found = {}
    for size, parts in ((1 << 40, 1), (1 << 16, 8)):
        monkeypatch.setattr(bag, "_piece", lambda N, M, size=size: size)
        assert bag._column_parts(V, len(ids), d) == parts
        found[parts] = run()
    assert torch.equal(found[1][0], found[8][0]) and torch.equal(found[1][1], found[8][1])
    monkeypatch.undo()
    if dtype == torch.float32:
        weight = emb.projection.weight.detach().double().requires_grad_()
        expected = dense_table(emb, weight)[ids]
        (expected_grad,) = torch.autograd.grad(expected, weight, g.double())
        assert relative(found[8][0], expected) < 3e-6 and relative(found[8][1], expected_grad) < 3e-6


@pytest.mark.parametrize(
    ("T", "N", "M", "parts"),
    [(324, 1_024, 128, 1), (2_584, 8_192, 768, 4), (36_000, 65_536, 768, 8), (10**6, 10**6, 257, 1)],
)
def test_column_parts_divide_the_width_and_bound_the_memory(T, N, M, parts):
    """8,192 tokens of text at GPT-2's width: 2 MB at a time, where all columns at once would be 8."""
    assert bag._column_parts(T, N, M) == parts
    assert M % parts == 0


def test_ids_may_be_overwritten_before_the_backward_pass():
    for n in (20, 200):  # few and many repeated tokens
        emb = random_embedding(V=50)
        ids = torch.from_numpy(np.random.default_rng(n).integers(0, 50, n))
        g = torch.randn(n, 8)
        (expected,) = torch.autograd.grad(emb(ids.clone()), emb.projection.weight, g)
        out = emb(ids)
        ids.zero_()
        (grad,) = torch.autograd.grad(out, emb.projection.weight, g)
        assert torch.equal(grad, expected)


def test_a_plan_made_ahead_changes_no_bit_and_serves_only_its_own_ids(monkeypatch):
    emb, other = random_embedding(V=50), random_embedding(V=50, seed=1)
    plans, make = [], bag.CpuPlan.__init__
    monkeypatch.setattr(bag.CpuPlan, "__init__", lambda *a: plans.append(a) or make(*a))
    for n in (20, 200):  # few and many repeated tokens
        ids = torch.from_numpy(np.random.default_rng(n).integers(0, 50, (2, n)))
        g = torch.randn(2, n, 8)
        expected = emb(ids)
        (expected_grad,) = torch.autograd.grad(expected, emb.projection.weight, g)
        emb.plan_ahead(ids)
        made = len(plans)
        out = emb(ids)
        (grad,) = torch.autograd.grad(out, emb.projection.weight, g)
        assert torch.equal(out, expected) and torch.equal(grad, expected_grad)
        assert len(plans) == made  # neither pass made another
        assert torch.equal(other(ids), other(ids.clone()))  # the plan is of another vocabulary
        ids.copy_(ids.flip(1))
        assert torch.equal(emb(ids), expected.flip(1))


def test_a_plan_survives_the_loader_s_queue():
    emb, ids = random_embedding(), torch.arange(6).view(2, 3)
    emb.plan_ahead(ids)
    [(x, y)] = prefetch(iter([(ids, ids + 1)]), "cpu")
    assert x._kronecker_plan is ids._kronecker_plan and not hasattr(y, "_kronecker_plan")


def test_no_bytes_is_the_zero_vector_and_gives_no_gradient():
    emb = random_embedding(V=3, pos_dim=4)
    out = emb(torch.tensor([0, 0]))  # id 0 has length 0
    assert torch.equal(out, torch.zeros(2, 8))
    out.sum().backward()
    assert torch.equal(emb.projection.weight.grad, torch.zeros_like(emb.projection.weight))


def test_derivative_by_finite_differences():
    emb = random_embedding(V=7, d=3, pos_dim=2, char_dim=3).double()
    ids = torch.tensor([[1, 1, 5], [0, 6, 2]])

    def of_weight(weight):
        return torch.func.functional_call(emb, {"projection.weight": weight}, (ids,))

    weight = emb.projection.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(of_weight, (weight,))


def test_table_gradient_equals_lookup_of_every_id():
    a = random_embedding()
    b = copy.deepcopy(a)
    g = torch.randn(50, 8)
    a.table().backward(g)
    b(torch.arange(50).flip(0)).backward(g.flip(0))
    assert relative(a.projection.weight.grad, b.projection.weight.grad) < 1e-6


# ---- nn.Embedding's contract ----


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integer_ids_of_any_dtype(dtype):
    emb = random_embedding()
    ids = torch.tensor([[3, 4, 4]], dtype=dtype)
    assert torch.equal(emb(ids), emb(ids.long()))


def test_names_and_parameters():
    emb = random_embedding()
    assert (emb.num_embeddings, emb.embedding_dim) == (50, 8)
    assert list(emb.state_dict()) == ["projection.weight"]
    assert [name for name, _ in emb.named_parameters()] == ["projection.weight"]
    assert emb.projection.weight.shape == (8, 256 * 5)
    assert "50, 8" in repr(emb)


def test_ids_need_not_be_contiguous():
    emb = random_embedding()
    ids = torch.arange(12).view(3, 4).t()
    assert torch.equal(emb(ids), emb(ids.contiguous()))


def test_to_half_and_back():
    emb = random_embedding()
    ids = torch.arange(20)
    full = emb(ids)
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(emb).to(dtype)
        assert half(ids).dtype == dtype
        assert half._byte_buffer.dtype == torch.uint8 and half._coef.dtype == torch.float32
        assert relative(half(ids), full) < 1e-2
    assert copy.deepcopy(emb).double()(ids).dtype == torch.float64


def test_autocast_leaves_the_lookup_in_the_weights_dtype():
    emb = random_embedding()
    ids = torch.arange(20)
    expected = emb(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = emb(ids)
    assert out.dtype == torch.float32 and torch.equal(out, expected)


def test_compile_without_a_graph_break():
    emb = random_embedding()
    ids = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    expected = emb(ids)
    g = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, emb.projection.weight, g)
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: emb(ids) * 2.0, fullgraph=True)
    out = compiled(ids)
    out.backward(g)
    assert relative(out, 2 * expected) < 1e-6
    assert relative(emb.projection.weight.grad, 2 * expected_grad) < 1e-6
    table = torch.compile(lambda: emb.table().sum(), fullgraph=True, backend="aot_eager")()
    assert relative(table, emb.table().sum()) < 1e-5
    empty = torch.compile(emb, fullgraph=True, backend="aot_eager")(ids[:0])
    assert empty.shape == (0, 9, 8)


def test_deepcopy_and_pickle():
    emb = random_embedding()
    ids = torch.arange(50)
    for twin in (copy.deepcopy(emb), pickle.loads(pickle.dumps(emb))):
        assert torch.equal(twin(ids), emb(ids))
        assert twin.projection.weight.stride() == emb.projection.weight.stride()
        with torch.no_grad():
            twin.projection.weight.zero_()
        assert float(emb(ids).detach().abs().sum()) > 0


def test_meta_device_start_keeps_the_bytes():
    with torch.device("meta"):
        emb = random_embedding(seed=3)
    assert emb.projection.weight.device.type == "meta"
    emb.to_empty(device="cpu")
    emb.load_state_dict(random_embedding(seed=3).state_dict())
    ids = torch.arange(50)
    assert torch.equal(emb(ids), random_embedding(seed=3)(ids))


def test_assigned_checkpoint_of_a_meta_model():
    with torch.device("meta"):
        emb = random_embedding(seed=3)
    emb.load_state_dict(random_embedding(seed=3).state_dict(), assign=True)
    ids = torch.arange(50)
    assert relative(emb(ids), random_embedding(seed=3)(ids)) < 1e-6


def test_state_dict_is_contiguous_and_round_trips(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    emb = random_embedding(seed=1)
    safetensors.save_file(emb.state_dict(), tmp_path / "e.safetensors")
    other = random_embedding(seed=1, row_major=True)
    other.reset_parameters()
    other.load_state_dict(safetensors.load_file(tmp_path / "e.safetensors"))
    assert torch.equal(other.projection.weight, emb.projection.weight)
    inside = nn.Sequential(emb)  # the hook must hold below a parent, too
    assert all(t.is_contiguous() for t in inside.state_dict().values())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_both_layouts_train_alike(optimizer):
    a, b = random_embedding(seed=2), random_embedding(seed=2, row_major=True)
    b.load_state_dict(a.state_dict())
    ids = torch.arange(50)
    for emb in (a, b):
        opt = optimizer(emb.parameters(), lr=0.1)
        for _ in range(3):
            opt.zero_grad()
            emb(ids).square().sum().backward()
            opt.step()
        assert emb.projection.weight.grad.stride() == emb.projection.weight.stride()
    assert relative(a.projection.weight, b.projection.weight) < 1e-5


def test_deterministic():
    emb = random_embedding(V=300, d=32)
    ids = torch.randint(0, 300, (4000,), generator=torch.Generator().manual_seed(0))
    g = torch.randn(4000, 32, generator=torch.Generator().manual_seed(1))

    def grad():
        return torch.autograd.grad(emb(ids), emb.projection.weight, g)[0]

    first = grad()
    assert torch.equal(first, grad())
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(first, grad())
    finally:
        torch.use_deterministic_algorithms(False)


def test_cached_mode_follows_the_weights():
    emb = random_embedding(mode="cached").eval()
    plain = random_embedding()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert relative(emb(ids), plain(ids)) < 1e-6
        assert emb._table is not None
        for p in (*emb.parameters(), *plain.parameters()):
            p.mul_(3)
        assert relative(emb(ids), plain(ids)) < 1e-6
        fresh = {"projection.weight": torch.randn(8, 1280)}  # an assigned one counts its changes anew
        for module in (emb, plain):
            module.load_state_dict(fresh, assign=True)
        assert relative(emb(ids), plain(ids)) < 1e-6
        for module in (emb, plain):  # as torch.nn.utils.vector_to_parameters does
            module.projection.weight.data = 2 * fresh["projection.weight"]
        assert relative(emb(ids), plain(ids)) < 1e-6
        for module in (emb, plain):
            module.projection.weight.data.mul_(5)  # torch does not count this
            module.eval()
        assert relative(emb(ids), plain(ids)) < 1e-6
    assert emb(ids).requires_grad  # gradients never go through the stale table
    assert emb.train()._table is None


def test_cached_mode_of_a_module_made_in_inference_mode():
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        emb = random_embedding(mode="cached").eval()
        before = emb(ids)
        emb.projection.weight.mul_(3)
        assert relative(emb(ids), 3 * before) < 1e-6


def test_a_kept_table_is_never_that_of_a_weight_that_is_gone():
    """A new parameter may be made where a freed one stood: its id and its count of changes say nothing."""
    emb, shape = random_embedding(seed=4, mode="cached").eval(), (8, 5 * 256)
    with torch.no_grad():
        for k in range(200):
            for _ in range(2):
                emb.projection.weight = nn.Parameter(torch.full(shape, float(k)).normal_())
            kept = emb.table()
            emb.mode = "dynamic"
            assert torch.equal(kept, emb.table())
            emb.mode = "cached"


def test_buffers_stay_small_at_the_production_size():
    V, pos_dim = 131_072, 32
    emb = KroneckerEmbedding(
        V,
        2,
        pos_dim=pos_dim,
        byte_buffer=torch.zeros(V, pos_dim, dtype=torch.uint8),
        length_buffer=torch.zeros(V, dtype=torch.int16),
    )
    assert emb.buffer_bytes() <= 4.5e6


# ---- byte overrides ----


def test_override_of_one_row_and_of_a_batch():
    emb = random_embedding(pos_dim=5)
    new = [b"ab", b"", b"longer than five"]
    expected = dense_table(
        KroneckerEmbedding(3, 8, tokenizer=new, pos_dim=5), emb.projection.weight.detach()
    ).float()
    row = emb.forward_with_byte_override(torch.tensor([4, 5, 6, 7]), {1: new[0], 3: new[1]})
    assert torch.equal(row[[0, 2]], emb(torch.tensor([4, 6])))
    assert relative(row[1], expected[0]) < 1e-5 and torch.equal(row[3], torch.zeros(8))

    ids = torch.tensor([[4, 5], [6, 7]])
    by_pair = emb.forward_with_byte_override(ids, {(0, 1): new[0], (1, 0): new[2]})
    assert relative(by_pair[1, 0], expected[2]) < 1e-5
    assert torch.equal(by_pair[0, 0], emb(ids)[0, 0])
    assert torch.equal(emb.forward_with_byte_override(ids), emb(ids))
    assert torch.equal(emb.forward_with_byte_override(ids, {}), emb(ids))
    by_pair.sum().backward()
    assert emb.projection.weight.grad is not None


@pytest.mark.parametrize(
    ("ids", "overrides", "error", "says"),
    [
        ([1, 2], {2: b"x"}, IndexError, "position 2"),
        ([1, 2], {-1: b"x"}, IndexError, "position -1"),
        ([1, 2], {0: "text"}, TypeError, "must be bytes"),
        ([[1], [2]], {0: b"x"}, ValueError, "(row, position)"),
    ],
)
def test_bad_overrides(ids, overrides, error, says):
    with pytest.raises(error) as caught:
        random_embedding().forward_with_byte_override(torch.tensor(ids), overrides)
    assert says in str(caught.value)


# ---- bad input: one sentence each ----


@pytest.mark.parametrize("bad", [-1, 50])
def test_id_out_of_range(bad):
    emb = random_embedding()
    with pytest.raises(IndexError, match=f"token id {bad} is outside 0..49"):
        emb(torch.tensor([1, bad]))


def test_ids_must_be_integers():
    with pytest.raises(TypeError, match="must be integers"):
        random_embedding()(torch.tensor([1.0]))


def buffers(byte=0, length=1, V=2, pos_dim=3):
    return {
        "byte_buffer": torch.full((V, pos_dim), byte, dtype=torch.uint8),
        "length_buffer": torch.full((V,), length, dtype=torch.int16),
    }


def wide(byte):
    """Buffers of a type that would hold more than a byte."""
    return {name: buffer.long() for name, buffer in buffers().items()} | {
        "byte_buffer": torch.full((2, 3), byte, dtype=torch.int64)
    }


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"byte_buffer": None}, "either a tokenizer or both"),
        (buffers(length=4), "length 4, outside 0..pos_dim=3"),
        (buffers(length=-1), "length -1"),
        ({**buffers(byte=9), "char_dim": 9}, "byte 9 at 0, outside 0..char_dim-1=8"),
        (buffers(pos_dim=4), "must have shape (tokens, pos_dim=3)"),
        (buffers(V=3), "vocab_size is 2, but there are 3 tokens"),
        ({**buffers(), "mode": "fast"}, "mode must be"),
        ({**buffers(), "projection_init": "zeros"}, "projection_init must be"),
        ({"tokenizer": [b"a", b"b", b"c"]}, "vocab_size is 2, but there are 3 tokens"),
        ({**buffers(), "d_model": 0}, "d_model is 0, but it must be at least 1"),
        ({**buffers(), "init_rms": float("nan")}, "init_rms is nan, but it must be a positive number"),
        ({**buffers(), "init_rms": -1}, "init_rms is -1, but"),
        ({**wide(300), "char_dim": 512}, "byte 300 at 0, outside 0..255: it is no byte"),
        (wide(65541), "byte 65541 at 0, outside 0..255"),
    ],
)
def test_bad_construction(kwargs, says):
    with pytest.raises(ValueError) as caught:
        KroneckerEmbedding(**{"vocab_size": 2, "d_model": 4, "pos_dim": 3} | kwargs)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_checkpoint_of_another_pos_dim():
    with pytest.raises(ValueError, match="its pos_dim was 5, here it is 6"):
        random_embedding(pos_dim=6).load_state_dict(random_embedding(pos_dim=5).state_dict())


def test_ids_past_the_tokenizer_embed_to_zero():
    emb = KroneckerEmbedding(5, 4, tokenizer=[b"a", b"bc"], pos_dim=2)
    assert torch.equal(emb(torch.tensor([2, 3, 4])), torch.zeros(3, 4))
    assert float(emb(torch.tensor([1])).detach().abs().sum()) > 0


# ---- the same on a GPU ----


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("row_major", [True, False])
def test_cuda_equals_dense_definition(dtype, tolerance, row_major):
    emb = random_embedding(V=400, d=64, pos_dim=16, row_major=row_major).to("cuda", dtype)
    assert emb._byte_buffer.is_cuda and emb._coef.is_cuda
    ids = torch.randint(0, 400, (8, 100), generator=torch.Generator().manual_seed(0)).cuda()
    weight = emb.projection.weight.detach().double().requires_grad_()
    expected = dense_table(emb, weight)[ids]
    g = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).cuda()
    (expected_grad,) = torch.autograd.grad(expected, weight, g.to(dtype).double())
    torch.use_deterministic_algorithms(True)
    try:
        grads = [torch.autograd.grad(emb(ids), emb.projection.weight, g.to(dtype))[0] for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert relative(emb(ids), expected) < tolerance
    assert relative(grads[0], expected_grad) < tolerance and torch.equal(*grads)
    torch._dynamo.reset()
    compiled = torch.compile(emb, fullgraph=True)
    assert relative(compiled(ids), expected) < tolerance
    assert (
        relative(torch.autograd.grad(compiled(ids), emb.projection.weight, g.to(dtype))[0], grads[0])
        < tolerance
    )
    assert relative(emb.table(), dense_table(emb, weight)) < tolerance
