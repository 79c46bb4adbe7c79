"""What a GPU is wanted for, in pieces that each end within nine minutes, on one machine or on several days' machines.

    python scripts/gpu/suite.py prepare correctness embedding --text PACK.jsonl.xz --val HELD_OUT.jsonl.xz
    python scripts/gpu/suite.py tune speed --nanogpt-dir ../nanoGPT
    python scripts/gpu/suite.py train probes --arm bpe_untied,kronecker --seed 1337
    python scripts/gpu/suite.py sweep
    python scripts/gpu/suite.py gather                             (needs no GPU)

prepare      text (JSONL, one {"text"} a line, may be packed) into shards; packs can come one call at a time
correctness  the sparse path against the definition, determinism, resume, compile, hidden waits, tests
embedding    time and memory of the embedding against nn.Embedding and the PyPI reference
tune         which micro-batch, attention kernel and loss are fastest
speed        a training step of every arm and of nanoGPT's train.py, in one run
train        runs of the matched comparison (config/gpt2_124m_short.py), one for each --arm and --seed
probes       all probes on the runs that this machine has
sweep        short runs of the arms with more than the paper's embedding
gather       everything in --out as one table, curves and a report; refuses what does not match

Each piece leaves one small JSON in --out, named by piece, arm, seed and machine, with its figures, command,
commit, device and date: gathering needs no checkpoint. Nothing is fetched from a network. --toy runs the same
code at a size for a CPU, into a folder of its own. Further --key=value go to train.py. In a copy without
.git, the variable KNG_COMMIT says which commit it is.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import lzma
import os
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(ROOT)

import torch

import configurator
from data import DataError
from data.loader import ValWindows, fingerprint
from data.meta import read_meta, write_meta
from data.pipeline import prepare_shards
from data.shards import is_prepared
from data.sources import check_files, local_blocks
from data.tokenizers import load_tokenizer
from engine import contract, runs
from engine import plan as engine_plan
from engine.flops import CONVENTION, flops_per_token, peak_flops
from engine.metrics import is_finished, read_metrics
from model import GPTConfig
from scripts.bench import train as bench_train
from scripts.gpu import candidates as embedding_candidates
from scripts.gpu import checks as gpu_checks
from scripts.gpu import gather as gpu_gather

RECIPE = "config/gpt2_124m_short.py"
PIECES = "prepare correctness embedding tune speed train probes sweep gather".split()
# The pinned facts of the comparison: runs that differ in one of these belong to another table.
PINNED = ["tokens", *(fact for fact, (scope, _) in contract.IDENTITY.items() if scope == "all")]
TOY = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 8, "global_batch_size": 8,
    "vocab_size": 0, "max_iters": 40, "warmup_iters": 4, "learning_rate": 3e-3, "min_lr": 3e-4,
    "eval_interval": 10, "eval_tokens": 2048, "log_interval": 5, "ckpt_interval": 40, "dtype": "float32",
    "compile": False, "pos_dim": 8,
}  # fmt: skip
SWEEP_ARMS = (
    "bpe_untied,kronecker,kronecker_s01,kronecker_s01_lr3,kronecker_ngrams3k,kronecker_rank16,"
    "kronecker_rank16_ngrams2k,kronecker_ngrams"
)
SWEEP_STEPS = 400  # of 65,536 tokens: a quarter of a run of the comparison, with a schedule of its own


class SuiteError(ValueError):
    """What stops a piece, in one sentence."""


# Errors whose sentence says it all; any other comes with its traceback.
TOLD = (
    SuiteError, DataError, runs.RunError, bench_train.BenchError,
)  # fmt: skip


def arguments(argv: list[str]):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("pieces", nargs="+", choices=PIECES, metavar="PIECE", help=", ".join(PIECES))
    add(
        "--work", type=Path, default=None, help="shards, runs and caches (default: out/gpu; toy: out/gpu_toy)"
    )
    add("--out", type=Path, default=None, help="the pieces' JSON (default: results/124m; toy: WORK/results)")
    add("--plan", type=Path, default=None, help="the comparison's pinned facts (default: OUT/plan.json)")
    add("--toy", action="store_true", help="the same code in seconds on a CPU")
    add("--minutes", type=float, default=8.7, help="what this call may take (%(default)s); pieces keep to it")
    add("--text", type=Path, nargs="+", default=[], help="prepare: packs of training text")
    add("--val", type=Path, help="prepare: held-out text")
    add("--workers", type=int, default=os.cpu_count() or 1, help="prepare: processes (%(default)s)")
    add("--tokenizer", default="gpt2", help="prepare: as data/fineweb_edu/prepare.py takes it (%(default)s)")
    add("--arm", default="bpe_untied,kronecker", help="train, sweep: names in config/arms/, with commas")
    add("--seed", default="1337", help="train, sweep: with commas")
    add(
        "--tokens",
        type=int,
        default=0,
        help="train: tokens of a run (default, and what is pinned: the recipe's)",
    )
    add("--nanogpt-dir", default="", help="speed: checkout of nanoGPT to measure against")
    add("--rounds", type=int, default=3, help="speed: rounds, as far as the time goes")
    add(
        "--batch_size",
        type=int,
        default=0,
        help="micro-batch (default: tune's best for speed, else the recipe's)",
    )
    add("--reference", type=Path, help="probes: folder with the paper's published probe results")
    args, args.keys = parser.parse_known_args(argv)
    wrong = [word for word in args.keys if not re.fullmatch(r"--\w+=.+", word)]
    if wrong:
        parser.error(f"unrecognized argument {wrong[0]}")
    args.named = {word.split("=")[0] for word in argv}
    args.work = args.work or ROOT / "out" / ("gpu_toy" if args.toy else "gpu")
    args.out = args.out or (args.work / "results" if args.toy else ROOT / "results" / "124m")
    if args.plan is None:
        args.plan = args.out / "plan.json"
        if not args.toy and not args.plan.is_file():  # an --out elsewhere keeps to the plan of the repository
            args.plan = ROOT / "results" / "124m" / "plan.json"
    if args.toy and args.out.resolve().is_relative_to(ROOT / "results"):
        parser.error("toy figures do not belong into results/: choose another --out")
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu" and not args.toy and set(args.pieces) - {"prepare", "gather"}:
        parser.error("there is no CUDA GPU here: --toy runs the same code on a CPU")
    args.arms = [a for a in args.arm.replace(",", " ").split() if a]
    known = sorted(p.stem for p in (ROOT / "config" / "arms").glob("*.py"))
    for arm in args.arms:
        if arm not in known:
            parser.error(f"there is no arm {arm!r}: choose from {', '.join(known)}")
    try:
        args.seeds = [int(s) for s in args.seed.replace(",", " ").split()]
    except ValueError:
        parser.error(f"--seed={args.seed} are no whole numbers")
    args.deadline = time.monotonic() + 60 * args.minutes
    return args


# Seconds that a piece leaves for those after it in the same call: one round of speed, all probes.
RESERVED = {"tune": {"speed": 330}, "train": {"probes": 80}}


def left(args, piece: str = "") -> float:
    """Seconds of this call that are left, for a piece: less what the next ones need."""
    after = 0 if args.toy else sum(s for later, s in RESERVED.get(piece, {}).items() if later in args.pieces)
    return args.deadline - time.monotonic() - after


# ---- what every piece's JSON says of its making


def machine_id() -> str:
    """Short and the same for the same machine: the GPU's name and the start of its UUID."""
    if torch.cuda.is_available():
        known = torch.cuda.get_device_properties(0)
        name = re.sub(r"[^a-z0-9]+", "-", known.name.lower().replace("nvidia", "").strip())
        serial = str(getattr(known, "uuid", "")) or platform.node()
    else:
        name, serial = "cpu", platform.node()
    return f"{name}-{hashlib.sha256(serial.encode()).hexdigest()[:6]}"


