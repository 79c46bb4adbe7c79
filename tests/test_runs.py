"""engine/runs.py: what a start writes, what it refuses, and that a refusal writes nothing."""

import json
import os
import shutil

import pytest
from test_bad_input import snapshot

import configurator
import train
from engine import checkpoint, runs
from engine.errors import RunError
from engine.metrics import read_metrics


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data):
    """A finished run of 12 steps with checkpoints at 5, 10 and 12."""
    from conftest import TINY

    out = tmp_path_factory.mktemp("trained") / "run"
    keys = TINY | {"data_dir": tiny_data, "out_dir": out}
    train.main(configurator.load([f"--{k}={v}" for k, v in keys.items()]))
    return out


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def refused(train_tiny, out, words, **changes):
    before = snapshot(out)
    with pytest.raises(RunError, match=words):
        train_tiny(out, **{"init_from": "auto"} | changes)
    assert snapshot(out) == before


def record(out) -> dict:
    return json.loads((out / "run.json").read_text())


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 5.0}, {"beta2": 0.5}, {"learning_rate": 0.05}, {"max_iters": 24}, {"grad_clip": 0.5},
        {"dropout": 0.1}, {"warmup_iters": 3}, {"decay_lr": False}, {"wte_lr_mult": 2.0}, {"dtype": "bfloat16"},
        {"arm": "other"},
    ],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_a_resume_under_another_training_is_refused_before_a_byte_is_written(changes, train_tiny, run):
    refused(train_tiny, run, f"was trained with {next(iter(changes))}=", **changes)


def test_fewer_steps_than_there_are_is_refused_under_a_new_schedule_too(train_tiny, run):
    refused(train_tiny, run, "at step 12, beyond max_iters=10", max_iters=10)
    refused(train_tiny, run, "at step 12, beyond max_iters=10", max_iters=10, new_schedule=True)


def test_a_new_schedule_is_used_recorded_and_no_longer_matched(train_tiny, run):
    rows = train_tiny(run, init_from="auto", max_iters=16, weight_decay=0.5, beta2=0.8, new_schedule=True)
    assert [r["iter"] for r in rows if "train/loss" in r] == list(range(16))
    _, moments, _ = checkpoint.load(run / "ckpt" / "step_000016")
    assert {g["weight_decay"] for g in moments["param_groups"]} == {0.5, 0.0}
    assert {tuple(g["betas"]) for g in moments["param_groups"]} == {(0.9, 0.8)}
    there = record(run)
    changed = {"max_iters": [12, 16], "weight_decay": [0.1, 0.5], "beta2": [0.95, 0.8]}
    assert there["segments"] == [{"step": 12, "changed": changed}]
    # the next resume keeps the new one, and the segment stays
    train_tiny(run, init_from="auto", max_iters=18, weight_decay=0.5, beta2=0.8, new_schedule=True)
    assert [s["step"] for s in record(run)["segments"]] == [12, 16]


def test_every_start_is_kept(train_tiny, tmp_path):
    out = tmp_path / "run"
    train_tiny(out)
    body, wandb_id = record(out)["body_sha256"], record(out)["wandb_id"]
    for step in (10, 12):
        shutil.rmtree(out / "ckpt" / f"step_{step:06d}")
    train_tiny(out, init_from="auto", batch_size=8)
    there = record(out)
    assert [s["step"] for s in there["starts"]] == [0, 5]
    for start in there["starts"]:
        assert start.keys() >= {"time", "command", "commit", "world", "device", "torch"}
    assert (there["body_sha256"], there["wandb_id"]) == (body, wandb_id)
    before = snapshot(out)
    train_tiny(out, init_from="auto", batch_size=8)  # finished: nothing to do, nothing to write
    assert snapshot(out) == before


def test_a_record_of_an_earlier_version_goes_on(train_tiny, run):
    """It lacks later keys."""
    there = {k: v for k, v in record(run).items() if k not in ("segments", "diverged")}
    (run / "run.json").write_text(json.dumps(there))
    config = json.loads((run / "config.json").read_text())
    for key in ("wte_norm", "wte_init_rms", "eval_skip_tokens", "new_schedule"):
        del config[key]
    (run / "config.json").write_text(json.dumps(config))
    shutil.rmtree(run / "ckpt" / "step_000012")
    train_tiny(run, init_from="auto")
    assert [s["step"] for s in record(run)["starts"]] == [0, 10]


def spoil_all(out):
    for folder in checkpoint.steps(out):
        (folder / "DONE").unlink()


def remove_with_pointers(out):
    shutil.rmtree(out / "ckpt")
    for name in ("latest", "best"):
        (out / name).unlink()


@pytest.mark.parametrize("init_from", ["auto", "scratch", "resume"])
@pytest.mark.parametrize(
    "spoil", [spoil_all, lambda out: shutil.rmtree(out / "ckpt"), remove_with_pointers], ids=["damaged", "removed", "all"]
)  # fmt: skip
def test_a_record_without_its_checkpoints_is_not_erased(spoil, init_from, train_tiny, run):
    spoil(run)
    refused(train_tiny, run, "no whole checkpoint to go on from|already holds a run", init_from=init_from)


@pytest.mark.parametrize("upto", [7, 12])
def test_rows_past_the_first_checkpoint_are_proof_enough(upto, train_tiny, run):
    remove_with_pointers(run)
    lines = (run / "metrics.jsonl").read_text().splitlines(True)
    (run / "metrics.jsonl").write_text("".join(x for x in lines if json.loads(x)["iter"] <= upto))
    refused(train_tiny, run, f"up to step {upto}, but no whole checkpoint")
    (run / "run.json").unlink()
    refused(train_tiny, run, f"up to step {upto}, but no whole checkpoint")


