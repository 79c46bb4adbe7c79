"""Kronecker Embeddings (arXiv 2605.29459): a fixed byte codec and one learned projection.

from kronecker import KroneckerEmbedding
emb = KroneckerEmbedding(vocab_size=50304, d_model=768, tokenizer=tokenizer, pos_dim=16)
x = emb(ids)  # like nn.Embedding
"""

from importlib import import_module

# Where each name lives. Its module comes in when it is first asked for, since reading tokens needs no torch, which
# takes seconds to import. (Type checkers read __init__.pyi.)
HOMES = {
    "KroneckerEmbedding": "kronecker.embedding",
    "build_byte_buffer": "kronecker.tokens",
    "codec_output_dim": "kronecker.codec",
    "coverage_stats": "kronecker.tokens",
    "encode_single": "kronecker.codec",
    "kronecker_codec": "kronecker.codec",
    "token_bytes": "kronecker.tokens",
    "token_id_to_bytes": "kronecker.tokens",
    "utf8_safe_truncate": "kronecker.tokens",
}
__all__ = list(HOMES)


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module 'kronecker' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | HOMES.keys())
