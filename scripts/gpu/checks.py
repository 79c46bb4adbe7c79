"""Is what runs on this device right? Each check is a name, a measured value and what it may be at most.

    python scripts/gpu/suite.py correctness            on a GPU
    python scripts/gpu/suite.py correctness --toy      the same at a size for a CPU

Errors are |ours - reference| / |reference| in the Frobenius norm, against float64; inputs are drawn anew for
every check, and a figure that is not finite never passes.
"""

import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
import numpy as np
import torch
from torch.nn import functional as F

from data.meta import characters_meta, write_meta
from data.shards import write_shard
from engine import checkpoint
from engine.metrics import read_metrics
from kronecker import KroneckerEmbedding, kronecker_codec
from model import GPT, GPTConfig
from scripts.bench.embedding import byte_buffers

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ARMS = {
    "bpe_tied": {"wte": "stock", "tie_weights": True},
    "bpe_untied": {"wte": "stock", "tie_weights": False},
    "kronecker": {"wte": "kronecker", "tie_weights": False},
    "kronecker_tied": {"wte": "kronecker", "tie_weights": True},
    "kronecker_rank_ngrams": {
        "wte": "kronecker", "tie_weights": False, "wte_init_rms": 0.1, "wte_rank": 4, "wte_ngrams": 64,
    },
}  # fmt: skip


def run_all(device: torch.device, work: Path, toy: bool) -> list[dict]:
    """All checks, in the order in which a failure would explain the next: [{"name", "value", "limit", "ok"}]."""
    # before anything touches cuBLAS: its deterministic mode wants a workspace of its own
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("highest")
    if toy and device.type == "cpu":
        torch.set_num_threads(1)  # so small, two threads would wait for each other longer than they work
    checks: list[dict] = []

    def check(name: str, value: float, limit: float) -> None:
        ok = bool(math.isfinite(value) and value <= limit)
        written = value if math.isfinite(value) else None  # JSON knows no NaN
        checks.append({"name": name, "value": written, "limit": limit, "ok": ok})
        print(f"{'ok   ' if ok else 'WRONG'} {name}: {value:.3g} (at most {limit:.3g})", flush=True)

    for part in (embedding, loss_and_model, attention, determinism, compiled, resume, waits, gpu_tests):
        began = time.monotonic()
        try:
            part(check, device, work, toy)
        except Exception as e:  # one part that breaks must not hide what the others find
            check(f"{part.__name__} ({type(e).__name__}: {str(e).strip().splitlines()[:1]})", math.nan, 0)
        finally:
            torch.use_deterministic_algorithms(False)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        print(f"      {part.__name__}: {time.monotonic() - began:.1f} s", flush=True)
    return checks


def error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    ours, reference = ours.detach().double(), reference.detach().double()
    return ((ours - reference).norm() / reference.norm()).item()


def buffers_with_gaps(V: int, pos_dim: int):
    """Bytes of V tokens, some of length 0 and some of more than pos_dim bytes."""
    bytes_VxP, lengths_V = byte_buffers(V, pos_dim, None)
    bytes_VxP[-V // 50 :], lengths_V[-V // 50 :] = 0, 0
    return bytes_VxP, lengths_V


# ---- the embedding against its dense definition


def embedding(check, device, work, toy) -> None:
    settings = [(512, 32, 8, 300)] if toy else [(50_304, 768, 16, 4_096), (131_072, 4_096, 32, 2_048)]
    rng = torch.Generator().manual_seed(time.time_ns() % 2**31)
    for V, d, pos_dim, n in settings:
        bytes_VxP, lengths_V = buffers_with_gaps(V, pos_dim)
        for dtype, limit in LIMITS.items():
            module = KroneckerEmbedding(V, d, pos_dim=pos_dim, byte_buffer=bytes_VxP, length_buffer=lengths_V)
            module = module.to(device=device, dtype=dtype)
            # frequent ids repeat as in text, the last ones have no bytes, all ids of one kind are met
            ids = (torch.rand(n, generator=rng) ** 4 * V).long()
            ids[: n // 50], ids[n // 50 : n // 25] = V - 1, ids[n // 2]
            ids = ids[torch.randperm(n, generator=rng)].to(device)
            g_NxM = torch.randn(n, d, generator=rng).to(device=device, dtype=dtype)
            out_NxM = module(ids)
            out_NxM.backward(g_NxM)
            rows = ids.cpu()
            z_NxD = kronecker_codec(
                bytes_VxP[rows].to(device),
                lengths_V[rows].to(device),
                pos_dim=pos_dim,
                compute_dtype=torch.float64,
            )
            weight = module.projection.weight.detach().double()
            name = f"V {V:,}, d {d}, {str(dtype)[6:]}"
            check(f"embedding, {name}", error(out_NxM, z_NxD @ weight.T), limit)
            check(
                f"its gradient, {name}", error(module.projection.weight.grad, g_NxM.double().T @ z_NxD), limit
            )
            part = module.table().detach()[rows[:256].to(device)]
            check(f"its table, {name}", error(part, (z_NxD @ weight.T)[:256]), limit)
            zero = module(torch.tensor([V - 1], device=device)).abs().max().item()
            check(f"a token without bytes, {name}", zero, 0.0)


# ---- the model and the ways to its loss, against float64 on the CPU


def small_model(arm: str, seed: int = 1, **changes) -> GPT:
    shape = {
        "block_size": 64,
        "vocab_size": 512,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 128,
        "bias": False,
        "pos_dim": 8,
    }
    return GPT(GPTConfig(**shape | ARMS[arm] | changes), buffers_with_gaps(512, 8), seed=seed)


def batch(device, rows=4, length=64, vocab=512):
    idx = torch.randint(0, vocab, (rows, length))
    return idx.to(device), idx.roll(-1, 1).to(device)


def loss_and_gradients(model, x, y, device, low: bool):
    model.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=low):
        _, loss = model(x, y)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten().double() for p in model.parameters()])


