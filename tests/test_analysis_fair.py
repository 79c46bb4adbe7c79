"""scripts/analysis/fair.py, fair_report.py and fair_figures.py on records made up from known truths."""

import json
import math
import random

import pytest
from conftest import ROOT

import configurator
from engine import contract
from engine.errors import RunError
from scripts import experiment
from scripts.analysis import fair, fair_figures, fair_report, stats

BEST_LR, BEST_MULT = 6e-3, {"bpe": 16, "kro": 0.25}
BODY = {"xs": 100_000, "s": 800_000, "m": 4_700_000}
BASE = {
    "bpe_tied": 0.3,
    "bpe_untied": 0.0,
    "kronecker": 0.05,
    "kronecker_permuted": 0.25,
    "kronecker_rank4": -0.1,
}
DAMAGE = 0.03  # what an e-fold of tokens costs the codec
FIRST = math.log(4096 * 256)


def true_gap(tokens: int, body: int) -> float:
    """Gain of kronecker over bpe_untied at the best settings."""
    return -0.05 - DAMAGE * (math.log(tokens) - FIRST - 1.5) + 0.01 * math.log(body / BODY["xs"])


def loss_of(exp, run, rng, noise):
    keys = experiment.own_keys(run.arm) | dict(run.setting)
    tokens, body = 4096 * exp.lengths[run.length]["max_iters"], BODY[run.rung]
    loss = 7 - 0.3 * (math.log(tokens) - FIRST) + BASE.get(run.arm, 0.1)
    loss += 0.1 * math.log2(keys["learning_rate"] / BEST_LR) ** 2
    loss += 0.02 * math.log2(keys["wte_lr_mult"] / BEST_MULT[run.arm[:3]]) ** 2
    if run.arm == "kronecker":
        loss += -0.05 - true_gap(tokens, body)
    return loss + rng.gauss(0, noise)


def made_up(noise=0.002):
    """(experiment, {name: record}) of the whole ladder, its losses from a known function."""
    exp = experiment.read(str(ROOT / "config/experiments/ladder.py"))
    rng, losses, records = random.Random(0), {}, {}
    while new := [run for run in experiment.Plan(exp, losses).runs if run.name not in losses]:
        for run in new:
            losses[run.name] = loss_of(exp, run, rng, noise)
            given = configurator.load(experiment.command_keys(exp, run), quiet=True)
            row = {"iter": given.max_iters, "val/loss": losses[run.name], "val/bpb": losses[run.name] / 3}
            for side in ("input", "target"):
                row |= {f"val/by_{side}/{low}": losses[run.name] + 0.1 / low for low in (1, 64)}
                row |= {f"val/n_{side}/{low}": 100 for low in (1, 64)}
            small = run.arm not in ("bpe_tied", "bpe_untied")
            about = {
                "arm": run.arm,
                "seed": run.seed,
                "body_sha256": f"{run.rung} {run.seed}",
                "data_sha256": f"{run.rung} {run.length} {run.seed}",
                "val_sha256": f"{run.rung} {run.stage}",
                "data_fingerprint": "one",
                "tokens_per_step": 4096,
                "device": "here",
                "commit": "abc",
                "params": {"body": BODY[run.rung], "input": 100 if small else 1000, "stock_table": 1000},
            }
            config = {key: getattr(given, key) for key in configurator.KEYS}
            config |= {"wte_init_rms": experiment.own_keys(run.arm)["wte_init_rms"]} | dict(run.setting)
            about["schedule_sha256"] = contract.schedule_sha256(config, 4096)
            what = {"experiment": "ladder", "name": run.name, "state": "finished"}
            records[run.name] = experiment.RunRecord(**what, config=config, run=about, rows=[row])
    return exp, records


@pytest.fixture(scope="module")
def ladder():
    exp, records = made_up()
    return exp, records, fair.numbers(exp, records, resamples=300)


def text_of(c) -> str:
    return " ".join(fair_report.as_text(c).split())


