"""The command line of every script but train.py and sample.py: one parser, and one place for what a value may be."""

import argparse
import math

from data.console import Parser, whole  # noqa: F401 - every script takes them from here
from engine.errors import RunError


def flags(keys: dict) -> list[str]:
    """Keys as train.py takes them."""
    return [f"--{k}={v}" for k, v in keys.items()]


def number(low: float, high: float = math.inf, above: bool = False):
    """An argparse type: finite numbers from low (or above it) to high."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high) or (above and value == low):
            least = f"above {low:g}" if above else f"from {low:g}"
            most = "" if high == math.inf else f" to {high:g}" if not above else f", at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is no number {least}{most}")
        return value

    return parse


def device(text: str) -> str:
    """An argparse type: a device that is here; auto is the best of them."""
    from engine.ranks import choose_device

    try:
        chosen = choose_device(text)
    except RunError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    return chosen.type if text == "auto" else text


def some_of(known, what: str):
    """An argparse type: `names`, each of them one of those that are known (each a `what`), and each once."""

    def parse(text: str) -> list[str]:
        found = list(dict.fromkeys(names(text)))
        if wrong := [name for name in found if name not in known]:
            choice = ", ".join(known)
            raise argparse.ArgumentTypeError(f"there is no {what} {wrong[0]!r}: choose from {choice}")
        return found

    return parse


def names(text: str) -> list[str]:
    """An argparse type: names with commas or spaces between them, at least one."""
    found = text.replace(",", " ").split()
    if not found:
        raise argparse.ArgumentTypeError("it names nothing")
    return found
