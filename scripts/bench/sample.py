"""Generation speed: our cached `generate` against nanoGPT's, the same weights, the same tokens.

    python scripts/bench/sample.py --nanogpt-dir ../nanoGPT        (a checkout of karpathy/nanoGPT)

Both models stand in this one process with the same random weights and work in turns, round after round. Ours generates
everything. nanoGPT, which computes the whole context anew for each token and would take many minutes, generates one
token at each of several lengths of context, by its own `generate`; the line through these times, added up over the
lengths that the task goes through, is its time. How good that is, a small model shows, which both let generate in full.

one       --tokens new ones after a prompt of 8
eight     the same for eight prompts of different lengths: ours as one batch, nanoGPT's, which takes no such batch, one
          after another
sliding   one token more where the context is full: both compute it all anew, each by its `generate`

Greedy tokens are compared at every measured length, drawn ones of one seed in the small model.
"""

import importlib.util
import statistics
import sys
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import numpy as np
import torch
from torch.nn import functional as F

from engine.errors import sentences
from engine.ranks import keep_heap
from model import GPT, GPTConfig
from scripts.analysis.report import Table, progress
from scripts.arguments import device, whole
from scripts.bench import rounds as bench
from scripts.provenance import provenance

SHAPES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304},
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 1024, "vocab_size": 4096},
    "toy": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 256},
}
PROMPT = 8
EIGHT = [1, 2, 4, 8, 16, 24, 32, 48]  # the batch's prompts, in 128ths of the context


