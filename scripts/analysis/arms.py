"""What an arm is: the keys that make it, and runs of one name that are not one arm."""

from functools import lru_cache

import configurator
from engine.contract import CONTRACT
from model import USUAL_RMS
from scripts.experiment import arm_file

RECIPE = ("pos_dim", "char_dim")  # an arm's keys that come from the recipe
KEYS = [key for key in CONTRACT["arm"][1].split() if key != "arm"]


def arm_keys(config: dict) -> dict:
    """The keys of a run's config, among those that make an arm, that are not at their defaults."""
    found = {}
    for key in KEYS:
        default = configurator.KEYS[key].default
        value = config.get(key, default)
        usual = {default, USUAL_RMS.get(config.get("wte"))} if key == "wte_init_rms" else {default}
        if value not in usual:
            found[key] = value
    return found


@lru_cache
def own_keys(arm: str) -> dict | None:
    """What arm_keys says of a run of config/arms/ARM.py; None where there is no such file."""
    file = arm_file(arm)
    return arm_keys(configurator.read_file(str(file))) if file.is_file() else None


def distinguish(runs) -> None:
    """Give runs of one arm's name that differ in an arm's keys names of their own, e.g. `kronecker[wte_rank=16]`.

    The plain name stays with the runs that have the keys of config/arms/NAME.py, or, where there is no such file, with
    the first of them. RECIPE's keys count only where runs of one name differ in them.
    """
    for arm in {run.arm for run in runs}:
        mine = [run for run in runs if run.arm == arm]
        first, file = arm_keys(mine[0].config), own_keys(arm)
        plain = first if file is None else file | {k: first[k] for k in RECIPE if k in first}
        for run in mine:
            keys = arm_keys(run.config)
            other = [k for k in KEYS if k in run.config and keys.get(k) != plain.get(k)]
            if other:
                run.arm += "[" + ", ".join(f"{k}={run.config.get(k)}" for k in other) + "]"
