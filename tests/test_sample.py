"""sample.py: prompts, slots, streams."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import configurator
import sample
import train
from data import DataError
from engine import checkpoint, pretrained
from engine.errors import RunError
from engine.generation import pick
from engine.prompts import parse_prompt, read_prompts, shown
from sample import SampleConfig


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory, tiny_data):
    """A stock and a kronecker run of a few steps."""
    from conftest import TINY

    folder = tmp_path_factory.mktemp("runs")
    for arm, keys in {"bpe_tied": {}, "kronecker": {"wte": "kronecker", "tie_weights": False}}.items():
        keys = TINY | {"data_dir": tiny_data, "out_dir": folder / arm, "max_iters": 3, "arm": arm} | keys
        train.main(configurator.load([f"--{k}={v}" for k, v in keys.items()]))
    return folder


def run(*flags):
    sample.main(configurator.load(["--device=cpu", *flags], prog="sample.py", also=SampleConfig))


def printed(capsys, *flags) -> str:
    run(*flags)
    return capsys.readouterr().out


def test_the_same_seed_gives_the_same_text(runs_dir, capsys):
    flags = [f"--out_dir={runs_dir / 'bpe_tied'}", "--start=the ", "--num_samples=2", "--max_new_tokens=30"]
    first = printed(capsys, *flags)
    assert first == printed(capsys, *flags)
    assert first.count("---------------") == 2
    assert first.startswith("the ")
    assert first != printed(capsys, *flags, "--seed=1")


def test_stream_prints_what_a_plain_run_prints(runs_dir, capsys):
    flags = [
        f"--out_dir={runs_dir / 'kronecker'}",
        "--start=the ",
        "--num_samples=1",
        "--max_new_tokens=40",
        "--temperature=0",
    ]
    assert printed(capsys, *flags, "--stream=True") == printed(capsys, *flags)


def test_a_batch_from_a_file_equals_its_prompts_one_by_one(runs_dir, capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\nxyz\nlonger one\n")
    flags = [
        f"--out_dir={runs_dir / 'kronecker'}",
        "--num_samples=1",
        "--max_new_tokens=20",
        "--temperature=0",
    ]
    together = printed(capsys, *flags, f"--prompts={prompts}")
    alone = "".join(printed(capsys, *flags, f"--start={p}") for p in ("abc", "xyz", "longer one"))
    assert together == alone


def test_prompt_file_and_ids_without_a_token(runs_dir, capsys, tmp_path):
    """The vocabulary is 64 wide, the tokenizer has 28 characters: the rest must print as something."""
    (tmp_path / "p.txt").write_text("abc")
    out = printed(
        capsys, f"--out_dir={runs_dir / 'bpe_tied'}", f"--start=FILE:{tmp_path / 'p.txt'}",
        "--temperature=50", "--top_k=0", "--max_new_tokens=200", "--num_samples=1",
    )  # fmt: skip
    assert out.startswith("abc")
    assert "\ufffd" in out


def test_a_slot_is_one_position_with_its_blank(runs_dir):
    _, tokenizer = sample.load_run(runs_dir / "kronecker")
    ids, slots = parse_prompt("the {{frobnicator}} is {{x}}", tokenizer, 64)
    assert slots == {3: b" frobnicator", 7: b" x"}
    assert ids[3] == 63
    assert len(ids) == 8
    assert shown((ids, slots), tokenizer) == "the frobnicator is x"


def test_a_slot_changes_what_follows(runs_dir, capsys):
    flags = [
        f"--out_dir={runs_dir / 'kronecker'}",
        "--max_new_tokens=1",
        "--num_samples=1",
        "--temperature=0",
    ]
    model, tokenizer = sample.load_run(runs_dir / "kronecker")
    ids, slots = parse_prompt("a{{bcd}}", tokenizer, 64)
    one = model(torch.tensor([ids]), byte_overrides={(0, p): b for p, b in slots.items()})[0]
    other = model(torch.tensor([ids]), byte_overrides={(0, 1): b"zzz"})[0]
    assert not torch.allclose(one, other)
    assert printed(capsys, *flags, "--start=a{{bcd}}").startswith("abcd")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--start=the {{x}}"], "no such slot"),
        (["--start=the {{}}"], "has no bytes"),
        (["--start="], "prompt is empty, and the tokenizer has no end-of-text"),
        (["--stop=True"], "waits for end-of-text"),
        (["--start=FILE:nowhere.txt"], "nowhere.txt"),
        (["--prompts=nowhere.txt"], "nowhere.txt"),
        (["--which=77"], "no 77 checkpoint"),
        (["--out_dir=nowhere"], "there is no nowhere/config.json"),
        (["--init_from=gpt2"], "--out_dir would not be used here"),
        (["--tokenizer=gpt2"], "--tokenizer would not be used here"),
        (["--prompts=p.txt", "--start=a"], "--start would not be used here"),
        (["--device=tpu"], "unknown"),
        (["--dtype=float16"], "needs a CUDA GPU"),
    ],
)
def test_refusals(flags, words, runs_dir):
    with pytest.raises((RunError, DataError, OSError), match=words):
        run(f"--out_dir={runs_dir / 'bpe_tied'}", *flags)


@pytest.mark.parametrize(
    "flag",
    [
        "num_samples=0", "num_samples=1e30", "max_new_tokens=-1", "max_new_tokens=1e30", "temperature=-1",
        "temperature=nan", "temperature=inf", "temperature=1e30", "top_k=-1", "top_p=0", "top_p=1.5", "top_p=nan",
        "seed=1e30", "num_samples=many",
    ],
)  # fmt: skip
def test_ranges(flag):
    with pytest.raises(
        SystemExit, match=f"error: {flag.partition('=')[0]} on the command line is .* must be"
    ):
        run(f"--{flag}")


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-40, 1e-7])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
    logits = torch.randn(5, 70, generator=torch.Generator().manual_seed(0)) * 30
    assert pick(logits, temperature, 200, 0.9, None).tolist() == logits.argmax(1, keepdim=True).tolist()


class Spelled:
    """A tokenizer of bytes, with end-of-text as its last id."""

    eot, n_vocab = 256, 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return b"".join(b"<|endoftext|>" if i == 256 else bytes([i]) for i in ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("<|endoftext|>", [256]),
        ("", [256]),
        ("a<|endoftext|>b", [97, 256, 98]),
        ("<|endoftext|><|endoftext|>", [256, 256]),
        ("<|endoftext", list(b"<|endoftext")),
    ],
)
def test_end_of_text_spelled_out_is_the_token(text, ids):
    assert parse_prompt(text, Spelled(), 300) == (ids, {})
    assert shown((ids, {}), Spelled()) == (text or "<|endoftext|>")


def test_end_of_text_of_gpt2(gpt2_encoding):
    """As nanoGPT's `enc.encode(s, allowed_special={"<|endoftext|>"})`."""
    from data.tokenizers import load_tokenizer

    text = "Once <|endoftext|>Upon\n\n"
    ids, _ = parse_prompt(text, load_tokenizer("gpt2"), 50304)
    assert ids == gpt2_encoding.encode(text, allowed_special={"<|endoftext|>"})


