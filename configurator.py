"""One typed configuration: defaults, then config files, then --key=value.

    python train.py config/demo.py config/arms/kronecker.py --seed=1338

A config file is plain Python whose top-level names are keys of `Config`; later files and flags win.
An unknown key is refused, in a file as on the command line, with the nearest known one, and so is a value of
another type or outside its key's range. nanoGPT's own config files run as they are: the few of their keys
that mean nothing here are named in OBSOLETE.
"""

import ast
import difflib
import math
import os
import runpy
from dataclasses import dataclass, field, fields
from pathlib import Path


class ConfigError(SystemExit):
    """A mistake in the configuration; like argparse, it ends the program with one sentence."""

    def __init__(self, sentence: str):
        super().__init__(f"error: {sentence}")


def key(default, meaning: str, choices: tuple = (), *, low=None, high=None, below=None, path: bool = False):
    """A key of a configuration: its default, what it means, and what its values may be.

    low, high: the lowest and the highest value; below: a value that is out of reach; path: `~` is expanded.
    """
    limits = {"low": low, "high": high, "below": below, "path": path, "empty": default == ""}
    return field(default=default, metadata={"meaning": meaning, "choices": choices} | limits)


SEEDS = {"low": -(2**63), "high": 2**63 - 1}  # what torch's generators take
COUNT = {"low": 1, "high": 10**12}  # steps, tokens
FROM_0 = {"low": 0, "high": 10**12}
BATCH = {"low": 1, "high": 2**20}


