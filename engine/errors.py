"""Mistakes of the user and of the machine, said in one sentence instead of a traceback."""

import sys

from data import console


class RunError(ValueError):
    """Something about a run that its user can mend; the message says what, where and how."""


def sentences(advice_on_memory=lambda: "lower batch_size"):
    """End the program with one sentence and status 1 where the cause is known; let real bugs show their traceback."""
    return console.sentences(lambda error: explain(error, advice_on_memory))


def explain(error: BaseException, advice_on_memory) -> str | None:
    """One sentence about an error of a run, or None; `data.console.explain` knows those of files."""
    text = str(error)
    if isinstance(error, RunError):
        return text
    torch = sys.modules.get("torch")  # not imported: then it has raised nothing
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"the GPU is out of memory ({text.split('. ')[0]}): {advice_on_memory()}"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"the machine is out of memory: {advice_on_memory()}"
    if "Connection closed by peer" in text or "Connection reset by peer" in text:
        return "another rank died, so this one stops too; the cause is in that rank's output"
    return console.explain(error)