def test_slots_and_end_of_text_together():
    assert parse_prompt("<|endoftext|>a {{b}}c", Spelled(), 300) == ([256, 97, 299, 99], {2: b" b"})


def test_stop_ends_each_sample_at_its_own_end_of_text():
    class Scripted:
        steps = [[1, 5, 9], [9, 5, 3], [2, 5, 4], [2, 9, 4], [6, 6, 6]]

        def generate(self, *_):
            yield from (torch.tensor(step)[:, None] for step in self.steps)

    def tokens(stop):
        config = SampleConfig(stop=stop)
        prompts = [([7], {})] * 3
        return [*sample.continuations(Scripted(), prompts, config, torch.Generator(), end=9)][-1]

    assert tokens(stop=True) == [[1], [5, 5, 5], []]
    assert tokens(stop=False) == [[1, 9, 2, 2, 6], [5, 5, 5, 9, 6], [9, 3, 4, 4, 6]]


def test_a_prompt_ends_at_newlines_only(tmp_path):
    odd = ["one\u2028line", "page\fbreak", "\x1c\x1d\x1e\x85\v", "carriage\rreturn"]
    (tmp_path / "p.txt").write_bytes("\ufeff".encode() + "\r\n".join(odd).encode() + b"\n\nlast")
    assert read_prompts("", str(tmp_path / "p.txt")) == [*odd, "last"]


