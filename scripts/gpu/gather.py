"""The pieces of a GPU as one page: records of the runs, the comparison, and the benches' tables beside it.

OUT/runs/ gets each run's config.json, run.json and metrics.jsonl, a few kilobytes, so that runs of several machines
and days stand side by side and scripts/compare.py reads them like any others; it refuses what does not match.
"""

import shutil
import xml.etree.ElementTree
from pathlib import Path

from data.files import write_text
from data.records import read_record
from engine.errors import RunError
from scripts import provenance
from scripts.analysis import numbers, words
from scripts.analysis.report import arms_of, say
from scripts.analysis.runs import find_run_folders, load_folder
from scripts.compare import write_comparison

# What plan.json pins: runs that differ in one of these belong to another comparison.
PINNED = ("tokens", "tokens_per_step", "data_fingerprint", "val_sha256", "schedule_sha256")
RECORDS = ("config.json", "run.json", "metrics.jsonl")


def check_facts(name: str, run: dict, steps: int, plan: dict) -> None:
    """Refuse runs whose facts are not the plan's, naming the first that differs."""
    facts = run | {"tokens": run["tokens_per_step"] * steps}
    for key in PINNED:
        if key in plan and facts[key] != plan[key]:
            raise RunError(
                f"{name} do not belong to this comparison: {key} is {facts[key]}, in plan.json it is {plan[key]}; "
                "prepare the same data and leave the recipe as it is"
            )


def copy_records(source: Path, target: Path) -> None:
    """The small records of every run below source, under the run's own name below target."""
    for folder in find_run_folders([source]) if source.is_dir() else ():
        there = target / folder.name
        bodies = {load_folder(f).info["body_sha256"] for f in (folder, there) if f.is_dir()}
        if len(bodies) > 1:
            raise RunError(f"{there} and {folder} are two runs of one name: take one away")
        there.mkdir(parents=True, exist_ok=True)
        for name in RECORDS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, there / name)


def compared(folder: Path, out: Path, plan: dict, command: str) -> list[str]:
    """Compare the runs below folder into out/compare; the tables and claims as Markdown, nothing where no run is."""
    if not folder.is_dir():
        return []
    runs = [load_folder(f) for f in find_run_folders([folder])]
    for r in runs:
        check_facts(f"the records of {r.name}", r.info, r.max_iters, plan)
    arms = arms_of(runs)
    c = numbers.compare(runs, next((a for a in ("bpe_tied", "bpe_untied") if a in arms), arms[0]))
    write_comparison(c, runs, out, command)
    return [*(t.markdown() for t in words.tables(c)), *c["claims"], *words.all_notes(c)]


def tests_of(path: Path) -> list[str]:
    """What pytest's own record says."""
    if not path.is_file():
        return []
    suite = xml.etree.ElementTree.parse(path).getroot().find("testsuite")
    n = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"\n- {case.get('name')}" for case in suite.iter("testcase") if case.find("failure") is not None
    ]
    text = f"{n['tests']} tests, {n['failures'] + n['errors']} failed, {n['skipped']} skipped"
    return ["## Tests on the GPU", f"{text} ({suite.get('timestamp', '')[:10]}){''.join(failed)}."]


def gather(work: Path, out: Path, argv=None) -> None:
    """Write OUT/summary.md from the runs below WORK and everything that the benches left in OUT."""
    command = provenance.command(str(Path(__file__).with_name("recipe.py")), argv)
    plan = read_record(out / "plan.json", dict, "a plan") if (out / "plan.json").is_file() else {}
    for kind in ("runs", "sweep"):
        copy_records(work / kind, out / kind)
    parts = ["# GPT-2 124M on a GPU", *compared(out / "runs", out, plan, command)]
    swept = compared(out / "sweep", out / "sweep", {}, command)
    parts += ["# What moves the gap: short runs of their own schedule", *swept] if swept else []
    pages = [*sorted(out.glob("embedding_*.md")), out / "candidates.md", out / "bench_train.md"]
    parts += [path.read_text(encoding="utf-8").strip() for path in pages if path.is_file()]
    parts += tests_of(out / "gpu_tests.xml")
    if len(parts) == 1:
        raise RunError(f"there is nothing to gather in {work} and {out}: run some pieces first")
    probes = sorted((out / "compare" / "probes").glob("*.md"))
    links = "\n".join(f"- [{p.stem}](compare/probes/{p.name})" for p in probes)
    parts += ["## Probes", links] if probes else []
    parts.append(f"Gathered by `{command}` on {provenance.today()}.")
    write_text(out / "summary.md", "\n\n".join(parts) + "\n")
    say(f"written to {out / 'summary.md'}")
