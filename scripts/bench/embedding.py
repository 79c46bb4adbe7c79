"""Time, memory and growth of the Kronecker embedding beside the PyPI reference and nn.Embedding, in one run.

    python scripts/bench/embedding.py --text corpus.jsonl.xz --hf-tokenizer path/to/gpt2 --out results/embedding

Every round runs each side once, in turn; the tables give medians, and ratios round by round with the lowest and highest,
so that what else the machine does falls on all sides alike. "prepared" is kronecker as train.py and evaluation use it:
a step's plan made before it (by the loader's thread), and a forward pass without gradients that looks up in a kept table
(mode="cached"). The table of conditions says how the ratios depend on what is timed. Peak memory is measured with each
side alone in a process of its own. On CUDA the ways of scripts/gpu/candidates.py are sides, too. Without --text the ids
follow a Zipf law (exponent 1) and the token bytes are drawn at random with GPT-2-like lengths; the page says which it was.
"""

import contextlib
import ctypes
import importlib.util
import json
import multiprocessing
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import numpy as np
import psutil
import torch
from torch import nn

from data.console import first_line
from data.files import expanded
from data.sources import local_blocks, read_block
from engine.errors import RunError, sentences
from engine.ranks import keep_heap
from kronecker import KroneckerEmbedding, build_byte_buffer
from scripts.analysis.report import Table, progress
from scripts.arguments import device, whole
from scripts.bench import rounds as bench
from scripts.bench.growth import growth
from scripts.gpu.candidates import WAYS, going
from scripts.provenance import provenance

SIDES = ("kronecker", "prepared", *WAYS, "nn.Embedding", "reference")
# prepared differs from kronecker only in what went before
ALONE = ("kronecker", "nn.Embedding", "reference")
#            V        d     pos_dim  token counts
SETTINGS = [
    (4_096, 128, 16, (1_024,)),
    (50_304, 768, 16, (1_024, 8_192, 65_536)),
    (131_072, 1_024, 32, (1_024, 8_192)),
    (131_072, 4_096, 32, (8_192,)),
]
SETTINGS_CUDA = [(50_304, 768, 16, (8_192, 65_536)), (131_072, 4_096, 32, (8_192, 65_536))]
# What grows, and from where: the other two stay as in BASE.
BASE = {"tokens": 4_096, "vocabulary": 32_768, "width": 512}
GROWTH = {
    "tokens": [1_024, 4_096, 16_384, 65_536],
    "vocabulary": [4_096, 16_384, 65_536, 262_144],
    "width": [128, 256, 512, 1_024, 2_048],
}
# What a bench of an embedding may time, in CONDITIONED: (bytes of the tokens, a loss in the step or a gradient given,
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
CONDITIONED = (50_304, 768, 16, 8_192)


# ---- sides


class Corpus:
    """GPT-2 tokens of a text, in a file as the preparation takes it, and the bytes of its ids; made up where there is none."""

    def __init__(self, path: Path | None = None):
        self.name, self.tokens, self.pieces = "a Zipf law, random token bytes", None, None
        if path is None:
            return
        import tiktoken

        tokens = []
        for block in local_blocks([path], "text"):
            encoding = tiktoken.get_encoding("gpt2")  # once there is text: without it nothing is downloaded
            for text in read_block(block, "text")[0]:
                tokens += [encoding.eot_token, *encoding.encode_ordinary(text)]
            if len(tokens) >= 400_000:
                break
        self.name = f"GPT-2 tokens of {path.name}"
        self.tokens = np.array(tokens, dtype=np.int64)
        encoding = tiktoken.get_encoding("gpt2")
        self.pieces = [encoding.decode_single_token_bytes(i) for i in range(50_257)]

    def buffers(self, V: int, pos_dim: int):
        """Byte buffers: the real bytes, repeated from the start where V is larger than the tokenizer; else random."""
        pieces = self.pieces
        if pieces is None:
            rng = np.random.default_rng(0)  # lengths of about 6 on average, as GPT-2's
            pieces = [rng.bytes(n) for n in np.minimum(rng.geometric(0.16, V), 40)]
        return build_byte_buffer([pieces[i % len(pieces)] for i in range(V)], pos_dim)

    def ids(self, kind: str, n: int, V: int) -> torch.Tensor:
        """n ids below V, int64: of the text's tokens, by a Zipf law where there is none, or uniformly drawn."""
        rng = np.random.default_rng(1)
        if kind == "uniform":
            return torch.from_numpy(rng.integers(0, V, n))
        if self.tokens is None:
            p = 1 / np.arange(1, V + 1)
            return torch.from_numpy(rng.choice(V, n, p=p / p.sum()))
        # a smaller vocabulary keeps the ids that it has: GPT-2's first ids are its most frequent pieces
        kept = self.tokens[self.tokens < V]
        if len(kept) < n:
            raise RunError(f"{self.name}: only {len(kept):,} of {n:,} ids below {V:,}: give a longer --text")
        return torch.from_numpy(kept[:n].copy())