def command_told(args) -> str:
    """The arguments with files and folders by their last names: where they lay is nobody's business."""
    return " ".join(Path(w).name if "/" in w and "=" not in w else w for w in args.command)


def portable(content: dict, args) -> dict:
    """The same without paths of this machine."""
    text = json.dumps(content)
    given = [p for p in (*args.text, args.val, args.reference) if p is not None]
    named = {args.work.resolve(): "WORK", args.work: "WORK", ROOT: "."} | {p: p.name for p in given}
    for path in sorted(named, key=lambda p: -len(str(p))):
        text = text.replace(str(path), named[path])
    return json.loads(text)


def write_piece(
    args, piece: str, began: float, content: dict, arm: str = "", seed: int | None = None
) -> Path:
    words = [piece, arm, "" if seed is None else f"s{seed}", machine_id()]
    path = args.out / ("_".join(w for w in words if w) + ".json")
    cuda = torch.cuda.is_available()
    head = {
        "piece": piece,
        "arm": arm or None,
        "seed": seed,
        "toy": args.toy,
        "command": "python scripts/gpu/suite.py " + command_told(args),
        "commit": runs.commit(),
        "machine": machine_id(),
        "device": torch.cuda.get_device_name(0) if cuda else runs.machine(),
        "cpu": runs.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 1),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(head | content, indent=1) + "\n")
    os.replace(temporary, path)
    print(f"{piece}: {head['seconds']} s, written to {path}", flush=True)
    return path


