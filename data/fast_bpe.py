"""GPT-2's byte-level BPE over many documents at once, in NumPy: the ids of tiktoken, several times sooner.

tiktoken spends most of its time in a backtracking regular expression and in one dictionary look-up a piece.
Both are regular enough to be done on whole arrays:

1. The pattern that splits text into pieces only asks whether a character is a letter, a number, white space
   or something else, and what its neighbours are. So classes of bytes are compared with their neighbours'
   (`_split`).
2. A piece of up to 15 bytes and its length fit into 128 bits. These are its exact key in an open-addressing
   table of pieces seen before (`_Table`), whose value is the piece's id or its list of ids. There are no
   false hits.
3. Pieces that the table lacks go to tiktoken, one by one, and into the table.

Text around characters of which this Python's Unicode tables and tiktoken's might disagree (assigned lately,
or rare scripts) goes to tiktoken as it is. The tests compare both on every code point, on fuzzed and on
real text.
"""

import itertools
import re
import unicodedata
from array import array

import numpy as np

from data.tokenizers import GPT2_PATTERN, clean_text

LETTER, NUMBER, OTHER, SPACE, EDGE, UNSURE = range(6)
LONGEST = 15  # bytes of a piece that fit into a key beside its length
# other spellings of the pattern, tiktoken's of several years among them, that match the same pieces
PATTERNS = (
    GPT2_PATTERN,
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)
WHITE_SPACE = [*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F]
WHITE_SPACE += [0x205F, 0x3000]
PICTOGRAPHS = (
    (0x1F300, 0x1F64F),
    (0x1F680, 0x1F6C5),
    (0x1F910, 0x1F93A),
    (0x1F940, 0x1F945),
    (0x1F947, 0x1F970),
)


class FastEncoder:
    """Encodes lists of documents with a tokenizer of data.tokenizers, each opened by end-of-text.

    Uses the arrays where the tokenizer is a tiktoken.Encoding with GPT-2's pattern (gpt2, r50k_base,
    p50k_base, our own small BPE), else calls the tokenizer. slots: size of the table, a power of two; 20
    bytes each.
    """

    def __init__(self, tokenizer, slots: int = 1 << 20):
        self.tokenizer = tokenizer
        self.dtype = np.dtype("<u2") if tokenizer.n_vocab <= 2**16 else np.dtype("<u4")
        encoding = tokenizer.backend
        self.vectorised = getattr(encoding, "_pat_str", None) in PATTERNS
        if self.vectorised:
            self._pieces = _Table(encoding, slots)
            self._classes = character_classes()

    def encode(self, texts: list[str]) -> np.ndarray:
        """Ids of all documents, each opened by end-of-text: (n,) uint16, or uint32 for n_vocab > 65536."""
        return self.encode_parts(texts, [True] * len(texts))

    def encode_parts(self, texts: list[str], opens: list[bool]) -> np.ndarray:
        """As `encode`, for parts of documents: only those marked in `opens` get an end-of-text in front.

        A part must have been cut off by `safe_cut`.
        """
        if not self.vectorised:
            parts = zip(texts, opens, strict=True)
            return np.concatenate([np.empty(0, self.dtype), *(self._encode_one(*part) for part in parts)])
        done, group, size = [], [], 0
        for text, opening in zip(texts, opens, strict=True):
            begin = 0
            while True:  # long documents part by part, so that the memory needed has a limit
                end = safe_cut(text, begin + MOST_AT_ONCE)
                group.append((text[begin:end] if end - begin < len(text) else text, opening and begin == 0))
                size += end - begin
                if size >= MOST_AT_ONCE:
                    done.append(self._encode_group(group))
                    group, size = [], 0
                begin = end
                if begin >= len(text):
                    break
        if group:
            done.append(self._encode_group(group))
        return np.concatenate([np.empty(0, self.dtype), *done])

    def _encode_group(self, parts: list[tuple[str, bool]]) -> np.ndarray:
        data = []
        for text, _ in parts:
            try:
                data.append(text.encode())
            except UnicodeEncodeError:
                data.append(clean_text(text).encode())
        lengths = np.fromiter(map(len, data), np.int64, len(data))
        # a zero byte opens each part; the 16 at the end let every piece be read as two words
        raw = b"\0" + b"\0".join(data) + bytes(16)
        edges = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
        starts, unsure = _split(np.frombuffer(raw, np.uint8), edges, self._classes)
        ids, first = self._pieces.look_up(raw, starts, edges, self.tokenizer.eot)
        ids = ids.astype(self.dtype)
        if len(unsure):
            ends = np.append(first[1:], len(ids))
            pieces = [ids[a + (not opens) : b] for a, b, (_, opens) in zip(first, ends, parts, strict=True)]
            for k in unsure.tolist():
                pieces[k] = self._encode_unsure(*parts[k])
            return np.concatenate(pieces)
        follow_ups = [int(a) for a, (_, opens) in zip(first, parts, strict=True) if not opens]
        return np.delete(ids, follow_ups) if follow_ups else ids

    def _encode_unsure(self, text: str, opens: bool) -> np.ndarray:
        """A part with unsure characters: what is around them goes to tiktoken, the rest does not."""
        cuts = [0]
        while len(text) > FEW and cuts[-1] < len(text):
            cuts.append(safe_cut(text, cuts[-1] + FEW))
        if len(cuts) < 3:
            return self._encode_one(text, opens)
        return self._encode_group([(text[a:b], opens and a == 0) for a, b in itertools.pairwise(cuts)])

    def _encode_one(self, text: str, opens: bool) -> np.ndarray:
        return np.array([self.tokenizer.eot] * opens + self.tokenizer.encode(text), self.dtype)


