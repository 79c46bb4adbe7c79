"""scripts/analysis/arms.py on runs that are told apart by their keys alone."""

from types import SimpleNamespace

import pytest
from conftest import ROOT

import configurator
from scripts.analysis import arms


def run(arm: str, *more: str) -> SimpleNamespace:
    config = configurator.load(["config/demo.py", f"config/arms/{arm}.py", *more], quiet=True)
    keys = {key: getattr(config, key) for key in configurator.KEYS}
    keys["wte_init_rms"] = keys["wte_init_rms"] or (
        1.0 if keys["wte"] == "kronecker" else 0.02
    )  # as train.py does
    return SimpleNamespace(arm=arm, config=keys)


@pytest.mark.parametrize("arm", sorted(p.stem for p in (ROOT / "config/arms").glob("*.py")))
def test_a_run_of_an_arms_file_keeps_its_name(arm):
    mine = [run(arm), run(arm, "--seed=5", "--learning_rate=0.5", "--batch_size=2")]
    arms.distinguish(mine)
    assert [r.arm for r in mine] == [arm, arm]
    assert arms.arm_keys(mine[0].config) == arms.own_keys(arm)


def test_runs_of_one_name_with_other_keys_are_other_arms():
    mine = [
        run("kronecker"),
        run("kronecker", "--wte_rank=16"),
        run("kronecker", "--wte_lr_mult=4", "--wte_norm=rms"),
    ]
    mine += [
        run("bpe_untied", "--wte_init_rms=1.0"),
        run("kronecker_rank16", "--wte_rank=0"),
        run("bpe_tied"),
    ]
    arms.distinguish(mine)
    assert [r.arm for r in mine] == [
        "kronecker",
        "kronecker[wte_rank=16]",
        "kronecker[wte_lr_mult=4.0, wte_norm=rms]",
        "bpe_untied[wte_init_rms=1.0]",
        "kronecker_rank16[wte_rank=0]",
        "bpe_tied",
    ]


def test_what_a_recipe_sets_for_all_makes_no_arm_of_its_own():
    mine = [run("kronecker", "--pos_dim=8"), run("kronecker", "--pos_dim=8", "--seed=2")]
    arms.distinguish(mine)
    assert [r.arm for r in mine] == ["kronecker"] * 2
    mine = [run("kronecker", "--pos_dim=8"), run("kronecker", "--pos_dim=4")]
    arms.distinguish(mine)
    assert [r.arm for r in mine] == ["kronecker", "kronecker[pos_dim=4]"]


def test_names_without_a_file_are_told_apart_too():
    mine = [run("kronecker"), run("kronecker", "--wte_ngrams=8")]
    for r in mine:
        r.arm = "mine"
    arms.distinguish(mine)
    assert [r.arm for r in mine] == ["mine", "mine[wte_ngrams=8]"]


def test_the_usual_scale_of_an_older_record_is_no_key():
    older = run("kronecker")
    del older.config["wte_init_rms"], older.config["wte_norm"]
    assert arms.arm_keys(older.config) == {"wte": "kronecker", "tie_weights": False}