def best_cell(c, rung, length):
    return next(x for x in c["cells"] if (x["rung"], x["length"], x["which"]) == (rung, length, "best"))


def test_gains_of_each_cell_are_the_true_ones(ladder):
    _, _, c = ladder
    assert c["complete"] and not c["missing"]
    assert all(
        "at 4M tokens" in edge for edge in c["edges"]
    )  # where nothing above the tuning's best is tried
    for cell in (x for x in c["cells"] if x["which"] == "best"):
        truth = true_gap(cell["tokens"], cell["body"])
        assert cell["gains"]["kronecker"]["mean"] == pytest.approx(truth, abs=0.006)
        codec, table = (cell["loss"][arm] for arm in ("kronecker", "bpe_untied"))
        by_hand = sum(table[s] - codec[s] for s in codec) / len(codec)
        assert cell["gains"]["kronecker"]["mean"] == pytest.approx(by_hand)
        assert cell["settings"]["bpe_untied"] == {"learning_rate": 6e-3, "wte_lr_mult": 16.0}
    shared = next(x for x in c["cells"] if (x["rung"], x["length"], x["which"]) == ("xs", "1M", "shared"))
    # one setting for all hides the table's optimum: there the codec looks better than it is
    assert shared["gains"]["kronecker"]["mean"] > best_cell(c, "xs", "1M")["gains"]["kronecker"]["mean"] + 0.1
    questions = {q["what"]: q for q in shared["questions"]}
    assert questions["untying the head"]["mean"] == pytest.approx(0.3, abs=0.01)


def test_the_fit_finds_slope_prediction_and_crossing(ladder):
    _, _, c = ladder
    fit, held = c["gap"]["fit"], c["gap"]["held_out"]
    assert fit["cells"] == 5  # of six, one is held out
    assert fit["ln_tokens"]["mean"] == pytest.approx(-DAMAGE, abs=0.003)
    assert fit["ln_body"]["mean"] == pytest.approx(0.01, abs=0.002)
    assert fit["ln_tokens"]["low"] < fit["ln_tokens"]["mean"] < fit["ln_tokens"]["high"]
    truth = true_gap(4096 * 4096, BODY["xs"])
    assert held["predicted"]["mean"] == pytest.approx(truth, abs=0.01)
    assert held["measured"]["mean"] == pytest.approx(truth, abs=0.006)
    crossings = {x["rung"]: x for x in c["gap"]["crossings"]}
    assert set(crossings) == {"xs", "s"}  # rung m has one length
    # gap = 0 where ln(tokens) = FIRST + 1.5 - 0.05 / DAMAGE + ln(body / 1e5) / 3: before the first length on xs
    assert crossings["xs"]["tokens"] is None
    at = math.exp(FIRST + 1.5 - 0.05 / DAMAGE + math.log(8) / 3)
    assert crossings["s"]["tokens"] == pytest.approx(at, rel=0.15)
    assert crossings["s"]["low"] < crossings["s"]["tokens"] < crossings["s"]["high"]


def test_the_interval_of_the_slope_holds_the_truth_as_often_as_it_says(ladder):
    exp, _, c = ladder
    held, rng = 0, random.Random(1)
    for _ in range(40):
        cells = []
        for cell in (x for x in c["cells"] if x["which"] == "best"):
            truth = true_gap(cell["tokens"], cell["body"])
            seeds = {s: truth + rng.gauss(0, 0.01) for s in cell["gains"]["kronecker"]["by_seed"]}
            gain = {"mean": sum(seeds.values()) / len(seeds), "low": 0, "high": 0, "by_seed": seeds}
            cells.append(cell | {"gains": {"kronecker": gain}})
        slope = fair.gap(exp, cells, resamples=100)["fit"]["ln_tokens"]
        held += slope["low"] < -DAMAGE < slope["high"]
    assert 33 <= held <= 40  # 95% of 40 is 38