MOST_AT_ONCE = 1 << 20  # characters that are encoded together
FEW = 1 << 10  # characters that tiktoken gets for the sake of an unsure one
# letters of the commonest alphabets; data.sources looks for the same in bytes
SAFE_CUT = re.compile(r"(?<=[A-Za-z\u0430-\u044f\u5000-\u8fff])(?=[ \n])")


def safe_cut(text: str, at: int) -> int:
    """The first place from `at` on where a text can be cut without changing its tokens, else its end.

    A cut between a letter and the space or line end behind it: no piece of GPT-2's pattern, nor of its
    successors', goes across.
    """
    found = SAFE_CUT.search(text, at) if at < len(text) else None
    return found.start() if found else len(text)


def character_classes() -> np.ndarray:
    """The class of each code point below 0x20000, uint8; UNSURE where Unicode versions might disagree.

    Sure are the characters that Unicode 3.2 (2002) has in the class in which this Python has them, and the
    older pictographs.
    """
    table = np.full(0x20000, UNSURE, np.uint8)
    now, then = unicodedata.category, unicodedata.ucd_3_2_0.category
    kinds = {"L": LETTER, "N": NUMBER}
    for code in range(0x10000):
        a, b = now(chr(code)), then(chr(code))
        if a != "Cn" and b != "Cn" and kinds.get(a[0], OTHER) == kinds.get(b[0], OTHER):
            table[code] = kinds.get(a[0], OTHER)
    for low, high in PICTOGRAPHS:
        table[low : high + 1] = OTHER
    table[WHITE_SPACE] = SPACE
    return table


