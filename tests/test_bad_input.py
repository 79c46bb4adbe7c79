"""Bad input gets one clear sentence, a non-zero exit, no traceback, and overwrites nothing."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

import sample
import train
from engine import runs
from scripts import matched


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_data):
    """A folder with a finished run ('run') and its data ('data'), which cases copy and spoil."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_data, folder / "data")
    keys = TINY | {"data_dir": folder / "data", "out_dir": folder / "run", "max_iters": 4, "eval_interval": 2}
    train.cli([f"--{k}={v}" for k, v in keys.items()])
    return folder


def header(tokens, magic=20240520, version=1):
    h = np.zeros(256, "<i4")
    h[:3] = magic, version, tokens
    return h.tobytes()


def shard(raw: bytes):
    return lambda f: (f / "data" / "tiny_train_000001.bin").write_bytes(raw)


def edit_meta(**changes):
    def spoil(f):
        path = f / "data" / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def remove(name):
    def spoil(f):
        for path in f.glob(name):
            path.unlink() if path.is_file() else shutil.rmtree(path)

    return spoil


def write(name, raw: bytes):
    def spoil(f):
        (f / name).parent.mkdir(parents=True, exist_ok=True)
        (f / name).write_bytes(raw)

    return spoil


def high_token(f):
    remove("data/meta.json")(f)
    write("data/tiny_train_000001.bin", header(5000) + np.full(5000, 60000, "<u2").tobytes())(f)


