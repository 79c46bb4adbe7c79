"""Shards, meta.json, tokenizers and the small prepare scripts, against files written by hand with struct."""

import json
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import DataError, plain_text, verify
from data.files import Lock
from data.identity import check_ids
from data.loader import TrainBatches
from data.meta import characters_meta, describe, read_meta, write_meta
from data.shards import find_shards, header_bytes, is_prepared, open_shard, write_shard
from data.tokenizers import END_OF_TEXT, clean_text, load_tokenizer
from kronecker.tokens import byte_level_alphabet


def by_hand(path, magic, version, tokens, code):
    path.write_bytes(
        struct.pack("<3i", magic, version, len(tokens))
        + bytes(1012)
        + struct.pack(f"<{len(tokens)}{code}", *tokens)
    )
    return path


@pytest.mark.parametrize(
    ("magic", "version", "code", "dtype"), [(20240520, 1, "H", "u2"), (20240801, 7, "I", "u4")]
)
def test_a_hand_written_shard_is_read_and_rewritten_byte_for_byte(tmp_path, magic, version, code, dtype):
    tokens = [50256, 0, 65535, 17] if code == "H" else [128000, 0, 2**32 - 1, 70000]
    path = by_hand(tmp_path / "x_train_000001.bin", magic, version, tokens, code)
    shard = open_shard(path)
    assert shard.n_tokens == 4 and shard.dtype == np.dtype(dtype) and shard.tokens.tolist() == tokens
    with pytest.raises(ValueError):
        shard.tokens[0] = 1  # read-only
    write_shard(tmp_path / "copy.bin", np.array(tokens, dtype))
    assert (tmp_path / "copy.bin").read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_headerless_and_npy_files_are_read(tmp_path):
    (tmp_path / "train.bin").write_bytes(struct.pack("<5H", 5, 4, 3, 2, 1))
    assert open_shard(tmp_path / "train.bin").tokens.tolist() == [5, 4, 3, 2, 1]
    np.save(tmp_path / "edufineweb_train_000001.npy", np.array([7, 8, 9], np.uint16))
    assert open_shard(tmp_path / "edufineweb_train_000001.npy").tokens.tolist() == [7, 8, 9]
    np.save(tmp_path / "edufineweb_train_000002.npy", np.zeros((2, 2), np.uint16))
    with pytest.raises(DataError, match="no row of uint16"):
        open_shard(tmp_path / "edufineweb_train_000002.npy")


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (header_bytes(10, "u2") + bytes(18), "promises 10 tokens"),
        (struct.pack("<3i", 20240520, 2, 0) + bytes(1012), "version 2"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"", "no token-shard header"),
    ],
)
def test_damaged_shards_are_refused_with_a_hint(tmp_path, content, hint):
    path = tmp_path / "x_train_000001.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=hint):
        open_shard(path)
    with pytest.raises(DataError, match="cannot read"):
        open_shard(tmp_path / "absent_train_000001.bin")