def pieces_there(args, piece: str) -> list[dict]:
    """Contents of a piece's files in --out and beside the plan, oldest first."""
    folders = {args.out.resolve(), args.plan.parent.resolve()}
    found = [json.loads(p.read_text()) for f in sorted(folders) for p in sorted(f.glob(f"{piece}_*.json"))]
    return sorted(found, key=lambda c: c["date"])


# ---- prepare


def prepare(args) -> None:
    """Tokenise packs into WORK/packs/<name>/ and lay all that are there side by side in WORK/data."""
    began = time.monotonic()
    if args.toy and not args.text:
        args.text, args.val, tokenizer = toy_text(args.work / "text")
    elif not args.text or not args.val:
        raise SuiteError("prepare needs --text PACK [PACK ...] and --val HELD_OUT")
    else:
        tokenizer = load_tokenizer(args.tokenizer)
    packs = args.work / "packs"
    files = [args.val, *args.text]
    check_files(files)
    if len({stem(f) for f in files}) < len(files):
        raise SuiteError("two packs have one name: rename one of them")
    rows = {}
    for file in files:
        is_val = file is args.val
        start = time.monotonic()
        meta = prepare_shards(
            packs / ("val" if is_val else stem(file)),
            "mix",
            tokenizer,
            lambda position, file=file: local_blocks([file], "text", position),
            {"files": [{"name": file.name, "bytes": file.stat().st_size}], "text_column": "text"},
            # the set of held-out text is nothing but a validation shard; the others have next to none
            val_tokens=10**9 if is_val else 1,
            max_shards=0 if is_val else None,
            workers=0 if args.toy else args.workers,
            say=lambda line: None,
        )
        seconds = time.monotonic() - start
        n = sum(meta["tokens"].values())
        rows[file.name] = {"tokens": n, "documents": meta["documents"], "seconds": round(seconds, 2)}
        print(f"{file.name}: {n:,} tokens, {n / max(seconds, 1e-9):,.0f} a second", flush=True)
    meta = lay_together(packs, args.work / "data", tokenizer)
    content = {"packs": rows, "tokens": meta["tokens"], "workers": args.workers}
    write_piece(args, "prepare", began, content | {"data_fingerprint": fingerprint(args.work / "data")})


def stem(path: Path) -> str:
    return path.name.split(".")[0]


