"""The linear layer of a model that generates, one position of each row at a time."""

import math

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F


class Linear(nn.Linear):
    """nn.Linear, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (B, T, K), weight (N, K), bias (N) -> (B, T, N).

    With one position a row, as in generation, time goes into reading the weight, and on a CPU torch reads it with one
    thread. Cut into a piece for each thread it is read by all of them: about twice as fast with two.
    """
    B, T, K = x.shape
    usual = T > 1 or x.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    pieces = 1 if usual or torch.compiler.is_compiling() else math.gcd(len(weight), torch.get_num_threads())
    if pieces == 1:
        return F.linear(x, weight, bias)
    y_PxBxN = torch.bmm(x.view(1, B, K).expand(pieces, B, K), weight.view(pieces, -1, K).mT)
    y = y_PxBxN.transpose(0, 1).reshape(B, 1, -1)
    return y if bias is None else y + bias
