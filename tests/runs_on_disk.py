"""Runs as training leaves them, without training: folders with config, record and metrics, for tests of the analysis."""

import json

from scripts.analysis.runs import find_run_folders, load_folder

# Final losses; every curve is 8.0 at step 0, 4.5 at step 50, the final loss at step 100.
LOSSES = {
    "bpe_tied": {1337: 4.0, 1338: 4.1, 1339: 4.2},
    "bpe_untied": {1337: 3.9, 1338: 4.0, 1339: 4.1},
    "kronecker": {1337: 3.8, 1338: 4.0, 1339: 4.1},
}
SPEED = {"bpe_tied": 1000.0, "bpe_untied": 900.0, "kronecker": 800.0}


def write_run(root, arm, seed, loss, upto=100, info=None, config=None, name=None):
    folder = root / (name or f"{arm}_s{seed}")
    folder.mkdir(parents=True)
    keys = {"max_iters": 100, "seed": seed, "n_layer": 2} | (config or {})
    (folder / "config.json").write_text(json.dumps(keys))
    record = {
        "arm": arm,
        "seed": seed,
        "body_sha256": f"body{seed}",
        "data_sha256": f"data{seed}",
        "val_sha256": "val",
        "schedule_sha256": "schedule",
        "params": {"body": 400, "head": 0, "total": 600, "stock_table": 200}
        | {"input": 50 if arm == "kronecker" else 200},
        "tokens_per_step": 1000,
        "data_fingerprint": "set",
        "device": "cpu",
        "torch": "2.13.0",
        "commit": "abc",
    }
    (folder / "run.json").write_text(json.dumps(record | (info or {})))
    rows = []
    for it in range(0, 101, 10):
        if it <= upto and it < 100:
            speed = SPEED.get(arm, 1.0) if it else 1.0  # the first step is slow and must not count
            rows.append({"iter": it, "tokens": it * 1000, "train/loss": 8.0 - it / 50, "tok_per_sec": speed})
        if it in (0, 50, 100) and it <= upto:
            value = {0: 8.0, 50: 4.5, 100: loss}[it]
            rows.append({"iter": it, "val/loss": value, "val/bpb": value / 4, "wte/rms": 0.02 + it / 2500})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def write_demo(root):
    """Three arms and three seeds in root/demo, which it returns."""
    for arm, losses in LOSSES.items():
        for seed, loss in losses.items():
            write_run(root / "demo", arm, seed, loss)
    return root / "demo"


def load(root):
    return [load_folder(f) for f in find_run_folders([root])]
