"""The bytes of every token of a tokenizer, and the buffers the embedding reads them from.

True bytes (`byte_extraction="bytes"`) are what the token stands for in encoded text: tiktoken's own bytes, a
byte-level piece mapped back through its alphabet, U+2581 of a SentencePiece piece as a space, `<0xNN>` as one byte,
an added or special token's literal text. `decode()`, the reference package's way (`byte_extraction="decode"`), turns
every piece that is not whole UTF-8 into U+FFFD and so gives many tokens the same embedding.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # torch is imported where tensors are made: it takes seconds, and reading tokens needs none
    from torch import Tensor

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
EXTRACTIONS = ("bytes", "decode")


def build_byte_buffer(tokenizer, pos_dim: int = 32, byte_extraction: str = "bytes") -> tuple[Tensor, Tensor]:
    """Bytes and lengths of every token: uint8 (V, pos_dim) zero-padded, int16 (V,).

    tokenizer: a tiktoken.Encoding, a fast transformers tokenizer, a tokenizers.Tokenizer, mistral-common's
    Tekkenizer or the path of a tekken*.json, or a plain list of bytes (one entry a token id). Longer tokens keep
    their first pos_dim bytes; with byte_extraction="decode" (the reference's way) they are cut before the
    character that would cross pos_dim. Ids without a token have length 0.
    Raises TypeError for a tokenizer of an unknown kind, ValueError for an unknown byte_extraction.
    """
    import torch

    pieces = _read(tokenizer, byte_extraction)
    if byte_extraction == "decode":
        pieces = [utf8_safe_truncate(piece, pos_dim) for piece in pieces]
    flat_K, starts_V, lengths_V = _spelled(pieces) if isinstance(pieces, list) else pieces
    if not len(lengths_V):
        raise ValueError("the tokenizer has no tokens, so there is nothing to embed")
    if pos_dim < 1 or pos_dim > np.iinfo(np.int16).max:
        raise ValueError(f"pos_dim must be between 1 and {np.iinfo(np.int16).max}, but it is {pos_dim}")
    lengths_V = lengths_V.clip(max=pos_dim).astype(np.int16)
    position_P = np.arange(pos_dim, dtype=np.int16)
    flat_K = np.concatenate((flat_K, np.zeros(pos_dim, dtype=np.uint8)))  # each token is read pos_dim wide
    bytes_VxP = np.lib.stride_tricks.sliding_window_view(flat_K, pos_dim)[starts_V]
    bytes_VxP *= position_P < lengths_V[:, None]
    return torch.from_numpy(bytes_VxP), torch.from_numpy(lengths_V)


def token_bytes(tokenizer, byte_extraction: str = "bytes") -> list[bytes]:
    """The untruncated bytes of ids 0..V-1, b"" for an id without a token; arguments as build_byte_buffer."""
    pieces = _read(tokenizer, byte_extraction)
    if isinstance(pieces, list):
        return pieces
    flat, ends_V = pieces.flat_K.tobytes(), pieces.starts_V + pieces.lengths_V
    return [flat[start:end] for start, end in zip(pieces.starts_V.tolist(), ends_V.tolist(), strict=True)]


def token_id_to_bytes(
    tokenizer, token_id: int, special_ids: set[int] | None = None, byte_extraction: str = "bytes"
) -> bytes:
    """The untruncated bytes of one token; ids in `special_ids` give their piece's literal text.

    Reads all tokens: for many of them take token_bytes. Raises IndexError for an id outside the tokenizer's range.
    """
    pieces = token_bytes(tokenizer, byte_extraction)
    if not 0 <= token_id < len(pieces):
        raise IndexError(f"token id {token_id} is outside 0..{len(pieces) - 1} of this tokenizer")
    if special_ids and token_id in special_ids and hasattr(tokenizer, "convert_ids_to_tokens"):
        return (tokenizer.convert_ids_to_tokens(token_id) or "").encode("utf-8")
    return pieces[token_id]


def utf8_safe_truncate(byte_seq: bytes, max_bytes: int) -> bytes:
    """The longest valid UTF-8 prefix of at most max_bytes bytes (the reference's rule: it looks back 4)."""
    if len(byte_seq) <= max_bytes:
        return byte_seq
    for end in range(max_bytes, max(max_bytes - 4, -1), -1):
        try:
            byte_seq[:end].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return byte_seq[:end]
    return b""


def coverage_stats(length_buffer: Tensor, pos_dim: int = 32) -> dict:
    """How many tokens reach pos_dim, as a dict with the reference's keys."""
    import torch

    lengths_V = torch.as_tensor(length_buffer)
    n = lengths_V.numel()
    n_at = int((lengths_V >= pos_dim).sum())
    return {
        "vocab_size": n,
        "pos_dim": int(pos_dim),
        "n_at_or_above_pos_dim": n_at,
        "pct_within_pos_dim": 100.0 * (n - n_at) / max(n, 1),
        "max_observed_length": int(lengths_V.max()) if n else 0,
    }


# ---- one reader a kind of tokenizer: the bytes of ids 0..V-1 ----


class Spelled(NamedTuple):
    """The bytes of V tokens in one array: token i has lengths[i] of them from starts[i] on. (A Python object for each
    token would take longer than all else.)"""

    flat_K: np.ndarray  # uint8
    starts_V: np.ndarray  # int32
    lengths_V: np.ndarray  # int32


def _spelled(pieces: list[bytes]) -> Spelled:
    lengths_V = np.fromiter(map(len, pieces), dtype=np.int32, count=len(pieces))
    flat_K = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    return Spelled(flat_K, lengths_V.cumsum(dtype=np.int32) - lengths_V, lengths_V)


def _read(tokenizer, byte_extraction: str) -> list[bytes] | Spelled:
    if byte_extraction not in EXTRACTIONS:
        raise ValueError(f"byte_extraction must be 'bytes' or 'decode', but it is {byte_extraction!r}")
    if hasattr(tokenizer, "instruct_tokenizer"):  # mistral-common's MistralTokenizer wraps the Tekkenizer
        tokenizer = tokenizer.instruct_tokenizer.tokenizer
    special = None
    if hasattr(tokenizer, "backend_tokenizer"):
        special = set(getattr(tokenizer, "all_special_ids", None) or [])
        tokenizer = tokenizer.backend_tokenizer
    if hasattr(tokenizer, "get_added_tokens_decoder") and hasattr(tokenizer, "id_to_token"):
        return _huggingface(tokenizer, byte_extraction, special)
    if isinstance(tokenizer, list | tuple):
        pieces = _checked_list(tokenizer)
    elif isinstance(tokenizer, str | Path):
        pieces = read_tekken_file(tokenizer)
    elif hasattr(tokenizer, "decode_single_token_bytes"):
        pieces = _tiktoken(tokenizer)
    elif hasattr(tokenizer, "id_to_byte_piece"):
        n_special = tokenizer.num_special_tokens
        special = [tokenizer.id_to_piece(i).encode("utf-8") for i in range(n_special)]
        pieces = special + [tokenizer.id_to_byte_piece(i) for i in range(n_special, tokenizer.n_words)]
    else:
        raise TypeError(
            f"cannot read the token bytes of a {type(tokenizer).__module__}.{type(tokenizer).__name__}: give a "
            "tiktoken Encoding, a transformers fast tokenizer, a tokenizers.Tokenizer, a Tekkenizer, or a list with "
            "the bytes of each token id"
        )
    if byte_extraction == "decode":  # each broken UTF-8 sequence becomes U+FFFD
        return [piece.decode("utf-8", errors="replace").encode("utf-8") for piece in pieces]
    return pieces


def _checked_list(pieces) -> list[bytes]:
    for i, piece in enumerate(pieces):
        if not isinstance(piece, bytes | bytearray):
            raise TypeError(f"a list of token bytes must hold bytes, but entry {i} is {type(piece).__name__}")
    return list(map(bytes, pieces))


def _tiktoken(encoding) -> list[bytes]:
    def read(token_id: int) -> bytes:
        try:
            return encoding.decode_single_token_bytes(token_id)
        except KeyError:  # an id that the encoding leaves free
            return b""

    return list(map(read, range(encoding.n_vocab)))


def read_tekken_file(path: str | Path) -> list[bytes]:
    """Token bytes of a mistral-common tekken*.json: the special tokens first, then the ranks (base64).

    Raises ValueError for a file that is not in this format.
    """
    import base64

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        config, vocab = content["config"], content["vocab"]
        n_vocab, n_special = int(config["default_vocab_size"]), int(config["default_num_special_tokens"])
        if not 0 <= n_special <= n_vocab <= min(n_special + len(vocab), 10**7):
            raise ValueError(f"{n_vocab} tokens, {n_special} of them special, but {len(vocab)} ranks")
        # files before 2025 do not list their special tokens; the ids exist all the same
        named = {entry["rank"]: entry["token_str"] for entry in content.get("special_tokens") or []}
        special = [named.get(i, f"<SPECIAL_{i}>").encode("utf-8") for i in range(n_special)]
        ranks = sorted(vocab, key=lambda entry: entry["rank"])[: n_vocab - n_special]
        return special + [base64.b64decode(entry["token_bytes"]) for entry in ranks]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a readable tekken JSON file ({error})") from None


def _byte_piece(piece: str) -> bytes:
    """The byte that a piece <0xNN> stands for; b"" for another piece."""
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte.group(1), 16)]) if byte else b""


