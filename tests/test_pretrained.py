"""Pretrained weights: read whole and without running code in them, or refused in a sentence."""

import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import losses
from test_configurator import NANOGPT

import configurator
import sample
import train
from data import DataError
from engine import pretrained
from engine.errors import RunError
from engine.metrics import read_metrics
from model import GPT, GPTConfig
from sample import SampleConfig


def nanogpt_checkpoint(path, prefix="", **shape):
    """A file with the contents that nanoGPT's train.py saves (train.py, `checkpoint = {...}`)."""
    shape = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 16,
        "bias": False,
        "vocab_size": 64,
    } | shape
    model = GPT(GPTConfig(**shape), seed=7)
    weights = {prefix + k: v for k, v in model.state_dict().items()}
    weights[prefix + "lm_head.weight"] = model.transformer.wte.weight  # its tied head has two names
    weights[prefix + "transformer.h.0.attn.bias"] = torch.ones(
        1, 1, 16, 16
    )  # versions before SDPA kept the mask
    torch.save(
        {
            "model": weights,
            "optimizer": {},
            "model_args": shape | {"dropout": 0.0},
            "iter_num": 5,
            "config": {"a": 1},
        },
        path,
    )
    return model


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_nanogpt_checkpoints_load(prefix, tmp_path):
    theirs = nanogpt_checkpoint(tmp_path / "ckpt.pt", prefix)
    weights, shape = pretrained.read(str(tmp_path / "ckpt.pt"))
    assert shape["tie_weights"] is True
    assert (shape["n_layer"], shape["vocab_size"], shape["bias"]) == (2, 64, False)
    ours = GPT(GPTConfig(**shape))
    pretrained.load(ours, weights, "ckpt.pt")
    idx = torch.arange(12)[None]
    torch.testing.assert_close(ours(idx)[0], theirs(idx)[0])


def test_a_nanogpt_checkpoint_is_continued_and_evaluated(tmp_path, tiny_flags):
    theirs = nanogpt_checkpoint(tmp_path / "ckpt.pt")
    for name, more in {"tuned": {}, "judged": {"eval_only": True}}.items():
        flags = tiny_flags(tmp_path / name, init_from=tmp_path / "ckpt.pt", learning_rate=1e-3, **more)
        train.main(configurator.load(flags))
    rows = read_metrics(tmp_path / "tuned")
    judged = read_metrics(tmp_path / "judged")
    assert len(judged) == 1
    assert judged[0]["val/loss"] == losses(rows)[0, "val/loss"]
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    run = json.loads((tmp_path / "tuned" / "run.json").read_text())
    assert run["body_sha256"] == theirs.body_sha256()


def test_a_run_from_pretrained_weights_counts_their_context_and_goes_on_by_the_same_command(
    tmp_path, tiny_flags
):
    """The shape is the weights', whatever the defaults are: at the start, and when the run is resumed."""
    nanogpt_checkpoint(tmp_path / "ckpt.pt", n_layer=3, n_head=4, bias=True)
    shape = ("--n_layer", "--n_head", "--n_embd", "--block_size")
    flags = [f for f in tiny_flags(tmp_path / "run") if not f.startswith(shape)]
    flags += ["--max_iters=8", "--eval_interval=4", "--learning_rate=1e-4"]
    train.cli([*flags, f"--init_from={tmp_path / 'ckpt.pt'}"])
    whole = read_metrics(tmp_path / "run")
    assert whole[-1]["tokens"] == 8 * 8 * 16
    shutil.rmtree(tmp_path / "run" / "ckpt" / "step_000008")
    train.cli([*flags, "--init_from=auto"])
    assert losses(read_metrics(tmp_path / "run")) == losses(whole)
    with pytest.raises(SystemExit, match="was trained with n_head=4, but now it is 2"):
        train.cli([*flags, "--init_from=auto", "--n_head=2"])


def test_a_nanogpt_checkpoint_is_sampled(tmp_path, tiny_data, capsys):
    nanogpt_checkpoint(tmp_path / "ckpt.pt")
    flags = [
        f"--init_from={tmp_path / 'ckpt.pt'}",
        f"--tokenizer={tiny_data}",
        "--start=ab",
        "--num_samples=1",
    ]
    sample.main(configurator.load([*flags, "--max_new_tokens=5", "--device=cpu"], also=SampleConfig))
    assert capsys.readouterr().out.startswith("ab")


