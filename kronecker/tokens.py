"""The bytes of every token of a tokenizer, and the buffers the embedding reads them from.

True bytes (`byte_extraction="bytes"`) are what the token stands for in encoded text: tiktoken's own bytes, a
byte-level piece mapped back through its byte-to-unicode alphabet, U+2581 of a SentencePiece piece as a space,
`<0xNN>` as one byte, an added or special token's literal text. Going through `decode()` instead, as the
reference package does, turns every piece that is not whole UTF-8 into U+FFFD and so gives many tokens the
same embedding; that way stays available as `byte_extraction="decode"`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # torch is imported where tensors are made: it takes seconds, and reading tokens needs none
    from torch import Tensor

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
EXTRACTIONS = ("bytes", "decode")


def build_byte_buffer(tokenizer, pos_dim: int = 32, byte_extraction: str = "bytes") -> tuple[Tensor, Tensor]:
    """Bytes and lengths of every token: uint8 (V, pos_dim) zero-padded, int16 (V,).

    tokenizer: a tiktoken.Encoding, a transformers tokenizer, a tokenizers.Tokenizer, mistral-common's
    Tekkenizer or the path of a tekken*.json, a SentencePieceProcessor, or a plain list of bytes (one entry a
    token id). Longer tokens keep their first pos_dim bytes; with byte_extraction="decode" (the reference's
    way) they are cut before the character that would cross pos_dim. Ids without a token have length 0.
    Raises TypeError for a tokenizer of an unknown kind, ValueError for an unknown byte_extraction.
    """
    import torch

    pieces = token_bytes(tokenizer, byte_extraction)
    if not pieces:
        raise ValueError("the tokenizer has no tokens, so there is nothing to embed")
    if pos_dim < 1 or pos_dim > np.iinfo(np.int16).max:
        raise ValueError(f"pos_dim must be between 1 and {np.iinfo(np.int16).max}, but it is {pos_dim}")
    if byte_extraction == "decode":
        kept = [utf8_safe_truncate(piece, pos_dim) for piece in pieces]
    else:
        kept = pieces
    fixed_V = np.array(kept, dtype=f"S{pos_dim}")  # cuts and pads in C
    lengths_V = np.fromiter(map(len, kept), dtype=np.int64, count=len(kept)).clip(max=pos_dim)
    bytes_VxP = fixed_V.view(np.uint8).reshape(len(kept), pos_dim)
    return torch.from_numpy(bytes_VxP), torch.from_numpy(lengths_V.astype(np.int16))


def token_bytes(tokenizer, byte_extraction: str = "bytes") -> list[bytes]:
    """The untruncated bytes of ids 0..V-1, b"" for an id without a token; arguments as build_byte_buffer."""
    if byte_extraction not in EXTRACTIONS:
        raise ValueError(f"byte_extraction must be 'bytes' or 'decode', but it is {byte_extraction!r}")
    if isinstance(tokenizer, list | tuple):
        return _checked_list(tokenizer, byte_extraction)
    n_tokens, read = _reader(tokenizer, byte_extraction)
    return list(map(read, range(n_tokens)))


def token_id_to_bytes(
    tokenizer, token_id: int, special_ids: set[int] | None = None, byte_extraction: str = "bytes"
) -> bytes:
    """The untruncated bytes of one token; ids in `special_ids` give their piece's literal text.

    Raises IndexError for an id outside the tokenizer's range.
    """
    if isinstance(tokenizer, list | tuple):
        pieces = token_bytes(tokenizer, byte_extraction)
        n_tokens, read = len(pieces), pieces.__getitem__
    else:
        n_tokens, read = _reader(tokenizer, byte_extraction)
    if not 0 <= token_id < n_tokens:
        raise IndexError(f"token id {token_id} is outside 0..{n_tokens - 1} of this tokenizer")
    if special_ids and token_id in special_ids and hasattr(tokenizer, "convert_ids_to_tokens"):
        return (tokenizer.convert_ids_to_tokens(token_id) or "").encode("utf-8")
    return read(token_id)


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


# ---- one reader a kind of tokenizer: (number of ids, function id -> bytes) ----

Reader = tuple[int, Callable[[int], bytes]]


def _reader(tokenizer, byte_extraction: str) -> Reader:
    if isinstance(tokenizer, str | Path):
        return _tekken_file(Path(tokenizer), byte_extraction)
    if hasattr(tokenizer, "decode_single_token_bytes"):
        return _tiktoken(tokenizer, byte_extraction)
    if hasattr(tokenizer, "instruct_tokenizer"):  # mistral-common's MistralTokenizer wraps the Tekkenizer
        tokenizer = tokenizer.instruct_tokenizer.tokenizer
    if hasattr(tokenizer, "id_to_byte_piece"):
        return _tekkenizer(tokenizer, byte_extraction)
    if hasattr(tokenizer, "backend_tokenizer"):
        special = set(getattr(tokenizer, "all_special_ids", None) or [])
        return _huggingface(tokenizer.backend_tokenizer, byte_extraction, special)
    if hasattr(tokenizer, "get_added_tokens_decoder") and hasattr(tokenizer, "id_to_token"):
        special = {i for i, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        return _huggingface(tokenizer, byte_extraction, special)
    if hasattr(tokenizer, "id_to_piece") and hasattr(tokenizer, "is_byte"):
        return _sentencepiece(tokenizer, byte_extraction)
    if hasattr(tokenizer, "sp_model"):  # a slow transformers tokenizer
        return _sentencepiece(
            tokenizer.sp_model, byte_extraction, len(tokenizer), tokenizer.convert_ids_to_tokens
        )
    raise TypeError(
        f"cannot read the token bytes of a {type(tokenizer).__module__}.{type(tokenizer).__name__}: give a "
        "tiktoken Encoding, a transformers fast tokenizer, a tokenizers.Tokenizer, a Tekkenizer, "
        "a SentencePieceProcessor, or a list with the bytes of each token id"
    )


def _checked_list(pieces, byte_extraction: str) -> list[bytes]:
    for i, piece in enumerate(pieces):
        if not isinstance(piece, bytes | bytearray):
            raise TypeError(
                f"a list of token bytes must hold bytes, but entry {i} is a {type(piece).__name__}"
            )
    if byte_extraction == "decode":
        return [_through_text(bytes(piece)) for piece in pieces]
    return [bytes(piece) for piece in pieces]


def _through_text(piece: bytes) -> bytes:
    """What decode() leaves of a piece: each broken UTF-8 sequence becomes U+FFFD (3 bytes)."""
    return piece.decode("utf-8", errors="replace").encode("utf-8")


def _tiktoken(encoding, byte_extraction: str) -> Reader:
    def read(token_id: int) -> bytes:
        try:
            piece = encoding.decode_single_token_bytes(token_id)
        except KeyError:  # an id that the encoding leaves free
            return b""
        return _through_text(piece) if byte_extraction == "decode" else piece

    return encoding.n_vocab, read


def _tekkenizer(tekken, byte_extraction: str) -> Reader:
    n_special = tekken.num_special_tokens

    def read(token_id: int) -> bytes:
        if token_id < n_special:
            return tekken.id_to_piece(token_id).encode("utf-8")
        piece = tekken.id_to_byte_piece(token_id)
        return _through_text(piece) if byte_extraction == "decode" else piece

    return tekken.n_words, read


def _tekken_file(path: Path, byte_extraction: str) -> Reader:
    pieces = read_tekken_file(path)
    if byte_extraction == "decode":
        pieces = [_through_text(piece) for piece in pieces]
    return len(pieces), pieces.__getitem__


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


def _sentencepiece(processor, byte_extraction: str, n_tokens: int | None = None, id_to_piece=None) -> Reader:
    id_to_piece = id_to_piece or processor.id_to_piece

    def read(token_id: int) -> bytes:
        return _metaspace_piece(id_to_piece(token_id) or "", "\u2581")

    if byte_extraction == "decode":
        raise ValueError(
            "byte_extraction='decode' needs a transformers or tiktoken tokenizer, not SentencePiece's own"
        )
    return n_tokens or processor.get_piece_size(), read


def _metaspace_piece(piece: str, space: str) -> bytes:
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte.group(1), 16)]) if byte else piece.replace(space, " ").encode("utf-8")


def _huggingface(backend, byte_extraction: str, special_ids: set[int]) -> Reader:
    """A tokenizers.Tokenizer; its decoder, else its pre-tokenizer, tells the alphabet of its pieces."""
    vocab = backend.get_vocab(with_added_tokens=True)
    n_tokens = max(vocab.values(), default=-1) + 1
    if n_tokens > 10**7:
        raise ValueError(
            f"the tokenizer has {len(vocab)} tokens, but ids up to {n_tokens - 1}: it is damaged"
        )
    pieces = [""] * n_tokens
    for piece, token_id in vocab.items():
        pieces[token_id] = piece
    if byte_extraction == "decode":
        return n_tokens, _huggingface_decode(backend, pieces, n_tokens, special_ids)

    steps = _steps(backend.decoder) or _steps(backend.pre_tokenizer)
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        spelled = _byte_level_pieces(pieces)
    elif space := _space_symbol(steps):
        spelled = [_metaspace_piece(piece, space) for piece in pieces]
    else:
        raise TypeError(
            "cannot read true token bytes of this tokenizer (decoder steps: "
            f"{', '.join(sorted(kinds)) or 'none'}): byte-level and SentencePiece (Metaspace) kinds are known; "
            "give a list with the bytes of each token id, or byte_extraction='decode'"
        )

    for token_id, added in backend.get_added_tokens_decoder().items():
        spelled[token_id] = added.content.encode("utf-8")
    return n_tokens, spelled.__getitem__


def _huggingface_decode(backend, pieces: list[str], n_tokens: int, special_ids: set[int]):
    decoded = backend.decode_batch([[i] for i in range(n_tokens)], skip_special_tokens=False)

    def read(token_id: int) -> bytes:
        piece = pieces[token_id]
        byte = BYTE_PIECE.fullmatch(piece)
        if byte:
            return bytes([int(byte.group(1), 16)])
        return (piece if token_id in special_ids else decoded[token_id]).encode("utf-8")

    return read


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


def _byte_level_pieces(pieces: list[str]) -> list[bytes]:
    """The bytes that byte-level pieces spell, all in one look-up. A piece with a character outside of the
    alphabet stands for itself, as in the library's decoder."""
    table = np.full(0x110000, -1, dtype=np.int16)
    for byte, character in byte_level_alphabet().items():
        table[ord(character)] = byte
    codes_K = np.frombuffer("".join(pieces).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    bytes_K = table[codes_K]
    ends = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces)).cumsum()
    flat, bounds = bytes_K.astype(np.uint8).tobytes(), [0, *ends.tolist()]
    spelled = [flat[start:end] for start, end in pairwise(bounds)]
    for i in np.unique(np.searchsorted(ends, np.flatnonzero(bytes_K < 0), side="right")).tolist():
        spelled[i] = pieces[i].encode("utf-8")
    return spelled


def byte_level_alphabet() -> dict[int, str]:
    """GPT-2's byte -> character map: printable Latin-1 as it is, the other bytes U+0100, U+0101, ..."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
