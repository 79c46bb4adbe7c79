"""engine/settings.py: what is left open is decided once, and names can be shown everywhere."""

import dataclasses

import pytest
import torch

import configurator
from configurator import Config
from engine import settings
from engine.errors import RunError
from engine.settings import arm_name, resolve
from model import GPTConfig

CPU = torch.device("cpu")
META = {"vocab_size": 50257}


def test_what_is_left_open_is_decided_and_the_given_one_stays():
    config = configurator.load(["--n_layer=2", "--dtype=float32"])
    before = dataclasses.asdict(config)
    settled, shape = resolve(config, CPU, META, {}, GPTConfig)
    assert dataclasses.asdict(config) == before
    assert (settled.vocab_size, settled.compile, settled.arm) == (50304, False, "bpe_tied")
    assert settled.wte_init_rms == shape.wte_init_rms == 0.02
    assert settled.given == config.given
    assert resolve(settled, CPU, META, {}, GPTConfig)[0] == settled  # nothing is left open


def test_a_rate_that_would_rise_where_it_should_decay_is_refused():
    low = configurator.load(["--learning_rate=1e-5"])
    with pytest.raises(RunError, match=r"min_lr is 6e-05, above learning_rate, 1e-05.*: lower min_lr"):
        settings.check(low)
    settings.check(configurator.load(["--learning_rate=1e-5", "--decay_lr=False", "--arm=a"]))


def test_weights_from_elsewhere_decide_their_shape():
    decided = {"n_layer": 3, "n_head": 2, "n_embd": 8, "vocab_size": 77, "bias": True}
    settled, shape = resolve(Config(dtype="float32"), CPU, META, decided, GPTConfig)
    for key, value in decided.items():
        assert getattr(settled, key) == getattr(shape, key) == value


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({}, "bpe_tied"),
        ({"tie_weights": False}, "bpe_untied"),
        ({"wte": "kronecker"}, "kronecker_tied"),
        ({"wte": "kronecker", "tie_weights": False}, "kronecker"),
        ({"wte": "kronecker", "tie_weights": False, "wte_permute_seed": 1}, "kronecker_permuted"),
        ({"wte": "lowrank", "tie_weights": False}, "bpe_lowrank"),
        ({"wte": "hash", "tie_weights": False}, "bpe_hash"),
    ],
)
def test_an_arm_without_a_file_bears_the_file_s_name(keys, name):
    assert arm_name(Config(**keys)) == name


@pytest.mark.parametrize("key", ["arm", "wandb_run_name", "wandb_group", "out_dir"])
@pytest.mark.parametrize("name", ["a\x1b[31m", "a\u202eb", "x" * 200, "a\x00"])
def test_names_that_cannot_be_shown(key, name):
    with pytest.raises(RunError, match=f"{key} is .*, but a name "):
        resolve(Config(dtype="float32", **{key: name}), CPU, META, {}, GPTConfig)


@pytest.mark.parametrize("name", ["$x$", "_x", "a b", "a/b", ".a", "<b>", "-x", "a\n"])
def test_names_of_arms_that_mean_something_elsewhere(name):
    with pytest.raises(RunError, match=r"arm is .*, but a name "):
        resolve(Config(dtype="float32", arm=name), CPU, META, {}, GPTConfig)


@pytest.mark.parametrize("name", ["kronecker_s0.1", "lr=3e-3", "2x", "größe", "a+b"])
def test_names_that_are_fine(name):
    assert resolve(Config(dtype="float32", arm=name), CPU, META, {}, GPTConfig)[0].arm == name
