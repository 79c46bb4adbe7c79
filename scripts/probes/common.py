"""What the probes share: which runs, with what provenance, and how seeds' figures become a table's row."""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from engine.errors import RunError
from scripts import compare
from scripts.analysis import report, stats

DATA = Path(__file__).resolve().parent / "data"


class ProbeError(RunError):
    """What is wrong, in one sentence for the person who asked."""


def add_arguments(parser, need_runs: bool = True) -> None:
    parser.add_argument(
        "--runs",
        nargs="+",
        metavar="DIR",
        required=need_runs,
        help="run folders, or folders that hold runs (out/demo)",
    )
    parser.add_argument("--allow-unfinished", action="store_true", help="take unfinished runs as they stand")
    parser.add_argument("--out", help="folder whose compare/ gets the results (default: the first of --runs)")
    parser.add_argument(
        "--baseline", help="arm to pair the others with (default: bpe_tied, else the first arm)"
    )
    parser.add_argument("--which", default="latest", help="checkpoint: latest, best or a step (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of sampling and resampling (%(default)s)")


def out_folder(args, fallback: str) -> Path:
    if args.out:
        return Path(args.out)
    return compare.default_out(args.runs) if args.runs else Path(fallback)


def find_runs(args) -> list[dict]:
    """Finished runs at or below --runs: [{"path", "arm", "seed"}], by arm and seed; what is left out is said."""
    paths = args.runs
    runs, seen = [], {}
    for path in compare.find_run_folders(paths):
        loaded = compare.load_folder(path)
        if not (path / "latest").exists():
            progress(f"left out: {path} has no checkpoint yet")
            continue
        if (
            loaded.state != "finished" and not args.allow_unfinished
        ):  # a run of 30 steps would pass for its arm
            progress(f"left out: {path} ({loaded.state}); --allow-unfinished takes it in")
            continue
        run = {"path": path, "arm": loaded.arm, "seed": loaded.seed}
        other = seen.setdefault((run["arm"], run["seed"]), path)
        if other != path:
            raise ProbeError(
                f"{other} and {path} are both arm {run['arm']}, seed {run['seed']}; give only one of them"
            )
        runs.append(run)
    if not runs:
        raise ProbeError(f"no finished run with a checkpoint at or below {', '.join(map(str, paths))}")
    return sorted(runs, key=lambda r: (*report.arm_sort_key(r["arm"]), r["seed"]))


def load(run: dict, args):
    """(model, tokenizer, config) of one run, in eval mode on the device asked for."""
    from sample import load_run

    model, tokenizer, config = require_finite(
        load_run(run["path"], device=args.device, which=args.which), run["path"]
    )
    if torch.device(args.device).type == "cpu" and model.config.n_embd <= 256:
        # Matmuls this small gain nothing from a second thread, and beside other work on the machine threads
        # that wait for each other made a probe twenty times slower.
        torch.set_num_threads(1)
    return model, tokenizer, config


def require_finite(loaded: tuple, path) -> tuple:
    """What was loaded, unless its weights hold NaN or infinity: no figure of such a model means anything."""
    bad = next((n for n, p in loaded[0].named_parameters() if not p.isfinite().all()), None)
    if bad is not None:
        raise RunError(f"{path}: {bad} is not finite; the run diverged, choose an earlier step with --which")
    return loaded


def each_model(runs, args, what: str):
    """Load the runs one after another: yields (run, model, tokenizer, config) and says how long each took."""
    for number, run in enumerate(runs, 1):
        start = time.time()
        model, tokenizer, config = load(run, args)
        yield run, model, tokenizer, config
        progress(
            f"{what}: {number} of {len(runs)}, {run['arm']} seed {run['seed']}, {time.time() - start:.1f} s"
        )


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def pick_baseline(arms, wanted: str | None) -> str:
    if wanted is None:
        return "bpe_tied" if "bpe_tied" in arms else arms[0]
    if wanted not in arms:
        raise ProbeError(f"no run of the baseline {wanted}; there are {', '.join(arms)}")
    return wanted


def over_seeds(values: dict, arms, baseline: str) -> dict:
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


def difference_cell(entry: dict | None, digits: int = 3, scale: float = 1.0) -> str:
    """Paired difference from the baseline with its 95% interval, for a table."""
    d = entry and entry["difference"]
    if not d:
        return ""
    text = f"{d['mean'] * scale:+.{digits}f}"
    if d["low"] is None:
        return text
    return f"{text} ({d['low'] * scale:+.{digits}f} to {d['high'] * scale:+.{digits}f})"


