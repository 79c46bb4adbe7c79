"""Kronecker Embeddings (arXiv 2605.29459): a fixed byte codec and one learned projection.

from kronecker import KroneckerEmbedding
emb = KroneckerEmbedding(vocab_size=50304, d_model=768, tokenizer=tokenizer, pos_dim=16)
x = emb(ids)  # like nn.Embedding
"""

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
