"""scripts/devices.py: the names of the GPUs that are here, and which run gets which."""

import subprocess

import pytest

from engine.errors import RunError
from scripts import devices

# as nvidia-smi prints them: a whole GPU, one cut into two instances, one cut into none yet
LISTED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-e86cb44c-6756-fd30-cd4a-1e6da3caf9b0)
  MIG 3g.20gb     Device  0: (UUID: MIG-c7384736-a75d-5afc-978f-d2f1294409fd)
  MIG 2g.10gb     Device  1: (UUID: MIG-a28ad590-3fda-56dd-84fc-0a0b96edc58d)
GPU 2: NVIDIA A100-SXM4-40GB (UUID: GPU-00000000-1111-2222-3333-444444444444)
"""


@pytest.mark.parametrize(
    ("said", "names"),
    [("0,1,2", ["0", "1", "2"]), ("2, 0", ["2", "0"]), ("", []), ("-1", []), ("1,-1,2", ["1"]), ("1,1", ["1"]),
     ("GPU-8932f937,MIG-c7384736", ["GPU-8932f937", "MIG-c7384736"])],
)  # fmt: skip
def test_what_the_environment_says_goes_before_what_is_there(monkeypatch, said, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    assert devices.visible_gpus() == names


def test_mig_instances_are_found_by_their_uuids(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{LISTED}END\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert devices.visible_gpus() == [
        "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77",
        "MIG-c7384736-a75d-5afc-978f-d2f1294409fd",
        "MIG-a28ad590-3fda-56dd-84fc-0a0b96edc58d",
        "GPU-00000000-1111-2222-3333-444444444444",
    ]


def test_without_nvidia_smi_torch_counts(monkeypatch):
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError()))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.visible_gpus() == ["0", "1"]


def test_runs_share_the_gpus_out_among_them():
    assert devices.slots(list("0123"), 1) == [("0",), ("1",), ("2",), ("3",)]
    assert devices.slots(list("01234"), 2) == [("0", "1"), ("2", "3")]  # the fifth is left over
    assert devices.slots(list("0123"), 1, at_a_time=2) == [("0",), ("1",)]
    assert devices.slots(list("01"), 1, at_a_time=3) == [("0",), ("1",), ("0",)]
    with pytest.raises(RunError, match="a run on 8 GPUs needs more than the 2 here"):
        devices.slots(["0", "1"], 8)
    with pytest.raises(RunError, match="MIG instances cannot work together"):
        devices.slots(["MIG-a", "MIG-b"], 2)
