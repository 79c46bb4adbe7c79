"""Prompts: text with slots made from bytes, and end-of-text, to token ids and back."""

import re

from data.files import expanded
from data.sources import whole_text
from data.tokenizers import clean_text
from engine.errors import RunError

SLOT = re.compile(r" ?\{\{(.*?)\}\}", re.DOTALL)


def parse_prompt(text: str, tokenizer, vocab_size: int) -> tuple[list[int], dict[int, bytes]]:
    """(ids, {position: bytes}) of a prompt; each {{slot}} takes one position.

    The id under a slot is the paper's 50300, or the last one of a smaller vocabulary; its bytes replace it.
    """
    text = clean_text(text)
    end = None if tokenizer.eot is None else tokenizer.decode([tokenizer.eot])
    special = SLOT.pattern if end is None else f"{SLOT.pattern}|{re.escape(end)}"
    ids, slots, start = [], {}, 0
    for match in re.finditer(special, text, re.DOTALL):
        ids += tokenizer.encode(text[start : match.start()])
        start = match.end()
        if match[0] == end:
            ids.append(tokenizer.eot)
        elif not match[1]:
            raise RunError("an empty slot {{}} has no bytes: put a word between the braces")
        else:
            slots[len(ids)] = match[0].replace("{{", "").replace("}}", "").encode()
            ids.append(min(50300, vocab_size - 1))
    ids += tokenizer.encode(text[start:])
    if not ids and end is None:
        raise RunError("the prompt is empty, and the tokenizer has no end-of-text: give --start a character")
    return ids or [tokenizer.eot], slots


def read_prompts(start: str, file: str = "") -> list[str]:
    """The lines of a file (they end at newlines only) if there is one; else start, or the text that its FILE: names."""
    if file:
        prompts = [line for line in text_of(file).split("\n") if line]
        if not prompts:
            raise RunError(f"{file} holds no prompt: write one a line")
        return prompts
    return [text_of(start[5:])] if start.startswith("FILE:") else [start]


def text_of(file: str) -> str:
    return whole_text(expanded(file)).replace("\r\n", "\n")


def shown(prompt: tuple[list[int], dict[int, bytes]], tokenizer) -> str:
    """The prompt as text, slots as their own words."""
    ids, slots = prompt
    text, start = "", 0
    for p in [*sorted(slots), len(ids)]:
        text += tokenizer.decode(ids[start:p]) + slots.get(p, b"").decode("utf-8", "replace")
        start = p + 1
    return text
