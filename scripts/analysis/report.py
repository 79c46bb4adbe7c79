"""The page that gathers everything: `OUT/compare/report.html`, one file without outside resources.

compare.py and each probe leave a section in `OUT/compare/sections/NAME.json`:

    {"name": "spelling", "title": "Spelling robustness", "order": 20, "html": "<p>...</p>"}

and the page is made again from all of them, so tools can be run in any order and as often as one likes.
Run by itself (`python scripts/analysis/report.py out/demo`) it only rebuilds the page.
"""

import html
import io
import json
import os
import re
import sys
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# One colour and one dash an arm in every figure of the project (Okabe-Ito: safe for colour-blind readers).
ARM_STYLE = {
    "bpe_tied": ("#0072B2", "-"),
    "bpe_untied": ("#56B4E9", "--"),
    "kronecker": ("#D55E00", "-"),
    "kronecker_tied": ("#CC79A7", "--"),
}
SPARE_COLOURS = ["#009E73", "#E69F00", "#7F7F7F", "#8C564B", "#17BECF", "#9467BD"]
ARM_ORDER = list(ARM_STYLE)
INK = (
    "#3b4252"  # text and axes; becomes `currentColor` inside the page, so that figures follow light and dark
)

FIGURE_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#8a8f98",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",  # real text: sharper, smaller, searchable
    "svg.hashsalt": "kronecker-nanogpt",  # the same figure gives the same file
    "figure.constrained_layout.use": True,
}


def arm_sort_key(arm: str):
    return (ARM_ORDER.index(arm) if arm in ARM_ORDER else len(ARM_ORDER), arm)


def arm_style(arm: str, arms) -> dict:
    """Colour and line style of an arm; unknown arms take spare colours in their sorted order."""
    if arm in ARM_STYLE:
        colour, line = ARM_STYLE[arm]
    else:
        strangers = sorted(a for a in arms if a not in ARM_STYLE)
        colour, line = SPARE_COLOURS[strangers.index(arm) % len(SPARE_COLOURS)], "-."
    return {"color": colour, "linestyle": line}


def write_atomic(path: Path, text: str | bytes) -> None:
    """Write beside and rename, so that a reader or an interrupt never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + f".tmp{os.getpid()}")
    part.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    os.replace(part, path)


def write_json(path: Path, content) -> None:
    write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def say(text: str) -> None:
    """print(), quiet when the reader has left (`| head`): the files are written by then."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def save_figure(figure, base: Path) -> str:
    """Save `base`.png and `base`.svg and return the SVG made fit to stand inside the page."""
    metadata = {"Date": None, "Creator": "kronecker-nanogpt"}
    svg = io.BytesIO()
    png = io.BytesIO()
    figure.savefig(svg, format="svg", metadata=metadata, transparent=True)
    figure.savefig(png, format="png", dpi=160, facecolor="white")
    plt.close(figure)
    write_atomic(base.with_suffix(".svg"), svg.getvalue())
    write_atomic(base.with_suffix(".png"), png.getvalue())
    return inline_svg(svg.getvalue().decode("utf-8"), base.name)


def inline_svg(svg: str, name: str) -> str:
    """An SVG for the page: width left to CSS, ink that follows the theme, ids that cannot collide."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    return svg.strip()


def text_table(header, rows, left: int = 1) -> str:
    """A plain aligned table: the first `left` columns lean left, the others right."""
    cells = [[str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0].rstrip(), "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])])


def md_table(header, rows, left: int = 1) -> str:
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(str(c) for c in row) + " |" for row in [header, rule, *rows])


def html_table(header, rows, left: int = 1) -> str:
    """A table that scrolls sideways by itself on a narrow screen."""

    def row(cells, tag):
        return "".join(
            f"<{tag}{'' if i < left else ' class=n'}>{html.escape(str(c))}</{tag}>"
            for i, c in enumerate(cells)
        )

    body = "".join(f"<tr>{row(r, 'td')}</tr>" for r in rows)
    head = f"<thead><tr>{row(header, 'th')}</tr></thead>"
    return f"<div class=wide><table>{head}<tbody>{body}</tbody></table></div>"


def paragraphs(*texts: str) -> str:
    return "".join(f"<p>{html.escape(t)}</p>" for t in texts if t)


def figure_html(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def write_section(out_dir: Path, name: str, title: str, order: int, body: str) -> Path:
    """Leave or replace one section and make the page again. Returns the page's path."""
    folder = Path(out_dir) / "compare" / "sections"
    write_json(folder / f"{name}.json", {"name": name, "title": title, "order": order, "html": body})
    return build_report(out_dir)


def build_report(out_dir: Path) -> Path:
    """`OUT/compare/report.html` from every section that is there, in their order."""
    out_dir = Path(out_dir)
    sections = []
    for path in sorted((out_dir / "compare" / "sections").glob("*.json")):
        try:
            section = json.loads(path.read_text(encoding="utf-8"))
            sections.append({k: section[k] for k in ("name", "title", "order", "html")})
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"{path} is not a section of the report ({e}); delete it and run its tool again"
            ) from None
    sections.sort(key=lambda s: (s["order"], s["name"]))
    template = (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    page = (
        jinja2.Environment(autoescape=True).from_string(template).render(name=out_dir.name, sections=sections)
    )
    target = out_dir / "compare" / "report.html"
    write_atomic(target, page + "\n")
    return target


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or argv[0].startswith("-"):
        sys.exit(
            "usage: python scripts/analysis/report.py OUT   (rebuilds OUT/compare/report.html from its sections)"
        )
    if not (Path(argv[0]) / "compare" / "sections").is_dir():
        sys.exit(f"error: {argv[0]} has no compare/sections; run scripts/compare.py {argv[0]} first")
    try:
        print(build_report(Path(argv[0])))
    except ValueError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
