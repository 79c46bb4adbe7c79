"""Generation: does a model carry a misspelled or made-up word of the prompt into what it writes?

    python scripts/probes/generation.py --runs out/demo
    python scripts/probes/generation.py --runs out/demo --prompts generation_probe_results.json   the paper's prompts

Each prompt is continued in three conditions: as it is, misspelled, and with a made-up word in a slot in double
braces (`The {{zorblescope}} is used to`), which on a kronecker arm is one position embedded from the word's own
bytes (forced OOV); a stock arm has no such slot and reads the word in pieces. Sampled with top-p 0.9 at T 0.7,
and greedy beside it, 30 tokens each.

echo: a word that was misspelled or made up comes back in the continuation; as a control, in the plain condition
the same place's ordinary word. gibberish: some word comes back five times or more (this rule gives the published
flag of all 88 published records). Where no arm echoes, copying.py measures what there is.
"""

import re
from collections import Counter
from itertools import chain, product
from pathlib import Path
from typing import Literal

if not __package__:
    import by_path  # noqa: F401

import numpy as np
import torch

from data.records import Record, read_record
from engine.errors import RunError
from engine.prompts import SLOT, parse_prompt
from scripts.analysis import figures
from scripts.analysis.report import Table
from scripts.arguments import whole
from scripts.probes import common

CONDITIONS = ("normal", "misspelled", "forced_oov")
RATES = {  # key of a record: heading
    "echo": "echo",
    "gibberish_flag": "gibberish",
    "greedy_echo": "greedy echo",
    "greedy_gibberish_flag": "gibberish",
}
SAMPLED = {"temperature": 0.7, "top_p": 0.9}  # as the paper has it


class Prompt(Record):
    prompt_id: int
    normal: str | None = None
    misspelled: str | None = None
    forced_oov: str | None = None


class PublishedRecord(Record):
    prompt_id: int
    condition: Literal["normal", "misspelled", "forced_oov"]
    prompt_text: str
    oov_target: str | None = None


class Prompts(Record):
    """Our own file of prompts, or the published results."""

    prompts: list[Prompt] = []
    results: list[PublishedRecord] = []


def read_prompts(path: Path) -> list[dict]:
    """Prompts from our file or the published results, whose made-up words get their braces.

    A prompt is {"prompt_id", "condition", "text", "prompt_text": without braces, "targets", "oov_target"}.
    """
    content = read_record(path, Prompts, "prompts")
    texts = {(p.prompt_id, c): text for p in content.prompts for c in CONDITIONS if (text := getattr(p, c))}
    for r in content.results:
        text, target = r.prompt_text, r.oov_target
        if r.condition == "forced_oov" and target:  # the word stands in the text, in any case
            text = re.sub(re.escape(target), "{{" + target + "}}", text, count=1, flags=re.IGNORECASE)
        texts[r.prompt_id, r.condition] = text
    if not texts:
        raise RunError(f"{path} holds neither 'prompts' nor published 'results'")
    prompts = []
    for prompt_id, condition in sorted(texts, key=lambda x: (x[0], CONDITIONS.index(x[1]))):
        text = texts[prompt_id, condition]
        targets = slots = SLOT.findall(text)
        if condition != "forced_oov":
            other = "misspelled" if condition == "normal" else "normal"
            targets = changed_words(text, texts.get((prompt_id, other), ""))
        prompts.append(
            {
                "prompt_id": prompt_id,
                "condition": condition,
                "text": text,
                "prompt_text": text.replace("{{", "").replace("}}", ""),
                "targets": targets,
                "oov_target": slots[0] if slots else None,
            }
        )
    return prompts


def changed_words(mine: str, other: str) -> list[str]:
    """Words of mine that the other lacks, 3 letters or longer."""
    theirs = set(re.findall(r"\w+", other.lower()))
    return [w for w in re.findall(r"\w+", mine.lower()) if w not in theirs and len(w) > 2]


def judge(targets: list[str], completion: str) -> dict[str, bool]:
    """Does a target come back, and does some word come back five times or more?"""
    echo = any(t.lower() in completion.lower() for t in targets)
    often = max(Counter(completion.split()).values(), default=0)
    return {"echo": echo, "gibberish_flag": often >= 5}


@torch.no_grad()
def complete(model, prompts: list[tuple], args, greedy: bool) -> list[list[int]]:
    """Continuations (ids) of prompts [(ids, {position: bytes})]; prompts of one length go as one batch."""
    device, result = model.transformer.wpe.weight.device, [None] * len(prompts)
    drawn = {"temperature": 0} if greedy else SAMPLED
    for batch in common.by_length([ids for ids, _ in prompts], args.batch_size):
        overrides = {(row, p): b for row, i in enumerate(batch) for p, b in prompts[i][1].items()}
        steps = model.generate(
            torch.tensor([prompts[i][0] for i in batch], device=device),
            args.max_new_tokens,
            generator=torch.Generator(device=device).manual_seed(args.seed),
            byte_overrides=overrides or None,
            **drawn,
        )
        for i, tokens in zip(batch, torch.cat(list(steps), dim=1).tolist(), strict=True):
            result[i] = tokens
    return result


