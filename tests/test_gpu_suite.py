"""scripts/gpu/suite.py at toy size on a CPU: the pieces run, match, are gathered, and refuse what does not belong."""

import dataclasses
import json
import shutil
import sys

import pytest
from conftest import ROOT

import configurator
from data.tokenizers import load_tokenizer
from data.verify import verify
from engine.contract import schedule_sha256
from scripts.analysis import runs as analysis_runs
from scripts.bench import train as bench_train
from scripts.gpu import checks as gpu_checks
from scripts.gpu import gather as gpu_gather
from scripts.gpu import suite as gpu_suite

RUNS = ["--arm", "bpe_untied,kronecker", "--seed", "1,2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folder in which prepare, correctness and four runs were done at toy size."""
    folder = tmp_path_factory.mktemp("suite")
    done = gpu_suite.main(["prepare", "correctness", "train", "--toy", "--work", str(folder), *RUNS])
    assert done == 0
    return folder


@pytest.fixture
def results(work, tmp_path):
    """A copy of its results, to be spoilt."""
    return shutil.copytree(work / "results", tmp_path / "results")


def pieces(folder, name) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted(folder.glob(f"{name}_*.json"))]


def suite(*words) -> int:
    return gpu_suite.main([*map(str, words), "--toy"])


def test_every_piece_says_how_it_was_made(work):
    paths = [p for p in sorted((work / "results").glob("*.json")) if p.name != "plan.json"]
    assert len(paths) == 6
    for path in paths:
        content = json.loads(path.read_text())
        assert {"piece", "command", "commit", "device", "torch", "date", "seconds"} <= content.keys()
        assert content["machine"] in path.name
        assert content["toy"] is True
        assert str(work) not in path.read_text().replace(content["command"], "")


def test_correctness_is_complete_and_holds(work):
    (found,) = pieces(work / "results", "correctness")
    names = " | ".join(c["name"] for c in found["checks"])
    assert found["ok"]
    for part in ("embedding", "gradient", "deterministic", "compiled", "resume", "loss=chunked"):
        assert part in names


def test_a_wrong_value_does_not_pass(tmp_path, monkeypatch, capsys):
    """A gradient that is off by one per cent, and a part that breaks, are named and end with status 1."""
    parts = ("attention", "determinism", "compiled", "resume", "waits", "gpu_tests")
    for part in parts:
        monkeypatch.setattr(gpu_checks, part, lambda *args: None)
    plain = gpu_checks.KroneckerEmbedding.forward
    monkeypatch.setattr(gpu_checks.KroneckerEmbedding, "forward", lambda self, ids: 1.01 * plain(self, ids))
    monkeypatch.setattr(gpu_checks, "loss_and_model", lambda *args: 1 / 0)
    assert suite("correctness", "--work", tmp_path) == 1
    said = capsys.readouterr().err
    assert "WRONG its gradient, V 512, d 32, float32" in said
    assert "WRONG Part (ZeroDivisionError" in said.replace("<lambda>", "Part")
    (found,) = pieces(tmp_path / "results", "correctness")
    assert not found["ok"]


def test_packs_may_come_one_by_one_in_any_order(work, tmp_path, monkeypatch):
    texts = work / "text"
    spec = {"kind": "bytebpe", "name": "pydocs", "file": "tokenizer.json"}
    monkeypatch.setattr(gpu_suite, "load_tokenizer", lambda name: load_tokenizer(spec, texts))
    for name in ("toy-b", "toy-a"):
        flags = [
            "--work",
            tmp_path,
            "--val",
            texts / "toy-val.jsonl.xz",
            "--text",
            texts / f"{name}.jsonl.xz",
        ]
        assert suite("prepare", *flags) == 0
    together = [json.loads((w / "data" / "meta.json").read_text()) for w in (work, tmp_path)]
    assert together[0]["shards"] == together[1]["shards"]
    files = ["mix_val_000000.bin", "mix_train_000001.bin", "mix_train_000002.bin"]
    assert [s["file"] for s in together[0]["shards"]] == files
    verified = verify(tmp_path / "data")
    assert not verified, verified


def test_gathered_figures_are_those_of_the_runs(work, results, capsys):
    assert suite("gather", "--work", work, "--out", results) == 0
    gathered = json.loads((results / "gathered.json").read_text())
    losses = next(t for t in gathered["tables"] if t["title"].startswith("Validation loss"))
    for arm, *cells in losses["rows"]:
        for seed, cell in zip((1, 2), cells, strict=False):
            rows = json.loads(next(results.glob(f"train_{arm}_s{seed}_*.json")).read_text())["metrics"]
            assert cell == f"{[r['val/loss'] for r in rows if 'val/loss' in r][-1]:.4f}"
    assert "paired t intervals over 2 seeds" in (results / "summary.md").read_text()
    assert (results / "compare" / "report.html").stat().st_size > 10_000
    assert (results / "compare" / "curves.svg").is_file()


