"""What a step costs: FLOPs from the model's structure, the device's peak, and memory before it is taken."""

import math
import os
import re

import torch

from engine.errors import RunError
from engine.loss import logits_bytes

# Dense bf16 TFLOP/s by the vendors' data sheets, without sparsity; the first whose words stand in the name.
PEAK_TFLOPS = {
    "H200 NVL": 836,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 836,
    "H100": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
}

# Words in the names of GPUs that are slower or faster than those they are named after.
OTHERS = "Laptop|Ti|D|SUPER|MIG"

CONVENTION = "6N + 12*L*C*T FLOPs a token; N = weights of the matmuls, head included; attention without the causal half"


def flops_per_token(config) -> int:
    """Matmul FLOPs of forward and backward for one token, by CONVENTION (PaLM, appendix B).

    The input side counts nothing: a lookup is no matmul, and neither is the codec's weighted bag of rows.
    """
    c, layers = config.n_embd, config.n_layer
    matmul_weights = layers * 12 * c * c + config.vocab_size * c
    return 6 * matmul_weights + 12 * layers * c * config.block_size


def peak_flops(device: torch.device) -> tuple[float, str] | None:
    """(FLOP/s, name) of the device; None where it is unknown, and then no MFU is shown.

    KNG_PEAK_TFLOPS states the peak of a device that is not in the list.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if "KNG_PEAK_TFLOPS" in os.environ:
        stated = os.environ["KNG_PEAK_TFLOPS"]
        try:
            tflops = float(stated)
        except ValueError:
            tflops = 0.0
        if not 0 < tflops < math.inf:
            raise RunError(f"KNG_PEAK_TFLOPS={stated!r} is no peak: give the device's TFLOP/s, above 0")
        return tflops * 1e12, name
    if re.search(rf"\b(?:{OTHERS})\b", name):
        return None
    known = (tflops for part, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name))
    return next(((tflops * 1e12, name) for tflops in known), None)


def memory_estimate(
    config,
    params: dict[str, int],
    micro_batch: int,
    low_precision: bool,
    device_type: str,
    world: int = 1,
    compiled: bool = True,
) -> dict[str, float]:
    """GB (10^9 bytes) a rank needs: weights, gradients and AdamW's moments in fp32, and saved activations. With several
    ranks DDP holds a second copy of the gradients.

    About 16 tensors of (tokens, C) a block are kept for the backward pass, beside what the loss takes for logits.
    """
    width = 2 if low_precision else 4
    tokens = micro_batch * config.block_size
    state = (16 if world == 1 else 20) * params["total"]
    activations = tokens * config.n_layer * 16 * config.n_embd * width
    logits = logits_bytes(tokens, config.vocab_size, config.n_embd, config.loss, device_type, width, compiled)
    return {"state": state / 1e9, "activations": activations / 1e9, "logits": logits / 1e9}
