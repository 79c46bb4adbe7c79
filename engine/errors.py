"""Mistakes of the user and of the machine, told in one sentence instead of a traceback."""

import errno
import sys
from contextlib import contextmanager

import torch

from data import DataError


class RunError(ValueError):
    """Something about a run that its user can mend; the message says what, where and how."""


@contextmanager
def sentences(advice_on_memory=lambda: "lower batch_size"):
    """End the program with one sentence and status 1 where the cause is known; let real bugs show their traceback."""
    try:
        yield
    except (RunError, DataError) as e:
        sys.exit(f"error: {e}")
    except torch.OutOfMemoryError as e:
        sys.exit(f"error: the GPU is out of memory ({str(e).split('. ')[0]}): {advice_on_memory()}")
    except OSError as e:
        causes = {
            errno.ENOSPC: "the disk is full: free some space",
            errno.EDQUOT: "the disk quota is used up: free some space",
            errno.EROFS: "the file system is read-only: choose another folder",
            errno.EACCES: "permission denied: choose another folder or change its rights",
            errno.EPERM: "not permitted: choose another folder or change its rights",
            errno.ENOTDIR: "a part of this path is a file, not a folder: choose another path",
            errno.ENOENT: "it is not there (any more): check the path",
        }
        if e.errno not in causes:
            raise
        sys.exit(
            f"error: {e.filename or 'a file'}: {causes[e.errno]}; the last whole checkpoint is untouched"
        )
    except RuntimeError as e:
        text = str(e)
        if "can't allocate memory" in text:
            sys.exit(f"error: the machine is out of memory: {advice_on_memory()}")
        if "Connection closed by peer" in text or "Connection reset by peer" in text:
            sys.exit("error: another rank died, so this one stops too; the cause is in that rank's output")
        raise