@dataclass
class Config:
    # the run
    out_dir: str = key("out", "folder of the run: config.json, run.json, metrics.jsonl, ckpt/", path=True)
    arm: str = key("", "name of the arm, for the comparison (empty: made from wte and tie_weights)")
    seed: int = key(1337, "seed of the parameters and of the data's order", **SEEDS)
    init_from: str = key(
        "scratch",
        "scratch | resume | auto (resume if there is anything) | gpt2, gpt2-medium, ... | a ckpt.pt | a GPT-2 folder",
        path=True,
    )
    new_schedule: bool = key(False, "resume under another schedule: recorded, and no longer matched")
    dry_run: bool = key(False, "print what the run will be and need, then stop before any data is read")
    price_per_gpu_hour: float = key(0.0, "dollars, for the cost that dry_run shows", low=0)
    check_only: bool = key(False, "print the run's identity (body, data, schedule) as JSON, then stop")
    # data
    dataset: str = key("fineweb_edu", "name of a folder in data/")
    data_dir: str = key("", "folder with the shards (empty: data/<dataset>)", path=True)
    batch_size: int = key(12, "sequences that one rank may take forward and backward at a time", **BATCH)
    gradient_accumulation_steps: int = key(40, "micro-batches of a step, over all ranks together", **BATCH)
    global_batch_size: int = key(0, "sequences of a step (0: batch_size * accumulation)", low=0, high=2**30)
    block_size: int = key(1024, "context length in tokens", low=1, high=2**20)
    # model
    n_layer: int = key(12, "transformer blocks", low=1, high=1000)
    n_head: int = key(12, "attention heads; must divide n_embd", low=1, high=2**16)
    n_embd: int = key(768, "width of the residual stream", low=1, high=2**16)
    dropout: float = key(0.0, "dropout; 0 is right for pretraining", low=0, below=1)
    bias: bool = key(False, "bias in Linear and LayerNorm layers")
    gelu: str = key("none", "exact GELU, or the tanh approximation of OpenAI's GPT-2", ("none", "tanh"))
    vocab_size: int = key(0, "ids of the model (0: the tokenizer's, rounded up to 64)", low=0, high=2**24)
    wte: str = key("stock", "input: table, byte codec, or control", ("stock", "kronecker", "lowrank", "hash"))
    tie_weights: bool = key(True, "tie the head to the input table (kronecker: to the induced table)")
    pos_dim: int = key(16, "kronecker: bytes of a token that the codec sees", low=1, high=1024)
    char_dim: int = key(256, "kronecker: size of the byte alphabet", low=1, high=256)
    byte_extraction: str = key("bytes", "kronecker: true bytes, or the reference's way", ("bytes", "decode"))
    wte_init_rms: float = key(0.0, "RMS of the embeddings at step 0 (0: kronecker 1.0, others 0.02)", low=0)
    wte_lr_mult: float = key(1.0, "learning rate of the input side over the body's", low=0)
    wte_weight_decay: float = key(-1.0, "weight decay of the input side (-1: the body's)", low=-1)
    wte_norm: str = key("none", "rms: a norm without parameters behind the token embedding", ("none", "rms"))
    wte_permute_seed: int = key(0, "kronecker: seed of bytes dealt out anew (0: no)", low=0, high=2**63)
    head_lr_mult: float = key(1.0, "learning rate of an untied head over the body's", low=0)
    wte_ngrams: int = key(0, "kronecker: buckets of a hashed byte 2/3-gram term (0: none)", low=0, high=2**24)
    wte_rank: int = key(0, "kronecker: rank of a per-token residual (0: none)", low=0, high=2**16)
    length_normalize: bool = key(True, "kronecker: divide the code by the square root of the token's length")
    z_normalize: bool = key(True, "kronecker: give each token's code mean 0 and deviation 1")
    wte_entropy: float = key(0.0, "kronecker: strength of the row-entropy regulariser (0: off)", low=0)
    loss: str = key("auto", "its kernel; auto: chunked on a CPU", ("auto", "full", "chunked", "liger"))
    # optimiser and schedule
    learning_rate: float = key(6e-4, "largest learning rate of AdamW", low=0)
    max_iters: int = key(600000, "optimiser steps", **COUNT)
    weight_decay: float = key(1e-1, "weight decay on tensors of two or more dimensions", low=0)
    beta1: float = key(0.9, "AdamW's beta1", low=0, below=1)
    beta2: float = key(0.95, "AdamW's beta2", low=0, below=1)
    grad_clip: float = key(1.0, "largest gradient norm (0: no clipping)", low=0)
    decay_lr: bool = key(True, "cosine decay after the warm-up")
    warmup_iters: int = key(2000, "steps of linear warm-up", **FROM_0)
    lr_decay_iters: int = key(0, "step at which the decay ends (0: max_iters)", **FROM_0)
    min_lr: float = key(6e-5, "learning rate at the end of the decay", low=0)
    # evaluation, logs, checkpoints
    eval_interval: int = key(2000, "steps between evaluations", **COUNT)
    eval_tokens: int = key(10_485_760, "validation tokens: always the first so many of the shard", **COUNT)
    eval_skip_tokens: int = key(0, "validation tokens to pass over first: those that tuning read", **FROM_0)
    eval_only: bool = key(False, "evaluate once and stop")
    log_interval: int = key(1, "steps between lines of the log", **COUNT)
    ckpt_interval: int = key(
        0, "steps between checkpoints (0: eval_interval; -1: only when stopped or best)", low=-1, high=10**12
    )
    keep: int = key(2, "newest checkpoints that are kept, beside the best one", **COUNT)
    keep_best: bool = key(True, "also save at each new lowest validation loss, and keep the best checkpoint")
    max_skipped: int = key(
        10, "non-finite losses or gradients in a row that stop the run (looked at when it logs)", **COUNT
    )
    tracker: str = key("none", "where to show the run; trackio: here", ("none", "wandb", "trackio"))
    wandb_log: bool = key(False, "nanoGPT's key for tracker=wandb")
    wandb_project: str = key("kronecker-nanogpt", "the tracker's project")
    wandb_run_name: str = key("", "the run's name there (empty: <arm>-s<seed>)")
    wandb_group: str = key("", "group of the runs that are compared there (empty: the out_dir's parent)")
    # machine
    device: str = key("auto", "auto | cpu | cuda | cuda:N | mps; torchrun's ranks choose their own GPU")
    dtype: str = key("auto", "of matmuls; auto: bfloat16 if fast", ("auto", "float32", "bfloat16", "float16"))
    compile: bool | None = key(None, "torch.compile the model (auto: on CUDA)")
    compile_mode: str = key("default", "of torch.compile", ("default", "max-autotune-no-cudagraphs"))
    attention: str = key("auto", "its kernel on CUDA; auto: torch's choice", ("auto", "flash", "cudnn"))
    deterministic: bool = key(False, "deterministic kernels only, at some cost in speed on CUDA")


# Keys of nanoGPT whose meaning is gone here; each is said once and skipped.
OBSOLETE = {
    "eval_iters": "the validation windows are fixed here; eval_tokens sets how many",
    "always_save_checkpoint": "the newest checkpoints and the best one are always kept; see keep",
    "backend": "nccl on CUDA and gloo elsewhere are chosen by themselves",
}

# Keys that say the same as another, which they would else be silently overruled by.
OVERRULED_BY = {"dataset": "data_dir", "gradient_accumulation_steps": "global_batch_size"}

KEYS = {f.name: f for f in fields(Config)}


