"""engine/generation.py: the same product as torch's, however many threads share the weight. (test_sample.py has the rest.)"""

import pytest
import torch
from torch.nn import functional as F

from engine.generation import Linear, linear


@pytest.fixture
def threads():
    """torch.set_num_threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 3)])
def test_it_is_the_usual_product(n_threads, shape, threads):
    threads(n_threads)
    x, weight, bias = torch.randn(*shape, 8), torch.randn(12, 8), torch.randn(12)
    with torch.no_grad():
        for b in (None, bias):
            torch.testing.assert_close(linear(x, weight, b), F.linear(x, weight, b))


def test_only_generation_cuts_the_weight(threads, monkeypatch):
    """Training, autocast and longer rows take the usual way, bit for bit."""
    threads(2)
    layer, x, cut = Linear(8, 12), torch.randn(3, 1, 8), []
    with monkeypatch.context() as m:
        m.setattr(torch, "bmm", lambda *_: cut.append(1) or torch.zeros(2, 3, 6))
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        with torch.no_grad():
            layer(x.view(1, 3, 8))
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
            assert not cut
            layer(x)
    assert cut
    layer(x).sum().backward()
    assert layer.weight.grad is not None
