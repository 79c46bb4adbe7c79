"""scripts/matched.py: arms x seeds, resumable, and matched for certain."""

import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace

import pytest
from conftest import ROOT, TINY

import configurator
from engine.errors import RunError
from engine.metrics import is_evaluated, read_metrics
from scripts import devices, forecast, matched


@pytest.fixture
def recipe(tmp_path, tiny_data):
    """A recipe file for runs of a few steps; recipe(key=value) writes one with changes."""

    def write(name="recipe.py", **changes):
        keys = TINY | {"data_dir": str(tiny_data)} | changes
        path = tmp_path / name
        path.write_text("".join(f"{k} = {v!r}\n" for k, v in keys.items()))
        return str(path)

    return write


def test_runs_are_trained_matched_and_left_alone_when_finished(recipe, tmp_path, capsys):
    args = [recipe(), f"--out={tmp_path / 'out'}", "--arms=bpe_tied,kronecker", "--seeds=1,2"]
    assert matched.main(args) == 0
    out = capsys.readouterr().out
    assert "4 runs of 12 steps" in out
    assert "run 4 of 4 kronecker, seed 2: val loss" in out
    folders = [tmp_path / "out" / f"{a}_s{s}" for s in (1, 2) for a in ("bpe_tied", "kronecker")]
    assert all(is_evaluated(f, 12) for f in folders)
    from scripts import compare

    assert compare.main([str(tmp_path / "out")]) in (0, None)  # which refuses runs that do not match
    before = {f: (f / "metrics.jsonl").stat().st_mtime_ns for f in folders}
    capsys.readouterr()
    assert matched.main(args) == 0
    assert "4 finished, 0 to do" in capsys.readouterr().out
    assert before == {f: (f / "metrics.jsonl").stat().st_mtime_ns for f in folders}


@pytest.mark.parametrize(
    ("changes", "flags", "says"),
    [
        ({"learning_rate": 1e-1}, [], r"was made with learning_rate=0.003, but this command asks for 0.1"),
        ({}, ["--max_iters=10"], r"was made with max_iters=12, but this command asks for 10"),
        ({}, ["--global_batch_size=4"], r"was made with 128 tokens a step, but this command asks for 64"),
        ({}, ["--eval_tokens=256"], r"was made with eval_tokens=512, but"),
        ({"data_dir": "/nowhere"}, [], r"was trained on other data than /nowhere"),
    ],
)  # fmt: skip
def test_finished_runs_of_another_question_are_no_answer(recipe, tmp_path, changes, flags, says, ended):
    args = [f"--out={ended}", "--arms=bpe_tied", "--seeds=1", *flags]
    with pytest.raises(RunError, match=says + ".*: choose another --out, or remove it"):
        matched.main([recipe(**changes), *args])
    with pytest.raises(RunError, match=says):
        matched.main([recipe(**changes), *args, "--print=runs"])


def test_how_a_finished_run_was_cut_up_does_not_matter(recipe, ended, capsys):
    args = [f"--out={ended}", "--arms=bpe_tied", "--seeds=1", "--log_interval=5"]
    assert matched.main([recipe(batch_size=2), *args]) == 0
    assert "1 finished, 0 to do" in capsys.readouterr().out


@pytest.fixture(scope="module")
def ended(tmp_path_factory, tiny_data):
    """The folder of a recipe's finished run."""
    folder = tmp_path_factory.mktemp("ended")
    keys = TINY | {"data_dir": str(tiny_data)}
    (folder / "recipe.py").write_text("".join(f"{k} = {v!r}\n" for k, v in keys.items()))
    assert matched.main([str(folder / "recipe.py"), f"--out={folder}", "--arms=bpe_tied", "--seeds=1"]) == 0
    return folder


def test_check_proves_the_match_and_names_what_differs(recipe, tmp_path, capsys, monkeypatch):
    args = [recipe(), f"--out={tmp_path / 'out'}", "--arms=bpe_tied,kronecker", "--seeds=1", "--check"]
    assert matched.main(args) == 0
    assert "matched: 2 runs share" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    arms = tmp_path / "arms"
    arms.mkdir()
    (arms / "bpe_tied.py").write_text("arm = 'bpe_tied'\n")
    keys = "arm, wte, tie_weights = 'kronecker', 'kronecker', False\nlearning_rate = 0.5\n"
    (arms / "kronecker.py").write_text(keys)
    monkeypatch.setattr(matched.experiment, "ARMS", arms)
    differs = r"learning_rate differs between bpe_tied, seed 1 \(0.003\) and kronecker, seed 1"
    with pytest.raises(RunError, match=f"do not match: {differs}"):
        matched.main(args)


def test_a_failing_run_is_named_with_its_cause_and_log(recipe, tmp_path, capsys):
    args = [f"--out={tmp_path / 'out'}", "--arms=bpe_tied", "--seeds=1", "--retries=0"]
    assert matched.main([recipe(n_head=3), *args]) == 1
    said = capsys.readouterr().err
    assert "bpe_tied, seed 1 failed: n_embd 32 is not a multiple of n_head 3" in said
    assert "train.log" in said


