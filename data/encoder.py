"""Many documents at once: gigatoken's ids where it knows the tokenizer, some ten times sooner than its own library's.

That they are the same is seen on `PROBES` before, and on a fixed share of the documents while a set is made. Whatever
encodes, these documents must also come back from their ids, or the ids are no measure of the text.
"""

import base64
import itertools
import json
import math
import os
import tempfile
import threading
import unicodedata
from pathlib import Path

import numpy as np

from data import DataError
from data.meta import dtype_for
from data.tokenizers import END_OF_TEXT, clean_text

# gigatoken's names for the ways in which tiktoken's encodings split text into pieces
SCHEMES = {
    "gpt2": "gpt2",
    "r50k_base": "gpt2",
    "cl100k_base": "gpt4",
    "o200k_base": "o200k",
    "o200k_harmony": "o200k",
}
# gigatoken remembers every piece that it has met: a sixth of a byte a byte of real text, ten of the worst. So a new
# one takes over, at most so often, where this process has outgrown its room.
FRESH_AFTER = 1 << 26  # bytes of text
ROOM = 1 << 30  # bytes of memory
PROBES = [
    "",
    " ",
    "\n\n  \t x",
    "don't 'tis they'll've 's ''s 're I'M\u00a0x",
    f"{END_OF_TEXT}written {END_OF_TEXT} out<|im_end|></s><s>[SEP]<unk>",
    "na\u00efve e\u0301 \u65e5\u672c\u8a9e \U0001f642\u200d\U0001f469 \u0645\u0631\u062d\u0628\u0627 \u0e01\u0e33 \U0001e900",
    "1234567890 3.14 2,718 \u00b2\u2460 0x1F",
    "def f(x):\n\treturn x ** 2  # {[<>]}\r\n\r\n",
    "\x00 \x1c\x85\u2028\ufeff\ufffd \u3000.",
    "  two  spaces and a tail  ",
]


class Encoder:
    """Encodes lists of documents with a tokenizer of data.tokenizers; threads may share it.

    fast: use gigatoken where it is installed and knows the tokenizer. `.library` says what encodes.
    """

    def __init__(self, tokenizer, fast: bool = True):
        self.tokenizer = tokenizer
        self.dtype = dtype_for(tokenizer.n_vocab)
        self._fast, self._make_fast = gigatoken_for(tokenizer) if fast else (None, None)
        self._bytes = [piece or b"" for piece in tokenizer.token_bytes()]
        self._encoded, self._lock = 0, threading.Lock()
        self.library = "gigatoken" if self._fast else type(tokenizer.backend).__module__.partition(".")[0]

    def encode(self, texts: list[str], checked=(), opens: bool = True) -> tuple[np.ndarray, int]:
        """Ids of the texts, (n,) uint16, or uint32 for n_vocab > 65536; and how many texts no library could encode.

        checked: numbers of the texts that are held against the tokenizer's own library and their own bytes.
        opens: whether each text opens a document, and so gets an end-of-text in front, or is a later part of one.
        Raises DataError at the first difference.
        """
        contents = [clean_text(text).encode() for text in texts]
        parts = (self._fast and self._encode_fast(contents)) or [self._encode_slowly(text) for text in texts]
        unk, eot = self.tokenizer.unk, np.array([self.tokenizer.eot] if opens else [], self.dtype)
        done = [np.empty(0, self.dtype)]
        for k, ids in enumerate(parts):
            if ids is not None:
                if k in checked or (unk is not None and unk in ids):
                    self._check(texts[k], contents[k], ids)
                done += [eot, ids]
        return np.concatenate(done), len(parts) - len(done) // 2

    def _encode_fast(self, contents: list[bytes]) -> list[np.ndarray] | None:
        """Ids of each text, or None where gigatoken fails, which is for the slow way to look into."""
        with self._lock:
            self._encoded += sum(map(len, contents))
            if self._encoded > FRESH_AFTER and resident_bytes() > ROOM:
                self._fast, self._encoded = self._make_fast(), 0
            fast = self._fast
        try:
            return _encode_batch(fast, contents, self.dtype)
        except BaseException as error:
            _let_pass(error)
            return None

    def _encode_slowly(self, text: str) -> np.ndarray | None:
        try:
            return np.array(self.tokenizer.encode(text), self.dtype)
        except BaseException as error:  # tiktoken panics on megabytes of mixed white space, outside Exception
            _let_pass(error)
            return None

    def _check(self, text: str, content: bytes, ids: np.ndarray) -> None:
        """Refuse ids that are not those of the tokenizer's own library, and a tokenizer that loses text."""
        own = self._encode_slowly(text) if self._fast else None
        if own is not None and not np.array_equal(own, ids):
            same = _first_difference(own, ids)
            raise DataError(
                f"gigatoken and the tokenizer's own library disagree at token {same:,} of a document, near "
                f"{self.tokenizer.decode(own[max(0, same - 5) : same + 5])!r}: delete what is there and run again "
                "with --plain, which does without gigatoken; and please report it"
            )
        if (found := b"".join([self._bytes[i] for i in ids.tolist()])) == content:
            return
        back, text = found.decode("utf-8", "replace"), content.decode()
        # some tokenizers open each text with a space, some compose letters and their accents: nothing is lost
        if _essence(back) != _essence(text):
            k = _first_difference(back, text)
            a, b = (part[max(0, k - 10) : k + 30] for part in (text, back))
            lost = f"{a!r} became {b!r}; take another, a byte-level one such as gpt2"
            raise DataError(f"the tokenizer {self.tokenizer.name} does not give the text back: {lost}")


