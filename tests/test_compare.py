"""scripts/compare.py, scripts/analysis/stats.py and scripts/analysis/report.py against numbers worked out by hand."""

import json
import math
import re

import numpy as np
import pytest

from scripts import compare
from scripts.analysis import report, stats

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
    (folder / "config.json").write_text(
        json.dumps({"max_iters": 100, "seed": seed, "n_layer": 2} | (config or {}))
    )
    record = {
        "arm": arm,
        "seed": seed,
        "body_sha256": f"body{seed}",
        "data_sha256": f"data{seed}",
        "val_sha256": "val",
        "schedule_sha256": "schedule",
        "params": {
            "input": 50 if arm == "kronecker" else 200,
            "body": 400,
            "head": 0,
            "total": 600,
            "stock_table": 200,
        },
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
            row = {
                "iter": it,
                "tokens": it * 1000,
                "train/loss": 8.0 - it / 50,
                "tok_per_sec": SPEED.get(arm, 1.0),
            }
            rows.append(
                row | {"tok_per_sec": 1.0} if it == 0 else row
            )  # the first step is slow and must not count
        if it in (0, 50, 100) and it <= upto:
            value = {0: 8.0, 50: 4.5, 100: loss}[it]
            rows.append({"iter": it, "val/loss": value, "val/bpb": value / 4, "wte/rms": 0.02 + it / 2500})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def runs_dir(tmp_path):
    for arm, losses in LOSSES.items():
        for seed, loss in losses.items():
            write_run(tmp_path / "demo", arm, seed, loss)
    return tmp_path / "demo"


def load(root):
    return [compare.load_folder(f) for f in compare.find_run_folders([root])]


def pair(c, arm, over):
    return next(p for p in c["pairs"] if (p["arm"], p["over"]) == (arm, over))


def test_final_losses_and_paired_gain(runs_dir):
    c = compare.compare(load(runs_dir))
    tied = c["final"]["bpe_tied"]
    assert tied["val_loss"] == {"1337": 4.0, "1338": 4.1, "1339": 4.2}
    assert tied["mean"] == pytest.approx(4.1) and tied["sd"] == pytest.approx(0.1)
    # gains of kronecker over bpe_tied: 0.2, 0.1, 0.1; mean 0.4/3, sd 0.1/sqrt(3), t(0.975, 2) = 4.302653
    p = pair(c, "kronecker", "bpe_tied")
    g = p["gain_nats"]
    assert g["by_seed"] == pytest.approx({"1337": 0.2, "1338": 0.1, "1339": 0.1})
    assert g["mean"] == pytest.approx(0.4 / 3)
    assert g["sd"] == pytest.approx(0.1 / math.sqrt(3))
    assert g["low"] == pytest.approx(0.4 / 3 - 4.302653 * 0.1 / 3, abs=1e-6)
    assert g["high"] == pytest.approx(0.4 / 3 + 4.302653 * 0.1 / 3, abs=1e-6)
    assert p["gain_percent"]["mean"] == pytest.approx(100 * (0.2 / 4.0 + 0.1 / 4.1 + 0.1 / 4.2) / 3)
    assert p["perplexity_ratio"]["mean"] == pytest.approx(math.exp(-0.4 / 3))
    assert p["perplexity_ratio"]["low"] == pytest.approx(math.exp(-g["high"]))
    assert p["gain_bpb"]["mean"] == pytest.approx(0.1 / 3)
    # every pair is there, the arm of interest against the control too
    assert [(q["arm"], q["over"]) for q in c["pairs"]] == [
        ("bpe_untied", "bpe_tied"),
        ("kronecker", "bpe_tied"),
        ("kronecker", "bpe_untied"),
    ]
    assert pair(c, "kronecker", "bpe_untied")["gain_nats"]["by_seed"] == pytest.approx(
        {"1337": 0.1, "1338": 0.0, "1339": 0.0}, abs=1e-12
    )


def test_steps_to_reach_speed_parameters_drift(runs_dir):
    c = compare.compare(load(runs_dir))
    reach = pair(c, "kronecker", "bpe_tied")["reaches"]
    # seed 1337 falls from 4.5 at 50 to 3.8 at 100 and meets 4.0 after 5/7 of the way
    assert reach["arm"]["step_by_seed"]["1337"] == pytest.approx(50 + 50 * 5 / 7)
    # mean curve: 4.5 -> 11.9/3, target 4.1
    step = 50 + 50 * 0.4 / (4.5 - 11.9 / 3)
    assert reach["arm"]["step"] == pytest.approx(step) and reach["arm"]["ratio"] == pytest.approx(100 / step)
    assert reach["over"]["step"] is None and reach["over"]["ratio_over_seeds"] is None  # never gets there
    assert c["speed"]["kronecker"]["ratio"]["mean"] == pytest.approx(0.8)
    assert c["final"]["kronecker"]["params"]["input_percent_of_stock"] == 25
    assert c["final"]["kronecker"]["rms"]["ratio"]["mean"] == pytest.approx(3.0)


def test_decomposition_adds_up(runs_dir):
    d = compare.compare(load(runs_dir))["decomposition"]
    assert d["head"]["mean"] == pytest.approx(0.1)
    assert d["codec"]["mean"] == pytest.approx(0.1 / 3)
    assert d["head"]["mean"] + d["codec"]["mean"] == pytest.approx(d["total"]["mean"])


@pytest.mark.parametrize("name", [*compare.MATCH_PER_SEED, *compare.MATCH_ALL, *compare.MATCH_IF_RECORDED])
def test_refuses_runs_that_do_not_match(runs_dir, name):
    path = runs_dir / "kronecker_s1338" / "run.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {name: "other"}))
    with pytest.raises(compare.CompareError) as e:
        compare.compare(load(runs_dir))
    assert name in str(e.value) and "kronecker_s1338" in str(e.value) and "bpe_" in str(e.value)


def test_seed_may_change_data_and_body_but_an_arm_may_not_lack_them(runs_dir):
    compare.compare(load(runs_dir))  # seeds have different data_sha256 and body_sha256 here: fine
    path = runs_dir / "bpe_tied_s1337" / "run.json"
    info = json.loads(path.read_text())
    del info["body_sha256"]
    path.write_text(json.dumps(info))
    with pytest.raises(compare.CompareError, match="records no body_sha256"):
        compare.compare(load(runs_dir))


def test_unfinished_runs_are_left_out_and_said(runs_dir):
    write_run(runs_dir, "kronecker", 1340, 3.8, upto=50)
    c = compare.compare(load(runs_dir))
    assert [x["state"] for x in c["left_out"]] == ["unfinished: iter 50 of 100"]
    assert "kronecker_s1340" in compare.as_text(c) and c["seeds"] == [1337, 1338, 1339]
    c = compare.compare(load(runs_dir), allow_unfinished=True)
    assert c["at_iter"] == 50 and not c["left_out"]
    assert any("iter 50 of 100" in n for n in c["notes"])
    assert any("missing: bpe_tied seed 1340, bpe_untied seed 1340" in n for n in c["notes"])


def test_nothing_finished_says_so(tmp_path):
    write_run(tmp_path, "bpe_tied", 1, 4.0, upto=50)
    with pytest.raises(compare.CompareError, match="no finished run"):
        compare.compare(load(tmp_path))


def test_diverged_run_is_left_out(runs_dir):
    path = runs_dir / "kronecker_s1339" / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps({"iter": 100, "val/loss": float("nan")}) + "\n")
    c = compare.compare(load(runs_dir))
    assert c["left_out"][0]["state"].startswith("diverged")
    assert pair(c, "kronecker", "bpe_tied")["seeds"] == [1337, 1338]


