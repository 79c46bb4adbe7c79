"""Generation speed: our cached `generate` against nanoGPT's, the same weights, the same tokens.

    python scripts/bench/sample.py --nanogpt-dir ../nanoGPT        (a checkout of karpathy/nanoGPT)

Both models run in this one process, in turns, on a model of GPT-2's shape with random weights; greedy, so
that both must give the same tokens, which is checked. The ratio is the median over the rounds.
"""

import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from data.files import write_json
from engine.errors import RunError, sentences
from engine.ranks import keep_heap
from model import GPT, GPTConfig
from scripts import provenance
from scripts.arguments import Parser, device, whole

SHAPES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304},
    "baby": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 1024, "vocab_size": 50304},
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 1024, "vocab_size": 4096},
}


def load_nanogpt(folder: Path):
    """nanoGPT's model.py as a module of its own name."""
    path = folder / "model.py"
    if not path.is_file():
        raise RunError(f"{folder} is no checkout of nanoGPT: it has no model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def main(argv=None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--nanogpt-dir", required=True, type=Path, help="checkout of nanoGPT to measure against")
    add("--shape", default="gpt2", choices=SHAPES)
    add("--tokens", type=whole(1, 100_000), default=512, help="new tokens a sample (%(default)s)")
    add("--rounds", type=whole(1), default=1, help="samples of each side (%(default)s)")
    add("--device", type=device, default="cpu", help="cpu or cuda (%(default)s)")
    add("--out", type=Path, help="write the figures as JSON to this folder")
    args = parser.parse_args(argv)
    with sentences():
        measure(args, argv)


def measure(args, argv) -> None:
    """Time both sides in turns, and see that they generate the same tokens."""
    if args.device == "cpu":
        keep_heap()
    theirs_module = load_nanogpt(args.nanogpt_dir)
    shape = SHAPES[args.shape]
    ours = GPT(GPTConfig(**shape, bias=False, tie_weights=True)).to(args.device).eval()
    # as initialised, every greedy token would be the last one again: larger weights make the text vary
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if ".h." in name and p.dim() == 2:
                p.mul_(8)
    theirs = (
        theirs_module.GPT(theirs_module.GPTConfig(**shape, bias=False, dropout=0.0)).to(args.device).eval()
    )
    theirs.load_state_dict(ours.state_dict() | {"lm_head.weight": ours.transformer.wte.weight})
    prompt = torch.randint(0, 4096, (1, 8), generator=torch.Generator().manual_seed(0)).to(args.device)

    def clock(work) -> tuple[float, torch.Tensor]:
        if args.device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        tokens = work()
        if args.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start, tokens

    ratios, agree = [], []
    list(ours.generate(prompt, 4, temperature=0))
    for _ in range(args.rounds):
        fast, new = clock(lambda: torch.cat(list(ours.generate(prompt, args.tokens, temperature=0)), dim=1))
        slow, old = clock(
            lambda: theirs.generate(prompt, args.tokens, temperature=1.0, top_k=1)[:, prompt.size(1) :]
        )
        ratios.append(slow / fast)
        agree.append(torch.equal(new, old))
    figures = provenance.provenance(__file__, argv) | {
        "shape": shape, "new_tokens": args.tokens, "speed_ratio": statistics.median(ratios), "ratios": ratios,
        "same_tokens": all(agree), "distinct_tokens": new.unique().numel(),
    }  # fmt: skip
    print(f"{args.tokens} new tokens, {args.shape}: {figures['speed_ratio']:.1f}x nanoGPT's generate; the tokens are "
          f"{'the same' if all(agree) else 'NOT the same'} ({figures['distinct_tokens']} distinct)")  # fmt: skip
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / f"bench_sample_{args.shape}.json", figures)


if __name__ == "__main__":
    main()
