"""scripts/gpu/: at toy size on a CPU the pieces run, match, are gathered, and refuse what does not belong."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, make_tiny_data

import configurator
from engine.contract import schedule_sha256
from scripts.analysis.runs import load_folder
from scripts.gpu import recipe


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two arms trained by the recipe, and gathered."""
    folder = tmp_path_factory.mktemp("gpu")
    data = make_tiny_data(folder / "data")
    flags = ["--toy", "--work", str(folder / "work"), "--data-dir", str(data), "--seeds=1"]
    recipe.main(["train", "gather", *flags, "--arms=bpe_untied,kronecker"])
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
    page = (out / "summary.md").read_text()
    for arm in ("bpe_untied", "kronecker"):
        run = load_folder(work / "work" / "runs" / f"{arm}_s1")
        kept = load_folder(out / "runs" / f"{arm}_s1")
        assert (run.train, run.val, run.state, run.info) == (kept.train, kept.val, "finished", kept.info)
        assert f"| {arm} | {run.val[-1]['val/loss']:.4f} |" in page
    assert "One seed" in page and "scripts/gpu/recipe.py train gather --toy" in page
    assert (out / "compare" / "report.html").stat().st_size > 10_000
    assert not list((out / "runs").rglob("ckpt"))  # records alone: a few kilobytes a run


def test_a_second_call_trains_nothing_again_and_takes_in_the_benches(work, tmp_path):
    flags = ["--toy", "--work", work / "work", "--out", tmp_path, "--data-dir", work / "data", "--seeds=1"]
    before = {p: p.stat().st_mtime_ns for p in (work / "work" / "runs").rglob("metrics.jsonl")}
    (tmp_path / "bench_train.md").write_text("# Training speed\n\n12.5x\n")
    (tmp_path / "gpu_tests.xml").write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1" timestamp="2026-01-02T03:04:05">'
        '<testcase name="a"/><testcase name="b"><failure/></testcase><testcase name="c"/></testsuite></testsuites>'
    )
    recipe.main(list(map(str, ["train", "gather", *flags, "--arms=bpe_untied,kronecker"])))
    assert before == {p: p.stat().st_mtime_ns for p in (work / "work" / "runs").rglob("metrics.jsonl")}
    page = (tmp_path / "summary.md").read_text()
    assert "12.5x" in page and "3 tests, 1 failed, 1 skipped (2026-01-02)\n- b." in page


def test_runs_outside_the_plan_are_refused_before_they_train_and_when_gathered(work, copied, tmp_path):
    run = load_folder(copied / "runs" / "kronecker_s1")
    facts = {k: run.info[k] for k in recipe.PINNED if k in run.info} | {"tokens": 40 * 256}
    flags = ["--toy", "--out", copied, "--data-dir", work / "data", "--work", tmp_path / "none"]
    (copied / "plan.json").write_text(json.dumps(facts))
    recipe.main(list(map(str, ["gather", *flags])))
    for key, other in (("tokens", 99), ("data_fingerprint", "0" * 64), ("val_sha256", "0" * 64)):
        (copied / "plan.json").write_text(json.dumps(facts | {key: other}))
        refused(["gather", *flags], f"do not belong to this comparison: {key} is")
    refused(
        ["train", *flags, "--arms=bpe_untied"], "these runs do not belong to this comparison: val_sha256 is"
    )
    assert not (tmp_path / "none" / "runs").exists()


def test_records_that_do_not_match_are_refused(work, copied, tmp_path):
    path = copied / "runs" / "kronecker_s1" / "run.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"body_sha256": "0" * 64}))
    flags = ["--toy", "--out", copied, "--data-dir", work / "data"]
    refused(["gather", *flags, "--work", tmp_path], "body_sha256 differs between")
    refused(["gather", *flags, "--work", work / "work"], "two runs of one name: take one away")
    path.write_text("{")
    refused(["gather", *flags, "--work", tmp_path], "run.json")


def test_every_command_of_every_piece_is_one_that_this_project_has(tmp_path, capsys):
    """The commands for a GPU and for a toy, shown; each names a file that is there, and flags that it knows."""
    more = {"embedding": ["--text=x.jsonl.xz"], "speed": ["--nanogpt-dir=x"], "probes": ["--text=x"]}
    for piece in recipe.PIECES:
        given = [piece, "--show", f"--work={tmp_path}", f"--out={tmp_path}", *more.get(piece, [])]
        recipe.main(given)
        recipe.main([*given, "--toy"])
    commands = [shlex.split(line.partition(": ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == 2 * (1 + 3 + 1 + 1 + 6 + 1)
    for command in commands:
        script = Path(command[1] if command[1] != "-m" else command[-1])
        assert script.is_file(), command
        shared = ("scripts/probes/common.py", "scripts/bench/rounds.py")
        known = script.read_text() + "".join((ROOT / name).read_text() for name in shared)
        for flag in (word.partition("=")[0] for word in command[2:] if word.startswith("--")):
            mine = f'"{flag}"' in known or (
                script.name in ("matched.py", "train.py") and f"{flag[2:]}" in configurator.Config.__dict__
            )
            assert mine or flag == "--junitxml", (flag, command)


def test_arguments_that_make_no_sense_are_one_sentence(tmp_path):
    refused(["dance"], "invalid choice: 'dance'")
    refused(
        ["gather", "--toy", "--out", ROOT / "results" / "124m"], "toy figures do not belong into results/"
    )
    refused(["train", "--minutes=0"], "argument --minutes")
    refused(["gather", "--work", tmp_path / "a", "--out", tmp_path / "b"], "there is nothing to gather")


def test_the_recipe_is_the_one_that_the_plan_pins():
    """Once runs stand in results/124m, neither the recipe's schedule nor what counts as one may change."""
    import dataclasses

    plan = json.loads((ROOT / "results" / "124m" / "plan.json").read_text())
    config = configurator.load([str(ROOT / recipe.RECIPE)], quiet=True)
    step = config.global_batch_size * config.block_size
    assert plan["schedule_sha256"] == schedule_sha256(dataclasses.asdict(config), step)
    assert (plan["tokens_per_step"], plan["tokens"]) == (step, step * config.max_iters)
    assert 100_000_000 <= plan["tokens"] <= 4 * plan["train_tokens"]
