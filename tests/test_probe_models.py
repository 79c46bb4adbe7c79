"""scripts/probes/models.py on small sharded checkpoints written here, and scripts/probes/tables.py; the hub is a server on this machine."""

import http.server
import json
import threading

import numpy as np
import pytest
import torch
from probe_runs import train_tokenizer, word_families
from safetensors.torch import save_file
from tokenizers import Tokenizer

from data import DataError
from engine.errors import RunError
from kronecker import kronecker_codec, token_bytes
from scripts.probes import models, spaces, tables

transformers = pytest.importorskip("transformers")
FAMILIES = word_families()


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tok") / "tokenizer.json"
    words = " ".join(f"{w} {w.capitalize()}" for f in FAMILIES for w in f["exact_family"])
    prose = (
        "the quick brown fox jumps over a lazy dog while many small words wander around the old stone house"
    )
    train_tokenizer(path, [words, prose] * 3, 900)
    return path


def save_model(kind, folder, tokenizer_file):
    """A model of transformers' own in shards of 60 KB, its table padded by 7 rows, as real ones are."""
    n = Tokenizer.from_file(str(tokenizer_file)).get_vocab_size() + 7
    torch.manual_seed(0)
    size = {"vocab_size": n, "hidden_size": 32, "intermediate_size": 32}
    size |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "tied":
        config = transformers.GPT2Config(vocab_size=n, n_embd=32, n_layer=2, n_head=2, n_positions=16)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "untied":
        config = transformers.LlamaConfig(**size, tie_word_embeddings=False)
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    else:
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**size))
    model.save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return model


def find(folder, tensor=None):
    """(a local model's files, where its table lies)."""
    source = tables.open_model(str(folder), "main")
    return source, tables.find_table(source, tensor)


@pytest.mark.parametrize("kind", ["tied", "untied", "other_name"])
def test_finds_and_reads_the_input_table_alone(kind, tmp_path, tokenizer_file):
    model = save_model(kind, tmp_path, tokenizer_file)
    assert (tmp_path / "model.safetensors.index.json").exists()  # really sharded
    source, info = find(tmp_path)
    table = tables.load_table(source, info)
    wanted = model.get_input_embeddings().weight.detach()
    assert table.dtype == wanted.dtype and torch.equal(table, wanted)
    assert source.bytes_read < sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert b" play" in tables.load_tokens(source)


