"""Generation: does a model carry a misspelled or made-up word of the prompt into what it writes?

    python scripts/probes/generation.py --runs out/demo
    python scripts/probes/generation.py --runs out/demo --prompts generation_probe_results.json   the paper's prompts

Each prompt is continued in three conditions: as it is, misspelled, and with a made-up word in a slot in double
braces (`The {{zorblescope}} is used to`), which on a kronecker arm is one position embedded from the word's own
bytes (forced OOV); a stock arm has no such slot and reads the word in pieces. Sampled with top-p 0.9 at T 0.7,
and greedy beside it, 30 tokens each.

echo: a word that was misspelled or made up comes back in the continuation; as a control, in the plain condition
the same place's ordinary word. partial: a piece of it does, of at least 4 letters and 60% of it. gibberish: some
word comes back five times or more (this rule gives the published flag of all 88 published records).
"""

import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Literal

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch

from data.records import Record, read_record
from engine.errors import RunError, sentences
from engine.prompts import SLOT, parse_prompt
from scripts.analysis import figures, report
from scripts.analysis.report import Table
from scripts.arguments import Parser, number, whole
from scripts.probes import common

CONDITIONS = ("normal", "misspelled", "forced_oov")
RATES = {"echo": "echo", "partial_echo": "partial", "gibberish_flag": "gibberish"}


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
    arm: str
    completion: str
    gibberish_flag: bool


class Prompts(Record):
    """Our own file of prompts, or the published results."""

    prompts: list[Prompt] | None = None
    results: list[PublishedRecord] | None = None  # what the paper published, instead


def read_prompts(path: Path) -> list[dict]:
    """Prompts as [{"prompt_id", "condition", "text", "targets", "oov_target"}], from our file or the published one."""
    content = read_record(path, Prompts, "prompts").model_dump()
    if content["prompts"] is not None:
        found = {(p["prompt_id"], c): p[c] for p in content["prompts"] for c in CONDITIONS if p.get(c)}
    elif content["results"] is not None:
        found = {}
        for r in content["results"]:
            text, target = r["prompt_text"], r.get("oov_target")
            if (
                r["condition"] == "forced_oov" and target
            ):  # published: the word stands in the text, in any case
                text = re.sub(re.escape(target), "{{" + target + "}}", text, count=1, flags=re.IGNORECASE)
            found[r["prompt_id"], r["condition"]] = text
    else:
        raise RunError(f"{path} holds neither 'prompts' nor published 'results'")
    prompts = []
    for (prompt_id, condition), text in sorted(
        found.items(), key=lambda x: (x[0][0], CONDITIONS.index(x[0][1]))
    ):
        normal, wrong = found.get((prompt_id, "normal"), ""), found.get((prompt_id, "misspelled"), "")
        slots = SLOT.findall(text)
        if condition == "forced_oov":
            targets = slots
        else:
            ours, other = (normal, wrong) if condition == "normal" else (wrong, normal)
            targets = changed_words(ours, other)
        prompts.append(
            {
                "prompt_id": prompt_id,
                "condition": condition,
                "text": text,
                "targets": targets,
                "oov_target": slots[0] if slots else None,
            }
        )
    if not prompts:
        raise RunError(f"{path} holds no prompt")
    return prompts


def changed_words(mine: str, other: str) -> list[str]:
    """Words of mine that the other lacks, 3 letters or longer."""
    theirs = set(re.findall(r"\w+", other.lower()))
    return [w for w in re.findall(r"\w+", mine.lower()) if w not in theirs and len(w) > 2]


def is_gibberish(completion: str) -> bool:
    """Some word comes back five times or more."""
    return max(Counter(completion.split()).values(), default=0) >= 5


def echoes(targets: list[str], completion: str) -> tuple[bool, bool]:
    """(a target comes back whole, a target comes back at least in part)."""
    low = completion.lower()
    whole = any(t.lower() in low for t in targets)
    part = whole or any(longest_common(t.lower(), low) >= max(4, math.ceil(0.6 * len(t))) for t in targets)
    return whole, part


def longest_common(a: str, b: str) -> int:
    """Length of the longest substring that two strings share."""
    best, row = 0, [0] * (len(b) + 1)
    for x in a:
        old, row = row, [0] * (len(b) + 1)
        for j, y in enumerate(b, 1):
            if x == y:
                row[j] = old[j - 1] + 1
                best = max(best, row[j])
    return best


@torch.no_grad()
def complete(model, prompts: list[tuple], args, greedy: bool) -> list[list[int]]:
    """Continuations (ids) of prompts [(ids, {position: bytes})]; prompts of one length go as one batch."""
    device = model.transformer.wpe.weight.device
    result = [None] * len(prompts)
    by_length = {}
    for i, (ids, _) in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(i)
    for _, members in sorted(by_length.items()):
        for start in range(0, len(members), args.batch_size):
            batch = members[start : start + args.batch_size]
            overrides = {(row, p): b for row, i in enumerate(batch) for p, b in prompts[i][1].items()}
            generator = torch.Generator(device=device).manual_seed(args.seed)
            idx = torch.tensor([prompts[i][0] for i in batch], device=device)
            steps = model.generate(
                idx,
                args.max_new_tokens,
                temperature=0 if greedy else args.temperature,
                top_p=None if greedy else args.top_p,
                generator=generator,
                byte_overrides=overrides or None,
            )
            tokens = torch.cat(list(steps), dim=1).tolist()
            for row, i in enumerate(batch):
                result[i] = tokens[row]
    return result


