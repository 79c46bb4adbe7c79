"""The page that gathers everything: `OUT/compare/report.html`, one file without scripts and outside resources.

compare.py and each probe leave a section in `OUT/compare/sections/NAME.json`, which holds data and no markup:

    {"name": "spelling", "title": "Spelling robustness", "order": 20, "blocks": [{"text": ["..."]}, ...]}

and the page is made again from all of them, so tools can be run in any order and as often as one likes.
Run by itself it only rebuilds the page:

    python scripts/analysis/report.py out/demo
"""

import base64
import re
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import jinja2
import tabulate
from pydantic import Field

from data.files import write_json, write_text
from data.records import Record, read_record
from engine.errors import RunError, sentences
from scripts.arguments import Parser

# One colour and one dash an arm in every figure of the project (Okabe-Ito: safe for colour-blind readers).
ARM_STYLE = {
    "bpe_tied": ("#0072B2", "-"),
    "bpe_untied": ("#56B4E9", "--"),
    "kronecker": ("#D55E00", "-"),
    "kronecker_tied": ("#CC79A7", "--"),
}
SPARE_COLOURS = ["#009E73", "#E69F00", "#7F7F7F", "#8C564B", "#17BECF", "#9467BD"]
ARM_ORDER = list(ARM_STYLE)
INK, INK_ON_DARK = "#3b4252", "#e4e7ec"  # text and axes of the figures, on paper and on a dark page

tabulate.MIN_PADDING = 0  # the format below brings the space between columns
ROW, RULE = tabulate.DataRow("", "  ", ""), tabulate.Line("", "-", "--", "")
PLAIN = tabulate.TableFormat(None, RULE, None, None, ROW, ROW, padding=0, with_header_hide=None)


def arm_sort_key(arm: str):
    """The project's own arms in their order, then all others by name."""
    return (ARM_ORDER.index(arm) if arm in ARM_ORDER else len(ARM_ORDER), arm)


def arms_of(runs) -> list[str]:
    """The arms of some runs, each once, in the order of every table and figure."""
    return sorted({r.arm for r in runs}, key=arm_sort_key)


def arm_style(arm: str, arms) -> dict:
    """Colour and line style of an arm; unknown arms take spare colours in their sorted order."""
    if arm in ARM_STYLE:
        colour, line = ARM_STYLE[arm]
    else:
        others = sorted(a for a in arms if a not in ARM_STYLE)
        colour, line = SPARE_COLOURS[others.index(arm) % len(SPARE_COLOURS)], "-."
    return {"color": colour, "linestyle": line}


def visible(text) -> str:
    """The text with control and other unprintable characters as escapes: names come from others' records."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def escaped(text) -> str:
    """The text for Markdown, where neither HTML nor links that it holds come alive."""
    return visible(text).replace("<", "&lt;").replace("](", "]\\(")


def bullets(items: list[str]) -> str:
    """A list for the terminal, wrapped at 108 columns."""
    form = {"initial_indent": "- ", "subsequent_indent": "  ", "break_long_words": False}
    return "\n".join(textwrap.fill(text, 108, **form) for text in items)


def markdown_list(heading: str, items: list[str]) -> str:
    """A heading with a list below it, for Markdown."""
    return f"## {heading}\n\n" + "\n".join(f"- {escaped(s)}" for s in items)


def say(text: str) -> None:
    """print(), line for line, without what names of others might do to the terminal."""
    print("\n".join(map(visible, text.split("\n"))), flush=True)


def progress(line: str) -> None:
    """Tell whoever waits where the work stands; the standard output is for results."""
    print(visible(line), file=sys.stderr, flush=True)


@dataclass
class Table:
    """Cells and their meaning; the first `left` columns lean left, the others right."""

    title: str
    header: list
    rows: list[list]
    left: int = 1
    note: str = ""

    def _cells(self, escape) -> list[list[str]]:
        return [[escape(cell) for cell in row] for row in [self.header, *self.rows]]

    def text(self) -> str:
        """Title, aligned columns and note, for a terminal."""
        header, *rows = self._cells(visible)
        aligns = ["left" if i < self.left else "right" for i in range(len(header))]
        body = tabulate.tabulate(rows, header, PLAIN, colalign=aligns, disable_numparse=True)
        note = "\n" + textwrap.fill(self.note, 108) if self.note else ""
        return f"{visible(self.title)}\n\n{body}{note}"

    def markdown(self) -> str:
        """The same with a heading, for a page."""
        header, *rows = self._cells(lambda cell: escaped(cell).replace("|", "\\|"))
        rule = ["---" if i < self.left else "---:" for i in range(len(header))]
        body = "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
        return "\n\n".join(filter(None, (f"## {escaped(self.title)}", body, escaped(self.note))))

    def block(self) -> dict:
        """The table as a block of a section."""
        return {"table": asdict(self)}


class TableRecord(Record):
    title: str
    header: list
    rows: list[list]
    left: int
    note: str


class Block(Record):
    """A part of a section: what it holds is shown in this order, all of it as text."""

    table: TableRecord | None = None
    text: list[str] = []
    claim: list[str] = []  # paragraphs set apart
    quotes: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = []  # what it is, what it says
    figures: list[str] = []  # files below compare/, SVG or PNG
    caption: str = ""
    details: str = ""  # what the blocks are that only unfold
    blocks: list["Block"] = []


class Section(Record):
    name: str
    title: str
    order: int
    blocks: list[Block]


def write_section(out_dir: Path, name: str, title: str, order: int, blocks: list[dict]) -> Path:
    """Leave or replace one section and make the page again. Returns the page's path."""
    folder = Path(out_dir) / "compare" / "sections"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", {"name": name, "title": title, "order": order, "blocks": blocks})
    return build_report(out_dir)


def build_report(out_dir: Path) -> Path:
    """`OUT/compare/report.html` from every section that is there, in their order."""
    compare = Path(out_dir) / "compare"
    paths = sorted((compare / "sections").glob("*.json"))
    what = "a section of the report: delete it and run its tool again"
    sections = [read_record(path, Section, what) for path in paths]
    sections.sort(key=lambda s: (s.order, s.name))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["source"] = lambda file: figure_source(compare, file)
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    write_text(compare / "report.html", template.render(name=Path(out_dir).name, sections=sections) + "\n")
    return compare / "report.html"


def figure_source(folder: Path, file: str) -> str:
    """A figure as a data URI; an image of an <img> runs no script and loads nothing. RunError if it is not there."""
    path = (folder / file).resolve()
    kinds = {".svg": "image/svg+xml", ".png": "image/png"}
    if not path.is_relative_to(folder.resolve()) or path.suffix not in kinds or not path.is_file():
        raise RunError(f"{folder} has no figure {file!r}: run the tool of this section again")
    content = path.read_bytes()
    if path.suffix == ".svg":
        theme = f"svg{{color:{INK}}}@media (prefers-color-scheme:dark){{svg{{color:{INK_ON_DARK}}}}}"
        svg = content.decode("utf-8").replace(INK, "currentColor")
        content = re.sub(r"(<svg\b[^>]*>)", rf"\1<style>{theme}</style>", svg, count=1).encode()
    return f"data:{kinds[path.suffix]};base64,{base64.b64encode(content).decode()}"


def main(argv=None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path, help="folder that holds compare/sections")
    args = parser.parse_args(argv)
    with sentences():
        if not (args.out / "compare" / "sections").is_dir():
            raise RunError(f"{args.out} has no compare/sections; run scripts/compare.py {args.out} first")
        say(str(build_report(args.out)))


if __name__ == "__main__":
    main()
