"""Time, memory and growth of the Kronecker embedding beside the PyPI reference and nn.Embedding, in one run.

    python scripts/bench/embedding.py --text corpus.jsonl.xz --hf-tokenizer path/to/gpt2 --out results/embedding
    python scripts/bench/embedding.py --quick

Every round runs each side once, in turn, and the tables give medians, so that what else the machine does falls on
all sides alike. "prepared" is kronecker as train.py and evaluation use it: a step's plan made before it (by the
loader's thread), and a forward pass without gradients that looks up in a kept table (mode="cached"). The table of
conditions says how the ratios depend on what is timed. Peak memory is measured with each side alone in a process of
its own. Without --text the ids follow a Zipf law (exponent 1) and the token bytes are drawn at random with GPT-2-like
lengths; the output says which of the two it was. Writes embedding_<device>.json and .md, and the figures of growth.
"""

import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import numpy as np
import torch

from data.files import write_json, write_text
from engine.errors import RunError, sentences
from engine.ranks import keep_heap
from kronecker import build_byte_buffer
from scripts import provenance
from scripts.arguments import Parser, device, number, whole
from scripts.bench import embedding_page
from scripts.bench.embedding_sides import Corpus, build, forward, loss_alone, peak_memory, sides_for, step

#            V        d     pos_dim  token counts
SETTINGS = [
    (4_096, 128, 16, (1_024,)),
    (50_304, 768, 16, (1_024, 8_192, 65_536)),
    (131_072, 1_024, 32, (1_024, 8_192)),
    (131_072, 4_096, 32, (8_192,)),
]
SETTINGS_CUDA = [(50_304, 768, 16, (8_192, 65_536)), (131_072, 4_096, 32, (8_192, 65_536))]
QUICK = [(4_096, 128, 16, (1_024,)), (50_304, 768, 16, (8_192,))]
# What grows, and from where: the other two stay as in BASE.
BASE = {"tokens": 4_096, "vocabulary": 32_768, "width": 512}
GROWTH = {
    "tokens": [1_024, 4_096, 16_384, 65_536],
    "vocabulary": [4_096, 16_384, 65_536, 262_144],
    "width": [128, 256, 512, 1_024, 2_048],
}
# What a bench of an embedding may time, at GPT-2's size: (bytes of the tokens, a loss in the step or a gradient given,
# does the process keep freed memory). A loss adds the same milliseconds to every side, and more to all than the
# embedding takes, so that it bounds the ratios; memory that is kept, as train.py does, spares nn.Embedding most of
# its time, which goes into clearing the pages of a gradient of the table's size. The bytes hardly matter.
CONDITIONS = [
    ("real", "gradient given", False),
    ("real", "with a loss", False),
    ("1 to 12 random", "gradient given", False),
    ("1 to 12 random", "with a loss", False),
    ("real", "gradient given", True),
    ("real", "with a loss", True),
]