def test_shards_are_found_in_order_and_two_sets_are_not_mixed(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        find_shards(tmp_path / "absent", "train")
    assert find_shards(tmp_path, "train") == []
    (tmp_path / "train.bin").touch()
    assert [p.name for p in find_shards(tmp_path, "train")] == ["train.bin"]
    for name in ("w_train_10.bin", "w_train_9.bin", "w_val_0.bin", "w_train_11.bin.tmp"):
        (tmp_path / name).touch()
    assert [p.name for p in find_shards(tmp_path, "train")] == ["w_train_9.bin", "w_train_10.bin"]
    (tmp_path / "v_train_1.bin").touch()
    with pytest.raises(DataError, match="several sets"):
        find_shards(tmp_path, "train")


def test_copies_hidden_files_and_what_meta_does_not_list_are_no_shards(tmp_path):
    for name in ("m_train_000001.bin", "m_train_000002.bin"):
        write_shard(tmp_path / name, np.array([1, 2], np.uint16))
    for name in (
        "m_train_000001 (1).bin",
        "._m_train_000001.bin",
        "m_train_x.bin",
        "m_train_1².bin",
        "_train_1.bin",
    ):
        (tmp_path / name).write_bytes(b"junk")
    (tmp_path / "m_train_000009.bin").mkdir()
    assert [p.name for p in find_shards(tmp_path, "train")] == ["m_train_000001.bin", "m_train_000002.bin"]
    record = {"file": "m_train_000002.bin", "split": "train", "tokens": 2, "sha256": "0" * 64}
    write_meta(tmp_path, characters_meta("m", ["a", "b", "c"]) | {"shards": [record]})
    assert [p.name for p in find_shards(tmp_path, "train")] == ["m_train_000002.bin"]
    assert find_shards(tmp_path, "val") == [] and not is_prepared(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x_train_000001.bin"
    write_shard(path, np.array([1], np.uint16))
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        write_shard(path, np.array([2, 3], np.uint16))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(DataError, match="uint16 or uint32"):
        write_shard(path, np.array([1.0]))


def test_meta_round_trip_and_damage(tmp_path):
    assert read_meta(tmp_path) is None
    meta = characters_meta("toy", ["a", "é", "\ud800"])
    write_meta(tmp_path, meta)
    assert read_meta(tmp_path) == meta and meta["byte_lengths"] == [1, 2, 3]
    assert json.loads((tmp_path / "meta.json").read_text()) == meta
    (tmp_path / "meta.json").write_text('{"tokenizer": ')
    with pytest.raises(DataError, match="damaged"):
        read_meta(tmp_path)


SHARD = {"file": "x_train_000001.bin", "split": "train", "tokens": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ([], "JSON object"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": "65"}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"tokenizer": "gpt2"}, "tokenizer"),
        ({"tokenizer": {"kind": "exec"}}, "tokenizer.kind"),
        ({"tokenizer": {"kind": "hf", "file": "/etc/passwd"}}, "tokenizer.file"),
        ({"complete": "yes"}, "complete"),
        ({"format": 2}, "format is 2"),
        ({"byte_lengths": [1, -1]}, "byte_lengths"),
        ({"shards": {"a": 1}}, "shards"),
        ({"shards": [SHARD | {"file": "../precious.dat"}]}, "shards.0.file"),
        ({"shards": [SHARD | {"file": "/precious.dat"}]}, "shards.0.file"),
        ({"shards": [SHARD | {"file": "..\\precious.dat"}]}, "shards.0.file"),
        ({"shards": [SHARD | {"tokens": 1.5}]}, "shards.0.tokens"),
        ({"shards": [SHARD | {"split": "test"}]}, "shards.0.split"),
        ({"shards": [SHARD | {"next": {"position": 7}}]}, "shards.0.next"),
        ({"shards": [{k: v for k, v in SHARD.items() if k != "sha256"}]}, "shards.0.sha256"),
    ],
)
def test_a_meta_json_of_another_shape_is_one_sentence(tmp_path, change, hint):
    meta = [] if change == [] else characters_meta("toy", ["a"]) | change
    meta = {k: v for k, v in meta.items() if v is not None or k == "eot"} if meta else meta
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=hint) as caught:
        read_meta(tmp_path)
    assert "meta.json" in str(caught.value) and "\n" not in str(caught.value)


def test_what_folders_without_a_description_are_taken_for(tmp_path):
    assert describe(tmp_path)["vocab_size"] == describe(tmp_path, 50304)["vocab_size"] == 50257
    assert describe(tmp_path, 65) == {"tokenizer": None, "vocab_size": 65}
    # all that nanoGPT's train.py asks of meta.pkl
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65}))
    assert describe(tmp_path)["vocab_size"] == 65 and read_meta(tmp_path)["tokenizer"] is None
    with pytest.raises(DataError, match="does not say which tokenizer"):
        load_tokenizer(None)
    for wrong in ({"vocab_size": 0}, {"vocab_size": 2, "itos": {0: "a"}}, {"itos": {0: "a"}}, [65]):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(wrong))
        with pytest.raises(DataError, match="not the plain meta"):
            read_meta(tmp_path)


