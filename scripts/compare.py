"""Compare matched runs: who wins, by how much, how surely, and at what cost.

    python scripts/compare.py out/demo                      every run below out/demo
    python scripts/compare.py out/a out/b --baseline bpe_untied
    python scripts/compare.py --wandb entity/project        the same from wandb's servers
    python scripts/compare.py config/experiments/ladder.py  an experiment, from its records alone

Prints the comparison and writes OUT/compare/: comparison.json, comparison.md, curves.png, curves.svg and
report.html (one file, no outside resources). Runs that do not match are refused: a difference between arms
means something only when data, order, body at step 0, schedule and validation windows are the same. An experiment's report
goes beside its records: README.md, report.json and figures.

Signs: a gain is the other arm's loss minus this arm's, paired by seed; positive means this arm is better.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import scripts.by_path  # noqa: F401 - Ctrl-C

from data.files import write_json, write_text
from engine.errors import RunError, sentences
from scripts import experiment, provenance
from scripts.analysis import fair, fair_figures, fair_report, figures, numbers, report, words
from scripts.analysis.runs import default_out, find_run_folders, load_folder, load_wandb
from scripts.arguments import Parser


def compare_runs(args, made: dict) -> None:
    """Runs of folders or of wandb: comparison.json, comparison.md, the curves and the page in OUT/compare; printed, too."""
    if args.wandb:
        runs = load_wandb(args.wandb, args.wandb_group)
        out = args.out or Path("out") / args.wandb.replace("/", "_")
    else:
        runs = [load_folder(f) for f in find_run_folders(args.paths)]
        out = args.out or default_out(args.paths)
    c = numbers.compare(runs, args.baseline or "bpe_tied", args.allow_unfinished)
    folder, kept = out / "compare", {x["run"] for x in c["runs"]}
    folder.mkdir(parents=True, exist_ok=True)
    about = words.provenance(c, made)
    write_json(folder / "comparison.json", c | {"provenance": about})
    curves = figures.draw_curves(c, [r for r in runs if r.name in kept], folder)
    write_text(folder / "comparison.md", words.as_markdown(c, about))
    page = report.write_section(out, "comparison", "Comparison", 10, words.section(c, curves, about))
    report.say(words.as_text(c))
    report.say(f"\ncurves  {folder / 'curves'}.png\n        {folder / 'curves'}.svg\nreport  {page}")


def report_experiment(file: str, out: Path | None, made: dict) -> None:
    """An experiment's README.md, report.json and figures, beside its records or in OUT; its tables and findings printed."""
    exp = experiment.read(file)
    records = experiment.read_records(exp)
    if not records:
        cure = "run scripts/matched.py on its file first"
        raise RunError(f"{exp.name} has no records in {exp.records}: {cure}")
    out = out or (provenance.ROOT / exp.records).parent
    page, heading = out / "README.md", fair_report.heading(exp.name)
    if page.is_file() and not page.read_text(encoding="utf-8", errors="replace").startswith(heading):
        what = f"something else than the report of {exp.name}"
        raise RunError(f"{page} is {what}: give another folder with --out")
    c = fair.numbers(exp, records)
    out.mkdir(parents=True, exist_ok=True)
    drawn = fair_figures.draw(c, out)
    write_json(out / "report.json", c | {"provenance": made})
    write_text(page, fair_report.as_markdown(c, made, drawn, Path(file).read_text(encoding="utf-8")))
    report.say(fair_report.as_text(c))
    report.say(f"\nreport  {page}")


def main(argv=None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("paths", nargs="*", help="run folders, folders that hold runs, or one experiment's file")
    add("--wandb", metavar="ENTITY/PROJECT", help="read the runs of a wandb project instead")
    add("--wandb-group", metavar="GROUP", help="only the runs of this wandb group")
    add("--baseline", metavar="ARM", help="that the others are compared with (bpe_tied; an experiment's own)")
    add("--allow-unfinished", action="store_true", help="compare at the last step that all have reached")
    out = "folder that gets compare/ (default: the first path), or an experiment's report"
    add("--out", type=Path, help=out)
    args = parser.parse_args(argv)
    if bool(args.paths) == bool(args.wandb):
        parser.error("give run folders, or --wandb entity/project")
    if args.wandb_group and not args.wandb:
        parser.error("--wandb-group needs --wandb entity/project")
    with sentences():
        made = provenance.provenance(__file__, argv)
        if len(args.paths) == 1 and experiment.is_experiment(file := args.paths[0]):
            if args.baseline or args.allow_unfinished:
                parser.error(f"--baseline and --allow-unfinished are for runs: {file} says what is compared")
            report_experiment(file, args.out, made)
        else:
            compare_runs(args, made)


if __name__ == "__main__":
    main()
