"""One interface over every tokenizer: tiktoken's, Hugging Face's, our own small BPE, plain characters.

A tokenizer has

    .name .spec       for people; for meta.json (load_tokenizer(spec, folder) gives the same tokenizer back)
    .n_vocab .eot     number of ids; id of end-of-text, or None
    .encode(text)     ids of *ordinary* text: a literal "<|endoftext|>" in it never becomes the special token
    .decode(ids)      text; an id without a token, or half a character, shows as U+FFFD and never raises
    .token_bytes()    the true bytes of every id; None where it has no token or a special one, which stands for
                      nothing in text (kronecker.token_bytes gives these their literal text: they too are embedded)
    .byte_lengths()   their lengths, uint16 (n_vocab,), 0 where there are none
    .backend          the library's own object: tiktoken.Encoding, tokenizers.Tokenizer, or list[bytes]
    .unk              id of what stands for text that the tokenizer lacks, or None
    .save(folder)     writes what `load_tokenizer(spec, folder)` will need there
"""

import contextlib
from functools import cached_property
from pathlib import Path

import numpy as np

from data import DataError
from data.console import first_line
from data.files import expanded, plain_name, write_atomic
from data.records import parsed, read_text
from kronecker.tokens import byte_level_alphabet, token_bytes

FILE_NAME = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
# GPT-2's split of text into pieces that merges never cross, possessive so that no run of text can overflow a stack.
GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Names under which tokenizers outside tiktoken keep their end of text, best first.
END_NAMES = (END_OF_TEXT, *"<|end_of_text|> </s> <eos> <|im_end|> [SEP] <|begin_of_text|> <s>".split())
REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


def load_tokenizer(spec, base_dir=None):
    """The tokenizer that a spec names.

    spec: a dict from `meta.json`, or a plain name: tiktoken's ("gpt2", "cl100k_base"), the path of a
    `tokenizer.json` or of a folder that holds one, or a Hugging Face hub name.
    base_dir: the folder that holds the files which a dict spec mentions (a prepared set's, or a run's).
    Only tokenizer.json files are read, never code that comes with them. Raises DataError where it cannot be had.
    """
    if spec is None:
        raise DataError("the data does not say which tokenizer made it, so its ids cannot be read as text")
    if isinstance(spec, str | Path):
        return _load_by_name(str(spec))
    kind = spec.get("kind")
    needed = {"tiktoken": "name", "chars": "itos", "hf": "file", "bytebpe": "file"}.get(kind)
    if needed is None or not spec.get(needed):
        raise DataError(
            f"{str(spec)[:80]} names no tokenizer: a kind (tiktoken, hf, bytebpe, chars) and its {needed or 'name'}"
        )
    if kind == "tiktoken":
        return TiktokenTokenizer(_tiktoken(spec["name"]), spec)
    if kind == "chars":
        return CharTokenizer(spec["itos"])
    path = Path(base_dir or ".") / plain_name(spec["file"])
    if kind == "bytebpe":
        return ByteBPETokenizer(path, spec)
    if not path.is_file() and base_dir is None:
        return _load_by_name(spec.get("name") or str(path))
    return HFTokenizer(path, spec)


def _load_by_name(name: str):
    import tiktoken

    if name in tiktoken.list_encoding_names():
        return TiktokenTokenizer(_tiktoken(name), {"kind": "tiktoken", "name": name})
    path = expanded(name)
    if path.is_dir():
        path = path / FILE_NAME
        if not path.is_file():
            raise DataError(f"no {FILE_NAME} in {name}: save the tokenizer in the fast (`tokenizers`) format")
    if path.is_file():
        return HFTokenizer(path, {"kind": "hf", "name": name, "file": FILE_NAME})
    if path.suffix == ".json" or path.is_absolute() or name.startswith("."):
        raise DataError(f"no tokenizer file {name}")
    from huggingface_hub import hf_hub_download

    try:
        downloaded = hf_hub_download(name, FILE_NAME)
    except Exception as error:  # the hub's client raises its own, httpx's and requests' errors
        known = ", ".join(tiktoken.list_encoding_names())
        why = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(
            f"no tokenizer {name!r}: tiktoken knows {known}; it is no local file, and the hub gave none ({why})"
        ) from error
    with contextlib.suppress(Exception):  # which end of text it uses; a tokenizer may come without
        hf_hub_download(name, "tokenizer_config.json")
    return HFTokenizer(Path(downloaded), {"kind": "hf", "name": name, "file": FILE_NAME})


def _tiktoken(name: str):
    import tiktoken

    try:
        return tiktoken.get_encoding(name)
    except ValueError as error:
        raise DataError(f"tiktoken has no encoding {name!r}: {first_line(error)}") from error
    except OSError as error:  # requests' ConnectionError is one
        cure = "go online once, or point TIKTOKEN_CACHE_DIR at a folder that has it"
        raise DataError(f"cannot load tiktoken's {name} ({type(error).__name__}): {cure}") from error


