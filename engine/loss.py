"""Head and cross-entropy in one: the largest matmul of a small model, and the largest tensor of any.

`cross_entropy` chooses: in chunks on a CPU, full logits where a compiler fuses the rest, liger-kernel's fused kernel
where the model asks for it. The value is the same up to rounding.
"""

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

# Logits in float32 that are alive at a time; a GPU wants larger matmuls than a CPU's caches do.
CHUNK_BYTES = {"cpu": 128 << 20, "gpu": 2 << 30}


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """mean cross-entropy of x @ weight.T, with a bounded part of the logits alive at any time.

    The gradient with respect to a chunk's logits is known as soon as its softmax is, so both products of
    the backward pass are made in the forward one and the logits are dropped: less memory, and on a CPU, where
    all chunks share one buffer, less time too (logits_buffer). torch's own linear_cross_entropy (2.13) does the
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
            logits = logits_of(chunk, weight_low, buffers)
            if buffers is not None:
                p = torch.softmax(logits, dim=1, out=logits)  # one pass; its log at the target is the loss
                p_target = p.gather(1, target)
                if p_target.all():
                    loss -= p_target.log().sum()
                else:  # below 1e-38 the probability is 0, its logarithm is not
                    loss -= F.log_softmax(logits_of(chunk, weight_low), dim=1).gather(1, target).sum()
                p.scatter_(1, target, p_target - 1)
            else:  # the same without a scatter, which a compiler makes one kernel of
                log_norm = torch.logsumexp(logits, dim=1, keepdim=True)
                loss += (log_norm - logits.gather(1, target)).sum()
                hit = target == torch.arange(vocab, device=x.device)
                p = (logits - log_norm).exp() - hit.float()
            p = p.to(dtype) if buffers is None else in_format(p, buffers[1])
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
        logits = logits_of(chunk, weight, buffers)
        log_p = torch.log_softmax(logits, dim=1, out=None if buffers is None else logits)
        losses.append(-log_p.gather(1, target)[:, 0])
    return torch.cat(losses).mean() if reduction == "mean" else torch.cat(losses)


def logits_buffers(x: Tensor, rows: int, vocab_size: int) -> tuple[Tensor, Tensor] | None:
    """Memory (rows, V) in float32 and in x's format (one and the same where that is float32), in which a CPU makes the
    logits of one chunk after another: it has to clear fresh memory page by page, which takes longer than the softmax.
    None where memory costs nothing or a compiler decides."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    full = x.new_empty(rows, vocab_size, dtype=torch.float32)
    return full, full if x.dtype == full.dtype else x.new_empty(rows, vocab_size)


def logits_of(x: Tensor, weight: Tensor, buffers: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x (n, n_embd) @ weight.T in float32, in the first n rows of the buffers if there are any."""
    if buffers is None:
        return (x @ weight.t()).float()
    full, low = buffers
    return in_format(torch.mm(x, weight.t(), out=low[: len(x)]), full)


def in_format(x: Tensor, buffer: Tensor) -> Tensor:
    """x in the format of a buffer with as many rows or more: copied into it, unless it has the format already."""
    return x if x.dtype == buffer.dtype else buffer[: len(x)].copy_(x)


def chunk_rows(device_type: str, vocab_size: int) -> int:
    return max(1, CHUNK_BYTES["cpu" if device_type == "cpu" else "gpu"] // (4 * vocab_size))


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


def logits_bytes(tokens: int, vocab_size: int, n_embd: int, how: str, device_type: str, width: int) -> int:
    """Peak bytes that head and loss of one micro-batch need beside the model's own, in a training step.

    width: bytes of a number in the matmuls. Full logits are there in float32 three times (log-probabilities and two
    gradients) or, compiled for a GPU, once, beside those in the matmuls' format. Chunks of them come in both formats,
    beside the weight and its gradient. liger-kernel halves its chunks until they are as small as x.
    """
    weight = vocab_size * n_embd
    if how == "liger":
        rows = 1 << (-(-tokens // -(-vocab_size // n_embd)) - 1).bit_length()
        return min(rows, tokens) * vocab_size * width + 4 * weight
    if not is_chunked(how, device_type):
        return tokens * vocab_size * (12 if device_type == "cpu" else width + 4)
    rows = -(-tokens // -(-tokens // chunk_rows(device_type, vocab_size)))
    low = width if width < 4 else 0
    return rows * vocab_size * (4 + low) + weight * (4 + 2 * low)
