"""engine/errors.py: what torch and the machine do to a run, in one sentence."""

import pytest
import torch

from engine.errors import RunError, sentences


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RunError("lower it"), "error: lower it"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB. GPU 0"), r"error: the GPU is out of memory \(CUDA out of memory\): take 2"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "error: the machine is out of memory: take 2"),
        (MemoryError(), "error: the machine is out of memory: take 2"),
        (RuntimeError("[gloo] Connection closed by peer [::1]"), "error: another rank died, so this one stops too"),
        (PermissionError(13, "x", "out"), "error: out: permission denied"),
    ],
)  # fmt: skip
def test_one_sentence(error, sentence):
    with pytest.raises(SystemExit, match=sentence), sentences(lambda: "take 2"):
        raise error


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shape"), sentences():
        raise RuntimeError("shape '[2]' is invalid")