def test_twins_and_missing_baseline(runs_dir):
    with pytest.raises(compare.CompareError, match="no finished run of the baseline"):
        compare.compare(load(runs_dir), baseline="bpe_tide")
    write_run(runs_dir, "kronecker", 1337, 3.7, name="again")
    with pytest.raises(compare.CompareError, match="both arm kronecker, seed 1337"):
        compare.compare(load(runs_dir))


def test_metrics_after_resume_and_after_a_kill(tmp_path):
    folder = write_run(tmp_path, "bpe_tied", 1, 4.0)
    path = folder / "metrics.jsonl"
    # a resume logs step 100 again; the kill cut its last line short
    path.write_text(path.read_text() + json.dumps({"iter": 100, "val/loss": 3.5}) + '\n{"iter": 1')
    assert compare.load_folder(folder).val_at(100) == 3.5
    path.write_text('{"iter": 0, broken\n' + path.read_text())
    with pytest.raises(compare.CompareError, match="line 1 of"):
        compare.load_folder(folder)


def test_one_seed_gives_no_interval(tmp_path):
    write_run(tmp_path, "bpe_tied", 1, 4.0)
    write_run(tmp_path, "kronecker", 1, 3.9)
    c = compare.compare(load(tmp_path))
    assert c["pairs"][0]["gain_nats"]["low"] is None
    assert any("One seed" in s for s in c["claims"])
    assert "nan" not in compare.as_text(c).lower()


def test_config_difference_within_an_arm_is_told(tmp_path):
    write_run(tmp_path, "bpe_tied", 1, 4.0)
    write_run(tmp_path, "bpe_tied", 2, 4.0, config={"dropout": 0.1})
    assert any("dropout" in n for n in compare.compare(load(tmp_path))["notes"])


def test_terminal_fits_110_columns(tmp_path):
    for arm in ("bpe_tied", "bpe_untied", "kronecker", "kronecker_tied"):
        for seed in range(1337, 1342):
            write_run(tmp_path, arm, seed, 4.0 + 0.01 * len(arm) + 0.0001 * seed)
    text = compare.as_text(compare.compare(load(tmp_path)))
    assert max(map(len, text.splitlines())) <= 110


