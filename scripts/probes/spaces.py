"""Cosines between tokens in two spaces: the rows of a matrix, and the codec's vectors, which are never built."""

import math

import numpy as np
import torch

from kronecker.codec import bag_coefficients

POS_DIM = 32


class TableSpace:
    """Centred unit rows of a matrix; `ids` are the rows that count (those with a token)."""

    def __init__(self, table: torch.Tensor, ids: np.ndarray):
        rows = [
            table[torch.from_numpy(part)].float() for part in np.array_split(ids, math.ceil(len(ids) / 16384))
        ]
        self.mean = sum(r.sum(0, dtype=torch.float64) for r in rows) / len(ids)
        self.rows = torch.cat([torch.nn.functional.normalize(r - self.mean.float(), dim=1) for r in rows])

    def against_all(self, k: np.ndarray) -> np.ndarray:
        """Cosines (len(k), n) of rows k with all rows."""
        return (self.rows[k] @ self.rows.T).numpy()

    def pairs(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return (self.rows[i] * self.rows[j]).sum(1).numpy()


class CodecSpace:
    """The same cosines for z, the codec's z-normalised vector of 256 * pos_dim numbers, which is never built.

    z has exactly L equal spikes on a constant floor, so an inner product needs only the number of
    (byte, position) cells that two tokens share, and centring needs only the vocabulary's mean vector.
    """

    def __init__(self, tokens: list[bytes], pos_dim: int = POS_DIM):
        kept = [t[:pos_dim] for t in tokens]
        self.pos_dim, self.d = pos_dim, 256 * pos_dim
        self.length = np.array([len(t) for t in kept], dtype=np.float64)
        # byte + 1, 0 = past the end: two pads must not count as a shared cell
        self.cells = np.zeros((len(kept), pos_dim), dtype=np.int16)
        for row, t in enumerate(kept):
            self.cells[row, : len(t)] = np.frombuffer(t, dtype=np.uint8).astype(np.int16) + 1
        self.coefficients = np.array(bag_coefficients(256, pos_dim))  # by length: (scale, shift)
        self.spike, self.floor = self.levels(self.length)
        position = np.arange(pos_dim)
        mean = np.full(self.d, self.floor.mean())
        at, where = np.nonzero(self.cells)
        np.add.at(mean, (self.cells[at, where] - 1) * pos_dim + where, self.spike[at] / len(kept))
        self.mean, self.mean_sum, self.mean_sq = mean, mean.sum(), mean @ mean
        flat = np.where(self.cells > 0, (self.cells - 1) * pos_dim + position, 0)
        self.with_mean = self.floor * self.mean_sum + self.spike * np.where(
            self.cells > 0, mean[flat], 0
        ).sum(1)
        self.norm = np.sqrt(
            np.maximum(self.dot(self.length, self.length, self.length, self.with_mean, self.with_mean), 1e-12)
        )

    def levels(self, length):
        """Height of a spike above the floor, and the floor, of tokens of these lengths."""
        scale, shift = self.coefficients[np.asarray(length, dtype=int)].T
        return scale, -shift

    def dot(self, shared, length_a, length_b, mean_a, mean_b):
        """Centred inner product of tokens that share `shared` cells."""
        spike_a, floor_a = self.levels(length_a)
        spike_b, floor_b = self.levels(length_b)
        plain = (
            spike_a * spike_b * shared
            + floor_a * spike_b * length_b
            + floor_b * spike_a * length_a
            + floor_a * floor_b * self.d
        )
        return plain - mean_a - mean_b + self.mean_sq

    def pairs(self, i, j):
        shared = ((self.cells[i] == self.cells[j]) & (self.cells[i] > 0)).sum(1)
        dots = self.dot(shared, self.length[i], self.length[j], self.with_mean[i], self.with_mean[j])
        return dots / (self.norm[i] * self.norm[j])

    def against_all(self, k):
        return np.stack(
            [self.pairs(np.full(len(self.length), row), np.arange(len(self.length))) for row in k]
        )
