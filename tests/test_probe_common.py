"""What all probes share: results in their places, arguments, which runs take part."""

import html
import json
import math
import shutil

import pytest
import torch
from probe_runs import args_for, published, word_families
from runs_on_disk import write_run

import model as gpt
from engine import checkpoint
from sample import load_run
from scripts.analysis.runs import Run
from scripts.probes import common, generation, layers, norms, spelling, tradeoff

PROBES = {m.__name__.split(".")[-1]: m for m in (spelling, generation, layers, tradeoff, norms)}


@pytest.mark.parametrize("name", PROBES)
def test_commands_write_json_figure_and_section(probed_runs, name, capsys):
    extra = ["--samples", "2", "--max_new_tokens", "4"] if name == "generation" else []
    PROBES[name].main(["--runs", str(probed_runs), *extra])
    printed = capsys.readouterr().out
    assert "kronecker" in printed and max(map(len, printed.splitlines())) <= 120
    folder = probed_runs / "compare"
    result = json.loads((folder / "probes" / f"{name}.json").read_text())
    assert result["command"].startswith("python ") and result["date"]
    assert (folder / "probes" / f"{name}.png").stat().st_size > 5000
    section = json.loads((folder / "sections" / f"{name}.json").read_text())
    page = html.unescape((folder / "report.html").read_text())
    assert section["title"] in page and all(
        t["table"]["title"] in page for t in section["blocks"] if "table" in t
    )


def test_records_have_the_published_keys(shared_dir, probed_runs):
    net, tokenizer = load_run(probed_runs / "kronecker_s1337")
    run = Run("x", "kronecker", 1337, {}, {})
    theirs, _ = published(shared_dir, "robustness_results.json")
    (ours,) = spelling.measure(net, tokenizer, [{"category": "c", "clean": "The eye", "typo": "The eey"}])
    assert set(theirs["kron"]["per_prompt"][0]) == set(ours)
    assert set(theirs["kron"]["agg"]["overall"]) == set(spelling.summarise([ours]))
    theirs, _ = published(shared_dir, "generation_probe_results.json")
    prompts = generation.read_prompts(common.DATA / "generation_prompts.json")[:3]
    ours = generation.measure(run, net, tokenizer, prompts, args_for())[0]
    assert set(theirs["results"][0]) <= set(ours)
    theirs, _ = published(shared_dir, "layered_probe_results.json")
    families = word_families()
    ours = layers.measure(run, net, tokenizer, families, args_for(batch_size=500))
    assert set(theirs["kron"]) <= set(ours)
    assert set(theirs["kron"]["sanity_checks"]) <= set(ours["sanity_checks"])
    probe = theirs["kron"]["probes"]["run"]["per_probe"][0]
    assert set(probe) <= set(ours["probes"]["help"]["per_probe"][0])
    assert set(probe["L1"]) == set(ours["probes"]["help"]["per_probe"][0]["L1"])


@pytest.mark.parametrize("wte_norm", ["none", "rms"])
def test_states_are_those_of_the_models_own_forward(wte_norm):
    config = gpt.GPTConfig(block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=16, wte_norm=wte_norm)
    net, ids = gpt.GPT(config).eval(), torch.arange(8)[None]
    states = common.block_states(net, ids)
    assert len(states) == 3
    torch.testing.assert_close(net.transformer.ln_f(states[-1]), net.hidden(ids)[0])


def refused(name: str, argv: list[str]) -> str:
    """The one sentence with which a probe ends."""
    with pytest.raises(SystemExit) as e:
        PROBES[name].main(argv)
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    ("name", "flags", "told"),
    [
        ("spelling", ["--pairs=none.json"], "there is no none.json"),
        ("spelling", ["--generate=5"], "no validation shard"),
        ("layers", ["--baseline=none"], "no run of the baseline none"),
        ("norms", ["--runs", "nowhere"], "there is no folder nowhere"),
        ("generation", ["--samples=0"], "argument --samples: "),
        ("generation", ["--max_new_tokens=-1"], "argument --max_new_tokens: "),
        ("spelling", ["--generate=1000000"], "argument --generate: "),
        ("spelling", ["--batch_size=0"], "argument --batch_size: "),
        ("layers", ["--batch_size=many"], "argument --batch_size: "),
        ("layers", ["--device=cuda:99"], "argument --device: "),
        ("tradeoff", ["--device=abacus"], "argument --device: "),
        ("layers", ["--seed=-1"], "argument --seed: "),
        ("norms", ["--which=best"], "unrecognized arguments: --which=best"),
        ("spelling", ["--text=words.txt"], "--text is read by --generate=N alone"),
        ("spelling", ["--pairs=pairs.json", "--generate=5"], "--pairs and --generate exclude each other"),
    ],
)
def test_errors_are_one_sentence(probed_runs, name, flags, told, capsys):
    assert told in refused(name, ["--runs", str(probed_runs), *flags])
    assert " of 6, " not in capsys.readouterr().err  # before any run was measured for nothing