def _huggingface(backend, byte_extraction: str, special: set[int] | None) -> list[bytes] | Spelled:
    """A tokenizers.Tokenizer; its decoder, else its pre-tokenizer, tells the alphabet of its pieces."""
    vocab, added = backend.get_vocab(with_added_tokens=True), backend.get_added_tokens_decoder()
    steps = _steps(backend.decoder) or _steps(backend.pre_tokenizer)
    kinds = {step["type"] for step in steps}
    if byte_extraction == "bytes" and "ByteLevel" in kinds:
        return _byte_level(vocab, {i: token.content for i, token in added.items()})

    pieces = [""] * _count(np.array(list(vocab.values())))
    for piece, token_id in vocab.items():
        pieces[token_id] = piece
    if byte_extraction == "decode":
        special = {i for i, token in added.items() if token.special} if special is None else special
        decoded = backend.decode_batch([[i] for i in range(len(pieces))], skip_special_tokens=False)
        texts = [piece if i in special else decoded[i] for i, piece in enumerate(pieces)]
        return [_byte_piece(piece) or text.encode("utf-8") for piece, text in zip(pieces, texts, strict=True)]
    space = _space_symbol(steps)
    if kinds == {"Fuse"}:  # which joins the pieces as they stand
        space = " "
    if space is None:
        raise TypeError(
            "cannot read true token bytes of this tokenizer (decoder steps: "
            f"{', '.join(sorted(kinds)) or 'none'}): byte-level and SentencePiece (Metaspace) kinds are known; "
            "give a list with the bytes of each token id, or byte_extraction='decode'"
        )
    spelled = [_byte_piece(piece) or piece.replace(space, " ").encode("utf-8") for piece in pieces]
    for token_id, token in added.items():
        spelled[token_id] = token.content.encode("utf-8")
    return spelled