def test_head_alone_stands_for_a_tied_table(tmp_path):
    head = torch.randn(10, 4)
    save_file({"lm_head.weight": head, "h.0.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    source, info = find(tmp_path)
    assert info["tensor"] == "lm_head.weight" and torch.equal(tables.load_table(source, info), head)
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    with pytest.raises(RunError, match="--tensor"):
        find(tmp_path)
    assert find(tmp_path, "lm_head.weight")[1]["shape"] == [10, 4]
    with pytest.raises(RunError, match="has no tensor"):
        find(tmp_path, "nope")


def test_position_tables_are_not_taken(tmp_path):
    names = ("transformer.wpe.weight", "position_embeddings.weight")
    save_file({name: torch.zeros(3, 4) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match="no embedding table under a known name"):
        find(tmp_path)


def test_missing_files_say_so(tmp_path):
    with pytest.raises(RunError, match=r"no model\.safetensors"):
        find(tmp_path)
    with pytest.raises(RunError, match="no folder"):
        find("/nowhere/at all")


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub as its own client asks it: a listing of the repository, and files by ranges. Counts what it sends."""

    root, sent, broken_after = None, [], None

    def do_GET(self):
        path = self.path.partition("?")[0]
        if "/resolve/main/" not in path:
            return self.reply(json.dumps(self.listing(path)).encode(), "application/json")
        file = self.root / path.split("/resolve/main/")[1]
        if not file.is_file():
            return self.send_error(404)
        data = file.read_bytes()
        first, last = (
            self.headers["Range"].removeprefix("bytes=").split("-") if self.headers["Range"] else ("0", "")
        )
        data = data[int(first) : int(last) + 1 if last else None]
        if Hub.broken_after is not None and len(data) > 1000:
            Hub.broken_after -= 1
            if Hub.broken_after < 0:
                return self.send_error(403)
        Hub.sent.append((file.name, len(data)))
        return self.reply(data, "application/octet-stream", 206 if self.headers["Range"] else 200)

    def listing(self, path):
        if "/tree/" in path:
            files = sorted(self.root.iterdir())
            return [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files
            ]
        return {"id": "someone/model", "sha": "0" * 40, "siblings": []}

    def reply(self, data, kind, status=200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    Hub.root, Hub.sent, Hub.broken_after = tmp_path / "remote", [], None
    Hub.root.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    tables.HfFileSystem.clear_instance_cache()  # it remembers listings
    yield Hub
    server.shutdown()
    server.server_close()


def test_the_hub_costs_one_tensor(hub, tokenizer_file, monkeypatch):
    """The real client of the hub, against a server on this machine."""
    model = save_model("untied", hub.root, tokenizer_file)
    monkeypatch.setattr(tables, "CHUNK", 10_000)  # several requests for the table
    source = tables.open_model("someone/model", "main")
    info = tables.find_table(source)
    table = tables.load_table(source, info)
    wanted = model.get_input_embeddings().weight.detach()
    assert torch.equal(table, wanted)
    sent = sum(n for name, n in hub.sent if name.endswith(".safetensors"))
    assert sent == source.bytes_read - (hub.root / "model.safetensors.index.json").stat().st_size
    assert wanted.numel() * 2 < sent < wanted.numel() * 2 + 5_000  # bf16: the table and one header
    assert b" play" in tables.load_tokens(source)


def test_a_download_that_breaks_off_is_one_sentence(hub, tokenizer_file, monkeypatch):
    save_model("tied", hub.root, tokenizer_file)
    monkeypatch.setattr(tables, "CHUNK", 10_000)
    source = tables.open_model("someone/model", "main")
    info = tables.find_table(source)
    hub.broken_after = 3
    with pytest.raises(RunError, match="its licence accepted"):
        tables.load_table(source, info)


def test_an_index_names_no_file_elsewhere(tmp_path):
    index = {"weight_map": {"embed_tokens.weight": "../../precious.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="is not a plain file name"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("model.safetensors", b"\xff" * 64, "not a safetensors file"),
        ("model.safetensors.index.json", b'{"weight_map": []}', "weight_map"),
        ("model.safetensors.index.json", b"[1]", "JSON object"),
        ("model.safetensors.index.json", b"\xff{", "damaged"),
        ("model.safetensors", (9).to_bytes(8, "little") + b"[1, 2, 3]", "it should be a"),
        ("model.safetensors", b'\x1d\0\0\0\0\0\0\0{"wte.weight": {"dtype": "F3"}', "damaged"),
        ("model.safetensors", (26).to_bytes(8, "little") + b'{"wte.weight": {"a": [1]}}', "has no dtype"),
        (
            "model.safetensors",
            (67).to_bytes(8, "little")
            + b'{"wte.weight":{"dtype":"F32","shape":[4,4],"data_offsets":[0,9]}}  ',
            "not those of its shape",
        ),
    ],
)
def test_records_of_another_shape_are_one_sentence(tmp_path, file, content, told):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=told) as e:
        find(tmp_path)
    assert isinstance(e.value, RunError | DataError) and file in str(e.value) and "\n" not in str(e.value)


def test_no_network_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    tables.HfFileSystem.clear_instance_cache()
    with pytest.raises(SystemExit) as e:
        models.main(["--models", "someone/model"])
    assert str(e.value).startswith("error: cannot read") and "\n" not in str(e.value)


def test_codec_space_is_the_dense_codec_centred():
    tokens = [b"run", b"runs", b" run", b"Run", b"kitchen", b"a", "\u00e9t\u00e9".encode(), b"x" * 40]
    space = spaces.CodecSpace(tokens)
    kept = [t[: spaces.POS_DIM] for t in tokens]
    buffer = torch.zeros(len(kept), spaces.POS_DIM, dtype=torch.uint8)
    for row, t in enumerate(kept):
        buffer[row, : len(t)] = torch.tensor(list(t), dtype=torch.uint8)
    lengths = torch.tensor([len(t) for t in kept])
    z = kronecker_codec(buffer, lengths, 256, spaces.POS_DIM, compute_dtype=torch.float64).numpy()
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
    space = spaces.TableSpace(table, ids)
    assert np.allclose(space.against_all(np.arange(5)), wanted, atol=1e-5)
    assert np.allclose(
        space.pairs(np.array([0, 1]), np.array([2, 4])), [wanted[0, 2], wanted[1, 4]], atol=1e-5
    )


def test_canonical_forms():
    assert {models.canonical(t) for t in (b" Run", b"RUN", b".run", b"run")} == {"run"}
    assert models.canonical(b"runs") == "runs"


def test_a_table_that_knows_case_is_found_out(tokenizer_file):
    """A table made to put case variants together must score typographic; kin made near must score kin."""
    tokens = token_bytes(Tokenizer.from_file(str(tokenizer_file)))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(tokens), 64, generator=generator)
    by_form = {}
    case_table, kin_table = noise.clone(), noise.clone()
    for i, t in enumerate(tokens):
        form = models.canonical(t)
        case_table[i] = 0.1 * noise[i] + by_form.setdefault(form, torch.randn(64, generator=generator))
        family = next((f["family"] for f in FAMILIES if form in f["exact_family"]), None)
        if family:
            kin_table[i] = 0.1 * noise[i] + by_form.setdefault(
                ("kin", family), torch.randn(64, generator=generator)
            )
    a = models.measure_model("case", case_table, tokens, FAMILIES, ["zorp"], 0)[0]["spaces"]
    b = models.measure_model("kin", kin_table, tokens, FAMILIES, ["zorp"], 0)[0]["spaces"]
    assert a["trained"]["typographic"] > 2 * a["random"]["typographic"] + 0.1
    assert b["trained"]["kin"] > 0.5 > b["random"]["kin"]
    assert b["trained"]["in family"] > 0.9 and abs(b["random"]["in family"]) < 0.2
    assert abs(a["random"]["random pair"]) < 0.02


def test_command_end_to_end(tmp_path, tokenizer_file, capsys):
    for kind in ("tied", "untied"):
        (tmp_path / kind).mkdir()
        save_model(kind, tmp_path / kind, tokenizer_file)
    out = tmp_path / "out"
    models.main(["--models", str(tmp_path / "tied"), str(tmp_path / "untied"), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "typographic" in printed and max(map(len, printed.splitlines())) <= 140
    result = json.loads((out / "compare" / "probes" / "models.json").read_text())
    # one tokenizer, so the codec must agree with itself perfectly, and two random models must not
    (pair,) = result["agreement"]
    assert pair["codec"] == pytest.approx(1.0) and abs(pair["trained"]) < 0.2 > abs(pair["random"])
    assert "Across models" in (out / "compare" / "report.html").read_text()