def test_settings_beside_the_lines_are_shown_and_choose_nothing(ladder):
    exp, records, c = ladder
    best = next(x for x in c["settings"] if (x["rung"], x["length"], x["arm"]) == ("xs", "1M", "bpe_untied"))
    best = experiment.setting_of("bpe_untied", best["keys"])
    chosen = records[experiment.Run("tune", "xs", "1M", "bpe_untied", best, 1).name]
    others = dict(records)
    for head, better in ((4.0, 0.25), (16.0, -0.5)):
        setting = experiment.setting_of("bpe_untied", dict(best) | {"head_lr_mult": head})
        name = experiment.Run("tune", "xs", "1M", "bpe_untied", setting, 1).name
        rows = [row | {"val/loss": row["val/loss"] - better} for row in chosen.rows]
        config = chosen.config | {"head_lr_mult": head}
        others[name] = chosen.model_copy(update={"name": name, "config": config, "rows": rows})
    other_windows = chosen.model_copy(update={"run": chosen.run | {"val_sha256": "others"}})
    others["tune/xs_1M/bpe_untied_elsewhere_s1"] = other_windows
    found = fair.numbers(exp, others, resamples=10)
    assert found["settings"] == c["settings"] and found["cells"] == c["cells"]
    assert [(x["setting"]["head_lr_mult"], x["gain"]) for x in found["beside"]] == [
        (4.0, pytest.approx(0.25)),
        (16.0, pytest.approx(-0.5)),
    ]
    assert (
        "2 more were tried in one run each, 1 of them better than the arm's best one (bpe_untied at head 4"
        in text_of(found)
    )
    assert not c["beside"] and "A better setting may lie beside these lines." in text_of(c)


def test_the_rule_calls_a_difference_one(ladder):
    exp, _, _ = ladder

    def gain(mine, theirs):
        return fair.gain(exp, {"a": mine, "b": theirs}, "a", "b")

    a = {"1": 6.0, "2": 6.1, "3": 6.2}
    assert gain(a, {"1": 6.01, "2": 6.112, "3": 6.208})["called"]
    sure_but_small = gain(a, {s: x + 0.003 for s, x in a.items()})
    assert sure_but_small["low"] > 0 and not sure_but_small["called"]
    assert not gain(a, {"1": 6.2, "2": 6.0, "3": 6.25})["called"]  # noisy
    assert not gain({"1": 5.0}, {"1": 6.0})["called"]  # one seed shows nothing
    assert gain({"1": 5.0}, {"2": 6.0}) is None


def test_the_prize_goes_only_to_arms_within_the_budget(ladder):
    _, _, c = ladder
    says = fair_report.prize_findings(c)
    beaten = "At rung xs, 16.8M tokens the tuned bpe_untied is beaten by kronecker_rank4 by "
    assert says[0].startswith(beaten) and ";" not in says[0]
    assert any(sentence.startswith("At rung s, 4.19M tokens the tuned") for sentence in says)
    assert not any("bpe_tied" in sentence for sentence in says)


def test_frequency_is_paired_by_seed(ladder):
    _, _, c = ladder
    cell = best_cell(c, "xs", "1M")
    for bucket in cell["frequency"]["target"]["kronecker"]:
        assert bucket["mean"] == pytest.approx(cell["gains"]["kronecker"]["mean"])
    assert [b["count"] for b in cell["frequency"]["input"]["kronecker"]] == [1, 64]


