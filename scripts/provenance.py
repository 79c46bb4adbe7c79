"""Where a figure comes from: command, commit, machine and date, which everything under results/ has to name."""

import datetime
import shlex
import sys
from pathlib import Path

from data.files import write_json, write_text
from engine.runs import commit, machine

ROOT = Path(__file__).resolve().parents[1]


def portable(word: str) -> str:
    """A word of a command without the folders of this machine; relative paths stay as they are."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value).expanduser()
    if not path.is_absolute():
        return word
    path = path.resolve()
    return flag + equals + (str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name)


def provenance(script: str, argv=None) -> dict:
    """{"command", "commit", "machine", "date"} of this process: script is a module's __file__."""
    words = sys.argv[1:] if argv is None else argv
    again = shlex.join(["python", *map(portable, map(str, [script, *words]))])
    date = datetime.date.today().isoformat()
    return {"command": again, "commit": commit(), "machine": machine(), "date": date}


def write_page(base: Path, title: str, made: dict, record: dict, parts: list) -> None:
    """BASE.json, which is made | record, and BASE.md: the title, what made it (see `provenance`), paragraphs and Tables."""
    base.parent.mkdir(parents=True, exist_ok=True)
    write_json(f"{base}.json", made | record)
    source = f"`{made['command']}` at commit {made['commit']}, {made['machine']}, {made['date']}."
    text = [f"# {title}", source, *(p if isinstance(p, str) else p.markdown() for p in parts)]
    write_text(f"{base}.md", "\n\n".join(text) + "\n")