def test_interrupted_it_saves_and_goes_on(recipe, tmp_path):
    """Ctrl-C once: the runs save; the same command finishes them, equal to runs that were never stopped."""
    slow = {"max_iters": 1500, "eval_interval": 1500}
    command = [sys.executable, "scripts/matched.py", recipe(**slow), "--arms=bpe_tied", "--seeds=1"]
    cut = [*command, f"--out={tmp_path / 'cut'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(cut, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 180
    while len(read_metrics(tmp_path / "cut" / "bpe_tied_s1")) < 20:
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=180)[0]
    assert process.returncode == 130
    assert "the same command goes on from there" in out
    assert not is_evaluated(tmp_path / "cut" / "bpe_tied_s1", 1500)
    for out_dir in ("cut", "whole"):
        again = [*command, f"--out={tmp_path / out_dir}"]
        done = subprocess.run(again, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    last = [read_metrics(tmp_path / d / "bpe_tied_s1")[-1] for d in ("cut", "whole")]
    assert last[0]["val/loss"] == last[1]["val/loss"]
    assert "resuming" in (tmp_path / "cut" / "bpe_tied_s1" / "train.log").read_text()


def test_each_run_trains_on_gpus_of_its_own(recipe, tmp_path, monkeypatch):
    """A stand-in for train.py says what it was given."""
    child = (
        "import os, sys, time; time.sleep(0.2);"
        "open(sys.argv[1] + '/gpus', 'w').write(os.environ['CUDA_VISIBLE_DEVICES']);"
        "open(sys.argv[1] + '/metrics.jsonl', 'w').write('{\"iter\": 12, \"val/loss\": 5.0}')"
    )
    real = matched.make_job

    def make_job(args, *rest):
        job = real(args, *rest)
        assert (f"--nproc_per_node={args.gpus_per_run}" in job.command) is (args.gpus_per_run > 1)
        return replace(job, command=(sys.executable, "-c", child, str(job.out_dir)))

    monkeypatch.setattr(matched, "make_job", make_job)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5d5b,1,0")
    for n, groups in ((1, {"3", "GPU-5d5b", "1", "0"}), (2, {"3,GPU-5d5b", "1,0"})):
        out = tmp_path / str(n)
        args = [f"--out={out}", "--arms=bpe_tied,kronecker", "--seeds=1,2,3", f"--gpus_per_run={n}"]
        assert matched.main([recipe(device="cuda"), *args]) == 0
        assert {path.read_text() for path in out.rglob("gpus")} == groups
    refused = {"--gpus_per_run=8": "more than the 4 here", "--device=cuda:1": "CUDA_VISIBLE_DEVICES"}
    for word, words in refused.items():
        with pytest.raises((RunError, SystemExit), match=words):
            matched.main([recipe(device="cuda"), f"--out={tmp_path / 'none'}", word])


def test_a_run_gets_more_gpus_only_where_one_has_too_little_memory(recipe, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "visible_gpus", lambda: list("01234567"))
    # by hand: the full logits of one rank's micro-batch in 6 bytes; the tiny model beside them is nothing
    wide = recipe(vocab_size=50304, block_size=1024, batch_size=64, global_batch_size=64, device="cuda")
    for gigabytes, gpus in ((80, 1), (12, 2), (6, 4), (3, 8), (1, 8)):
        properties = types.SimpleNamespace(total_memory=gigabytes * 1e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i, p=properties: p)
        assert forecast.ranks_that_fit([configurator.load([wide])]) == gpus, gigabytes


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("--wte=kronecker", "wte defines an arm"),
        ("--wte_rank=16", "wte_rank defines an arm"),
        ("--tie_weights=False", "tie_weights defines an arm"),
        ("--arm=mine", "arm defines an arm"),
        ("--seed=5", "give --seeds"),
        ("--out_dir=there", "give --out"),
        ("--init_from=gpt2", "init_from is set by this command"),
        ("--eval_only=True", "eval_only is set by this command"),
        ("--check_only=True", "check_only is set by this command"),
        ("--jobs=-1", "--jobs: '-1' is no whole number from 0"),
        ("--nice=-5", "--nice: '-5' is no whole number from 0 to 19"),
        ("--minutes=0", "--minutes: '0' is no number above 0"),
        ("--ray_address=auto", "--ray_address needs --engine=ray"),
        ("--retries=-1", "--retries: '-1' is no whole number from 0"),
    ],
)
def test_a_key_that_would_make_the_label_lie_is_refused(recipe, tmp_path, word, sentence):
    with pytest.raises((RunError, SystemExit), match=sentence):
        matched.main([recipe(), f"--out={tmp_path / 'out'}", "--arms=bpe_tied", word])
    assert not (tmp_path / "out").exists()


def test_an_arms_file_is_no_recipe_and_ranks_are_checked_before_anything_starts(recipe, tmp_path):
    with pytest.raises(RunError, match="is an arm's file, not a recipe"):
        matched.main([str(ROOT / "config/arms/kronecker.py"), "--dry_run"])
    with pytest.raises(RunError, match="does not divide among 3 ranks"):
        matched.main([recipe(), f"--out={tmp_path / 'out'}", "--gpus_per_run=3"])
    assert not (tmp_path / "out").exists()


def test_a_file_that_would_make_the_label_lie_is_refused_too(recipe, tmp_path):
    (tmp_path / "more.py").write_text("wte_ngrams = 64\n")
    for args in ([recipe(), str(tmp_path / "more.py")], [recipe(wte_ngrams=64)]):
        with pytest.raises(RunError, match=r"^wte_ngrams .*config.arms.NAME"):
            matched.main([*args, f"--out={tmp_path / 'out'}"])


def test_check_without_data_is_one_error(recipe, tmp_path):
    args = [recipe(data_dir=str(tmp_path / "none")), f"--out={tmp_path / 'out'}", "--arms=bpe_tied"]
    with pytest.raises(RunError) as e:
        matched.main([*args, "--check"])
    assert "error:" not in str(e.value) and "prepare a data set" in str(e.value)
