"""scripts/experiment.py: which runs an experiment asks for, on made-up losses, and a small one run to its end."""

import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

import configurator
import train
from data import DataError
from engine.errors import RunError
from scripts import compare, experiment, matched, pool

ARMS = configurator.read_file(str(ROOT / "config/experiments/ladder.py"))["arms"]
FILE = """
records = "{records}"
rungs = {{"a": "{folder}/a.py", "b": "{folder}/b.py"}}
lengths = {{"short": {{"max_iters": 3, "warmup_iters": 1, "eval_interval": 3}},
           "long": {{"max_iters": 6, "warmup_iters": 1, "eval_interval": 3}}}}
min_lr_ratio = 0.1
arms = {arms}
tuning = {{
    "rung": "a", "length": "short", "seeds": [1], "learning_rate": [1e-3, 2e-3],
    "wte_lr_mult": {{"bpe_*": [1, 4], "kronecker*": [0.25, 1]}},
    "wte_init_rms": {{"bpe_*": [0.02], "kronecker*": [1.0]}},
    "extend": {extend}, "keys": {{"eval_tokens": 256, "ckpt_interval": -1}},
}}
recheck = [{{"rung": "b", "length": "short", "seeds": [1], "factors": [1, 2], "keys": {{"eval_tokens": 256}}}}]
shared = {{"learning_rate": 2e-3}}
final_keys = {{"eval_skip_tokens": 256, "eval_tokens": 512}}
final = [
    {{"rung": "a", "length": "short", "seeds": [5, 6], "settings": ["shared", "best"]}},
    {{"rung": "a", "length": "long", "seeds": [5, 6], "settings": ["best"]}},
    {{"rung": "b", "length": "short", "seeds": [5, 6], "settings": ["best"]}},
]
data = "made-up words"
smallest_difference = 0.001
held_out = {{"rung": "b", "length": "short"}}
gap = {{"arm": "kronecker", "over": "bpe_untied"}}
"""


def write_experiment(folder: Path, arms=("bpe_untied", "kronecker"), extend=0, **replace) -> Path:
    text = FILE.format(records=folder / "records", folder=folder, arms=list(arms), extend=extend)
    for old, new in replace.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "small.py"
    path.write_text(text)
    return path


def follow(exp, loss_of) -> tuple[experiment.Plan, list[list[str]]]:
    """Give every run that the plan names the loss that loss_of says, until the plan names no new one."""
    losses: dict = {}
    rounds = []
    while True:
        plan = experiment.Plan(exp, losses)
        new = [run for run in plan.runs if run.name not in losses]
        if not new:
            return plan, rounds
        rounds.append([run.name for run in new])
        losses |= {run.name: loss_of(run) for run in new}


def bowl(lr: float, mult: float, rms: float):
    """A loss with its optimum there, in the logarithms."""

    def loss(run):
        usual = {"wte_lr_mult": 1, "wte_init_rms": 1.0 if run.arm.startswith("kronecker") else 0.02}
        keys = usual | dict(run.setting)
        way = {"learning_rate": (lr, 1), "wte_lr_mult": (mult, 0.1), "wte_init_rms": (rms, 0.01)}
        return sum(weight * abs(math.log2(keys[k] / best)) for k, (best, weight) in way.items())

    return loss


@pytest.fixture(scope="module")
def ladder():
    return experiment.read(str(ROOT / "config/experiments/ladder.py"))


@pytest.mark.parametrize(
    ("lr", "mult", "rms"), [(3e-3, 1, 1.0), (6e-3, 4, 0.02), (2.4e-2, 1 / 16, 0.1), (1e-4, 1024, 0.02)]
)
def test_the_best_setting_is_the_best_of_all_that_were_tried(ladder, lr, mult, rms):
    loss = bowl(lr, mult, rms)
    plan, _ = follow(ladder, loss)
    assert plan.complete
    for arm in ladder.arms:
        tuned = [run for run in plan.runs if run.stage == "tune" and run.arm == arm]
        best = min(tuned, key=loss)
        assert loss(experiment.Run("tune", "xs", "1M", arm, plan.best["xs", "1M", arm], 1)) == loss(best)
        rates = {dict(run.setting)["learning_rate"] for run in tuned}
        assert rates >= set(ladder.tuning.learning_rate)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "config/experiments").glob("*.py")), ids=lambda path: path.stem
)
def test_every_experiment_can_be_planned_and_started_and_tunes_its_arms_alike(path):
    exp = experiment.read(str(path))
    plan, _ = follow(exp, bowl(3e-3, 4, 0.1))
    assert plan.complete
    for stage in ("tune", "recheck"):
        assert len(set(Counter(run.arm for run in plan.runs if run.stage == stage).values())) == 1
    best = [final for final in exp.final if "best" in final.settings]
    for final in best:
        of_place = [run for run in plan.runs if run.stage == "final" and run.rung == final.rung]
        assert {run.arm for run in of_place if run.length == final.length} == set(final.arms or exp.arms)
    for run in plan.runs:
        config = configurator.load(experiment.command_keys(exp, run), quiet=True)
        assert config.arm == run.arm and 0 < config.min_lr < config.learning_rate


