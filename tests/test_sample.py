"""sample.py: prompts, slots, streams."""

import pytest

import configurator
import sample
from engine.errors import RunError
from sample import SampleConfig


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory, tiny_data):
    """A stock and a kronecker run of a few steps."""
    from conftest import TINY

    import train

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
    _, tokenizer, _ = sample.load_run(runs_dir / "kronecker")
    ids, slots = sample.parse_prompt("the {{frobnicator}} is {{x}}", tokenizer, 64)
    assert slots == {3: b" frobnicator", 7: b" x"}
    assert ids[3] == 63
    assert len(ids) == 8
    assert sample.shown((ids, slots), tokenizer) == "the frobnicator is x"


def test_a_slot_changes_what_follows(runs_dir, capsys):
    flags = [
        f"--out_dir={runs_dir / 'kronecker'}",
        "--max_new_tokens=1",
        "--num_samples=1",
        "--temperature=0",
    ]
    model, tokenizer, _ = sample.load_run(runs_dir / "kronecker")
    import torch

    ids, slots = sample.parse_prompt("a{{bcd}}", tokenizer, 64)
    one = model(torch.tensor([ids]), byte_overrides={(0, p): b for p, b in slots.items()})[0]
    other = model(torch.tensor([ids]), byte_overrides={(0, 1): b"zzz"})[0]
    assert not torch.allclose(one, other)
    assert printed(capsys, *flags, "--start=a{{bcd}}").startswith("abcd")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--start=the {{x}}"], "no such slot"),
        (["--start=the {{}}"], "has no bytes"),
        (["--start="], "prompt is empty"),
        (["--start=FILE:nowhere.txt"], "no prompt file"),
        (["--prompts=nowhere.txt"], "no prompt file"),
        (["--num_samples=0"], "at least 1"),
        (["--temperature=-1"], "at least 0"),
        (["--top_p=0"], "above 0"),
        (["--which=77"], "no 77 checkpoint"),
        (["--out_dir=nowhere"], "is no run"),
        (["--init_from=gpt5"], "nothing known"),
        (["--device=tpu"], "unknown"),
        (["--dtype=float16"], "needs a CUDA GPU"),
    ],
)
def test_refusals(flags, words, runs_dir):
    with pytest.raises(RunError, match=words):
        run(f"--out_dir={runs_dir / 'bpe_tied'}", *flags)


def test_a_run_needs_nothing_outside_its_folder(runs_dir, tmp_path, capsys):
    import shutil

    shutil.copytree(runs_dir / "kronecker", tmp_path / "moved")
    assert printed(
        capsys, f"--out_dir={tmp_path / 'moved'}", "--start=a", "--num_samples=1", "--max_new_tokens=5"
    )