def timed(run, device: str) -> float:
    """Milliseconds of one call."""
    if device.startswith("cuda"):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def rounds_of(runs: dict, rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each round a side. A side that has used up its three seconds leaves after three rounds or more.

    A turn of short calls goes on for 20 ms and its last call counts: else the side that ran before decides what is in
    the caches, and at the demo's size more than half of the time.
    """
    times = {side: [] for side in runs}
    for run in runs.values():
        run()
    for i in range(rounds):
        for side, run in runs.items():
            if i < 3 or sum(times[side]) < 3_000:
                ms = spent = timed(run, device)
                while spent < 20:
                    ms = timed(run, device)
                    spent += ms
                times[side].append(ms)
    return times


def interleave(runs: dict, rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds a side."""
    return {side: statistics.median(times) for side, times in rounds_of(runs, rounds, device).items()}


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and quartiles of one side's times over the other's, round by round."""
    low, middle, high = np.quantile([a / b for a, b in zip(over, under, strict=False)], (0.25, 0.5, 0.75))
    return {"median": float(middle), "low": float(low), "high": float(high)}


def bench_setting(V: int, d: int, pos_dim: int, counts: tuple, corpus: Corpus, args) -> list[dict]:
    """Rows of one vocabulary and width: each number of tokens, of text and drawn uniformly."""
    dtype, buffers, rows = getattr(torch, args.dtype), corpus.buffers(V, pos_dim), []
    every, _ = sides_for(min(counts), d, 256 * pos_dim, args)
    modules = {side: build(side, V, d, pos_dim, buffers, args.device, dtype) for side in every}
    kept = modules["prepared"].eval()
    with torch.no_grad():
        table_ms = timed(kept.table, args.device)
    for n, kind in ((n, kind) for n in counts for kind in ("text", "uniform")):
        sides, why = sides_for(n, d, 256 * pos_dim, args)
        ids = corpus.ids(kind, n, V).to(args.device)
        g, planned = torch.randn(n, d, device=args.device, dtype=dtype), ids.clone()
        row = {"V": V, "d": d, "pos_dim": pos_dim, "tokens": n, "ids": kind, "distinct": len(ids.unique())}
        row["prepared_ms"] = {
            "step": interleave({"plan": partial(kept.plan_ahead, planned)}, 5, args.device)["plan"],
            "forward": table_ms,
        }
        using = {s: planned if s == "prepared" else ids for s in sides}
        rounds = args.rounds * (10 if n * d < 1e6 else 1)
        row["step_ms"] = interleave(
            {s: partial(step, modules[s], using[s], g) for s in sides}, rounds, args.device
        )
        for module in modules.values():
            module.zero_grad(set_to_none=True)
        row["forward_ms"] = interleave(
            {s: partial(forward, modules[s], ids) for s in sides}, rounds, args.device
        )
        row["reference_left_out"] = why
        if kind == "text" and not args.no_memory:
            alone = [s for s in sides if s != "prepared"]
            row["peak_bytes"] = {s: peak_memory(s, V, d, pos_dim, n, corpus, args) for s in alone}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def bench_conditions(corpus: Corpus, args, V=50_304, d=768, pos_dim=16, n=8_192) -> list[dict]:
    """One row a condition. Comes last: a process that has once kept its memory keeps it."""
    rng = np.random.default_rng(0)
    made_up = Corpus(None)
    made_up.pieces = [rng.bytes(rng.integers(1, 13)) for _ in range(V)]
    ids, given, rows = corpus.ids("text", n, V), torch.randn(n, d), []
    for name, what, keeps in CONDITIONS:
        if keeps:
            keep_heap()
        buffers = (corpus if name == "real" else made_up).buffers(V, pos_dim)
        sides, _ = sides_for(n, d, 256 * pos_dim, args)
        sides.remove("prepared")
        modules = {s: build(s, V, d, pos_dim, buffers, "cpu", torch.float32) for s in sides}
        g = given if what == "gradient given" else None
        runs = {s: partial(step, m, ids, g) for s, m in modules.items()}
        if g is None:
            runs["loss alone"] = partial(loss_alone, given.clone().requires_grad_())
        times = rounds_of(runs, args.rounds, "cpu")
        row = {"bytes": name, "step": what, "memory_kept": keeps}
        row["ms"] = {side: statistics.median(values) for side, values in times.items()}
        row["over_embedding"] = ratio(times["kronecker"], times["embedding"])
        if "reference" in times:
            row["reference_over"] = ratio(times["reference"], times["kronecker"])
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def bench_growth(corpus: Corpus, args) -> list[dict]:
    """One row a point of GROWTH: time of a step, and all that a side holds at its peak."""
    rows = []
    for axis, numbers in GROWTH.items():
        for x in numbers:
            n, V, d = (BASE | {axis: x}).values()
            sides, _ = sides_for(n, d, 4_096, args, most_flop=6e10)
            sides.remove("prepared")
            ids, buffers = corpus.ids("text", n, V), corpus.buffers(V, 16)
            modules = {s: build(s, V, d, 16, buffers, "cpu", torch.float32) for s in sides}
            g = torch.randn(n, d)
            ms = interleave({s: partial(step, m, ids, g) for s, m in modules.items()}, args.rounds, "cpu")
            del modules
            peaks = {} if args.no_memory else {s: peak_memory(s, V, d, 16, n, corpus, args) for s in sides}
            mb = {s: peak["all"] / 1e6 for s, peak in peaks.items() if peak}
            rows.append({"base": BASE, "axis": axis, "x": x, "ms": ms, "mb": mb})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def bench_buffers(folder: str) -> dict:
    """Building GPT-2's byte buffer; the reference reads a transformers tokenizer only."""
    import tiktoken
    from kronecker_embeddings import build_byte_buffer as reference
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    encoding = tiktoken.get_encoding("gpt2")
    runs = {
        "reference": lambda: reference(fast, 16),
        "kronecker, transformers": lambda: build_byte_buffer(fast, 16),
        "of which transformers lists its vocabulary": lambda: fast.backend_tokenizer.get_vocab(True),
        "kronecker, tiktoken": lambda: build_byte_buffer(encoding, 16),
    }
    return interleave(runs, 9, "cpu")


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
    add("--quick", action="store_true", help="two settings, five rounds, no growth")
    args = parser.parse_args(argv)
    with sentences():
        if args.threads:
            torch.set_num_threads(args.threads)
        measure(args, argv)


def measure(args, argv) -> None:
    """All settings; writes embedding_DEVICE.json and .md."""
    args.rounds = 5 if args.quick else args.rounds
    try:
        corpus = Corpus(args.text)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"cannot read the tokens of {args.text}: {error}") from None
    kind, plain = args.device.partition(":")[0], args.dtype == "float32"
    settings = QUICK if args.quick else SETTINGS_CUDA if kind == "cuda" else SETTINGS
    result = provenance.provenance(__file__, argv) | {
        "device": args.device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "tokens_from": f"GPT-2 tokens of {Path(args.text).name}"
        if args.text
        else "a Zipf law, random token bytes",
        "rows": [row for setting in settings for row in bench_setting(*setting, corpus, args)],
    }
    if kind == "cuda":
        result["machine"] = torch.cuda.get_device_name()
    if args.hf_tokenizer:
        result["buffers_ms"] = bench_buffers(args.hf_tokenizer)
    if kind == "cpu" and plain:
        result["growth"] = [] if args.quick else bench_growth(corpus, args)
        result["conditions"] = bench_conditions(corpus, args)
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / f"embedding_{kind}{'' if plain else f'_{args.dtype}'}"
    page = embedding_page.markdown(result, args.out)
    write_json(base.with_suffix(".json"), result)
    write_text(base.with_suffix(".md"), page)
    print(page)


if __name__ == "__main__":
    main()
