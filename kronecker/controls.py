"""Controls: what else could explain a gain of the byte codec over a learned table.

- `LowRankEmbedding` and `HashEmbedding` save as many parameters as the codec does, without any bytes. Each has
  nn.Embedding's contract, and a function that finds its size within a budget of parameters.
- `permute_bytes` deals the tokens' byte strings out anew, so that the codec stays a fixed code of the same
  statistics, but its bytes are no longer the token's own.

What is fixed at random here (who gets which string, which rows a token hashes to) comes from `splitmix64`,
which is integer arithmetic and so the same on every machine and with every version of NumPy and torch.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kronecker.embedding import GeneratorFor, draw


class LowRankEmbedding(nn.Module):
    """A factorised table u @ v: ids (...) -> embeddings (..., d_model). ALBERT (arXiv 1909.11942), section 3.1.

    Parameters: u (vocab_size, rank) and v (rank, d_model), so rank * (vocab_size + d_model) numbers.
    init_rms: RMS of the embeddings at the start. u starts as a learned table would, from N(0, init_rms^2), and v as
        a projection that keeps the scale of what it is given, from N(0, 1/rank).
    Raises ValueError for a rank below 1.
    """

    def __init__(self, vocab_size: int, d_model: int, rank: int, init_rms: float = 0.02):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank is {rank}, but a factorised table needs at least 1")
        self.num_embeddings, self.embedding_dim = vocab_size, d_model
        self.rank, self.init_rms = rank, init_rms
        self.u = nn.Parameter(torch.empty(vocab_size, rank))
        self.v = nn.Parameter(torch.empty(rank, d_model))
        self.reset_parameters()

    def init_std(self) -> dict[str, float]:
        """Standard deviation that each parameter is drawn with, by name."""
        return {"u": self.init_rms, "v": self.rank**-0.5}

    def reset_parameters(self, generator_for: GeneratorFor | None = None) -> None:
        """Draw the parameters anew, each from the generator that generator_for(its name) gives, if given."""
        draw(self, self.init_std(), generator_for)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (*ids.shape, d_model); ids as nn.Embedding takes them."""
        return F.embedding(ids, self.u) @ self.v

    def table(self) -> Tensor:
        """The whole table (vocab_size, d_model), differentiable."""
        return self.u @ self.v

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