def test_the_report_says_it_with_intervals(ladder, tmp_path):
    _, _, c = ladder
    json.dumps(c, allow_nan=False)
    text = text_of(c)
    gain = best_cell(c, "xs", "1M")["gains"]["kronecker"]
    table = fair_report.question_table(c["cells"], c["shared"])
    column = table.header.index("xs, 1.05M, own best, n = 5")
    row = next(row for row in table.rows if row[1] == "kronecker over bpe_untied")
    said = f"{gain['mean']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})"
    assert row[column] == said + "†" * (not gain["called"]) and row[column] in text
    assert "the tuned bpe_untied is beaten by kronecker_rank4" in text
    assert "does not cross zero between 1.05M and 4.19M tokens" in text  # 16.8M are held out
    double = math.log(2) * c["gap"]["fit"]["ln_tokens"]["mean"]
    slope = text.partition("changes by ")[2].partition("training tokens")[0]
    assert slope.startswith(f"{double:+.4f} nats (") and slope.endswith(") with twice the ")
    figures = fair_figures.draw(c, tmp_path)
    assert list(figures) == ["gap", "learning_rates", "frequency"]
    assert all((tmp_path / f"{name}.svg").is_file() for name in figures)
    made = {"command": "python scripts/compare.py x", "commit": "abc", "machine": "m", "date": "2026-01-01"}
    page = fair_report.as_markdown(c, made, figures, "records = 'there'\n")
    assert "](gap.svg)" in page and "at commit abc" in page and "~~~python\nrecords = 'there'\n~~~" in page
    assert "| kronecker_rank4 | The codec plus a rank-4 residual" in page  # the arm's own words
    assert (
        "best settings at rung m, 1.05M tokens, are those chosen at rung s, 1.05M tokens." in page
    )  # m is never tuned
    assert "best settings at rung xs, 4.19M" not in page


@pytest.mark.parametrize(
    ("part", "key", "value", "says"),
    [
        ("run", "body_sha256", "another", "runs do not match: body_sha256"),
        ("run", "data_fingerprint", "another", "runs do not match: data_fingerprint"),
        ("config", "beta2", 0.5, "was made with beta2=0.5, but ladder asks for 0.95"),
    ],
)
def test_runs_that_do_not_match_are_refused(ladder, part, key, value, says):
    exp, records, _ = ladder
    name = next(n for n in records if n.startswith("final/xs_1M/bpe_hash_lr0.006") and n.endswith("s12"))
    other = records[name].model_copy(update={part: getattr(records[name], part) | {key: value}})
    with pytest.raises(RunError, match=says):
        fair.numbers(exp, records | {name: other}, resamples=10)


def test_a_ladder_that_has_only_begun_says_so(ladder):
    exp, records, _ = ladder
    first = {name: r for name, r in records.items() if name.startswith("tune/") and "mult" not in name}
    c = fair.numbers(exp, first, resamples=10)
    assert not c["complete"] and not c["cells"] and c["gap"]["fit"] is None
    text = text_of(c)
    assert "The tuning has not ended" in text and "90 of 90" not in text
    whole = "all final runs of rung xs, 1.05M tokens, one shared setting for all (45);"
    assert f"Not run for want of time: {whole}" in text
    partly = {name: r for name, r in records.items() if not name.startswith("final/xs_16M")}
    c = fair.numbers(exp, partly, resamples=10)
    assert [(m["rung"], m["length"], m["missing"]) for m in c["missing"]] == [("xs", "16M", 27)]
    assert c["gap"]["held_out"] is None and c["gap"]["fit"]["cells"] == 5


