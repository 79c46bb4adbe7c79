"""What the probes share: which runs, how a model is asked, and how seeds' figures become a table's row."""

import sys
import time
from pathlib import Path

import torch

from data.files import write_json, write_text
from engine.errors import RunError
from sample import load_run
from scripts.analysis import figures, report, stats
from scripts.analysis.report import Table, arm_sort_key
from scripts.analysis.runs import Run, default_out, find_run_folders, load_folder
from scripts.arguments import device, whole
from scripts.provenance import provenance

DATA = Path(__file__).resolve().parent / "data"


def add_arguments(parser, need_runs: bool = True) -> None:
    """The arguments of every probe."""
    add = parser.add_argument
    add(
        "--runs",
        nargs="+",
        metavar="DIR",
        required=need_runs,
        help="run folders, or folders that hold runs (out/demo)",
    )
    add("--allow-unfinished", action="store_true", help="take unfinished runs as they stand")
    add("--out", help="folder whose compare/ gets the results (default: the first of --runs)")
    add("--baseline", help="arm to pair the others with (default: bpe_tied, else the first arm)")
    add("--which", default="latest", help="checkpoint: latest, best or a step (%(default)s)")
    add("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, mps (%(default)s)")
    add("--seed", type=whole(0), default=42, help="of sampling and resampling (%(default)s)")


def out_folder(args, fallback: str = "") -> Path:
    """--out, else the folder of the runs, else the fallback."""
    return Path(args.out or (default_out(args.runs) if args.runs else fallback))


def finished_runs(args, needs_checkpoint: bool = True) -> list[Run]:
    """Finished runs at or below --runs, by arm and seed; what is left out is said. RunError where none is left."""
    runs, seen = [], {}
    for path in find_run_folders(args.runs):
        run = load_folder(path)
        if needs_checkpoint and not (path / "latest").exists():
            progress(f"left out: {path} has no checkpoint yet")
            continue
        if run.state != "finished" and not args.allow_unfinished:  # a run of 30 steps would pass for its arm
            progress(f"left out: {path} ({run.state}); --allow-unfinished takes it in")
            continue
        other = seen.setdefault((run.arm, run.seed), path)
        if other != path:
            raise RunError(
                f"{other} and {path} are both arm {run.arm}, seed {run.seed}; give only one of them"
            )
        runs.append(run)
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


def each_model(runs: list[Run], args, what: str):
    """Load the runs one after another: yields (run, model, tokenizer, config) and says how long each took."""
    for number, run in enumerate(runs, 1):
        start = time.time()
        model, tokenizer, config = load(run.name, args)
        yield run, model, tokenizer, config
        progress(f"{what}: {number} of {len(runs)}, {run.arm} seed {run.seed}, {time.time() - start:.1f} s")


def measure_runs(args, what: str, measure) -> tuple[dict, list[str], str]:
    """({(arm, seed): measure(run, model, tokenizer, config)}, arms, baseline) of all runs at or below --runs."""
    by_run = {}
    for run, model, tokenizer, config in each_model(finished_runs(args), args, what):
        by_run[run.arm, run.seed] = measure(run, model, tokenizer, config)
    arms = sorted({arm for arm, _ in by_run}, key=arm_sort_key)
    return by_run, arms, pick_baseline(arms, args.baseline)


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


# ---------------------------------------------------------------------------------------------- figures over seeds


def over_seeds(values: dict, arms: list[str], baseline: str) -> dict:
    """Figures of runs to figures of arms: {(arm, seed): x} -> {arm: {"mean", "sd", ..., "difference"}}.

    "difference" is the arm minus the baseline, paired by seed, with its t interval (None for the baseline
    itself and where no seed is shared).
    """
    result = {}
    for arm in arms:
        mine = {s: x for (a, s), x in values.items() if a == arm and x is not None}
        if not mine:
            result[arm] = None
            continue
        entry = stats.interval(mine.values()) | {"by_seed": {str(s): x for s, x in mine.items()}}
        shared = [s for s in mine if values.get((baseline, s)) is not None] if arm != baseline else []
        entry["difference"] = (
            stats.interval(mine[s] - values[baseline, s] for s in shared) if shared else None
        )
        result[arm] = entry
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