def lay_together(packs: Path, data: Path, tokenizer) -> dict:
    """WORK/data: the validation shard, and the training shards of all packs by name, whatever their order of coming."""
    data.mkdir(parents=True, exist_ok=True)
    for old in [*data.glob("*.bin"), *data.glob("meta.json")]:
        old.unlink()
    shards, made, names = [], {}, sorted(p.parent.name for p in packs.glob("*/meta.json"))
    for name in ["val", *(n for n in names if n != "val")]:
        meta = read_meta(packs / name)
        made[name] = meta["made"]
        for record in meta["shards"]:
            if record["split"] == ("val" if name == "val" else "train"):
                n = sum(s["split"] == "train" for s in shards)
                file = "mix_val_000000.bin" if name == "val" else f"mix_train_{n + 1:06d}.bin"
                os.link(packs / name / record["file"], data / file)
                shards.append(
                    {k: record[k] for k in ("split", "tokens", "documents", "sha256")} | {"file": file}
                )
    tokenizer.save(data)
    keep = ("format", "tokenizer", "vocab_size", "eot", "dtype", "byte_lengths")
    tokens = {s: sum(r["tokens"] for r in shards if r["split"] == s) for s in ("train", "val")}
    whole = {k: meta[k] for k in keep} | {
        "dataset": "mix", "complete": True, "documents": sum(r["documents"] for r in shards), "tokens": tokens,
        "made": made, "shards": shards,
    }  # fmt: skip
    write_meta(data, whole)
    return whole


def toy_text(folder: Path):
    """Two packs and a held-out one of this repository's own files, and a tokenizer trained on them."""
    from data.pydocs.prepare import train_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    documents = [p.read_text() for p in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])]
    parts = {"toy-val": documents[::7], "toy-a": documents[1::7] + documents[3::7], "toy-b": documents[2::7]}
    for name, texts in parts.items():
        with lzma.open(folder / f"{name}.jsonl.xz", "wt") as f:
            f.writelines(json.dumps({"text": t}) + "\n" for t in texts)
    tokenizer = train_tokenizer(documents[1::7], folder / "tokenizer.json")
    return [folder / "toy-a.jsonl.xz", folder / "toy-b.jsonl.xz"], folder / "toy-val.jsonl.xz", tokenizer


# ---- correctness, embedding


def correctness(args) -> None:
    began = time.monotonic()
    checks = gpu_checks.run_all(torch.device(args.device), args.work, args.toy)
    write_piece(args, "correctness", began, {"checks": checks, "ok": all(c["ok"] for c in checks)})
    for c in checks:
        if not c["ok"]:
            print(f"WRONG {c['name']}: {c['value']}, allowed {c['limit']}", file=sys.stderr, flush=True)
    if not all(c["ok"] for c in checks):
        raise SuiteError("correctness: " + "; ".join(c["name"] for c in checks if not c["ok"]))


def embedding(args) -> None:
    """scripts/bench/embedding.py in fp32 and bf16, and other ways to the same sums beside the package's."""
    began, results = time.monotonic(), {}
    text = next((t for t in args.text if t.is_file()), None)
    for dtype in ("float32", "bfloat16"):
        folder = args.work / "embedding"
        command = [sys.executable, "-m", "scripts.bench.embedding", "--device", args.device, "--dtype", dtype]
        command += ["--out", str(folder)] + (["--text", str(text)] if text else [])
        command += ["--quick", "--rounds", "3"] if args.toy else ["--reference-gb", "60"]
        command += ["--no-memory"] if dtype == "bfloat16" or args.toy else []
        run_tool(command, f"bench_embedding {dtype}", args, args.work / f"embedding_{dtype}.log")
        suffix = "" if dtype == "float32" else f"_{dtype}"
        results[dtype] = json.loads((folder / f"embedding_{args.device}{suffix}.json").read_text())
        if args.toy:
            break
    ways = embedding_candidates.measure(args.device, args.toy, rounds=3 if args.toy else 20)
    write_piece(args, "embedding", began, portable({"results": results, "ways": ways}, args))