class _Tokenizer:
    """What all kinds share: reading ids back through the true bytes of tokens.

    A kind sets backend, spec, name, n_vocab, eot, and _special_text: id of each special token -> its text.
    """

    unk: int | None = None
    _path: Path | None = None  # of the file that it was read from
    _special_text: dict[int, bytes]

    @cached_property
    def _pieces(self) -> list[bytes | None]:
        try:
            known = token_bytes(self.backend)
        except TypeError as error:
            raise DataError(f"the tokenizer {self.name}: {error}") from error
        return [None if not piece or i in self._special_text else piece for i, piece in enumerate(known)]

    def token_bytes(self) -> list[bytes | None]:
        return self._pieces

    def byte_lengths(self) -> np.ndarray:
        return np.array([len(piece or b"") for piece in self._pieces], np.uint16)

    def decode(self, ids) -> str:
        known = {i: self._pieces[i] for i in map(int, ids) if 0 <= i < self.n_vocab}
        shown = (known.get(i) or self._special_text.get(i, REPLACEMENT) for i in map(int, ids))
        return b"".join(shown).decode("utf-8", errors="replace")

    def save(self, folder) -> None:
        if self._path:
            write_atomic(Path(folder) / FILE_NAME, [self._path.read_bytes()])


class TiktokenTokenizer(_Tokenizer):
    """A tiktoken.Encoding: any of tiktoken's by name, or one made here."""

    def __init__(self, encoding, spec: dict):
        self.backend, self.spec, self.name = encoding, spec, encoding.name
        self.n_vocab = encoding.n_vocab
        self.eot = encoding._special_tokens.get(END_OF_TEXT)
        self._special_text = {i: text.encode() for text, i in encoding._special_tokens.items()}
        self.encode = encoding.encode_ordinary


class ByteBPETokenizer(TiktokenTokenizer):
    """A small byte-level BPE trained by `tokenizers`, encoded by tiktoken, with end-of-text as its last id."""

    def __init__(self, path: Path, spec: dict):
        import tiktoken

        self._path = Path(path)
        alphabet = {character: byte for byte, character in byte_level_alphabet().items()}
        description = _described(self._path)
        try:
            vocab = description["model"]["vocab"]
            ranks = {bytes(alphabet[c] for c in token): rank for token, rank in vocab.items()}
            all_bytes = {bytes([b]) for b in range(256)} <= ranks.keys()
            if sorted(ranks.values()) != list(range(len(vocab))) or not all_bytes:
                raise ValueError("some bytes or ids are missing")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"{path} is no byte-level BPE of this project ({error}): prepare the data again, or copy it there"
            ) from error
        name = spec.get("name", "bytebpe")
        encoding = tiktoken.Encoding(
            name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
        )
        super().__init__(encoding, {"kind": "bytebpe", "name": name, "file": FILE_NAME})


class HFTokenizer(_Tokenizer):
    """A Hugging Face fast tokenizer, from its `tokenizer.json` alone."""

    def __init__(self, path: Path, spec: dict):
        import tokenizers

        self._path = Path(path)
        description = _described(self._path)
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(self._path))
        except Exception as error:  # tokenizers raises bare Exception
            why = first_line(error)
            raise DataError(f"{path} is not a tokenizer of the `tokenizers` library: {why}") from error
        self.backend.encode_special_tokens = True  # a special token's text in a document is only text
        self.backend.no_truncation()
        self.backend.no_padding()
        vocab = self.backend.get_vocab(with_added_tokens=True)
        self.n_vocab = max(vocab.values()) + 1
        added = self.backend.get_added_tokens_decoder()
        self._special_text = {i: token.content.encode() for i, token in added.items() if token.special}
        model = description["model"]
        self.unk = vocab.get(model.get("unk_token"), model.get("unk_id"))
        self.eot = spec["eot"] if "eot" in spec else self._find_eot(vocab)
        self.name = spec.get("name") or "hf"
        self.spec = {"kind": "hf", "name": self.name, "file": FILE_NAME, "eot": self.eot}

    def _find_eot(self, vocab: dict) -> int | None:
        config = self._path.with_name("tokenizer_config.json")
        names = list(END_NAMES)
        if config.is_file() and isinstance(settings := _described(config), dict):
            token = settings.get("eos_token")
            names.insert(0, str(token.get("content") if isinstance(token, dict) else token))
        return next((vocab[name] for name in names if name in vocab), None)

    def encode(self, text: str) -> list[int]:
        try:
            return self.backend.encode(clean_text(text), add_special_tokens=False).ids
        except Exception as error:  # tokenizers raises bare Exception, e.g. for a character without a token
            why = first_line(error)
            raise DataError(f"the tokenizer {self.name} has no tokens for {text[:40]!r}: {why}") from None


class CharTokenizer(_Tokenizer):
    """nanoGPT's characters: id i is characters[i]."""

    def __init__(self, characters: list[str]):
        self.name, self.eot, self.n_vocab = "chars", None, len(characters)
        self.spec = {"kind": "chars", "itos": list(characters)}
        self.backend = [c.encode("utf-8", "surrogatepass") for c in characters]
        self._special_text: dict[int, bytes] = {}
        self._id = {c: i for i, c in enumerate(characters)}

    def encode(self, text: str) -> list[int]:
        try:
            return [self._id[c] for c in text]
        except KeyError as error:
            raise DataError(
                f"the character {error.args[0]!r} does not occur in the data that this vocabulary of characters was made "
                "from: leave it out of the text, or take a model with another tokenizer"
            ) from None


def clean_text(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates, which no encoding can write, as U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _described(path: Path):
    return parsed(read_text(path, "a tokenizer's description"), str(path))
