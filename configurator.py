"""One typed configuration: defaults, then config files, then --key=value.

    python train.py config/demo.py config/arms/kronecker.py --seed=1338

A config file is plain Python whose top-level names are keys of `Config`; later files and flags win.
A key nobody knows is refused, in a file as on the command line, with the nearest known one. nanoGPT's
own config files run as they are: the few of their keys that mean nothing here are named in OBSOLETE.
"""

import ast
import difflib
import runpy
import types
from dataclasses import dataclass, field, fields
from pathlib import Path


class ConfigError(SystemExit):
    """A mistake in the configuration; like argparse, it ends the program with one sentence."""

    def __init__(self, sentence: str):
        super().__init__(f"error: {sentence}")


def key(default, meaning: str, choices: tuple = ()):
    return field(default=default, metadata={"meaning": meaning, "choices": choices})


@dataclass
class Config:
    # the run
    out_dir: str = key("out", "folder of the run: config.json, run.json, metrics.jsonl, ckpt/")
    arm: str = key("", "name of the arm, for the comparison (empty: made from wte and tie_weights)")
    seed: int = key(1337, "seed of the parameters and of the data's order")
    init_from: str = key(
        "scratch",
        "scratch | resume | auto (resume where there is something to resume) | gpt2 | gpt2-medium | gpt2-large"
        " | gpt2-xl | a nanoGPT ckpt.pt | a folder with GPT-2 weights as transformers writes them",
    )
    dry_run: bool = key(False, "print what the run will be and need, then stop before any data is read")
    check_only: bool = key(
        False, "print the run's identity (hashes of body, data, schedule) as JSON, then stop"
    )
    # data
    dataset: str = key("fineweb_edu", "name of a folder in data/")
    data_dir: str = key("", "folder with the shards (empty: data/<dataset>)")
    batch_size: int = key(12, "sequences in one forward and backward on one rank (the micro-batch)")
    gradient_accumulation_steps: int = key(
        40, "micro-batches in one optimiser step, over all ranks together, as in nanoGPT"
    )
    global_batch_size: int = key(
        0, "sequences in one optimiser step (0: batch_size * gradient_accumulation_steps); ranks share it"
    )
    block_size: int = key(1024, "context length in tokens")
    # model
    n_layer: int = key(12, "transformer blocks")
    n_head: int = key(12, "attention heads; must divide n_embd")
    n_embd: int = key(768, "width of the residual stream")
    dropout: float = key(0.0, "dropout; 0 is right for pretraining")
    bias: bool = key(False, "bias in Linear and LayerNorm layers")
    gelu: str = key("none", "exact GELU, or the tanh approximation of OpenAI's GPT-2", ("none", "tanh"))
    vocab_size: int = key(0, "rows of the table and the head (0: the tokenizer's, rounded up to 64)")
    wte: str = key("stock", "the input embedding", ("stock", "kronecker"))
    tie_weights: bool = key(True, "tie the head to the input table (kronecker: to the induced table)")
    pos_dim: int = key(16, "kronecker: bytes of a token that the codec sees")
    char_dim: int = key(256, "kronecker: size of the byte alphabet")
    byte_extraction: str = key(
        "bytes", "kronecker: true bytes, or the reference's decode()", ("bytes", "decode")
    )
    wte_scale: float = key(1.0, "kronecker: factor on the embedding's output (the paper: 1)")
    wte_lr_mult: float = key(1.0, "kronecker: factor on the projection's learning rate (the paper: 1)")
    wte_ngrams: int = key(0, "kronecker: buckets of a hashed byte 2/3-gram term (the paper: 0, none)")
    wte_rank: int = key(0, "kronecker: rank of a per-token residual (the paper: 0, none)")
    length_normalize: bool = key(True, "kronecker: divide the code by the square root of the token's length")
    z_normalize: bool = key(True, "kronecker: give each token's code mean 0 and deviation 1")
    wte_entropy: float = key(
        0.0, "kronecker: strength of the row-entropy regulariser (the paper's option; 0: off)"
    )
    loss: str = key(
        "auto",
        "head and cross-entropy: full logits, in chunks, or by liger-kernel; auto: chunked on a CPU, else full",
        ("auto", "full", "chunked", "liger"),
    )
    # optimiser and schedule
    learning_rate: float = key(6e-4, "largest learning rate of AdamW")
    max_iters: int = key(600000, "optimiser steps")
    weight_decay: float = key(1e-1, "weight decay on tensors of two or more dimensions")
    beta1: float = key(0.9, "AdamW's beta1")
    beta2: float = key(0.95, "AdamW's beta2")
    grad_clip: float = key(1.0, "largest gradient norm (0: no clipping)")
    decay_lr: bool = key(True, "cosine decay after the warm-up")
    warmup_iters: int = key(2000, "steps of linear warm-up")
    lr_decay_iters: int = key(0, "step at which the decay ends (0: max_iters)")
    min_lr: float = key(6e-5, "learning rate at the end of the decay")
    # evaluation, logs, checkpoints
    eval_interval: int = key(2000, "steps between evaluations")
    eval_tokens: int = key(
        10_485_760, "validation tokens: the first so many of the validation shard, always the same"
    )
    eval_only: bool = key(False, "evaluate once and stop")
    log_interval: int = key(1, "steps between lines of the log")
    ckpt_interval: int = key(0, "steps between checkpoints (0: eval_interval; -1: only when stopped or best)")
    keep: int = key(2, "newest checkpoints that are kept, beside the best one")
    keep_best: bool = key(
        True, "also keep the checkpoint of the lowest validation loss (a save more at each new lowest)"
    )
    max_skipped: int = key(10, "steps in a row with a non-finite loss or gradient before the run stops")
    wandb_log: bool = key(False, "log to Weights & Biases too")
    wandb_project: str = key("kronecker-nanogpt", "wandb project")
    wandb_run_name: str = key("", "wandb run name (empty: <arm>-s<seed>)")
    wandb_group: str = key(
        "", "wandb group; the runs of one comparison share it (empty: the out_dir's parent)"
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

TYPES = {f.name: f.type for f in fields(Config)}


def load(argv: list[str], prog: str = "train.py", also: type | None = None, quiet: bool = False):
    """Config from arguments; `also` is a second dataclass of keys (sample.py's), returned as the second value.

    Values already of the right type are kept, an int passes for a float and 0/1 for a bool; anything else
    is a ConfigError, which names the file and what was expected.
    """
    known = {f.name: f for f in fields(also)} if also else {f.name: f for f in fields(Config)}
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
    config = (also or Config)(**values)
    config.given = values  # what was set, beside what is a default
    return config


def read_file(path: str) -> dict:
    """Top-level names of a config file, modules and names with a leading underscore left out."""
    if not Path(path).is_file():
        raise ConfigError(
            f"there is no config file {path}: give a path such as config/demo.py, or --key=value"
        )
    try:
        names = runpy.run_path(path)
    except Exception as e:
        raise ConfigError(f"config file {path} does not run: {type(e).__name__}: {e}") from None
    return {
        k: v
        for k, v in names.items()
        if not k.startswith("_") and not isinstance(v, types.ModuleType | types.FunctionType)
    }


def parse(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def convert(known: dict, name: str, value, where: str):
    if name not in known:
        near = difflib.get_close_matches(name, [*known, *OBSOLETE], n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists them all"
        raise ConfigError(f"nobody knows the key {name} {where}: {hint}")
    kind, choices = known[name].type, known[name].metadata.get("choices", ())
    wanted = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
    if kind == (bool | None) and value in (None, "auto"):
        return None
    if kind in (bool, bool | None):
        lowered = {"true": True, "false": False}.get(str(value).lower(), value)
        if lowered in (True, False):
            return bool(lowered)
        raise ConfigError(f"{name} {where} is {value!r}, but it must be True or False")
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e6 is a fine way to write a million steps
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and not isinstance(value, str):
        value = str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{name} {where} is {value!r}, but it must be {wanted[kind]}")
    if choices and value not in choices:
        raise ConfigError(f"{name} {where} is {value!r}, but it must be one of {', '.join(choices)}")
    return value


def help_text(prog: str, known: dict) -> str:
    lines = [f"usage: python {prog} [CONFIG_FILE ...] [--key=value ...]", "", "keys, with type and default:"]
    for f in known.values():
        kind = "bool" if f.type == (bool | None) else f.type.__name__
        default = "auto" if f.default is None else repr(f.default)
        lines.append(f"  --{f.name:<28} {kind:<6}{default:<20} {f.metadata['meaning']}")
        if f.metadata.get("choices"):
            lines[-1] += f" ({' | '.join(f.metadata['choices'])})"
    return "\n".join(lines)
