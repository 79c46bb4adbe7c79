"""Time and memory of the Kronecker embedding beside the PyPI reference and nn.Embedding, in one run.

    python scripts/bench/embedding.py --text corpus.jsonl.xz --hf-tokenizer path/to/gpt2 --out results/embedding
    python scripts/bench/embedding.py --quick

Every round runs each side once, in turn, and the table gives medians, so that what else the machine does falls
on all sides alike. A second table says how the ratios depend on what is timed (`CONDITIONS`). Peak memory is measured with each side alone in a process of its own. Without --text the ids
follow a Zipf law (exponent 1) and the token bytes are drawn at random with GPT-2-like lengths; the output says
which of the two it was. Writes embedding_<device>.json and .md.
"""

import gc
import importlib.util
import json
import lzma
import os
import resource
import statistics
import subprocess
import sys
import time
from argparse import SUPPRESS
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
import torch.nn as nn

from data.files import write_json, write_text
from engine.errors import RunError, sentences
from engine.ranks import keep_heap
from kronecker import KroneckerEmbedding, build_byte_buffer
from scripts import provenance
from scripts.analysis.report import Table
from scripts.arguments import Parser, device, number, whole

SIDES = ("kronecker", "embedding", "reference")
#            V        d     pos_dim  token counts
SETTINGS = [
    (4_096, 128, 16, (1_024,)),
    (50_304, 768, 16, (1_024, 8_192, 65_536)),
    (131_072, 1_024, 32, (1_024, 8_192)),
    (131_072, 4_096, 32, (1_024, 8_192)),
]
SETTINGS_CUDA = [(50_304, 768, 16, (8_192, 65_536)), (131_072, 4_096, 32, (8_192, 65_536))]
QUICK = [(4_096, 128, 16, (1_024,)), (50_304, 768, 16, (8_192,))]


def read_tokens(path: str | None, limit: int) -> tuple[np.ndarray | None, list[bytes] | None]:
    """GPT-2 tokens of a text (.txt, .jsonl or .jsonl.xz) and the bytes of its ids; (None, None) without a text."""
    if path is None:
        return None, None
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    open_text = lzma.open if path.endswith(".xz") else open
    tokens: list[int] = []
    with open_text(path, "rt", encoding="utf8") as lines:
        for line in lines:
            if ".jsonl" in path:
                tokens.append(encoding.eot_token)
                line = json.loads(line)["text"]
            tokens += encoding.encode_ordinary(line)
            if len(tokens) >= limit:
                break
    return np.array(tokens, dtype=np.int64), [encoding.decode_single_token_bytes(i) for i in range(50_257)]


def byte_buffers(V: int, pos_dim: int, pieces: list[bytes] | None):
    """Real token bytes, repeated from the start where V is larger than the tokenizer; else random ones."""
    if pieces is None:
        rng = np.random.default_rng(0)
        lengths = np.minimum(rng.geometric(0.16, V), 40)  # mean about 6, as GPT-2's
        pieces = [rng.bytes(n) for n in lengths]
    return build_byte_buffer([pieces[i % len(pieces)] for i in range(V)], pos_dim)


def draw_ids(kind: str, n: int, V: int, tokens: np.ndarray | None) -> torch.Tensor:
    """n ids below V, int64: of the text's tokens, by a Zipf law where there is none, or uniformly drawn."""
    rng = np.random.default_rng(1)
    if kind == "uniform":
        return torch.from_numpy(rng.integers(0, V, n))
    if tokens is None:
        p = 1 / np.arange(1, V + 1)
        return torch.from_numpy(rng.choice(V, n, p=p / p.sum()))
    # a smaller vocabulary keeps the ids that it has: GPT-2's first ids are its most frequent pieces
    return torch.from_numpy(tokens[tokens < V][:n].copy())


