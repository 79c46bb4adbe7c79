"""How far a preparation is: one line, rewritten on a terminal, printed every half minute elsewhere."""

import sys
import time
from datetime import timedelta


def say(line: str) -> None:
    print(line, flush=True)  # also into a file, at once


class Progress:
    """Counts what goes by and says it. limit: shards wanted in all, or None."""

    def __init__(self, meta: dict, limit: int | None):
        self.meta, self.limit, self.live = meta, limit, sys.stdout.isatty()
        self.began = self.shown = time.perf_counter()
        self.documents = self.tokens = self.characters = 0
        self.first_done = None

    def block(self, done: float | None, documents: int, characters: int, tokens: int) -> None:
        """Count a block. done: how much of the source lies behind it, 0 to 1, or None."""
        self.documents += documents
        self.tokens += tokens
        self.characters += characters
        now = time.perf_counter()
        if self.first_done is None:
            self.first_done = done
        if now - self.shown >= (0.5 if self.live else 30):
            self.shown, line = now, self._line(now - self.began, done)
            print("\r\033[K" + line, end="", flush=True) if self.live else say(line)

    def _line(self, seconds: float, done: float | None) -> str:
        left, made, shards = None, self.meta["made"], len(self.meta["shards"])
        if self.limit is not None:
            wanted = (made["val_tokens"] or 0) + (self.limit - 1) * made["shard_tokens"]
            left = (wanted - sum(self.meta["tokens"].values())) * seconds / max(1, self.tokens)
        elif done is not None and done > self.first_done:
            left = (1 - done) * seconds / (done - self.first_done)
        return (
            f"{self.documents:,} documents  {self.tokens / 1e6:,.1f}M tokens  "
            f"{self.tokens / 1e6 / seconds:.2f}M/s  {self.characters / 1e6 / seconds:.1f} MB/s  {shards} shards  "
            f"{'?' if left is None else timedelta(seconds=round(left))} left"
        )

    def end(self) -> None:
        """Say what the set holds now."""
        if self.live and self.shown > self.began:
            print()
        seconds, meta = time.perf_counter() - self.began, self.meta
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in meta["skipped"].items() if count)
        what = (
            f"{meta['documents']:,} documents, {meta['tokens']['train']:,} training and {meta['tokens']['val']:,} "
            f"validation tokens in {len(meta['shards'])} shards" + (f"; skipped {skipped}" if skipped else "")
        )
        if not self.tokens:
            say(f"already complete, nothing to do: {what}")
        else:
            speed = self.tokens / 1e6 / seconds
            say(f"done: {what}; {self.tokens:,} tokens in {seconds:.1f} s, {speed:.2f}M a second")