def test_ids_beyond_gpt2s_are_nobodys_without_a_description(tmp_path):
    write_shard(tmp_path / "x_train_000001.bin", np.array([5, 100_000], np.uint32))
    write_shard(tmp_path / "x_val_000000.bin", np.array([5, 6], np.uint32))
    assert check_ids(tmp_path, 128_256) == 100_000
    assert describe(tmp_path, 128_256, 100_000)["tokenizer"] is None
    assert describe(tmp_path, 50_304, 50_256)["tokenizer"] == "gpt2"


def test_nanogpt_meta_pkl_is_read_but_runs_no_code(tmp_path):
    characters = ["\n", " ", "a", "b"]
    itos, stoi = dict(enumerate(characters)), {c: i for i, c in enumerate(characters)}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 4, "itos": itos, "stoi": stoi}))
    meta = read_meta(tmp_path)
    assert meta["vocab_size"] == 4 and load_tokenizer(meta["tokenizer"]).encode("ab \n") == [2, 3, 1, 0]

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "hacked"), "w"))

    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 4, "itos": Evil()}))
    with pytest.raises(DataError, match="not the plain meta"):
        read_meta(tmp_path)
    assert not (tmp_path / "hacked").exists()


def test_characters_tokenizer_refuses_what_it_lacks_and_decodes_anything():
    tokenizer = load_tokenizer({"kind": "chars", "itos": ["a", "é"]})
    assert tokenizer.encode("éa") == [1, 0] and tokenizer.decode([1, 0, 7, -1]) == "éa\ufffd\ufffd"
    assert tokenizer.byte_lengths().tolist() == [1, 2] and tokenizer.backend == [b"a", "é".encode()]
    with pytest.raises(DataError, match="'z'"):
        tokenizer.encode("az")


def test_gpt2_ordinary_text_unknown_ids_and_lengths(gpt2_encoding):
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.encode("The capital of France is") == [464, 3139, 286, 4881, 318]
    assert tokenizer.eot == 50256 and tokenizer.eot not in tokenizer.encode(f"a {END_OF_TEXT} b")
    assert tokenizer.decode([50300, 6342, 50256]) == "\ufffd Paris<|endoftext|>"
    lengths = tokenizer.byte_lengths()
    assert lengths.dtype == np.uint16 and len(lengths) == 50257 and lengths[50256] == 0
    text = "naïve 日本 🙂 don't"
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert load_tokenizer(tokenizer.spec).encode(text) == gpt2_encoding.encode_ordinary(text)


def test_hf_tokenizer_agrees_with_tiktoken_and_parses_no_special_token(shared_dir, gpt2_encoding, tmp_path):
    tokenizer = load_tokenizer(str(shared_dir / "tokenizers" / "gpt2-hf"))
    text = f"naïve 日本 {END_OF_TEXT} don't\n\n  x"
    assert tokenizer.encode(text) == gpt2_encoding.encode_ordinary(text) and tokenizer.eot == 50256
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_bytes()[:50256] == load_tokenizer("gpt2").token_bytes()[:50256]
    assert tokenizer.byte_lengths()[50256] == 0
    tokenizer.save(tmp_path)
    again = load_tokenizer(json.loads(json.dumps(tokenizer.spec)), tmp_path)
    assert again.encode("a\ud800b") == again.encode(clean_text("a\ud800b")) and again.n_vocab == 50257


