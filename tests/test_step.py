"""engine/step.py: against torch's own clipping and scaling, and what a bad step leaves behind."""

import copy
from types import SimpleNamespace

import pytest
import torch

from engine.step import GuardedStep, dropout_seed

CPU = torch.device("cpu")


def guarded(grad_clip=1.0, dtype="float32", state=None, lr=0.1):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    config = SimpleNamespace(grad_clip=grad_clip, dtype=dtype)
    return model, GuardedStep(model, optimizer, config, CPU, state or {})


def give(model, value: float, scale: float = 1.0) -> torch.Tensor:
    for p in model.parameters():
        p.grad = torch.full_like(p, value * scale)
    return torch.tensor(value)


@pytest.mark.parametrize("grad_clip", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_good_steps_are_torch_s_own(grad_clip, dtype):
    model, guard = guarded(grad_clip, dtype)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, fused=False, foreach=False)
    for value in (1.0, -2.0, 0.3):
        norm = guard.step(give(model, value, float(guard.loss_scale)))
        give(plain, value)
        wanted = torch.nn.utils.clip_grad_norm_(plain.parameters(), grad_clip or float("inf"))
        optimizer.step()
        assert norm.item() == pytest.approx(wanted.item(), rel=1e-6)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert ours.grad is None
    assert guard.state_dict()["skipped"] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_step_leaves_weights_and_moments_alone(bad):
    model, guard = guarded()
    guard.step(give(model, 1.0))
    before = copy.deepcopy((model.state_dict(), guard.optimizer.state_dict()["state"]))
    for gradient, loss in ((bad, 1.0), (1.0, bad)):
        give(model, gradient)
        guard.step(torch.tensor(loss))
    after = (model.state_dict(), guard.optimizer.state_dict()["state"])
    assert str(after) == str(before)
    assert guard.state_dict() == {"skipped": 2, "streak": 2, "good": 0, "loss_scale": 1.0}
    guard.step(give(model, 1.0))
    assert (guard.state_dict()["skipped"], guard.state_dict()["streak"]) == (2, 0)


def test_the_scale_of_float16_halves_and_doubles_and_survives_a_resume():
    model, guard = guarded(dtype="float16")
    assert guard.state_dict()["loss_scale"] == 65536
    guard.step(give(model, float("inf")))
    assert guard.state_dict() == {"skipped": 1, "streak": 1, "good": 0, "loss_scale": 32768.0}
    model, guard = guarded(dtype="float16", state=guard.state_dict() | {"good": 1998})
    guard.step(give(model, 1.0))
    assert guard.state_dict() == {"skipped": 1, "streak": 0, "good": 1999, "loss_scale": 65536.0}


def test_masks_differ_between_seeds_steps_and_parts():
    seeds = [0, 1, 1337, -1, -2, -3, 2**61 - 1, 2**61, 2**63 - 1, -(2**63)]
    drawn = {dropout_seed(seed, step, part) for seed in seeds for step in range(4) for part in range(4)}
    assert len(drawn) == len(seeds) * 16
    assert all(0 <= d < 2**63 for d in drawn)
    assert dropout_seed(1337, 3, 1) == hash((1337, 3, 1)) & 0x7FFFFFFFFFFFFFFF  # recorded runs drew these