@pytest.mark.parametrize(("lr", "mult"), [(3e-3, 4), (9e-3, 20), (1e-4, 1024), (1, 1 / 1000)])
def test_every_arm_gets_the_same_number_of_runs_in_each_stage(ladder, lr, mult):
    plan, _ = follow(ladder, bowl(lr, mult, 0.1))
    counts = Counter((run.stage, run.arm) for run in plan.runs)
    for stage, spread in (("tune", 0), ("recheck", 0), ("final", 13)):
        # a best setting that is the shared one is one final run, not two
        of_stage = [counts[stage, arm] for arm in ladder.arms]
        assert max(of_stage) - min(of_stage) <= spread, (stage, counts)
    if (lr, mult) == (3e-3, 4):
        assert counts["tune", "bpe_tied"] == 15


def test_one_arm_at_the_edge_extends_the_grid_of_all(ladder):
    wide, usual = bowl(1.2e-2, 1, 1.0), bowl(3e-3, 1, 1.0)
    plan, _ = follow(ladder, lambda run: (wide if run.arm == "bpe_hash" else usual)(run))
    for arm in ladder.arms:
        rates = {dict(r.setting)["learning_rate"] for r in plan.runs if (r.stage, r.arm) == ("tune", arm)}
        assert 2.4e-2 in rates and min(rates) == 1.5e-3
    assert not [edge for edge in plan.edges if "rung xs at 1M" in edge]
    plan, _ = follow(ladder, bowl(1, 1, 1.0))  # beyond any extension
    assert len([e for e in plan.edges if "learning_rate on rung xs at 1M" in e]) == len(ladder.arms)
    last = max(ladder.tuning.learning_rate) * 2**ladder.tuning.extend
    edge = f"bpe_tied's best learning_rate on rung xs at 1M tokens, {last:g}, stands at the edge of its grid."
    assert edge in plan.edges


def test_the_learning_rate_is_chosen_once_more_at_the_best_multiplier(ladder):
    """With a multiplier of its own bpe_hash wants a rate four times that of the first line; only its grid grows."""

    def loss(run):
        far = run.arm == "bpe_hash" and dict(run.setting).get("wte_lr_mult", 1) != 1
        return bowl(1.2e-2 if far else 3e-3, 4, 0.02)(run) - 3 * far

    plan, _ = follow(ladder, loss)
    assert plan.complete and dict(plan.best["xs", "1M", "bpe_hash"])["learning_rate"] == 1.2e-2
    counts = Counter(run.arm for run in plan.runs if run.stage == "tune")
    assert counts["bpe_hash"] == 15 + 2 and {counts[arm] for arm in ladder.arms if arm != "bpe_hash"} == {15}


def test_without_factors_the_learning_rate_is_not_chosen_once_more(ladder):
    tuning = ladder.tuning.model_copy(update={"again": []})
    plan, rounds = follow(ladder.model_copy(update={"tuning": tuning}), bowl(6e-3, 4, 0.1))
    assert plan.complete and len(rounds) == 4  # rates, input side, recheck, final
    assert sum(run.stage == "tune" for run in plan.runs) == 13 * len(ladder.arms)
    assert not [edge for edge in plan.edges if "rung xs at 1M" in edge]


def test_choices_never_look_at_final_runs(ladder):
    loss = bowl(6e-3, 4, 0.1)
    plan, _ = follow(ladder, loss)
    spoiled, _ = follow(ladder, lambda run: loss(run) if run.stage != "final" else -1e9 * run.seed)
    assert plan.best == spoiled.best
    tuning_seeds = {r.seed for r in plan.runs if r.stage != "final"}
    assert tuning_seeds.isdisjoint({r.seed for r in plan.runs if r.stage == "final"})


