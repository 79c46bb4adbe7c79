"""One typed configuration: defaults, then config files, then --key=value.

    python train.py config/demo.py config/arms/kronecker.py --seed=1338

A config file is plain Python whose top-level names are keys of `Config`; later files and flags win.
An unknown key is refused, in a file as on the command line, with the nearest known one, and so is a value of
another type or outside its key's range. nanoGPT's own config files run as they are: the few of their keys
that mean nothing here are named in OBSOLETE.
"""

import argparse
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


@dataclass
class Config:
    # the run
    out_dir: str = key("out", "folder of the run: config.json, run.json, metrics.jsonl, ckpt/", path=True)
    arm: str = key("", "name of the arm, for the comparison (empty: made from wte and tie_weights)")
    seed: int = key(1337, "seed of the parameters and of the data's order", **SEEDS)
    init_from: str = key(
        "scratch",
        "scratch | resume | auto (resume where there is something to resume) | gpt2 | gpt2-medium | gpt2-large"
        " | gpt2-xl | a nanoGPT ckpt.pt | a folder with GPT-2 weights as transformers writes them",
        path=True,
    )
    new_schedule: bool = key(
        False, "resume under another schedule (learning rate, steps, ...): recorded, and no longer matched"
    )
    dry_run: bool = key(False, "print what the run will be and need, then stop before any data is read")
    price_per_gpu_hour: float = key(0.0, "dollars, for the cost that dry_run shows", low=0)
    check_only: bool = key(
        False, "print the run's identity (hashes of body, data, schedule) as JSON, then stop"
    )
    # data
    dataset: str = key("fineweb_edu", "name of a folder in data/")
    data_dir: str = key("", "folder with the shards (empty: data/<dataset>)", path=True)
    batch_size: int = key(
        12,
        "largest micro-batch: sequences that one rank may take forward and backward at a time",
        low=1,
        high=2**20,
    )
    gradient_accumulation_steps: int = key(
        40, "micro-batches in one optimiser step, over all ranks together, as in nanoGPT", low=1, high=2**20
    )
    global_batch_size: int = key(
        0,
        "sequences in one optimiser step (0: batch_size * gradient_accumulation_steps); ranks share it",
        low=0,
        high=2**30,
    )
    block_size: int = key(1024, "context length in tokens", low=1, high=2**20)
    # model
    n_layer: int = key(12, "transformer blocks", low=1, high=1000)
    n_head: int = key(12, "attention heads; must divide n_embd", low=1, high=2**16)
    n_embd: int = key(768, "width of the residual stream", low=1, high=2**16)
    dropout: float = key(0.0, "dropout; 0 is right for pretraining", low=0, below=1)
    bias: bool = key(False, "bias in Linear and LayerNorm layers")
    gelu: str = key("none", "exact GELU, or the tanh approximation of OpenAI's GPT-2", ("none", "tanh"))
    vocab_size: int = key(
        0, "rows of the table and the head (0: the tokenizer's, rounded up to 64)", low=0, high=2**24
    )
    wte: str = key(
        "stock",
        "the input embedding: a table, the byte codec, or a control of the codec's size",
        ("stock", "kronecker", "lowrank", "hash"),
    )
    tie_weights: bool = key(True, "tie the head to the input table (kronecker: to the induced table)")
    pos_dim: int = key(16, "kronecker: bytes of a token that the codec sees", low=1, high=1024)
    char_dim: int = key(256, "kronecker: size of the byte alphabet", low=1, high=256)
    byte_extraction: str = key(
        "bytes", "kronecker: true bytes, or the reference's decode()", ("bytes", "decode")
    )
    wte_init_rms: float = key(
        0.0,
        "RMS of the embedding's output at step 0 (0: the usual one, kronecker 1.0 and all others 0.02)",
        low=0,
    )
    wte_lr_mult: float = key(1.0, "learning rate of the input side over the body's", low=0)
    wte_weight_decay: float = key(-1.0, "weight decay of the input side (-1: the body's)", low=-1)
    wte_norm: str = key("none", "rms: a norm without parameters behind the token embedding", ("none", "rms"))
    wte_permute_seed: int = key(
        0,
        "kronecker: deal the tokens' bytes out anew among tokens of equal length, by this seed (0: do not)",
        low=0,
        high=2**63,
    )
    head_lr_mult: float = key(1.0, "learning rate of an untied head over the body's", low=0)
    wte_ngrams: int = key(
        0, "kronecker: buckets of a hashed byte 2/3-gram term (the paper: 0, none)", low=0, high=2**24
    )
    wte_rank: int = key(0, "kronecker: rank of a per-token residual (the paper: 0, none)", low=0, high=2**16)
    length_normalize: bool = key(True, "kronecker: divide the code by the square root of the token's length")
    z_normalize: bool = key(True, "kronecker: give each token's code mean 0 and deviation 1")
    wte_entropy: float = key(
        0.0, "kronecker: strength of the row-entropy regulariser (the paper's option; 0: off)", low=0
    )
    loss: str = key(
        "auto",
        "head and cross-entropy: full logits, in chunks, or by liger-kernel; auto: chunked on a CPU, else full",
        ("auto", "full", "chunked", "liger"),
    )
    # optimiser and schedule
    learning_rate: float = key(6e-4, "largest learning rate of AdamW", low=0)
    max_iters: int = key(600000, "optimiser steps", **COUNT)
    weight_decay: float = key(1e-1, "weight decay on tensors of two or more dimensions", low=0)
    beta1: float = key(0.9, "AdamW's beta1", low=0, below=1)
    beta2: float = key(0.95, "AdamW's beta2", low=0, below=1)
    grad_clip: float = key(1.0, "largest gradient norm (0: no clipping)", low=0)
    decay_lr: bool = key(True, "cosine decay after the warm-up")
    warmup_iters: int = key(2000, "steps of linear warm-up", low=0, high=10**12)
    lr_decay_iters: int = key(0, "step at which the decay ends (0: max_iters)", low=0, high=10**12)
    min_lr: float = key(6e-5, "learning rate at the end of the decay", low=0)
    # evaluation, logs, checkpoints
    eval_interval: int = key(2000, "steps between evaluations", **COUNT)
    eval_tokens: int = key(
        10_485_760,
        "validation tokens: the first so many of the validation shard, always the same",
        **COUNT,
    )
    eval_skip_tokens: int = key(
        0,
        "validation tokens that are passed over first, so that tuning and final figures read disjoint parts",
        low=0,
        high=10**12,
    )
    eval_only: bool = key(False, "evaluate once and stop")
    log_interval: int = key(1, "steps between lines of the log", **COUNT)
    ckpt_interval: int = key(
        0, "steps between checkpoints (0: eval_interval; -1: only when stopped or best)", low=-1, high=10**12
    )
    keep: int = key(2, "newest checkpoints that are kept, beside the best one", **COUNT)
    keep_best: bool = key(
        True, "also keep the checkpoint of the lowest validation loss (a save more at each new lowest)"
    )
    max_skipped: int = key(
        10, "steps in a row with a non-finite loss or gradient before the run stops", **COUNT
    )
    tracker: str = key(
        "none",
        "where the run is shown beside metrics.jsonl: Weights & Biases, or trackio, a dashboard on this machine",
        ("none", "wandb", "trackio"),
    )
    wandb_log: bool = key(False, "nanoGPT's key for tracker=wandb")
    wandb_project: str = key("kronecker-nanogpt", "the tracker's project")
    wandb_run_name: str = key("", "the run's name there (empty: <arm>-s<seed>)")
    wandb_group: str = key(
        "", "its group there; the runs of one comparison share it (empty: the out_dir's parent)"
    )
    # machine
    device: str = key("auto", "auto | cpu | cuda | cuda:N | mps; torchrun's ranks choose their own GPU")
    dtype: str = key(
        "auto", "of the matmuls; auto: bfloat16 where it is fast", ("auto", "float32", "bfloat16", "float16")
    )
    compile: bool | None = key(None, "torch.compile the model (auto: on CUDA)")
    compile_mode: str = key(
        "default", "of torch.compile; autotuning takes minutes", ("default", "max-autotune-no-cudagraphs")
    )
    attention: str = key(
        "auto", "kernel of the attention on CUDA; auto: torch's choice", ("auto", "flash", "cudnn")
    )
    deterministic: bool = key(False, "deterministic kernels only, at some cost in speed on CUDA")