def load(argv: list[str], prog: str = "train.py", also: type | None = None, quiet: bool = False):
    """Config from arguments, or `also`, another dataclass of keys (sample.py's); --help prints them and ends.

    Values already of the right type are kept, an int passes for a float and 0/1 for a bool; anything else
    is a ConfigError, which names the file and what was expected.
    """
    known = {f.name: f for f in fields(also or Config)}
    if {"-h", "--help"} & {*argv}:
        print(help_text(prog, known))
        raise SystemExit(0)
    values, notes = {}, {}
    for arg in argv:
        for name, value, where in read_argument(arg, known):
            if name in OBSOLETE and name not in known:
                notes.setdefault(name, f"note: {name} {where} means nothing here: {OBSOLETE[name]}")
                continue
            values[name] = convert(known, name, value, where)
            # one choice under two names: the later one counts
            if (other := OVERRULED_BY.get(name)) and values.get(other):
                values[other] = known[other].default
            elif name == "tracker":
                values["wandb_log"] = values["tracker"] == "wandb"
            elif name == "wandb_log" and (values[name] or values.get("tracker") == "wandb"):
                values["tracker"] = "wandb" if values[name] else "none"
    if notes and not quiet:
        print("\n".join(notes.values()))
    config = (also or Config)(**values)
    config.given = values  # what was set, beside what is a default
    return config


def read_argument(arg: str, known: dict) -> list[tuple]:
    """[(key, value, where it stands)] of --key=value or of a config file."""
    if not arg.startswith("--"):
        return [(name, value, f"in {arg}") for name, value in read_file(arg).items()]
    name, given, text = arg[2:].partition("=")
    if not given:
        raise ConfigError(f"{arg} has no value: write --{name}=VALUE")
    is_text = name in known and known[name].type is str  # --start=1e5 means these three characters
    return [(name, text if is_text else parse(text), "on the command line")]


def read_file(path: str) -> dict:
    """Top-level names of a config file; not what it imports or defines, and no name with a leading underscore."""
    if not Path(path).is_file():
        raise ConfigError(f"no config file {path}: give a path such as config/demo.py, or --key=value")
    try:
        names = runpy.run_path(path)
        tree = ast.parse(Path(path).read_bytes())
    except (Exception, SystemExit) as e:
        raise ConfigError(f"config file {path} does not run: {type(e).__name__}: {e}") from None
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {(a.asname or a.name).split(".")[0] for node in imports for a in node.names}
    no_keys = imported - KEYS.keys()
    return {k: v for k, v in names.items() if not (k.startswith("_") or callable(v) or k in no_keys)}


def parse(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def convert(known: dict, name: str, value, where: str):
    """The value as the key's type has it, or a ConfigError. known: the keys' dataclass fields by name."""
    if name not in known:
        near = difflib.get_close_matches(name, [*known, *OBSOLETE], n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists them all"
        raise ConfigError(f"unknown key {name if name.isidentifier() else repr(name)} {where}: {hint}")
    try:
        return checked(known[name].type, value, known[name].metadata)
    except ValueError as e:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise ConfigError(f"{name} {where} is {shown}, but it must be {e}") from None


def checked(kind: type, value, limits: dict):
    """The value as `kind` and within the limits of `key`; a ValueError says what it must be."""
    if kind == (bool | None) and value in (None, "auto"):
        return None
    if kind in (bool, bool | None):
        value = {"true": True, "false": False}.get(str(value).lower(), value)
        if value not in (True, False):
            raise ValueError("True or False")
        return bool(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e6 is a fine way to write a million steps
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**300:
        value = float(value)
    if kind is str and not isinstance(value, str):
        value = str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError({int: "a whole number", float: "a number", str: "a text"}[kind])
    low, high, below = limits["low"], limits["high"], limits["below"]
    if kind is float and not math.isfinite(value):
        raise ValueError("a finite number")
    if low is not None and value < low:
        raise ValueError(f"at least {low}")
    if high is not None and value > high:
        raise ValueError(f"at most {high}")
    if below is not None and value >= below:
        raise ValueError(f"below {below}")
    if limits["choices"] and value not in limits["choices"]:
        raise ValueError(f"one of {', '.join(limits['choices'])}")
    if limits["path"]:
        if "\0" in value or "\n" in value:
            raise ValueError("a path, without line ends and null characters")
        if not value and not limits["empty"]:
            raise ValueError("a path; the folder where you are is ./")
        value = os.path.expanduser(value)
    return value


def recorded(values: dict, where: str) -> Config:
    """The Config of a run's config.json; keys that it lacks had their defaults, later ones are let through."""
    return Config(**{k: convert(KEYS, k, v, f"in {where}") for k, v in values.items() if k in KEYS})


def help_text(prog: str, known: dict) -> str:
    lines = [f"usage: python {prog} [CONFIG_FILE ...] [--key=value ...]", "", "keys, with type and default:"]
    for f in known.values():
        kind = "bool" if f.type == (bool | None) else f.type.__name__
        default = "auto" if f.default is None else repr(f.default)
        lines.append(f"  --{f.name:<28} {kind:<6}{default:<20} {f.metadata['meaning']}")
        if f.metadata["choices"]:
            lines[-1] += f" ({' | '.join(f.metadata['choices'])})"
    return "\n".join(lines)
