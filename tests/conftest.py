"""Fixtures that several test modules share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real text and tokenizer files; tests that want it skip where it is absent."""
    path = Path(os.environ.get("KNG_SHARED", ROOT.parent / "shared"))
    if not (path / "tokenizers").is_dir():
        pytest.skip("real text and tokenizers are not here (point KNG_SHARED at them)")
    return path


@pytest.fixture(scope="session")
def gpt2_encoding(shared_dir):
    """tiktoken's GPT-2 encoding, read from the local cache instead of the network."""
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(shared_dir / "tokenizers" / "tiktoken_cache"))
    import tiktoken

    return tiktoken.get_encoding("gpt2")
