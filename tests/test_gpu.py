"""What a CUDA GPU has to show; the tests that need one are skipped where there is none (see conftest.py).

`python -m pytest -m gpu` runs these alone.
"""

import contextlib
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, all_logits, arm_keys, losses, model_keys
from torch.nn import functional as F

from data.loader import TrainBatches, prefetch
from engine import checkpoint
from engine.errors import RunError
from engine.loss import CHUNK_BYTES
from engine.ranks import choose_attention
from kronecker import KroneckerEmbedding, build_byte_buffer, kronecker_codec
from model import GPT, GPTConfig

gpu = pytest.mark.gpu
ARMS = ["bpe_tied", "bpe_untied", "kronecker", "kronecker_tied", "kronecker_rank16_ngrams2k"]
# where a check needs no GPU, the CPU proves that it is one
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


def on_gpu(**keys):
    return {"device": "cuda", "compile": False} | keys


def small(**changes) -> GPT:
    shape = {"block_size": 32, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 128, "pos_dim": 4}
    pieces = [bytes([65 + i % 26, 97 + i // 26])[: i % 3] for i in range(64)]
    return GPT(GPTConfig(**shape | {"bias": False} | changes), build_byte_buffer(pieces, 4))


def test_a_kernel_that_cannot_do_what_is_asked_is_refused_before_the_gpu_is_touched():
    cuda = torch.device("cuda")
    with pytest.raises(RunError, match="attention=flash has no float32 kernel: use --attention=auto"):
        choose_attention("flash", "float32", False, cuda)
    with pytest.raises(RunError, match="attention=cudnn has no deterministic kernel"):
        choose_attention("cudnn", "bfloat16", True, cuda)
    choose_attention("cudnn", "float32", True, torch.device("cpu"))  # means nothing there


def error(ours, exact) -> float:
    """|ours - exact| / |exact| in float64; what is not finite is infinitely wrong."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    found = ((ours - exact).norm() / exact.norm()).item()
    return found if math.isfinite(found) else math.inf


def some_bytes(V: int, pos_dim: int):
    """Buffers of V tokens of 0 to pos_dim + 2 bytes, the last 2% of them none."""
    draw = torch.Generator().manual_seed(V)
    lengths = torch.randint(0, pos_dim + 3, (V,), generator=draw)
    lengths[-V // 50 :] = 0
    pieces = torch.randint(0, 256, (V, pos_dim + 3), generator=draw)
    return build_byte_buffer([bytes(p[:n].tolist()) for p, n in zip(pieces, lengths, strict=True)], pos_dim)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_the_embedding_is_its_definition_in_every_format(device, dtype, limit):
    """Against the dense codec in float64: output, gradient, table, and a token without bytes."""
    V, d, pos_dim, n = (512, 32, 8, 300) if device == "cpu" else (50_304, 768, 16, 4_096)
    buffers = some_bytes(V, pos_dim)
    module = KroneckerEmbedding(V, d, pos_dim=pos_dim, byte_buffer=buffers[0], length_buffer=buffers[1])
    module = module.to(device=device, dtype=dtype)
    draw = torch.Generator().manual_seed(0)
    ids = (torch.rand(n, generator=draw) ** 4 * V).long()  # frequent ids repeat, as in text
    ids[: n // 50] = V - 1
    g_NxM = torch.randn(n, d, generator=draw)
    out_NxM = module(ids.to(device))
    out_NxM.backward(g_NxM.to(device=device, dtype=dtype))
    z_NxD = kronecker_codec(buffers[0][ids], buffers[1][ids], pos_dim=pos_dim, compute_dtype=torch.float64)
    weight = module.projection.weight
    exact_NxM = z_NxD @ weight.detach().double().cpu().T
    assert error(out_NxM, exact_NxM) <= limit
    assert error(weight.grad, g_NxM.to(dtype).double().T @ z_NxD) <= limit
    assert error(module.table()[ids[:256].to(device)], exact_NxM[:256]) <= limit
    assert not module(torch.tensor([V - 1], device=device)).any()


def of_arm(arm: str, **changes) -> GPT:
    return small(**model_keys(arm) | changes)


def loss_and_gradients(run, model, x, low: bool) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
        loss = run(x, x.roll(-1, 1))[1]
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten().double() for p in model.parameters()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("arm", ARMS)
def test_loss_and_gradient_are_those_of_float64(device, arm):
    """The loss written out in float64 on the CPU, for the model's own takes its logits in float32."""
    x = torch.randint(0, 64, (4, 32))
    model = of_arm(arm).double()
    exact = F.cross_entropy(all_logits(model, x).flatten(0, 1), x.roll(-1, 1).flatten())
    exact.backward()
    exact_grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    model = of_arm(arm).to(device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for low, limit in ((False, 1e-4), (True, 3e-2)):
            loss, grad = loss_and_gradients(model, model, x.to(device), low)
            assert error(loss, exact) <= limit / 10 and error(grad, exact_grad) <= limit
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("arm", "loss"), [(a, "full") for a in ARMS] + [("bpe_untied", "chunked"), ("kronecker_tied", "chunked")]
)
def test_a_model_compiles_without_a_break_into_the_same_values(device, arm, loss):
    if device == "cpu" and (arm, loss) not in (("kronecker", "full"), ("kronecker_tied", "chunked")):
        pytest.skip("two cases say enough on a CPU")
    torch._dynamo.reset()
    x = torch.randint(0, 64, (4, 32), device=device)
    model = of_arm(arm, loss=loss).to(device)
    plain = loss_and_gradients(model, model, x, True)
    whole = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    compiled = loss_and_gradients(whole, model, x, True)
    assert error(compiled[0], plain[0]) <= 3e-3 and error(compiled[1], plain[1]) <= 3e-2


@gpu
@pytest.mark.parametrize("kernel", ["FLASH_ATTENTION", "CUDNN_ATTENTION", None])
def test_every_attention_kernel_is_attention(kernel):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, g = (torch.randn(2, 12, 1024, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        exact = F.scaled_dot_product_attention(*wide, is_causal=True)
    exact.backward(g.double())
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    with sdpa_kernel(getattr(SDPBackend, kernel)) if kernel else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(*inputs, is_causal=True)
    out.backward(g)
    assert error(out, exact) <= 1e-2
    assert all(error(t.grad, w.grad) <= 1e-2 for t, w in zip(inputs, wide, strict=True))


@gpu
@pytest.mark.parametrize("arm", ["bpe_untied", "kronecker"])
def test_between_two_lines_of_the_log_the_host_never_waits_for_the_gpu(arm, train_tiny, tmp_path):
    """More steps, and not one wait more."""
    counts = {}
    quiet = {"eval_interval": 10**6, "log_interval": 10**6, "ckpt_interval": -1, "keep_best": False}
    for steps in (10, 20):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train_tiny(
                    tmp_path / str(steps), **arm_keys(arm), **on_gpu(compile=True, max_iters=steps, **quiet)
                )
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts[steps] = sum("synchroniz" in str(w.message).lower() for w in caught)
    assert counts[20] == counts[10]


@gpu
@pytest.mark.parametrize("arm", ARMS)
def test_the_gpu_trains_as_the_cpu_does(arm, train_tiny, tmp_path):
    cpu = losses(train_tiny(tmp_path / "cpu", **arm_keys(arm)))
    cuda = losses(train_tiny(tmp_path / "cuda", **arm_keys(arm), **on_gpu()))
    assert cpu.keys() == cuda.keys()
    for k in cpu:  # float32, whose matmuls may be TF32 on CUDA
        assert cuda[k] == pytest.approx(cpu[k], rel=3e-3), k


@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_deterministic_runs_and_resumes_are_bit_identical(compiled, train_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    keys = arm_keys("kronecker_tied") | on_gpu(
        deterministic=True, compile=compiled, dtype="bfloat16", ckpt_interval=6
    )
    try:
        whole = train_tiny(tmp_path / "whole", **keys)
        assert losses(train_tiny(tmp_path / "twin", **keys)) == losses(whole)
        train_tiny(tmp_path / "cut", **keys, init_from="auto")
        os.rename(tmp_path / "cut/ckpt/step_000012", tmp_path / "gone")
        assert losses(train_tiny(tmp_path / "cut", **keys, init_from="auto")) == losses(whole)
    finally:
        torch.use_deterministic_algorithms(False)
    ours, theirs = (checkpoint.load(tmp_path / d / "ckpt/step_000012")[0] for d in ("whole", "cut"))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("attention", ["auto", "flash", "cudnn"])
def test_low_formats_and_attention_kernels_train_alike(dtype, attention, train_tiny, tmp_path):
    exact = losses(train_tiny(tmp_path / "fp32", **on_gpu(dtype="float32", n_embd=128)))
    try:
        low = train_tiny(tmp_path / "low", **on_gpu(dtype=dtype, attention=attention, n_embd=128))
    finally:
        for kernel in ("flash", "cudnn", "mem_efficient", "math"):
            getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(True)
    assert all(r["skipped"] == 0 for r in low if "skipped" in r)
    for k, value in losses(low).items():
        assert value == pytest.approx(exact[k], rel=0.02), k


@gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("loss", ["chunked", "liger"])
def test_every_way_to_the_loss_is_one_loss(loss, compiled, monkeypatch):
    """Compiled too: writes into slices inside a compiled autograd.Function were once silently lost (torch 2.11)."""
    if loss == "liger":
        pytest.importorskip("liger_kernel")
    monkeypatch.setitem(CHUNK_BYTES, "gpu", 40 * 4 * 64)
    x = torch.randint(0, 64, (8, 32), device="cuda")
    found = []
    for way in ("full", loss):
        torch._dynamo.reset()
        model = small(loss=way, tie_weights=False).cuda()
        run = torch.compile(model) if compiled and way == loss else model
        with torch.autocast("cuda", torch.bfloat16):
            value = run(x, x.roll(-1, 1))[1]
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 0.03 * a.norm()


@gpu
def test_the_loss_in_chunks_needs_less_memory():
    peaks = {}
    for loss in ("full", "chunked"):
        model = small(loss=loss, vocab_size=50304, block_size=1024, tie_weights=False).cuda()
        x = torch.randint(0, 50304, (32, 1024), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            model(x, x)[1].backward()
        peaks[loss] = torch.cuda.max_memory_allocated()
        del model
        torch.cuda.empty_cache()
    assert peaks["chunked"] < 0.7 * peaks["full"]


@gpu
def test_the_embedding_moves_and_agrees_with_the_cpu():
    pieces = [bytes([i % 256, (7 * i) % 256, 3])[: i % 4] for i in range(500)]
    one = KroneckerEmbedding(
        500,
        64,
        pos_dim=4,
        **dict(zip(("byte_buffer", "length_buffer"), build_byte_buffer(pieces, 4), strict=True)),
    )
    two = KroneckerEmbedding(
        500, 64, pos_dim=4, byte_buffer=one._byte_buffer, length_buffer=one._length_buffer
    )
    two.load_state_dict(one.state_dict())
    two.cuda()
    ids = torch.randint(0, 500, (3, 700))
    g = torch.randn(3, 700, 64)
    one(ids).backward(g)
    two(ids.cuda()).backward(g.cuda())
    torch.testing.assert_close(two(ids.cuda()).cpu(), one(ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        two.projection.weight.grad.cpu(), one.projection.weight.grad, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(two.table().cpu(), one.table(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(two.cpu()(ids), one(ids))  # and back


@gpu
def test_batches_arrive_whole_and_in_order(tiny_data):
    batches = TrainBatches(tiny_data, 16, 8, 1337)
    arrived = list(prefetch((batches.rows(s, 0, 8) for s in range(20)), "cuda"))
    for s, (x, y) in enumerate(arrived):
        plain = batches.rows(s, 0, 8)
        assert x.is_cuda and torch.equal(x.cpu(), plain[0]) and torch.equal(y.cpu(), plain[1])


@gpu
def test_rows_tell_the_allocators_memory_and_the_devices_mfu(train_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("KNG_PEAK_TFLOPS", "100")
    rows = [r for r in train_tiny(tmp_path, **on_gpu(log_interval=4)) if "train/loss" in r]
    from engine.flops import flops_per_token
    from model import GPTConfig

    config = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)
    for r in rows:
        assert r["mfu"] == pytest.approx(r["tok_per_sec"] * flops_per_token(config) / 1e14 * 100)
        assert 0 < r["mem_gb"] < 5


@gpu
def test_cached_generation_is_plain_generation():
    model = small().cuda().eval()
    prompt = torch.randint(0, 64, (2, 5), device="cuda")
    ids = prompt
    for _ in range(20):
        ids = torch.cat((ids, model(ids)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    cached = torch.cat((prompt, *model.generate(prompt, 20, temperature=0)), dim=1)
    assert torch.equal(cached, ids)


@gpu
def test_too_large_a_batch_is_one_sentence(tiny_flags, tmp_path):
    rows = 2**20  # the most that batch_size may be; a float32 tensor of one block is 34 GB then
    flags = tiny_flags(tmp_path, **on_gpu(batch_size=rows, global_batch_size=rows, n_embd=512))
    done = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the GPU is out of memory" in done.stderr
    assert f"--batch_size={rows // 2} instead of {rows}" in done.stderr
    assert "Traceback" not in done.stderr