def test_part_of_the_final_runs_claims_no_more_than_it_shows(ladder):
    """Two seeds on one rung, one on another, a diverged run: named, and nothing is judged from one seed."""
    exp, records, _ = ladder
    kept = {"xs_1M": (11, 12), "s_1M": (11,)}
    part = {
        name: record
        for name, record in records.items()
        if not name.startswith("final/") or record.config["seed"] in kept.get(name.split("/")[1], ())
    }
    lost = next(n for n in part if n.startswith("final/xs_1M/bpe_hash_lr0.006") and n.endswith("s12"))
    part[lost] = part[lost].model_copy(update={"state": "diverged"})
    # two runs of one pair elsewhere, and one of them begun at another commit
    for name in (n for n in part if n.startswith("final/xs_1M/bpe_") and n.endswith("tied_lr0.003_s12")):
        starts = [{"device": "there", "commit": "old"}] * ("untied" in name)
        about = part[name].run | {"device": "there", "starts": starts}
        part[name] = part[name].model_copy(update={"run": about})
    c = fair.numbers(exp, part, resamples=10)
    assert c["gap"]["fit"] is None  # one cell of several seeds
    text = text_of(c)
    assert "1 seeds" not in text and "At rung s" not in text
    for says in (
        "(one seed, no interval)",
        "xs, 1.05M tokens (the longest with several seeds of these arms so far; 16.8M are planned) the tuned bpe_untied is "
        "beaten by",
        "own best, n = 1 to 2",
        "each arm at its own best setting, 1 to 2 seeds",
        "27 of 45 final runs of rung xs, 1.05M tokens, one shared setting for all (seeds 13, 14, 15 of every arm)",
        "all final runs of rung xs, 4.19M tokens, each arm at its own best setting (27); rung xs, 16.8M",
        "Diverged, and in no mean: bpe_hash at lr 0.006, rms 1, mult 16, rung xs, 1M tokens, seed 12 (final)",
    ):
        assert says in text
    made = dict.fromkeys(("command", "commit", "machine", "date"), "x")
    page = fair_report.as_markdown(c, made, {}, "")
    n = len(part)
    assert (
        f"on here ({n - 2} runs), there (2 runs)" in page and f"at commit abc ({n} runs), old (1 run)" in page
    )
    # bpe_untied's run differs from seven others in machine and from eight in commit, bpe_tied's from kronecker's in machine
    assert (
        "Of the pairs of runs of one seed (58) in 8 they are of different machines and in 8 they are of different"
        in text
    )


def cells_of(gains: dict) -> list[dict]:
    """Cells of a rung as fair.gap reads them: {tokens: gains by seed}."""
    return [
        {"rung": "xs", "length": f"{t}", "which": "best", "tokens": t, "body": 1e5}
        | {"gains": {"kronecker": stats.interval(g) | {"by_seed": dict(enumerate(g))}}}
        for t, g in gains.items()
    ]


THREE, BELOW = (0.1, 0.101, 0.099), (-0.2, -0.201, -0.199)


def test_the_fit_speaks_of_what_it_has_seen_alone(ladder):
    """Neither of a rung without a cell in it, nor beyond the fitted lengths, where the held-out one has the other sign."""
    exp, _, _ = ladder
    cells = cells_of({1e6: THREE, 4e6: (0.2, 0.201, 0.199)})
    held = [cell | {"length": "16M"} for cell in cells_of({16e6: BELOW})]
    elsewhere = [
        cell | {"rung": "s", "body": 8e5} for cell in cells_of({1e6: THREE[:1], 4e6: BELOW[:1]})
    ]  # one seed each
    g = fair.gap(exp, cells + held + elsewhere, resamples=500)
    assert [(x["rung"], x["from"], x["to"]) for x in g["crossings"]] == [("xs", 1e6, 4e6)]
    assert g["held_out"]["predicted"]["mean"] == pytest.approx(0.3)
    says = fair_report.gap_findings({"gap": g})
    assert "the fit fails there" in says[1] and "between 1M and 4M tokens" in says[2]
    # a place of a size that no term follows is predicted by nothing
    g = fair.gap(exp, cells + [cell | {"body": 8e5} for cell in held], resamples=500)
    assert "predicted" not in g["held_out"]
    says = fair_report.gap_findings({"gap": g})[1]
    assert says.startswith(
        "The fit has no term for parameters in the body, so for rung xs, 16M tokens, it predicts"
    )


def test_the_interval_of_a_prediction_hangs_on_no_draw(ladder):
    """A fit through two cells knows each as the t interval does, whatever the generator: to a hundredth of its width."""
    exp, _, _ = ladder
    cells = cells_of({1e6: (0.1, 0.12, 0.09), 4e6: (0.2, 0.23, 0.19)})
    g = fair.gap(exp, cells, resamples=100_000)
    for end, cell in zip(("at_from", "at_to"), cells, strict=True):
        gain = cell["gains"]["kronecker"]
        for side in ("low", "high"):
            assert g["crossings"][0][end][side] == pytest.approx(
                gain[side], abs=0.02 * (gain["high"] - gain["low"])
            )


