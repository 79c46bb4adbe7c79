"""Every arm as a plain GPT-2 of transformers: the same logits, the same tokens, nothing of ours needed."""

import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

import configurator  # noqa: E402
from sample import load_run  # noqa: E402
from scripts import export_hf  # noqa: E402

ARMS = {
    "bpe_tied": {},
    "bpe_untied": {"tie_weights": False},
    "kronecker": {"wte": "kronecker", "tie_weights": False, "bias": False, "gelu": "tanh"},
    "kronecker_tied": {"wte": "kronecker", "tie_weights": True, "wte_ngrams": 32, "wte_rank": 2},
}


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory, tiny_data):
    from conftest import TINY

    import train

    folder = tmp_path_factory.mktemp("runs")
    for arm, keys in ARMS.items():
        keys = TINY | {"data_dir": tiny_data, "out_dir": folder / arm, "max_iters": 3, "arm": arm} | keys
        train.main(configurator.load([f"--{k}={v}" for k, v in keys.items()]))
    return folder


@pytest.mark.parametrize("arm", ARMS)
def test_logits_and_tokens(arm, runs_dir, tmp_path, capsys):
    export_hf.main([str(runs_dir / arm), str(tmp_path / arm)])
    assert "logits equal to" in capsys.readouterr().out
    model, tokenizer, _ = load_run(runs_dir / arm)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / arm)
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.no_grad():
        logits, _ = model(ids)
        torch.testing.assert_close(theirs(ids).logits[:, -1:], logits, rtol=0, atol=1e-4)
    if (tmp_path / arm / "tokenizer.json").exists():
        fast = transformers.AutoTokenizer.from_pretrained(tmp_path / arm)
        text = "The quick  brown fox's\n 12 naïve 你好"
        assert fast.encode(text) == tokenizer.encode(text)
        assert fast.eos_token_id == tokenizer.eot


def test_loads_in_a_process_that_cannot_see_this_project(runs_dir, tmp_path):
    export_hf.export(runs_dir / "kronecker", tmp_path / "out")
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


def test_nothing_is_overwritten_or_left_behind(runs_dir, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(SystemExit, match="already holds something"):
        export_hf.main([str(runs_dir / "bpe_tied"), str(tmp_path / "full")])
    with pytest.raises(SystemExit, match="error: "):
        export_hf.main([str(tmp_path / "no_run"), str(tmp_path / "new")])
    monkeypatch.setattr(export_hf, "largest_difference", lambda *_: float("nan"))
    with pytest.raises(SystemExit, match="differ from the run's"):
        export_hf.main([str(runs_dir / "bpe_tied"), str(tmp_path / "new")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
