"""The losses of a few steps of every arm and option, against tests/golden_steps.json.

A refactor must leave them as they are. Make the file anew only when a change is *meant* to move the numbers (another
initialisation, another order of the data, another default), and say in that commit's message which number moved and why:

    python tests/test_golden_steps.py

Losses are compared to `DIGITS` significant digits, which held on AVX2 and AVX-512 processors; the body at step 0 is
compared bit for bit, as nothing but the generator goes into it. The final weights' norms are compared to the same
digits, and their hash where this machine's arithmetic gives the bits that the file's machine gave (`arithmetic`).
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_tiny_data

FILE = Path(__file__).with_name("golden_steps.json")
DIGITS = 5
LETTERS = "abcdefghijklmnopqrsàéîöüαβγ→€語"  # tokens of one, two and three bytes, so that n-grams and positions count

KRONECKER = {"wte": "kronecker", "tie_weights": False}
CASES = {
    "bpe_tied": {"wte": "stock", "tie_weights": True},
    "bpe_untied": {"wte": "stock", "tie_weights": False},
    "kronecker": KRONECKER,
    "kronecker_tied": {"wte": "kronecker", "tie_weights": True},
    "small_codec": KRONECKER | {"wte_init_rms": 0.1},
    "faster_codec": KRONECKER | {"wte_lr_mult": 3.0},
    "large_table": {"wte": "stock", "tie_weights": False, "wte_init_rms": 1.0},
    "large_table_tied": {"wte": "stock", "tie_weights": True, "wte_init_rms": 1.0, "wte_lr_mult": 4.0},
    "faster_table": {"wte": "stock", "tie_weights": False, "wte_lr_mult": 8.0, "wte_weight_decay": 0.0},
    "faster_head": {"wte": "stock", "tie_weights": False, "head_lr_mult": 2.0},
    "normed_table": {"wte": "stock", "tie_weights": False, "wte_norm": "rms"},
    "normed_codec_tied": {"wte": "kronecker", "tie_weights": True, "wte_norm": "rms"},
    "permuted": KRONECKER | {"wte_permute_seed": 1},
    "lowrank": {"wte": "lowrank", "tie_weights": False},
    "lowrank_tied": {"wte": "lowrank", "tie_weights": True},
    "hash": {"wte": "hash", "tie_weights": False},
    "hash_tied": {"wte": "hash", "tie_weights": True, "wte_init_rms": 0.1, "wte_lr_mult": 8.0},
    "ngrams": KRONECKER | {"wte_ngrams": 64},
    "rank": KRONECKER | {"wte_rank": 4},
    "ngrams_and_rank_tied": {"wte": "kronecker", "tie_weights": True, "wte_ngrams": 64, "wte_rank": 4},
    "codec_not_normalised": KRONECKER | {"length_normalize": False, "z_normalize": False},
    "entropy": KRONECKER | {"wte_entropy": 0.01},
    "dropout": {"wte": "stock", "tie_weights": True, "dropout": 0.1},
    "dropout_kronecker": KRONECKER | {"dropout": 0.1},
    "one_micro_batch": {"wte": "stock", "tie_weights": True, "batch_size": 8},
    "four_micro_batches": {"wte": "stock", "tie_weights": True, "batch_size": 2},
    "bias_and_tanh": {"wte": "stock", "tie_weights": True, "bias": True, "gelu": "tanh"},
    "no_clipping_no_decay": {"wte": "stock", "tie_weights": False, "grad_clip": 0.0, "decay_lr": False},
    "full_logits": {"wte": "stock", "tie_weights": True, "loss": "full"},
}


def golden(out_dir: Path, case: str, data_dir: Path) -> dict:
    """What one case gives: body at step 0, losses of the steps and evaluations, hash of the final weights."""
    import configurator
    import train
    from engine import checkpoint
    from engine.metrics import read_metrics

    keys = TINY | {"data_dir": data_dir, "out_dir": out_dir, "arm": case} | CASES[case]
    keys |= {"max_iters": 6, "eval_interval": 3, "ckpt_interval": 6}
    train.main(configurator.load([f"--{k}={v}" for k, v in keys.items()]))
    rows = read_metrics(out_dir)
    weights, _, _ = checkpoint.load(out_dir / "ckpt" / "step_000006")
    return {
        "body_sha256": json.loads((out_dir / "run.json").read_text())["body_sha256"],
        "train/loss": [r["train/loss"] for r in rows if "train/loss" in r],
        "val/loss": [r["val/loss"] for r in rows if "val/loss" in r],
        "weight_norms": [weights[name].norm().item() for name in sorted(weights)],
        "weights_sha256": sha256_of_tensors(weights[name] for name in sorted(weights)),
    }


def sha256_of_tensors(tensors) -> str:
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(t.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def arithmetic() -> str:
    """torch's version and a hash of small sums: equal where the last bits of a training step can be expected to be."""
    a = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
    b = torch.randn(160, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
    q = a.view(2, 2, 16, 96)
    attention = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    x = torch.nn.functional.layer_norm(torch.nn.functional.gelu(a @ b.t()), (160,))
    (x.softmax(1).log().square().mean() + attention.square().mean()).backward()
    return (
        f"torch {torch.__version__.split('+')[0]}, {sha256_of_tensors([x, attention, a.grad, b.grad])[:16]}"
    )


@pytest.fixture(scope="module")
def golden_data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory.mktemp("golden"), LETTERS)


@pytest.mark.parametrize("case", CASES)
def test_golden_steps(case, tmp_path, golden_data):
    recorded = json.loads(FILE.read_text())
    now = golden(tmp_path / "run", case, golden_data)
    assert_golden(now, recorded["cases"][case], case, recorded["arithmetic"])


def assert_golden(now: dict, then: dict, case: str, made_by: str) -> None:
    hint = "; if that was meant, make the file anew (see the top of tests/test_golden_steps.py)"
    assert now["body_sha256"] == then["body_sha256"], f"{case}: the body at step 0 moved{hint}"
    for key in ("train/loss", "val/loss", "weight_norms"):
        assert now[key] == pytest.approx(then[key], rel=10**-DIGITS), f"{case}: {key} moved{hint}"
    if made_by == arithmetic():
        assert now["weights_sha256"] == then["weights_sha256"], f"{case}: the final weights moved{hint}"


def test_every_arm_file_is_a_case():
    import configurator

    arms = Path(__file__).resolve().parent.parent / "config" / "arms"
    covered = [{k: v for k, v in keys.items() if k in ("wte", "tie_weights")} for keys in CASES.values()]
    for path in sorted(arms.glob("*.py")):
        keys = configurator.read_file(str(path))
        assert {k: keys[k] for k in ("wte", "tie_weights")} in covered, path.name
        assert keys.keys() - {"arm"} <= set().union(*CASES.values()), f"no case sets a key of {path.name}"


@pytest.mark.parametrize("key", ["train/loss", "val/loss", "weight_norms", "body_sha256", "weights_sha256"])
def test_a_moved_number_is_noticed(key):
    recorded = json.loads(FILE.read_text())
    then = recorded["cases"]["bpe_tied"]
    moved = then | {key: "0" * 64 if "sha" in key else [then[key][0] * (1 + 3e-5), *then[key][1:]]}
    with pytest.raises(AssertionError, match="moved"):
        assert_golden(moved, then, "bpe_tied", arithmetic())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_data(Path(folder) / "data", LETTERS)
        cases = {case: golden(Path(folder) / case, case, Path(folder) / "data") for case in CASES}
    FILE.write_text(json.dumps({"arithmetic": arithmetic(), "cases": cases}, indent=1) + "\n")