@pytest.mark.parametrize(
    ("gains", "says"),
    [
        ({1e6: THREE, 4e6: (-0.1, -0.101, -0.099)}, "is zero at 2M tokens"),
        ({1e6: THREE, 4e6: (0.2, 0.201, 0.199)}, "does not cross zero between 1M and 4M tokens"),
        ({1e6: THREE, 4e6: (-0.01, 0.05, -0.06)}, "it is open whether the fitted gap crosses zero"),
        ({1e6: (0.1, 0.101), 4e6: (-0.01, -0.011), 16e6: (9.0,)}, "is zero at"),  # one seed has no say
    ],
)
def test_a_crossing_is_only_claimed_where_both_ends_are_sure(ladder, gains, says):
    exp, _, _ = ladder
    g = fair.gap(exp, cells_of(gains), resamples=500)
    assert says in fair_report.crossing(g["crossings"][0])
    for end, tokens in (("at_from", min(gains)), ("at_to", 4e6)):
        cell = stats.interval(gains[tokens])
        if len(gains) == 2:  # a fit through two cells knows each of them as well as the cell itself
            width = cell["high"] - cell["low"]
            assert g["crossings"][0][end]["low"] == pytest.approx(cell["low"], abs=0.4 * width)


def test_arms_of_equal_loss_keep_a_row_each(ladder):
    _, _, c = ladder
    cell = best_cell(c, "xs", "1M")
    twins = {**cell, "gains": cell["gains"] | {"bpe_hash": cell["gains"]["kronecker"]}}
    assert {row[0] for row in fair_report.cell_table(twins, "bpe_untied", True).rows} == set(cell["loss"])


def test_arms_that_stop_early_are_judged_where_they_stopped(ladder):
    """At 16M only the two arms of the gap: what 4M says of the others stands, and the tables show all arms."""
    exp, records, _ = ladder
    two = {
        name: r
        for name, r in records.items()
        if not name.startswith("final/xs_16M") or r.run["arm"] in ("bpe_untied", "kronecker")
    }
    c = fair.numbers(exp, two, resamples=10)
    says = [s for s in fair_report.prize_findings(c) if s.startswith("At rung xs")]
    assert says[0].startswith(
        "At rung xs, 16.8M tokens none of the arms tried with at most 15% of the table's input"
    )
    assert "(kronecker) beats" in says[0]
    shorter = "At rung xs, 4.19M tokens (the longest with several seeds of these arms so far; 16.8M are planned) the tuned"
    assert says[1].startswith(f"{shorter} bpe_untied is beaten by kronecker_rank4 by ")
    assert "not by kronecker_permuted" in says[1] and len(says) == 2
    assert [cell["length"] for cell in fair_figures.fullest(c)] == ["4M", "4M", "1M"]
    assert "by training count of the token read, rung xs, 4.19M tokens, each arm at its own best" in text_of(
        c
    )


def test_an_arm_whose_run_diverged_is_not_called_the_better_one(ladder):
    exp, records, _ = ladder
    gone = next(n for n in records if n.startswith("final/s_1M/kronecker_rank4") and n.endswith("s12"))
    part = records | {gone: records[gone].model_copy(update={"state": "diverged"})}
    cell = best_cell(fair.numbers(exp, part, resamples=10), "s", "1M")
    lucky = cell["gains"]["kronecker_rank4"]
    assert lucky["low"] > 0 and not lucky["called"] and cell["gains"]["kronecker_permuted"]["called"]
    row = next(r for r in fair_report.cell_table(cell, "bpe_untied", True).rows if r[0] == "kronecker_rank4")
    assert row[3] == "2, 1 diverged"


def test_runs_of_the_tuning_match_or_choose_nothing(ladder):
    exp, records, _ = ladder
    name = next(n for n in records if n.startswith("recheck/xs_4M/kronecker_lr"))
    for key in ("data_fingerprint", "val_sha256", "data_sha256", "body_sha256"):
        other = records[name].model_copy(update={"run": records[name].run | {key: "another"}})
        with pytest.raises(RunError, match=f"runs do not match: {key}"):
            experiment.plan_of(exp, records | {name: other})