def test_a_folder_brings_its_own_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models

    gpt2_folder(tmp_path)
    Tokenizer(models.BPE({c: i for i, c in enumerate("abc")}, [])).save(str(tmp_path / "tokenizer.json"))
    assert pretrained.tokenizer(str(tmp_path), "", 99).n_vocab == 3


def test_weights_of_another_tokenizer_are_refused(tmp_path, tiny_data, tiny_flags):
    """Each row of their table would stand for another token; 28 characters in another order fit otherwise."""
    from data.meta import characters_meta, read_meta, write_meta

    characters = read_meta(tiny_data)["tokenizer"]["itos"]
    for name, order in {"same": characters, "other": [*characters[:2], *reversed(characters[2:])]}.items():
        (tmp_path / name).mkdir()
        nanogpt_checkpoint(tmp_path / name / "ckpt.pt")
        write_meta(tmp_path / name, characters_meta(name, order))
    start = {"max_iters": 1, "warmup_iters": 0}
    train.main(
        configurator.load(tiny_flags(tmp_path / "a", init_from=tmp_path / "same" / "ckpt.pt", **start))
    )
    flags = tiny_flags(tmp_path / "b", init_from=tmp_path / "other" / "ckpt.pt", **start)
    with pytest.raises(
        RunError, match=r"knows token 2 as b'z' .* as b'a' .*prepare the data with the tokenizer of"
    ):
        train.main(configurator.load(flags))
    assert not (tmp_path / "b").exists()