def test_runs_of_a_plan_follow_from_what_is_known(ladder):
    first = experiment.Plan(ladder, {})
    assert not first.complete and not first.best
    assert len([r for r in first.runs if r.stage == "tune"]) == 4 * len(ladder.arms)
    shared = {(("learning_rate", 0.003),)}
    assert {r.setting for r in first.runs if r.stage == "final"} == shared
    _, rounds = follow(ladder, bowl(6e-3, 4, 0.1))
    assert len(rounds) == 5  # rates, input side, rates once more, recheck, final
    assert len(set(itertools.chain(*rounds))) == sum(map(len, rounds))  # no run twice
    pretended = experiment.Plan(ladder, {}, pretend=True)
    assert pretended.complete
    assert sum(r.stage == "tune" for r in pretended.runs) == 15 * len(ladder.arms)


def test_a_dry_run_counts_the_same_runs_whatever_is_known(ladder):
    """Made-up losses are not held against real ones, which are larger."""
    every = len(experiment.Plan(ladder, {}, pretend=True).runs)
    for known in ("tune/xs_1M/kronecker_lr0.003_s1", "tune/xs_1M/bpe_tied_lr0.006_s1"):
        assert len(experiment.Plan(ladder, {known: 6.6}, pretend=True).runs) == every


def test_settings_come_from_the_last_place_that_was_tuned(ladder):
    asked = ("xs", "1M"), ("xs", "4M"), ("xs", "16M"), ("s", "1M"), ("s", "4M"), ("m", "1M")
    tuned = [experiment.tuned_at(ladder, experiment.Place(rung=r, length=n)) for r, n in asked]
    places = ("xs", "1M"), ("xs", "4M"), ("xs", "4M"), ("s", "1M"), ("s", "1M"), ("s", "1M")
    assert tuple((place.rung, place.length) for place in tuned) == places


def test_a_recheck_makes_no_arm_wait_for_another(ladder):
    loss = bowl(6e-3, 4, 0.1)
    plan, _ = follow(ladder, loss)
    known = {r.name: loss(r) for r in plan.runs if r.stage != "recheck" or r.arm == "kronecker"}
    some = experiment.Plan(ladder, known)
    assert not some.complete
    assert {arm for rung, length, arm in some.best if (rung, length) == ("xs", "4M")} == {"kronecker"}
    best = {r.arm for r in some.runs if (r.stage, r.length) == ("final", "4M") and len(r.setting) > 1}
    assert best == {"kronecker"}


def test_a_recheck_extends_the_grid_of_the_arm_alone_whose_best_is_at_its_edge(ladder):
    usual, far = bowl(6e-3, 4, 0.1), bowl(6e-3 / 32, 4, 0.1)

    def loss(run):
        return (far if (run.arm, run.rung) == ("kronecker", "s") else usual)(run)

    plan, _ = follow(ladder, loss)
    assert plan.complete and not [edge for edge in plan.edges if "rung s" in edge]
    assert dict(plan.best["s", "1M", "kronecker"])["learning_rate"] == 6e-3 / 32
    counts = Counter(run.arm for run in plan.runs if run.stage == "recheck" and run.rung == "s")
    assert counts == {arm: 5 + 3 * (arm == "kronecker") for arm in ladder.arms}


def test_a_diverged_run_is_never_best(ladder):
    loss = bowl(6e-3, 1, 1.0)
    plan, _ = follow(ladder, lambda r: math.inf if dict(r.setting)["learning_rate"] >= 6e-3 else loss(r))
    assert {dict(s)["learning_rate"] for (rung, *_), s in plan.best.items() if rung == "xs"} == {3e-3}