def test_a_run_that_died_before_its_first_checkpoint_begins_again(train_tiny, run):
    remove_with_pointers(run)
    whole = read_metrics(run)
    lines = (run / "metrics.jsonl").read_text().splitlines(True)
    (run / "metrics.jsonl").write_text("".join(x for x in lines if json.loads(x)["iter"] < 5))
    again = train_tiny(run, init_from="auto")
    assert [r.get("train/loss") for r in again] == [r.get("train/loss") for r in whole]
    assert [s["step"] for s in record(run)["starts"]] == [0, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": "one"}, 'run.json is not a run\'s record: seed is "one"'),
        ({"starts": {}}, "starts is {}"),
        ({"starts": [{"step": 1}]}, r"it has no starts.0.time"),
        ({"segments": [[]]}, "segments.0 is"),
        ({"segments": [{"step": 1, "changed": {"max_iters": [1]}}]}, "segments.0.changed.max_iters is"),
        ({"wandb_id": 7}, "wandb_id is 7"),
        ({"wandb_id": "../../x"}, r"wandb_id is \"../../x\""),
        ({"arm": "../../x"}, r"arm is .* is not a plain file name"),
        ({"arm": "a\x1b[31m"}, "cannot be printed"),
    ],
)
def test_a_record_of_another_shape_is_refused(change, words, train_tiny, run):
    (run / "run.json").write_text(json.dumps(record(run) | change))
    before = snapshot(run)
    with pytest.raises(ValueError, match=words):
        train_tiny(run, init_from="auto")
    assert snapshot(run) == before


@pytest.mark.parametrize("text", ["[]", "{", "null", "7", "\xff"])
@pytest.mark.parametrize("name", ["run.json", "config.json"])
def test_a_record_that_is_none(name, text, run):
    (run / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=name):
        runs.read_run(run)


def test_an_evaluation_leaves_the_record_as_it_is(train_tiny, run, capsys):
    before = snapshot(run)
    train_tiny(run, init_from="auto", eval_only=True)
    assert "step     12  val loss" in capsys.readouterr().out
    assert snapshot(run) == before


def test_a_configuration_without_its_schedule_is_refused(train_tiny, run):
    (run / "config.json").write_text("{}")
    refused(train_tiny, run, "has a config.json without learning_rate: restore it")


def test_a_folder_that_goes_away_ends_the_run_with_a_word(train_tiny, tmp_path, monkeypatch):
    from data import loader

    plain = loader.TrainBatches.rows
    out = tmp_path / "run"

    def rows(self, step, lo, hi):
        if step == 7:
            shutil.rmtree(out, ignore_errors=True)
        return plain(self, step, lo, hi)

    monkeypatch.setattr(loader.TrainBatches, "rows", rows)
    with pytest.raises(RunError, match=r"run was removed while its run was at step \d+"):
        train_tiny(out)
    assert not os.path.exists(out)


def test_a_folder_of_others_is_not_trained_in(train_tiny, tmp_path):
    """As that of the weights that it begins with."""
    for name in ("config.json", "tokenizer.json"):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text('{"n_layer": 7}')
        for init_from in ("auto", "scratch"):
            refused(train_tiny, out, f"holds a {name} but no run", init_from=init_from)


@pytest.mark.parametrize(("name", "value"), [("n_layer", "1"), ("wte", "foo"), ("vocab_size", None)])
def test_a_recorded_key_of_another_type_is_a_sentence(name, value, run, tiny_data):
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(SystemExit, match=f"{name} in .*config.json is"):
        train.main(
            configurator.load(
                [f"--out_dir={run}", "--init_from=auto", f"--data_dir={tiny_data}", "--device=cpu"]
            )
        )


def test_a_resume_between_evaluations_keeps_the_one_it_stands_at(train_tiny, tmp_path):
    """Without it a run that grows worse would point to its last checkpoint as the best, and delete the better one."""
    out, keys = tmp_path / "run", {"eval_interval": 100, "keep": 1}
    before = train_tiny(out, **keys)[-1]
    rows = train_tiny(out, **keys, init_from="auto", max_iters=20, learning_rate=3.0, new_schedule=True)
    at_12 = [row["val/loss"] for row in rows if row["iter"] == 12 and "val/loss" in row]
    assert at_12 == [before["val/loss"]] and rows[-1]["val/loss"] > before["val/loss"]
    assert checkpoint.pointed(out, "best").name == "step_000012" and (out / "ckpt" / "step_000012").is_dir()


def test_a_resume_on_data_without_a_description_takes_the_recorded_vocabulary(
    train_tiny, tiny_data, tmp_path
):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / "meta.json").unlink()
    train_tiny(tmp_path / "run", data_dir=data, vocab_size=64)
    rows = train_tiny(tmp_path / "run", data_dir=data, init_from="auto", max_iters=14, new_schedule=True)
    assert rows[-1]["iter"] == 14 and "val/bpb" not in rows[-1]
    assert json.loads((tmp_path / "run" / "data_meta.json").read_text())["tokenizer"] is None
    tokenizer = {"kind": "chars", "itos": [chr(33 + k) for k in range(90)]}
    (data / "meta.json").write_text(json.dumps({"format": 1, "tokenizer": tokenizer, "vocab_size": 60}))
    with pytest.raises(RunError, match="has 90 ids, vocab_size is 64"):
        train_tiny(tmp_path / "new", data_dir=data)
    assert not (tmp_path / "new").exists()