def run_tool(command: list[str], what: str, args, log: Path) -> str:
    """Output of a script of ours, also kept in `log`; its last words become the error."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as out:
        try:
            status = subprocess.run(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=max(30, left(args))
            ).returncode
        except subprocess.TimeoutExpired:
            raise SuiteError(f"{what} was stopped: no time was left (output in {log})") from None
    text = log.read_text(errors="replace")
    if status:
        raise SuiteError(f"{what} failed: {last_words(text)} (all of it in {log})")
    return text


def last_words(text: str) -> str:
    lines = text.strip().splitlines() or ["it said nothing"]
    said = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])
    return said.removeprefix("error: ")


# ---- speed


def bench_settings(args, batch_size: int, keys: dict) -> argparse.Namespace:
    """bench_train's arguments for our side, half a million tokens a step as in nanoGPT's recipe."""
    if args.toy:
        flags = ["--steps=4", "--skip=2", "--setting=toy", f"--batch_size={batch_size}", "--accumulate=2"]
    else:
        flags = ["--steps=9", "--skip=3", "--setting=124m", "--device=cuda", "--dtype=bfloat16", "--compile"]
        flags += [f"--batch_size={batch_size}", f"--accumulate={512 // batch_size}"]
    if args.nanogpt_dir:
        flags += ["--nanogpt-dir", args.nanogpt_dir]
    return bench_train.arguments(flags + [f"--{k}={v}" for k, v in keys.items()])


def bench_shape(args) -> dict:
    return bench_train.SETTINGS["toy" if args.toy else "124m"]


def bench_data(args) -> Path:
    work = args.work / "bench"
    bench_train.write_data(work / "data" / "bench", bench_shape(args)["vocab_size"])
    return work


def tune(args) -> None:
    """Try micro-batches, kernels and losses on bpe_untied; each step changes one thing and keeps what is faster."""
    began, tried = time.monotonic(), []
    work, shape = bench_data(args), bench_shape(args)
    best = {"batch_size": 2 if args.toy else 64, "keys": {}}

    def attempt(batch_size: int, keys: dict) -> bool:
        """Measure; True if this is the fastest until now."""
        settings = bench_settings(args, batch_size, keys)
        settings.limit = max(10.0, left(args, "tune"))
        start = time.monotonic()
        try:
            found = bench_train.run_ours("bpe_untied", shape, settings.steps, work, len(tried), settings)
        except bench_train.BenchError as e:
            found = {"error": str(e)}
        row = {"batch_size": batch_size, "keys": keys, "seconds": round(time.monotonic() - start, 1)} | found
        tried.append(row)
        told = row.get("error") or f"{row['tokens_per_s']:,.0f} tokens/s, {row['gb']:.1f} GB"
        print(f"micro-batch {batch_size} {keys}: {told}", flush=True)
        faster = "error" not in row and row["tokens_per_s"] > best.get("tokens_per_s", 0)
        if faster:
            best.update(batch_size=batch_size, keys=keys, tokens_per_s=row["tokens_per_s"])
        return faster

    def time_for_one() -> bool:
        return left(args, "tune") > 1.2 * max(r["seconds"] for r in tried)

    attempt(best["batch_size"], {})
    # what is likeliest to gain most comes first; a call with little time gets that far
    for change in ({"attention": "cudnn"}, {"loss": "chunked"}, {"attention": "flash"}, {"loss": "liger"}):
        if time_for_one() and not (args.toy and "liger" in change.values()):
            attempt(best["batch_size"], best["keys"] | change)
    for batch_size in (1, 4) if args.toy else (128, 32, 16):
        if time_for_one() and attempt(batch_size, best["keys"]) and batch_size > best["batch_size"]:
            break
    if not args.toy and left(args, "tune") > 200:  # autotuning takes minutes the first time
        attempt(best["batch_size"], best["keys"] | {"compile_mode": "max-autotune-no-cudagraphs"})
    if "tokens_per_s" not in best:
        raise SuiteError("tune: nothing ran: " + tried[0]["error"])
    write_piece(args, "tune", began, {"shape": shape, "tried": tried, "best": best})


def speed(args) -> None:
    """ms a step, tokens/s, MFU and memory of all sides, interleaved: our arms, and nanoGPT's train.py as it is."""
    began = time.monotonic()
    known = pieces_there(args, "tune")
    best = known[-1]["best"] if known else {"batch_size": 2 if args.toy else 64, "keys": {}}
    keys = dict(best["keys"]) | {w[2:].split("=", 1)[0]: w.split("=", 1)[1] for w in args.keys}
    batch_size = args.batch_size or best["batch_size"]
    work, shape, settings = bench_data(args), bench_shape(args), bench_settings(args, batch_size, keys)
    steps = settings.steps

    def ours(arm, *script):
        def run(n):
            settings.limit = max(10.0, left(args))
            return bench_train.run_ours(arm, shape, steps, work, n, settings, script or ("train.py",))

        return run

    def theirs(batch, accumulate):
        def run(n):
            own = {"nanogpt_batch": batch, "nanogpt_accumulate": accumulate, "limit": max(10.0, left(args))}
            return bench_train.run_nanogpt(shape, steps, work, n, argparse.Namespace(**vars(settings) | own))

        return run

    sides = {arm: ours(arm) for arm in ("bpe_untied", "kronecker")}
    if args.nanogpt_dir:
        default = (1, 3) if args.toy else (12, 40)  # of nanoGPT's own recipe for this model
        sides["nanoGPT, as it comes"] = theirs(*default)
        sides["nanoGPT, our micro-batch"] = theirs(batch_size, settings.accumulate)
    sides["bpe_tied"] = ours("bpe_tied")
    # the same arm, its embedding computed without ever waiting for the GPU
    sides["kronecker, table"] = ours("kronecker", "scripts/gpu/candidates.py", "train", "table")
    rounds = bench_train.alternate(sides, args.rounds, lambda: left(args), lambda s: print(s, flush=True))
    lines = bench_train.absolute(rounds)
    print("\n".join(lines), flush=True)
    peak = peak_flops(torch.device(args.device))
    content = {
        "shape": shape, "batch_size": batch_size, "accumulate": settings.accumulate, "keys": keys, "rounds": rounds,
        "mfu": {"convention": CONVENTION, "peak_flops": peak and peak[0], "device": peak and peak[1]},
    }  # fmt: skip
    write_piece(args, "speed", began, content)


