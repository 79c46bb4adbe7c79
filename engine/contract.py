"""The match contract: what compared runs share, what a resume may not change, and what is free.

Every key of the configuration stands in one group of CONTRACT, and what follows from data and model in IDENTITY.
A new key goes into the group whose rule it should follow; nothing else needs to change.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from engine.errors import RunError


@dataclass(frozen=True)
class Rule:
    """What becomes of a key between runs, at a resume and between the ranks of one run."""

    same: str  # in which runs it is the same: "all", "arm" (all seeds of one), or "" (free)
    resume: str  # "refused" when it changes, "schedule" (allowed by --new_schedule=True), or "free"
    ranks: bool = True  # the same on all ranks


# group: its rule, its keys
CONTRACT = {
    "shape and arithmetic": (
        Rule("all", "refused"),
        "n_layer n_head n_embd bias gelu vocab_size block_size dtype",
    ),
    "schedule": (
        Rule("all", "schedule"),
        "learning_rate min_lr max_iters warmup_iters lr_decay_iters decay_lr weight_decay beta1 beta2 grad_clip dropout",
    ),
    # what makes an arm, or a setting of one
    "arm": (
        Rule("arm", "refused"),
        "wte tie_weights pos_dim char_dim byte_extraction wte_init_rms wte_lr_mult wte_weight_decay wte_norm"
        " wte_permute_seed head_lr_mult wte_ngrams wte_rank length_normalize z_normalize wte_entropy arm",
    ),
    "seed": (Rule("", "refused"), "seed"),
    # how the work is cut up and when it is looked at; batch and validation windows have an identity of their own
    "pace": (
        Rule("", "free"),
        "init_from dry_run check_only eval_only new_schedule batch_size gradient_accumulation_steps"
        " global_batch_size eval_tokens eval_skip_tokens eval_interval log_interval ckpt_interval keep keep_best max_skipped"
        " loss compile compile_mode attention deterministic",
    ),
    # where it runs and who looks on
    "place": (
        Rule("", "free", ranks=False),
        "out_dir dataset data_dir device price_per_gpu_hour tracker wandb_log wandb_project wandb_run_name wandb_group",
    ),
}
RULES = {key: rule for rule, keys in CONTRACT.values() for key in keys.split()}

# Facts of run.json: in which runs they are the same ("all", or "seed": all arms of one), and what it means if not.
IDENTITY = {
    "data_fingerprint": ("all", "they were trained on different data"),
    "tokens_per_step": ("all", "their global batches differ"),
    "val_sha256": ("all", "they were not evaluated on the same validation windows"),
    "data_sha256": ("seed", "they did not read the same training tokens in the same order"),
    "body_sha256": ("seed", "their bodies were not the same at step 0"),
    "schedule_sha256": ("all", "they did not follow the same learning-rate schedule"),
}


@dataclass
class Member:
    """A run that is compared. arm: with its setting, where an experiment has several of one arm."""

    name: str
    arm: str
    seed: int
    config: dict
    info: dict  # run.json


def differences(members: list[Member], swept: Iterable[str] = ()) -> Iterator[str]:
    """What keeps runs from being matched, one sentence a key; `swept` keys may differ between arms and settings."""
    swept = set(swept)
    for member in members:
        for segment in member.info.get("segments") or ():
            changed = ", ".join(f"{k} from {a} to {b}" for k, (a, b) in segment["changed"].items())
            yield f"{member.name} took a new schedule at step {segment['step']:,} ({changed})"
    for key, rule in RULES.items():
        if rule.same:
            within_arm = rule.same == "arm" or key in swept
            values = [(m, m.arm if within_arm else None, m.config[key]) for m in members if key in m.config]
            who = "seeds of one arm" if within_arm else "all"
            yield from _difference(key, values, f"{who} must share it")
    for fact, (scope, meaning) in IDENTITY.items():
        if fact == "schedule_sha256" and swept:
            continue  # its keys were held against each other above
        missing = next((m for m in members if m.info.get(fact) is None), None)
        if missing is not None:
            yield f"{missing.name} records no {fact}, so nothing shows that it matches; leave it out"
            continue
        facts = [(m, m.seed if scope == "seed" else None, m.info[fact]) for m in members]
        yield from _difference(fact, facts, meaning)


def _difference(key: str, values: list[tuple], meaning: str) -> Iterator[str]:
    """The first two members of one group whose values differ. values: (member, group, value)."""
    first: dict = {}
    for member, group, value in values:
        other, theirs = first.setdefault(group, (member, value))
        if theirs != value:
            sides = (f"{m.name} ({str(v)[:12]})" for m, v in ((other, theirs), (member, value)))
            yield f"{key} differs between {' and '.join(sides)}: {meaning}"
            return


def check_match(members: list[Member], swept: Iterable[str] = ()) -> None:
    """Refuse runs that do not match, in one sentence about the first difference."""
    for sentence in differences(members, swept):
        raise RunError(f"runs do not match: {sentence}")


def check_resume(where, old: dict, config, defaults) -> dict:
    """{schedule key: [old, new]} of a resume under a new schedule; any other change is refused.

    where: the run's folder. old: its config.json; keys that it lacks had their `defaults`, or count as unchanged.
    """
    given = getattr(config, "given", {})
    missing = next((key for key in HASHED if key not in old and key in RULES), None)
    if missing:
        raise RunError(f"{where} has a config.json without {missing}: restore it, or take another --out_dir")
    changed = {}
    for key, rule in RULES.items():
        new = getattr(config, key, None)
        if rule.resume == "free" or (key not in old and key not in given):
            continue
        before = old.get(key, getattr(defaults, key, None))
        if before == new:
            continue
        if rule.resume == "schedule" and config.new_schedule:
            changed[key] = [before, new]
            continue
        way_out = "; --new_schedule=True goes on with the new one, as a run of its own kind"
        raise RunError(
            f"{where} was trained with {key}={before!r}, but now it is {new!r}: give the same, or choose another "
            f"--out_dir{way_out * (rule.resume == 'schedule')}"
        )
    return changed


def check_record(name: str, config: dict, run: dict) -> None:
    """Refuse a run whose config.json is not the one that its run.json was written with."""
    for key in config.keys() & run.keys() & {"arm", "seed"}:
        if config[key] != run[key]:
            both = f"{key} {config[key]!r} in config.json and {run[key]!r} in run.json"
            raise RunError(f"{name} has {both}: restore them")
    whole = all(key in config for key in HASHED if key in RULES)
    if whole and schedule_sha256(config, run["tokens_per_step"]) != run["schedule_sha256"]:
        raise RunError(f"the schedule in config.json of {name} is not the one that its run.json signs")


def agreed_keys(config: dict) -> dict:
    """The part of a configuration that all ranks of a run must share."""
    return {key: value for key, value in config.items() if RULES[key].ranks}


# What schedule_sha256 covers. The results that are there bear its hashes: it stays as it is.
HASHED = (
    "learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr"
    " block_size dropout tokens_per_step dtype"
).split()


def schedule_sha256(config: dict, tokens_per_step: int) -> str:
    return sha256_of({k: (config | {"tokens_per_step": tokens_per_step})[k] for k in HASHED})


def sha256_of(value) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
