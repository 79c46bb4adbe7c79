"""Generate text from a run, or from weights that others trained.

    python sample.py --out_dir=out/demo/kronecker_s1337 --start="The {{frobnicator}} is used to"
    python sample.py --init_from=gpt2 --start="FILE:prompt.txt" --num_samples=3 --stream=True

A slot in double braces is one position whose embedding is made from those bytes, whether or not the
tokenizer has such a token (forced OOV, arXiv 2605.29459 section 6.12); a blank before it belongs to it, as
it would to a token. End-of-text, spelled out (<|endoftext|>), is the token, and so is an empty prompt: each
document of the training data opens with it.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

import configurator
from configurator import SEEDS, key
from data import DataError, console

BATCH = 64  # samples that go through the model together


@dataclass
class SampleConfig:
    out_dir: str = key("out", "the run's folder; not read when init_from names other weights", path=True)
    init_from: str = key(
        "resume", "resume (the run in out_dir) | gpt2* | a ckpt.pt | a GPT-2 folder", path=True
    )
    which: str = key("latest", "checkpoint: latest | best | a step's number")
    start: str = key("\n", "the prompt; FILE:prompt.txt reads it; {{bytes}} is a slot made from those bytes")
    prompts: str = key("", "a file with a prompt a line, sampled as a batch (instead of start)", path=True)
    num_samples: int = key(10, "samples of each prompt", low=1, high=10**6)
    max_new_tokens: int = key(500, "tokens in each sample", low=1, high=10**9)
    temperature: float = key(0.8, "below 1 less random, above 1 more; 0 takes the likeliest", low=0, high=1e6)
    top_k: int = key(200, "draw from the k likeliest tokens (0: all)", low=0)
    top_p: float = key(1.0, "draw from the likeliest with this much probability together", low=1e-9, high=1)
    seed: int = key(1337, "of the draws", **SEEDS)
    stream: bool = key(False, "print tokens as they come (one sample after the other)")
    stop: bool = key(False, "end a sample at end-of-text, instead of going on into another document")
    tokenizer: str = key("", "of weights from elsewhere: a name or a folder (empty: theirs, else gpt2)")
    device: str = key("auto", "auto | cpu | cuda | cuda:N | mps")
    dtype: str = key("float32", "of the matmuls", ("auto", "float32", "bfloat16", "float16"))
    compile: bool = key(False, "torch.compile the model")


if __name__ == "__main__":  # before torch, whose import takes seconds: --help, a mistyped key and Ctrl-C
    console.early(configurator.load, sys.argv[1:], "sample.py", SampleConfig, quiet=True)

import torch

import kronecker
from engine import checkpoint, pretrained, ranks, runs
from engine.errors import RunError, sentences
from engine.prompts import parse_prompt, read_prompts, shown
from model import GPT, GPTConfig


def load_run(out_dir, device="cpu", which: str = "latest"):
    """(model in eval mode, tokenizer) of a run's folder; nothing outside the folder is needed but, for one of
    tiktoken's tokenizers, its cache.

    which: 'latest', 'best' or a step. Raises RunError where the folder holds no such whole checkpoint.
    """
    out_dir = Path(out_dir)
    config, _ = runs.read_run(out_dir)
    folder = checkpoint.choose(out_dir, str(which))
    tokenizer = runs.read_tokenizer(out_dir)
    recorded = configurator.recorded(config, out_dir / "config.json")
    shape = {f.name: getattr(recorded, f.name) for f in fields(GPTConfig)}
    byte_buffers = None
    if recorded.wte == "kronecker":
        codec = (recorded.pos_dim, recorded.byte_extraction)
        byte_buffers = kronecker.build_byte_buffer(tokenizer.backend, *codec)
    model = make_model(shape, out_dir, byte_buffers)
    weights, _, _ = checkpoint.load(folder, with_optimizer=False)
    pretrained.load(model, weights, folder)
    return model.to(device).eval(), tokenizer


def load_pretrained(source: str, tokenizer: str = "", device="cpu"):
    """(model in eval mode, tokenizer) of GPT-2 or nanoGPT weights; tokenizer: as the key says."""
    weights, shape = pretrained.read(source)
    found = pretrained.tokenizer(source, tokenizer, shape["vocab_size"])
    model = make_model(shape, source)
    pretrained.load(model, weights, source)
    return model.to(device).eval(), found


def make_model(shape: dict, source, byte_buffers=None) -> GPT:
    try:
        return GPT(GPTConfig(**shape), byte_buffers)
    except ValueError as e:
        raise RunError(f"{source} has a shape that cannot be: {e}") from None


def continuations(model, prompts: list, config: SampleConfig, generator, end: int | None):
    """Yield, after each step, the tokens that have been added to each prompt."""
    longest = max(len(ids) for ids, _ in prompts)
    fill = [longest - len(ids) for ids, _ in prompts]
    rows = [[0] * n + ids for n, (ids, _) in zip(fill, prompts, strict=True)]
    ids = torch.tensor(rows, device=generator.device)
    padding = torch.tensor(fill, device=generator.device) if any(fill) else None
    overrides = {(row, fill[row] + p): b for row, (_, slots) in enumerate(prompts) for p, b in slots.items()}
    new: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    how = (config.temperature, config.top_k, config.top_p, generator, overrides, padding)
    for tokens in model.generate(ids, config.max_new_tokens, *how):
        tokens = tokens[:, 0].tolist()
        going = {row for row in going if not (config.stop and tokens[row] == end)}
        for row in going:
            new[row].append(tokens[row])
        yield new
        if not going:
            return


def main(config: SampleConfig) -> None:
    from_run = config.init_from in ("resume", "auto")
    idle = {"tokenizer"} if from_run else {"out_dir", "which"}
    idle |= {"start"} if config.prompts else set()
    for name in sorted(idle & config.given.keys()):
        raise RunError(f"--{name} would not be used here: leave it out, or see --help for what goes together")
    device = ranks.take_device(config.device)
    _, autocast = ranks.number_format(config.dtype, device)
    if from_run:
        model, tokenizer = load_run(config.out_dir, device, config.which)
    else:
        model, tokenizer = load_pretrained(config.init_from, config.tokenizer, device)
    if config.stop and tokenizer.eot is None:
        raise RunError(f"--stop waits for end-of-text, which the tokenizer {tokenizer.name} does not have")
    texts = read_prompts(config.start, config.prompts)
    try:
        prompts = [parse_prompt(text, tokenizer, model.config.vocab_size) for text in texts]
    except DataError as error:
        if {"start", "prompts"} & config.given.keys():
            raise
        raise RunError(f"the usual prompt, a line end, will not do ({error}): give --start") from None
    if any(slots for _, slots in prompts) and model.config.wte != "kronecker":
        way_out = "sample a kronecker arm, or write the word without braces"
        raise RunError(
            f"a prompt has a slot in double braces, but a learned table has no such slot: {way_out}"
        )
    if config.compile:
        model.forward = torch.compile(model.forward)
    generator = torch.Generator(device=device).manual_seed(config.seed)

    # Many go through the model together, those of like length first, which need the least filling up.
    jobs = [prompt for prompt in prompts for _ in range(config.num_samples)]
    order = range(len(jobs)) if config.stream else sorted(range(len(jobs)), key=lambda i: len(jobs[i][0]))
    size = 1 if config.stream else BATCH
    done = {}
    for batch in (order[start : start + size] for start in range(0, len(jobs), size)):
        first, printed = shown(jobs[batch[0]], tokenizer), 0
        with autocast:
            for new in continuations(model, [jobs[i] for i in batch], config, generator, tokenizer.eot):
                text = first + tokenizer.decode(new[0]) if config.stream else ""
                if not text.endswith("\ufffd"):  # half a character waits for its other half
                    print(text[printed:], end="", flush=True)
                    printed = len(text)
        if config.stream:
            print(f"{text[printed:]}\n---------------")
            continue
        for i, tokens in zip(batch, new, strict=True):
            done[i] = shown(jobs[i], tokenizer) + tokenizer.decode(tokens)
    for i in sorted(done):
        print(f"{done[i]}\n---------------")
    console.output_arrived()


def cli(argv: list[str]) -> None:
    config = configurator.load(argv, prog="sample.py", also=SampleConfig)
    with sentences(lambda: "lower num_samples"):
        main(config)


if __name__ == "__main__":
    cli(sys.argv[1:])
