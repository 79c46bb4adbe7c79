"""Generate text from a run, or from weights that others trained.

    python sample.py --out_dir=out/demo/kronecker_s1337 --start="The {{frobnicator}} is used to"
    python sample.py --init_from=gpt2 --start="FILE:prompt.txt" --num_samples=3 --stream=True

A slot in double braces is one position whose embedding is made from those bytes, whether or not the
tokenizer has such a token (forced OOV, arXiv 2605.29459 section 6.12); a blank before it belongs to it, as
it would to a token.
"""

import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch

import configurator
import kronecker
from configurator import key
from data.tokenizers import load_tokenizer
from engine import checkpoint, pretrained, runs
from engine import ranks as engine_ranks
from engine.errors import RunError, sentences
from model import GPT, GPTConfig

SLOT = re.compile(r" ?\{\{(.*?)\}\}", re.DOTALL)


@dataclass
class SampleConfig:
    out_dir: str = key("out", "the run's folder; not read when init_from names other weights")
    init_from: str = key("resume", "resume (the run in out_dir) | gpt2* | a nanoGPT ckpt.pt | a GPT-2 folder")
    which: str = key("latest", "checkpoint: latest | best | a step's number")
    start: str = key("\n", "the prompt; FILE:prompt.txt reads it; {{bytes}} is a slot made from those bytes")
    prompts: str = key("", "a file with one prompt a line, sampled together as a batch (instead of start)")
    num_samples: int = key(10, "samples of each prompt")
    max_new_tokens: int = key(500, "tokens in each sample")
    temperature: float = key(0.8, "below 1 less random, above 1 more; 0 always takes the likeliest token")
    top_k: int = key(200, "draw from the k likeliest tokens (0: all)")
    top_p: float = key(1.0, "draw from the likeliest tokens that hold this much probability together")
    seed: int = key(1337, "of the draws")
    stream: bool = key(False, "print tokens as they come (one sample after the other)")
    tokenizer: str = key("gpt2", "tokenizer of weights that come without one")
    device: str = key("auto", "auto | cpu | cuda | cuda:N | mps")
    dtype: str = key("float32", "of the matmuls", ("auto", "float32", "bfloat16", "float16"))
    compile: bool = key(False, "torch.compile the model")


def load_run(out_dir, device="cpu", which: str = "latest"):
    """(model in eval mode, tokenizer, config dict) of a run's folder; nothing outside the folder is needed.

    which: 'latest', 'best' or a step. Raises RunError where the folder holds no such whole checkpoint.
    """
    out_dir = Path(out_dir)
    config, _ = runs.read_run(out_dir)
    folder = checkpoint.choose(out_dir, str(which))
    tokenizer = load_tokenizer(
        runs.read_json(out_dir / "data_meta.json", "a training")["tokenizer"], base_dir=out_dir
    )
    shape = GPTConfig(**{f.name: config[f.name] for f in fields(GPTConfig) if f.name in config})
    byte_buffers = None
    if shape.wte == "kronecker":
        byte_buffers = kronecker.build_byte_buffer(
            tokenizer.backend, shape.pos_dim, config["byte_extraction"]
        )
    model = GPT(shape, byte_buffers)
    weights, _, _ = checkpoint.load(folder, with_optimizer=False)
    pretrained.load(model, weights, folder)
    return model.to(device).eval(), tokenizer, config


def load_pretrained(source: str, tokenizer: str, device="cpu"):
    """(model in eval mode, tokenizer, {}) of GPT-2 or nanoGPT weights; a meta.pkl beside ckpt.pt is not needed."""
    weights, shape = pretrained.read(source)
    model = GPT(GPTConfig(**shape))
    pretrained.load(model, weights, source)
    return model.to(device).eval(), load_tokenizer(tokenizer), {}


def parse_prompt(text: str, tokenizer, vocab_size: int) -> tuple[list[int], dict[int, bytes]]:
    """(ids, {position: bytes}) of a prompt; each {{slot}} takes one position.

    The id under a slot is the paper's 50300, or the last one of a smaller vocabulary; its bytes replace it.
    """
    ids, slots, end = [], {}, 0
    for match in SLOT.finditer(text):
        ids += tokenizer.encode(text[end : match.start()])
        word = match.group(0).replace("{{", "").replace("}}", "").encode()
        if not match.group(1):
            raise RunError("an empty slot {{}} has no bytes: put a word between the braces")
        slots[len(ids)] = word
        ids.append(min(50300, vocab_size - 1))
        end = match.end()
    ids += tokenizer.encode(text[end:])
    if not ids:
        raise RunError("the prompt is empty: give --start at least one character")
    return ids, slots