def difference_cell(entry: dict | None, digits: int = 3, scale: float = 1.0) -> str:
    """Paired difference from the baseline with its 95% interval, for a table."""
    return interval_cell(entry and entry["difference"], digits, scale)


def interval_cell(d: dict | None, digits: int = 3, scale: float = 1.0) -> str:
    """Mean of a difference and the ends of its interval, for a table."""
    if not d:
        return ""
    text = f"{d['mean'] * scale:+.{digits}f}"
    if d["low"] is None:
        return text
    return f"{text} ({d['low'] * scale:+.{digits}f} to {d['high'] * scale:+.{digits}f})"


# ---------------------------------------------------------------------------------------------- asking a model


@torch.no_grad()
def last_states(model, prompts: list[list[int]], batch_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token logits (N, V) and output of ln_f at the last position (N, n_embd), fp32 on the CPU, of N prompts.

    Prompts of one length go together, so nothing is padded and nothing has to be masked; a prompt longer than
    the context keeps its end.
    """
    block_size = model.config.block_size
    prompts = [p[-block_size:] for p in prompts]
    if not all(prompts):
        raise RunError("a prompt has no tokens at all; give every prompt some text")
    device = model.transformer.wpe.weight.device
    seen = {}
    hook = model.transformer.ln_f.register_forward_hook(lambda module, inputs, output: seen.update(x=output))
    logits, hidden = [None] * len(prompts), [None] * len(prompts)
    try:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        while order:
            length = len(prompts[order[0]])
            batch = [i for i in order[:batch_size] if len(prompts[i]) == length]
            order = order[len(batch) :]
            out, _ = model(torch.tensor([prompts[i] for i in batch], device=device))
            for row, i in enumerate(batch):
                logits[i], hidden[i] = out[row, -1].float().cpu(), seen["x"][row, -1].float().cpu()
    finally:
        hook.remove()
    return torch.stack(logits), torch.stack(hidden)


@torch.no_grad()
def block_states(model, ids_BxT: torch.Tensor, blocks: int | None = None) -> list[torch.Tensor]:
    """[embedding without position, after block 0, after block 1, ...], each (B, T, n_embd) fp32 on the CPU."""
    parts = model.transformer
    ids_BxT = ids_BxT.to(parts.wpe.weight.device)
    x = parts.wte(ids_BxT)
    states = [x.float().cpu()]
    x = x + parts.wpe.weight[: ids_BxT.shape[1]]
    for block in list(parts.h)[:blocks]:
        x = block(x)
        states.append(x.float().cpu())
    return states


# ---------------------------------------------------------------------------------------------- results


def as_markdown(title: str, intro: list[str], tables: list[Table], made: dict, name: str) -> str:
    """The probe's tables as a page that can be kept beside its figure."""
    parts = [f"# {title}", *intro, *(t.markdown() for t in tables), f"![{title}]({name}.svg)"]
    commit = f", commit {made['commit']}" if made["commit"] else ""
    parts.append(f"`{made['command']}`{commit}, {made['machine']}, {made['date']}.")
    return "\n\n".join(parts) + "\n"


def finish(
    script: str,
    argv,
    out: Path,
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
) -> None:
    """Write the probe's JSON, tables, figure and section of the page; print the tables and where everything lies.

    script, argv: what ran (see provenance); order: place of the section; extra: further blocks of it.
    """
    intro = [intro] if isinstance(intro, str) else intro
    folder = out / "compare" / "probes"
    folder.mkdir(parents=True, exist_ok=True)
    made = provenance(script, argv) | {"settings": settings}
    write_json(folder / f"{name}.json", result | {"provenance": made})
    write_text(folder / f"{name}.md", as_markdown(title, intro, tables, made, name))
    figures.save(figure, folder / name)
    blocks = [{"text": intro}, *(t.block() for t in tables)]
    blocks += [{"figures": [f"probes/{name}.svg"], "caption": caption}, *extra]
    page = report.write_section(out, name, title, order, blocks)
    for t in tables:
        report.say("\n" + t.text())
    report.say(f"\nresults {folder / (name + '.json')}\nfigure  {folder / (name + '.png')}\nreport  {page}")