def test_settings_that_say_what_the_arm_is_anyway_have_one_name():
    plain = experiment.setting_of("bpe_untied", {"learning_rate": 1e-3})
    usual = {"wte_lr_mult": 1, "wte_init_rms": 0.02}
    assert experiment.setting_of("bpe_untied", {"learning_rate": 1e-3} | usual) == plain
    four = experiment.setting_of("kronecker", {"wte_init_rms": 1.0, "wte_lr_mult": 4})
    assert four == (("wte_lr_mult", 4.0),)
    assert experiment.setting_of("kronecker_s01_lr3", {"wte_lr_mult": 1}) == (("wte_lr_mult", 1.0),)
    assert experiment.setting_name(plain) == "lr0.001"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"rung": "a", "length": "short"', '"rung": "z", "length": "short"', "names the rung 'z'"),
        ('"length": "long"', '"length": "longer"', "names the length 'longer'"),
        ('"arm": "kronecker"', '"arm": "bpe_tied"', "the arm 'bpe_tied', which is none of its arms"),
        ('"over": "bpe_untied"', '"over": "kronecker"', "asks for the same twice"),
        ("arms = ['bpe_untied', ", "arms = ['codec', ", "no config/arms/codec.py"),
        ("arms = ['bpe_untied', ", "arms = ['kronecker', ", "arms is .* each once"),
        ('"bpe_*": [1, 4], ', "", "0 patterns of kronecker\\* fit the arm bpe_untied"),
        ('["shared", "best"]', '["best", "worst"]', "final.0.settings.1 is .*'shared' or 'best'"),
        ('"seeds": [5, 6]', '"seeds": [1, 6]', "uses seed 1 to tune and in final runs"),
        ('"seeds": [1], "factors"', '"seeds": [5], "factors"', "uses seed 5 to tune and in final runs"),
        ('"seeds": [5, 6]', '"seeds": [5, 5]', "final.0.seeds is .* each once"),
        ('"length": "long", "seeds"', '"length": "short", "seeds"', "asks for the same twice"),
        ("[1e-3, 2e-3]", "[0, 2e-3]", "learning_rate.0 is 0"),
        ("[1e-3, 2e-3]", "[]", "learning_rate is .* a value at least"),
        ('"max_iters": 6, ', "", "it has no lengths.long.max_iters"),
        ('"eval_tokens": 512', '"max_iters": 512', "final_keys.max_iters"),
        ('{"learning_rate": 2e-3}', '{"wte_lr_mult": 4}', "it has no shared.learning_rate"),
        (
            '"eval_skip_tokens": 256',
            '"eval_skip_tokens": 255',
            "tunes on validation windows that final runs read",
        ),
        (
            '"keys": {"eval_tokens": 256}',
            '"keys": {"eval_tokens": 257}',
            "tunes on validation windows that final runs read",
        ),
        ("min_lr_ratio = 0.1", 'min_lr_ratio = "0.1"', "min_lr_ratio is"),
        ("min_lr_ratio = 0.1", "min_lr_ratio = 0.1; grid = 3", "grid is 3: Extra inputs"),
        ('"extend": 0', '"extned": 0', "tuning.extned is 0: Extra inputs"),
        ("min_lr_ratio = 0.1", "", "it has no min_lr_ratio"),
        ("smallest_difference", "import os; raise ValueError; smallest_difference", "does not run"),
    ],
)
def test_a_mistake_in_an_experiment_is_one_sentence(old, new, says, tmp_path):
    path = write_experiment(tmp_path)
    assert experiment.read(str(path)).name == "small"
    with pytest.raises((RunError, DataError, SystemExit), match=says):
        experiment.read(str(write_experiment(tmp_path, **{old: new})))


class Here:
    """A stand-in for pool.Local that trains in this process: the same commands, without a process for each."""

    def __init__(self, *_):
        self.codes = []

    def has_room(self):
        return True

    def start(self, job):
        try:
            train.main(configurator.load(job.command[2:], quiet=True))
            return 0
        except RunError:
            return 1

    def poll(self, handle):
        return handle

    def stop(self, handle, number=15):
        raise AssertionError("nothing is stopped here")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_data):
    """Two rungs, all arms, two learning rates, run to the end: (experiment file, folder)."""
    folder = tmp_path_factory.mktemp("experiment")
    for name, n_embd in (("a", 16), ("b", 32)):
        (folder / f"{name}.py").write_text(
            f"data_dir = '{tiny_data}'\nn_layer, n_head, n_embd, block_size = 1, 2, {n_embd}, 16\n"
            "batch_size, global_batch_size, pos_dim = 8, 8, 4\ndevice, dtype, keep_best = 'cpu', 'float32', False\n"
        )
    path = write_experiment(folder, ARMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "Local", Here)
        patch.setattr(pool.time, "sleep", lambda seconds: None)
        assert matched.main([str(path), f"--out={folder / 'out'}", "--jobs=1"]) == 0
    return path, folder