def test_sentencepiece_style_bytes(tmp_path):
    from tokenizers import Tokenizer, decoders, models

    vocab = {"<unk>": 0, "</s>": 1, "\u2581the": 2, "<0x0A>": 3, "é": 4}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bpe.add_special_tokens(["<unk>", "</s>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.token_bytes() == [None, None, b" the", b"\n", "é".encode()] and tokenizer.eot == 1


def test_unknown_tokenizers_are_refused_in_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no tokenizer file"):
        load_tokenizer(str(tmp_path / "absent" / "tokenizer.json"))
    with pytest.raises(DataError, match=r"no tokenizer\.json in"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        load_tokenizer(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="no tokenizer 'nobody/nothing'"):
        load_tokenizer("nobody/nothing")


def test_byte_alphabet_is_the_one_of_the_tokenizers_library():
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = {character: byte for byte, character in byte_level_alphabet().items()}
    assert set(alphabet) == set(ByteLevel.alphabet()) and sorted(alphabet.values()) == list(range(256))
    pieces = ByteLevel(add_prefix_space=False).pre_tokenize_str("é\n x\x00\xad")
    assert b"".join(bytes(alphabet[c] for c in piece) for piece, _ in pieces) == "é\n x\x00\xad".encode()


@pytest.fixture(scope="module")
def pydocs(tmp_path_factory):
    from data.pydocs import prepare

    out = tmp_path_factory.mktemp("pydocs")
    prepare.main(["--out_dir", str(out)])
    return out


def test_pydocs_is_prepared_once_and_reads_back(pydocs, capsys):
    from data.pydocs import prepare

    meta = read_meta(pydocs)
    assert (
        is_prepared(pydocs)
        and meta["vocab_size"] == 4096
        and meta["eot"] == 4095
        and meta["documents"] > 5000
    )
    tokenizer = load_tokenizer(meta["tokenizer"], pydocs)
    val = open_shard(find_shards(pydocs, "val")[0]).tokens
    train = open_shard(find_shards(pydocs, "train")[0]).tokens
    assert val[0] == train[0] == 4095 and (train == 4095).sum() + (val == 4095).sum() == meta["documents"]
    documents = tokenizer.decode(train[:20_000].tolist()).split(END_OF_TEXT)[1:-1]
    assert all(len(text) >= 80 for text in documents) and len(set(documents)) == len(documents)
    assert [i for text in documents for i in [4095, *tokenizer.encode(text)]] == train[:20_000][
        : sum(len(tokenizer.encode(t)) + 1 for t in documents)
    ].tolist()
    assert tokenizer.byte_lengths()[train].sum() / len(train) > 2.5  # bytes a token
    before = {p.name: p.stat().st_mtime_ns for p in pydocs.glob("[!.]*")}
    capsys.readouterr()
    prepare.main(["--out_dir", str(pydocs)])
    assert "already prepared" in capsys.readouterr().out
    assert before == {p.name: p.stat().st_mtime_ns for p in pydocs.glob("[!.]*")}


def test_a_set_of_others_is_left_as_it_is(tmp_path, pydocs):
    """By the scripts that take no part in a preparation that goes on."""
    from data.pydocs import prepare

    other = shutil.copytree(pydocs, tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"dataset": "other", "complete": False}))
    plain, text = tmp_path / "plain", "some text of ours, of many letters " * 30
    plain.mkdir()
    np.arange(100, dtype=np.uint16).tofile(plain / "train.bin")
    before = {p: p.read_bytes() for folder in (other, plain) for p in folder.iterdir() if p.is_file()}
    with pytest.raises(SystemExit, match="holds another data set"):
        prepare.main(["--out_dir", str(other)])
    for folder in (other, plain):
        with pytest.raises(DataError, match="was not made here"):
            plain_text.prepare(folder, text, "toy", True)
    assert all(p.read_bytes() == content for p, content in before.items())


def test_pydocs_tokenizer_agrees_with_the_library_that_trained_it(pydocs):
    """tiktoken merges by rank, the trainer by its own list: the same ids on text that neither has seen."""
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(pydocs / "tokenizer.json"))
    ours = load_tokenizer(read_meta(pydocs)["tokenizer"], pydocs)
    texts = [path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parent).glob("*.py"))[:6]]
    for text in [*texts, f"naïve 日本 {END_OF_TEXT} don't\n\n  x"]:
        assert ours.encode(text) == library.encode(text).ids


