"""Encoding many documents at once: the ids of each tokenizer's own library, seen and not believed."""

import itertools
import json
import lzma
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError, encoder, sources
from data.encoder import Encoder, may_cut
from data.tokenizers import END_OF_TEXT, load_tokenizer

gigatoken = pytest.importorskip("gigatoken")
AWKWARD = [
    *("", " ", "\n", "  ", " \n ", "a", "a ", " a", "a  ", "  a", "\u00a0", "\u00a0\u00a0a", "a\u00a0 b", "a \u3000b"),
    *("'s", "'S", "''s", "'", "'re", "'r", "'l", "'ll", "a'", "a's's", " 's", "\n's", "1's", "\u00a0's", ".'s", "'sx"),
    *("\x00", "\x00\x00", "a\x00b", " \x00", "\x1c\x1d", "\x85", "a\x85 b", "\u2028 x", "x" * 16, " " + "y" * 300),
    *("\u00b2", "\u2460x", "e\u0301", "\u200d", "\ufeff", "\U0001f642\U0001f642", "\U0002a6d6", "\u0378", "\ud800", "\ufffe"),
    *(END_OF_TEXT, f"a{END_OF_TEXT}{END_OF_TEXT} b", "<|endoftext", "|>", "<s>", "</s>", "<unk>", "[UNK]"),
]  # fmt: skip
ENGLISH = [
    "the quick brown fox, it's 1984",
    "don't jump over  two\n\nlazy dogs",
    "naive cafe? 3.14 of it!",
] * 30


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Function that trains a small tokenizer.json of a kind and loads it."""

    def train(kind: str):
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

        special = ["<unk>", "<s>", "</s>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if kind.startswith("byte-level"):
            tok = Tokenizer(models.BPE())
            tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind.endswith("prefix"))
            tok.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
        elif kind == "llama":
            tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
            tok.normalizer = normalizers.Sequence(
                [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            )
            tok.decoder = decoders.Sequence(
                [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
            )
            special += [f"<0x{b:02X}>" for b in range(256)]
            trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special)
        elif kind == "unigram":
            tok = Tokenizer(models.Unigram())
            tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
            trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>")
        else:
            model, trainer = {
                "wordpiece": (models.WordPiece, trainers.WordPieceTrainer),
                "wordlevel": (models.WordLevel, trainers.WordLevelTrainer),
            }[kind]
            tok, trainer = Tokenizer(model(unk_token="<unk>")), trainer(special_tokens=special)
            tok.pre_tokenizer = pre_tokenizers.Whitespace()
        tok.train_from_iterator(ENGLISH, trainer)
        folder = tmp_path_factory.mktemp(kind.replace(" ", "_"))
        description = json.loads(tok.to_str())  # bytes are in the vocabulary, but no special tokens
        description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] in special[:3]]
        (folder / "tokenizer.json").write_text(json.dumps(description))
        return load_tokenizer(str(folder))

    return train


def plainly(tokenizer, texts) -> list[int]:
    """One document after the other, by the tokenizer's own library."""
    return [i for text in texts for i in (tokenizer.eot, *tokenizer.encode(encoder.clean_text(text)))]


def check(fast: Encoder, texts) -> None:
    ids, lost = fast.encode(texts)
    assert ids.tolist() == plainly(fast.tokenizer, texts) and lost == 0


def test_gpt2_on_every_code_point_and_in_awkward_places(gpt2_encoding):
    fast = Encoder(load_tokenizer("gpt2"))
    assert fast.library == "gigatoken"
    codes = [c for c in range(0x20000) if not 0xD800 <= c < 0xE000]
    texts = [f"{c}a{c}1 {c}{c}.\n{c} '{c}s{c}" for c in map(chr, codes)]
    check(fast, ["\n".join(texts[k : k + 400]) for k in range(0, len(texts), 400)])
    check(fast, AWKWARD)
    check(fast, ["".join(pair) for pair in itertools.product(AWKWARD, repeat=2)])


@pytest.mark.parametrize("kind", ["byte-level", "byte-level prefix", "llama"])
def test_other_kinds_take_the_fast_way_too(toy, kind):
    tokenizer = toy(kind)
    fast = Encoder(tokenizer)
    assert fast.library == "gigatoken" and Encoder(tokenizer, fast=False).library == "tokenizers"
    texts = AWKWARD + ENGLISH
    check(fast, texts)
    slow = Encoder(tokenizer, fast=False).encode(texts)
    assert slow[0].tolist() == fast.encode(texts)[0].tolist()
    assert tokenizer.eot not in tokenizer.encode("</s> and <s>")
    assert may_cut(tokenizer) == (kind == "byte-level")


ALPHABET = st.sampled_from(
    [*"aZ09 '\n\t.srtmdvel\x00<|>", "\u00a0", "\u3000", "\u00e9", "\u65e5", "\U0001f642", "\u0301", "\u0e01"]
)


@pytest.fixture(scope="module")
def fast_gpt2(gpt2_encoding):
    return Encoder(load_tokenizer("gpt2"))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.text(ALPHABET, max_size=40), st.text(max_size=30)), max_size=6))