@pytest.mark.parametrize(("raw", "words"), [(b"\xffa\n", "no UTF-8 text"), (b"\n\n", "holds no prompt")])
def test_prompt_files_that_cannot_be(raw, words, tmp_path):
    (tmp_path / "p.txt").write_bytes(raw)
    with pytest.raises((RunError, DataError), match=words):
        read_prompts("", str(tmp_path / "p.txt"))


def edited(runs_dir, folder, name, change):
    """A copy of a run whose JSON file `name` is changed."""
    shutil.copytree(runs_dir / "kronecker", folder)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(change(content)))
    return folder


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", lambda c: c | {"n_layer": "2"}, "n_layer in .*config.json is '2', but"),
        (
            "config.json",
            lambda c: c | {"n_head": 5},
            "run has a shape that cannot be: n_embd 32 is not a multiple",
        ),
        ("config.json", lambda c: c | {"n_layer": 3}, r"Missing key.*transformer.h.2"),
        ("config.json", lambda c: c | {"wte": "stock"}, r"Unexpected key.*wte.projection.weight"),
        ("config.json", lambda c: c | {"block_size": 8}, "size mismatch for transformer.wpe.weight"),
        ("data_meta.json", lambda c: [c], "data_meta.json is not .*: it should be a JSON object"),
        ("data_meta.json", lambda c: c | {"tokenizer": {"kind": "x"}}, "data_meta.json is not .*: tokenizer"),
        ("data_meta.json", lambda c: c | {"tokenizer": None}, "was trained on ids without a tokenizer"),
        ("data_meta.json", lambda c: {}, "data_meta.json is not .*: it has no tokenizer"),
    ],
)
def test_records_of_another_shape(name, change, words, runs_dir, tmp_path):
    folder = edited(runs_dir, tmp_path / "run", name, change)
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        sample.cli([f"--out_dir={folder}", "--start=a", "--device=cpu"])


def test_weights_that_are_no_numbers(runs_dir, tmp_path):
    shutil.copytree(runs_dir / "kronecker", tmp_path / "run")
    folder = checkpoint.newest(tmp_path / "run")
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors")
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["model.safetensors"] = checkpoint.sha256(folder / "model.safetensors")
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "DONE").write_text(checkpoint.sha256(folder / "state.json"))
    with pytest.raises(RunError, match=r"ln_f.weight in .* is not finite"):
        run(f"--out_dir={tmp_path / 'run'}", "--start=a")


@pytest.mark.parametrize("place", ["beside", "data", "named"])
def test_a_character_level_checkpoint_is_sampled_with_its_own_characters(
    place, tmp_path, tiny_data, capsys, monkeypatch, request
):
    """nanoGPT's ckpt.pt names its data set; meta.pkl lies in data/ of that name."""
    import pickle

    from test_pretrained import nanogpt_checkpoint

    import data
    from data.meta import read_meta

    characters = read_meta(tiny_data)["tokenizer"]["itos"]
    folder = tmp_path / {"beside": "out", "data": "data/tiny_char", "named": "elsewhere"}[place]
    (tmp_path / "out").mkdir()
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"vocab_size": 28, "itos": dict(enumerate(characters)), "stoi": {}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data" / "__init__.py"))
    nanogpt_checkpoint(tmp_path / "out" / "ckpt.pt", vocab_size=28)
    saved = torch.load(tmp_path / "out" / "ckpt.pt") | {"config": {"dataset": "tiny_char"}}
    torch.save(saved, tmp_path / "out" / "ckpt.pt")
    flags = [
        f"--init_from={tmp_path / 'out' / 'ckpt.pt'}",
        "--start=ab",
        "--num_samples=1",
        "--max_new_tokens=40",
    ]
    if place == "named":
        request.getfixturevalue("gpt2_encoding")
        with pytest.raises(RunError, match=r"has 28 tokens, the tokenizer gpt2 50257: name the right one"):
            run(*flags)
        flags.append(f"--tokenizer={folder}")
    out = printed(capsys, *flags).partition("\n---")[0]
    assert len(out) == 42 and set(out) <= set(characters)