def read_prompts(config: SampleConfig) -> list[str]:
    if config.prompts:
        path = Path(config.prompts)
        if not path.is_file():
            raise RunError(f"there is no prompt file {path}: check --prompts")
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
        if not prompts:
            raise RunError(f"{path} holds no prompt: write one a line")
        return prompts
    if config.start.startswith("FILE:"):
        path = Path(config.start[5:])
        if not path.is_file():
            raise RunError(f"there is no prompt file {path}: check --start=FILE:...")
        return [path.read_text(encoding="utf-8")]
    return [config.start]


def main(config: SampleConfig) -> None:
    for name in ("num_samples", "max_new_tokens"):
        if getattr(config, name) < 1:
            raise RunError(f"{name} is {getattr(config, name)}, but it must be at least 1")
    if config.temperature < 0:
        raise RunError(f"temperature is {config.temperature}, but it must be at least 0")
    if not 0 < config.top_p <= 1:
        raise RunError(f"top_p is {config.top_p}, but it must be above 0 and at most 1")
    ranks = engine_ranks.start(config.device)
    _, autocast = engine_ranks.number_format(config.dtype, ranks.device)
    if config.init_from in ("resume", "auto"):
        model, tokenizer, _ = load_run(config.out_dir, ranks.device, config.which)
    else:
        model, tokenizer, _ = load_pretrained(config.init_from, config.tokenizer, ranks.device)
    prompts = [parse_prompt(text, tokenizer, model.config.vocab_size) for text in read_prompts(config)]
    for text, (ids, slots) in zip(read_prompts(config), prompts, strict=True):
        if slots and model.config.wte == "stock":
            raise RunError(
                f"the prompt {text!r} has a slot in double braces, but this arm has a learned table and no "
                "such slot: sample a kronecker arm, or write the word without braces"
            )
        if max(ids) >= model.config.vocab_size:
            raise RunError(
                f"the prompt has token id {max(ids)}, but the model knows only {model.config.vocab_size}: "
                "this is another tokenizer's prompt; see --tokenizer"
            )
    if config.compile:
        model.forward = torch.compile(model.forward)
    generator = torch.Generator(device=ranks.device).manual_seed(config.seed)
    options = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}

    # Prompts of one length go through the model together; different lengths would need padding, which
    # absolute positions do not forgive.
    jobs = [(i, s) for i in range(len(prompts)) for s in range(config.num_samples)]
    batches: dict = {}
    for job in jobs:
        batches.setdefault(job if config.stream else len(prompts[job[0]][0]), []).append(job)
    done: dict = {}
    for batch in batches.values():
        ids = torch.tensor([prompts[i][0] for i, _ in batch], device=ranks.device)
        overrides = {(row, p): b for row, (i, _) in enumerate(batch) for p, b in prompts[i][1].items()}
        texts = [shown(prompts[i], tokenizer) for i, _ in batch]
        new: list[list[int]] = [[] for _ in batch]
        if config.stream:
            print(texts[0], end="", flush=True)
        printed = ""
        with autocast:
            stream = model.generate(
                ids, config.max_new_tokens, generator=generator, byte_overrides=overrides, **options
            )
            for tokens in stream:
                for row, token in enumerate(tokens[:, 0].tolist()):
                    new[row].append(token)
                if config.stream:
                    text = tokenizer.decode(new[0])
                    if not text.endswith("\ufffd"):  # half a character waits for its other half
                        print(text[len(printed) :], end="", flush=True)
                        printed = text
        if config.stream:
            print("\n---------------")
        for job, text, tokens in zip(batch, texts, new, strict=True):
            done[job] = text + tokenizer.decode(tokens)
    if not config.stream:
        for job in jobs:
            print(done[job])
            print("---------------")


def shown(prompt: tuple[list[int], dict[int, bytes]], tokenizer) -> str:
    """The prompt as text, slots as their own words."""
    ids, slots = prompt
    text, start = "", 0
    for p in [*sorted(slots), len(ids)]:
        text += tokenizer.decode(ids[start:p]) + slots.get(p, b"").decode("utf-8", "replace")
        start = p + 1
    return text


def cli(argv: list[str]) -> None:
    config = configurator.load(argv, prog="sample.py", also=SampleConfig)
    with sentences():
        main(config)


if __name__ == "__main__":
    cli(sys.argv[1:])
