"""Tiny runs for the tests of the probes, and what those tests share."""

import json

import pytest
import torch

import model as gpt
from data.tokenizers import load_tokenizer
from engine import checkpoint
from kronecker import build_byte_buffer
from scripts.probes import common

ARMS = {"bpe_tied": ("stock", True), "bpe_untied": ("stock", False), "kronecker": ("kronecker", False)}
SEEDS = (1337, 1338)


def word_families() -> list[dict]:
    return json.loads((common.DATA / "word_families.json").read_text())["families"]


def train_tokenizer(path, texts: list[str], vocab_size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(texts, trainer)
    tok.save(str(path))


def make_runs(root):
    """Untrained runs of three arms and two seeds, in the folders that training would have left."""
    words = [w for f in word_families() for w in f["exact_family"]]
    words += [w for p in json.loads((common.DATA / "tradeoff_pairs.json").read_text())["kin"] for w in p]
    prompts = json.loads((common.DATA / "spelling_pairs.json").read_text())["prompt_pairs"]
    root.mkdir(parents=True)
    train_tokenizer(root / "tokenizer.json", [" ".join(words), *(p["clean"] for p in prompts)] * 2, 1000)
    shape = {"block_size": 48, "vocab_size": 1024, "n_layer": 2, "n_head": 2, "n_embd": 32, "bias": False}
    for arm, (wte, tied) in ARMS.items():
        for seed in SEEDS:
            folder = root / f"{arm}_s{seed}"
            folder.mkdir()
            (folder / "tokenizer.json").write_bytes((root / "tokenizer.json").read_bytes())
            spec = {"kind": "hf", "name": "tiny", "file": "tokenizer.json"}
            tokenizer = load_tokenizer(spec, base_dir=folder)
            keys = shape | {"wte": wte, "tie_weights": tied, "pos_dim": 16}
            config = keys | {"byte_extraction": "bytes", "max_iters": 2}
            buffers = build_byte_buffer(tokenizer.backend, 16) if wte == "kronecker" else None
            net = gpt.GPT(gpt.GPTConfig(**keys), buffers, seed=seed)
            with torch.no_grad():  # untrained blocks do nearly nothing; make them count
                for name, p in net.named_parameters():
                    if ".h." in name and p.dim() == 2:
                        p.mul_(5)
            (folder / "config.json").write_text(json.dumps(config))
            matched = dict.fromkeys(("body_sha256", "data_sha256", "val_sha256", "schedule_sha256"), "")
            record = {"arm": arm, "seed": seed, "tokens_per_step": 1} | matched
            (folder / "run.json").write_text(json.dumps(record))
            (folder / "data_meta.json").write_text(json.dumps({"tokenizer": spec}))
            metrics = [
                {"iter": i, "val/loss": 7.0, "wte/rms": 0.02 * (1 + i), "wte/weight_norm": 1.0}
                for i in (0, 1, 2)
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
            checkpoint.save(folder, 2, net.state_dict(), {}, {})
    return root


def published(shared_dir, name):
    path = shared_dir / "reference" / name
    if not path.exists():
        pytest.skip(f"the published {name} is not here")
    return json.loads(path.read_text(encoding="utf-8")), path


def manual_forward(net, ids):
    """Logits (V,) and final hidden state (n_embd,) at the last position, written out without the model's forward."""
    t = net.transformer
    x = (t.wte(torch.tensor([ids])) + t.wpe.weight[: len(ids)]).detach()
    for block in t.h:
        x = block(x)
    x = t.ln_f(x)[0, -1]
    weight = net.wte_table() if net.lm_head is None else net.lm_head.weight
    return (weight @ x).detach().double(), x.detach()


def args_for(**changes):
    import argparse

    base = dict(max_new_tokens=5, batch_size=8, seed=42, samples=2)
    return argparse.Namespace(**(base | changes))
