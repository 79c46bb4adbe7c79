"""What the configuration leaves open, decided once: afterwards it stands, as config.json has it."""

import dataclasses
import re
from pathlib import Path

from engine.errors import RunError
from engine.ranks import number_format


def resolve(config, device, meta: dict, decided: dict, shape_type):
    """(configuration with nothing left open, the model's shape); the one that was given is not touched.

    meta: the data as data.meta.describe has it. decided: keys that pretrained weights decide. shape_type: the model's
    own configuration, built from the keys that it shares with this one. Raises RunError where keys do not go together.
    """
    keys = decided | {
        "dtype": number_format(config.dtype, device)[0],
        "compile": device.type == "cuda" if config.compile is None else config.compile,
    }
    keys.setdefault("vocab_size", config.vocab_size or -(-meta["vocab_size"] // 64) * 64)
    settled = dataclasses.replace(config, **keys)
    try:
        shape = shape_type(**{f.name: getattr(settled, f.name) for f in dataclasses.fields(shape_type)})
    except ValueError as e:
        raise RunError(str(e)) from None
    # what the shape has made of 0, its own default
    name = settled.arm or arm_name(settled)
    settled = dataclasses.replace(settled, wte_init_rms=shape.wte_init_rms, arm=name)
    settled.given = getattr(config, "given", {})
    check(settled)
    return settled, shape


def arm_name(config) -> str:
    """The name of an arm that no file names, after the files in config/arms."""
    name = {"stock": "bpe", "kronecker": "kronecker"}.get(config.wte, f"bpe_{config.wte}")
    if config.wte_permute_seed:
        name += "_permuted"
    if config.tie_weights:
        return name + "_tied"
    return name + "_untied" if config.wte == "stock" else name


def check(config) -> None:
    """Refuse keys that mean nothing together, and names that could not be shown everywhere."""
    if config.tie_weights and config.head_lr_mult != 1:
        raise RunError("head_lr_mult means nothing with tie_weights=True: wte_lr_mult is the head's too")
    if config.wte != "kronecker" and config.wte_entropy:
        raise RunError(f"wte_entropy means nothing with wte={config.wte!r}: it belongs to wte='kronecker'")
    if config.decay_lr and config.min_lr > config.learning_rate:
        cure = "lower min_lr (a tenth of learning_rate is usual), or give --decay_lr=False"
        raise RunError(
            f"min_lr is {config.min_lr:g}, above learning_rate, {config.learning_rate:g}, so the rate would rise where it "
            f"should decay: {cure}"
        )
    # it becomes a legend, a table's cell, a folder's name; $ and a leading _ mean something to matplotlib
    if not re.fullmatch(r"[^\W_][\w.+=-]{0,63}", config.arm):
        allowed = "at most 64 letters, digits, and _ . + = - behind the first"
        raise RunError(f"arm is {config.arm!r}, but a name is {allowed}")
    names = {"out_dir": Path(config.out_dir).name}
    names |= {k: getattr(config, k) for k in ("wandb_project", "wandb_run_name", "wandb_group")}
    for key, name in names.items():
        if len(name) > 128 or not name.isprintable():
            allowed = "at most 128 characters, all of which can be printed"
            raise RunError(f"{key} is {name[:140]!r}, but a name has {allowed}")
