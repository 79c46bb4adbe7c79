"""scripts/probes/models.py on small sharded checkpoints written here; the hub is a local server."""

import http.server
import itertools
import json
import threading

import numpy as np
import pytest
import torch

from engine.errors import RunError
from kronecker import kronecker_codec, token_bytes
from scripts.probes import common as probe_common
from scripts.probes import models as probe_models

transformers = pytest.importorskip("transformers")
FAMILY_TEXT = " ".join(
    f"{w} {w.capitalize()}"
    for f in json.loads((probe_common.DATA / "word_families.json").read_text())["families"]
    for w in f["exact_family"]
)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    prose = (
        "the quick brown fox jumps over a lazy dog while many small words wander around the old stone house"
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    tok.train_from_iterator([FAMILY_TEXT, prose] * 3, trainer)
    path = tmp_path_factory.mktemp("tok") / "tokenizer.json"
    tok.save(str(path))
    return path


def save_model(kind, folder, tokenizer_file, shard="60KB"):
    from tokenizers import Tokenizer

    n = Tokenizer.from_file(str(tokenizer_file)).get_vocab_size() + 7  # padded, as real tables are
    torch.manual_seed(0)
    if kind == "tied":
        config = transformers.GPT2Config(vocab_size=n, n_embd=32, n_layer=2, n_head=2, n_positions=16)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "untied":
        config = transformers.LlamaConfig(
            vocab_size=n,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    else:
        config = transformers.GPTNeoXConfig(
            vocab_size=n, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
        model = transformers.GPTNeoXForCausalLM(config)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return model


@pytest.mark.parametrize("kind", ["tied", "untied", "other_name"])
def test_finds_and_reads_the_input_table_alone(kind, tmp_path, tokenizer_file):
    model = save_model(kind, tmp_path, tokenizer_file)
    assert (tmp_path / "model.safetensors.index.json").exists()  # really sharded
    source = probe_models.LocalFolder(tmp_path)
    info = probe_models.find_table(source)
    table = probe_models.load_table(source, info)
    wanted = model.get_input_embeddings().weight.detach()
    assert table.dtype == wanted.dtype and torch.equal(table, wanted)
    total = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert source.bytes_read < total  # not the whole model
    tokens = probe_models.load_tokens(source)
    assert b" play" in tokens


def test_head_alone_stands_for_a_tied_table(tmp_path):
    from safetensors.torch import save_file

    head = torch.randn(10, 4)
    save_file({"lm_head.weight": head, "h.0.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    source = probe_models.LocalFolder(tmp_path)
    info = probe_models.find_table(source)
    assert info["tensor"] == "lm_head.weight" and torch.equal(probe_models.load_table(source, info), head)
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    with pytest.raises(RunError, match="--tensor"):
        probe_models.find_table(source)
    assert probe_models.find_table(source, "lm_head.weight")["shape"] == [10, 4]
    with pytest.raises(RunError, match="has no tensor"):
        probe_models.find_table(source, "nope")


def test_position_tables_are_not_taken(tmp_path):
    from safetensors.torch import save_file

    save_file(
        {"transformer.wpe.weight": torch.zeros(3, 4), "position_embeddings.weight": torch.zeros(3, 4)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(RunError, match="no embedding table under a known name"):
        probe_models.find_table(probe_models.LocalFolder(tmp_path))


def test_damaged_or_missing_files_say_so(tmp_path):
    with pytest.raises(RunError, match=r"no model\.safetensors"):
        probe_models.find_table(probe_models.LocalFolder(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(RunError, match="not a safetensors file"):
        probe_models.find_table(probe_models.LocalFolder(tmp_path))
    with pytest.raises(RunError, match="no folder"):
        probe_models.open_model("/nowhere/at all", "main", tmp_path)


class RangeServer(http.server.BaseHTTPRequestHandler):
    """Serves a folder as the hub does, and counts what it sends; drops one body short to provoke a retry."""

    root, served, cut_once, ranges = None, [], False, True

    def do_GET(self):
        path = self.root / self.path.split("/resolve/main/")[1]
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        wanted = self.headers.get("Range")
        if wanted and self.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1]
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if RangeServer.cut_once and len(data) > 1000:
            RangeServer.cut_once = False
            data = data[:100]
        self.wfile.write(data)
        RangeServer.served.append((path.name, len(data)))

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    RangeServer.root, RangeServer.served = tmp_path / "remote", []
    RangeServer.cut_once, RangeServer.ranges = False, True
    RangeServer.root.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), RangeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(probe_models.time, "sleep", lambda s: None)
    yield RangeServer
    server.shutdown()
    server.server_close()


def test_hub_costs_one_tensor(hub, tmp_path, tokenizer_file, monkeypatch):
    model = save_model("untied", hub.root, tokenizer_file)
    monkeypatch.setattr(probe_models, "CHUNK", 10_000)  # several requests for the table
    hub.cut_once = True
    source = probe_models.open_model("someone/model", "main", tmp_path / "cache")
    info = probe_models.find_table(source)
    table = probe_models.load_table(source, info)
    wanted = model.get_input_embeddings().weight.detach()
    assert torch.equal(table, wanted)
    sent = sum(n for name, n in hub.served if name.endswith(".safetensors"))
    assert sent < wanted.numel() * 2 + 10_000  # bf16: the table, the headers, and the body that was cut
    before = len(hub.served)
    assert torch.equal(probe_models.load_table(source, info), wanted) and len(hub.served) == before  # cached


def test_broken_download_goes_on(hub, tmp_path, tokenizer_file):
    model = save_model("tied", hub.root, tokenizer_file)
    source = probe_models.open_model("someone/model", "main", tmp_path / "cache")
    info = probe_models.find_table(source)
    raw = model.get_input_embeddings().weight.detach().numpy().tobytes()
    source.cache.mkdir(parents=True)
    (source.cache / f"{info['tensor']}.part").write_bytes(raw[:5000])
    hub.served.clear()
    assert probe_models.load_table(source, info).numpy().tobytes() == raw
    assert sum(n for _, n in hub.served) == len(raw) - 5000


def test_hub_without_ranges_or_model_says_so(hub, tmp_path, tokenizer_file):
    save_model("tied", hub.root, tokenizer_file)
    hub.ranges = False
    source = probe_models.open_model("someone/model", "main", tmp_path / "cache")
    with pytest.raises(RunError, match="ignores range requests"):
        probe_models.find_table(source)
    (hub.root / "model.safetensors.index.json").unlink()
    with pytest.raises(RunError, match=r"no model\.safetensors"):
        probe_models.find_table(source)


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(probe_models.time, "sleep", lambda s: None)
    with pytest.raises(SystemExit) as e:
        probe_models.main(["--models", "someone/model", "--cache", str(tmp_path)])
    assert str(e.value).startswith("error: cannot read") and "\n" not in str(e.value)


def test_codec_space_is_the_dense_codec_centred():
    tokens = [b"run", b"runs", b" run", b"Run", b"kitchen", b"a", "\u00e9t\u00e9".encode(), b"x" * 40]
    space = probe_models.CodecSpace(tokens, pos_dim=8)
    kept = [t[:8] for t in tokens]
    buffer = torch.zeros(len(kept), 8, dtype=torch.uint8)
    for row, t in enumerate(kept):
        buffer[row, : len(t)] = torch.tensor(list(t), dtype=torch.uint8)
    lengths = torch.tensor([len(t) for t in kept])
    z = kronecker_codec(buffer, lengths, 256, 8, compute_dtype=torch.float64).numpy()
    z = z - z.mean(0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    everything = np.arange(len(tokens))
    assert np.abs(space.against_all(everything) - z @ z.T).max() < 1e-9


def test_table_space_is_the_centred_cosine():
    torch.manual_seed(0)
    table = torch.randn(50, 8) + 3
    ids = np.array([1, 5, 9, 30, 49])
    rows = table[ids] - table[ids].mean(0)
    wanted = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1).numpy()
    space = probe_models.TableSpace(table, ids)
    assert np.allclose(space.against_all(np.arange(5)), wanted, atol=1e-5)
    assert np.allclose(
        space.pairs(np.array([0, 1]), np.array([2, 4])), [wanted[0, 2], wanted[1, 4]], atol=1e-5
    )


def test_edit_distances_against_a_recursive_oracle():
    def oracle(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(oracle(a[1:], b) + 1, oracle(a, b[1:]) + 1, oracle(a[1:], b[1:]) + (a[0] != b[0]))

    words = ["a", "run", "runs", "ran", "nation", "notion", "kit", "iron"]
    i, j = map(np.array, zip(*itertools.product(range(len(words)), repeat=2), strict=True))
    got = probe_models.edit_distances(words, i, j)
    assert got.tolist() == [oracle(words[x], words[y]) for x, y in zip(i, j, strict=True)]


def test_canonical_forms():
    assert {probe_models.canonical(t) for t in (b" Run", b"RUN", b".run", b"run")} == {"run"}
    assert probe_models.canonical(b"runs") == "runs"


def test_a_table_that_knows_case_is_found_out(tokenizer_file):
    """A table made to put case variants together must score typographic; kin made near must score kin."""
    from tokenizers import Tokenizer

    tokens = token_bytes(Tokenizer.from_file(str(tokenizer_file)))
    families = json.loads((probe_common.DATA / "word_families.json").read_text())["families"]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(tokens), 64, generator=generator)
    by_form = {}
    case_table, kin_table = noise.clone(), noise.clone()
    for i, t in enumerate(tokens):
        form = probe_models.canonical(t)
        case_table[i] = 0.1 * noise[i] + by_form.setdefault(form, torch.randn(64, generator=generator))
        family = next((f["family"] for f in families if form in f["exact_family"]), None)
        if family:
            kin_table[i] = 0.1 * noise[i] + by_form.setdefault(
                ("kin", family), torch.randn(64, generator=generator)
            )
    a = probe_models.measure_model("case", case_table, tokens, families, ["zorp"], 0)["spaces"]
    b = probe_models.measure_model("kin", kin_table, tokens, families, ["zorp"], 0)["spaces"]
    assert (
        a["trained"]["neighbours_at_5"]["typographic"]
        > 2 * a["random"]["neighbours_at_5"]["typographic"] + 0.1
    )
    assert b["trained"]["neighbours_at_5"]["kin"] > 0.5 > b["random"]["neighbours_at_5"]["kin"]
    assert b["trained"]["in_family_cosine"] > 0.9 and abs(b["random"]["in_family_cosine"]) < 0.2
    assert abs(a["random"]["random_pair_cosine"]) < 0.02


def test_command_end_to_end(tmp_path, tokenizer_file, capsys):
    for kind in ("tied", "untied"):
        (tmp_path / kind).mkdir()
        save_model(kind, tmp_path / kind, tokenizer_file)
    out = tmp_path / "out"
    probe_models.main(["--models", str(tmp_path / "tied"), str(tmp_path / "untied"), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "typographic" in printed and max(map(len, printed.splitlines())) <= 140
    result = json.loads((out / "compare" / "probes" / "models.json").read_text())
    # one tokenizer, so the codec must agree with itself perfectly, and two random models must not
    (pair,) = result["agreement"]
    assert pair["rsa"]["codec"] == pytest.approx(1.0) and pair["jaccard"]["codec"] == 1.0
    assert abs(pair["rsa"]["trained"]) < 0.2
    assert "Across models" in (out / "compare" / "report.html").read_text()
