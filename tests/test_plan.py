"""engine/plan.py: how a global batch is shared, and what is said before a run starts."""

import pytest

import configurator
import train
from engine import plan
from engine.errors import RunError


def config(**keys):
    return configurator.load([f"--{k}={v}" for k, v in keys.items()])


@pytest.mark.parametrize("rows", [1, 7, 8, 12, 96, 528])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 3, 5, 8, 22, 1000])
def test_the_micro_batch_is_the_largest_that_divides_a_ranks_share(rows, world, batch_size):
    keys = config(global_batch_size=rows, batch_size=batch_size)
    if rows % world:
        with pytest.raises(
            RunError, match=f"a global batch of {rows} sequences does not divide among {world} ranks"
        ):
            plan.batch_split(keys, world)
        return
    got_rows, micro = plan.batch_split(keys, world)
    share = rows // world
    assert got_rows == rows and share % micro == 0 and micro <= batch_size
    assert not any(share % b == 0 for b in range(micro + 1, min(batch_size, share) + 1))


def test_the_recipes_take_several_ranks_as_they_are():
    demo = configurator.load(["config/demo.py"])
    assert [plan.batch_split(demo, world) for world in (1, 2, 8)] == [(8, 8), (8, 4), (8, 1)]
    paper = configurator.load(["config/gpt2_124m_fineweb_edu.py"])
    assert [plan.batch_split(paper, world)[1] for world in (1, 8, 16, 24, 48)] == [22, 22, 11, 22, 11]


@pytest.mark.parametrize(
    ("rows", "world", "advice"),
    [
        (528, 7, "take 6 or 8 ranks, or --global_batch_size=525 or 532"),
        (8, 3, "take 2 or 4 ranks, or --global_batch_size=6 or 9"),
        (5, 8, "take 5 ranks, or --global_batch_size=8"),
        (7, 2, "take 1 or 7 ranks, or --global_batch_size=6 or 8"),
        (1, 2, "take 1 rank, or --global_batch_size=2"),
        (536870909, 2, "take 1 rank, or --global_batch_size=536870908 or 536870910"),  # a prime, and quickly
    ],
)
def test_a_number_of_ranks_that_does_not_divide_is_refused_with_the_nearest_that_do(rows, world, advice):
    with pytest.raises(RunError, match=advice):
        plan.batch_split(config(global_batch_size=rows), world)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "up to 0.0006 in 2,000 steps, then down to 6e-05 at step 600,000"),
        (["--max_iters=12"], "at step 12; it still rises when the run ends: lower warmup_iters"),
        (["--lr_decay_iters=2000"], "at step 2,000; it falls at once, without a decay: raise lr_decay_iters"),
        (["--decay_lr=False"], "0.0006 throughout"),
    ],
)
def test_the_learning_rate_is_told_with_what_is_odd_about_it(flags, says):
    assert plan.schedule(configurator.load(flags)).endswith(says)


def test_out_of_memory_names_the_next_smaller_micro_batch():
    keys = config(global_batch_size=528, batch_size=22)
    assert plan.memory_advice(keys, 1).startswith("--batch_size=16 instead of 22 takes about 73%")
    # on 8 ranks 22 are not taken at a time, for the share is 66
    assert plan.memory_advice(keys, 8).startswith("--batch_size=11 instead of 22 takes about 50%")
    assert "(--global_batch_size=528)" in plan.memory_advice(keys, 8)
    assert plan.memory_advice(config(batch_size=1), 1).startswith("batch_size is as small as it gets")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "8,192 parameters, a learned table"),
        (
            ["--wte=kronecker", "--tie_weights=False", "--pos_dim=8"],
            "65,536 parameters, 8.00x a learned table",
        ),
        (
            ["--wte=kronecker", "--pos_dim=8", "--char_dim=8"],
            "2,048 parameters, 75.0% fewer than a learned table",
        ),
    ],
)
def test_the_input_side_is_called_what_it_is(flags, words, capsys):
    keys = "--n_layer=1 --n_head=1 --n_embd=32 --vocab_size=256 --device=cpu --dry_run=True".split()
    train.cli([*keys, *flags])
    assert words in capsys.readouterr().out