def _first_difference(a, b) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def may_cut(tokenizer) -> bool:
    """Whether a text's tokens are those of its parts, cut as data.sources cuts: before a space or line end."""
    parts = ("a word", " and more", "\nlines", "\n\nof it", " \n", "  so")
    whole = tokenizer.encode("".join(f"{part}cut" for part in parts))
    return list(whole) == [i for part in parts for i in tokenizer.encode(f"{part}cut")]


def resident_bytes() -> float:
    """Memory that this process holds; infinity where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return math.inf


def _encode_batch(fast, contents: list[bytes], dtype) -> list[np.ndarray]:
    # parallel: threads that encode at a time do not wait for each other, and megabytes at once take several
    layout = fast.encode_batch(contents, parallel=True).layout
    ids, edges = np.asarray(layout.content.data).astype(dtype), np.asarray(layout.offsets.data).tolist()
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


def _essence(text: str) -> str:
    return unicodedata.normalize("NFC", text).removeprefix(" ")


def _let_pass(error: BaseException) -> None:
    """Raise again what is no complaint about a text. (Panics of Rust's libraries are no Exceptions.)"""
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        raise error


def gigatoken_for(tokenizer) -> tuple:
    """A gigatoken.Tokenizer of the same ids and a function that makes more; (None, None) where there is none."""
    try:
        import gigatoken
    except ImportError:  # no wheel for this machine
        return None, None
    kind = tokenizer.spec["kind"]
    if kind == "hf":
        description = json.loads(tokenizer.backend.to_str())
        # the text of special tokens is text, nothing is cut off and nothing added
        added = [token for token in description.get("added_tokens") or [] if not token["special"]]
        none = dict.fromkeys(("truncation", "padding", "post_processor"))
        description = json.dumps(description | {"added_tokens": added} | none)

        def make():
            return gigatoken.Tokenizer.from_json(description)
    elif scheme := "gpt2" if kind == "bytebpe" else SCHEMES.get(tokenizer.name):
        ranks = sorted(tokenizer.backend._mergeable_ranks.items(), key=lambda item: item[1])
        lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)

        def make():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "ranks.tiktoken"
                path.write_bytes(lines)
                # without special tokens: their text in a document is only text
                return gigatoken.Tokenizer.from_tiktoken(path, scheme, {})
    else:
        return None, None
    try:
        found = _encode_batch(fast := make(), [text.encode() for text in PROBES], np.int64)
        same = [ids.tolist() for ids in found] == [list(tokenizer.encode(text)) for text in PROBES]
    except BaseException as error:  # a kind of tokenizer that it does not know
        _let_pass(error)
        return None, None
    return (fast, make) if same else (None, None)
