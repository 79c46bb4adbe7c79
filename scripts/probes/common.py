"""What the probes share: which runs, how a model is asked, and how seeds' figures become a table's row."""

import sys
import time
from itertools import groupby
from pathlib import Path

import torch

from data.files import write_json, write_text
from engine.errors import RunError
from sample import load_run
from scripts.analysis import figures, report, stats
from scripts.analysis.report import Table, arm_sort_key, arms_of
from scripts.analysis.runs import Run, default_out, find_run_folders, load_folder, refuse_twins
from scripts.arguments import Parser, device, whole
from scripts.provenance import provenance

DATA = Path(__file__).resolve().parent / "data"


def parser(doc: str, need_runs: bool = True) -> Parser:
    """The command line of a probe, with the arguments that all have; doc: its module's docstring."""
    made = Parser(doc)
    add, runs = made.add_argument, "run folders, or folders that hold runs (out/demo)"
    add("--runs", nargs="+", metavar="DIR", required=need_runs, help=runs)
    add("--allow-unfinished", action="store_true", help="take unfinished runs as they stand")
    add("--out", help="folder whose compare/ gets the results (default: the first of --runs)")
    add("--baseline", help="arm to pair the others with (default: bpe_tied, else the first arm)")
    add("--which", default="latest", help="checkpoint: latest, best or a step (%(default)s)")
    add("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, mps (%(default)s)")
    add("--seed", type=whole(0), default=42, help="of sampling and resampling (%(default)s)")
    return made


def out_folder(args) -> Path:
    """--out, else the folder of the runs."""
    return Path(args.out or default_out(args.runs))


def finished_runs(args, needs_checkpoint: bool = True) -> list[Run]:
    """Finished runs at or below --runs, by arm and seed; what is left out is said. RunError where none is left."""
    runs = []
    for run in map(load_folder, find_run_folders(args.runs)):
        if needs_checkpoint and not (Path(run.name) / "latest").exists():
            progress(f"left out: {run.name} has no checkpoint yet")
        elif run.state != "finished" and not args.allow_unfinished:
            # a run of 30 steps would pass for its arm
            progress(f"left out: {run.name} ({run.state}); --allow-unfinished takes it in")
        else:
            runs.append(run)
    refuse_twins(runs)
    if not runs:
        what = "no finished run with a checkpoint" if needs_checkpoint else "no finished run"
        raise RunError(f"{what} at or below {', '.join(map(str, args.runs))}")
    return sorted(runs, key=lambda r: (*arm_sort_key(r.arm), r.seed))


def load(path, args):
    """(model, tokenizer, config) of a run's folder, in eval mode on the device asked for."""
    model, tokenizer, config = load_run(Path(path), device=args.device, which=args.which)
    if torch.device(args.device).type == "cpu" and model.config.n_embd <= 256:
        # Matmuls this small gain nothing from a second thread, and beside other work on the machine threads
        # that wait for each other made a probe twenty times slower.
        torch.set_num_threads(1)
    return model, tokenizer, config


def measure_runs(args, what: str, measure) -> tuple[dict, list[str], str]:
    """({(arm, seed): measure(run, model, tokenizer, config)}, arms, baseline) of all runs at or below --runs."""
    runs, by_run = finished_runs(args), {}
    arms = arms_of(runs)
    baseline = pick_baseline(arms, args.baseline)
    for number, run in enumerate(runs, 1):
        start = time.time()
        by_run[run.arm, run.seed] = measure(run, *load(run.name, args))
        progress(f"{what}: {number} of {len(runs)}, {run.arm} seed {run.seed}, {time.time() - start:.1f} s")
    return by_run, arms, baseline


def progress(message: str) -> None:
    """Say where the work stands, beside the results."""
    print(report.visible(message), file=sys.stderr, flush=True)


def pick_baseline(arms: list[str], wanted: str | None) -> str:
    """The arm that others are paired with: the one asked for, else bpe_tied, else the first."""
    if wanted is None:
        return "bpe_tied" if "bpe_tied" in arms else arms[0]
    if wanted not in arms:
        raise RunError(f"no run of the baseline {wanted}; there are {', '.join(arms)}")
    return wanted


def pairs_to_compare(arms: list[str], baseline: str) -> list[tuple[str, str]]:
    """(arm, over): every arm over the baseline, and kronecker over the table whose head is untied, as its own is."""
    wanted = [(arm, baseline) for arm in arms if arm != baseline]
    fair = ("kronecker", "bpe_untied")
    return wanted + [fair] * (set(fair) <= set(arms) and baseline != "bpe_untied")


# ---------------------------------------------------------------------------------------------- figures over seeds


def over_seeds(values: dict, arms: list[str], baseline: str) -> dict:
    """Figures of runs to figures of arms: {(arm, seed): x} -> {arm: {"mean", "sd", ..., "difference"}}.

    "difference" is the arm minus the baseline, paired by seed, with its t interval (None for the baseline
    itself and where no seed is shared). An arm without figures is None.
    """
    by_arm = {arm: {s: x for (a, s), x in values.items() if a == arm and x is not None} for arm in arms}
    result = {}
    for arm, mine in by_arm.items():
        paired = [mine[s] - by_arm[baseline][s] for s in mine if s in by_arm[baseline]]
        more = {
            "by_seed": {str(s): x for s, x in mine.items()},
            "difference": stats.interval(paired) if paired and arm != baseline else None,
        }
        result[arm] = stats.interval(mine.values()) | more if mine else None
    return result


