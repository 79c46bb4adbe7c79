"""A small corpus of English prose that every Python installation already carries.

    python data/pydocs/prepare.py            writes data/pydocs/*.bin, tokenizer.json and meta.json

Text: Python's help topics and the docstrings of the standard library, torch and numpy, read from their
source files (nothing but a few harmless modules is imported: some of the standard library opens windows or
browsers). Documents of 80 characters or more, each once, in the order of their SHA-256, which is as good as
shuffled; the first 5% are for validation. Tokenizer: a byte-level BPE of 4,096 ids trained on the training
part.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import platform
import re
import sys
import sysconfig
from ast import literal_eval
from pathlib import Path

if not __package__:  # run as a file: let `import data` find the project
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from data import DataError, console
from data.files import expanded, folder_lock, write_atomic
from data.identity import lost
from data.meta import read_meta, versions
from data.pipeline import prepare_shards
from data.shards import is_prepared
from data.sources import Block
from data.tokenizers import FILE_NAME, load_tokenizer

VOCAB_SIZE = 4096  # end-of-text, the last id, included
MIN_CHARACTERS = 80
VAL_FRACTION = 0.05
# Folders of a package that hold tests or other people's packages rather than documentation.
SKIP_FOLDERS = set("site-packages dist-packages test tests testing __pycache__ _vendor ensurepip".split())
# Written in C, so their docstrings are in no source file; all of them are harmless to import.
C_MODULES = (
    "_asyncio _bisect _codecs _collections _csv _datetime _decimal _elementtree _functools _heapq _io _json "
    "_operator _pickle _random _socket _sqlite3 _sre _ssl _string _struct _thread _weakref array atexit "
    "binascii builtins cmath errno faulthandler gc itertools marshal math mmap nt posix pyexpat resource "
    "select signal sys time unicodedata zlib"
).split()

# A docstring: the literal that opens a file, or the first thing after a line that ends in a colon.
DOCSTRING = re.compile(
    r"(?:\A(?:[ \t]*(?:\#[^\n]*)?\n)*|:[ \t]*(?:\#[^\n]*)?\n(?:[ \t]*(?:\#[^\n]*)?\n)*[ \t]+)"
    r"(?P<literal>[rRuU]?(?P<quote>\"\"\"|''')(?:\\.|[^\\])*?(?P=quote))",
    re.DOTALL,
)
# In files like torch/_torch_docs.py, which give compiled functions their docstrings: every long literal.
LITERAL = re.compile(r"(?P<literal>[rR]?(?P<quote>\"\"\"|''')(?:\\.|[^\\])*?(?P=quote))", re.DOTALL)
DOC_FILES = re.compile(r"_\w*(docs|docstr|newdocs\w*)\.py")


def source_docstrings(folder: Path):
    for path in sorted(folder.rglob("*.py")):
        if SKIP_FOLDERS & set(path.relative_to(folder).parts[:-1]):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        pattern = LITERAL if DOC_FILES.fullmatch(path.name) else DOCSTRING
        for match in pattern.finditer(source):
            with contextlib.suppress(SyntaxError, ValueError):
                yield literal_eval(match["literal"])


def help_topics():
    with contextlib.suppress(ImportError):
        from pydoc_data.topics import topics

        yield from (text for _, text in sorted(topics.items()))


def compiled_docstrings():
    for name in C_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        yield module.__doc__
        for _, value in sorted(vars(module).items()):
            yield getattr(value, "__doc__", None)
            if inspect.isclass(value):
                for _, member in sorted(vars(value).items()):
                    yield getattr(member, "__doc__", None)


def collect() -> tuple[list[str], dict[str, int]]:
    """All documents, each once, by SHA-256; and how many each source was the first to give."""
    sources = {"help topics": help_topics(), "compiled modules": compiled_docstrings()}
    sources["python docstrings"] = source_docstrings(Path(sysconfig.get_paths()["stdlib"]))
    for name in ("torch", "numpy"):
        found = importlib.util.find_spec(name)  # finds a top-level package without running it
        if found is not None and found.origin:
            sources[f"{name} docstrings"] = source_docstrings(Path(found.origin).parent)
    documents: dict[bytes, str] = {}
    counts = {}
    for name, texts in sources.items():
        before = len(documents)
        for text in texts:
            if not isinstance(text, str):
                continue
            text = inspect.cleandoc(text).strip()
            if len(text) >= MIN_CHARACTERS and "\ufffd" not in text:
                text = text.encode("utf-8", "replace").decode("utf-8")
                documents.setdefault(hashlib.sha256(text.encode()).digest(), text)
        counts[name] = len(documents) - before
    return [documents[key] for key in sorted(documents)], counts


def train_tokenizer(texts: list[str], path: Path):
    """Train the BPE and write it to `path`; returns it as every tokenizer is read here."""
    import tokenizers

    trainer = tokenizers.trainers.BpeTrainer(
        # no special token: one would be found in ordinary text; end-of-text is added behind the last id
        vocab_size=VOCAB_SIZE - 1,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainer)
    write_atomic(path, [bpe.to_str(pretty=False).encode()])
    return load_tokenizer({"kind": "bytebpe", "name": "pydocs", "file": path.name}, path.parent)


def prepare(out_dir: Path) -> None:
    """Collect the documents and write tokenizer, shards and description, unless they are there."""
    meta = read_meta(out_dir) or {}
    if meta.get("dataset", "pydocs") != "pydocs":
        raise DataError(f"{out_dir} holds another data set: take another --out_dir")
    shards = meta.get("shards") if is_prepared(out_dir) and (out_dir / FILE_NAME).is_file() else None
    if shards and not lost(out_dir, shards):
        print(f"{out_dir} is already prepared, nothing to do (delete *.bin and meta.json to make it anew)")
        return
    documents, counts = collect()
    n_val = round(len(documents) * VAL_FRACTION)
    if n_val < 1 or len(documents) < 100:
        raise DataError(f"only {len(documents)} docstrings found: is Python's library installed as source?")
    tokenizer = train_tokenizer(documents[n_val:], out_dir / FILE_NAME)

    def blocks_from(position: list | None):
        for number in range((position or [0])[0], 2):
            part = documents[n_val:] if number else documents[:n_val]
            yield Block([number], part, split="train" if number else "val")

    source = {"documents_from": counts, "python": platform.python_version(), **versions("torch", "numpy")}
    prepare_shards(out_dir, "pydocs", tokenizer, blocks_from, source, val_tokens=None)


def main(argv: list[str] | None = None) -> None:
    parser, here = console.Parser(__doc__), Path(__file__).resolve().parent
    parser.add_argument("--out_dir", "--out-dir", type=expanded, default=here, help="where the shards go")
    args = parser.parse_args(argv)
    with console.sentences(), folder_lock(args.out_dir):
        prepare(args.out_dir)


if __name__ == "__main__":
    main()
