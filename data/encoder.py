"""Many documents at once: gigatoken's ids where it knows the tokenizer, held against the tokenizer's own library.

gigatoken merges the same pairs as tiktoken and `tokenizers`, some ten times sooner. That it gives the same ids is
not believed but seen: before it is used, on `PROBES`, and while a set is made, on a fixed share of the documents.
Whatever encodes, these documents must also come back from their ids, or the ids are no measure of the text.
"""

import base64
import json
import tempfile
import threading
import unicodedata
from pathlib import Path

import numpy as np

from data import DataError
from data.tokenizers import END_OF_TEXT, clean_text

# gigatoken's names for the ways in which tiktoken's encodings split text into pieces
SCHEMES = {
    "gpt2": "gpt2",
    "r50k_base": "gpt2",
    "cl100k_base": "gpt4",
    "o200k_base": "o200k",
    "o200k_harmony": "o200k",
}
# gigatoken remembers every piece that it has met, up to ten bytes a byte of text; a fresh one takes 0.1 s
FRESH_AFTER = 1 << 26  # characters
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
        self.dtype = np.dtype("<u2") if tokenizer.n_vocab <= 2**16 else np.dtype("<u4")
        self._fast, self._make_fast = gigatoken_for(tokenizer) if fast else (None, None)
        self._bytes = [piece or b"" for piece in tokenizer.token_bytes()]
        self._encoded, self._lock = 0, threading.Lock()
        self.library = "gigatoken" if self._fast else type(tokenizer.backend).__module__.partition(".")[0]

    def encode(self, texts: list[str], opens: list[bool], checked=lambda k: False) -> tuple[np.ndarray, int]:
        """Ids of the texts, (n,) uint16, or uint32 for n_vocab > 65536; and how many texts no library could encode.

        opens: which texts open a document and so get an end-of-text in front; the others are its later parts.
        checked: whether text k is held against the tokenizer's own library and its own bytes.
        Raises DataError at the first difference.
        """
        texts = [clean_text(text) for text in texts]
        parts = self._encode_fast(texts) if self._fast is not None and texts else None
        if parts is None:
            parts = [self._encode_slowly(text) for text in texts]
        else:
            for k, text in enumerate(texts):
                if checked(k):
                    self._compare(text, parts[k])
        eot, unk = np.array([self.tokenizer.eot], self.dtype), self.tokenizer.unk
        done = [np.empty(0, self.dtype)]
        for k, (ids, opening) in enumerate(zip(parts, opens, strict=True)):
            if ids is not None:
                if (checked(k) and opening) or (unk is not None and unk in ids):
                    self._read_back(texts[k], ids)
                done += [eot, ids] if opening else [ids]
        return np.concatenate(done), sum(ids is None for ids in parts)

    def _encode_fast(self, texts: list[str]) -> list[np.ndarray] | None:
        """Ids of each text, or None where gigatoken fails, which is for the slow way to look into."""
        with self._lock:
            self._encoded += sum(map(len, texts))
            if self._encoded > FRESH_AFTER:
                self._fast, self._encoded = self._make_fast(), 0
            fast = self._fast
        try:
            batch = fast.encode_batch(texts, parallel=False)
        except BaseException as error:
            _let_pass(error)
            return None
        ids = np.asarray(batch.layout.content.data).astype(self.dtype)
        return [ids[a:b] for a, b in zip(*_edges(batch), strict=True)]

    def _encode_slowly(self, text: str) -> np.ndarray | None:
        try:
            return np.array(self.tokenizer.encode(text), self.dtype)
        except BaseException as error:  # tiktoken panics on megabytes of mixed white space, outside Exception
            _let_pass(error)
            return None

    def _compare(self, text: str, ids: np.ndarray) -> None:
        own = self._encode_slowly(text)
        if own is None or np.array_equal(own, ids):
            return
        same = np.append(own[: len(ids)] == ids[: len(own)], False).argmin()
        around = self.tokenizer.decode(own[max(0, same - 5) : same + 5].tolist())
        raise DataError(
            f"gigatoken and the tokenizer's own library disagree at token {same:,} of a document, near {around!r}: "
            "delete what is there and run again with --plain, which does without gigatoken; and please report it"
        )

    def _read_back(self, text: str, ids: np.ndarray) -> None:
        """A tokenizer that loses text is refused: its losses per byte, and its tokens' bytes, would mean nothing."""
        back = b"".join([self._bytes[i] for i in ids.tolist()]).decode("utf-8", "replace")
        # some tokenizers open each text with a space, some compose letters and their accents: nothing is lost
        if _essence(back) != _essence(text):
            k = next(
                (k for k, (a, b) in enumerate(zip(back, text, strict=False)) if a != b),
                min(len(back), len(text)),
            )
            raise DataError(
                f"the tokenizer {self.tokenizer.name} does not give the text back: {text[max(0, k - 10) : k + 30]!r} "
                f"became {back[max(0, k - 10) : k + 30]!r}; take another, a byte-level one such as gpt2"
            )


def may_cut(tokenizer) -> bool:
    """Whether a text's tokens are those of its parts, cut as data.sources cuts: before a space or line end."""
    parts = ("a word", " and more", "\nlines", "\n\nof it", " \n", "  so")
    whole = tokenizer.encode("".join(f"{part}cut" for part in parts))
    return list(whole) == [i for part in parts for i in tokenizer.encode(f"{part}cut")]


def _edges(batch) -> tuple[list[int], list[int]]:
    offsets = np.asarray(batch.layout.offsets.data)
    return offsets[:-1].tolist(), offsets[1:].tolist()


def _essence(text: str) -> str:
    return unicodedata.normalize("NFC", text).removeprefix(" ")


def _let_pass(error: BaseException) -> None:
    """Raise again what is no complaint about a text. (Panics of Rust's libraries are no Exceptions.)"""
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        raise error


def gigatoken_for(tokenizer) -> tuple:
    """A gigatoken.Tokenizer of the same ids and a function that makes more; (None, None) where there is none."""
    nothing = None, None
    try:
        import gigatoken
    except ImportError:  # no wheel for this machine
        return nothing
    kind = tokenizer.spec["kind"]
    if kind == "hf":
        description = json.dumps(_without_specials(json.loads(tokenizer.backend.to_str())))

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
        return nothing
    try:
        batch = (fast := make()).encode_batch(PROBES, parallel=False)
        ids = np.asarray(batch.layout.content.data)
        same = all(
            ids[a:b].tolist() == list(tokenizer.encode(text))
            for text, a, b in zip(PROBES, *_edges(batch), strict=True)
        )
    except BaseException as error:  # a kind of tokenizer that it does not know
        _let_pass(error)
        return nothing
    return (fast, make) if same else nothing


def _without_specials(description: dict) -> dict:
    """A tokenizer.json that takes the text of special tokens as text, cuts nothing off and adds nothing."""
    added = [token for token in description.get("added_tokens") or [] if not token["special"]]
    return description | {
        "added_tokens": added,
        "truncation": None,
        "padding": None,
        "post_processor": None,
    }
