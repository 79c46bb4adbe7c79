"""How fast a training is and how long it will take; the clock stands still during evaluations and saves."""

import time

from engine.flops import peak_flops
from engine.metrics import memory_gb
from engine.ranks import settle


class Progress:
    """Times the steps from `first` to max_iters. flops_per_token: of the model; world: ranks that share a step."""

    def __init__(
        self, first: int, max_iters: int, tokens_per_step: int, flops_per_token: int, device, world: int
    ):
        self.first, self.max_iters, self.tokens_per_step = first, max_iters, tokens_per_step
        self.device, self.flops_per_token = device, flops_per_token
        peak = peak_flops(device)
        self.peak = peak[0] * world if peak else None
        self.seconds, self.steps = 0.0, 0  # since the last figures
        self.started = self.began = time.perf_counter()

    def settle(self) -> None:
        """Before anything but training: what the device still has to do belongs to the steps before."""
        self.seconds += settle(self.device)

    def begin_step(self) -> None:
        self.began = time.perf_counter()

    def end_step(self) -> None:
        self.seconds, self.steps = self.seconds + time.perf_counter() - self.began, self.steps + 1

    def figures(self) -> dict:
        """tok_per_sec of the steps since the last call, mfu (percent) where the device's peak is known, mem_gb."""
        row = {"tok_per_sec": self.steps * self.tokens_per_step / self.seconds}
        if self.peak:
            row["mfu"] = 100 * row["tok_per_sec"] * self.flops_per_token / self.peak
        self.seconds, self.steps = 0.0, 0
        return row | {"mem_gb": memory_gb(self.device)}

    def line(self, row: dict) -> str:
        """The row of a step as a line for the terminal, with the time that is left."""
        step, spent = row["iter"], time.perf_counter() - self.started
        left = int(spent / (step + 1 - self.first) * (self.max_iters - step - 1))
        mfu = f"  mfu {row['mfu']:.1f}%" if "mfu" in row else ""
        return (
            f"step {step:>6,}/{self.max_iters:,}  loss {row['train/loss']:.4f}  lr {row['lr']:.2e}  "
            f"norm {row['grad_norm']:.2f}  {row['tok_per_sec']:,.0f} tok/s{mfu}  {left // 60}:{left % 60:02d} left"
        )
