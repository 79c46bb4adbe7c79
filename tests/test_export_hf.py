"""Every arm as a plain GPT-2 of transformers: the same logits, the same tokens, nothing of ours needed."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

transformers = pytest.importorskip("transformers")

import configurator  # noqa: E402
import train  # noqa: E402
from data import DataError  # noqa: E402
from data.tokenizers import load_tokenizer  # noqa: E402
from engine import pretrained  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from sample import load_run  # noqa: E402
from scripts import export_hf  # noqa: E402

# every arm that there is, and what an arm may be given on top
ARMS = {path.stem: [str(path)] for path in sorted((ROOT / "config" / "arms").glob("*.py"))}
ARMS |= {
    "norm": [*ARMS["kronecker"], "--wte_norm=rms"],
    "norm_tied": [*ARMS["bpe_tied"], "--wte_norm=rms"],
    "norm_scaled_tied": [*ARMS["kronecker_tied"], "--wte_norm=rms", "--wte_init_rms=0.3"],
    "lowrank_tied": [*ARMS["bpe_lowrank"], "--tie_weights=True"],
    "bias_tanh": [*ARMS["kronecker"], "--bias=True", "--gelu=tanh"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data):
    """Function that gives the folder of an arm's run of two steps."""
    folder = tmp_path_factory.mktemp("runs")

    def run(arm):
        if not (folder / arm).exists():
            keys = TINY | {"data_dir": tiny_data, "out_dir": folder / arm, "max_iters": 2, "arm": arm}
            flags = [f"--{k}={v}" for k, v in keys.items()]
            train.main(configurator.load([ARMS[arm][0], *flags, *ARMS[arm][1:]]))
        return folder / arm

    return run


