"""The page of scripts/bench/embedding.py: its tables and the figures of growth, from the record that it writes."""

from pathlib import Path

from scripts.analysis.report import Table
from scripts.bench.embedding_sides import SIDES
from scripts.bench.growth import growth

TITLES = {"embedding": "nn.Embedding"}


def cell(value: float | None, form: str = ",.2f") -> str:
    return "-" if value is None else format(value, form)


def over(times: dict, side: str, other: str, form: str) -> str:
    return f"{times[side] / times[other]:{form}}x" if side in times and other in times else "-"


def head(row: dict) -> list[str]:
    return [f"{row['V']:,}", f"{row['d']:,}", row["pos_dim"], f"{row['tokens']:,} ({row['distinct']:,})"]


def time_table(rows: list[dict]) -> Table:
    """Milliseconds of every side, a step and forward alone, and their ratios."""
    cells = []
    for row in rows:
        for what in ("step", "forward"):
            times = row[f"{what}_ms"]
            line = [*head(row), row["ids"], what, *(cell(times.get(s)) for s in SIDES)]
            line += [over(times, s, "embedding", ".2f") for s in SIDES[:2]]
            cells.append(
                [*line, over(times, "reference", "kronecker", ".0f"), cell(row["prepared_ms"][what])]
            )
    header = ["V", "d", "pos_dim", "tokens (distinct)", "ids", "", *(TITLES.get(s, s) for s in SIDES)]
    header += ["kronecker / nn.Embedding", "prepared / nn.Embedding", "reference / kronecker", "preparing"]
    note = (
        "Medians in ms of interleaved runs. A step is forward and backward; forward is without gradients. Prepared "
        "means for a step: its plan was made before it, in `preparing` ms (train.py does so in the loader's "
        "thread); for forward: the table is kept, which took `preparing` ms once a weight (evaluation and "
        "generation do so). kronecker reads the whole projection at each call, which bounds its forward pass of few tokens."
    )
    return Table("Time", header, cells, left=6, note=note)


def memory_table(rows: list[dict]) -> Table:
    """Extra memory of a step in MB."""
    cells, sides = [], [s for s in SIDES if s != "prepared"]
    for row in rows:
        peaks = row.get("peak_bytes") or {}
        mb = {s: peaks[s]["extra"] / 1e6 for s in sides if peaks.get(s)}
        if "kronecker" in mb:
            cells.append(
                [
                    *head(row),
                    *(cell(mb.get(s), ",.1f") for s in sides),
                    over(mb, "reference", "kronecker", ".0f"),
                ]
            )
    header = [
        "V",
        "d",
        "pos_dim",
        "tokens (distinct)",
        *(TITLES.get(s, s) for s in sides),
        "reference / kronecker",
    ]
    note = "The peak of a step above what stood before it, less its output and the weight's gradient."
    return Table("Extra peak memory of a training step (MB)", header, cells, left=0, note=note)


def conditions_table(rows: list[dict]) -> Table:
    """A training step and its ratios under each of CONDITIONS."""

    def spread(found: dict | None, digits: int) -> str:
        if found is None:
            return "-"
        return f"{found['median']:.{digits}f}x ({found['low']:.{digits}f} to {found['high']:.{digits}f})"

    cells, sides = [], ["kronecker", "embedding", "reference", "loss alone"]
    for row in rows:
        times = [cell(row["ms"].get(s)) for s in sides]
        line = [row["bytes"], row["step"], "kept" if row["memory_kept"] else "given back", *times]
        cells.append([*line, spread(row["over_embedding"], 2), spread(row.get("reference_over"), 0)])
    header = ["bytes of a token", "step", "freed memory", *(TITLES.get(s, s) for s in sides)]
    note = (
        "Medians in ms; ratios are taken round by round: median (quartiles). The loss, which every side pays, bounds "
        "what a ratio can be: its share of nn.Embedding's step is a floor of kronecker's."
    )
    title = "A training step of 8,192 tokens of text at GPT-2's size, by what is timed"
    return Table(title, [*header, "/ nn.Embedding", "reference /"], cells, left=3, note=note)


def growth_parts(rows: list[dict], folder: Path) -> list[str]:
    """Tables of time and memory against each axis, with their slopes, and the figures."""
    parts = []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        points = [row for row in rows if row["axis"] == axis]
        for key, what, unit in (
            ("ms", "Time of a training step", "ms"),
            ("mb", "Peak memory of a training step", "MB"),
        ):
            sides = [s for s in SIDES if any(s in row[key] for row in points)]
            if sides:
                series = {TITLES.get(s, s): [row[key].get(s) for row in points] for s in sides}
                name = f"growth_{axis}_{key}"
                xs = [row["x"] for row in points]
                table = growth(f"{what} by {axis}", axis, unit, xs, series, folder / name)
                parts += [table.markdown(), f"![{what} by {axis}]({name}.svg)"]
    if parts:
        sizes = ", ".join(f"{axis} {x:,}" for axis, x in rows[0]["base"].items())
        parts.insert(
            0,
            f"# Growth\n\nOne of three grows, the others stay: {sizes}, pos_dim 16. Memory is all that a "
            "side holds: weights, their gradient, the output, and what lies between.",
        )
    return parts


def markdown(result: dict, folder: Path) -> str:
    """The page of a result; draws the figures of growth into its folder."""
    tables = [time_table(result["rows"]), memory_table(result["rows"])]
    tables += [conditions_table(result["conditions"])] if result.get("conditions") else []
    parts = [
        f"# The embedding on {result['device']}: time and memory",
        f"`{result['command']}` at commit {result['commit']}, {result['date']}, {result['machine']}, "
        f"torch {result['torch']}, {result['threads']} threads, {result['dtype']}. Ids: {result['tokens_from']}.",
        *(t.markdown() for t in tables if t.rows),
    ]
    if times := result.get("buffers_ms"):
        by_transformers = over(times, "reference", "kronecker, transformers", ".1f")
        listed = ", ".join(f"{k} {v:.1f} ms" for k, v in times.items())
        parts.append(
            f"Building GPT-2's byte buffer: {listed}; from transformers {by_transformers} the reference."
        )
    for row in result["rows"]:
        if row["reference_left_out"]:
            size = f"V={row['V']:,}, d={row['d']:,}, {row['tokens']:,} tokens"
            parts.append(f"The reference at {size}: not run, {row['reference_left_out']}.")
    parts += growth_parts(result.get("growth", []), folder)
    return "\n\n".join(dict.fromkeys(parts)) + "\n"
