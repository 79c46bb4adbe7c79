"""What the embedding's bench measures: ids and bytes, the three kinds of embedding, a step of each, and its peak memory."""

import contextlib
import ctypes
import importlib.util
import json
import lzma
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from kronecker import KroneckerEmbedding, build_byte_buffer

# "prepared" is kronecker with its plan made ahead, or its table kept
SIDES = ("kronecker", "prepared", "embedding", "reference")


class Corpus:
    """GPT-2 tokens of a text (.txt, .jsonl or .jsonl.xz) and the bytes of its ids; made up where there is no text."""

    def __init__(self, path: str | None):
        self.tokens = self.pieces = None
        if path is None:
            return
        import tiktoken

        encoding, tokens = tiktoken.get_encoding("gpt2"), []
        with (lzma.open if path.endswith(".xz") else open)(path, "rt", encoding="utf8") as lines:
            for line in lines:
                if ".jsonl" in path:
                    tokens.append(encoding.eot_token)
                    line = json.loads(line)["text"]
                tokens += encoding.encode_ordinary(line)
                if len(tokens) >= 400_000:
                    break
        self.tokens = np.array(tokens, dtype=np.int64)
        self.pieces = [encoding.decode_single_token_bytes(i) for i in range(50_257)]

    def buffers(self, V: int, pos_dim: int):
        """Byte buffers: the real bytes, repeated from the start where V is larger than the tokenizer; else random."""
        pieces = self.pieces
        if pieces is None:
            rng = np.random.default_rng(0)
            pieces = [
                rng.bytes(n) for n in np.minimum(rng.geometric(0.16, V), 40)
            ]  # mean about 6, as GPT-2's
        return build_byte_buffer([pieces[i % len(pieces)] for i in range(V)], pos_dim)

    def ids(self, kind: str, n: int, V: int) -> torch.Tensor:
        """n ids below V, int64: of the text's tokens, by a Zipf law where there is none, or uniformly drawn."""
        rng = np.random.default_rng(1)
        if kind == "uniform":
            return torch.from_numpy(rng.integers(0, V, n))
        if self.tokens is None:
            p = 1 / np.arange(1, V + 1)
            return torch.from_numpy(rng.choice(V, n, p=p / p.sum()))
        # a smaller vocabulary keeps the ids that it has: GPT-2's first ids are its most frequent pieces
        return torch.from_numpy(self.tokens[self.tokens < V][:n].copy())


def build(side: str, V: int, d: int, pos_dim: int, buffers, device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    if side == "embedding":
        return nn.Embedding(V, d, device=device, dtype=dtype)
    make, options = KroneckerEmbedding, {"mode": "cached"} if side == "prepared" else {}
    if side == "reference":
        from kronecker_embeddings import KroneckerEmbedding as make
    module = make(V, d, pos_dim=pos_dim, byte_buffer=buffers[0], length_buffer=buffers[1], **options)
    return module.to(device=device, dtype=dtype)


def step(module: nn.Module, ids: torch.Tensor, g: torch.Tensor | None) -> None:
    """A training step up to the weight's gradient, given the output's, or with a loss where g is None."""
    module.zero_grad(set_to_none=True)
    out = module(ids)
    out.square().mean().backward() if g is None else out.backward(g)


def loss_alone(out: torch.Tensor) -> None:
    """The part of a step with a loss that every side pays; out: what an embedding gave, as a leaf."""
    torch.autograd.grad(out.square().mean(), out)


@torch.no_grad()
def forward(module: nn.Module, ids: torch.Tensor) -> None:
    module(ids)


def sides_for(n: int, d: int, D: int, args, most_flop: float = 2.1e11) -> tuple[list[str], str]:
    """(the sides that can run, why the reference cannot). It keeps six (n, D) float32 tensors, and multiplies 6 n D d."""
    gb, flop = 6 * 4 * n * D / 1e9, 6 * n * D * d
    if importlib.util.find_spec("kronecker_embeddings") is None:
        return list(SIDES[:-1]), "kronecker-embeddings is not installed"
    if gb > args.reference_gb or (args.device == "cpu" and flop > most_flop):
        return list(SIDES[:-1]), f"it needs about {gb:.0f} GB and {flop / 1e12:.1f} TFLOP a step"
    return list(SIDES), ""


# ---- peak memory: one side alone ----


def memory_of_side(side: str, V: int, d: int, pos_dim: int, n: int, corpus: Corpus, args) -> dict[str, int]:
    """Bytes: the peak of one step above what stood before it, what of it is neither output nor gradient, and all that
    the module holds at that moment. In a process of its own."""
    torch.set_num_threads(1)
    with contextlib.suppress(OSError, AttributeError):  # another libc than glibc
        # a fixed threshold makes malloc give every large block back at once, so that RSS counts what is alive
        ctypes.CDLL(None).mallopt(-3, 131_072)
    dtype = getattr(torch, args.dtype)
    module = build(side, V, d, pos_dim, corpus.buffers(V, pos_dim), args.device, dtype)
    ids = corpus.ids("text", n, V).to(args.device)
    g = torch.ones(n, d, device=args.device, dtype=dtype)
    step(module, ids[:8], g[:8])  # libraries and thread pools come up here
    module.zero_grad(set_to_none=True)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(module, ids, g)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        step(module, ids, g)
        peak = resident_bytes("VmHWM") - before
    extra = max(peak - g.numel() * g.element_size() - weights, 0)
    buffers = module.buffer_bytes() if isinstance(module, KroneckerEmbedding) else 0
    return {"step": peak, "extra": extra, "all": weights + buffers + peak}


def resident_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def peak_memory(side: str, *what) -> dict[str, int] | None:
    """memory_of_side in a fresh process, forked from one that has only imported; None where it cannot be measured."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "matplotlib.pyplot"])
    with context.Pool(1) as pool:
        try:
            return pool.apply(memory_of_side, (side, *what))
        except (OSError, RuntimeError, StopIteration) as error:
            print(f"  peak memory of {side} not measured: {error}", file=sys.stderr)
    return None