# Keys of nanoGPT whose meaning is gone here; each is said once and skipped.
OBSOLETE = {
    "eval_iters": "the validation windows are fixed here; eval_tokens sets how many",
    "always_save_checkpoint": "the newest checkpoints and the best one are always kept; see keep",
    "backend": "nccl on CUDA and gloo elsewhere are chosen by themselves",
}

KEYS = {f.name: f for f in fields(Config)}
# Keys that are gone, with what took their place.
RENAMED = {"wte_scale": "wte_init_rms, which scales the initial weights instead of every output"}


def load(argv: list[str], prog: str = "train.py", also: type | None = None, quiet: bool = False):
    """Config from arguments; `also` is a second dataclass of keys (sample.py's), returned as the second value.

    Values already of the right type are kept, an int passes for a float and 0/1 for a bool; anything else
    is a ConfigError, which names the file and what was expected.
    """
    known = {f.name: f for f in fields(also)} if also else KEYS
    values: dict = {}
    said = set()
    if any(a in ("-h", "--help") for a in argv):
        print(help_text(prog, known))
        raise SystemExit(0)
    for arg in argv:
        if arg.startswith("--"):
            name, sep, text = arg[2:].partition("=")
            if not sep:
                raise ConfigError(f"{arg} has no value: write --{name}=VALUE")
            is_text = name in known and known[name].type is str  # --start=1e5 means these three characters
            given = [(name, text if is_text else parse(text), "on the command line")]
        else:
            given = [(k, v, f"in {arg}") for k, v in read_file(arg).items()]
        for name, value, where in given:
            if name in OBSOLETE and name not in known:
                if name not in said and not quiet:
                    print(f"note: {name} {where} means nothing here: {OBSOLETE[name]}")
                said.add(name)
            else:
                values[name] = convert(known, name, value, where)
                if name == "tracker":  # one choice under two names: the later one counts
                    values["wandb_log"] = values["tracker"] == "wandb"
                elif name == "wandb_log" and (values[name] or values.get("tracker") == "wandb"):
                    values["tracker"] = "wandb" if values[name] else "none"
    config = (also or Config)(**values)
    config.given = values  # what was set, beside what is a default
    return config