def build(side: str, V: int, d: int, pos_dim: int, buffers, device="cpu", dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    if side == "nn.Embedding":
        return nn.Embedding(V, d, device=device, dtype=dtype)
    make, options = KroneckerEmbedding, {"mode": "cached"} if side == "prepared" else {}
    if side == "reference":
        from kronecker_embeddings import KroneckerEmbedding as make
    module = make(V, d, pos_dim=pos_dim, byte_buffer=buffers[0], length_buffer=buffers[1], **options)
    module = module.to(device=device, dtype=dtype)
    return going(WAYS[side], module) if side in WAYS else module


def sides_at(n: int, d: int, pos_dim: int, device: str) -> tuple[list[str], str]:
    """(those of SIDES that can be measured there, what keeps the reference from it if anything)."""
    why = why_no_reference(n, d, 256 * pos_dim, device)
    left_out = (() if device.startswith("cuda") else tuple(WAYS)) + (("reference",) if why else ())
    return [side for side in SIDES if side not in left_out], why


def step(module: nn.Module, ids: torch.Tensor, g: torch.Tensor | None) -> None:
    """A training step up to the weight's gradient, given the output's, or with a loss where g is None."""
    module.zero_grad(set_to_none=True)
    out = module(ids)
    out.square().mean().backward() if g is None else out.backward(g)


def loss_alone(out: torch.Tensor) -> None:
    """The part of a step with a loss that every side pays; out: what an embedding gave, as a leaf."""
    torch.autograd.grad(out.square().mean(), out)


@torch.no_grad()
def forward(module: nn.Module, ids: torch.Tensor) -> None:
    module(ids)


def why_no_reference(n: int, d: int, D: int, device: str, most_flop: float = 2.1e11) -> str:
    """What keeps the reference from a step, if anything. It keeps six (n, D) float32 tensors, and multiplies 6 n D d."""
    if importlib.util.find_spec("kronecker_embeddings") is None:
        return "kronecker-embeddings is not installed"
    need, flop, memory = 6 * 4 * n * D / 1e9, 6 * n * D * d, 8.0
    if device.startswith("cuda"):
        memory, most_flop = 0.7e-9 * torch.cuda.get_device_properties(device).total_memory, float("inf")
    fits = need <= memory and flop <= most_flop
    return "" if fits else f"it needs about {need:.0f} GB and {flop / 1e12:.1f} TFLOP a step"


# ---- measuring


def turns(runs: dict, n_rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Milliseconds of each side in each round.

    A turn of short calls goes on for 20 ms, and the median of all calls but its first counts: else the side that ran
    before decides what is in the caches, and at the demo's size more than half of the time.
    """

    def turn(work) -> float:
        each = [bench.timed(work, device)[0]]
        while sum(each) < 20:
            each.append(bench.timed(work, device)[0])
        return float(np.median(each[1:] or each))

    for work in runs.values():
        work()
    sides = {side: partial(turn, work) for side, work in runs.items()}
    return bench.alternate(sides, n_rounds, say=lambda line: None)


def measured(row: dict) -> dict:
    progress(json.dumps(row))
    return row


def bench_setting(V: int, d: int, pos_dim: int, counts: tuple, corpus: Corpus, args) -> list[dict]:
    """Rows of one vocabulary and width: each number of tokens, of text and drawn uniformly."""
    what = (args.device, getattr(torch, args.dtype))
    buffers, modules, rows = corpus.buffers(V, pos_dim), {}, []
    for n, kind in ((n, kind) for n in counts for kind in ("text", "uniform")):
        sides, why = sides_at(n, d, pos_dim, args.device)
        for side in [s for s in sides if s not in modules]:
            modules[side] = build(side, V, d, pos_dim, buffers, *what)
        ids = corpus.ids(kind, n, V).to(args.device)
        g, planned = torch.randn(n, d, device=what[0], dtype=what[1]), ids.clone()
        n_rounds = args.rounds * (10 if n * d < 1e6 else 1)
        kept = modules["prepared"].eval()
        plan_ms = turns({"plan": partial(kept.plan_ahead, planned)}, 5, args.device)["plan"]
        steps = {s: partial(step, modules[s], planned if s == "prepared" else ids, g) for s in sides}
        forwards = {s: partial(forward, modules[s], ids) for s in sides}
        row = {
            "V": V, "d": d, "pos_dim": pos_dim, "tokens": n, "ids": kind, "distinct": len(ids.unique()),
            "reference_left_out": why, "step_ms": turns(steps, n_rounds, args.device),
        }  # fmt: skip
        for module in modules.values():
            module.zero_grad(set_to_none=True)
        with torch.no_grad():
            table_ms, _ = bench.timed(kept.table, args.device)
        row["forward_ms"] = turns(forwards, n_rounds, args.device)
        row["prepared_ms"] = {"step": float(np.median(plan_ms)), "forward": table_ms}
        if kind == "text" and args.dtype == "float32":
            what_size = (V, d, pos_dim, n, corpus, args.device)
            row["peak_bytes"] = {s: peak_memory(s, *what_size) for s in sides if s in ALONE}
        rows.append(measured(row))
    return rows


def bench_conditions(corpus: Corpus, args) -> list[dict]:
    """One row a condition. Comes last: a process that has once kept its memory keeps it."""
    V, d, pos_dim, n = CONDITIONED
    rng, made_up = np.random.default_rng(0), Corpus()
    made_up.pieces = [rng.bytes(rng.integers(1, 13)) for _ in range(V)]
    sides = [s for s in sides_at(n, d, pos_dim, "cpu")[0] if s in ALONE]
    ids, given, rows = corpus.ids("text", n, V), torch.randn(n, d), []
    for name, what, keeps in CONDITIONS:
        if keeps:
            keep_heap()
        buffers = (corpus if name == "real" else made_up).buffers(V, pos_dim)
        g = given if what == "gradient given" else None
        runs = {s: partial(step, build(s, V, d, pos_dim, buffers), ids, g) for s in sides}
        if g is None:
            runs["loss alone"] = partial(loss_alone, given.clone().requires_grad_())
        row = {"bytes": name, "step": what, "memory_kept": keeps, "ms": turns(runs, args.rounds)}
        rows.append(measured(row))
    return rows


def bench_growth(corpus: Corpus, args) -> list[dict]:
    """One row a point of GROWTH: median time of a step, and all that a side holds at its peak."""
    rows = []
    for axis, x in ((axis, x) for axis, numbers in GROWTH.items() for x in numbers):
        n, V, d = (BASE | {axis: x}).values()
        sides = [s for s in ALONE if s != "reference" or not why_no_reference(n, d, 4_096, "cpu", 6e10)]
        ids, buffers, g = corpus.ids("text", n, V), corpus.buffers(V, 16), torch.randn(n, d)
        ms = turns({s: partial(step, build(s, V, d, 16, buffers), ids, g) for s in sides}, args.rounds)
        row = {"axis": axis, "x": x, "ms": {s: float(np.median(values)) for s, values in ms.items()}}
        peaks = {s: peak_memory(s, V, d, 16, n, corpus) for s in sides}
        rows.append(measured(row | {"mb": {s: peak["all"] / 1e6 for s, peak in peaks.items() if peak}}))
    return rows


def hf_tokenizer(folder: str):
    """GPT-2's tokenizer of transformers."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as e:  # transformers raises many kinds
        raise RunError(f"--hf-tokenizer {folder} is no folder of a tokenizer ({first_line(e)})") from None


def bench_buffers(fast) -> dict:
    """Building GPT-2's byte buffer; the reference reads a transformers tokenizer (`fast`) only."""
    import tiktoken
    from kronecker_embeddings import build_byte_buffer as reference

    encoding = tiktoken.get_encoding("gpt2")
    runs = {
        "reference": lambda: reference(fast, 16),
        "kronecker, transformers": lambda: build_byte_buffer(fast, 16),
        "of which transformers lists its vocabulary": lambda: fast.backend_tokenizer.get_vocab(True),
        "kronecker, tiktoken": lambda: build_byte_buffer(encoding, 16),
    }
    return turns(runs, 9)


def memory_of_side(side: str, V: int, d: int, pos_dim: int, n: int, corpus: Corpus, device="cpu") -> dict:
    """Bytes: the peak of one step above what stood before it, what of it is neither output nor gradient, and all that
    the module holds at that moment. In a process of its own."""
    torch.set_num_threads(1)
    with contextlib.suppress(OSError, AttributeError):  # another libc than glibc
        # a fixed threshold makes malloc give every large block back at once, so that RSS counts what is alive
        ctypes.CDLL(None).mallopt(-3, 131_072)
    module = build(side, V, d, pos_dim, corpus.buffers(V, pos_dim), device)
    ids, g = corpus.ids("text", n, V).to(device), torch.ones(n, d, device=device)
    step(module, ids[:8], g[:8])  # libraries and thread pools come up here
    module.zero_grad(set_to_none=True)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(module, ids, g)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        step(module, ids, g)
        peak = bench.high_water() - before
    weights = sum(p.nbytes for p in module.parameters())
    buffers = module.buffer_bytes() if isinstance(module, KroneckerEmbedding) else 0
    return {"step": peak, "extra": max(peak - g.nbytes - weights, 0), "all": weights + buffers + peak}


def peak_memory(side: str, *what) -> dict[str, int] | None:
    """memory_of_side in a fresh process, forked from one that has only imported; None where it cannot be measured."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "matplotlib.pyplot"])
    with context.Pool(1) as pool:
        try:
            return pool.apply(memory_of_side, (side, *what))
        except (OSError, RuntimeError) as error:
            progress(f"  peak memory of {side} not measured: {error}")
    return None


# ---- the page


def size(row: dict) -> list:
    return [f"{row['V']:,}", f"{row['d']:,}", row["pos_dim"], f"{row['tokens']:,} ({row['distinct']:,})"]


def over(ms: dict, side: str, other: str) -> str:
    return bench.ratio(ms.get(side, []), ms.get(other, []))


def time_table(rows: list[dict]) -> Table:
    """Milliseconds of every side, a step and forward alone, and their ratios."""
    sides, cells = [s for s in SIDES if any(s in row["step_ms"] for row in rows)], []
    for row, what in ((row, what) for row in rows for what in ("step", "forward")):
        ms = row[f"{what}_ms"]
        ratios = [over(ms, "kronecker", "nn.Embedding"), over(ms, "prepared", "nn.Embedding")]
        ratios += [over(ms, "reference", "kronecker"), f"{row['prepared_ms'][what]:,.2f}"]
        cells.append([*size(row), row["ids"], what, *(bench.median(ms.get(s, [])) for s in sides), *ratios])
    header = ["V", "d", "pos_dim", "tokens (distinct)", "ids", "", *sides]
    header += ["kronecker / nn.Embedding", "prepared / nn.Embedding", "reference / kronecker", "preparing"]
    note = (
        "Medians in ms of interleaved runs. A step is forward and backward; forward is without gradients. Prepared "
        "means for a step: its plan was made before it, in `preparing` ms (train.py does so in the loader's "
        "thread); for forward: the table is kept, which took `preparing` ms once a weight (evaluation and "
        "generation do so). kronecker reads the whole projection at each call, which bounds its forward pass of few tokens."
    )
    return Table("Time", header, cells, left=6, note=note)


def memory_table(rows: list[dict]) -> Table:
    """Extra memory of a step in MB."""
    cells = []
    for row in rows:
        peaks = {s: [peak["extra"] / 1e6] for s, peak in row.get("peak_bytes", {}).items() if peak}
        if "kronecker" in peaks:
            mb = [bench.median(peaks.get(s, []), ",.1f") for s in ALONE]
            cells.append([*size(row), *mb, over(peaks, "reference", "kronecker")])
    header = ["V", "d", "pos_dim", "tokens (distinct)", *ALONE, "reference / kronecker"]
    note = "The peak of a step above what stood before it, less its output and the weight's gradient."
    return Table("Extra peak memory of a training step (MB)", header, cells, left=0, note=note)


def conditions_table(rows: list[dict]) -> Table:
    """A training step and its ratios under each of CONDITIONS."""
    cells = []
    for row in rows:
        ms, memory = row["ms"], "kept" if row["memory_kept"] else "given back"
        times = [bench.median(ms.get(s, [])) for s in (*ALONE, "loss alone")]
        ratios = [over(ms, "kronecker", "nn.Embedding"), over(ms, "reference", "kronecker")]
        cells.append([row["bytes"], row["step"], memory, *times, *ratios])
    header = ["bytes of a token", "step", "freed memory", *ALONE, "loss alone"]
    header += ["kronecker / nn.Embedding", "reference / kronecker"]
    note = (
        "Medians in ms; ratios round by round. The loss, which every side pays, bounds what a ratio can be: its share "
        "of nn.Embedding's step is a floor of kronecker's."
    )
    title = f"A training step of {CONDITIONED[3]:,} tokens of text at GPT-2's size, by what is timed"
    return Table(title, header, cells, left=3, note=note)


def growth_parts(rows: list[dict], folder: Path) -> list:
    """Tables of time and memory against each axis, with their slopes, and the figures."""
    sizes = ", ".join(f"{axis} {x:,}" for axis, x in BASE.items())
    parts = [
        f"# Growth\n\nOne of three grows, the others stay: {sizes}, pos_dim 16. Memory is all that a "
        "side holds: weights, their gradient, the output, and what lies between."
    ]
    for axis in GROWTH:
        of_axis = [row for row in rows if row["axis"] == axis]
        for key, what in (("ms", "Time"), ("mb", "Peak memory")):
            values = {side: [row[key].get(side) for row in of_axis] for side in ALONE}
            series = {side: ys for side, ys in values.items() if any(ys)}
            if series:
                title, base = f"{what} of a training step by {axis}", folder / f"growth_{axis}_{key}"
                parts += growth(title, axis, key.replace("mb", "MB"), [r["x"] for r in of_axis], series, base)
    return parts


def measure(args) -> tuple[dict, list]:
    """All settings: (record, the page's paragraphs and tables)."""
    # what can be wrong is, before the first measurement
    corpus, fast = Corpus(args.text), hf_tokenizer(args.hf_tokenizer) if args.hf_tokenizer else None
    settings = SETTINGS_CUDA if args.device.startswith("cuda") else SETTINGS
    for V, _, _, counts in settings:
        corpus.ids("text", max(counts), V)
    rows = [row for setting in settings for row in bench_setting(*setting, corpus, args)]
    record = {"dtype": args.dtype, "tokens_from": corpus.name, "rows": rows}
    parts = [f"{args.dtype}. Ids: {corpus.name}.", time_table(rows)]
    if args.dtype == "float32":
        parts.append(memory_table(rows))
    if args.hf_tokenizer:
        record["buffers_ms"] = ms = bench_buffers(fast)
        listed = ", ".join(f"{side} {bench.median(values, '.1f')} ms" for side, values in ms.items())
        ratio = over(ms, "reference", "kronecker, transformers")
        parts.append(f"Building GPT-2's byte buffer: {listed}; from transformers {ratio} the reference.")
    for row in rows[::2]:  # a row of text and one of uniform ids
        if row["reference_left_out"]:
            where = f"V={row['V']:,}, d={row['d']:,}, {row['tokens']:,} tokens"
            parts.append(f"The reference at {where}: not run, {row['reference_left_out']}.")
    if args.device == "cpu" and args.dtype == "float32":
        record["growth"], record["conditions"] = bench_growth(corpus, args), bench_conditions(corpus, args)
        parts += [conditions_table(record["conditions"]), *growth_parts(record["growth"], args.out)]
    return record, parts


def main(argv=None) -> None:
    parser = bench.parser(__doc__, rounds=15)
    add = parser.add_argument
    add("--text", type=expanded, help="file to take real tokens from (GPT-2's, by tiktoken), e.g. JSON lines")
    add("--hf-tokenizer", help="folder of GPT-2's transformers tokenizer: times the buffers, too")
    add("--device", type=device, default="auto", help="cpu, cuda, auto (%(default)s)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--threads", type=whole(0), default=0, help="CPU threads (0: as many as torch takes)")
    args = parser.parse_args(argv)
    with sentences():
        if args.threads:
            torch.set_num_threads(args.threads)
        made, kind = provenance(__file__, argv), args.device.partition(":")[0]
        if kind == "cuda":
            made["machine"] = torch.cuda.get_device_name()
        made["machine"] += f", torch {torch.__version__}, {torch.get_num_threads()} threads"
        record, parts = measure(args)
        name = f"embedding_{kind}{'' if args.dtype == 'float32' else f'_{args.dtype}'}"
        title = f"The embedding on {args.device}: time and memory"
        bench.publish(args.out, name, title, made, record, parts)


if __name__ == "__main__":
    main()
