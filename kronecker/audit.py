"""What the codec can and cannot tell apart in a tokenizer's vocabulary.

    python -m kronecker.audit --tokenizer gpt2 --pos-dim 16
    python -m kronecker.audit --tokenizer path/to/tokenizer.json --pos-dim 32 --byte-extraction decode --json

Tokens whose kept bytes are equal share one embedding for ever. The audit counts these groups, names what made
them, and says in which scripts the truncated and the colliding tokens are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import unicodedata
from collections import defaultdict
from contextlib import suppress
from functools import cache

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from kronecker.codec import check_buffers, codec_output_dim
from kronecker.tokens import build_byte_buffer, token_bytes, utf8_safe_truncate

# Taking the cause away would split the group:
CAUSES = {
    "truncation": "the tokens differ only after pos_dim bytes",
    "extraction": "the tokens' true bytes differ, but decode() gives the same text",
    "duplicate": "the tokens stand for the same bytes",
}


def audit(tokenizer, pos_dim=32, byte_extraction="bytes", d_model=768, char_dim=256) -> dict:
    """A JSON-able report on a tokenizer (of any kind build_byte_buffer takes) at this pos_dim.

    The stock table that it is compared with has a row for each of the tokenizer's ids.
    """
    true = token_bytes(tokenizer)
    extracted = true if byte_extraction == "bytes" else token_bytes(tokenizer, byte_extraction)
    cut = utf8_safe_truncate if byte_extraction == "decode" else lambda piece, n: piece[:n]
    kept = [cut(piece, pos_dim) for piece in extracted]
    real = [i for i, piece in enumerate(true) if piece]
    lengths = [len(extracted[i]) for i in real]
    truncated = {i for i in real if len(extracted[i]) > pos_dim}

    members = defaultdict(list)
    for i in real:
        members[kept[i]].append(i)
    groups = sorted((ids for ids in members.values() if len(ids) > 1), key=len, reverse=True)
    by_cause = {cause: {"groups": 0, "tokens": 0, "examples": []} for cause in CAUSES}
    for ids in groups:
        entry = by_cause[_cause([true[i] for i in ids], [extracted[i] for i in ids])]
        entry["groups"] += 1
        entry["tokens"] += len(ids)
        if len(entry["examples"]) < 3:
            shown = [{"id": i, "bytes": show(true[i])} for i in ids[:3]]
            entry["examples"].append({"tokens": len(ids), "first": shown})
    colliding = {i for ids in groups for i in ids}

    written = defaultdict(list)
    for i in real:
        written[script(true[i])].append(i)
    by_script = {
        name: {
            "tokens": len(ids),
            "truncated": len(truncated.intersection(ids)),
            "colliding": len(colliding.intersection(ids)),
            "mean_bytes": sum(len(extracted[i]) for i in ids) / len(ids),
        }
        for name, ids in sorted(written.items(), key=lambda item: -len(item[1]))
    }

    D, V = codec_output_dim(char_dim, pos_dim), len(true)
    return {
        "tokens": len(real),
        "ids": V,
        "ids_without_bytes": V - len(real),
        "pos_dim": pos_dim,
        "char_dim": char_dim,
        "byte_extraction": byte_extraction,
        "mean_bytes": sum(lengths) / max(len(lengths), 1),
        "longest_bytes": max(lengths, default=0),
        "truncated": len(truncated),
        "colliding_tokens": len(colliding),
        "collision_groups": len(groups),
        "largest_group": len(groups[0]) if groups else 0,
        "by_cause": by_cause,
        "by_script": by_script,
        "buffer_bytes": V * (pos_dim + 2),
        "parameters": D * d_model,
        "stock_parameters": V * d_model,
        "d_model": d_model,
        "break_even_vocab": D,
    }


def audit_line(report: dict) -> str:
    """The report in one line, for a training log."""
    counts = {cause: row["tokens"] for cause, row in report["by_cause"].items()}
    causes = ", ".join(f"{n} by {cause}" for cause, n in counts.items() if n)
    return (
        f"kronecker: {report['tokens']:,} tokens, mean {report['mean_bytes']:.1f} bytes (longest "
        f"{report['longest_bytes']}), pos_dim {report['pos_dim']} truncates {report['truncated']:,}; "
        f"{report['colliding_tokens']} tokens share an embedding in {report['collision_groups']} groups"
        f"{f' ({causes})' if causes else ''}; buffers {report['buffer_bytes'] / 1e6:.1f} MB"
    )


def audit_text(report: dict) -> str:
    """The whole report for a terminal."""
    r = report
    lines = [
        f"tokens               {r['tokens']:,} of {r['ids']:,} ids ({r['ids_without_bytes']} ids without bytes)",
        f"bytes of a token     mean {r['mean_bytes']:.2f}, longest {r['longest_bytes']} "
        f"(byte extraction: {r['byte_extraction']})",
        f"truncated            {r['truncated']:,} longer than pos_dim {r['pos_dim']}",
        f"collisions           {r['colliding_tokens']} tokens in {r['collision_groups']} groups, "
        f"the largest of {r['largest_group']}",
    ]
    for cause, row in r["by_cause"].items():
        lines.append(f"  by {cause:<15} {row['tokens']} tokens in {row['groups']} groups: {CAUSES[cause]}")
        for example in row["examples"]:
            shown = ", ".join(f"{member['id']} {member['bytes']}" for member in example["first"])
            lines.append(f"    {example['tokens']} tokens: {shown}{', ...' if example['tokens'] > 3 else ''}")
    lines.append(
        f"buffers              {r['buffer_bytes'] / 1e6:.2f} MB ({r['ids']:,} ids x {r['pos_dim']} bytes and a length)"
    )
    lines.append(
        f"parameters           {r['parameters']:,} at d_model {r['d_model']}, against {r['stock_parameters']:,} of the "
        f"table ({r['parameters'] / r['stock_parameters']:.1%})"
    )
    lines += [
        f"break-even           the projection is smaller from a vocabulary of {r['break_even_vocab']:,} on",
        "",
        f"{'script':<24}{'tokens':>9}{'mean bytes':>12}{'truncated':>11}{'colliding':>11}",
    ]
    for name, row in r["by_script"].items():
        lines.append(
            f"{name:<24}{row['tokens']:>9,}{row['mean_bytes']:>12.2f}{row['truncated']:>11,}{row['colliding']:>11,}"
        )
    return "\n".join(lines)


def _cause(true: list[bytes], extracted: list[bytes]) -> str:
    if len(set(true)) == 1:
        return "duplicate"
    return "extraction" if len(set(extracted)) == 1 else "truncation"


def show(piece: bytes) -> str:
    """A readable literal: text where the bytes are UTF-8, hex where they are not."""
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return "0x" + piece.hex()
    if len(text) <= 24:
        return repr(text)
    same = len(set(text)) == 1
    return f"{text[0]!r} x {len(text)}" if same else f"{text[:20]!r}... ({len(text)} characters)"


# first words of the names of letters and marks that belong to no script, or do not say to which
NO_SCRIPT = set(
    " MICRO MODIFIER COMBINING VARIATION MASCULINE FEMININE IDEOGRAPHIC FULLWIDTH HALFWIDTH".split(" ")
)


@cache
def _script_of(character: str) -> str | None:
    """Script of a letter or mark, from its Unicode name (LATIN SMALL LETTER A -> Latin); None for others."""
    if unicodedata.category(character)[0] not in "LM":
        return None
    name = unicodedata.name(character, "").split(" ")[0].split("-")[0]
    if name in NO_SCRIPT:
        return None
    return "CJK" if name == "CJK" else name.capitalize()


def script(piece: bytes) -> str:
    """What a token is written in: the script of its first letter, else what sort of characters it has."""
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return "part of a character"
    for character in text:
        if name := _script_of(character):
            return name
    if any(unicodedata.category(c)[0] == "N" for c in text):
        return "digits"
    if any(unicodedata.category(c) == "So" for c in text):
        return "emoji and symbols"
    return "spaces and punctuation"


def find_tokenizer(name: str):
    """A tokenizer from a tiktoken name, a tokenizer.json or a folder with one, a tekken*.json, or a hub name.

    Files are read and nothing else, so that no code which comes with a tokenizer is ever run.
    Raises ValueError, saying what was tried, when there is none.
    """
    local = os.path.exists(name)
    try:
        if not local:
            with suppress(ImportError):
                import tiktoken

                if name in tiktoken.list_encoding_names():
                    return tiktoken.get_encoding(name)
        from tokenizers import Tokenizer

        if not local:
            return Tokenizer.from_pretrained(name)
        path = os.path.join(name, "tokenizer.json") if os.path.isdir(name) else name
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if isinstance(content, dict) and {"config", "vocab"} <= content.keys():
            return path  # tekken's, which token_bytes reads
        return Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises nothing more precise, the hub's client several kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = "readable tokenizer.json or tekken.json" if local else "file, and no name that is known"
        raise ValueError(f"{name} is no {what} ({reason})") from None


def main(argv=None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m kronecker.audit", description=__doc__, formatter_class=form)
    parser.add_argument("--tokenizer", required=True, help="tiktoken name, file or folder, or hub name")
    parser.add_argument("--pos-dim", type=positive, default=16)
    parser.add_argument("--char-dim", type=positive, default=256)
    parser.add_argument("--d-model", type=positive, default=768)
    parser.add_argument("--byte-extraction", default="bytes", choices=("bytes", "decode"))
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character shows a question mark
            stream.reconfigure(errors="replace")
    try:
        tokenizer = find_tokenizer(args.tokenizer)
        buffers = build_byte_buffer(tokenizer, args.pos_dim, args.byte_extraction)
        check_buffers(*buffers, args.char_dim, args.pos_dim)  # as the embedding does
        report = audit(tokenizer, args.pos_dim, args.byte_extraction, args.d_model, args.char_dim)
        print(json.dumps(report, indent=1) if args.json else audit_text(report), flush=True)
    except BrokenPipeError:  # whoever read the report, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: stopped by Ctrl-C")


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1")
    return int(text)


if __name__ == "__main__":
    main()