def test_runs_that_are_there_are_left_alone(work, capsys):
    assert suite("train", "--work", work, *RUNS) == 0
    assert capsys.readouterr().out.count("is there already") == 4


def test_a_run_outside_the_plan_is_refused_before_it_trains(work, capsys):
    more = ["--arm", "bpe_untied", "--seed", "3"]
    assert suite("train", "--work", work, *more, "--tokens", 256 * 50) == 1
    assert "does not belong to the comparison: tokens is 12800" in capsys.readouterr().err
    assert suite("train", "--work", work, *more, "--learning_rate=0.1") == 1
    assert "schedule_sha256" in capsys.readouterr().err
    assert suite("train", "--work", work, *more, "--tokens", 1000) == 1
    assert "no multiple of a step's 256" in capsys.readouterr().err
    assert not (work / "runs" / "124m" / "bpe_untied_s3").exists()


def spoil(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        part, _, name = key.partition("__")
        content[part] = content[part] | {name: value} if name else value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"run__data_sha256": "0" * 64}, "data_sha256 differs between"),
        ({"run__body_sha256": "0" * 64}, "body_sha256 differs between"),
        ({"run__val_sha256": "0" * 64}, "does not belong to this comparison: its val_sha256"),
        ({"run__data_fingerprint": "x"}, "does not belong to this comparison: its data_fingerprint"),
        ({"config__max_iters": 39}, "does not belong to this comparison: its tokens"),
        ({"seed": 9}, "its run is bpe_untied, 1"),
        ({"toy": False}, "is a toy's beside real ones"),
    ],
)
def test_pieces_that_do_not_match_are_refused(results, capsys, changes, sentence):
    spoil(next(results.glob("train_bpe_untied_s1_*.json")), **changes)
    assert suite("gather", "--out", results, "--work", results) == 1
    assert sentence in capsys.readouterr().err
    assert not (results / "summary.md").exists()


def test_one_run_from_two_machines_and_damaged_files_are_refused(results, capsys):
    one = next(results.glob("train_kronecker_s2_*.json"))
    twin = shutil.copy(one, results / "train_kronecker_s2_other.json")
    assert suite("gather", "--out", results, "--work", results) == 1
    assert "are both train of arm kronecker, seed 2; take one away" in capsys.readouterr().err
    twin.write_text("{")
    assert suite("gather", "--out", results, "--work", results) == 1
    assert "is not valid JSON" in capsys.readouterr().err


def test_a_run_is_stopped_in_time_and_goes_on_in_the_next_call(work, tmp_path, capsys):
    """A call whose time runs out leaves a checkpoint; the next one finishes the same run."""
    shutil.copytree(work / "data", tmp_path / "data")
    flags = ["--work", tmp_path, "--arm", "bpe_untied", "--seed", "1", "--tokens", 256 * 400]
    flags += ["--plan", tmp_path / "plan.json", "--log_interval=1", "--eval_tokens=64"]
    assert suite("train", *flags, "--minutes", 24 / 60) == 1
    said = capsys.readouterr().err
    if "was stopped near step" in said:  # a fast machine may have finished it
        assert not list((tmp_path / "results").glob("train_*.json"))
        assert suite("train", *flags) == 0
    (run,) = pieces(tmp_path / "results", "train")
    assert run["metrics"][-1]["iter"] == 400


def test_arguments_that_make_no_sense_are_one_sentence(tmp_path, capsys):
    for words, sentence in [
        (["train", "--toy", "--arm", "bpe_teid"], "there is no arm 'bpe_teid'"),
        (["train", "--toy", "--seed", "one"], "--seed=one are no whole numbers"),
        (
            ["gather", "--toy", "--out", str(ROOT / "results" / "124m")],
            "toy figures do not belong into results/",
        ),
        (["dance"], "invalid choice: 'dance'"),
        (["train", "--toy", "--nonsense"], "unrecognized argument --nonsense"),
    ]:
        with pytest.raises(SystemExit):
            gpu_suite.main(words)
        assert sentence in capsys.readouterr().err
    assert gpu_suite.main(["gather", "--toy", "--work", str(tmp_path)]) == 1
    assert "holds no piece yet" in capsys.readouterr().err