def test_a_small_experiment_runs_to_its_end(finished):
    path, _ = finished
    exp = experiment.read(str(path))
    records = experiment.read_records(exp)
    plan = experiment.Plan(exp, experiment.losses_of(records))
    assert plan.complete and {run.name for run in plan.runs} == records.keys()
    finals = [run for run in plan.runs if run.stage == "final"]
    assert {(r.rung, r.length, r.arm, r.seed) for r in finals} == {
        (rung, length, arm, seed)
        for rung, length in (("a", "short"), ("a", "long"), ("b", "short"))
        for arm in ARMS
        for seed in (5, 6)
    }
    for run in plan.runs:
        experiment.check_record(exp, run, records[run.name].config, records[run.name].run)
    # arms of one rung, length and seed share body, data and windows
    for group in {(r.rung, r.length, r.seed) for r in finals}:
        mine = [records[r.name].run for r in finals if (r.rung, r.length, r.seed) == group]
        for key in ("body_sha256", "data_sha256", "val_sha256"):
            assert len({about[key] for about in mine}) == 1
    tuned, final = (records[r.name].run["val_sha256"] for r in (plan.runs[0], finals[0]))
    assert tuned != final
    last = records[finals[0].name].rows[-1]
    assert last["iter"] == 3 and "val/by_target/1024" in last


def test_a_second_call_finds_everything_done(finished, capsys):
    path, folder = finished
    assert matched.main([str(path), f"--out={folder / 'elsewhere'}"]) == 0  # from the records alone
    assert "0 to do" in capsys.readouterr().out and not (folder / "elsewhere").exists()


def test_a_dry_run_says_what_is_left(finished, capsys):
    path, _ = finished
    assert matched.main([str(path), "--dry_run", "--rungs=a"]) == 0
    out = capsys.readouterr().out
    assert "tune" in out and "0 to do" in out and "recheck" not in out


def test_a_record_of_another_run_is_refused(finished):
    path, folder = finished
    exp = experiment.read(str(path))
    run = next(r for r in experiment.Plan(exp, {}).runs if r.stage == "final")
    record = experiment.read_records(exp)[run.name]
    for key, value in (("learning_rate", 0.5), ("dropout", 0.1), ("n_layer", 2), ("eval_skip_tokens", 0)):
        other = record.model_copy(update={"config": record.config | {key: value}})
        with pytest.raises(RunError, match=f"made with {key}="):
            experiment.check_record(exp, run, other.config, other.run)
    moved = folder / "records" / "final" / "moved.json"
    moved.write_text((folder / "records" / f"{run.name}.json").read_text())
    with pytest.raises(RunError, match="it was moved"):
        experiment.read_records(exp)
    moved.unlink()
    whole = (folder / "records" / f"{run.name}.json").read_text()
    cut = json.loads(whole)
    del cut["rows"][-1]
    (folder / "records" / f"{run.name}.json").write_text(json.dumps(cut))
    with pytest.raises(RunError, match="without its last validation loss"):
        experiment.read_records(exp)
    cut = json.loads(whole)
    del cut["run"]["params"]["input"]
    (folder / "records" / f"{run.name}.json").write_text(json.dumps(cut))
    with pytest.raises(DataError, match=r"it has no params\.input"):
        experiment.read_records(exp)
    (folder / "records" / f"{run.name}.json").write_text(whole)


def test_a_folder_of_other_keys_becomes_no_record_and_chooses_nothing(finished, tmp_path, monkeypatch):
    path, folder = finished
    exp = experiment.read(str(path))
    shutil.copytree(folder / "out", tmp_path / "out")
    monkeypatch.setattr(experiment, "ROOT", tmp_path)  # where no record is yet
    run = experiment.Plan(exp, {}).runs[0]
    config = tmp_path / "out" / run.name / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"warmup_iters": 2}))
    exp = exp.model_copy(update={"records": "records"})
    with pytest.raises(RunError, match=f"{run.name} was made with warmup_iters=2"):
        experiment.write_record(exp, run, config.parent, "finished")
    assert not (tmp_path / "records").exists()
    monkeypatch.undo()
    record = folder / "records" / f"{run.name}.json"
    whole = record.read_text()
    other = json.loads(whole)
    other["config"]["warmup_iters"] = 2
    record.write_text(json.dumps(other))
    with pytest.raises(RunError, match=rf"{run.name}\.json was made with warmup_iters=2"):
        matched.main([str(path), f"--out={folder / 'out'}"])
    record.write_text(whole)