def build(side: str, V: int, d: int, pos_dim: int, buffers, device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    if side == "embedding":
        return nn.Embedding(V, d, device=device, dtype=dtype)
    if side == "reference":
        from kronecker_embeddings import KroneckerEmbedding as Reference

        make = Reference
    else:
        make = KroneckerEmbedding
    module = make(V, d, pos_dim=pos_dim, byte_buffer=buffers[0], length_buffer=buffers[1])
    return module.to(device=device, dtype=dtype)


def step(module: nn.Module, ids: torch.Tensor, g: torch.Tensor | None) -> None:
    if g is None:
        with torch.no_grad():
            module(ids)
        return
    module.zero_grad(set_to_none=True)
    module(ids).backward(g)


def step_with_loss(module: nn.Module, ids: torch.Tensor) -> None:
    """What a bench without a gradient at hand does: all sides pay for the loss and its own backward pass."""
    module.zero_grad(set_to_none=True)
    module(ids).square().mean().backward()


def timed(run, device: str) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def rounds_of(runs: dict, rounds: int, device: str, budget_s: float = 5.0) -> dict[str, list[float]]:
    """Milliseconds of each round a side. A side that has used up its budget leaves after three rounds or more."""
    times = {side: [] for side in runs}
    for run in runs.values():
        run()
    for i in range(rounds):
        for side, run in runs.items():
            if i < 3 or sum(times[side]) < budget_s * 1e3:
                times[side].append(timed(run, device))
    return times


def interleave(runs: dict, rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds a side."""
    return {side: statistics.median(times) for side, times in rounds_of(runs, rounds, device).items()}


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and quartiles of one side's times over the other's, round by round."""
    low, middle, high = np.quantile([a / b for a, b in zip(over, under, strict=False)], (0.25, 0.5, 0.75))
    return {"median": float(middle), "low": float(low), "high": float(high)}


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a large copy: the bound that shares are counted against."""
    source = torch.empty(1 << (28 if device == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    run = interleave({"copy": lambda: target.copy_(source)}, 10, device)
    return 2 * source.numel() * 4 / (run["copy"] / 1e3)


def least_bytes(side: str, module: nn.Module, n: int, d: int, size: int, backward: bool) -> int:
    """What must cross memory at least: the output (and its gradient), the weight (and its gradient) once."""
    rows = module.D if side != "embedding" else module.num_embeddings
    read = (rows * d if side != "embedding" else n * d) * size
    forward = read + n * d * size
    return forward + (n * d + rows * d) * size if backward else forward


# ---- peak memory: one side alone ----


def memory_of_side(args) -> None:
    """In a subprocess: the peak of one step above what stood before it, less the output and the gradient."""
    V, d, pos_dim, n = args.memory
    tokens, pieces = read_tokens(args.text, n + 100_000)
    buffers = byte_buffers(V, pos_dim, pieces)
    del pieces
    dtype = getattr(torch, args.dtype)
    module = build(args.side, V, d, pos_dim, buffers, args.device, dtype)
    ids = draw_ids("text", n, V, tokens).to(args.device)
    g = torch.ones(n, d, device=args.device, dtype=dtype)
    step(module, ids[:8], g[:8])  # libraries and thread pools come up here
    module.zero_grad(set_to_none=True)
    gc.collect()
    unavoidable = g.numel() * g.element_size() + sum(
        p.numel() * p.element_size() for p in module.parameters()
    )
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(module, ids, g)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = resident_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        step(module, ids, g)
        peak = peak_resident_bytes() - before
    print(json.dumps({"step": peak, "extra": max(peak - unavoidable, 0)}))


def status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    return status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    return status_bytes("VmHWM")


def peak_memory(side: str, V: int, d: int, pos_dim: int, n: int, args) -> dict | None:
    command = [sys.executable, str(Path(__file__).resolve()), "--side", side, "--device", args.device]
    command += ["--memory", *map(str, (V, d, pos_dim, n)), "--dtype", args.dtype]
    if args.text:
        command += ["--text", args.text]
    # a fixed threshold makes malloc give every large block back at once, so that RSS counts what is alive
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="131072")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(
            f"  peak memory of {side} not measured: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr
        )
        return None
    return json.loads(done.stdout)


# ---- the parts of the table ----


def bench_setting(V, d, pos_dim, n, kind, tokens, pieces, bandwidth, args) -> dict:
    buffers = byte_buffers(V, pos_dim, pieces)
    dtype = getattr(torch, args.dtype)
    ids = draw_ids(kind, n, V, tokens).to(args.device)
    g = torch.randn(n, d, device=args.device, dtype=dtype)
    sides, skipped = list(SIDES), {}
    # the reference keeps about six (tokens, D) float32 tensors alive, and multiplies 6 tokens D d numbers a step
    D = 256 * pos_dim
    if 6 * 4 * n * D > args.reference_gb * 1e9 or (args.device == "cpu" and 6 * n * D * d > 2.1e11):
        sides.remove("reference")
        skipped["reference"] = (
            f"not run: needs about {6 * 4 * n * D / 1e9:.0f} GB and {6 * n * D * d / 1e12:.1f} TFLOP a step"
        )
    elif importlib.util.find_spec("kronecker_embeddings") is None:
        sides.remove("reference")
        skipped["reference"] = "not run: kronecker-embeddings is not installed"
    modules = {side: build(side, V, d, pos_dim, buffers, args.device, dtype) for side in sides}
    rounds = args.rounds * (10 if n * d < 1e6 else 1)
    row = {
        "V": V,
        "d": d,
        "pos_dim": pos_dim,
        "tokens": n,
        "ids": kind,
        "distinct": int(ids.unique().numel()),
    }
    row["fwd_bwd_ms"] = interleave(
        {s: lambda m=m: step(m, ids, g) for s, m in modules.items()}, rounds, args.device
    )
    for module in modules.values():
        module.zero_grad(set_to_none=True)
    row["fwd_ms"] = interleave(
        {s: lambda m=m: step(m, ids, None) for s, m in modules.items()}, rounds, args.device
    )
    row["share_of_bandwidth_bound"] = {
        s: least_bytes(s, m, n, d, dtype.itemsize, True) / bandwidth / (row["fwd_bwd_ms"][s] / 1e3)
        for s, m in modules.items()
    }
    del modules
    if kind == "text" and not args.no_memory:
        row["peak_bytes"] = {s: peak_memory(s, V, d, pos_dim, n, args) for s in sides}
    return row | skipped


def bench_table(tokens, pieces, args, V=50_304, d=768, pos_dim=16, n=8_192) -> dict:
    """Materialise once, look up ever after."""
    dtype = getattr(torch, args.dtype)
    ours = build("kronecker", V, d, pos_dim, byte_buffers(V, pos_dim, pieces), args.device, dtype)
    plain = build("embedding", V, d, pos_dim, None, args.device, dtype)
    frozen = ours.to_embedding()
    ids = draw_ids("text", n, V, tokens).to(args.device)
    with torch.no_grad():
        lookup = interleave(
            {"kronecker": lambda: frozen(ids), "embedding": lambda: plain(ids)}, args.rounds * 5, args.device
        )
        table = interleave({"table": ours.table}, 5, args.device)
        error = float((frozen(ids).double() - ours(ids).double()).abs().max())
    return {
        "V": V,
        "d": d,
        "tokens": n,
        "lookup_ms": lookup,
        "build_ms": table["table"],
        "max_difference": error,
    }


# What a bench of an embedding may time, at GPT-2's size: (bytes of the tokens, the step, does the process keep
# freed memory). A loss in the step adds the same milliseconds to every side and so brings the ratios closer to 1;
# memory that is kept, as train.py does, spares nn.Embedding most of its time, which goes into clearing the pages of
# a gradient of the table's size. The bytes themselves hardly matter.
CONDITIONS = [
    ("real", "gradient given", False),
    ("real", "with a loss", False),
    ("1 to 12 random", "gradient given", False),
    ("1 to 12 random", "with a loss", False),
    ("real", "gradient given", True),
    ("real", "with a loss", True),
]


def bench_conditions(tokens, pieces, args, V=50_304, d=768, pos_dim=16, n=8_192) -> list[dict]:
    """One row a condition. Comes last: a process that has once kept its memory keeps it."""
    rng = np.random.default_rng(0)
    random_pieces = [rng.bytes(rng.integers(1, 13)) for _ in range(V)]
    ids = draw_ids("text", n, V, tokens)
    g, rows = torch.randn(n, d), []
    sides = [s for s in SIDES if s != "reference" or importlib.util.find_spec("kronecker_embeddings")]
    for name, what, kept in CONDITIONS:
        if kept:
            keep_heap()
        buffers = byte_buffers(V, pos_dim, pieces if name == "real" else random_pieces)
        modules = {side: build(side, V, d, pos_dim, buffers, "cpu", torch.float32) for side in sides}
        runs = {
            side: (lambda m=m: step(m, ids, g))
            if what == "gradient given"
            else (lambda m=m: step_with_loss(m, ids))
            for side, m in modules.items()
        }
        times = rounds_of(runs, args.rounds, "cpu")
        row = {"bytes": name, "step": what, "memory_kept": kept}
        row["ms"] = {side: statistics.median(values) for side, values in times.items()}
        row["over_embedding"] = ratio(times["kronecker"], times["embedding"])
        if "reference" in times:
            row["reference_over"] = ratio(times["reference"], times["kronecker"])
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def bench_buffers(folder: str, pos_dim: int = 16) -> dict:
    """Building GPT-2's byte buffer; the reference reads a transformers tokenizer only."""
    import tiktoken
    from kronecker_embeddings import build_byte_buffer as reference
    from transformers import AutoTokenizer

    fast, encoding = (
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        tiktoken.get_encoding("gpt2"),
    )
    runs = {
        "reference": lambda: reference(fast, pos_dim),
        "kronecker, transformers": lambda: build_byte_buffer(fast, pos_dim),
        "kronecker, tiktoken": lambda: build_byte_buffer(encoding, pos_dim),
    }
    return interleave(runs, 7, "cpu")


def time_table(rows: list[dict]) -> Table:
    """Milliseconds of every side, forward and backward, and what kronecker's are beside the others'."""

    def ms(value):
        return "-" if value is None else f"{value:,.2f}"

    cells = []
    for row in rows:
        for key, name in (("fwd_bwd_ms", "fwd+bwd"), ("fwd_ms", "fwd")):
            ours, plain, ref = (row[key].get(side) for side in SIDES)
            ratio = "-" if ref is None else f"{ref / ours:.0f}x"
            head = [
                f"{row['V']:,}",
                f"{row['d']:,}",
                row["pos_dim"],
                f"{row['tokens']:,} ({row['distinct']:,})",
            ]
            cells.append(
                [*head, row["ids"], name, ms(ours), ms(plain), ms(ref), f"{ours / plain:.2f}x", ratio]
            )
    header = ["V", "d", "pos_dim", "tokens (distinct)", "ids", "", "kronecker", "nn.Embedding", "reference"]
    note = "Medians in ms of interleaved runs; ratios are kronecker's time over the other side's."
    return Table("Time", [*header, "/ nn.Embedding", "reference /"], cells, left=6, note=note)


def memory_table(rows: list[dict], shares: bool) -> Table:
    """Extra memory of a step in MB, and with `shares` the part of the bandwidth bound that a step reaches."""
    cells = []
    for row in rows:
        peaks = {s: (row.get("peak_bytes") or {}).get(s) for s in SIDES}
        if not peaks["kronecker"]:
            continue
        mb = {s: p and p["extra"] / 1e6 for s, p in peaks.items()}
        ratio = f"{mb['reference'] / max(mb['kronecker'], 0.1):.0f}x" if mb["reference"] else "-"
        line = [f"{row['V']:,}", f"{row['d']:,}", row["pos_dim"], f"{row['tokens']:,}"]
        line += ["-" if mb[s] is None else f"{mb[s]:,.1f}" for s in SIDES] + [ratio]
        share = row["share_of_bandwidth_bound"]
        cells.append(line + ([f"{share[s]:.0%}" for s in SIDES[:2]] if shares else []))
    header = ["V", "d", "pos_dim", "tokens", "kronecker", "nn.Embedding", "reference", "reference /"]
    header += ["share, kronecker", "share, nn.Embedding"] if shares else []
    note = "The peak of a step above what stood before it, less its output and the weight's gradient."
    note += " share: of the bandwidth bound that the step reaches." if shares else ""
    return Table("Extra peak memory of a training step (MB)", header, cells, left=0, note=note)


def conditions_table(rows: list[dict]) -> Table:
    """A training step and its ratios under each of CONDITIONS."""

    def spread(found: dict | None, digits: int) -> str:
        if found is None:
            return "-"
        return f"{found['median']:.{digits}f}x ({found['low']:.{digits}f} to {found['high']:.{digits}f})"

    cells = []
    for row in rows:
        times = [f"{row['ms'][s]:,.2f}" if s in row["ms"] else "-" for s in SIDES]
        line = [row["bytes"], row["step"], "kept" if row["memory_kept"] else "given back", *times]
        cells.append([*line, spread(row["over_embedding"], 2), spread(row.get("reference_over"), 0)])
    header = ["bytes of a token", "step", "freed memory", "kronecker", "nn.Embedding", "reference"]
    note = "Medians in ms; ratios are taken round by round: median (quartiles)."
    title = "A training step of 8,192 tokens of text at GPT-2's size, by what is timed"
    return Table(title, [*header, "/ nn.Embedding", "reference /"], cells, left=3, note=note)


def markdown(result: dict) -> str:
    """The page of a result."""
    # on a CPU the caches hold what a step touches, so a share of the memory's bandwidth would say nothing
    tables = [time_table(result["rows"]), memory_table(result["rows"], result["device"] != "cpu")]
    parts = [
        f"# The embedding on {result['device']}: time and memory",
        f"`{result['command']}` at commit {result['commit']}, {result['date']}, {result['machine']}, "
        f"torch {result['torch']}, {result['threads']} threads, {result['dtype']}. Ids: {result['tokens_from']}.",
        *(t.markdown() for t in tables if t.rows),
    ]
    table = result["table"]
    lookup = table["lookup_ms"]
    parts.append(
        f"Materialised table (V={table['V']:,}, d={table['d']}): built in {table['build_ms']:.1f} ms; a lookup of "
        f"{table['tokens']:,} tokens takes {lookup['kronecker']:.2f} ms, nn.Embedding {lookup['embedding']:.2f} ms "
        f"({lookup['kronecker'] / lookup['embedding']:.2f}x); largest difference from the direct path "
        f"{table['max_difference']:.1e}."
    )
    if result.get("conditions"):
        parts.append(conditions_table(result["conditions"]).markdown())
    if times := result.get("buffers_ms"):
        parts.append(
            "Building GPT-2's byte buffer: " + ", ".join(f"{k} {v:.0f} ms" for k, v in times.items())
        )
    for r in result["rows"]:
        if "reference" in r:
            parts.append(
                f"The reference at V={r['V']:,}, d={r['d']:,}, {r['tokens']:,} tokens: {r['reference']}."
            )
    return "\n\n".join(dict.fromkeys(parts)) + "\n"


def main(argv=None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--text", help=".txt, .jsonl or .jsonl.xz to take real tokens from (GPT-2's, by tiktoken)")
    add("--hf-tokenizer", help="folder of GPT-2's transformers tokenizer: times the buffers, too")
    add("--out", type=Path, default=Path("results/embedding"), help="folder of the results (%(default)s)")
    add("--device", type=device, default="auto", help="cpu, cuda, auto (%(default)s)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--rounds", type=whole(1), default=15, help="times that every side runs (%(default)s)")
    add("--threads", type=whole(0), default=0, help="CPU threads (0: as many as torch takes)")
    add("--reference-gb", type=number(0), default=8.0, help="leave the reference out above this")
    add("--no-memory", action="store_true", help="leave the peak memory out (a process a side)")
    add("--quick", action="store_true", help="two settings, five rounds")
    add("--side", help=SUPPRESS)
    add("--memory", type=whole(1), nargs=4, help=SUPPRESS)
    args = parser.parse_args(argv)
    with sentences():
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.side:
            return memory_of_side(args)
        measure(args, argv)


def measure(args, argv) -> None:
    """All settings; writes embedding_DEVICE.json and .md."""
    args.rounds = 5 if args.quick else args.rounds
    try:
        tokens, pieces = read_tokens(args.text, 400_000)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"cannot read the tokens of {args.text}: {error}") from None
    kind = args.device.partition(":")[0]
    settings = QUICK if args.quick else SETTINGS_CUDA if kind == "cuda" else SETTINGS
    bandwidth = copy_bandwidth(args.device)
    rows = []
    for V, d, pos_dim, counts in settings:
        for n in counts:
            for ids in ("text", "uniform"):
                rows.append(bench_setting(V, d, pos_dim, n, ids, tokens, pieces, bandwidth, args))
                print(json.dumps(rows[-1]), flush=True)
    result = provenance.provenance(__file__, argv) | {
        "device": args.device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "tokens_from": f"GPT-2 tokens of {Path(args.text).name}"
        if args.text
        else "a Zipf law, random token bytes",
        "copy_bytes_per_second": bandwidth,
        "rows": rows,
        "table": bench_table(tokens, pieces, args),
    }
    if kind == "cuda":
        result["machine"] = torch.cuda.get_device_name()
    if args.hf_tokenizer:
        result["buffers_ms"] = bench_buffers(args.hf_tokenizer)
    if kind == "cpu" and args.dtype == "float32":
        result["conditions"] = bench_conditions(tokens, pieces, args)
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / f"embedding_{kind}{'' if args.dtype == 'float32' else f'_{args.dtype}'}"
    write_json(base.with_suffix(".json"), result)
    write_text(base.with_suffix(".md"), markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
