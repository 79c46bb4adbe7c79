"""scripts/gpu/candidates.py: every way gives the package's embedding and gradient."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, losses

from engine.metrics import read_metrics
from kronecker import KroneckerEmbedding, build_byte_buffer
from scripts.gpu import candidates
from scripts.gpu.candidates import Slots, TableWay, going


@pytest.mark.parametrize("way", [TableWay, Slots])
@pytest.mark.parametrize(("V", "n"), [(700, 2000), (700, 50), (3, 9)])
def test_it_is_the_same_embedding(way, V, n, monkeypatch):
    monkeypatch.setattr(candidates, "CHUNK", 7)
    g = torch.Generator().manual_seed(V + n)
    pieces = [bytes([32, *torch.randint(0, 256, (i % 6,), generator=g).tolist()])[: i % 7] for i in range(V)]
    buffers = build_byte_buffer(pieces, 4)
    one = KroneckerEmbedding(V, 24, pos_dim=4, byte_buffer=buffers[0], length_buffer=buffers[1])
    two = going(way, one)
    ids = torch.randint(0, V, (n // 3, 3), generator=g)
    out_grad = torch.randn(n // 3, 3, 24, generator=g)
    found = []
    for module in (one, two):
        one.zero_grad()
        out = module(ids)
        out.backward(out_grad)
        found.append((out.detach(), one.projection.weight.grad.clone()))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_run_trains_alike_with_the_embedding_going_another_way(tiny_flags, tmp_path):
    """As its own process, for it changes the package."""
    found = []
    for script in (["train.py"], ["scripts/gpu/candidates.py", "table"]):
        flags = tiny_flags(tmp_path / script[0].replace("/", "_"), wte="kronecker", tie_weights=False)
        subprocess.run([sys.executable, *script, *flags], cwd=ROOT, check=True, capture_output=True)
        found.append(losses(read_metrics(tmp_path / script[0].replace("/", "_"))))
    assert found[0].keys() == found[1].keys()
    for k in found[0]:
        assert found[1][k] == pytest.approx(found[0][k], rel=1e-5)


@pytest.mark.parametrize("way", [TableWay, Slots])
def test_it_compiles_without_a_break(way):
    buffers = build_byte_buffer([b"ab", b"", b"c", b"abc"] * 5, 4)
    module = KroneckerEmbedding(20, 8, pos_dim=4, byte_buffer=buffers[0], length_buffer=buffers[1])
    ids = torch.arange(20).repeat(2)
    found = []
    compiled = torch.compile(going(way, module), fullgraph=True, backend="aot_eager")
    for run in (module, compiled):
        module.zero_grad()
        run(ids).square().sum().backward()
        found.append(module.projection.weight.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
