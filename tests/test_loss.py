"""engine/loss.py against torch's own cross-entropy in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from engine.loss import CHUNK_BYTES, ChunkedLinearCrossEntropy, cross_entropy


@pytest.mark.parametrize("rows_in_a_chunk", [1, 3, 100])
def test_chunked_cross_entropy_and_its_gradients(rows_in_a_chunk, monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", rows_in_a_chunk * 4 * 23)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10, 6, generator=g, requires_grad=True)
    w = torch.randn(23, 6, generator=g, requires_grad=True)
    t = torch.randint(0, 23, (10,), generator=g)
    expected = F.cross_entropy(x.double() @ w.double().T, t) * 3
    gx, gw = torch.autograd.grad(expected, (x, w))
    loss = ChunkedLinearCrossEntropy.apply(x, w, t, torch.float32) * 3
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, gx, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(w.grad, gw, rtol=1e-5, atol=1e-6)


def test_a_loss_beyond_float32s_smallest_probability_is_still_right():
    x = torch.tensor([[100.0], [1.0]], requires_grad=True)
    w = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = ChunkedLinearCrossEntropy.apply(x, w, torch.tensor([1, 0]), torch.float32)
    assert loss.item() == pytest.approx((200 + math.log(1 + math.exp(-2))) / 2)
    loss.backward()
    assert x.grad[0].item() == pytest.approx(1.0)  # (p - onehot) @ w / n = (1 * 1 + -1 * -1) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_is_used_again_changes_no_bit(dtype, monkeypatch):
    """Three chunks of 4, 4 and 2 rows, in blocks of at most 3, against the same formulas in fresh memory."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * 4 * 23)
    monkeypatch.setattr("engine.loss.block_rows", lambda vocab_size: 3)
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 6, generator=g).requires_grad_() for n in (10, 23))
    t = torch.randint(0, 23, (10,), generator=g)
    loss, grad_w, grad_x, each = torch.zeros(()), torch.zeros(23, 6), [], []
    for chunk, target in zip(x.detach().to(dtype).split(4), t[:, None].split(4), strict=True):
        logits = (chunk @ w.detach().to(dtype).t()).float()
        p = logits.softmax(1)
        p_target = p.gather(1, target)
        loss = loss - p_target.log().sum()
        p = p.scatter(1, target, p_target - 1).to(dtype)
        grad_x.append((p @ w.detach().to(dtype)).float())
        grad_w = torch.addmm(grad_w, p.t(), chunk) if dtype == torch.float32 else grad_w + p.t() @ chunk
        each.append(-logits.log_softmax(1).gather(1, target)[:, 0])
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        ours = cross_entropy(x, w, t, "mean", "chunked")
        with torch.no_grad():
            ours_each = cross_entropy(x, w, t, "none", "chunked")
    ours.backward()
    assert torch.equal(ours, loss / 10) and torch.equal(ours_each, torch.cat(each))
    assert torch.equal(x.grad, torch.cat(grad_x) * 0.1) and torch.equal(w.grad, grad_w * 0.1)


@pytest.mark.parametrize("how", ["auto", "full", "chunked"])
@pytest.mark.parametrize("gradients", [True, False])
def test_every_way_is_torchs_cross_entropy(how, gradients, monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * 4 * 23)
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(10, 6, generator=g), torch.randn(23, 6, generator=g)
    t = torch.randint(0, 23, (10,), generator=g)
    with torch.set_grad_enabled(gradients):
        expected = F.cross_entropy(x.double() @ w.double().T, t, reduction="none")
        torch.testing.assert_close(
            cross_entropy(x, w, t, "none", how).double(), expected, rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            cross_entropy(x, w, t, "mean", how).double(), expected.mean(), rtol=1e-5, atol=1e-6
        )