def test_a_folder_without_runs_is_one_sentence(tmp_path):
    for name in ("spelling", "norms"):
        assert "no run.json at or below" in refused(name, ["--runs", str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "flag", "content"),
    [
        ("spelling", "--pairs", '{"prompt_pairs": [{"clean": "a"}]}'),
        ("spelling", "--pairs", '{"prompt_pairs": ["the typo"]}'),
        ("spelling", "--pairs", '{"prompt_pairs": [{"category": 1, "clean": "a", "typo": "b"}]}'),
        ("spelling", "--pairs", '{"prompt_pairs": []}'),
        (
            "spelling",
            "--pairs",
            '{"prompt_pairs": [{"category": "c", "clean": "a", "typo": "b"}], "bpe": {"per_prompt": {}}}',
        ),
        ("generation", "--prompts", '{"prompts": {"normal": "x"}}'),
        ("generation", "--prompts", '{"prompts": []}'),
        ("generation", "--prompts", '{"results": [{"condition": "odd"}]}'),
    ],
)
def test_files_of_another_shape_are_one_sentence(probed_runs, tmp_path, name, flag, content):
    (tmp_path / "given.json").write_text(content)
    assert "given.json" in refused(name, ["--runs", str(probed_runs), flag, str(tmp_path / "given.json")])


def test_a_model_of_nan_is_refused(probed_runs, tmp_path):
    folder = tmp_path / "kronecker_s1337"
    shutil.copytree(probed_runs / "kronecker_s1337", folder)
    net, _ = load_run(folder)
    state = net.state_dict()
    next(iter(state.values()))[0, 0] = math.nan
    shutil.rmtree(folder / "ckpt")
    checkpoint.save(folder, 2, state, {}, {})
    with pytest.raises(SystemExit, match=r"error: .*kronecker_s1337.* is not finite"):
        tradeoff.main(["--runs", str(folder)])


def test_unfinished_runs_do_not_pass_for_their_arm(probed_runs, tmp_path, capsys):
    root = tmp_path / "some"
    for name in ("kronecker_s1337", "kronecker_s1338", "bpe_tied_s1337"):
        shutil.copytree(probed_runs / name, root / name)
    rows = (root / "kronecker_s1338" / "metrics.jsonl").read_text().splitlines()
    (root / "kronecker_s1338" / "metrics.jsonl").write_text("\n".join(rows[:2]) + "\n")  # stops at 1 of 2
    for module, name in ((norms, "norms"), (spelling, "spelling")):
        module.main(["--runs", str(root)])
        assert "left out" in capsys.readouterr().err
        result = json.loads((root / "compare" / "probes" / f"{name}.json").read_text())
        by_seed = result["kronecker"]["agg"] if name == "spelling" else result["wte/rms"]["kronecker"]
        assert list(by_seed["by_seed"]) == ["1337"]
        module.main(["--runs", str(root), "--allow-unfinished"])
        assert "left out" not in capsys.readouterr().err


def test_runs_of_one_name_and_other_keys_are_arms_of_their_own(tmp_path):
    for seed, rms in ((1, 0.1), (2, 1.0), (3, 1.0)):
        write_run(
            tmp_path,
            "kronecker",
            seed,
            3.8,
            config={"wte": "kronecker", "tie_weights": False, "wte_init_rms": rms},
        )
    found = common.finished_runs([tmp_path], False, needs_checkpoint=False)
    assert [(r.arm, r.seed) for r in found] == [
        ("kronecker", 2),
        ("kronecker", 3),
        ("kronecker[wte_init_rms=0.1]", 1),
    ]
