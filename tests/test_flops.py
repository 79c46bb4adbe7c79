"""engine/flops.py: what a step costs, by hand."""

import dataclasses

import pytest
import torch

from engine import flops
from engine.loss import cross_entropy, logits_bytes
from model import GPTConfig

GPT2 = GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304)
PARAMS = {"total": 124_000_000}


def gigabytes(loss: str, device_type: str, low_precision: bool = True, micro_batch: int = 22) -> dict:
    config = dataclasses.replace(GPT2, loss=loss)
    return flops.memory_estimate(config, PARAMS, micro_batch, low_precision, device_type)


def test_the_estimate_follows_the_loss_that_will_be_taken():
    full = gigabytes("full", "cuda")["logits"]
    assert full == pytest.approx(22 * 1024 * 50304 * 6 / 1e9)
    assert gigabytes("auto", "cuda")["logits"] == full
    # on a CPU auto means chunks of 128 MiB, and the float32 gradient of the head
    chunks = gigabytes("auto", "cpu", low_precision=False)["logits"]
    assert chunks == pytest.approx((128 * 2**20 + 4 * 50304 * 768) / 1e9, rel=0.05)
    assert gigabytes("chunked", "cuda")["logits"] < full
    assert gigabytes("liger", "cuda")["logits"] < gigabytes("chunked", "cuda")["logits"]
    # chunks do not grow with the batch, full logits do
    assert gigabytes("auto", "cpu", micro_batch=88)["logits"] == pytest.approx(
        gigabytes("auto", "cpu")["logits"], rel=0.05
    )
    assert gigabytes("full", "cuda", micro_batch=88)["logits"] == 4 * full
    assert (
        gigabytes("auto", "cpu", micro_batch=88)["activations"] == 4 * gigabytes("auto", "cpu")["activations"]
    )


def test_several_ranks_and_a_model_that_is_not_compiled_need_more():
    config = dataclasses.replace(GPT2, loss="full")
    one, two = (flops.memory_estimate(config, PARAMS, 22, True, "cuda", world) for world in (1, 2))
    assert two["state"] - one["state"] == pytest.approx(4 * PARAMS["total"] / 1e9)  # DDP's buckets
    eager = flops.memory_estimate(config, PARAMS, 22, True, "cuda", compiled=False)
    assert eager["logits"] == pytest.approx(2 * one["logits"])


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest sum of storage that was alive at a time, of all that operations gave back."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.alive[storage.data_ptr()] = (
                    torch.multiprocessing.reductions.StorageWeakRef(storage),
                    storage.nbytes(),
                )
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize(
    ("how", "tokens", "low_precision"),
    [("full", 512, False), *(("chunked", n, low) for n in (512, 4096) for low in (False, True))],
)
def test_the_estimate_holds_for_what_is_allocated(how, tokens, low_precision, monkeypatch):
    vocab, width = 4096, 64
    monkeypatch.setitem(__import__("engine.loss").loss.CHUNK_BYTES, "cpu", 256 * 4 * vocab)
    x = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    with Allocations() as seen, torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        cross_entropy(x, weight, targets, "mean", how).backward()
    expected = logits_bytes(tokens, vocab, width, how, "cpu", 2 if low_precision else 4)
    print(expected, seen.peak)
    gradients = 4 * (weight.numel() + 3 * x.numel())  # the model's own
    assert expected == pytest.approx(seen.peak, abs=1.2 * gradients)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 836), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA H200", 989),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GH200 480GB", None),
    ],
)  # fmt: skip
def test_a_peak_is_that_of_the_very_device(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = flops.peak_flops(torch.device("cuda:0"))
    assert found == (None if tflops is None else (tflops * 1e12, name))