# ---- train, sweep, probes


def recipe_flags(args, arm: str, seed: int, out_dir: Path, sweep: bool) -> list[str]:
    """train.py's arguments for one run."""
    config = configurator.load([str(ROOT / RECIPE)], quiet=True)
    keys = dict(TOY) if args.toy else {}
    tokens_per_step = (keys.get("global_batch_size") or config.global_batch_size) * (
        keys.get("block_size") or config.block_size
    )
    if sweep:
        steps = 20 if args.toy else SWEEP_STEPS
        keys |= {
            "max_iters": steps,
            "eval_interval": steps // 4,
            "ckpt_interval": -1,
            "warmup_iters": steps // 10,
        }
    elif args.tokens:
        if args.tokens % tokens_per_step:
            raise SuiteError(f"--tokens {args.tokens} is no multiple of a step's {tokens_per_step}")
        keys |= {"max_iters": args.tokens // tokens_per_step, "ckpt_interval": args.tokens // tokens_per_step}
    keys |= {"batch_size": args.batch_size} if args.batch_size else {}
    keys |= {"data_dir": args.work / "data", "out_dir": out_dir, "seed": seed, "init_from": "auto"}
    files = [str(ROOT / RECIPE), str(ROOT / "config" / "arms" / f"{arm}.py")]
    # what makes a step faster and changes nothing else (attention, loss) is the same for all runs, too
    pinned = json.loads(args.plan.read_text()).get("keys", []) if args.plan.is_file() else []
    return files + pinned + [f"--{k}={v}" for k, v in keys.items()] + args.keys


def facts_of(flags: list[str]) -> dict:
    """The pinned facts of a run, from its arguments and data, before anything is trained."""
    config = configurator.load(flags, quiet=True)
    rows = engine_plan.global_batch(config)
    step = rows * config.block_size
    return {
        "tokens": step * config.max_iters,
        "tokens_per_step": step,
        "data_fingerprint": fingerprint(config.data_dir),
        "val_sha256": ValWindows(
            config.data_dir, config.block_size, config.eval_tokens, config.eval_skip_tokens
        ).sha256(),
        "schedule_sha256": contract.schedule_sha256(dataclasses.asdict(config), step),
    }


def check_plan(args, flags: list[str]) -> None:
    """Hold a run to the plan; where there is none (in a toy), the first run makes it."""
    facts = facts_of(flags)
    if not args.plan.is_file():
        if not args.toy and (args.plan.parent / "gathered.json").exists():
            raise SuiteError(
                f"{args.plan} is missing: restore it, for it says what the runs that are there share"
            )
        args.plan.parent.mkdir(parents=True, exist_ok=True)
        args.plan.write_text(json.dumps(facts, indent=1) + "\n")
        return
    pinned = json.loads(args.plan.read_text())
    for name in PINNED:
        if pinned[name] != facts[name]:
            raise SuiteError(
                f"this run does not belong to the comparison: {name} is {facts[name]}, in {args.plan} it is "
                f"{pinned[name]}; prepare the same packs and leave the recipe as it is"
            )


def train_one(args, arm: str, seed: int, sweep: bool = False) -> float:
    """One run of train.py from where it stands to its end or the call's; seconds it took. SuiteError if unfinished."""
    began = time.monotonic()
    piece = "sweep" if sweep else "train"
    out_dir = args.work / "runs" / ("sweep" if sweep else "124m") / f"{arm}_s{seed}"
    flags = recipe_flags(args, arm, seed, out_dir, sweep)
    if not is_prepared(args.work / "data"):
        raise SuiteError(f"{args.work / 'data'} has no shards: run prepare first")
    if not sweep:
        check_plan(args, flags)
    out_dir.mkdir(parents=True, exist_ok=True)
    log = out_dir / "train.log"
    with open(log, "a") as out:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *flags], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            process.wait(timeout=max(1.0, left(args, piece) - 20))  # the checkpoint takes its time
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
        except BaseException:
            process.kill()
            raise
    config, run = runs.read_run(out_dir) if (out_dir / "run.json").exists() else ({}, {})
    rows = read_metrics(out_dir)
    if not config or not is_finished(out_dir, config["max_iters"]):
        if process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM):
            at = max((r["iter"] for r in rows), default=0)
            raise SuiteError(
                f"{arm}, seed {seed} was stopped near step {at}: the same command goes on from there"
            )
        raise SuiteError(
            f"{arm}, seed {seed} failed: {last_words(log.read_text(errors='replace'))} (see {log})"
        )
    model = GPTConfig(**{f.name: config[f.name] for f in dataclasses.fields(GPTConfig)})
    write_piece(
        args, piece, began,
        {"config": portable(config, args), "run": portable(run, args), "metrics": rows,
         "flops": flops_per_token(model) * config["max_iters"] * run["tokens_per_step"]},
        arm, seed,
    )  # fmt: skip
    final = [r for r in rows if "val/loss" in r][-1]
    print(
        f"{arm}, seed {seed}: val loss {final['val/loss']:.4f} after {final['tokens']:,} tokens", flush=True
    )
    return time.monotonic() - began