def as_the_harness_loads(folder):
    """(model, tokenizer) as lm-evaluation-harness has them from `--model hf --model_args pretrained=folder`."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype="auto", trust_remote_code=False
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    return model.eval(), tokenizer


@pytest.mark.parametrize("arm", ARMS)
def test_logits_and_tokens(arm, trained, tmp_path, capsys):
    folder = trained(arm)
    export_hf.main([str(folder), str(tmp_path / arm)])
    assert "logits equal to" in capsys.readouterr().out
    model, tokenizer = load_run(folder)
    theirs, fast = as_the_harness_loads(tmp_path / arm)
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    text = "the quick  brown fox\n jumps"
    assert fast.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert fast.decode(tokenizer.encode(text)) == text
    ours = load_tokenizer(tmp_path / arm)  # as sample.py and evaluate.py read the folder
    assert ours.encode(text) == tokenizer.encode(text) and ours.token_bytes() == tokenizer.token_bytes()
    with pytest.raises(DataError, match="has no tokens for '語'"):
        ours.encode("語")
    ids = torch.tensor([tokenizer.encode(text)[:16]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits[:, -1:], model(ids)[0], rtol=0, atol=1e-4)
        # and back again, as sample.py and train.py read a GPT-2 folder
        weights, shape = pretrained.read(str(tmp_path / arm))
        again = GPT(GPTConfig(**shape)).eval()
        pretrained.load(again, weights, arm)
        torch.testing.assert_close(again(ids)[0], model(ids)[0], rtol=0, atol=1e-4)


def test_the_harness_scores_what_we_score(gpt2_encoding, tmp_path):
    """Data without a description are GPT-2's tokens. The harness encodes, and sums the log-probabilities of a
    continuation; the oracle is our own loss on the same ids."""
    from data.shards import write_shard

    text = "The cat sat on the mat, and the dog on the log. " * 40
    tokens = np.array(gpt2_encoding.encode_ordinary(text), np.uint16)
    (tmp_path / "data").mkdir()
    for name in ("t_val_000000.bin", "t_train_000001.bin"):
        write_shard(tmp_path / "data" / name, tokens)
    keys = TINY | {
        "n_layer": 1,
        "n_embd": 8,
        "data_dir": tmp_path / "data",
        "out_dir": tmp_path / "run",
        "max_iters": 1,
    }
    train.main(configurator.load([*ARMS["kronecker"], *(f"--{k}={v}" for k, v in keys.items())]))
    export_hf.export(tmp_path / "run", tmp_path / "out")
    model, ours = load_run(tmp_path / "run")
    theirs, tokenizer = as_the_harness_loads(tmp_path / "out")
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == ours.eot == 50256
    assert tokenizer.model_max_length == theirs.config.n_positions == 16
    context, continuation = "The naïve cat\n sat", " on the log."
    whole = tokenizer.encode(context + continuation, add_special_tokens=False)
    length = len(whole) - len(tokenizer.encode(context, add_special_tokens=False))
    assert whole == gpt2_encoding.encode_ordinary(context + continuation)
    ids = torch.tensor([whole])
    with torch.no_grad():
        logs = theirs(ids[:, :-1]).logits.log_softmax(-1)[0, -length:]
        score = logs.gather(1, ids[0, -length:, None]).sum()
        losses = model(ids[:, :-1], ids[:, 1:], reduction="none")[1][0, -length:]
    torch.testing.assert_close(score, -losses.sum())


def test_loads_in_a_process_that_cannot_see_this_project(trained, tmp_path):
    export_hf.export(trained("kronecker"), tmp_path / "out")
    code = (
        "import sys; sys.path = [p for p in sys.path if p];"
        "from transformers import AutoModelForCausalLM as M; m = M.from_pretrained('out');"
        "assert 'kronecker' not in sys.modules; print(m.lm_head.weight.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_gpt2_tokenizer_converts_exactly(gpt2_encoding):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer.from_str(export_hf.tokenizer_json(gpt2_encoding))
    for text in (
        "emoji 👩‍👩‍👧‍👦 and   spaces\n\n\n",
        "മലയാളം देवनागरी",
        "x = {'a': [1, 2]}  # don't\t",
        "<|endof",
    ):
        assert made.encode(text).ids == gpt2_encoding.encode_ordinary(text)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 100.0])
def test_the_check_of_logits_can_fail(wrong, trained, tmp_path, monkeypatch):
    """Whatever goes wrong on the way is found in the loaded copy, NaN too, and nothing is left behind."""
    honest = export_hf.gpt2_weights

    def spoilt(model):
        weights, tied = honest(model)
        name = "transformer.h.1.ln_1.weight"
        weights[name] = weights[name].clone()  # not the model's own
        weights[name][2] = wrong
        return weights, tied

    monkeypatch.setattr(export_hf, "gpt2_weights", spoilt)
    with pytest.raises(SystemExit, match="error: the exported logits differ from the run's by"):
        export_hf.main([str(trained("bpe_tied")), str(tmp_path / "new")])
    assert not list(tmp_path.iterdir())


def test_by_path_from_any_folder_without_docstrings(trained, tmp_path):
    command = [sys.executable, "-OO", str(ROOT / "scripts" / "export_hf.py"), str(trained("bpe_tied")), "new"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith(f"wrote {tmp_path / 'new'}"), done.stderr
    assert "logits not compared" in done.stdout  # transformers cannot do without docstrings
    assert (tmp_path / "new" / "model.safetensors").is_file()


def test_nothing_is_overwritten_or_left_behind(trained, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(SystemExit, match="already holds something"):
        export_hf.main([str(trained("bpe_tied")), str(tmp_path / "full")])
    with pytest.raises(SystemExit, match="error: "):
        export_hf.main([str(tmp_path / "no_run"), str(tmp_path / "new")])
    monkeypatch.setattr(export_hf, "TOLERANCE", float("nan"))
    with pytest.raises(SystemExit, match="differ from the run's"):
        export_hf.main([str(trained("bpe_tied")), str(tmp_path / "new")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
