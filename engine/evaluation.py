"""Validation on a fixed list of windows, shared by the ranks."""

import math

import numpy as np
import torch
import torch.distributed as dist


@torch.no_grad()
def evaluate(model, windows, byte_lengths: np.ndarray, batch_size: int, ranks, autocast) -> dict[str, float]:
    """val/loss (nats a token), val/sem (its standard error over windows), val/bpb (bits per byte).

    windows: data.loader.ValWindows. byte_lengths: bytes of text behind each token id, 0 for special tokens,
    whose loss bits per byte leaves out, as nanochat does. Groups of batch_size windows go to the ranks in
    turn and their sums are added up in one order, so any number of ranks gets the same figure.
    """
    was_training = model.training
    model.eval()
    lengths = torch.zeros(model.config.vocab_size, dtype=torch.float64)
    lengths[: len(byte_lengths)] = torch.as_tensor(byte_lengths.astype(np.float64))
    lengths = lengths[: model.config.vocab_size]
    n = windows.n_windows
    # per window: mean loss, nats on targets that have bytes, bytes
    sums = torch.zeros(n, 3, dtype=torch.float64)
    for lo in range(ranks.rank * batch_size, n, ranks.world * batch_size):
        x, y = windows.rows(lo, min(n, lo + batch_size))
        with autocast:
            _, loss = model(x.to(ranks.device), y.to(ranks.device), reduction="none")
        nats = (
            loss.view(y.shape).double().cpu()
            if ranks.device.type != "mps"
            else loss.view(y.shape).cpu().double()
        )
        n_bytes = lengths[y]
        sums[lo : lo + len(y)] = torch.stack(
            [nats.mean(1), (nats * (n_bytes > 0)).sum(1), n_bytes.sum(1)], dim=1
        )
    if ranks.world > 1:
        dist.all_reduce(sums, group=ranks.group)  # each row is zero on all ranks but one
    model.train(was_training)
    loss, nats, n_bytes = sums[:, 0], sums[:, 1].sum().item(), sums[:, 2].sum().item()
    out = {"val/loss": loss.mean().item(), "val/sem": loss.std().item() / math.sqrt(n) if n > 1 else 0.0}
    if n_bytes:
        out["val/bpb"] = nats / math.log(2) / n_bytes
    return out