def read_file(path: str) -> dict:
    """Top-level names of a config file; not what it imports or defines, and no name with a leading underscore."""
    if not Path(path).is_file():
        raise ConfigError(
            f"there is no config file {path}: give a path such as config/demo.py, or --key=value"
        )
    try:
        names = runpy.run_path(path)
        tree = ast.parse(Path(path).read_bytes())
    except (Exception, SystemExit) as e:
        raise ConfigError(f"config file {path} does not run: {type(e).__name__}: {e}") from None
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {(a.asname or a.name).split(".")[0] for node in imports for a in node.names}
    return {
        k: v
        for k, v in names.items()
        if not (k.startswith("_") or callable(v) or k in imported - KEYS.keys())
    }


def parse(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def convert(known: dict, name: str, value, where: str):
    """The value as the key's type has it, or a ConfigError. known: the keys' dataclass fields by name."""
    if name in RENAMED and name not in known:
        raise ConfigError(f"the key {name} {where} is gone: use {RENAMED[name]}")
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
        lowered = {"true": True, "false": False}.get(str(value).lower(), value)
        if lowered in (True, False):
            return bool(lowered)
        raise ValueError("True or False")
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e6 is a fine way to write a million steps
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**300:
        value = float(value)
    if kind is str and not isinstance(value, str):
        value = str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError({int: "a whole number", float: "a number", str: "a text"}[kind])
    low, high, below = (limits.get(name) for name in ("low", "high", "below"))
    if kind is float and not math.isfinite(value):
        raise ValueError("a finite number")
    if low is not None and value < low:
        raise ValueError(f"at least {low}")
    if high is not None and value > high:
        raise ValueError(f"at most {high}")
    if below is not None and value >= below:
        raise ValueError(f"below {below}")
    choices = limits.get("choices")
    if choices and value not in choices:
        raise ValueError(f"one of {', '.join(choices)}")
    if limits.get("path"):
        if "\0" in value or "\n" in value:
            raise ValueError("a path, without line ends and null characters")
        if not value and not limits.get("empty"):
            raise ValueError("a path; the folder where you are is ./")
        value = os.path.expanduser(value)
    return value


def argument(kind: type, **limits):
    """A type for argparse's `add_argument` with the ranges of `key`: argument(int, low=1)."""

    def read(text: str):
        try:
            return checked(kind, text if kind is str else parse(text), limits)
        except ValueError as e:
            raise argparse.ArgumentTypeError(f"{text!r} must be {e}") from None

    return read


def recorded(values: dict, where: str) -> Config:
    """The Config of a run's config.json; keys that it lacks had their defaults, later ones are let through."""
    return Config(**{k: convert(KEYS, k, v, f"in {where}") for k, v in values.items() if k in KEYS})


def help_text(prog: str, known: dict) -> str:
    lines = [f"usage: python {prog} [CONFIG_FILE ...] [--key=value ...]", "", "keys, with type and default:"]
    for f in known.values():
        kind = "bool" if f.type == (bool | None) else f.type.__name__
        default = "auto" if f.default is None else repr(f.default)
        lines.append(f"  --{f.name:<28} {kind:<6}{default:<20} {f.metadata['meaning']}")
        if f.metadata.get("choices"):
            lines[-1] += f" ({' | '.join(f.metadata['choices'])})"
    return "\n".join(lines)
