"""scripts/gpu/recipe.py: at toy size on a CPU runs train, match, are gathered, and refused where they do not belong."""

import json
import shlex
import shutil

import pytest
from conftest import ROOT, make_tiny_data

import configurator
from engine.contract import schedule_sha256
from scripts.analysis.runs import load_folder
from scripts.gpu import recipe

TOY = (
    "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=8 --global_batch_size=8 --vocab_size=0 "
    "--max_iters=40 --warmup_iters=4 --learning_rate=3e-3 --min_lr=3e-4 --eval_interval=10 --eval_tokens=2048 "
    "--log_interval=5 --ckpt_interval=40 --dtype=float32 --pos_dim=8 --seeds=1"
).split()
TRAIN = ["train", *TOY, "--arms=bpe_untied,kronecker"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two arms trained by the recipe, and compared."""
    folder = tmp_path_factory.mktemp("gpu")
    data = make_tiny_data(folder / "data")
    flags = ["--work", str(folder / "work"), "--out", str(folder / "work" / "results")]
    recipe.main([*TRAIN, *flags, "--data-dir", str(data)])
    recipe.main(["gather", *flags, "--baseline=bpe_untied"])
    return folder


@pytest.fixture
def copied(work, tmp_path):
    shutil.copytree(work / "work" / "results", tmp_path / "results")
    return tmp_path / "results"


def refused(words, sentence) -> None:
    with pytest.raises(SystemExit) as e:
        recipe.main(list(map(str, words)))
    assert str(e.value).startswith("error: ") and sentence in str(e.value) and "\n" not in str(e.value)


def test_gathered_records_are_the_runs_and_the_page_tells_their_losses(work):
    out = work / "work" / "results"
    page = (out / "compare" / "comparison.md").read_text()
    for arm in ("bpe_untied", "kronecker"):
        run = load_folder(work / "work" / "runs" / f"{arm}_s1")
        kept = load_folder(out / "runs" / f"{arm}_s1")
        assert (run.train, run.val, run.state, run.info) == (kept.train, kept.val, "finished", kept.info)
        assert f"| {arm} | {run.val[-1]['val/loss']:.4f} |" in page
    assert (out / "compare" / "report.html").stat().st_size > 10_000
    assert not list((out / "runs").rglob("ckpt"))  # records alone: a few kilobytes a run


def test_a_second_call_trains_nothing_again(work, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in (work / "work" / "runs").rglob("metrics.jsonl")}
    recipe.main([*TRAIN, f"--work={work / 'work'}", f"--out={tmp_path}", f"--data-dir={work / 'data'}"])
    assert before == {p: p.stat().st_mtime_ns for p in (work / "work" / "runs").rglob("metrics.jsonl")}
    assert len(list(tmp_path.glob("runs/*/metrics.jsonl"))) == 2


def test_runs_outside_the_plan_are_refused_before_they_train_and_when_gathered(work, copied, tmp_path):
    run = load_folder(copied / "runs" / "kronecker_s1")
    facts = {k: run.info[k] for k in recipe.PINNED if k in run.info} | {"tokens": 40 * 256}
    flags = [f"--out={copied}", f"--data-dir={work / 'data'}", f"--work={tmp_path / 'none'}"]
    (copied / "plan.json").write_text(json.dumps(facts))
    recipe.main(["gather", *flags, "--baseline=bpe_untied"])
    for key, other in (("tokens", 99), ("data_fingerprint", "0" * 64), ("val_sha256", "0" * 64)):
        (copied / "plan.json").write_text(json.dumps(facts | {key: other}))
        refused(["gather", *flags], f"does not belong to this comparison: {key} is")
    refused(
        ["train", *TOY, *flags, "--arms=bpe_untied"],
        "bpe_untied, seed 1 does not belong to this comparison: val_sha256 is",
    )
    assert not (tmp_path / "none" / "runs").exists()


def test_records_that_do_not_match_are_refused(copied, tmp_path, capfd):
    path = copied / "runs" / "kronecker_s1" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"body_sha256": "0" * 64}))
    flags = [f"--out={copied}", f"--work={tmp_path}"]
    refused(["gather", *flags, "--baseline=bpe_untied"], "not done: gather (compare.py): exit status 1")
    assert "body_sha256 differs between" in capfd.readouterr().err
    path.write_text("{")
    refused(["gather", *flags], "run.json")


def test_every_command_of_every_piece_is_one_that_this_project_has(tmp_path, capsys):
    """Each names a file that is there, and flags that it knows."""
    (tmp_path / "sweep").mkdir()
    more = {"embedding": ["--text=x.jsonl.xz"], "speed": ["--nanogpt-dir=x"], "probes": ["--text=x"]}
    for piece in recipe.PIECES:
        recipe.main([piece, "--show", f"--work={tmp_path}", f"--out={tmp_path}", *more.get(piece, [])])
    commands = [shlex.split(line.partition(": ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == 1 + 2 + 1 + 1 + 6 + 1 + 2
    for command in commands:
        script = ROOT / (command[1] if command[1] != "-m" else command[-1])
        assert script.is_file(), command
        shared = ("scripts/probes/common.py", "scripts/bench/rounds.py")
        known = script.read_text() + "".join((ROOT / name).read_text() for name in shared)
        for flag in (word.partition("=")[0] for word in command[2:] if word.startswith("--")):
            mine = f'"{flag}"' in known or (
                script.name in ("matched.py", "train.py") and f"{flag[2:]}" in configurator.Config.__dict__
            )
            assert mine or flag == "--junitxml", (flag, command)
        assert script.name != "norms.py" or not any(word.startswith("--device") for word in command)


def test_arguments_that_make_no_sense_are_one_sentence(tmp_path):
    refused(["dance"], "invalid choice: 'dance'")
    refused(["train", "--minutes=0"], "argument --minutes")
    refused(["gather", f"--work={tmp_path / 'a'}", f"--out={tmp_path / 'b'}"], "there is no folder")


def test_the_recipe_is_the_one_that_the_plan_pins():
    """Once runs stand in results/124m, neither the recipe's schedule nor what counts as one may change."""
    import dataclasses

    plan = json.loads((ROOT / "results" / "124m" / "plan.json").read_text())
    config = configurator.load([str(ROOT / recipe.RECIPE)], quiet=True)
    step = config.global_batch_size * config.block_size
    assert plan["schedule_sha256"] == schedule_sha256(dataclasses.asdict(config), step)
    assert (plan["tokens_per_step"], plan["tokens"]) == (step, step * config.max_iters)
    assert 100_000_000 <= plan["tokens"] <= 4 * plan["train_tokens"]


def test_an_unfinished_run_does_not_replace_a_finished_record(work, copied, tmp_path):
    """A machine that was lent anew has none of the runs whose records are here."""
    kept = copied / "runs" / "kronecker_s1"
    before = {p: p.read_bytes() for p in kept.iterdir()}
    anew = shutil.copytree(
        work / "work" / "runs" / "kronecker_s1", tmp_path / "work" / "runs" / "kronecker_s1"
    )
    lines = (anew / "metrics.jsonl").read_text().splitlines(keepends=True)
    (anew / "metrics.jsonl").write_text("".join(lines[:3]))
    args = recipe.arguments(["gather", f"--work={tmp_path / 'work'}", f"--out={copied}"])
    recipe.keep_records(args)
    assert {p: p.read_bytes() for p in kept.iterdir()} == before
    (kept / "metrics.jsonl").write_text("".join(lines[:2]))
    recipe.keep_records(args)
    assert (kept / "metrics.jsonl").read_text() == "".join(lines[:3])