def test_probe_figures_and_embedding_table_by_hand():
    content = {"kronecker": {"agg": {"by_seed": {"1": {"mean_kl": 0.5, "n": 3}}}}, "provenance": {"x": 1}}
    assert gpu_gather.figures_of_probe("spelling", content)["by_run"] == {
        "kronecker_s1": {"mean_kl": 0.5, "n": 3}
    }
    content = {"by_run": {"bpe_tied_s7": {"separation": [0.1, 0.2, 0.3]}}}
    found = gpu_gather.figures_of_probe("tradeoff", content)["by_run"]
    assert found == {"bpe_tied_s7": {"separation first": 0.1, "separation last": 0.3}}
    bench = {
        "V": 50304, "d": 768, "pos_dim": 16, "tokens": 65536, "ids": "text",
        "fwd_bwd_ms": {"kronecker": 0.5, "embedding": 1.0, "reference": 20.0},
        "share_of_bandwidth_bound": {"kronecker": 0.25, "embedding": 0.5},
    }  # fmt: skip
    piece = {"piece": "embedding", "device": "x", "results": {"float32": {"rows": [bench]}}}
    (row,) = gpu_gather.embedding_table([(None, piece)]).rows
    assert row[4:9] == ["0.500", "1.000", "0.50x", "40x", "25%"]


def test_speed_table_by_hand():
    def side(*speeds):
        same = {"tokens": 1, "gb": 2.0, "mfu": 50.0}
        return [{"round": n, "tokens_per_s": s, "ms": 1e3 / s} | same for n, s in enumerate(speeds) if s]

    rounds = {
        "bpe_untied": side(100, 110),
        "kronecker": side(101, 121),
        "nanoGPT, as it comes": side(80, 80),
        "bpe_tied": side(0, 160),
    }
    mfu = {"convention": "6N", "peak_flops": 989e12, "device": "H200"}
    piece = {
        "piece": "speed",
        "device": "x",
        "date": "2026-01-01",
        "rounds": rounds,
        "keys": {},
        "batch_size": 1,
        "mfu": mfu,
    }
    t = gpu_gather.speed_table([(None, piece)])
    assert [row[6] for row in t.rows] == ["1.312x", "1.387x", "1.000x", "2.000x"]
    assert t.rows[1][7] == "1.055x"
    assert "989 TFLOP/s" in t.note


def test_a_side_that_fails_costs_its_figure_and_no_more(capsys):
    def broken(number):
        raise bench_train.BenchError("no memory")

    sides = {"a": lambda n: {"ms": n}, "b": broken}
    rounds = bench_train.alternate(sides, 2, left=lambda: 100.0)
    assert rounds == {"a": [{"round": 0, "ms": 0}, {"round": 1, "ms": 1}], "b": []}
    assert "b: no memory" in capsys.readouterr().out
    with pytest.raises(bench_train.BenchError):
        bench_train.alternate(sides, 1)
    rounds = bench_train.alternate({"a": sides["a"]}, 5, left=lambda: -1.0)
    assert len(rounds["a"]) == 1  # no time for a second round


def test_a_process_is_ended_at_its_limit(tmp_path):
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    with pytest.raises(bench_train.BenchError, match="ended after 1 s"):
        bench_train.timed([sys.executable, str(tmp_path / "slow.py")], tmp_path, {}, limit=1)


def test_the_recipe_is_the_one_that_the_plan_pins():
    """Once runs stand in results/124m, neither the recipe's schedule nor what counts as one may change."""
    plan = json.loads((ROOT / "results" / "124m" / "plan.json").read_text())
    config = configurator.load([str(ROOT / gpu_suite.RECIPE)], quiet=True)
    step = config.global_batch_size * config.block_size
    assert plan["schedule_sha256"] == schedule_sha256(dataclasses.asdict(config), step)
    assert (plan["tokens_per_step"], plan["tokens"]) == (step, step * config.max_iters)
    assert plan["tokens"] >= 100_000_000
    assert plan["tokens"] <= 4 * plan["train_tokens"]


def test_compare_reads_the_runs_as_it_reads_folders(work, results):
    """A run from a piece's JSON is the run that its folder holds."""
    runs = gpu_gather.runs_of(gpu_gather.read_pieces(results), None, [], "train")
    for run in runs:
        folder = analysis_runs.load_folder(work / "runs" / "124m" / f"{run.arm}_s{run.seed}")
        assert (run.train, run.val, run.state) == (folder.train, folder.val, folder.state)