def test_shakespeare_scripts_write_what_nanogpt_would(tmp_path, gpt2_encoding):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20
    (tmp_path / "input.txt").write_text(text)
    characters, tokens = tmp_path / "c", tmp_path / "t"
    plain_text.main(["--input", str(tmp_path / "input.txt"), "--out_dir", str(tokens)], tmp_path, "", False)
    command = ["data/shakespeare_char/prepare.py", "--input", "input.txt", "--out_dir", "c"]
    command[0] = str(Path(__file__).parents[1] / command[0])
    subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=tmp_path)
    cut = int(len(text) * 0.9)
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    assert np.fromfile(characters / "train.bin", np.uint16).tolist() == [stoi[c] for c in text[:cut]]
    assert np.fromfile(characters / "val.bin", np.uint16).tolist() == [stoi[c] for c in text[cut:]]
    pkl = pickle.loads((characters / "meta.pkl").read_bytes())
    assert pkl["stoi"] == stoi and pkl["vocab_size"] == len(stoi)
    assert np.fromfile(tokens / "train.bin", np.uint16).tolist() == gpt2_encoding.encode_ordinary(text[:cut])
    assert read_meta(characters)["vocab_size"] == len(stoi) and is_prepared(tokens)


@pytest.mark.parametrize("characters", [True, False])
def test_a_set_remade_over_an_older_one_never_passes_half_made(
    tmp_path, monkeypatch, gpt2_encoding, characters
):
    plain_text.prepare(tmp_path, "old text, of other letters " * 30, "toy", characters)
    assert is_prepared(tmp_path) and verify.verify(tmp_path) == []
    real, written = plain_text.write_atomic, []

    def dying(path, chunks):
        if path.name == "val.bin":
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, chunks)

    monkeypatch.setattr(plain_text, "write_atomic", dying)
    with pytest.raises(KeyboardInterrupt):
        plain_text.prepare(tmp_path, "a new text, which has got more letters " * 40, "toy", characters)
    assert "train.bin" in written and not is_prepared(tmp_path)
    with pytest.raises(DataError, match="is not finished"):
        TrainBatches(tmp_path, 8, 1, seed=0)
    assert any("is not finished" in fault for fault in verify.verify(tmp_path))
    monkeypatch.setattr(plain_text, "write_atomic", real)
    plain_text.prepare(tmp_path, "a new text, which has got more letters " * 40, "toy", characters)
    assert is_prepared(tmp_path) and verify.verify(tmp_path) == []
    (tmp_path / "val.bin").write_bytes((tmp_path / "train.bin").read_bytes()[:80])
    assert any("val.bin" in fault for fault in verify.verify(tmp_path))


def test_plain_text_in_other_encodings(tmp_path):
    text = "na\u00efve \u65e5\u672c\u8a9e\nsecond line\n"
    for name, encoding in (("a", "utf-8"), ("b", "utf-8-sig"), ("c", "utf-16"), ("d", "utf-32")):
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert plain_text.obtain(tmp_path / name, "", tmp_path) == text
    (tmp_path / "e").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"is no UTF-8 text.*iconv"):
        plain_text.obtain(tmp_path / "e", "", tmp_path)


def test_two_preparations_of_one_folder_at_once(tmp_path):
    from data.pydocs import prepare as pydocs_prepare

    for main in (pydocs_prepare.main, lambda argv: plain_text.main(argv, tmp_path, "", characters=True)):
        with Lock(tmp_path / "prepare.lock", ""), pytest.raises(SystemExit, match="another run is preparing"):
            main(["--out_dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["prepare.lock"]


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "exec"},
        {"kind": "tiktoken"},
        {"kind": "chars"},
        {"kind": "hf"},
        {"kind": "bytebpe", "file": "../tokenizer.json"},
        {"kind": "hf", "file": "/etc/tokenizer.json"},
        {"kind": "bytebpe", "file": "bad.json"},
        {"kind": "hf", "file": "bad.json"},
    ],
)
def test_a_spec_of_another_shape_is_one_sentence(tmp_path, spec):
    for content in ("{}", "[]", '{"model": {"vocab": {"a": 0}}}', '{"model": {"vocab": ["a"]}}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DataError):
            load_tokenizer(spec, tmp_path)


def test_without_network_or_input_there_is_a_sentence(tmp_path, monkeypatch):
    def dead(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", dead)
    with pytest.raises(SystemExit, match="--input FILE"):
        plain_text.main(["--out_dir", str(tmp_path)], tmp_path, "doc", characters=True)
    assert [path.name for path in tmp_path.iterdir()] == ["prepare.lock"]
