"""scripts/analysis/runs.py: what makes a folder or a wandb run a Run, and which runs match."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from runs_on_disk import load, write_demo, write_run

import configurator
from data import DataError
from engine import contract
from engine.errors import RunError
from model import USUAL_RMS
from scripts.analysis import numbers, runs


@pytest.fixture
def runs_dir(tmp_path):
    return write_demo(tmp_path)


@pytest.mark.parametrize("name", contract.IDENTITY)
def test_refuses_runs_that_do_not_match(runs_dir, name):
    path = runs_dir / "kronecker_s1338" / "run.json"
    info = json.loads(path.read_text())
    other = 2000 if name == "tokens_per_step" else "other"
    path.write_text(json.dumps(info | {name: other}))
    with pytest.raises(RunError) as e:
        numbers.compare(load(runs_dir))
    assert name in str(e.value) and "kronecker_s1338" in str(e.value) and "bpe_" in str(e.value)


def test_seed_may_change_data_and_body_but_a_run_may_not_lack_them(runs_dir):
    numbers.compare(load(runs_dir))  # seeds have different data_sha256 and body_sha256 here: fine
    path = runs_dir / "bpe_tied_s1337" / "run.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in info.items() if k != "body_sha256"}))
    with pytest.raises(DataError, match="has no body_sha256"):
        load(runs_dir)
    path.write_text(json.dumps(info | {"data_fingerprint": None}))
    with pytest.raises(RunError, match="records no data_fingerprint"):
        numbers.compare(load(runs_dir))


def test_metrics_after_resume_and_after_a_kill(tmp_path):
    folder = write_run(tmp_path, "bpe_tied", 1, 4.0)
    path = folder / "metrics.jsonl"
    # a resume logs step 100 again; the kill cut its last line short
    path.write_text(path.read_text() + json.dumps({"iter": 100, "val/loss": 3.5}) + '\n{"iter": 1')
    assert runs.load_folder(folder).val_at(100) == 3.5
    path.write_text('{"iter": 0, broken\n' + path.read_text())
    with pytest.raises(DataError, match="line 1 of"):
        runs.load_folder(folder)


def test_a_setting_that_differs_within_an_arm_is_refused_and_a_machine_noted(tmp_path):
    write_run(tmp_path, "bpe_tied", 1, 4.0)
    second = write_run(tmp_path, "bpe_tied", 2, 4.0, info={"device": "another"})
    assert "different devices: another, cpu" in numbers.compare(load(tmp_path))["notes"][0]
    config = json.loads((second / "config.json").read_text())
    for key, value in (("dropout", 0.1), ("n_embd", 64)):
        (tmp_path / "bpe_tied_s1" / "config.json").write_text(json.dumps(config | {key: 0.0, "seed": 1}))
        (second / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(RunError, match=f"{key} differs between"):
            numbers.compare(load(tmp_path))


def test_wandb_errors(monkeypatch):
    class Broken:
        def runs(self, *a, **k):
            raise RuntimeError("permission denied\nTraceback ...")

    monkeypatch.setattr(runs, "wandb_api", Broken)
    with pytest.raises(RunError, match=r"cannot read someone/project from wandb: permission denied$"):
        runs.load_wandb("someone/project")
    with pytest.raises(RunError, match="entity/project"):
        runs.load_wandb("project")


@pytest.mark.parametrize(
    ("rows", "state"),
    [
        ([{"iter": 100, "val/loss": None}], "diverged: val/loss is not finite at iter 100"),
        (
            [{"iter": i, "train/loss": None} for i in (60, 70)],
            "diverged: train/loss is not finite from iter 60 on",
        ),
        ([{"iter": 60, "train/loss": 4.0}], "unfinished: iter 50 of 100"),
    ],
)
def test_a_diverged_run_is_said_to_be_one(tmp_path, rows, state):
    folder = write_run(tmp_path, "kronecker", 1, 3.8, upto=50)
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert runs.load_folder(folder).state == state
    with pytest.raises(RunError, match=f"kronecker_s1 .{state}"):
        numbers.compare(load(tmp_path))


def test_a_step_that_was_skipped_is_no_divergence(tmp_path):
    folder = write_run(tmp_path, "kronecker", 1, 3.8)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"iter": 95, "train/loss": null}\n')
    run = runs.load_folder(folder)
    assert run.state == "finished" and 95 not in run.series("train/loss")


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("run.json", "{}", "it has no arm"),
        ("run.json", '{"arm": ["x"], "seed": 1}', "arm is"),
        ("run.json", "[]", "JSON object"),
        ("config.json", '{"max_iters": "many"}', "max_iters is"),
        (
            "config.json",
            '{"pos_dim": {}}',
            "pos_dim is {}: it should be a number, a text, true, false or null",
        ),
        ("config.json", "{", "damaged"),
        ("metrics.jsonl", '{"iter": 0, "val/loss": "low"}\n{"iter": 1}\n', "line 1 of"),
    ],
)
def test_records_of_another_shape_are_one_sentence(tmp_path, file, content, told):
    folder = write_run(tmp_path, "kronecker", 1, 3.8)
    (folder / file).write_text(content)
    with pytest.raises(DataError, match=told) as e:
        runs.load_folder(folder)
    assert file in str(e.value) and "\n" not in str(e.value)


def test_parameters_without_a_part_are_one_sentence(tmp_path):
    folder = write_run(tmp_path, "kronecker", 1, 3.8, info={"params": {"body": 400, "stock_table": 200}})
    with pytest.raises(DataError, match=r"run\.json is not a run's record: it has no params\.input"):
        runs.load_folder(folder)


def test_a_run_that_was_given_up_is_said_to_have_diverged(tmp_path):
    folder = write_run(tmp_path, "kronecker", 1, 3.8, upto=50, info={"diverged": 57})
    assert runs.load_folder(folder).state == "diverged: given up at iter 57"


def run_of(arm: str, *more: str) -> SimpleNamespace:
    config = configurator.load(["config/demo.py", f"config/arms/{arm}.py", *more], quiet=True)
    keys = {key: getattr(config, key) for key in configurator.KEYS}
    keys["wte_init_rms"] = keys["wte_init_rms"] or USUAL_RMS[keys["wte"]]  # as train.py does
    return SimpleNamespace(arm=arm, config=keys)


@pytest.mark.parametrize("arm", sorted(p.stem for p in (ROOT / "config/arms").glob("*.py")))
def test_a_run_of_an_arms_file_keeps_its_name(arm):
    mine = [run_of(arm), run_of(arm, "--seed=5", "--learning_rate=0.5", "--batch_size=2")]
    runs.distinguish(mine)
    assert [r.arm for r in mine] == [arm, arm]


def test_runs_of_one_name_with_other_keys_are_other_arms():
    names = {
        ("kronecker",): "kronecker",
        ("kronecker", "--wte_rank=16"): "kronecker[wte_rank=16]",
        ("kronecker", "--wte_lr_mult=4", "--wte_norm=rms"): "kronecker[wte_lr_mult=4.0, wte_norm=rms]",
        ("bpe_untied", "--wte_init_rms=1.0"): "bpe_untied[wte_init_rms=1.0]",
        ("kronecker_rank16", "--wte_rank=0"): "kronecker_rank16[wte_rank=0]",
        ("bpe_tied",): "bpe_tied",
    }
    mine = [run_of(*words) for words in names]
    runs.distinguish(mine)
    assert [r.arm for r in mine] == list(names.values())


def test_what_a_recipe_sets_for_all_makes_no_arm_of_its_own():
    mine = [run_of("kronecker", "--pos_dim=8"), run_of("kronecker", "--pos_dim=8", "--seed=2")]
    runs.distinguish(mine)
    assert [r.arm for r in mine] == ["kronecker"] * 2
    mine = [run_of("kronecker", "--pos_dim=8"), run_of("kronecker", "--pos_dim=4")]
    runs.distinguish(mine)
    assert [r.arm for r in mine] == ["kronecker", "kronecker[pos_dim=4]"]


def test_names_without_a_file_are_told_apart_too():
    mine = [run_of("kronecker"), run_of("kronecker", "--wte_ngrams=8")]
    for r in mine:
        r.arm = "mine"
    runs.distinguish(mine)
    assert [r.arm for r in mine] == ["mine", "mine[wte_ngrams=8]"]


def test_the_usual_scale_of_an_older_record_is_no_key():
    older = run_of("kronecker")
    del older.config["wte_init_rms"], older.config["wte_norm"]
    assert runs.arm_keys(older.config) == {"wte": "kronecker", "tie_weights": False}


def test_where_results_go_by_default(tmp_path, runs_dir):
    assert runs.default_out([runs_dir]) == runs.default_out([runs_dir / "kronecker_s1338", "x"]) == runs_dir
    (tmp_path / "ckpt.pt").touch()
    assert runs.default_out([tmp_path / "ckpt.pt"]) == Path("out/ckpt") and runs.default_out(
        ["gpt2"]
    ) == Path("out/gpt2")
