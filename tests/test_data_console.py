"""data/console.py: mistakes end in one sentence, bugs in a traceback, and printing never ends anything."""

import errno
import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from data import DataError, console


def shell(code: str, redirection: str = "", **environment):
    """Run Python code inside `sentences` under a shell; (status, stdout, stderr)."""
    script = (
        f"import sys\nfrom data.console import sentences\nwith sentences():\n    {code}\nprint('after')\n"
    )
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {redirection}', sys.executable, script],
        cwd=ROOT, capture_output=True, env=os.environ | environment, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


@pytest.mark.parametrize("redirection", ["| head -n 2", "2>&1 | head -n 2", "| true"])
@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_who_leaves_costs_the_printing_alone(redirection, flush, tmp_path):
    code = f"[print('line', i, flush={flush}) for i in range(9999)]; open({str(tmp_path / 'done')!r}, 'w').write('whole')"
    status, out, err = shell(code, redirection)
    assert (status, err) == (0, "")
    assert "line 2" not in out
    assert (tmp_path / "done").read_text() == "whole"


def test_closed_streams(tmp_path):
    """A file that is opened later must not take stdout's place."""
    code = f"file = open({str(tmp_path / 'a')!r}, 'w'); print('stray'); import os; os.write(1, b'stray'); file.close()"
    assert shell(code, "<&- >&- 2>&-") == (0, "", "")
    assert (tmp_path / "a").read_text() == ""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_characters_that_the_terminal_lacks_are_replaced(encoding):
    status, out, err = shell("print('a\\u8a9e\\ud800b')", PYTHONIOENCODING=encoding)
    assert (status, err) == (0, "")
    assert out.startswith("a") and "b" in out and "after" in out


def test_a_full_disk_behind_the_output_costs_the_printing_alone():
    assert shell("print('x' * 99999, flush=True)", "> /dev/full") == (0, "", "")


def test_where_what_is_printed_is_the_product_a_full_disk_is_told():
    code = "print('x' * 99999); import data.console; data.console.output_arrived()"
    told = "error: what was printed is lost: standard output: the disk is full: free some space\n"
    assert shell(code, "> /dev/full") == (1, "", told)
    assert shell(code, "| head -c 5") == (0, "xxxxx", "")


def test_a_write_that_fails_names_its_file():
    """The system's error of a write names none, and torch's writers hide it."""
    for error in (OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "full", "b.bin")):
        with pytest.raises(OSError) as failed, console.writing("a.bin"):
            raise error
        assert console.explain(failed.value).startswith(f"{error.filename or 'a.bin'}: the disk ")
    for other in (
        ValueError("a bug"),
        ConnectionResetError(errno.ECONNRESET, "of a stream that is read meanwhile"),
    ):
        with pytest.raises(type(other)) as failed, console.writing("a.bin"):
            raise other
        assert failed.value is other


def test_cores_are_those_that_this_process_may_use():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from data.console import cores; print(cores())"
    if not hasattr(os, "sched_getaffinity"):  # macOS and Windows; what they get is tested below
        pytest.skip("this system does not bind processes to cores")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_where_processes_are_bound_to_no_cores_all_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert console.cores() == os.cpu_count()


def test_ctrl_c_is_one_line():
    status, out, err = shell("raise KeyboardInterrupt")
    assert (status, out.strip(), err.strip()) == (130, "", "stopped by Ctrl-C")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (DataError("it is\ntwo lines"), "error: it is two lines"),
        (DataError("error: once"), "error: once"),
        (OSError(errno.ENOSPC, "x", "a.bin"), "error: a.bin: the disk is full: free some space"),
        (FileExistsError(errno.EEXIST, "x", "out"), "error: out: something else is in the way: choose another path"),
        (OSError(errno.ELOOP, "x", "out"), "error: out: this link leads to itself: choose another path"),
        (MemoryError(), "error: the machine is out of memory: close other programs, or ask for less"),
        (ValueError("I/O error: No space left on device (os error 28)"), "error: a file: the disk is full: free some space"),
    ],
)  # fmt: skip
def test_one_sentence(error, sentence):
    with pytest.raises(SystemExit) as leaving, console.sentences():
        raise error
    assert leaving.value.code == sentence


@pytest.mark.parametrize("error", [KeyError("bug"), OSError(errno.EBADF, "bug"), RuntimeError("bug")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error), match="bug"), console.sentences():
        try:
            raise OSError(errno.ENOENT, "handled before")
        except OSError:
            pass
        raise error


def test_the_system_error_behind_a_library_s():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space", "w")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")
    except RuntimeError as error:
        assert console.explain(error) == "w: the disk is full: free some space"


def test_the_streams_are_given_back(monkeypatch):
    monkeypatch.setattr(sys, "stdout", mine := io.StringIO())
    with console.sentences():
        print("a")
        assert sys.stdout is not mine
    assert sys.stdout is mine
    assert mine.getvalue() == "a\n"