def measure(model, tokenizer, run, prompts: list[dict], args) -> list[dict]:
    """One record a prompt and sample, with the keys of the published results and ours behind them."""
    kronecker = model.config.wte == "kronecker"
    encoded = []
    for p in prompts:
        text = (
            p["text"]
            if kronecker
            else SLOT.sub(lambda m: m.group().replace("{{", "").replace("}}", ""), p["text"])
        )
        ids, overrides = parse_prompt(text, tokenizer, model.config.vocab_size)
        encoded.append((ids, overrides))
    greedy = complete(model, encoded, args, True)
    sampled = complete(model, encoded * args.samples, args, False)
    samples = [sampled[k * len(encoded) : (k + 1) * len(encoded)] for k in range(args.samples)]
    settings = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
    }
    records = []
    for i, p in enumerate(prompts):
        greedy_text = tokenizer.decode(greedy[i])
        greedy_whole, greedy_part = echoes(p["targets"], greedy_text)
        for k in range(args.samples):
            text = tokenizer.decode(samples[k][i])
            whole, part = echoes(p["targets"], text)
            records.append(
                {
                    "prompt_id": p["prompt_id"],
                    "prompt_text": p["text"].replace("{{", "").replace("}}", ""),
                    "condition": p["condition"],
                    "arm": run.arm,
                    "oov_target": p["oov_target"],
                    "bpe_oov_equivalence_flag": p["condition"] == "forced_oov" and not kronecker,
                    "input_token_count": len(encoded[i][0]),
                    "input_tokens": encoded[i][0],
                    "completion": text,
                    "completion_tokens": samples[k][i],
                    "greedy_completion": greedy_text,
                    "gibberish_flag": is_gibberish(text),
                    "settings": settings,
                    "run_seed": run.seed,
                    "sample": k,
                    "targets": p["targets"],
                    "echo": whole,
                    "partial_echo": part,
                    "greedy_echo": greedy_whole,
                    "greedy_partial_echo": greedy_part,
                    "greedy_gibberish": is_gibberish(greedy_text),
                }
            )
    return records


def sanity(model, tokenizer) -> dict:
    """What a run finds likeliest after "The"."""
    logits, _ = common.last_states(model, [tokenizer.encode("The")])
    return {"top5_after_The": [tokenizer.decode([i]) for i in logits[0].topk(5).indices.tolist()]}


def rates(records: list[dict], arms, baseline: str) -> dict:
    """{condition: {rate: {arm: over seeds}}}, of sampled continuations and (greedy_...) greedy ones."""
    found = {}
    for condition in dict.fromkeys(r["condition"] for r in records):
        mine = [r for r in records if r["condition"] == condition]
        seeds = {(r["arm"], r["run_seed"]) for r in mine}
        found[condition] = {
            key: common.over_seeds(
                {
                    run: float(np.mean([r[key] for r in mine if (r["arm"], r["run_seed"]) == run]))
                    for run in sorted(seeds)
                },
                arms,
                baseline,
            )
            for key in (*RATES, "greedy_echo", "greedy_partial_echo", "greedy_gibberish")
        }
    return found


def published_rates(path: Path) -> dict:
    """The same rates of the published continuations: {condition: {arm: {"echo", "partial_echo", ...}}}."""
    content = read_record(path, Prompts, "prompts").model_dump()
    if content["results"] is None:
        return {}
    targets = {(p["prompt_id"], p["condition"]): p["targets"] for p in read_prompts(path)}
    found = {}
    for r in content["results"]:
        whole, part = echoes(targets[r["prompt_id"], r["condition"]], r["completion"])
        cell = found.setdefault(r["condition"], {}).setdefault(r["arm"], {k: [] for k in RATES})
        for key, value in (("echo", whole), ("partial_echo", part), ("gibberish_flag", r["gibberish_flag"])):
            cell[key].append(value)
    return {
        c: {a: {k: float(np.mean(v)) for k, v in x.items()} for a, x in arms.items()}
        for c, arms in found.items()
    }