class HashEmbedding(nn.Module):
    """Each token is a weighted sum of k shared rows that hashes choose: ids (...) -> embeddings (..., d_model).

        e(t) = sum_i weights[t, i] * rows[h_i(t)],   i < k = n_hashes          (arXiv 1709.03933, section 2)

    Parameters: rows (buckets, d_model) and weights (vocab_size, n_hashes), so buckets * d_model +
    vocab_size * n_hashes numbers. Tokens that share rows are told apart by their weights.

    The hashes are fixed by `seed` (`hash_rows`), never learned or saved; the k rows of a token are different ones.
    init_rms: RMS of the embeddings at the start. The weights start at 1, so that the start is the plain
        hashing trick, and the rows from N(0, init_rms^2 / k).
    Raises ValueError for fewer rows than hashes, or no hash.
    """

    def __init__(self, vocab_size: int, d_model: int, buckets: int, n_hashes=2, init_rms=0.02, seed=0):
        super().__init__()
        if n_hashes < 1 or buckets < n_hashes:
            raise ValueError(f"{buckets} rows, {n_hashes} hashes: there must be a hash, and a row for each")
        self.num_embeddings, self.embedding_dim = vocab_size, d_model
        self.buckets, self.n_hashes, self.init_rms, self.seed = buckets, n_hashes, init_rms, seed
        self.rows = nn.Parameter(torch.empty(buckets, d_model))
        self.weights = nn.Parameter(torch.empty(vocab_size, n_hashes))
        # A plain attribute that follows the parameters' device: as a buffer it would be lost by to_empty().
        self._hashed_Vxk = torch.from_numpy(hash_rows(vocab_size, buckets, n_hashes, seed))
        self.reset_parameters()

    def init_std(self) -> dict[str, float]:
        """Standard deviation that each parameter is drawn with, by name; the weights are constant, 1."""
        return {"rows": self.init_rms * self.n_hashes**-0.5}

    def reset_parameters(self, generator_for: GeneratorFor | None = None) -> None:
        """Draw the rows anew, from the generator that generator_for("rows") gives, if given; weights to 1."""
        draw(self, self.init_std(), generator_for)
        nn.init.ones_(self.weights)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (*ids.shape, d_model); ids as nn.Embedding takes them."""
        weights = F.embedding(ids, self.weights)
        return self._sum(F.embedding(ids, self._hashed_Vxk), weights).view(*ids.shape, self.embedding_dim)

    def table(self) -> Tensor:
        """The whole table (vocab_size, d_model), differentiable."""
        return self._sum(self._hashed_Vxk, self.weights)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rows={self.buckets}, n_hashes={self.n_hashes}"

    def _sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        rows_Nxk, weights_Nxk = rows.reshape(-1, self.n_hashes), weights.reshape(-1, self.n_hashes)
        return F.embedding_bag(rows_Nxk, self.rows, per_sample_weights=weights_Nxk, mode="sum")

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.rows.device.type != "meta":
            self._hashed_Vxk = self._hashed_Vxk.to(self.rows.device)
        return self


def lowrank_rank(vocab_size: int, d_model: int, budget: int) -> int:
    """The largest rank of a LowRankEmbedding of at most `budget` parameters; ValueError where there is none."""
    rank = budget // (vocab_size + d_model)
    if rank < 1:
        raise ValueError(f"{budget:,} parameters are too few for a table of rank 1: {vocab_size + d_model:,}")
    return rank


def hash_buckets(vocab_size: int, d_model: int, budget: int, n_hashes: int = 2) -> int:
    """The most rows of a HashEmbedding of at most `budget` parameters; ValueError where there are too few."""
    buckets = (budget - vocab_size * n_hashes) // d_model
    if buckets < n_hashes:
        raise ValueError(
            f"{budget:,} parameters do not pay for a hash embedding: {n_hashes} rows and the tokens' weights "
            f"take {n_hashes * (d_model + vocab_size):,}"
        )
    return buckets


def hash_rows(vocab_size: int, buckets: int, n_hashes: int, seed: int) -> np.ndarray:
    """Rows int64 (vocab_size, n_hashes) of each token, 0..buckets-1 and different from one another.

    Number t * n_hashes + i of splitmix64(seed) chooses the i-th row of token t among the buckets - i that its
    earlier rows have left. (The modulus prefers some rows by less than buckets / 2^64.)
    """
    random_Vxk = splitmix64(seed, vocab_size * n_hashes).reshape(vocab_size, n_hashes)
    rows_Vxk = np.empty((vocab_size, n_hashes), dtype=np.int64)
    for i in range(n_hashes):
        row_V = (random_Vxk[:, i] % np.uint64(buckets - i)).astype(np.int64)
        for taken_V in np.sort(rows_Vxk[:, :i], axis=1).T:  # ascending: each shifts what lies above it
            row_V += row_V >= taken_V
        rows_Vxk[:, i] = row_V
    return rows_Vxk


def permute_bytes(byte_buffer_VxP: Tensor, length_buffer_V: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Buffers (as build_byte_buffer makes them) whose byte strings are dealt out anew among tokens of equal length.

    Equal in the buffers: what is longer than pos_dim has length pos_dim. Within a length every dealing is equally
    likely: its k-th token gets the string of the token with the k-th smallest number in splitmix64(seed).
    """
    lengths_V = length_buffer_V.cpu().numpy()
    key_V = splitmix64(seed, len(lengths_V))
    source_V = np.empty(len(lengths_V), dtype=np.int64)
    # tokens by length, once in the order of their ids and once in that of their keys, which never tie
    source_V[np.argsort(lengths_V, kind="stable")] = np.lexsort((key_V, lengths_V))
    source = torch.from_numpy(source_V).to(byte_buffer_VxP.device)
    return byte_buffer_VxP[source], length_buffer_V.clone()


def splitmix64(seed: int, n: int) -> np.ndarray:
    """The first n numbers (n,) uint64 of the SplitMix64 generator (Steele, Lea, Flood 2014), all different."""
    state_n = np.uint64(seed % 2**64) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z_n = (state_n ^ (state_n >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z_n = (z_n ^ (z_n >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z_n ^ (z_n >> np.uint64(31))
