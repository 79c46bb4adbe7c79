"""Head and cross-entropy in one: the largest matmul of a small model, and the largest tensor of any.

`cross_entropy` chooses: in chunks on a CPU, full logits where a compiler fuses the rest, liger-kernel's fused kernel
where the model asks for it. The value is the same up to rounding.
"""

from collections.abc import Iterator

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

# Logits in float32 that are alive at a time; a GPU wants larger matmuls than a CPU's caches do.
CHUNK_BYTES = {"cpu": 128 << 20, "gpu": 2 << 30}
# A thread's part of them that is made float32 and a softmax at a time: it stays in a core's cache.
BLOCK_BYTES = 3 << 19


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """mean cross-entropy of x @ weight.T, with a bounded part of the logits alive at any time.

    The gradient with respect to a chunk's logits is known as soon as its softmax is, so both products of
    the backward pass are made in the forward one and the logits are dropped: less memory, and on a CPU, where
    all chunks share one buffer, less time too (logits_buffers). torch's own linear_cross_entropy (2.13) does the
    same, but took twice as long on a CPU as the plain form.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        n, vocab = targets.numel(), weight.size(0)
        x_low, weight_low = x.to(dtype), weight.to(dtype)
        grad_x = []
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # many chunks add up in it
        loss = x.new_zeros((), dtype=torch.float32)
        rows = -(-n // -(-n // chunk_rows(x.device.type, vocab)))  # chunks of one size
        buffers = logits_buffers(x_low, rows, vocab)
        for chunk, target in zip(x_low.split(rows), targets[:, None].split(rows), strict=True):
            if buffers is not None:
                p, at_target = logits_of(chunk, weight_low, buffers), []
                for part, full, of in blocks(p, target, buffers):
                    torch.softmax(full, dim=1, out=full)  # one pass; its log at the target is the loss
                    at_target.append(full.gather(1, of))
                    full.scatter_(1, of, at_target[-1] - 1)
                    part.copy_(full)
                p_target = torch.cat(at_target)
                if p_target.all():
                    loss -= p_target.log().sum()
                else:  # below 1e-38 the probability is 0, its logarithm is not
                    loss -= F.log_softmax(logits_of(chunk, weight_low).float(), dim=1).gather(1, target).sum()
            else:  # the same without a scatter, which a compiler makes one kernel of
                logits = logits_of(chunk, weight_low).float()
                log_norm = torch.logsumexp(logits, dim=1, keepdim=True)
                loss += (log_norm - logits.gather(1, target)).sum()
                hit = target == torch.arange(vocab, device=x.device)
                p = ((logits - log_norm).exp() - hit.float()).to(dtype)
            grad_x.append(p @ weight_low)
            if dtype == torch.float32:
                grad_weight.addmm_(p.t(), chunk)
            else:
                grad_weight += p.t() @ chunk
        ctx.save_for_backward(torch.cat(grad_x).to(x.dtype), grad_weight.to(weight.dtype))
        ctx.n = n
        return loss / n

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * (grad_loss / ctx.n), grad_weight * (grad_loss / ctx.n), None, None


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str, how: str = "auto") -> Tensor:
    """Cross-entropy in nats of x (N, n_embd) @ weight.T (V, n_embd) against targets (N,)."""
    if reduction == "mean" and torch.is_grad_enabled() and is_chunked(how, x.device.type):
        return ChunkedLinearCrossEntropy.apply(x, weight, targets, matmul_dtype(x))
    if torch.is_grad_enabled():  # one piece: the compiler fuses the rest on a GPU
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction=reduction)
    rows = min(chunk_rows(x.device.type, weight.size(0)), len(x))
    x, weight = x.to(matmul_dtype(x)), weight.to(matmul_dtype(x))
    buffers, losses = logits_buffers(x, rows, weight.size(0)), []
    for chunk, target in zip(x.split(rows), targets[:, None].split(rows), strict=True):
        for _, full, of in blocks(logits_of(chunk, weight, buffers), target, buffers):
            log_p = torch.log_softmax(full, dim=1, out=None if buffers is None else full)
            losses.append(-log_p.gather(1, of)[:, 0])
    return torch.cat(losses).mean() if reduction == "mean" else torch.cat(losses)


def logits_buffers(x: Tensor, rows: int, vocab_size: int) -> tuple[Tensor, Tensor | None] | None:
    """Memory in which a CPU makes the logits of one chunk after another: (rows, V) in x's format, and, where that is
    not float32, a block of fewer rows in it. To clear fresh memory page by page would take longer than the softmax.
    None where memory costs nothing or a compiler decides."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    low = x.new_empty(rows, vocab_size)
    if x.dtype == torch.float32:
        return low, None
    return low, x.new_empty(min(block_rows(vocab_size), rows), vocab_size, dtype=torch.float32)


def logits_of(x: Tensor, weight: Tensor, buffers: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
    """x (n, n_embd) @ weight.T in x's format, in the first n rows of the buffers if there are any."""
    return x @ weight.t() if buffers is None else torch.mm(x, weight.t(), out=buffers[0][: len(x)])


def blocks(logits: Tensor, target: Tensor, buffers: tuple | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows of logits, the same in float32, their targets), as many rows at a time as the buffers' block has; the first
    two are one tensor where the format is float32 anyway."""
    block = None if buffers is None else buffers[1]
    rows = len(logits) if block is None else len(block)
    for part, of in zip(logits.split(rows), target.split(rows), strict=True):
        yield part, part.float() if block is None else block[: len(part)].copy_(part), of


def chunk_rows(device_type: str, vocab_size: int) -> int:
    return max(1, CHUNK_BYTES["cpu" if device_type == "cpu" else "gpu"] // (4 * vocab_size))


def block_rows(vocab_size: int) -> int:
    return torch.get_num_threads() * max(1, BLOCK_BYTES // (4 * vocab_size))


def is_chunked(how: str, device_type: str) -> bool:
    return how == "chunked" or (how == "auto" and device_type == "cpu")


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What a matmul takes x in: autocast's format, or x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def liger_loss() -> nn.Module:
    """liger-kernel's fused head and cross-entropy, an optional extra for CUDA."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as e:
        raise ValueError(f"loss='liger' needs liger-kernel, transformers and a GPU ({e}): use auto") from None
    return LigerFusedLinearCrossEntropyLoss()


def logits_bytes(
    tokens: int, vocab_size: int, n_embd: int, how: str, device_type: str, width: int, compiled: bool = True
) -> int:
    """Peak bytes that head and loss of one micro-batch need beside the model's own, in a training step.

    width: bytes of a number in the matmuls. Full logits are there in float32 three times (log-probabilities and two
    gradients) or, compiled for a GPU, once, beside those in the matmuls' format. Chunks of them come in both formats (on
    a CPU only a block of each in float32), beside the weight and its gradient. liger-kernel halves its chunks until they are as small as x.
    """
    weight = vocab_size * n_embd
    if how == "liger":
        rows = 1 << (-(-tokens // -(-vocab_size // n_embd)) - 1).bit_length()
        return min(rows, tokens) * vocab_size * width + 4 * weight
    if not is_chunked(how, device_type):
        return tokens * vocab_size * (width + 4 if compiled and device_type != "cpu" else 12)
    rows = -(-tokens // -(-tokens // chunk_rows(device_type, vocab_size)))
    low = width if width < 4 else 0
    full = min(rows, block_rows(vocab_size)) if device_type == "cpu" and low else rows
    return (4 * full + low * rows) * vocab_size + weight * (4 + 2 * low)