def test_command_writes_everything_and_page_stands_alone(runs_dir, capsys):
    compare.main([str(runs_dir)])
    printed = capsys.readouterr().out
    assert "+0.1333" in printed and "report.html" in printed
    folder = runs_dir / "compare"
    assert json.loads((folder / "comparison.json").read_text())["arms"] == list(LOSSES)
    assert "+0.1333" in (folder / "comparison.md").read_text()
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG" and (
        folder / "curves.svg"
    ).stat().st_size > 5000
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3 and "+0.1333" in page and "Toy scale" in page
    resources = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|(@import)', page)
    assert all(r[0].startswith("#") or r[1].startswith("#") for r in resources), resources
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert not list(folder.rglob("*.tmp*"))


def test_report_gathers_sections_in_order(tmp_path):
    report.write_section(tmp_path, "late", "Later", 20, "<p>second & last</p>")
    page = report.write_section(tmp_path, "early", "Earlier", 10, "<p>first</p>").read_text()
    assert page.index("Earlier") < page.index("Later") and "second & last" in page
    page = report.write_section(tmp_path, "late", "Later", 20, "<p>replaced</p>").read_text()
    assert "second & last" not in page and "replaced" in page
    (tmp_path / "compare" / "sections" / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="not a section"):
        report.build_report(tmp_path)


def test_command_errors_are_one_sentence(tmp_path, runs_dir):
    (tmp_path / "empty").mkdir()
    for argv in (
        ["nowhere"],
        [str(tmp_path / "empty")],
        [str(runs_dir), "--baseline", "x"],
        ["--wandb", "x"],
    ):
        with pytest.raises(SystemExit) as e:
            compare.main(argv)
        assert str(e.value).startswith("error: ") and "\n" not in str(e.value)


class FakeRun:
    def __init__(self, folder):
        config = json.loads((folder / "config.json").read_text())
        self.config = config | {"run": json.loads((folder / "run.json").read_text())}
        self.name = folder.name
        self.rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]

    def scan_history(self):
        for row in self.rows:  # wandb adds its own keys and fills what a row lacks with None
            yield row | {"_step": row["iter"], "mfu": None}


class FakeApi:
    def __init__(self, folders):
        self.folders = folders

    def runs(self, path, filters=None):
        assert path == "someone/project"
        other = FakeRun(self.folders[0])
        other.config = {"lr": 1}  # a stranger's run in the same project
        return [other, *(FakeRun(f) for f in self.folders)]


def test_wandb_gives_the_same_comparison(runs_dir):
    folders = compare.find_run_folders([runs_dir])
    from_wandb = compare.compare(compare.load_wandb("someone/project", api=FakeApi(folders)))
    from_disk = compare.compare(load(runs_dir))
    for key in ("final", "pairs", "speed", "decomposition"):
        assert from_wandb[key] == from_disk[key]


def test_wandb_errors(runs_dir):
    class Broken:
        def runs(self, *a, **k):
            raise RuntimeError("permission denied\nTraceback ...")

    with pytest.raises(
        compare.CompareError, match=r"cannot read someone/project from wandb: permission denied$"
    ):
        compare.load_wandb("someone/project", api=Broken())
    with pytest.raises(compare.CompareError, match="entity/project"):
        compare.load_wandb("project", api=Broken())


def test_stats():
    # 5 and 1 discordant pairs: 2 * (C(6,0) + C(6,1)) / 2^6 = 0.21875
    a = [True] * 5 + [False] + [True] * 4
    b = [False] * 5 + [True] + [True] * 4
    m = stats.mcnemar(a, b)
    assert (m["only_a"], m["only_b"], m["n"]) == (5, 1, 10) and m["p_value"] == pytest.approx(0.21875)
    assert stats.mcnemar([True], [True])["p_value"] == 1.0
    assert stats.first_crossing([0, 10, 20], [5.0, 3.0, 1.0], 2.0) == 15.0
    assert stats.first_crossing([0, 10], [5.0, 3.0], 2.0) is None
    assert stats.first_crossing([0, 10], [5.0, 3.0], 6.0) == 0.0
    assert stats.slope([0, 1, 2], [1.0, 3.0, 5.0]) == pytest.approx(2.0)
    x = np.random.default_rng(0).normal(1.0, 2.0, 400)
    boot = stats.bootstrap_mean(x, seed=3)
    half = 1.96 * x.std(ddof=1) / 20  # the normal interval of a mean of 400
    assert boot["low"] == pytest.approx(x.mean() - half, abs=0.04)
    assert boot["high"] == pytest.approx(x.mean() + half, abs=0.04)
    assert boot == stats.bootstrap_mean(x, seed=3)
    assert stats.smooth([1.0, 2.0, 6.0, 4.0], 3) == pytest.approx([1.0, 3.0, 4.0, 4.0])