@pytest.mark.parametrize(
    ("config", "run", "says"),
    [
        ({"wte_init_rms": 0.37}, {}, "was made with wte_init_rms=0.37, but ladder asks for 1.0"),
        ({"n_layer": None}, {}, "has no n_layer: restore it"),
        ({"weight_decay": None}, {}, "has no weight_decay: restore it"),
        ({"grad_clip": None}, {}, "has no grad_clip: restore it"),
        ({}, {"arm": "bpe_tied"}, "is of arm 'bpe_tied' and seed 12, not 'kronecker' and 12"),
        ({}, {"seed": 99}, "is of arm 'kronecker' and seed 99"),
        ({}, {"schedule_sha256": "0"}, "is not the one that its run.json signs"),
    ],
)
def test_a_record_that_says_another_run_is_refused(ladder, config, run, says):
    exp, records, _ = ladder
    name = "final/xs_1M/kronecker_lr0.003_s12"
    old = records[name]
    kept = {k: v for k, v in (old.config | config).items() if v is not None or k not in config}
    other = old.model_copy(update={"config": kept, "run": old.run | run})
    with pytest.raises(RunError, match=says):
        experiment.plan_of(exp, records | {name: other})


def test_a_record_less_in_the_tuning_is_told_as_that(ladder):
    exp, records, _ = ladder
    lost = "tune/xs_1M/bpe_hash_lr0.0015_s1"
    c = fair.numbers(exp, {n: r for n, r in records.items() if n != lost}, resamples=10)
    text = text_of(c)
    assert f"(1 of its runs is missing, {lost} first)" in text
    assert "Not run for want of time" not in text
    waiting = "Waiting for tuning that there was no time for: all final runs of rung xs, 1.05M tokens, each arm at its own"
    assert waiting in text and "runs that are not asked for are in no table" in text


def test_one_of_a_thing_is_told_in_the_singular():
    tried = {"arm": "a", "setting": {"learning_rate": 1e-3}, "gain": -0.1}
    assert (
        fair_report.beside([tried])
        == "Beside these lines 1 more was tried in one run; others may be better still."
    )
    assert fair_report.from_to([3, 1, 2]) == "1 to 3"


def test_without_the_reference_the_lowest_loss_comes_first(ladder):
    _, _, c = ladder
    cell = best_cell(c, "s", "1M")
    alone = {**cell, "gains": {}, "loss": {a: x for a, x in cell["loss"].items() if a != "bpe_untied"}}
    means = [float(row[4]) for row in fair_report.cell_table(alone, "bpe_untied", True).rows]
    assert means == sorted(means)


def test_buckets_that_one_arm_lacks_are_dashes(ladder):
    exp, records, _ = ladder
    part = dict(records)
    for name in (n for n in records if n.startswith("final/xs_1M/bpe_hash")):
        rows = [{k: v for k, v in row.items() if k != "val/n_input/64"} for row in records[name].rows]
        part[name] = records[name].model_copy(update={"rows": rows})
    cell = best_cell(fair.numbers(exp, part, resamples=10), "xs", "1M")
    table = fair_report.frequency_table(cell["frequency"]["input"], "input", "bpe_untied", "here")
    assert [row[table.header.index("bpe_hash")] for row in table.rows][1] == "-"


def test_every_line_of_a_figure_has_a_name(ladder):
    """An arm that only the second panel shows stands in the legend as well, and the axes reach beyond the gains."""
    _, _, c = ladder
    cells = [
        x | {"gains": {"kronecker": x["gains"]["kronecker"]}} if x["rung"] == "xs" else x for x in c["cells"]
    ]
    figure = fair_figures.draw_gap(c | {"cells": cells})
    fair_figures.legend_below(figure)
    named = {text.get_text() for text in figure.legends[0].get_texts()}
    assert named == {fair_figures.label(arm) for arm in c["arms"] if arm != "bpe_untied"}
    low, high = figure.axes[0].get_ylim()
    marks = figure.axes[0].get_yticks()
    assert low in marks and high in marks and low < 0 < high