def measure(run, model, tokenizer, prompts: list[dict], args) -> list[dict]:
    """One record a prompt and sample, with the keys of the published results and ours behind them."""
    kronecker = model.config.wte == "kronecker"
    texts = [p["text" if kronecker else "prompt_text"] for p in prompts]
    encoded = [parse_prompt(text, tokenizer, model.config.vocab_size) for text in texts]
    greedy = complete(model, encoded, args, True)
    sampled = complete(model, encoded * args.samples, args, False)
    settings, records = SAMPLED | {"max_new_tokens": args.max_new_tokens, "seed": args.seed}, []
    for i, (p, (ids, _)) in enumerate(zip(prompts, encoded, strict=True)):
        greedy_text = tokenizer.decode(greedy[i])
        of_prompt = {k: v for k, v in p.items() if k != "text"} | {
            "arm": run.arm,
            "run_seed": run.seed,
            "bpe_oov_equivalence_flag": p["condition"] == "forced_oov" and not kronecker,
            "input_token_count": len(ids),
            "input_tokens": ids,
            "settings": settings,
            "greedy_completion": greedy_text,
            **{f"greedy_{k}": x for k, x in judge(p["targets"], greedy_text).items()},
        }
        for k, tokens in enumerate(sampled[i :: len(prompts)]):
            text = tokenizer.decode(tokens)
            of_sample = {"sample": k, "completion": text, "completion_tokens": tokens}
            records.append(of_prompt | of_sample | judge(p["targets"], text))
    return records


def rates(by_run: dict, baseline: str) -> dict:
    """{condition: {key of RATES: {arm: over seeds}}} of the conditions that the prompts have."""
    found = {}
    for condition, key in product(CONDITIONS, RATES):

        def mean(records, condition=condition, key=key) -> float | None:
            values = [r[key] for r in records if r["condition"] == condition]
            return float(np.mean(values)) if values else None

        found.setdefault(condition, {})[key] = common.over_seeds(common.each(by_run, mean), baseline)
    return {c: by_rate for c, by_rate in found.items() if by_rate["echo"][baseline]}


def make_tables(found: dict, baseline: str, number: dict) -> list[Table]:
    rows = []
    for condition, by_rate in found.items():
        for arm, echo in by_rate["echo"].items():
            cells = [common.cell(by_rate[k][arm], 1, 100) for k in RATES]
            cells.append(common.interval_cell(echo["difference"], 1, 100))
            rows.append([condition, arm, number[condition], *cells])
    title = "Echo of the novel or misspelled word, in per cent of a run's continuations"
    header = ["condition", "arm", "of", *RATES.values(), f"echo less {baseline}'s"]
    note = (
        "Mean ± SD over seeds; last column: paired over seeds, 95%. normal: the ordinary word of the same "
        "place, as a control. forced_oov: one position made from bytes on kronecker arms, pieces on stock arms."
    )
    return [Table(title, header, rows, left=2, note=note)]


def draw(found: dict, arms):
    panels = []
    for key, title in (("echo", "Echo (%)"), ("gibberish_flag", "Gibberish (%)")):
        of = {a: [[100 * v for v in by[key][a]["by_seed"].values()] for by in found.values()] for a in arms}
        panels.append((title, of))
    figure = figures.dot_figure([c.replace("_", " ") for c in found], panels)
    for ax in figure.axes:
        ax.set_xlim(-1, max(5, ax.get_xlim()[1]))  # where nothing comes back, 0 is the left end all the same
    return figure


def examples(by_run: dict) -> list[dict]:
    """A few continuations as blocks of the page: the first run of each arm, the first sample."""
    firsts = [r for mine in by_run.values() for r in mine[min(mine)] if r["sample"] == 0]
    with_slot = {r["prompt_id"] for r in firsts if r["condition"] == "forced_oov"}
    wanted = sorted(with_slot or {r["prompt_id"] for r in firsts})[:4]
    quotes = []
    for prompt_id, condition in product(wanted, CONDITIONS):
        for r in firsts:
            if (r["prompt_id"], r["condition"]) == (prompt_id, condition):
                what = f"{r['prompt_text']} ({condition.replace('_', ' ')}, {r['arm']})"
                quotes.append([what, r["completion"]])
    return [{"details": "Some continuations", "blocks": [{"quotes": quotes}]}]


def arguments(add) -> None:
    add("--prompts", default=str(common.DATA / "generation_prompts.json"), help="prompts (default: our 20)")
    add("--samples", type=whole(1, 10_000), default=4, help="sampled continuations a prompt (%(default)s)")
    add("--max_new_tokens", type=whole(1, 100_000), default=30, help="tokens of a continuation (%(default)s)")
    add("--batch_size", type=whole(1), default=256, help="continuations at a time (%(default)s)")


def probe(args) -> common.Finding:
    prompts = read_prompts(Path(args.prompts))
    by_run, baseline = common.measure_runs(args, "generation", measure, prompts, args)
    found = rates(by_run, baseline)
    result = {
        "results": list(chain(*common.by_name(by_run).values())),
        "settings": SAMPLED | {k: getattr(args, k) for k in ("max_new_tokens", "samples", "seed")},
        "rates": found,
    }
    number = Counter(p["condition"] for p in prompts for _ in range(args.samples))
    return common.Finding(
        "generation", "Generation", 30, result, {},
        make_tables(found, baseline, number), draw(found, by_run), common.POINTS,
        "Does a misspelled or made-up word of the prompt come back in what the model writes?",
        examples(by_run),
    )  # fmt: skip


main = common.command(__doc__, __file__, probe, arguments)

if __name__ == "__main__":
    main()