def torn_checkpoints(f):
    for path in f.glob("run/ckpt/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:100])


def recipe(text):
    return write("recipe.py", text.encode())


def nanogpt_pickle(f):
    torch.save({"weights": 1}, f / "ckpt.pt")


NEW = ["--out_dir={f}/new"]
AGAIN = ["--out_dir={f}/run", "--init_from=auto"]

# what is tried, the program, its arguments, how the folder is spoiled first, words that the sentence must have
CASES = [
    ("unknown key", train, ["--n_layres=2"], None, "unknown key n_layres on the command line: did you mean n_layer?"),
    ("unknown key, nothing near", train, ["--qqqqq=2"], None, "--help lists them all"),
    ("key without a value", train, ["--n_layer"], None, "write --n_layer=VALUE"),
    ("text for a number", train, ["--n_layer=two"], None, "must be a whole number"),
    ("switch for a number", train, ["--n_layer=True"], None, "must be a whole number"),
    ("fraction for a whole number", train, ["--n_layer=2.5"], None, "must be a whole number"),
    ("number for a switch", train, ["--bias=7"], None, "must be True or False"),
    ("text for a switch", train, ["--bias=perhaps"], None, "must be True or False"),
    ("text for a rate", train, ["--learning_rate=fast"], None, "must be a number"),
    ("unknown wte", train, ["--wte=bytes"], None, "one of stock, kronecker"),
    ("unknown dtype", train, ["--dtype=int8"], None, "one of auto, float32"),
    ("unknown extraction", train, ["--byte_extraction=utf8"], None, "one of bytes, decode"),
    ("missing recipe", train, ["{f}/nowhere.py"], None, "no config file"),
    ("typo in a recipe", train, ["{f}/recipe.py"], recipe("n_heads = 2"), "copy/recipe.py: did you mean n_head"),
    ("broken recipe", train, ["{f}/recipe.py"], recipe("n_head = ("), "does not run: SyntaxError"),
    ("recipe that fails", train, ["{f}/recipe.py"], recipe("n_head = 1 / 0"), "does not run: ZeroDivisionError"),
    ("wrong type in a recipe", train, ["{f}/recipe.py"], recipe("n_head = [1]"), "must be a whole number"),
    ("heads that do not divide", train, [*NEW, "--n_head=3"], None, "not a multiple of n_head 3"),
    ("no heads", train, [*NEW, "--n_head=0"], None, "n_head on the command line is 0, but it must be at least 1"),
    ("no layers", train, [*NEW, "--n_layer=-1"], None, "n_layer on the command line is -1"),
    ("no context", train, [*NEW, "--block_size=0"], None, "block_size on the command line is 0"),
    ("dropout of 1", train, [*NEW, "--dropout=1"], None, "must be below 1"),
    ("no steps", train, [*NEW, "--max_iters=0"], None, "max_iters on the command line is 0"),
    ("no evaluation interval", train, [*NEW, "--eval_interval=0"], None, "must be at least 1"),
    ("no log interval", train, [*NEW, "--log_interval=0"], None, "must be at least 1"),
    ("nothing kept", train, [*NEW, "--keep=0"], None, "must be at least 1"),
    ("batch of nothing", train, [*NEW, "--batch_size=0"], None, "batch_size on the command line is 0, but it must be at least 1"),
    ("step that is not a number", train, [*NEW, "--learning_rate=nan"], None, "must be a number"),
    ("beta2 of 1", train, [*NEW, "--beta2=1.0"], None, "beta2 on the command line is 1.0, but it must be below 1"),
    ("learning backwards", train, [*NEW, "--learning_rate=-1"], None, "must be at least 0"),
    ("negative rank", train, [*NEW, "--wte=kronecker", "--wte_rank=-1"], None, "wte_rank on the command line is -1"),
    ("one bucket", train, [*NEW, "--wte=kronecker", "--wte_ngrams=1"], None, "ngrams is 1"),
    ("small alphabet", train, [*NEW, "--wte=kronecker", "--char_dim=7"], None, "outside 0..char_dim-1=6: raise char_dim"),
    ("pos_dim without end", train, [*NEW, "--wte=kronecker", "--pos_dim=1000000000"], None, "pos_dim on the command line is 1000000000, but it must be at most 1024"),
    ("width without end", train, [*NEW, "--n_embd=1e12"], None, "must be at most 65536"),
    ("number without end", train, [*NEW, "--weight_decay=1" + "0" * 400], None, "must be a number"),
    ("negative min_lr", train, [*NEW, "--min_lr=-1"], None, "min_lr on the command line is -1"),
    ("negative decay", train, [*NEW, "--weight_decay=-0.1"], None, "must be at least 0"),
    ("huge seed", train, [*NEW, "--seed=1e30"], None, "must be at most 9223372036854775807"),
    ("no folder", train, ["--out_dir="], None, "must be a path"),
    ("a folder of two lines", train, ["--out_dir={f}/a\nb"], None, "must be a path"),
    ("recipe that leaves", train, ["{f}/recipe.py"], recipe("import sys; sys.exit(0)"), "does not run: SystemExit"),
    ("a set for a number", train, ["--n_layer={{[]}}"], None, "must be a whole number"),
    ("a key in braces", train, ["--\x1b[31m=1"], None, "unknown key '\\x1b[31m'"),
    ("unknown device", train, [*NEW, "--device=tpu"], None, "'tpu' is unknown"),
    ("device that is not supported", train, [*NEW, "--device=meta"], None, "is unknown"),
    ("float16 on a CPU", train, [*NEW, "--dtype=float16"], None, "needs a CUDA GPU"),
    ("vocabulary too small", train, [*NEW, "--vocab_size=10"], None, "was tokenized with 28 ids but the model's vocab_size is 10"),
    ("pos_dim of nothing", train, [*NEW, "--wte=kronecker", "--pos_dim=0"], None, "pos_dim on the command line is 0"),
    ("folder without data", train, [*NEW, "--data_dir={f}/nowhere"], None, "no folder"),
    ("no validation shard", train, NEW, remove("data/*val*"), "no val shards"),
    ("no training shard", train, NEW, remove("data/*train*"), "no train shards"),
    ("empty shard", train, NEW, shard(b""), "tiny_train_000001.bin"),
    ("shard of half a header", train, NEW, shard(header(10)[:500]), "tiny_train_000001.bin"),
    ("wrong magic", train, NEW, shard(header(100, magic=1) + bytes(200)), "tiny_train_000001.bin"),
    ("wrong version", train, NEW, shard(header(100, version=9) + bytes(200)), "tiny_train_000001.bin"),
    ("cut shard", train, NEW, shard(header(1000) + bytes(200)), "tiny_train_000001.bin"),
    ("overlong shard", train, NEW, shard(header(10) + bytes(200)), "tiny_train_000001.bin"),
    ("negative count", train, NEW, shard(header(-5)), "tiny_train_000001.bin"),
    ("training data below one window", train, [*NEW, "--block_size=20000", "--eval_tokens=99999"], None, "less than one window"),
    ("validation below one window", train, [*NEW, "--block_size=4000", "--eval_tokens=4000"], None, "no validation window"),
    ("too few eval_tokens", train, [*NEW, "--eval_tokens=3"], None, "no validation window"),
    ("token id over the vocabulary", train, [*NEW, "--vocab_size=50304"], high_token, "set vocab_size to 60,001 or more"),
    ("damaged meta.json", train, NEW, write("data/meta.json", b"{"), "meta.json is damaged"),
    ("meta.json of something else", train, NEW, write("data/meta.json", b"{}"), "is not the description of prepared data"),
    ("meta.json with an unknown tokenizer", train, NEW, edit_meta(tokenizer={"kind": "martian"}), "martian"),
    ("init_from nothing", train, [*NEW, "--init_from=gpt9"], None, "is nothing known"),
    ("init_from a text file", train, [*NEW, "--init_from={f}/data/meta.json"], None, "is no nanoGPT checkpoint"),
    ("init_from another pickle", train, [*NEW, "--init_from={f}/ckpt.pt"], nanogpt_pickle, "is no nanoGPT checkpoint"),
    ("init_from an empty folder", train, [*NEW, "--init_from={f}/data"], None, "config.json of a GPT-2"),
    ("learned table into kronecker", train, [*NEW, "--init_from=gpt2", "--wte=kronecker"], None, "holds a learned table"),
    ("resume of nothing", train, [*NEW, "--init_from=resume"], None, "no whole checkpoint"),
    ("a run is already there", train, ["--out_dir={f}/run"], None, "go on with --init_from=auto"),
    ("resume with another architecture", train, [*AGAIN, "--n_layer=3"], None, "was trained with n_layer=2"),
    ("resume with another arm", train, [*AGAIN, "--wte=kronecker"], None, "was trained with wte='stock'"),
    ("resume with another seed", train, [*AGAIN, "--seed=4"], None, "was trained with seed=1337"),
    ("resume with another batch", train, [*AGAIN, "--global_batch_size=4"], None, "another tokens_per_step"),
    ("resume with other data", train, AGAIN, shard(header(9000) + bytes(18000)), "another data_fingerprint"),
    ("resume with other validation", train, [*AGAIN, "--eval_tokens=256"], None, "another val_sha256"),
    ("only torn checkpoints", train, ["--out_dir={f}/run", "--init_from=resume"], torn_checkpoints, "no whole checkpoint"),
    ("damaged config.json", train, AGAIN, write("run/config.json", b"{"), "config.json is damaged"),
    ("run.json is gone", train, AGAIN, remove("run/run.json"), "run.json, which should be a run's record"),
    ("out_dir that is a file", train, ["--out_dir={f}/data/meta.json"], None, "meta.json: something else is in the way"),
    ("out_dir that is a device", train, ["--out_dir=/dev/null"], None, "/dev/null: something else is in the way"),
    ("out_dir that leads nowhere", train, ["--out_dir={f}/link"], lambda f: (f / "link").symlink_to(f / "x"), "something else is in the way"),
    ("out_dir that leads to itself", train, ["--out_dir={f}/link/x"], lambda f: (f / "link").symlink_to("link"), "leads to itself"),
    ("out_dir of a long name", train, ["--out_dir={f}/" + "x" * 300], None, "at most 128 characters"),
    ("out_dir of long parts", train, ["--out_dir={f}/" + "x" * 300 + "/a"], None, "name is too long"),
    ("arm that is markup", train, [*NEW, "--arm=$x$"], None, "arm is '$x$', but a name is"),
    ("out_dir below a file", train, ["--out_dir={f}/data/meta.json/x"], None, "meta.json"),
    ("sample of no run", sample, ["--out_dir={f}/data"], None, "which should be a run's configuration"),
    ("sample of torn checkpoints", sample, ["--out_dir={f}/run"], torn_checkpoints, "no latest checkpoint"),
    ("sample of a step that is not there", sample, ["--out_dir={f}/run", "--which=9"], None, "no 9 checkpoint"),
    ("sample of a step that is no number", sample, ["--out_dir={f}/run", "--which=last"], None, "no last checkpoint"),
    ("sample with an unknown key", sample, ["--tempreature=1"], None, "did you mean temperature"),
    ("prompt with a foreign character", sample, ["--out_dir={f}/run", "--start=ABC"], None, "does not occur in the data"),
    ("slot on a learned table", sample, ["--out_dir={f}/run", "--start=a {{{{b}}}}"], None, "no such slot"),
    ("unknown arm", matched, ["config/demo.py", "--arms=bpe_teid"], None, "there is no arm 'bpe_teid'"),
    ("seed that is no number", matched, ["config/demo.py", "--seeds=a"], None, "'a' is no whole number"),
    ("no seeds", matched, ["config/demo.py", "--seeds=,"], None, "it names nothing"),
    ("no ranks", matched, ["config/demo.py", "--gpus_per_run=-1"], None, "'-1' is no whole number from 0"),
    ("matched with a missing recipe", matched, ["{f}/nowhere.py"], None, "no config file"),
    ("matched with an unknown key", matched, ["config/demo.py", "--n_layres=2"], None, "did you mean n_layer"),
]  # fmt: skip


def snapshot(folder) -> dict:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in (".lock", ".contents.json")  # the latter: hashes of the data
    }