def test_a_prompt_that_nobody_gave_is_not_blamed_on_the_user(tmp_path, tiny_flags):
    from conftest import make_tiny_data

    from data.meta import characters_meta, read_meta, write_meta

    folder = make_tiny_data(tmp_path / "data")
    characters = read_meta(folder)["tokenizer"]["itos"]
    write_meta(folder, characters_meta("tiny", ["\t" if c == "\n" else c for c in characters]))
    train.main(configurator.load(tiny_flags(tmp_path / "run", data_dir=folder, max_iters=1, warmup_iters=0)))
    with pytest.raises(RunError, match=r"the usual prompt, a line end, will not do .*: give --start"):
        run(f"--out_dir={tmp_path / 'run'}")
    with pytest.raises(
        DataError, match=r"the character 'Ä' does not occur .*leave it out of the text, or take"
    ):
        run(f"--out_dir={tmp_path / 'run'}", "--start=Ä")


def test_samples_that_a_full_disk_swallows_are_no_success(runs_dir):
    flags = [
        f"--out_dir={runs_dir / 'kronecker'}",
        "--start=a",
        "--num_samples=1",
        "--max_new_tokens=3",
        "--device=cpu",
    ]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "sample.py", *flags], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert (
        done.stderr == "error: what was printed is lost: standard output: the disk is full: free some space\n"
    )


def test_a_data_set_named_by_a_path_is_refused(tmp_path):
    from test_pretrained import nanogpt_checkpoint

    nanogpt_checkpoint(tmp_path / "ckpt.pt")
    saved = torch.load(tmp_path / "ckpt.pt") | {"config": {"dataset": "../../elsewhere"}}
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(DataError, match=r"ckpt\.pt, .* is not a plain file name: name the tokenizer"):
        run(f"--init_from={tmp_path / 'ckpt.pt'}")
    # training needs no tokenizer of the weights, and takes them without that check
    assert pretrained.check_tokenizer(str(tmp_path / "ckpt.pt"), None, 64, tmp_path) is None


FEW = ["--start=the ", "--num_samples=1", "--max_new_tokens=4", "--device=cpu"]


def test_a_closed_pipe_ends_it_quietly(runs_dir, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        sample.cli([f"--out_dir={runs_dir / 'bpe_tied'}", *FEW])
    assert capsys.readouterr().err == ""


def test_a_narrow_terminal_shows_question_marks(runs_dir, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    sample.cli([f"--out_dir={runs_dir / 'kronecker'}", "--start=the {{naïve}}", *FEW[1:]])
    sys.stdout.flush()
    assert raw.getvalue().startswith(b"the na?ve")


def test_without_an_output(runs_dir, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    sample.cli([f"--out_dir={runs_dir / 'bpe_tied'}", *FEW])


def test_interrupted(runs_dir, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample.GPT, "generate", interrupted)
    with pytest.raises(SystemExit) as leaving:
        sample.cli([f"--out_dir={runs_dir / 'bpe_tied'}", *FEW])
    assert leaving.value.code == 130
    assert capsys.readouterr().err.strip() == "stopped by Ctrl-C"


def test_a_run_needs_nothing_outside_its_folder(runs_dir, tmp_path, capsys):
    shutil.copytree(runs_dir / "kronecker", tmp_path / "moved")
    assert printed(
        capsys, f"--out_dir={tmp_path / 'moved'}", "--start=a", "--num_samples=1", "--max_new_tokens=5"
    )