def load_nanogpt(folder: Path):
    """nanoGPT's model.py as a module of its own name."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def pair(shape: dict, nanogpt, device: str) -> tuple:
    """(our model, nanoGPT's or None) with the same random weights, larger than at the start of a training: with those
    every greedy token would be the last one again."""
    ours = GPT(GPTConfig(**shape, bias=False, tie_weights=True)).to(device).eval()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if ".h." in name and p.dim() == 2:
                p.mul_(8)
    if nanogpt is None:
        return ours, None
    theirs = nanogpt.GPT(nanogpt.GPTConfig(**shape, bias=False, dropout=0.0)).to(device).eval()
    theirs.load_state_dict(ours.state_dict() | {"lm_head.weight": ours.transformer.wte.weight})
    return ours, theirs


def ours_all(model, prompts: list[torch.Tensor], n: int, **how) -> torch.Tensor:
    """n new tokens after each prompt (1, T), as one batch: (number of prompts, n)."""
    longest = max(p.size(1) for p in prompts)
    rows = torch.cat([F.pad(p, (longest - p.size(1), 0)) for p in prompts])
    fill = torch.tensor([longest - p.size(1) for p in prompts], device=rows.device)
    return torch.cat([*model.generate(rows, n, padding=fill if fill.any() else None, **how)], dim=1)


def added_up(lengths, costs, first: int, n: int) -> float:
    """Cost of n tokens from a context of `first` on, a context of lengths[i] costing costs[i]."""
    return float(np.interp(np.arange(first, first + n), lengths, costs).sum())


def measure(shape: dict, nanogpt, args, n_rounds: int) -> dict:
    """{"rounds": {side: [{task: ms}]}, "lengths": where nanoGPT was timed, "differ": those where the tokens do}."""
    device, n, block = args.device, args.tokens, shape["block_size"]
    ours, theirs = pair(shape, nanogpt, device)
    draw = torch.Generator().manual_seed(0)

    def random(length: int) -> torch.Tensor:
        return torch.randint(0, 256, (1, length), generator=draw).to(device)

    prompts = {"one": [random(PROMPT)], "eight": [random(max(1, block * k // 128)) for k in EIGHT]}
    full = random(block + 1)
    longest = prompts["eight"][-1].size(1) + n - 1
    lengths = np.unique(np.linspace(1, min(longest, block), 8).astype(int)).tolist()
    texts, differ = {}, set()  # what ours made of the prompts

    def run_ours() -> dict:
        spent = {}
        for task, of_task in prompts.items():
            spent[task], new = bench.timed(lambda: ours_all(ours, of_task, n, temperature=0), device)  # noqa: B023
            texts[task] = torch.cat((of_task[-1], new[-1:]), dim=1)
        spent["sliding"], token = bench.timed(lambda: next(ours.generate(full, 1, temperature=0)), device)
        texts["sliding"] = torch.cat((full, token), dim=1)
        return spent

    def one_token(task: str, length: int) -> float:
        """Milliseconds of nanoGPT for one token after so many of a text of ours; also whether it is the same token."""
        text = texts[task]
        spent, longer = bench.timed(lambda: theirs.generate(text[:, :length], 1, top_k=1), device)
        if length >= text.size(1) - n and longer[0, -1] != text[0, length]:
            differ.add(length)
        return spent

    def run_theirs() -> dict:
        ms = [one_token("one" if length < PROMPT + n else "eight", length) for length in lengths]
        spent = {task: sum(added_up(lengths, ms, p.size(1), n) for p in of) for task, of in prompts.items()}
        return spent | {"sliding": one_token("sliding", block + 1)}

    for model in filter(None, (ours, theirs)):
        list(model.generate(prompts["one"][0], 4))  # libraries and threads come up
    sides = {"ours": run_ours} | ({"nanoGPT": run_theirs} if theirs else {})
    return {"rounds": bench.alternate(sides, n_rounds), "lengths": lengths, "differ": sorted(differ)}


def check(shape: dict, nanogpt, args) -> dict:
    """Both sides in full on a small model, drawing with one seed: ms, added-up ms, equal tokens."""
    ours, theirs = pair(shape, nanogpt, args.device)
    prompt = torch.randint(0, 256, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(args.device)
    how = {"temperature": 0.8, "top_k": 200}
    torch.manual_seed(1)
    ours_ms, new = bench.timed(lambda: ours_all(ours, [prompt], args.tokens, **how), args.device)
    torch.manual_seed(1)
    theirs_ms, old = bench.timed(lambda: theirs.generate(prompt, args.tokens, **how), args.device)
    (added,) = bench.column(measure(shape, nanogpt, args, 1)["rounds"], "nanoGPT", "one")
    return {
        "ours_ms": ours_ms, "nanogpt_ms": theirs_ms, "nanogpt_added_up_ms": added,
        "same_tokens": torch.equal(new, old[:, PROMPT:]), "distinct_tokens": new.unique().numel(),
    }  # fmt: skip


def table(args, small: str, record: dict) -> Table:
    """Tokens a second of both sides in each task, and what the checks found."""
    rounds, rows = record["rounds"], []
    for task, n in (("one", args.tokens), ("eight", 8 * args.tokens), ("sliding", 1)):
        ms = {side: bench.column(rounds, side, task) for side in rounds}
        speeds = [f"{1e3 * n / statistics.median(values):,.1f}" for values in ms.values()]
        rows.append([task, n, *speeds, bench.ratio(ms.get("nanoGPT", []), ms["ours"])])
    header = ["task", "new tokens", *(f"{side}, tokens/s" for side in rounds), "ours is faster by"]
    note = f"{torch.get_num_threads()} threads; medians of {args.rounds} rounds, ratios with the lowest and highest. "
    if "check" in record:
        c, other = record["check"], record["differ"]
        note += (
            f"nanoGPT's times are added up from one token at {len(record['lengths'])} lengths of context each. Greedy "
            f"tokens are {f'other ones at the lengths {other}' if other else 'the same'}. In full, {small} model, "
            f"{args.tokens} drawn tokens: nanoGPT {c['nanogpt_ms'] / 1e3:.1f} s (added up: "
            f"{c['nanogpt_added_up_ms'] / 1e3:.1f}), ours {c['ours_ms'] / 1e3:.1f} s "
            f"({bench.ratio([c['nanogpt_ms']], [c['ours_ms']])}), the tokens "
            f"{'the same' if c['same_tokens'] else 'NOT the same'} ({c['distinct_tokens']} distinct ones)."
        )
    return Table(f"Generation, {args.shape}", header, rows, note=note)


def main(argv=None) -> None:
    parser = bench.parser(__doc__)
    add = parser.add_argument
    add("--nanogpt-dir", type=bench.nanogpt, help="checkout of nanoGPT to measure against")
    add("--shape", default="gpt2", choices=SHAPES)
    add("--tokens", type=whole(1, 512), default=512, help="new tokens a prompt (%(default)s)")
    add("--device", type=device, default="cpu", help="cpu or cuda (%(default)s)")
    args = parser.parse_args(argv)
    with sentences():
        if args.device == "cpu":
            keep_heap()
        nanogpt = load_nanogpt(args.nanogpt_dir) if args.nanogpt_dir else None
        made, small = provenance(__file__, argv), "toy" if args.shape == "toy" else "small"
        record = {"shape": SHAPES[args.shape]} | measure(SHAPES[args.shape], nanogpt, args, args.rounds)
        if nanogpt:
            record["check"] = check(SHAPES[small], nanogpt, args)
        else:
            progress("nanoGPT is left out: --nanogpt-dir names a checkout of it")
        name = f"bench_sample_{args.shape}"
        bench.publish(args.out, name, "Generation speed", made, record, [table(args, small, record)])


if __name__ == "__main__":
    main()