def exact_loss_and_gradients(model: GPT, x, y):
    """The same in float64 on the CPU, the loss written out (the model's own takes its logits in float32)."""
    model = model.double()
    seen = []
    model.transformer.ln_f.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(x)
    hidden = seen[0] if model.head_scale is None else seen[0] * model.head_scale
    weight = model.wte_table() if model.lm_head is None else model.lm_head.weight
    loss = F.cross_entropy((hidden @ weight.T).flatten(0, 1), y.flatten())
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def arms_for(toy: bool) -> list[str]:
    return ["bpe_untied", "kronecker_tied"] if toy else list(ARMS)


def loss_and_model(check, device, work, toy) -> None:
    for arm in arms_for(toy):
        x, y = batch("cpu")
        exact_loss, exact = exact_loss_and_gradients(small_model(arm), x, y)
        model = small_model(arm).to(device)
        for low, limit in ((False, 1e-4), (True, 3e-2)):
            loss, grads = loss_and_gradients(model, x.to(device), y.to(device), device, low)
            name = f"{arm}, {'bf16 autocast' if low else 'fp32'}"
            check(f"loss of {name}", error(loss.cpu(), exact_loss), limit / 10)
            check(f"gradient of {name}", error(grads.cpu(), exact), limit)
    ways = ["full", "chunked"] + (["liger"] if device.type == "cuda" and has("liger_kernel") else [])
    for way in ways:
        x, y = batch(device)
        exact_loss, exact = exact_loss_and_gradients(small_model("bpe_untied"), x.cpu(), y.cpu())
        loss, grads = loss_and_gradients(small_model("bpe_untied", loss=way).to(device), x, y, device, True)
        check(f"loss={way}, bf16: loss", error(loss.cpu(), exact_loss), 3e-3)
        check(f"loss={way}, bf16: gradient", error(grads.cpu(), exact), 3e-2)