def _split(data: np.ndarray, edges: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where GPT-2's pattern starts a piece, and which documents have characters of unsure class.

    data: UTF-8 (n + 16,) with a zero byte in front of each document, at `edges`, and 16 at the end; each of
    those zero bytes is a piece too.

        's 't 'm 'd 're 've 'll | ' '? letters | ' '? numbers | ' '? others | spaces before a space or the
        end | spaces
    """
    n = len(data) - 16
    kind = classes[:256].take(data)
    unsure = _classify_multibyte(data[:n], kind, classes)
    kind[edges] = EDGE
    kind[n:] = EDGE
    # a run of one class is a piece ...
    start = np.empty(n + 1, bool)
    start[0] = start[n] = True
    np.not_equal(kind[1:n], kind[: n - 1], out=start[1:n])
    start[edges] = True
    start[edges + 1] = True
    # ... but white space in front of anything gives up its last character,
    following = kind[1 : n + 1]
    last = (kind[:n] == SPACE) & (following != SPACE) & (following != EDGE)
    wide = np.flatnonzero(last & (data[:n] >= 0x80))
    if len(wide):  # whose first byte is one or two before its last
        last[wide] = False
        last[np.where(data[wide - 1] >= 0xC0, wide - 1, wide - 2)] = True
    start[:n] |= last
    # which, if it is a plain space, opens the next piece,
    last &= data[:n] == ord(" ")
    start[1:] &= ~last
    # and an apostrophe that opens a piece takes a contraction's letters
    quote = np.flatnonzero(data[:n] == ord("'"))
    quote = quote[start[quote]]
    a, b = data[quote + 1], data[quote + 2]
    one = (a == ord("s")) | (a == ord("t")) | (a == ord("m")) | (a == ord("d"))
    two = ((a == ord("r")) | (a == ord("v"))) & (b == ord("e")) | (a == ord("l")) & (b == ord("l"))
    start[quote[one | two] + 1] = False
    start[quote[one] + 2] = True
    start[quote[two] + 3] = True
    documents = np.unique(np.searchsorted(edges, unsure, side="right") - 1)
    return np.flatnonzero(start), documents


def _classify_multibyte(data: np.ndarray, kind: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Give every byte of a character beyond ASCII that character's class; returns where unsure ones start."""
    lead = np.flatnonzero(data >= 0xC2)
    if not len(lead):
        return lead
    first = data[lead].astype(np.uint32)
    size = 2 + (first >= 0xE0) + (first >= 0xF0)
    code = first & np.array([0, 0, 0x1F, 0x0F, 0x07], np.uint32)[size]
    for k in (1, 2, 3):
        more = size > k
        code[more] = code[more] << 6 | (data[lead[more] + k] & 0x3F)
    kinds = classes[np.minimum(code, len(classes) - 1)]
    kinds[code >= len(classes)] = UNSURE
    for k in (0, 1, 2, 3):
        more = size > k
        kind[lead[more] + k] = kinds[more]
    return lead[kinds == UNSURE]


class _Table:
    """From pieces to their ids: open addressing on exact 128-bit keys; pieces over 15 bytes in a dict."""

    def __init__(self, encoding, slots: int):
        self._encode = encoding.encode_ordinary
        self._low = np.zeros(slots, np.uint64)
        self._high = np.zeros(slots, np.uint64)  # the length is its top byte, so 0 marks an empty slot
        self._value = np.zeros(slots, np.int32)  # an id, or -1 - k for the k-th piece that takes several
        self._shift = np.uint64(64 - (slots.bit_length() - 1))
        self._free = slots // 2
        self._long: dict[bytes, int] = {}
        # the ids of pieces that take several, one piece after the other, and where each piece's begin
        self._ids, self._begin = array("i"), array("q", [0])
        tokens = [(token, rank) for token, rank in encoding._mergeable_ranks.items() if len(token) <= LONGEST]
        low, high = _keys_of([token for token, _ in tokens])
        self._insert(low, high, np.array([rank for _, rank in tokens], np.int32))

    def look_up(self, raw: bytes, starts, edges, eot: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all pieces of `raw` (its end is the last of starts), and where each part's begin."""
        begin, length = starts[:-1], np.diff(starts)
        words = np.ndarray((len(raw) - 7,), "<u8", raw, strides=(1,))
        low, high = _mask(words[begin], words[begin + 8], length)
        value, found = self._find(low, high)
        edge = np.searchsorted(begin, edges)
        value[edge] = eot
        found[edge] = True
        once = []
        for k in np.flatnonzero(length > LONGEST).tolist():
            found[k] = True
            piece = raw[starts[k] : starts[k + 1]]
            if piece in self._long:
                value[k] = self._long[piece]
            elif len(piece) <= 256 and len(self._long) < 1 << 18:
                value[k] = self._long[piece] = self._value_of(piece)
            else:
                once.append((k, piece))
        missing = np.flatnonzero(~found)
        kept = len(self._begin)
        if len(missing):
            value[missing], kept = self._learn(raw, starts, low, high, missing)
        for k, piece in once:
            value[k] = self._value_of(piece)
        ids = self._gather(value, edge)
        del self._begin[kept:], self._ids[self._begin[-1] :]  # what the full table could not take
        return ids

    def _gather(self, value, edge):
        several = np.flatnonzero(value < 0)
        if not len(several):
            return value, edge
        from_id = np.frombuffer(self._begin, np.int64)[-1 - value[several]]
        n = np.frombuffer(self._begin, np.int64)[-value[several]] - from_id
        count = np.ones(len(value), np.int64)
        count[several] = n
        position = np.cumsum(count) - count
        out = np.empty(position[-1] + count[-1], np.int32)
        out[position] = value  # of a piece with several ids a wrong first one, which the next lines replace
        within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        out[np.repeat(position[several], n) + within] = np.frombuffer(self._ids, np.int32)[
            np.repeat(from_id, n) + within
        ]
        return out, position[edge]

    def _slot(self, low, high):
        mixed = (low ^ (high * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xD6E8FEB86659FD93)
        return (mixed >> self._shift).astype(np.int64)

    def _find(self, low, high) -> tuple[np.ndarray, np.ndarray]:
        slot = self._slot(low, high)
        found = (self._low[slot] == low) & (self._high[slot] == high)
        value = self._value[slot]
        todo = np.flatnonzero(~found)
        slot = slot[todo]
        last = len(self._low) - 1
        while len(todo):
            alive = self._high[slot] != 0  # an empty slot ends the search: not in the table
            todo, slot = todo[alive], (slot[alive] + 1) & last
            hit = (self._low[slot] == low[todo]) & (self._high[slot] == high[todo])
            value[todo[hit]] = self._value[slot[hit]]
            found[todo[hit]] = True
            todo, slot = todo[~hit], slot[~hit]
        return value, found

    def _insert(self, low, high, value) -> None:
        """Add keys that are not in the table, each given once; those beyond half of the slots are dropped."""
        low, high, value = low[: self._free], high[: self._free], value[: self._free]
        self._free -= len(low)
        slot = self._slot(low, high)
        todo = np.arange(len(low))
        last = len(self._low) - 1
        while len(todo):
            empty = todo[self._high[slot[todo]] == 0]
            _, winner = np.unique(slot[empty], return_index=True)  # of those that want the same slot
            won = empty[winner]
            at = slot[won]
            self._low[at], self._high[at], self._value[at] = low[won], high[won], value[won]
            done = np.zeros(len(low), bool)
            done[won] = True
            todo = todo[~done[todo]]
            slot[todo] = (slot[todo] + 1) & last

    def _learn(self, raw, starts, low, high, missing) -> tuple[np.ndarray, int]:
        """Values of pieces that the table lacks, which from now on it has while there is room.

        Also how many entries of self._begin belong to pieces that it took.
        """
        ends = starts[missing + 1].tolist()
        pieces = [raw[a:b] for a, b in zip(starts[missing].tolist(), ends, strict=True)]
        # where each piece is first
        position = dict(zip(reversed(pieces), reversed(missing.tolist()), strict=True))
        fresh, kept = {}, len(self._begin)
        for n, piece in enumerate(position):
            fresh[piece] = self._value_of(piece)
            if n < self._free:
                kept = len(self._begin)
        first = np.fromiter(position.values(), np.int64, len(position))
        self._insert(low[first], high[first], np.fromiter(fresh.values(), np.int32, len(fresh)))
        return np.fromiter(map(fresh.__getitem__, pieces), np.int32, len(pieces)), kept

    def _value_of(self, piece: bytes) -> int:
        ids = self._encode(piece.decode())
        if len(ids) == 1:
            return ids[0]
        self._ids.extend(ids)
        self._begin.append(len(self._ids))
        return 1 - len(self._begin)


# What to keep of a piece's two words, by its length.
_KEEP = [(1 << 8 * min(k, 8)) - 1 for k in range(17)]
_KEEP_LOW = np.array(_KEEP, np.uint64)
_KEEP_HIGH = np.array([(1 << 8 * max(0, min(k, 16) - 8)) - 1 for k in range(17)], np.uint64)


def _mask(low, high, length):
    """Clear what lies behind a piece of up to 15 bytes and put its length into the top byte."""
    size = np.minimum(length, LONGEST + 1)
    return low & _KEEP_LOW[size], high & _KEEP_HIGH[size] | size.astype(np.uint64) << np.uint64(56)


def _keys_of(pieces: list[bytes]):
    words = np.frombuffer(b"".join(piece.ljust(16, b"\0") for piece in pieces), "<u8").reshape(-1, 2)
    return _mask(words[:, 0], words[:, 1], np.fromiter(map(len, pieces), np.int64, len(pieces)))
