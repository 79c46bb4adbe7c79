"""The Kronecker codec (arXiv 2605.29459, section 3): the definition, and its moments in closed form.

A token with bytes b_1..b_L is the sum over positions p of onehot(b_p) (x) onehot(p), scaled by 1/sqrt(L) and
z-normalised over its D = char_dim * pos_dim entries. `kronecker_codec` writes that down densely, for tests;
`bag_coefficients` gives the two numbers a token of length L needs when the codec is never made dense (bag.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def codec_output_dim(char_dim: int = 256, pos_dim: int = 32) -> int:
    """D = char_dim * pos_dim, the width of the codec and the input width of the projection."""
    return char_dim * pos_dim


def kronecker_codec(
    byte_sequences: Tensor,
    lengths: Tensor,
    char_dim: int = 256,
    pos_dim: int = 32,
    length_normalize: bool = True,
    z_normalize: bool = True,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dense codec z of a batch of byte sequences.

    byte_sequences: integer (B, pos_dim), what lies past a row's length is ignored.
    lengths: integer (B,), 0 <= length <= pos_dim. A length of 0 gives a zero row.
    Returns (B, D) in `out_dtype` (`compute_dtype` when None); flat index = byte * pos_dim + position.
    Raises ValueError for a wrong shape, a length outside 0..pos_dim or a byte outside 0..char_dim-1.
    """
    check_buffers(byte_sequences, lengths, char_dim, pos_dim)
    bytes_BxP = byte_sequences.long()
    lengths_B = lengths.to(bytes_BxP.device).long()
    position_P = torch.arange(pos_dim, device=bytes_BxP.device)
    real_BxP = position_P < lengths_B[:, None]
    flat_BxP = (bytes_BxP * pos_dim + position_P).masked_fill(~real_BxP, 0)

    kappa_BxD = torch.zeros(len(bytes_BxP), char_dim * pos_dim, dtype=compute_dtype, device=bytes_BxP.device)
    kappa_BxD.scatter_add_(1, flat_BxP, real_BxP.to(compute_dtype))
    if length_normalize:
        kappa_BxD = kappa_BxD / lengths_B.clamp(min=1).to(compute_dtype).sqrt()[:, None]
    if z_normalize:
        mean_Bx1 = kappa_BxD.mean(dim=1, keepdim=True)
        std_Bx1 = kappa_BxD.std(dim=1, keepdim=True)  # the unbiased one
        kappa_BxD = (kappa_BxD - mean_Bx1) / (std_Bx1 + eps)
    return kappa_BxD if out_dtype is None else kappa_BxD.to(out_dtype)


def encode_single(
    byte_seq: bytes,
    char_dim: int = 256,
    pos_dim: int = 32,
    length_normalize: bool = True,
    z_normalize: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Dense codec (D,) float32 of one byte string; bytes past pos_dim are dropped."""
    kept = bytes(byte_seq[:pos_dim])
    bytes_1xP = torch.tensor([list(kept.ljust(pos_dim, b"\0"))], dtype=torch.uint8)
    z_1xD = kronecker_codec(
        bytes_1xP, torch.tensor([len(kept)]), char_dim, pos_dim, length_normalize, z_normalize, eps
    )
    return z_1xD[0]


def bag_coefficients(
    char_dim: int, pos_dim: int, length_normalize: bool = True, z_normalize: bool = True
) -> list[tuple[float, float]]:
    """For each length L = 0..pos_dim (scale, shift):  W z = scale * sum_p W[:, flat_p] - shift * W.sum(1).

    kappa has L entries equal to s (1/sqrt(L), or 1 without length_normalize) and D - L zeros, so that
    mean = s L / D and unbiased variance = s^2 L (1 - L/D) / (D - 1): both depend on L alone.
    """
    D = char_dim * pos_dim
    pairs = [(0.0, 0.0)]
    for L in range(1, pos_dim + 1):
        s = 1 / math.sqrt(L) if length_normalize else 1.0
        if not z_normalize:
            pairs.append((s, 0.0))
            continue
        std = s * math.sqrt(max(L * (1 - L / D), 0.0) / max(D - 1, 1))
        pairs.append((s / (std + 1e-6), s * L / D / (std + 1e-6)))
    return pairs


def check_buffers(byte_buffer: Tensor, length_buffer: Tensor, char_dim: int, pos_dim: int) -> None:
    """Raise ValueError, in one sentence, when bytes and lengths do not describe tokens of this codec."""
    if byte_buffer.dim() != 2 or byte_buffer.size(1) != pos_dim:
        shape = tuple(byte_buffer.shape)
        raise ValueError(f"the byte buffer must have shape (tokens, pos_dim={pos_dim}), but it has {shape}")
    if length_buffer.shape != byte_buffer.shape[:1]:
        shape = f"({len(byte_buffer)},), as the byte buffer has rows"
        raise ValueError(f"the length buffer must have shape {shape}, not {tuple(length_buffer.shape)}")
    if byte_buffer.is_floating_point() or length_buffer.is_floating_point():
        raise ValueError("the byte and length buffers must hold integers")
    if length_buffer.numel() == 0:
        return
    wrong = (length_buffer < 0) | (length_buffer > pos_dim)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"token {row} has length {int(length_buffer[row])}, outside 0..pos_dim={pos_dim}")
    real = torch.arange(pos_dim, device=byte_buffer.device) < length_buffer.to(byte_buffer.device)[:, None]
    # uint8 cannot be compared with 256 (it would wrap), hence a wider type; a byte is at most 255 whatever char_dim is
    highest, wide = min(char_dim, 256) - 1, byte_buffer.long()
    wrong = ((wide > highest) | (wide < 0)) & real
    if wrong.any():
        row, position = (int(i) for i in wrong.nonzero()[0])
        byte = int(byte_buffer[row, position])
        limit = f"char_dim-1={highest}: raise char_dim" if highest < 255 else "255: it is no byte"
        raise ValueError(f"token {row} has byte {byte} at {position}, outside 0..{limit}")
