"""scripts/analysis/numbers.py against figures worked out by hand."""

import json
import math

import pytest
from runs_on_disk import load, write_demo, write_run

from engine.errors import RunError
from scripts.analysis import numbers, words


@pytest.fixture
def runs_dir(tmp_path):
    return write_demo(tmp_path)


def pair(c, arm, over):
    return next(p for p in c["pairs"] if (p["arm"], p["over"]) == (arm, over))


def test_final_losses_and_paired_gain(runs_dir):
    c = numbers.compare(load(runs_dir))
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
    tied, untied, codec = "bpe_tied", "bpe_untied", "kronecker"
    assert [(q["arm"], q["over"]) for q in c["pairs"]] == [(untied, tied), (codec, tied), (codec, untied)]
    by_seed = pair(c, "kronecker", "bpe_untied")["gain_nats"]["by_seed"]
    assert by_seed == pytest.approx({"1337": 0.1, "1338": 0.0, "1339": 0.0}, abs=1e-12)


def test_steps_to_reach_speed_parameters_drift(runs_dir):
    c = numbers.compare(load(runs_dir))
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


def test_a_baseline_without_a_speed_leaves_the_ratio_out(tmp_path):
    for arm in ("bpe_tied", "kronecker"):
        folder = write_run(tmp_path, arm, 1, 3.8)
        if arm == "bpe_tied":
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            rows = [row | {"tok_per_sec": 0} for row in rows]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert numbers.compare(load(tmp_path))["speed"]["kronecker"]["ratio"] is None


def test_decomposition_adds_up(runs_dir):
    d = numbers.compare(load(runs_dir))["decomposition"]
    assert d["head"]["mean"] == pytest.approx(0.1)
    assert d["codec"]["mean"] == pytest.approx(0.1 / 3)
    assert d["head"]["mean"] + d["codec"]["mean"] == pytest.approx(d["total"]["mean"])


def test_unfinished_runs_are_left_out_and_said(runs_dir):
    write_run(runs_dir, "kronecker", 1340, 3.8, upto=50)
    c = numbers.compare(load(runs_dir))
    assert [x["state"] for x in c["left_out"]] == ["unfinished: iter 50 of 100"]
    assert c["seeds"] == [1337, 1338, 1339]
    c = numbers.compare(load(runs_dir), allow_unfinished=True)
    assert c["at_iter"] == 50 and not c["left_out"]
    assert any("iter 50 of 100" in n for n in c["notes"])
    assert any("missing: bpe_tied seed 1340, bpe_untied seed 1340" in n for n in c["notes"])


def test_nothing_finished_says_so(tmp_path):
    write_run(tmp_path, "bpe_tied", 1, 4.0, upto=50)
    with pytest.raises(RunError, match="no finished run"):
        numbers.compare(load(tmp_path))


def test_diverged_run_is_left_out(runs_dir):
    path = runs_dir / "kronecker_s1339" / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps({"iter": 100, "val/loss": float("nan")}) + "\n")
    c = numbers.compare(load(runs_dir))
    assert c["left_out"][0]["state"].startswith("diverged")
    assert pair(c, "kronecker", "bpe_tied")["seeds"] == [1337, 1338]


def test_twins_and_missing_baseline(runs_dir):
    with pytest.raises(RunError, match="no finished run of the baseline"):
        numbers.compare(load(runs_dir), baseline="bpe_tide")
    write_run(runs_dir, "kronecker", 1337, 3.7, name="again")
    with pytest.raises(RunError, match="both arm kronecker, seed 1337"):
        numbers.compare(load(runs_dir))


def test_one_seed_gives_no_interval(tmp_path):
    write_run(tmp_path, "bpe_tied", 1, 4.0)
    write_run(tmp_path, "kronecker", 1, 3.9)
    c = numbers.compare(load(tmp_path))
    assert c["pairs"][0]["gain_nats"]["low"] is None
    assert any("One seed" in s for s in c["claims"])


def test_gain_by_frequency_by_hand(runs_dir):
    runs = load(runs_dir)
    older = {"bpe_untied": [], "kronecker": []}  # which lack it
    assert numbers.compare(runs)["frequency"]["input"] == older
    for run in runs:
        loss = {"bpe_tied": 4.0, "bpe_untied": 3.9, "kronecker": 3.5}[run.arm] + 0.1 * (run.seed - 1337)
        for side in ("input", "target"):
            run.val[-1] |= {f"val/by_{side}/{n}": loss + n for n in (4, 16)}
            run.val[-1] |= {f"val/n_{side}/{n}": 10 * n for n in (4, 16)}
    buckets = numbers.compare(runs)["frequency"]["target"]["kronecker"]
    assert [(b["count"], b["tokens"], b["n"]) for b in buckets] == [(4, 40, 3), (16, 160, 3)]
    assert [b["mean"] for b in buckets] == pytest.approx([0.5, 0.5])
    older = next(run for run in runs if run.arm == "kronecker")  # one run lacks it
    older.val[-1] = {k: x for k, x in older.val[-1].items() if "_target/" not in k}
    assert numbers.compare(runs)["frequency"]["target"]["kronecker"] == []


def test_losses_that_a_ratio_cannot_bear_are_compared_all_the_same(tmp_path):
    for arm, loss in (("bpe_tied", 0.0), ("kronecker", 1e4)):
        write_run(tmp_path, arm, 1, loss)
    c = numbers.compare(load(tmp_path))
    assert c["pairs"][0]["gain_nats"]["mean"] == -1e4
    assert c["pairs"][0]["gain_percent"] is None and c["pairs"][0]["perplexity_ratio"]["mean"] == math.inf
    assert words.gain_table(c).rows[0][-3:-1] == ["-", "inf"]


def test_runs_of_one_name_with_other_keys_are_compared_as_two_arms(runs_dir):
    runs = load(runs_dir)
    for run in runs:
        if run.arm == "kronecker":
            run.config |= {"wte": "kronecker", "tie_weights": False, "wte_rank": 16 * (run.seed == 1339)}
    c = numbers.compare(runs)
    assert c["arms"] == ["bpe_tied", "bpe_untied", "kronecker", "kronecker[wte_rank=16]"]
    assert c["arm_keys"]["kronecker[wte_rank=16]"]["wte_rank"] == 16
    assert pair(c, "kronecker", "bpe_tied")["seeds"] == [1337, 1338]


def test_a_count_takes_its_unit_after_rounding():
    told = [numbers.count(n) for n in (0, 999, 999.6, 1000, 999_600, 9.996e8, 104857600)]
    assert told == ["0", "999", "1k", "1k", "1M", "1B", "105M"]