@pytest.mark.parametrize(("name", "program", "argv", "spoil", "words"), CASES, ids=[c[0] for c in CASES])
def test_one_sentence(name, program, argv, spoil, words, finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    if spoil:
        spoil(folder)
    before = snapshot(folder)
    flags = [a.format(f=folder) for a in argv]
    if program is train:
        base = TINY | {"data_dir": folder / "data", "max_iters": 4, "eval_interval": 2}
        flags = [f"--{k}={v}" for k, v in base.items()] + flags
    with pytest.raises(SystemExit) as leaving:
        program.main(flags) if program is matched else program.cli(flags)
    sentence = str(leaving.value)
    assert sentence.startswith("error: "), sentence
    assert words in sentence
    assert "\n" not in sentence
    assert leaving.value.code not in (0, None)
    assert snapshot(folder) == before
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train.py", "--n_layres=2"], "did you mean n_layer"),
        (["train.py", "--data_dir=/nowhere", "--device=cpu"], "no folder /nowhere"),
        (["sample.py", "--out_dir=/nowhere"], "there is no /nowhere/config.json"),
        (["scripts/matched.py", "config/demo.py", "--arms=x"], "there is no arm"),
    ],
)
def test_the_same_from_the_shell(command, words):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0
    assert words in done.stderr


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["abc", "1.5", "\u00b2", "1 2"])
def test_an_environment_that_cannot_be(name, value, finished, tmp_path, monkeypatch):
    monkeypatch.setenv(name, value)
    if name == "LOCAL_RANK":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match=f"error: {name}='.*' is no whole number: start with torchrun"):
        train.cli([f"--data_dir={finished / 'data'}", f"--out_dir={tmp_path}"])