def make_tables(found: dict, arms: list[str], baseline: str, published: dict, n: int) -> list[Table]:
    """Echo and gibberish in per cent, by condition and arm."""
    rows = []
    for condition, by_rate in found.items():
        for arm in arms:
            if by_rate["echo"][arm] is None:
                continue
            keys = (*RATES, "greedy_echo", "greedy_gibberish")
            cells = [common.cell(by_rate[k][arm], 1, 100) for k in keys]
            less = common.difference_cell(by_rate["partial_echo"][arm], 1, 100)
            rows.append([condition, arm, *cells, less])
        for arm, cell in published.get(condition, {}).items():
            rows.append([condition, f"paper: {arm}", *(f"{100 * cell[k]:.1f}" for k in RATES), "-", "-", ""])
    header = ["condition", "arm", "echo", "partial", "gibberish", "greedy echo", "gibberish"]
    return [
        Table(
            f"Echo of the novel or misspelled word, in per cent ({n} continuations a condition and run)",
            [*header, f"partial less {baseline}'s"],
            rows,
            left=2,
            note="Mean ± SD over seeds; last column: paired over seeds, 95%. normal: the ordinary word of the same "
            "place, as a control. forced_oov: one position made from bytes on kronecker arms, pieces on stock arms.",
        )
    ]


def draw(found: dict, arms):
    """Echo and gibberish as bars by condition, seeds as points."""
    with figures.plt.rc_context(figures.STYLE):
        figure, axes = figures.plt.subplots(1, 2, figsize=(10.0, 3.6))
        for ax, key, title in (
            (axes[0], "partial_echo", "Echo, whole or in part (%)"),
            (axes[1], "gibberish_flag", "Gibberish (%)"),
        ):
            for k, arm in enumerate(arms):
                x = np.arange(len(found)) + 0.8 / len(arms) * (k - (len(arms) - 1) / 2)
                entries = [by_rate[key][arm] for by_rate in found.values()]
                colour = report.arm_style(arm, arms)["color"]
                ax.bar(
                    x,
                    [100 * e["mean"] if e else 0 for e in entries],
                    0.74 / len(arms),
                    color=colour,
                    label=figures.label(arm),
                )
                for xx, e in zip(x, entries, strict=True):
                    points = [100 * v for v in e["by_seed"].values()] if e else []
                    ax.plot([xx] * len(points), points, ".", color=report.INK, markersize=4)
            ax.set_xticks(range(len(found)), [c.replace("_", " ") for c in found])
            ax.grid(axis="x", visible=False)
            ax.set_title(title)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms))
    return figure


def examples(records: list[dict], arms, count: int = 4) -> list[dict]:
    """A few continuations as blocks of the page: the first run of each arm, the first sample."""
    first = {a: min(r["run_seed"] for r in records if r["arm"] == a) for a in arms}
    with_slot = {r["prompt_id"] for r in records if r["condition"] == "forced_oov"}
    wanted = sorted(with_slot or {r["prompt_id"] for r in records})[:count]
    shown = [
        r
        for r in records
        if r["prompt_id"] in wanted and r["sample"] == 0 and r["run_seed"] == first[r["arm"]]
    ]
    shown.sort(key=lambda r: (r["prompt_id"], CONDITIONS.index(r["condition"])))
    quotes = [
        [f"{r['prompt_text']} ({r['condition'].replace('_', ' ')}, {r['arm']})", r["completion"]]
        for r in shown
    ]
    return [{"details": "Some continuations", "blocks": [{"quotes": quotes}]}]


def main(argv=None) -> None:
    parser = Parser(__doc__)
    common.add_arguments(parser)
    add = parser.add_argument
    add("--prompts", default=str(common.DATA / "generation_prompts.json"), help="prompts (default: our 20)")
    add("--samples", type=whole(1, 10_000), default=4, help="sampled continuations a prompt (%(default)s)")
    add("--max_new_tokens", type=whole(1, 100_000), default=30, help="tokens of a continuation (%(default)s)")
    add("--temperature", type=number(1e-4, 100), default=0.7, help="of sampling (%(default)s)")
    add("--top_p", type=number(0, 1, above=True), default=0.9, help="of sampling (%(default)s)")
    add("--batch_size", type=whole(1), default=256, help="continuations at a time (%(default)s)")
    args = parser.parse_args(argv)
    with sentences():
        prompts = read_prompts(Path(args.prompts))
        published = published_rates(Path(args.prompts))
        checks = {}

        def measure_one(run, model, tokenizer, _) -> list[dict]:
            checks[f"{run.arm}_s{run.seed}"] = sanity(model, tokenizer)
            return measure(model, tokenizer, run, prompts, args)

        by_run, arms, baseline = common.measure_runs(args, "generation", measure_one)
        records = [r for of_run in by_run.values() for r in of_run]
        found = rates(records, arms, baseline)
        result = {
            "results": records,
            "sanity": checks,
            "settings": records[0]["settings"] | {"samples": args.samples},
            "rates": found,
            "published_rates": published,
        }
        n = sum(p["condition"] == "normal" for p in prompts) * args.samples
        common.finish(
            __file__, argv, common.out_folder(args),
            "generation_published" if published else "generation",
            "Generation" + (", the paper's prompts" if published else ""), 30 + bool(published),
            result, {}, make_tables(found, arms, baseline, published, n), draw(found, arms),
            "Bars: mean over seeds of sampled continuations; points: seeds.",
            "Does a misspelled or made-up word of the prompt come back in what the model writes?",
            examples(records, arms),
        )  # fmt: skip


if __name__ == "__main__":
    main()