def gpt2_folder(folder, **options):
    """(their model, the folder it was saved in); the oracle is transformers' own forward pass."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 99, "n_positions": 32, "n_embd": 48, "n_layer": 3, "n_head": 4}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | drops | options)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.05)  # biases and norms that matter
    theirs.save_pretrained(folder)
    return theirs


def ours_of(folder, **given):
    weights, shape = pretrained.read(str(folder), given)
    ours = GPT(GPTConfig(**shape)).eval()
    pretrained.load(ours, weights, folder)
    return ours


# what GPT2Config can say and this GPT does, one way or another
DONE = [
    {},
    {"activation_function": "gelu"},
    {"activation_function": "gelu_pytorch_tanh"},
    {"activation_function": "gelu_python"},
    {"n_inner": 192},
    {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
    {"tie_word_embeddings": False},
]


@pytest.mark.parametrize("options", DONE, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "plain")
def test_gpt2_as_transformers_writes_it(options, tmp_path):
    theirs = gpt2_folder(tmp_path, **options)
    idx = torch.randint(0, 99, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(
            ours_of(tmp_path)(idx)[0][:, -1], theirs(idx).logits[:, -1], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    "option",
    [
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-3},
        {"n_inner": 100},
        {"add_cross_attention": True},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"quantization_config": {"load_in_8bit": True}},
        {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}},
        {"n_layer": "three"},
        {"tie_word_embeddings": "yes"},
        {"model_type": "llama"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_option_that_is_not_ours_is_refused_by_name(option, tmp_path):
    gpt2_folder(tmp_path, n_layer=1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | option))
    with pytest.raises(DataError, match=f"config.json is not .*: {next(iter(option))}.* is .*should"):
        pretrained.read(str(tmp_path))


# Options that do not bear on the logits: dropout, initialisation, special ids, heads of other tasks, where to round.
NO_MATTER = set(
    "resid_pdrop embd_pdrop attn_pdrop initializer_range use_cache bos_token_id eos_token_id pad_token_id"
    " summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout"
    " reorder_and_upcast_attn".split()
)


def test_every_option_of_transformers_gpt2_is_known():
    """A new one must be looked at: either it bears on the logits, or it stands in NO_MATTER."""
    transformers = pytest.importorskip("transformers")
    theirs = set(transformers.GPT2Config().to_dict()) - set(transformers.PretrainedConfig().to_dict())
    theirs |= set(transformers.GPT2Config.__annotations__)
    known = set(pretrained.GPT2Config.model_fields) | NO_MATTER
    assert theirs - known - {"model_type", "keys_to_ignore_at_inference", "attribute_map"} == set()
    default = transformers.GPT2Config()
    for name, value in pretrained.GPT2Config(model_type="gpt2").model_dump().items():
        assert value == getattr(default, name, None), name
    for alias, name in transformers.GPT2Config.attribute_map.items():
        assert getattr(pretrained.GPT2Config.model_validate({"model_type": "gpt2", alias: 24}), name) == 24


def test_a_smaller_context_is_cropped_and_contradictions_are_refused(tmp_path):
    gpt2_folder(tmp_path)
    whole, cropped = ours_of(tmp_path), ours_of(tmp_path, block_size=8, vocab_size=0, n_layer=3)
    assert (whole.config.block_size, cropped.config.block_size) == (32, 8)
    idx = torch.randint(0, 99, (2, 8))
    torch.testing.assert_close(cropped(idx)[0], whole(idx)[0])
    for name, value in {
        "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 96, "vocab_size": 128, "bias": False,
        "gelu": "none", "tie_weights": False,
    }.items():  # fmt: skip
        with pytest.raises(RunError, match=f"{name} is {value!r}, but that of .*: leave it out"):
            pretrained.read(str(tmp_path), {name: value})
    with pytest.raises(RunError, match="holds a learned table"):
        pretrained.read(str(tmp_path), {"wte": "kronecker"})


def test_train_crops_and_refuses(tmp_path, tiny_flags):
    nanogpt_checkpoint(tmp_path / "ckpt.pt")
    flags = tiny_flags(tmp_path / "run", init_from=tmp_path / "ckpt.pt", eval_only=True)
    train.cli([*flags, "--block_size=8"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["block_size"] == 8
    with pytest.raises(SystemExit, match=r"error: n_layer is 3, but that of .*ckpt.pt is 2: leave it out"):
        train.cli([*flags, f"--out_dir={tmp_path / 'other'}", "--n_layer=3"])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_nanogpts_recipes_from_a_gpt2_are_planned_without_a_network(
    name, parameters, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(pretrained, "download", lambda name: pytest.fail("downloads"))
    recipe = NANOGPT["finetune_shakespeare" if name == "gpt2-xl" else "eval_gpt2"]
    (tmp_path / "recipe.py").write_text(recipe.replace("'gpt2'", f"'{name}'"))
    train.cli([str(tmp_path / "recipe.py"), "--dry_run=True", "--device=cpu", f"--data_dir={tmp_path}"])
    assert f"{parameters:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda w: w.pop("transformer.h.0.ln_1.weight"),
            r"ckpt.pt are not those .*Missing key.*h.0.ln_1.weight",
        ),
        (lambda w: w.update(score=torch.ones(2)), r"Unexpected key.*score"),
        (
            lambda w: w.update({"transformer.ln_f.weight": torch.ones(3)}),
            "size mismatch for transformer.ln_f.weight",
        ),
        (lambda w: w["transformer.ln_f.weight"].fill_(torch.nan), "ln_f.weight in .* is not finite"),
        (
            lambda w: w["transformer.h.1.mlp.c_fc.weight"][3, 4].fill_(-torch.inf),
            "c_fc.weight in .* is not fin",
        ),
    ],
)
def test_weights_that_do_not_fit_or_are_no_numbers(spoil, words, tmp_path):
    nanogpt_checkpoint(tmp_path / "ckpt.pt")
    weights, shape = pretrained.read(str(tmp_path / "ckpt.pt"))
    spoil(weights)
    with pytest.raises(RunError, match=words):
        pretrained.load(GPT(GPTConfig(**shape)), weights, "ckpt.pt")


@pytest.mark.parametrize("header", [b"", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [-2]}}', b"{"])
def test_a_safetensors_header_of_another_shape(header, tmp_path):
    gpt2_folder(tmp_path, n_layer=1)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(RunError, match=r"model.safetensors cannot be read as safetensors"):
        pretrained.read(str(tmp_path))


@pytest.mark.parametrize(
    "saved",
    [
        {"model": {}, "model_args": {"n_layer": 2, "n_head": 2}},
        {
            "model": dict.fromkeys(("transformer.wte.weight", "transformer.wpe.weight"), torch.ones(2, 2))
            | {"x": 1},
            "model_args": {"n_layer": 2, "n_head": 2},
        },
        {"model": {"transformer.wte.weight": 1}, "model_args": {}},
        {"model": [], "model_args": []},
        [],
        7,
    ],
)
def test_a_pickle_of_another_shape(saved, tmp_path):
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(RunError, match="is no nanoGPT checkpoint"):
        pretrained.read(str(tmp_path / "ckpt.pt"))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"model": Evil(), "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(RunError, match=r"or a damaged one \(not only tensors and plain values\)$"):
        pretrained.read(str(tmp_path / "ckpt.pt"))
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(RunError, match="is no nanoGPT checkpoint"):
        pretrained.read(str(tmp_path / "plain.pt"))
    assert not (tmp_path / "owned").exists()


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    import huggingface_hub

    def dead(*args, **kw):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", dead)
    with pytest.raises(RunError, match="gpt2 could not be had from the hub"):
        pretrained.read("gpt2")
