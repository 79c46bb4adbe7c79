"""configurator.py: layers, types, refusals."""

import dataclasses

import pytest

import configurator
from configurator import Config, load


def write(tmp_path, text, name="recipe.py"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_layers_win_in_the_order_given(tmp_path):
    one = write(tmp_path, "n_layer, n_head = 3, 5\nlearning_rate = 1\n", "one.py")
    two = write(tmp_path, "n_head = 7\n", "two.py")
    config = load([one, two, "--n_layer=9"])
    assert (config.n_layer, config.n_head, config.learning_rate) == (9, 7, 1.0)
    assert config.n_embd == Config().n_embd
    assert load(["--n_layer=9", one]).n_layer == 3


def test_types():
    config = load(
        ["--learning_rate=1", "--max_iters=1e3", "--bias=1", "--compile=auto", "--arm=12", "--wandb_log=true"]
    )
    assert isinstance(config.learning_rate, float)
    assert config.max_iters == 1000
    assert isinstance(config.max_iters, int)
    assert config.bias is True
    assert config.compile is None
    assert config.arm == "12"
    assert config.wandb_log is True
    assert config.tracker == "wandb"


@pytest.mark.parametrize(
    ("argv", "tracker"),
    [
        ([], "none"),
        (["--wandb_log=False"], "none"),
        (["--wandb_log=True", "--tracker=trackio"], "trackio"),
        (["--wandb_log=True", "--tracker=none"], "none"),
        (["--tracker=trackio", "--wandb_log=True"], "wandb"),
        (["--tracker=trackio", "--wandb_log=False"], "trackio"),
        (["--tracker=wandb", "--wandb_log=False"], "none"),
    ],
)
def test_wandb_log_is_another_name_for_a_tracker_and_the_later_counts(argv, tracker):
    config = load(argv)
    assert config.tracker == tracker
    assert config.wandb_log == (tracker == "wandb")


# What load() refuses on the command line and in recipes: tests/test_bad_input.py.

# Facts about nanoGPT's own recipes: the keys that they set (github.com/karpathy/nanoGPT, config/).
NANOGPT = {
    "train_gpt2": "wandb_log = True\nwandb_project = 'owt'\nwandb_run_name = 'gpt2-124M'\nbatch_size = 12\nblock_size = 1024\n"
    "gradient_accumulation_steps = 5 * 8\nmax_iters = 600000\nlr_decay_iters = 600000\neval_interval = 1000\neval_iters = 200\n"
    "log_interval = 10\nweight_decay = 1e-1\n",
    "train_shakespeare_char": "out_dir = 'out-shakespeare-char'\neval_interval = 250\neval_iters = 200\nlog_interval = 10\n"
    "always_save_checkpoint = False\nwandb_log = False\nwandb_project = 'shakespeare-char'\nwandb_run_name = 'mini-gpt'\n"
    "dataset = 'shakespeare_char'\ngradient_accumulation_steps = 1\nbatch_size = 64\nblock_size = 256\nn_layer = 6\nn_head = 6\n"
    "n_embd = 384\ndropout = 0.2\nlearning_rate = 1e-3\nmax_iters = 5000\nlr_decay_iters = 5000\nmin_lr = 1e-4\nbeta2 = 0.99\n"
    "warmup_iters = 100\n",
    "finetune_shakespeare": "import time\nout_dir = 'out-shakespeare'\neval_interval = 5\neval_iters = 40\nwandb_log = False\n"
    "wandb_project = 'shakespeare'\nwandb_run_name = 'ft-' + str(time.time())\ndataset = 'shakespeare'\ninit_from = 'gpt2-xl'\n"
    "always_save_checkpoint = False\nbatch_size = 1\ngradient_accumulation_steps = 32\nmax_iters = 20\nlearning_rate = 3e-5\n"
    "decay_lr = False\n",
    "eval_gpt2": "batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\ninit_from = 'gpt2'\n",
}


@pytest.mark.parametrize("name", NANOGPT)
def test_nanogpts_recipes_run_unchanged_and_lost_keys_are_said(name, tmp_path, capsys):
    config = load([write(tmp_path, NANOGPT[name])])
    assert "note: eval_iters in" in capsys.readouterr().out
    if name == "train_gpt2":
        assert config.gradient_accumulation_steps == 40
    if name == "eval_gpt2":
        assert config.eval_only


def test_of_two_keys_for_one_choice_the_later_counts(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("global_batch_size, data_dir = 512, 'there'\n")
    config = configurator.load([str(recipe), "--gradient_accumulation_steps=2", "--dataset=words"])
    assert (config.global_batch_size, config.data_dir, config.dataset) == (0, "", "words")
    config = configurator.load(["--gradient_accumulation_steps=2", "--dataset=words", str(recipe)])
    assert (config.global_batch_size, config.data_dir) == (512, "there")


def test_what_a_recipe_imports_or_defines_is_no_key(tmp_path):
    (tmp_path / "imported_keys.py").write_text("n_head = 3\n")
    text = (
        "import math, os.path\nfrom math import ceil, pi\nfrom pathlib import Path\nimport sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\nfrom imported_keys import n_head\n"
        "def double(x):\n    return 2 * x\nclass Shape:\n    pass\n"
        "_half = ceil(pi)\nn_layer = double(_half)\nout_dir = str(Path('a') / 'b')\n"
    )
    config = load([write(tmp_path, text)])
    assert (config.n_layer, config.n_head, config.out_dir) == (8, 3, "a/b")
    with pytest.raises(SystemExit, match="unknown key half in"):
        load([write(tmp_path, "half = 4\n")])


def test_home_is_meant_by_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load(["--out_dir=~/runs/a", "--data_dir=~/d", "--init_from=~/gpt2", "--arm=~"])
    assert (config.out_dir, config.data_dir, config.init_from) == (
        "/home/me/runs/a",
        "/home/me/d",
        "/home/me/gpt2",
    )
    assert config.arm == "~"  # a name, no path


def test_every_number_has_its_range_and_every_default_lies_in_it():
    """A key whose values have no lowest one must say so here."""
    without = {"wte_init_rms"}
    for f in dataclasses.fields(Config):
        assert configurator.convert(configurator.KEYS, f.name, f.default, "by default") == f.default
        if f.type in (int, float) and f.name not in without:
            low = f.metadata["low"]
            assert low is not None, f.name
            with pytest.raises(SystemExit, match=f"{f.name} here is .* must be at least {low}"):
                configurator.convert(configurator.KEYS, f.name, low - 1, "here")
        if f.type is float:
            for value in (float("nan"), float("inf"), 10**400):
                with pytest.raises(SystemExit, match=r"must be a (finite )?number"):
                    configurator.convert(configurator.KEYS, f.name, value, "here")


def test_a_recorded_configuration_is_read_as_strictly():
    config = configurator.recorded({"n_layer": 3, "of_a_later_version": [1]}, "config.json")
    assert (config.n_layer, config.n_head) == (3, Config().n_head)
    for values in (
        {"n_layer": "three"},
        {"n_layer": None},
        {"wte": 3},
        {"learning_rate": -1},
        {"compile": "perhaps"},
    ):
        with pytest.raises(SystemExit, match=r"in config.json is"):
            configurator.recorded(values, "config.json")


def test_help_lists_every_key_with_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as leaving:
        load(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for f in dataclasses.fields(Config):
        line = next(line for line in text.splitlines() if line.strip().startswith(f"--{f.name} "))
        assert f.metadata["meaning"] in line


def test_a_second_set_of_keys_is_as_strict():
    @dataclasses.dataclass
    class Other:
        start: str = configurator.key("x", "a text")

    assert load(["--start=1e5"], also=Other).start == "1e5"
    with pytest.raises(SystemExit, match="did you mean start"):
        load(["--stat=1"], also=Other)
