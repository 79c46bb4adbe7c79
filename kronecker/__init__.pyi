# What type checkers see of __init__.py.
from kronecker.codec import codec_output_dim, encode_single, kronecker_codec
from kronecker.embedding import KroneckerEmbedding
from kronecker.tokens import (
    build_byte_buffer,
    coverage_stats,
    token_bytes,
    token_id_to_bytes,
    utf8_safe_truncate,
)

__all__ = [
    "KroneckerEmbedding",
    "build_byte_buffer",
    "codec_output_dim",
    "coverage_stats",
    "encode_single",
    "kronecker_codec",
    "token_bytes",
    "token_id_to_bytes",
    "utf8_safe_truncate",
]
