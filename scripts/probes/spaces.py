"""Cosines between tokens in two spaces: the rows of a matrix, and the codec's vectors, which are never built."""

import math

import numpy as np
import torch
from scipy import sparse

from kronecker.codec import bag_coefficients

POS_DIM = 32


class TableSpace:
    """Centred unit rows of a matrix; `ids` are the rows that count (those with a token)."""

    def __init__(self, table: torch.Tensor, ids: np.ndarray):
        parts = np.array_split(ids, math.ceil(len(ids) / 16384))
        rows = [table[torch.from_numpy(part)].float() for part in parts]
        mean = (sum(r.sum(0, dtype=torch.float64) for r in rows) / len(ids)).float()
        self.rows = torch.cat([torch.nn.functional.normalize(r - mean, dim=1) for r in rows])

    def against_all(self, k: np.ndarray) -> np.ndarray:
        """Cosines (len(k), n) of rows k with all rows."""
        return (self.rows[k] @ self.rows.T).numpy()

    def pairs(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Cosines (len(i),) of rows i with rows j."""
        return (self.rows[i] * self.rows[j]).sum(1).numpy()


class CodecSpace:
    """The same cosines for z, the codec's z-normalised vector of D = 256 * POS_DIM numbers.

    z is a few equal spikes on a constant floor, z = s + f 1. With m the mean of all z,
    <z - m, z' - m> = <s, s'> + f <1, s'> + (<1, s> + f D) f' - <m, z> - <m, z'> + <m, m>,
    a product of sparse rows that have four columns more.
    """

    def __init__(self, tokens: list[bytes]):
        kept = [t[:POS_DIM] for t in tokens]
        length = np.array([len(t) for t in kept])
        ends, codes = np.cumsum(length), np.frombuffer(b"".join(kept), dtype=np.uint8).astype(np.int64)
        cells = codes * POS_DIM + np.arange(len(codes)) - np.repeat(ends - length, length)
        spike, shift = np.array(bag_coefficients(256, POS_DIM))[length].T
        shape = len(kept), 256 * POS_DIM
        s = sparse.csr_array((np.repeat(spike, length), cells, np.append(0, ends)), shape=shape)
        floor, total, one = -shift, s.sum(1), np.ones(len(kept))
        mean = s.mean(0) + floor.mean()
        along = s @ mean + floor * mean.sum()  # <m, z>
        left = floor, total + floor * shape[1], mean @ mean - along, -one
        self.left = sparse.hstack([s, np.stack(left, 1)], format="csr")
        self.right = sparse.hstack([s, np.stack((total, floor, one, along), 1)], format="csr")
        self.norm = np.sqrt(np.maximum((self.left * self.right).sum(1), 1e-12))

    def against_all(self, k: np.ndarray) -> np.ndarray:
        dots = (self.left[k] @ self.right.T).toarray()
        return dots / (self.norm[k, None] * self.norm)

    def pairs(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return (self.left[i] * self.right[j]).sum(1) / (self.norm[i] * self.norm[j])
