"""The optional regulariser on the projection's row distribution (section 3.4 of the paper).

The text at hand names only a "self-entropy of the projection's row distribution", so this is the formula chosen
here. The d_model rows w_i of the projection share its energy as p_i = ||w_i||^2 / sum_j ||w_j||^2, and

    R(W) = 1 - H(p) / ln d_model,    H(p) = -sum_i p_i ln p_i

is 0 when all rows have the same norm and 1 when a single output dimension holds everything. It is off unless a
training loop adds it: loss = loss + strength * row_entropy_penalty(embedding.projection.weight).
"""

import math

import torch
from torch import Tensor


def row_entropy_penalty(weight_MxD: Tensor) -> Tensor:
    """R(W), a scalar in [0, 1] in float32 (float64 for float64 weights), differentiable."""
    if weight_MxD.dim() != 2 or weight_MxD.size(0) < 2:
        raise ValueError(
            f"the projection needs at least two rows, but its shape is {tuple(weight_MxD.shape)}"
        )
    dtype = torch.float64 if weight_MxD.dtype == torch.float64 else torch.float32
    energy_M = weight_MxD.to(dtype).square().sum(1)
    p_M = energy_M / energy_M.sum().clamp(min=torch.finfo(dtype).tiny)
    return 1 - torch.special.entr(p_M).sum() / math.log(len(p_M))