def test_fuzzed_text(fast_gpt2, texts):
    check(fast_gpt2, texts)


def test_real_text_and_parts_of_it(fast_gpt2, shared_dir):
    with lzma.open(shared_dir / "data" / "edu-mix-val.jsonl.xz", "rt", encoding="utf8") as file:
        texts = [json.loads(line)["text"] for line in file]
    ids, _ = fast_gpt2.encode(texts, range(len(texts)))
    assert may_cut(fast_gpt2.tokenizer)
    cuts = [0, *(match.end() for match in sources.SAFE_CUT.finditer(texts[0].encode()))][::50]
    parts = [texts[0].encode()[a:b].decode() for a, b in itertools.pairwise([*cuts, None])]
    assert len(parts) > 5
    first, later = fast_gpt2.encode(parts[:1])[0], fast_gpt2.encode(parts[1:], range(9), opens=False)[0]
    assert np.array_equal(np.concatenate([first, later]), ids[: len(first) + len(later)])
    assert ids[len(first) + len(later)] == fast_gpt2.tokenizer.eot


def test_the_memory_for_pieces_is_given_back(fast_gpt2, monkeypatch):
    monkeypatch.setattr(encoder, "FRESH_AFTER", 1000)
    assert fast_gpt2._fast is not None and 1 << 25 < encoder.resident_bytes() < 1 << 40
    made, make = [], fast_gpt2._make_fast
    monkeypatch.setattr(fast_gpt2, "_make_fast", lambda: made.append(1) or make())
    for room, fresh in ((1 << 50, 0), (0, 2)):  # only where this process has outgrown its room
        monkeypatch.setattr(encoder, "ROOM", room)
        fast_gpt2._encoded = 0
        for seed in range(6):
            check(fast_gpt2, ["".join(random.Random(seed).choices("etaoin shrdlu", k=400))])
        assert len(made) == fresh


# ------------------------------------------------------------------------------------------ never on trust


class Lying:
    """A gigatoken whose ids are wrong in one document."""

    def __init__(self, real, wrong: bytes):
        self.real, self.wrong = real, wrong

    def encode_batch(self, texts, parallel):
        return self.real.encode_batch([text.replace(self.wrong, b"?") for text in texts], parallel=parallel)


def test_the_first_difference_to_the_own_library_stops_in_a_sentence(gpt2_encoding):
    fast = Encoder(load_tokenizer("gpt2"))
    fast._fast = Lying(fast._fast, b"fox")
    texts = ["a plain one", "the quick brown fox", "another"]
    fast.encode(texts, [0, 2])  # not looked at
    with pytest.raises(DataError, match=r"disagree at token 3 of a document, near '.*brown fox'.*--plain"):
        fast.encode(texts, [1])


def test_a_library_that_fails_its_probes_or_is_absent_is_not_used(gpt2_encoding, monkeypatch):
    tokenizer = load_tokenizer("gpt2")
    real = gigatoken.Tokenizer.from_tiktoken
    monkeypatch.setattr(gigatoken.Tokenizer, "from_tiktoken", lambda *args: Lying(real(*args), b"x"))
    assert Encoder(tokenizer).library == "tiktoken"
    monkeypatch.setattr(gigatoken.Tokenizer, "from_tiktoken", lambda *args: 1 / 0)
    assert Encoder(tokenizer).library == "tiktoken"
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    absent = Encoder(tokenizer)
    assert absent.library == "tiktoken"
    check(absent, [text for text in AWKWARD if text != "\ud800"])


@pytest.mark.parametrize("kind", ["wordpiece", "wordlevel", "unigram"])
def test_a_tokenizer_that_loses_text_is_refused(toy, kind):
    with pytest.raises(DataError, match="byte-level"):
        tokenizer = toy(kind)
        # what it has no token for is found wherever it stands, checked or not
        Encoder(tokenizer).encode(["plain", "\u65e5\u672c\u8a9e"])


def test_accents_and_a_first_space_are_no_loss(toy):
    tokenizer = toy("llama")
    Encoder(tokenizer).encode(["e\u0301t\u00e9 \u65e5\u672c"], [0])


def test_cl100k_takes_the_fast_way_too(tmp_path, monkeypatch):
    """Its vocabulary comes inside litellm's wheel, under the name that tiktoken's cache gives it."""
    name = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
    wheels = sorted(Path(os.environ.get("KNG_WHEELS", "nowhere")).glob("litellm-*.whl"))
    if not wheels:
        pytest.skip("no litellm wheel (point KNG_WHEELS at a folder of `pip download --no-deps litellm`)")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        (tmp_path / name).write_bytes(wheel.read(f"litellm/litellm_core_utils/tokenizers/{name}"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    fast = Encoder(load_tokenizer("cl100k_base"))
    assert fast.library == "gigatoken" and fast.dtype == np.uint32
    check(fast, AWKWARD)
    check(fast, ["".join(pair) for pair in itertools.product(AWKWARD, repeat=2)])
