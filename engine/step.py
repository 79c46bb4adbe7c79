"""The optimiser's step, which a loss or gradient that is not finite cannot spoil."""

import hashlib
import sys

import torch


def make_optimizer(model, config, device_type: str) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors do not; input side and head may have a learning rate and a decay of their own.

    The input side is `wte`, which a tied head shares.
    """
    groups = {}
    for name, p in model.named_parameters():
        mult, decay = 1.0, config.weight_decay
        if name.startswith("transformer.wte."):
            mult = config.wte_lr_mult
            decay = decay if config.wte_weight_decay == -1 else config.wte_weight_decay
        elif name.startswith("lm_head."):
            mult = config.head_lr_mult
        groups.setdefault((mult, decay if p.dim() >= 2 else 0.0), []).append(p)
    return torch.optim.AdamW(
        [{"params": ps, "lr_mult": mult, "weight_decay": decay} for (mult, decay), ps in groups.items()],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=device_type in ("cuda", "cpu"),
    )


class GuardedStep:
    """Steps of AdamW: the gradient is clipped, and a step whose loss or gradient is not finite is skipped.

    The host never has to look: AdamW's fused kernel reads `found_inf` on the device itself, and divides by
    `grad_scale`, which serves for clipping too. float16 losses are scaled; the scale is halved by an overflow
    and doubled after 2,000 good steps. state: what `state_dict` gave, or {} at the start.
    """

    def __init__(self, model, optimizer, config, device: torch.device, state: dict):
        self.parameters, self.optimizer = list(model.parameters()), optimizer
        self.grad_clip, self.half = config.grad_clip, config.dtype == "float16"
        self.fused = device.type in ("cuda", "cpu")
        first = {"skipped": 0, "streak": 0, "good": 0, "loss_scale": 65536.0 if self.half else 1.0}
        kept = {k: torch.tensor(state.get(k, v), device=device) for k, v in first.items()}
        self.skipped, self.streak, self.good, self.loss_scale = kept.values()

    def step(self, loss: torch.Tensor) -> torch.Tensor:
        """Take the step of the gradients of `loss` (its mean over ranks and micro-batches); the gradient's norm."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) / self.loss_scale
        bad = ~(norm.isfinite() & loss.isfinite())
        clip = (norm / self.grad_clip).clamp(min=1) if self.grad_clip else 1
        divisor = self.loss_scale * clip
        if self.fused:
            self.optimizer.found_inf, self.optimizer.grad_scale = bad.float(), divisor.float()
            self.optimizer.step()
        elif not bad:  # no fused kernel that reads these here
            torch._foreach_div_(grads, divisor)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += bad
        self.streak = (self.streak + 1) * bad
        if self.half:
            self.good = (self.good + 1) * ~bad
            grown = torch.where(self.good % 2000 == 1999, self.loss_scale * 2, self.loss_scale)
            self.loss_scale = torch.where(bad, self.loss_scale / 2, grown)
        return norm

    def state_dict(self) -> dict:
        """For state.json: steps skipped in all and in a row, good ones since the scale moved, and the scale."""
        return {name: getattr(self, name).item() for name in ("skipped", "streak", "good", "loss_scale")}


def dropout_seed(seed: int, step: int, part: int) -> int:
    """Seed of the masks of one micro-batch (`part`, over all ranks) of a step: a resume draws the same.

    Python's hash takes -1 for -2 and numbers modulo 2^61 - 1: seeds that are not small become so by SHA-256.
    """
    if not 0 <= seed < sys.hash_info.modulus:
        seed = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:7], "little")
    return hash((seed, step, part)) & 0x7FFFFFFFFFFFFFFF
