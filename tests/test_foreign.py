"""engine/foreign.py: other people's checkpoints, read without running code in them."""

import json
import os
import pickle

import pytest
import torch
from conftest import losses

import configurator
import sample
import train
from engine import foreign
from engine.errors import RunError
from engine.metrics import read_metrics
from model import GPT, GPTConfig
from sample import SampleConfig


def nanogpt_checkpoint(path, prefix="", **shape):
    """A file with the contents that nanoGPT's train.py saves (train.py, `checkpoint = {...}`)."""
    shape = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 16,
        "bias": False,
        "vocab_size": 64,
    } | shape
    model = GPT(GPTConfig(**shape), seed=7)
    weights = {prefix + k: v for k, v in model.state_dict().items()}
    weights[prefix + "lm_head.weight"] = model.transformer.wte.weight  # its tied head has two names
    weights[prefix + "transformer.h.0.attn.bias"] = torch.ones(
        1, 1, 16, 16
    )  # versions before SDPA kept the mask
    torch.save(
        {
            "model": weights,
            "optimizer": {},
            "model_args": shape | {"dropout": 0.0},
            "iter_num": 5,
            "config": {"a": 1},
        },
        path,
    )
    return model


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_nanogpt_checkpoints_load(prefix, tmp_path):
    theirs = nanogpt_checkpoint(tmp_path / "ckpt.pt", prefix)
    weights, shape = foreign.read(str(tmp_path / "ckpt.pt"), "stock")
    assert shape["tie_weights"] is True
    assert (shape["n_layer"], shape["vocab_size"], shape["bias"]) == (2, 64, False)
    ours = GPT(GPTConfig(**shape))
    ours.load_state_dict(weights)
    idx = torch.arange(12)[None]
    torch.testing.assert_close(ours(idx)[0], theirs(idx)[0])


def test_a_nanogpt_checkpoint_is_continued_and_evaluated(tmp_path, tiny_flags):
    theirs = nanogpt_checkpoint(tmp_path / "ckpt.pt")
    for name, more in {"tuned": {}, "judged": {"eval_only": True}}.items():
        flags = tiny_flags(tmp_path / name, init_from=tmp_path / "ckpt.pt", learning_rate=1e-3, **more)
        train.main(configurator.load(flags))
    rows = read_metrics(tmp_path / "tuned")
    judged = read_metrics(tmp_path / "judged")
    assert len(judged) == 1
    assert judged[0]["val/loss"] == losses(rows)[0, "val/loss"]
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    run = json.loads((tmp_path / "tuned" / "run.json").read_text())
    assert run["body_sha256"] == theirs.body_sha256()


def test_a_nanogpt_checkpoint_is_sampled(tmp_path, tiny_data, capsys, monkeypatch):
    nanogpt_checkpoint(tmp_path / "ckpt.pt")
    flags = [
        f"--init_from={tmp_path / 'ckpt.pt'}",
        "--start=ab",
        "--num_samples=1",
        "--max_new_tokens=5",
        "--device=cpu",
    ]
    monkeypatch.setattr(sample, "load_tokenizer", lambda name: sample_tokenizer(tiny_data))
    sample.main(configurator.load(flags, also=SampleConfig))
    assert capsys.readouterr().out.startswith("ab")


def sample_tokenizer(folder):
    from data.meta import read_meta
    from data.tokenizers import load_tokenizer

    return load_tokenizer(read_meta(folder)["tokenizer"], folder)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_gpt2_as_transformers_writes_it(activation, tmp_path):
    """The oracle is transformers' own forward pass."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=99, n_positions=32, n_embd=48, n_layer=3, n_head=4, activation_function=activation,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.05)  # biases and norms that matter
    theirs.save_pretrained(tmp_path)
    weights, shape = foreign.read(str(tmp_path), "stock")
    ours = GPT(GPTConfig(**shape)).eval()
    ours.load_state_dict(weights)
    idx = torch.randint(0, 99, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[0][:, -1], theirs(idx).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"model": Evil(), "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(RunError, match="is no nanoGPT checkpoint"):
        foreign.read(str(tmp_path / "ckpt.pt"), "stock")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(RunError, match="is no nanoGPT checkpoint"):
        foreign.read(str(tmp_path / "plain.pt"), "stock")
    assert not (tmp_path / "owned").exists()


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    import huggingface_hub

    def dead(*args, **kw):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", dead)
    with pytest.raises(RunError, match="gpt2 could not be had from the hub"):
        foreign.read("gpt2", "stock")
