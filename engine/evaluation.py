"""Validation on a fixed list of windows, shared by the ranks."""

import math

import numpy as np
import torch
import torch.distributed as dist


def frequency_buckets(counts: np.ndarray) -> tuple[torch.Tensor, list[int]]:
    """(bucket int64 (V,) of each id, lowest training count of each bucket): 0, then powers of 4 to the most frequent."""
    powers = [4**k for k in range(32) if 4**k <= max(1, counts.max())]
    return torch.from_numpy(np.searchsorted(powers, counts, side="right")), [0, *powers]


@torch.no_grad()
def evaluate(model, windows, byte_lengths, batch_size: int, ranks, autocast, counts=None) -> dict[str, float]:
    """val/loss (nats a token), val/sem (its standard error over windows), val/bpb (bits per byte).

    windows: data.loader.ValWindows. byte_lengths: bytes of text behind each token id, 0 for special tokens, which
    bits per byte leaves out. Groups of batch_size windows go to the ranks in turn and their sums are added up in one
    order, so any number of ranks gets the same figure.

    counts int64 (V,), the ids' counts in training, adds the mean loss of the tokens in each bucket of frequency whose
    lowest count is N, unless it is empty: val/by_input/N by the token read, val/by_target/N by the token predicted,
    and their numbers val/n_input/N and val/n_target/N.
    """
    was_training = model.training
    model.eval()
    lengths = torch.zeros(model.config.vocab_size, dtype=torch.float64)
    lengths[: len(byte_lengths)] = torch.as_tensor(byte_lengths.astype(np.float64))
    lengths = lengths[: model.config.vocab_size]
    n = windows.n_windows
    # per window: mean loss, nats on targets that have bytes, bytes
    sums = torch.zeros(n, 3, dtype=torch.float64)
    if counts is not None:
        bucket, lowest = frequency_buckets(counts)
        by_frequency = torch.zeros(2, 2, len(lowest), dtype=torch.float64)  # (input, target) x (nats, tokens)
    for lo in range(ranks.rank * batch_size, n, ranks.world * batch_size):
        x, y = windows.rows(lo, min(n, lo + batch_size))
        with autocast:
            _, loss = model(x.to(ranks.device), y.to(ranks.device), reduction="none")
        nats = loss.cpu().double()
        n_bytes = lengths[y]
        columns = [nats.mean(1), (nats * (n_bytes > 0)).sum(1), n_bytes.sum(1)]
        sums[lo : lo + len(y)] = torch.stack(columns, dim=1)
        if counts is not None:
            for sums_2xK, ids in zip(by_frequency, (x, y), strict=True):
                of_token = bucket[ids.flatten()]
                sums_2xK[0] += torch.bincount(of_token, nats.flatten(), minlength=len(lowest))
                sums_2xK[1] += torch.bincount(of_token, minlength=len(lowest))
    if ranks.world > 1:
        dist.all_reduce(sums, group=ranks.group)  # each row is zero on all ranks but one
        if counts is not None:
            dist.all_reduce(by_frequency, group=ranks.group)
    model.train(was_training)
    loss, nats, n_bytes = sums[:, 0], sums[:, 1].sum().item(), sums[:, 2].sum().item()
    out = {"val/loss": loss.mean().item(), "val/sem": loss.std().item() / math.sqrt(n) if n > 1 else 0.0}
    if n_bytes:
        out["val/bpb"] = nats / math.log(2) / n_bytes
    if counts is not None:
        for side, (nats_K, tokens_K) in zip(("input", "target"), by_frequency.tolist(), strict=True):
            for low, nats, tokens in zip(lowest, nats_K, tokens_K, strict=True):
                if tokens:
                    out[f"val/by_{side}/{low}"], out[f"val/n_{side}/{low}"] = nats / tokens, int(tokens)
    return out


def line(row: dict) -> str:
    """The row of an evaluation for the terminal."""
    bpb = f", {row['val/bpb']:.4f} bits per byte" if "val/bpb" in row else ""
    return f"step {row['iter']:>6,}  val loss {row['val/loss']:.4f} +- {row['val/sem']:.4f}{bpb}"