def cell(entry: dict | None, digits: int = 3, scale: float = 1.0) -> str:
    """mean ± SD over seeds, for a table."""
    if entry is None:
        return "-"
    mean = f"{entry['mean'] * scale:.{digits}f}"
    return mean if entry["sd"] is None else f"{mean} ±{entry['sd'] * scale:.{digits}f}"


def arm_cell(values: dict, arm: str, digits: int = 3, scale: float = 1.0) -> str:
    """mean ± SD of one arm over its seeds, from {(arm, seed): x}."""
    return cell(over_seeds(values, [arm], arm)[arm], digits, scale)


def interval_cell(d: dict | None, digits: int = 3, scale: float = 1.0) -> str:
    """Mean of a difference and the ends of its interval, for a table."""
    if not d:
        return ""
    mean, *ends = (None if d[k] is None else f"{d[k] * scale:+.{digits}f}" for k in ("mean", "low", "high"))
    return mean if None in ends else f"{mean} ({ends[0]} to {ends[1]})"


# ---------------------------------------------------------------------------------------------- asking a model


def by_length(prompts: list[list[int]], batch_size: int):
    """Indices of the prompts in batches of one length, the shortest first: nothing to pad, and nothing to mask."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, group in groupby(order, key=lambda i: len(prompts[i])):
        members = list(group)
        yield from (members[start : start + batch_size] for start in range(0, len(members), batch_size))


@torch.no_grad()
def last_states(model, prompts: list[list[int]], batch_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token logits (N, V) and what the head multiplies (N, n_embd) at the last position, fp32 on the CPU.

    A prompt longer than the context keeps its end.
    """
    prompts = [p[-model.config.block_size :] for p in prompts]
    if not all(prompts):
        raise RunError("a prompt has no tokens at all; give every prompt some text")
    logits, hidden = [None] * len(prompts), [None] * len(prompts)
    for batch in by_length(prompts, batch_size):
        ids = torch.tensor([prompts[i] for i in batch], device=model.transformer.wpe.weight.device)
        x, weight = model.hidden(ids)
        scores = torch.nn.functional.linear(x[:, -1:], weight)
        for row, i in enumerate(batch):
            logits[i], hidden[i] = scores[row, -1].float().cpu(), x[row, -1].float().cpu()
    return torch.stack(logits), torch.stack(hidden)


@torch.no_grad()
def block_states(model, ids_BxT: torch.Tensor, blocks: int | None = None) -> list[torch.Tensor]:
    """[embedding without position, after block 0, after block 1, ...], each (B, T, n_embd) fp32 on the CPU."""
    parts = model.transformer
    ids_BxT = ids_BxT.to(parts.wpe.weight.device)
    x = model.embed(ids_BxT)[1]
    states = [x.float().cpu()]
    x = x + parts.wpe.weight[: ids_BxT.shape[1]]
    for block in parts.h[:blocks]:
        x = block(x)
        states.append(x.float().cpu())
    return states


# ---------------------------------------------------------------------------------------------- results


def finish(
    script: str,
    argv,
    args,
    name: str,
    title: str,
    order: int,
    result: dict,
    settings: dict,
    tables: list[Table],
    figure,
    caption: str,
    intro: str | list[str],
    extra: list[dict] = (),
    items: dict | list | None = None,
) -> None:
    """Write the probe's JSON, tables, figure and section of the page; print the tables and where everything lies.

    script, argv: what ran (see provenance); order: place of the section; extra: further blocks of it; items: what
    is too much for the JSON, for a file beside it.
    """
    intro, out = [intro] if isinstance(intro, str) else intro, out_folder(args)
    folder = out / "compare" / "probes"
    folder.mkdir(parents=True, exist_ok=True)
    made = provenance(script, argv) | {"settings": settings}
    write_json(folder / f"{name}.json", result | {"provenance": made})
    if items:
        write_json(folder / f"{name}_items.json", items)
    commit = f", commit {made['commit']}" if made["commit"] else ""
    parts = [f"# {title}", *intro, *(t.markdown() for t in tables), f"![{title}]({name}.svg)"]
    parts.append(f"`{made['command']}`{commit}, {made['machine']}, {made['date']}.")
    write_text(folder / f"{name}.md", "\n\n".join(parts) + "\n")
    figures.save(figure, folder / name)
    blocks = [{"text": intro}, *(t.block() for t in tables)]
    blocks += [{"figures": [f"probes/{name}.svg"], "caption": caption}, *extra]
    page = report.write_section(out, name, title, order, blocks)
    for t in tables:
        report.say("\n" + t.text())
    report.say(f"\nresults {folder / (name + '.json')}\nfigure  {folder / (name + '.png')}\nreport  {page}")
