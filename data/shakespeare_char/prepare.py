"""Tiny Shakespeare, or any text, as characters: nanoGPT's train.bin, val.bin and meta.pkl.

python data/shakespeare_char/prepare.py                    downloads the 1.1 MB text
python data/shakespeare_char/prepare.py --input FILE       takes a text of yours
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: let `import data` find the project
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from data import plain_text

if __name__ == "__main__":
    plain_text.main(None, __file__, __doc__, characters=True)