def has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def attention(check, device, work, toy) -> None:
    """Every kernel that `attention` can choose, against float64; milliseconds are told, not judged."""
    if device.type != "cuda":
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, g = (torch.randn(32, 12, 1024, 64, device=device, dtype=torch.bfloat16) for _ in range(4))
    wide = [t[:2].double().requires_grad_() for t in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        exact = F.scaled_dot_product_attention(*wide, is_causal=True)
        exact.backward(g[:2].double())
    for name, kernels in (
        ("flash", [SDPBackend.FLASH_ATTENTION]),
        ("cudnn", [SDPBackend.CUDNN_ATTENTION]),
        ("auto", None),
    ):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        times = []
        for _ in range(12):
            for t in inputs:
                t.grad = None
            torch.cuda.synchronize()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            if kernels is None:
                out = F.scaled_dot_product_attention(*inputs, is_causal=True)
            else:
                with sdpa_kernel(kernels):
                    out = F.scaled_dot_product_attention(*inputs, is_causal=True)
            out.backward(g)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        check(f"attention {name}: output", error(out[:2], exact), 1e-2)
        for t, w, what in zip(inputs, wide, "qkv", strict=True):
            check(f"attention {name}: gradient of {what}", error(t.grad[:2], w.grad), 1e-2)
        print(
            f"      attention {name}: {sorted(times)[len(times) // 2]:.2f} ms forward and backward",
            flush=True,
        )


def determinism(check, device, work, toy) -> None:
    """Two backward passes of one batch differ nowhere."""
    torch.use_deterministic_algorithms(True)
    for arm in arms_for(toy):
        model = small_model(arm).to(device)
        x, y = batch(device)
        first, second = (loss_and_gradients(model, x, y, device, True) for _ in range(2))
        same = torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        check(f"deterministic mode, {arm}: passes that differ", 0.0 if same else 1.0, 0.0)


# ---- compile


def compiled(check, device, work, toy) -> None:
    """One graph without breaks (fullgraph raises where there is one), and the values of the plain model."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    cases = [(arm, "full") for arm in arms_for(toy)[toy:]] + [
        ("bpe_untied", "chunked"),
        ("kronecker_tied", "chunked"),
    ]
    for arm, way in cases:
        torch._dynamo.reset()
        model = small_model(arm, loss=way).to(device)
        x, y = batch(device)
        plain_loss, plain = loss_and_gradients(model, x, y, device, True)
        model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
        loss, grads = loss_and_gradients(model, x, y, device, True)
        check(f"compiled {arm}, loss={way}: loss", error(loss, plain_loss), 3e-3)
        check(f"compiled {arm}, loss={way}: gradient", error(grads, plain), 3e-2)


# ---- train.py itself


def tiny_data(folder: Path) -> Path:
    """Random words of 27 characters, 60,000 training tokens."""
    if not (folder / "meta.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        characters = list("\n abcdefghijklmnopqrstuvwxyz")
        rng = np.random.default_rng(0)
        words = ["".join(rng.choice(characters[2:], rng.integers(1, 7))) for _ in range(60)]
        text = " ".join(rng.choice(words, 20_000))
        tokens = np.array([characters.index(c) for c in text], np.uint16)
        write_shard(folder / "tiny_val_000000.bin", tokens[:4_000])
        write_shard(folder / "tiny_train_000001.bin", tokens[4_000:64_000])
        write_meta(folder, characters_meta("tiny", characters))
    return folder


TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "batch_size": 8, "global_batch_size": 16,
    "max_iters": 12, "eval_interval": 6, "eval_tokens": 2048, "log_interval": 1, "warmup_iters": 2,
    "learning_rate": 3e-3, "pos_dim": 4, "keep": 9,
}  # fmt: skip


def train_py(work: Path, out_dir: Path, device, **keys) -> None:
    keys = TINY | {"data_dir": tiny_data(work / "tiny"), "out_dir": out_dir, "device": device.type} | keys
    flags = [f"--{k}={v}" for k, v in keys.items()]
    done = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"train.py: {(done.stderr or done.stdout).strip().splitlines()[-1]}")


def losses(out_dir: Path) -> dict:
    rows = read_metrics(out_dir)
    return {(r["iter"], k): r[k] for r in rows for k in ("train/loss", "val/loss", "grad_norm") if k in r}


def resume(check, device, work, toy) -> None:
    """Cut at half and resumed, and trained twice: the same losses and weights to the last bit."""
    folder = work / "resume"
    shutil.rmtree(folder, ignore_errors=True)
    tiny_data(work / "tiny")
    cases = {"kronecker": False} if toy else {a: False for a in ARMS if a != "kronecker_rank_ngrams"}
    if device.type == "cuda":
        cases["kronecker, compiled"] = True

    def one(case: str) -> tuple[str, bool, bool]:
        arm, compiled = case.partition(",")[0], cases[case]
        name = case.replace(", ", "_")
        keys = ARMS[arm] | {"deterministic": True, "compile": compiled, "init_from": "auto"}
        whole, cut, again = (folder / f"{name}_{w}" for w in ("whole", "cut", "again"))
        train_py(work, whole, device, **keys)
        shutil.copytree(whole, cut)
        shutil.rmtree(cut / "ckpt" / "step_000012")
        for twin in (cut,) if toy else (cut, again):
            train_py(work, twin, device, **keys)
        at_end = [checkpoint.load(d / "ckpt" / "step_000012", with_optimizer=False)[0] for d in (whole, cut)]
        same = losses(cut) == losses(whole) and all(
            torch.equal(at_end[0][k], at_end[1][k]) for k in at_end[0]
        )
        return case, same, toy or losses(again) == losses(whole)

    with ThreadPoolExecutor(1 if toy else 5) as pool:
        for case, resumed, repeated in pool.map(one, cases):
            check(f"resume, deterministic, {case}: runs that differ", 0.0 if resumed else 1.0, 0.0)
            check(f"the same run twice, {case}: runs that differ", 0.0 if repeated else 1.0, 0.0)


def waits(check, device, work, toy) -> None:
    """Between two lines of the log the host never waits for the GPU: more steps, not one wait more."""
    if device.type != "cuda":
        return
    import configurator
    import train

    shutil.rmtree(work / "waits", ignore_errors=True)
    for arm in ("bpe_untied", "kronecker"):
        counts = {}
        for steps in (10, 20):
            keys = TINY | ARMS[arm] | {
                "data_dir": tiny_data(work / "tiny"), "out_dir": work / "waits" / f"{arm}_{steps}", "device": "cuda",
                "max_iters": steps, "eval_interval": 10**6, "log_interval": 10**6, "ckpt_interval": -1,
                "keep_best": False, "compile": True,
            }  # fmt: skip
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    train.main(configurator.load([f"--{k}={v}" for k, v in keys.items()], quiet=True))
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            counts[steps] = sum("synchroniz" in str(w.message).lower() for w in caught)
        check(f"waits for the GPU in a step, {arm}", (counts[20] - counts[10]) / 10, 0.0)


def gpu_tests(check, device, work, toy) -> None:
    """The tests that are marked as wanting a GPU."""
    if toy:  # which is itself run by a test
        return
    # only their files: others may want packages that are not here
    files = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print("      " + "\n      ".join(done.stdout.strip().splitlines()[-12:]), flush=True)
    check("tests marked gpu: exit status of pytest", float(done.returncode), 0.0)