@torch.no_grad()
def last_states(model, prompts: list[list[int]], batch_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token logits (N, V) and output of ln_f at the last position (N, n_embd), fp32 on the CPU, of N prompts.

    Prompts of one length go together, so nothing is padded and nothing has to be masked; a prompt longer than
    the context keeps its end.
    """
    block_size = model.config.block_size
    prompts = [p[-block_size:] for p in prompts]
    if not all(prompts):
        raise ProbeError("a prompt has no tokens at all; give every prompt some text")
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


def dot_figure(names: list[str], panels: list[tuple[str, dict]]):
    """A row a name, a panel each (title, {arm: [[values of the runs] a row]}): large points are their means."""
    arms = list(panels[0][1])
    with report.plt.rc_context(report.FIGURE_STYLE):
        size = (10.0, (0.24 + 0.1 * len(arms)) * len(names) + 1.5)
        figure, axes = report.plt.subplots(1, len(panels), figsize=size, sharey=True)
        for ax, (title, by_arm) in zip(axes, panels, strict=True):
            for k, (arm, rows) in enumerate(by_arm.items()):
                colour = report.arm_style(arm, arms)["color"]
                y = np.arange(len(names)) + 0.6 / len(arms) * (k - (len(arms) - 1) / 2)
                for values, at in zip(rows, y, strict=True):
                    ax.plot(values, [at] * len(values), "o", color=colour, markersize=3, alpha=0.5)
                ax.plot(
                    [np.mean(v) if v else np.nan for v in rows], y, "o", color=colour, markersize=7, label=arm
                )
            ax.set_title(title)
            ax.grid(axis="y", visible=False)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms))
    return figure


def read_data(path, what: str) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise ProbeError(f"cannot read {what} from {path}: no such file") from None
    except ValueError as e:
        raise ProbeError(f"{path} is not valid JSON ({e})") from None


def provenance(argv, settings: dict | None = None) -> dict:
    """Command, commit, machine and date, which every figure under results/ has to name."""
    try:
        root = Path(__file__).resolve().parents[2]
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()
    except OSError:
        commit = ""
    return {
        "command": "python " + " ".join([relative(sys.argv[0]), *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit or None,
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "date": datetime.date.today().isoformat(),
        "settings": settings or {},
    }


def relative(path: str) -> str:
    root = Path(__file__).resolve().parents[2]
    full = Path(path).resolve()
    return str(full.relative_to(root)) if full.is_relative_to(root) else full.name


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def print_tables(tables: list[dict]) -> None:
    """Tables in compare.py's form, on the terminal."""
    for t in tables:
        report.say(f"\n{t['title']}\n\n{report.text_table(t['header'], t['rows'], t['left'])}")
        if t.get("note"):
            report.say(compare.textwrap.fill(t["note"], 108))


def tables_html(tables: list[dict]) -> str:
    return "".join(
        f"<h3>{report.html.escape(t['title'])}</h3>"
        + report.html_table(t["header"], t["rows"], t["left"])
        + (f"<p class=soft>{report.html.escape(t['note'])}</p>" if t.get("note") else "")
        for t in tables
    )


def as_markdown(title: str, intro: list[str], tables: list[dict], made: dict, name: str) -> str:
    """The probe's tables as a page that can be kept beside its figure."""
    parts = [f"# {title}", *intro]
    for t in tables:
        parts += [f"## {t['title']}", report.md_table(t["header"], t["rows"], t["left"]), t.get("note") or ""]
    parts.append(f"![{title}]({name}.svg)")
    commit = f", commit {made['commit']}" if made["commit"] else ""
    parts.append(f"`{made['command']}`{commit}, {made['machine']}, {made['date']}.")
    return "\n\n".join(p for p in parts if p) + "\n"


def finish(
    out: Path,
    name: str,
    title: str,
    order: int,
    result: dict,
    tables: list[dict],
    figure,
    caption: str,
    intro: list[str] | None = None,
    extra_html: str = "",
) -> None:
    """Write the probe's JSON, figure and section of the page; print its tables and where everything lies."""
    folder = out / "compare" / "probes"
    report.write_json(folder / f"{name}.json", result)
    report.write_atomic(
        folder / f"{name}.md", as_markdown(title, intro or [], tables, result["provenance"], name)
    )
    body = report.paragraphs(*(intro or [])) + tables_html(tables)
    if figure is not None:
        body += report.figure_html(report.save_figure(figure, folder / name), caption)
    page = report.write_section(out, name, title, order, body + extra_html)
    print_tables(tables)
    report.say(
        f"\nresults {folder / (name + '.json')}" + (f"\nfigure  {folder / (name + '.png')}" if figure else "")
    )
    report.say(f"report  {page}")
