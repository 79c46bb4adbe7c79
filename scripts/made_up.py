"""Data that benches and checks of a training make up for themselves."""

import pickle
from pathlib import Path

import numpy as np

from data.meta import write_meta


def write_data(folder: Path, vocab_size: int) -> None:
    """Zipf-like tokens, as text has them, in nanoGPT's headerless form; and a tokenizer of made-up words."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    ranks = np.minimum(rng.zipf(1.2, 2_000_000) - 1, vocab_size - 1)
    tokens = rng.permutation(vocab_size)[ranks].astype(np.uint16)
    tokens[:1_900_000].tofile(folder / "train.bin")
    tokens[1_900_000:].tofile(folder / "val.bin")
    # byte lengths as in GPT-2's vocabulary: 1 to 16, six on average
    letters = (rng.integers(97, 123, min(16, 1 + rng.poisson(5))) for _ in range(vocab_size))
    spec = {"kind": "chars", "itos": ["".join(map(chr, word)) for word in letters]}
    write_meta(folder, {"format": 1, "tokenizer": spec, "vocab_size": vocab_size, "dtype": "uint16"})
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))  # what nanoGPT reads of it