def test_a_check_of_nothing_and_a_run_that_diverged_are_told(finished, monkeypatch, capsys):
    path, folder = finished
    with pytest.raises(RunError, match="nothing was checked"):
        matched.main([str(path), "--check", "--seeds=1"])
    left, ends = [{"job": None}, {"job": None}, {}], [pool.DIVERGED, 0]
    monkeypatch.setattr(matched, "next_jobs", lambda args: (left.pop(0), "small"))
    monkeypatch.setattr(matched, "workers", lambda *a: "here")
    monkeypatch.setattr(matched.experiment, "command_keys", lambda *a: [])
    monkeypatch.setattr(pool, "run", lambda *a, **how: ends.pop(0))
    assert matched.main([str(path), f"--out={folder / 'out'}"]) == pool.DIVERGED
    assert "the experiment is finished" in capsys.readouterr().out


def test_records_say_nothing_of_the_place(finished, tiny_data):
    _, folder = finished
    for record in (folder / "records").rglob("*.json"):
        text = record.read_text()
        assert str(tiny_data) not in text and str(folder) not in text and text.count("\n") == 1
        json.loads(text)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--rungs=z"], "has no rung 'z'"),
        (["--arms=bpe_tied"], "has no arm 'bpe_tied'"),
        (["--seeds=5,7"], "has no seed 7"),
        (["--max_iters=5"], "an experiment's file says all keys"),
        (["--seeds=x"], "'x' is no whole number"),
    ],
)
def test_what_an_experiment_does_not_have_is_refused(more, says, tmp_path):
    with pytest.raises(SystemExit, match=says):
        matched.main([str(write_experiment(tmp_path)), *more])


def test_the_ladder_stays_within_its_budget_of_parameters():
    """Controls and additions of the ladder: at most 15% of the table's parameters on every rung, the controls no more
    than the codec."""
    import torch

    from model import GPT, GPTConfig

    exp = experiment.read(str(ROOT / "config/experiments/ladder.py"))
    for recipe in exp.rungs.values():
        counts = {}
        for arm in exp.arms:
            config = configurator.load([recipe, f"config/arms/{arm}.py"], quiet=True)
            names = GPTConfig.__dataclass_fields__
            shape = GPTConfig(**{n: getattr(config, n) for n in names})
            buffers = (torch.zeros(50304, 16, dtype=torch.uint8), torch.zeros(50304).short())
            with torch.device("meta"):
                counts[arm] = GPT(shape, buffers).count_parameters()
        for arm, n in counts.items():
            if arm not in ("bpe_tied", "bpe_untied"):
                assert n["input"] <= 0.15 * n["stock_table"], (recipe, arm)
        codec = counts["kronecker"]["input"]
        assert counts["kronecker_permuted"]["input"] == codec
        for arm in ("bpe_lowrank", "bpe_hash"):
            assert codec * 0.75 <= counts[arm]["input"] <= codec


def test_check_proves_that_final_runs_will_match(finished, capsys):
    path, folder = finished
    some = ["--arms=bpe_untied,kronecker", "--seeds=5", "--rungs=b"]
    assert matched.main([str(path), f"--out={folder / 'checked'}", "--check", *some]) == 0
    assert "matched: 2 runs share schedule but for learning_rate and min_lr" in capsys.readouterr().out
    assert not (folder / "checked").exists()


def test_compare_rebuilds_the_report_from_the_records_alone(finished, capsys):
    path, folder = finished
    compare.main([str(path), f"--out={folder / 'report'}"])
    page = (folder / "report" / "README.md").read_text()
    assert "The text is made-up words." in page
    assert "Rung a, 384 tokens: one shared setting for all" in page
    assert "Rung b, 384 tokens: each arm at its own best setting" in page
    for arm in ARMS:
        assert f"| {arm} |" in page
    assert (
        "The fit has no term for parameters in the body, so for rung b, 384 tokens, it predicts nothing"
        in page
    )
    assert "scripts/compare.py" in page
    assert {p.stem for p in (folder / "report").glob("*.svg")} == {"learning_rates", "gap", "frequency"}
    assert "the codec for the table" in capsys.readouterr().out


def test_compare_without_records_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="has no records in"):
        compare.main([str(write_experiment(tmp_path))])