def _steps(component) -> list[dict]:
    """A decoder's or pre-tokenizer's description as a flat list of steps ([] for None)."""
    if component is None:
        return []
    description = json.loads(component.__getstate__())
    return description.get("decoders") or description.get("pretokenizers") or [description]


def _space_symbol(steps: list[dict]) -> str | None:
    """The symbol that stands for a space in SentencePiece-like pieces; None for another kind."""
    for step in steps:
        if step["type"] == "Metaspace":
            return step["replacement"]
        if step["type"] == "Replace" and step.get("content") == " ":
            return step["pattern"].get("String")
    return None


def _byte_level(vocab: dict[str, int], literal: dict[int, str]) -> Spelled:
    """What byte-level pieces spell, all in one look-up. Literal tokens, and pieces with a character outside of the
    alphabet, stand for themselves, as in the library's decoder."""
    table = np.full(325, -1, dtype=np.int16)  # its last entry serves every character beyond the alphabet
    for byte, character in byte_level_alphabet().items():
        table[ord(character)] = byte
    codes_K = np.frombuffer("".join(vocab).encode("utf-32-le", "surrogatepass"), dtype="<i4")
    bytes_K = table.take(codes_K, mode="clip")
    ids = np.fromiter(vocab.values(), dtype=np.int64, count=len(vocab))
    lengths = np.fromiter(map(len, vocab), dtype=np.int32, count=len(vocab))
    starts = lengths.cumsum(dtype=np.int32) - lengths

    outside = np.flatnonzero(bytes_K < 0)
    if len(outside):
        names = list(vocab)
        odd = np.unique(np.searchsorted(starts, outside, side="right") - 1).tolist()
        literal = {int(ids[i]): names[i] for i in odd} | literal
    more = _spelled([piece.encode("utf-8") for piece in literal.values()])
    starts_V, lengths_V = np.zeros((2, _count(ids)), dtype=np.int32)
    starts_V[ids], lengths_V[ids] = starts, lengths
    at = list(literal)
    starts_V[at], lengths_V[at] = len(codes_K) + more.starts_V, more.lengths_V
    return Spelled(np.concatenate((bytes_K.astype(np.uint8), more.flat_K)), starts_V, lengths_V)


def _count(ids: np.ndarray) -> int:
    """How many ids there are from 0 to the highest; ValueError where that is beyond any vocabulary."""
    n_tokens = int(ids.max(initial=-1)) + 1
    if n_tokens > 10**7:
        raise ValueError(f"the tokenizer has {len(ids)} tokens, but ids up to {n_tokens - 1}: it is damaged")
    return n_tokens


def byte_level_alphabet() -> dict[int, str]:
    """GPT-2's byte -> character map: printable Latin-1 as it is, the other bytes U+0100, U+0101, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
