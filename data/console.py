"""The edge of every command: a mistake becomes one sentence, and a reader who has left costs the printing alone."""

import argparse
import errno
import os
import re
import signal
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from data import DataError

CAUSES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "the file would be larger than allowed here: see ulimit -f",
    errno.EMFILE: "too many files are open: see ulimit -n",
    errno.EIO: "the disk does not work: look at the machine",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission denied: choose another folder or change its rights",
    errno.EPERM: "not permitted: choose another folder or change its rights",
    errno.ENOTDIR: "a part of this path is a file, not a folder: choose another path",
    errno.EISDIR: "this is a folder, not a file: choose another path",
    errno.EEXIST: "something else is in the way: choose another path",
    errno.ELOOP: "this link leads to itself: choose another path",
    errno.ENAMETOOLONG: "this name is too long: choose a shorter path",
    errno.ENOENT: "it is not there (any more): check the path",
}


def explain(error: BaseException) -> str | None:
    """One sentence about a mistake of the user or of the machine; None for what may be a mistake of ours."""
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, MemoryError):
        return "the machine is out of memory: close other programs, or ask for less"
    number, path = system_error(error)
    return f"{path or 'a file'}: {CAUSES[number]}" if number in CAUSES else None


def system_error(error: BaseException) -> tuple[int | None, str | None]:
    """(errno, path) of the system's error that an exception is, or that a library has hidden behind its own."""
    seen = error
    while type(seen) is RuntimeError and seen.__context__ is not None:  # torch's writers
        seen = seen.__context__
    if isinstance(seen, OSError):
        return seen.errno, seen.filename
    written_out = re.search(r"\(os error (\d+)\)", str(error))  # as Rust's libraries do
    return (int(written_out[1]) if written_out else None), None


@contextmanager
def writing(path):
    """Inside, what the disk refuses names this path where the error itself, as of a write, names none."""
    try:
        yield
    except Exception as error:
        number, named = system_error(error)
        if number not in CAUSES or named:  # such as a network's, which has nothing to do with the path
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def output_arrived() -> None:
    """DataError where what was printed could not be written, for commands whose product it is; a reader who has left
    (`| head`) wanted no more."""
    sys.stdout.flush()
    error = getattr(sys.stdout, "lost", None)
    if error is not None and error.errno != errno.EPIPE:
        raise DataError(
            f"what was printed is lost: {explain(OSError(error.errno, '', 'standard output')) or error}"
        )


def cores() -> int:
    """Processor cores that this process may use, which under taskset, in a container or a job can be fewer than there are."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def first_line(error: BaseException) -> str:
    """The first line of what a library says went wrong, or else the kind of the error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def sentences(explain=explain):
    """End the program with one sentence and status 1 where `explain` knows one; let real bugs show their traceback."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # after `early`
    fill_missing_streams()
    out, err = (Tolerant(stream) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        except KeyboardInterrupt:
            print("\nstopped by Ctrl-C", file=sys.stderr)
            raise SystemExit(130) from None
        except Exception as error:
            sentence = explain(error)
            if sentence is None:
                raise
            raise SystemExit("error: " + " ".join(sentence.split()).removeprefix("error: ")) from None
        finally:
            out.flush()  # here, where a reader who has left is forgiven


def early(check=lambda: None, *args, **kwargs) -> None:
    """Let `check` read the command line first; from then until the next `sentences`, Ctrl-C ends at once and silently."""
    with sentences():
        check(*args, **kwargs)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # and is not ignored, as by nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class Tolerant:
    """A standard stream on which printing never fails: characters that the terminal lacks are replaced, and once
    the reader has left (`| head`) or the disk behind a redirection is full, the rest goes nowhere."""

    def __init__(self, stream):
        self.stream = stream
        self.lost: OSError | None = None  # why nothing is written any more
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.lost = self.lost or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def fill_missing_streams() -> None:
    """Where the program was started with closed streams, keep its files from taking their place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the program


class Parser(argparse.ArgumentParser):
    """Takes a module's docstring as it stands; says what is wrong in one sentence, without the usage."""

    def __init__(self, doc: str):
        name = Path(sys.argv[0]).name
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=name, description=doc, formatter_class=form, allow_abbrev=False)

    def error(self, message: str):
        raise SystemExit(f"error: {message} (--help lists the arguments)")


def whole(low: int, high: int = 2**31 - 1):
    """An argparse type: whole numbers from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low:,} to {high:,}")
        return value

    return parse