@pytest.mark.parametrize(("rank", "world"), [("0", "0"), ("3", "2"), ("-1", "2")])
def test_a_world_that_cannot_be(rank, world, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit, match="do not fit: start with torchrun"):
        train.cli([f"--data_dir={finished / 'data'}", f"--out_dir={tmp_path}", "--device=cpu"])


@pytest.mark.parametrize("port", [None, "abc"])
def test_a_world_without_a_meeting_place(port, finished, tmp_path, monkeypatch, capsys):
    """It is one sentence for a training; sampling needs no company."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    if port:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(SystemExit, match=r"error: .*start with torchrun, or unset WORLD_SIZE and RANK"):
        train.cli([f"--data_dir={finished / 'data'}", f"--out_dir={tmp_path}", "--device=cpu"])
    sample.cli([f"--out_dir={finished / 'run'}", "--num_samples=1", "--max_new_tokens=2", "--device=cpu"])
    assert capsys.readouterr().out


def test_a_second_process_is_kept_out_of_a_run(tiny_flags, tmp_path):
    held = runs.lock(tmp_path / "new")
    with pytest.raises(SystemExit, match="another process trains in"):
        train.cli(tiny_flags(tmp_path / "new"))
    held.close()


def test_a_reader_who_leaves_costs_the_printing_alone(tiny_flags, tmp_path, monkeypatch):
    """As `train.py | head -n 1`, where the pipe breaks in the middle of the training."""
    from engine.metrics import read_metrics

    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w", buffering=1))
    os.close(reader)
    train.cli(tiny_flags(tmp_path / "new", max_iters=4))
    sys.stdout.close()
    assert read_metrics(tmp_path / "new")[-1]["iter"] == 4
    assert (tmp_path / "new" / "latest").read_text() == "step_000004\n"


@pytest.mark.parametrize("size", ["450k", "700k"])
def test_a_full_disk_keeps_the_last_checkpoint(size, small_disk, tiny_flags):
    """A real one: the second checkpoint, of 330 kB, finds no room."""
    from engine import checkpoint

    out_dir = small_disk(size) / "new"
    with pytest.raises(SystemExit, match=r"error: .*the disk is full: free some space.* untouched"):
        train.cli(tiny_flags(out_dir, ckpt_interval=2))
    assert checkpoint.newest(out_dir).name == "step_000002"
    assert not [p for p in out_dir.rglob("*") if "tmp" in p.name or "writing" in p.name]


@pytest.mark.parametrize("peak", ["0", "abc", "nan", "inf", "-3"])
def test_a_peak_that_is_none(peak, tiny_flags, tmp_path, monkeypatch):
    monkeypatch.setenv("KNG_PEAK_TFLOPS", peak)
    with pytest.raises(SystemExit, match=f"error: KNG_PEAK_TFLOPS='{peak}' is no peak"):
        train.cli(tiny_flags(tmp_path / "new"))


def test_a_data_shard_that_vanishes_in_the_middle(finished, tiny_flags, tmp_path, monkeypatch):
    """The loader opens files when it first needs them: a shard that is gone by then is named."""
    shutil.copytree(finished / "data", tmp_path / "data")
    from data import loader

    plain = loader.TrainBatches.rows

    def rows(self, step, lo, hi):
        if step == 7:
            for path in (tmp_path / "data").glob("*train*"):
                path.unlink()
            self._files._file.cache_clear()
        return plain(self, step, lo, hi)

    monkeypatch.setattr(loader.TrainBatches, "rows", rows)
    with pytest.raises(SystemExit, match="tiny_train"):
        train.cli(tiny_flags(tmp_path / "new", data_dir=tmp_path / "data"))


def test_out_of_memory_says_which_knob(monkeypatch, tiny_flags, tmp_path):
    import model

    def too_big(*args, **kw):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...")

    monkeypatch.setattr(model.GPT, "forward", too_big)
    with pytest.raises(
        SystemExit, match=r"--batch_size=2 instead of 4 takes about 50%.*--global_batch_size=8"
    ):
        train.cli(tiny_flags(tmp_path / "new"))