def train(args, sweep: bool = False) -> None:
    """All of --arm x --seed, seed by seed, that are not in --out yet, as long as the time is enough for one more."""
    arms = args.arms
    if sweep and "--arm" not in args.named:
        arms = SWEEP_ARMS.split(",") if not args.toy else ["bpe_untied", "kronecker", "kronecker_rank16"]
    piece, longest, waiting = "sweep" if sweep else "train", 0.0, []
    done = {(c["arm"], c["seed"]) for c in pieces_there(args, piece)}
    for seed in args.seeds:
        for arm in arms:
            if (arm, seed) in done:
                print(f"{arm}, seed {seed} is there already", flush=True)
            elif longest and left(args, piece) < longest:
                waiting.append(f"{arm} seed {seed}")
            else:
                longest = max(longest, train_one(args, arm, seed, sweep))
    if waiting:
        raise SuiteError(f"{piece}: no time for {', '.join(waiting)}; the same command goes on with them")


def probes(args) -> None:
    """All probes on the runs that are here, at once: each is a process that waits for its own small matmuls."""
    began = time.monotonic()
    folder = args.work / "runs" / "124m"
    finished = [p.parent.name for p in sorted(folder.glob("*/latest"))]
    if not finished:
        raise SuiteError(f"probes: {folder} has no trained run: run train first")
    out = args.work / "probes"
    common = ["--runs", str(folder), "--out", str(out), "--device", args.device]
    jobs = {
        name: [f"scripts/probes/{name}.py"]
        for name in ("spelling", "layers", "tradeoff", "norms", "generation")
    }
    if args.val and args.val.is_file() and not args.toy:
        more = ["--generate", "1000", "--text", str(args.val)]
        jobs["spelling_generated"] = ["scripts/probes/spelling.py", *more]
    if args.reference:
        published = {
            "spelling": ("--pairs", "robustness_results.json"),
            "layers": ("--families", "layered_probe_results.json"),
            "generation": ("--prompts", "generation_probe_results.json"),
        }
        for name, (flag, file) in published.items():
            if (args.reference / file).is_file():
                jobs[f"{name}_published"] = [f"scripts/probes/{name}.py", flag, str(args.reference / file)]
    if args.toy:
        jobs["generation"] += ["--samples", "1", "--max_new_tokens", "4"]
    running, failed = {}, []
    with contextlib.ExitStack() as stack:
        for name, job in jobs.items():
            # a folder each: the report's page is rewritten by every probe
            own = [sys.executable, *job, *common]
            own[own.index("--out") + 1] = str(out / name)
            out.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(open(out / f"{name}.log", "w"))
            running[name] = subprocess.Popen(own, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        for name, process in running.items():
            try:
                status = process.wait(timeout=max(5, left(args)))
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            if status:
                failed.append(f"{name} ({last_words((out / f'{name}.log').read_text(errors='replace'))})")
    results, whole = {}, {}
    for name in jobs:
        path = out / name / "compare" / "probes" / f"{name}.json"
        if path.is_file():
            whole[name] = json.loads(path.read_text())
            results[name] = gpu_gather.figures_of_probe(name, whole[name])
    seeds = sorted({int(name.rpartition("_s")[2]) for name in finished})
    content = {"runs": finished, "probes": results, "failed": failed}
    path = write_piece(args, "probes", began, content, arm="s" + "-".join(map(str, seeds)))
    # every prompt, pair and neighbour, for whoever wants more than the figures
    path.with_suffix(".raw.json.xz").write_bytes(lzma.compress(json.dumps(portable(whole, args)).encode()))
    if failed:
        raise SuiteError("probes: " + "; ".join(failed))


def gather(args) -> None:
    gpu_gather.gather(
        args.out,
        json.loads(args.plan.read_text()) if args.plan.is_file() else None,
        PINNED,
        command_told(args),
    )


def main(argv: list[str]) -> int:
    args = arguments(argv)
    args.command = argv
    # compiled kernels are kept for the next piece, and found again by the next call on this machine
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((args.work / "inductor").resolve()))
    if args.toy:
        os.environ["OMP_NUM_THREADS"] = "1"  # for the children: two threads on so little work only wait
    failed = []
    work = {
        "prepare": prepare, "correctness": correctness, "embedding": embedding, "tune": tune, "speed": speed,
        "train": train, "probes": probes, "sweep": lambda a: train(a, sweep=True), "gather": gather,
    }  # fmt: skip
    for piece in [p for p in PIECES if p in args.pieces]:
        print(f"---- {piece}, {max(0, left(args)):.0f} s left", flush=True)
        try:
            work[piece](args)
        except Exception as e:  # the other pieces may still be worth their time
            if not isinstance(e, TOLD):
                traceback.print_exc()
            failed.append(str(e) or type(e).__name__)
            print(f"error: {e}", file=sys.stderr, flush=True)
    if failed:
        print("not done: " + " | ".join(failed), file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
