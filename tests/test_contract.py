"""engine/contract.py: every key has a rule, and the rules are kept."""

import dataclasses

import pytest

import configurator
from configurator import Config
from engine import contract
from engine.errors import RunError

FACTS = dict.fromkeys(contract.IDENTITY, "equal")


def member(arm="bpe_tied", seed=1, run=None, **config):
    keys = dataclasses.asdict(Config(arm=arm, seed=seed)) | config
    return contract.Member(f"{arm}_s{seed}", arm, seed, keys, FACTS | (run or {}))


def other(key, value):
    """Another value of a key's own type, within its choices."""
    choices = configurator.KEYS[key].metadata["choices"]
    if choices:
        return next(c for c in choices if c != value)
    if isinstance(value, bool) or value is None:
        return not value
    return value + "x" if isinstance(value, str) else value + 1


def test_every_key_of_the_configuration_has_one_rule():
    listed = [key for _, keys in contract.CONTRACT.values() for key in keys.split()]
    assert sorted(listed) == sorted(f.name for f in dataclasses.fields(Config))
    for rule in contract.RULES.values():
        assert rule.same in ("all", "arm", "")
        assert rule.resume in ("refused", "schedule", "free")


@pytest.mark.parametrize("key", contract.RULES)
def test_a_resume_may_change_what_is_free_and_nothing_else(key):
    old = dataclasses.asdict(Config())
    config = Config(**{key: other(key, old[key])})
    rule = contract.RULES[key]
    if rule.resume == "free":
        assert contract.check_resume("out", old, config, Config()) == {}
        return
    with pytest.raises(RunError, match=f"out was trained with {key}=.*, but now it is .*: give the same"):
        contract.check_resume("out", old, config, Config())
    config.new_schedule = True
    if rule.resume == "schedule":
        assert contract.check_resume("out", old, config, Config()) == {key: [old[key], getattr(config, key)]}
    else:
        with pytest.raises(RunError, match=f"was trained with {key}="):
            contract.check_resume("out", old, config, Config())


def test_a_key_that_an_older_record_lacks_had_its_default():
    old = dataclasses.asdict(Config())
    del old["wte_norm"]
    assert contract.check_resume("out", old, configurator.load([]), Config()) == {}
    with pytest.raises(RunError, match="was trained with wte_norm='none', but now it is 'rms'"):
        contract.check_resume("out", old, configurator.load(["--wte_norm=rms"]), Config())


def test_a_configuration_that_was_altered_afterwards():
    config = dataclasses.asdict(Config())
    run = {"tokens_per_step": 8, "schedule_sha256": contract.schedule_sha256(config, 8)}
    contract.check_record("a", config, run)
    with pytest.raises(RunError, match=r"schedule in config.json of a is not the one"):
        contract.check_record("a", config | {"learning_rate": 1.0}, run)
    contract.check_record("a", {"max_iters": 3}, run)  # of an earlier version, with fewer keys
    with pytest.raises(RunError, match=r"a has seed 1337 in config.json and 2 in run.json: restore them"):
        contract.check_record("a", config, run | {"arm": config["arm"], "seed": 2})


def test_runs_that_match():
    runs = [member(arm, seed, {"body_sha256": f"b{seed}", "data_sha256": f"d{seed}"}, wte=wte)
            for arm, wte in (("bpe_tied", "stock"), ("kronecker", "kronecker")) for seed in (1, 2)]  # fmt: skip
    contract.check_match(runs)


@pytest.mark.parametrize("key", sorted(contract.RULES.keys() - {"arm", "seed"}))  # these tell the runs apart
def test_runs_that_differ_in_a_key(key):
    rule = contract.RULES[key]
    changed = {key: other(key, dataclasses.asdict(Config())[key])}
    arms = [member(), member("kronecker", **changed)]
    seeds = [member(), member(seed=2, **changed)]
    for runs, refused in ((arms, rule.same == "all"), (seeds, rule.same in ("all", "arm"))):
        found = list(contract.differences(runs))
        assert bool(found) == refused
        if refused:
            assert found[0].startswith(f"{key} differs between bpe_tied_s1 (")
            with pytest.raises(RunError, match=f"runs do not match: {key} differs"):
                contract.check_match(runs)


@pytest.mark.parametrize(("fact", "scope"), [(fact, scope) for fact, (scope, _) in contract.IDENTITY.items()])
def test_runs_that_differ_in_a_fact(fact, scope):
    with pytest.raises(
        RunError, match=rf"{fact} differs between bpe_tied_s1 \(equal\) and kronecker_s1 \(other\)"
    ):
        contract.check_match([member(), member("kronecker", run={fact: "other"})])
    seeds = list(contract.differences([member(), member(seed=2, run={fact: "other"})]))
    assert bool(seeds) == (scope == "all")
    with pytest.raises(RunError, match=f"kronecker_s1 records no {fact}, so nothing shows that it matches"):
        contract.check_match([member(), member("kronecker", run={fact: None})])


def test_a_swept_key_may_differ_between_arms_but_not_between_seeds():
    def pair(**second):
        return [
            member(learning_rate=1e-3, run={"schedule_sha256": "a"}),
            member(learning_rate=3e-3, run={"schedule_sha256": "b"}, **second),
        ]

    swept = ("learning_rate", "min_lr")
    contract.check_match(pair(arm="kronecker"), swept)
    with pytest.raises(RunError, match=r"learning_rate differs .*seeds of one arm must share it"):
        contract.check_match(pair(seed=2), swept)
    with pytest.raises(RunError, match="beta2 differs"):
        contract.check_match(pair(arm="kronecker", beta2=0.9), swept)
    with pytest.raises(RunError, match="learning_rate differs"):
        contract.check_match(pair(arm="kronecker"))


def test_a_run_that_took_a_new_schedule_matches_none():
    segments = [{"step": 1200, "changed": {"max_iters": [1200, 2400]}}]
    with pytest.raises(
        RunError, match=r"kronecker_s1 took a new schedule at step 1,200 \(max_iters from 1200 to 2400\)"
    ):
        contract.check_match([member(), member("kronecker", run={"segments": segments})])


def test_ranks_share_all_but_place():
    keys = contract.agreed_keys(dataclasses.asdict(Config()))
    assert {"learning_rate", "seed", "batch_size", "ckpt_interval", "dtype", "init_from"} <= keys.keys()
    assert not {"out_dir", "data_dir", "device", "wandb_log"} & keys.keys()


def test_the_schedule_s_hash_stays():
    """The recorded results bear it: another hash would cut them off from every run to come."""
    assert contract.schedule_sha256(dataclasses.asdict(Config(dtype="bfloat16")), 491520) == (
        "0c5a6f6d82f9633b1430604cc509e57e6118f4ffba040112b3101e3fa7f50824"
    )
