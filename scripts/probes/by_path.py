"""What a probe that is run by its path imports first: the root takes the place of this folder, whose names would hide others."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
import scripts.by_path  # noqa: F401 - Ctrl-C
