"""What all probes share: results in their places, arguments, which runs take part."""

import html
import json
import math
import shutil

import pytest
from probe_runs import args_for, published

from engine import checkpoint
from sample import load_run
from scripts.analysis.runs import Run
from scripts.probes import common, generation, layers, norms, spelling, tradeoff


@pytest.mark.parametrize("name", ["spelling", "generation", "layers", "tradeoff", "norms"])
def test_commands_write_json_figure_and_section(probed_runs, name, capsys):
    module = globals()[name]
    extra = {"generation": ["--samples", "2", "--max_new_tokens", "4"]}.get(name, [])
    module.main(["--runs", str(probed_runs), *extra])
    printed = capsys.readouterr().out
    assert "kronecker" in printed and max(map(len, printed.splitlines())) <= 120
    folder = probed_runs / "compare"
    result = json.loads((folder / "probes" / f"{name}.json").read_text())
    assert result["provenance"]["command"].startswith("python ") and result["provenance"]["date"]
    assert (folder / "probes" / f"{name}.png").stat().st_size > 5000
    section = json.loads((folder / "sections" / f"{name}.json").read_text())
    page = html.unescape((folder / "report.html").read_text())
    assert section["title"] in page and all(
        t["table"]["title"] in page for t in section["blocks"] if "table" in t
    )


def test_records_have_the_published_keys(shared_dir, probed_runs):
    net, tokenizer, _ = load_run(probed_runs / "kronecker_s1337")
    run = Run("x", "kronecker", 1337, {}, {})
    theirs, _ = published(shared_dir, "robustness_results.json")
    (ours,) = spelling.measure(net, tokenizer, [{"category": "c", "clean": "The eye", "typo": "The eey"}])
    assert set(theirs["kron"]["per_prompt"][0]) == set(ours)
    assert set(theirs["kron"]["agg"]["overall"]) == set(spelling.summarise([ours]))
    theirs, _ = published(shared_dir, "generation_probe_results.json")
    prompts = generation.read_prompts(common.DATA / "generation_prompts.json")[0][:3]
    ours = generation.measure(net, tokenizer, run, prompts, args_for())[0]
    assert set(theirs["results"][0]) <= set(ours)
    theirs, _ = published(shared_dir, "layered_probe_results.json")
    families = json.loads((common.DATA / "word_families.json").read_text())["families"]
    ours = layers.measure(net, tokenizer, run, families, False, args_for(batch_size=500))
    assert set(theirs["kron"]) <= set(ours)
    assert set(theirs["kron"]["sanity_checks"]) <= set(ours["sanity_checks"])
    probe = theirs["kron"]["probes"]["run"]["per_probe"][0]
    assert set(probe) <= set(ours["probes"]["help"]["per_probe"][0])
    assert set(probe["L1"]) == set(ours["probes"]["help"]["per_probe"][0]["L1"])


def test_errors_are_one_sentence(tmp_path, probed_runs):
    bad = tmp_path / "pairs.json"
    bad.write_text('{"prompt_pairs": [{"clean": "a"}]}')
    empty = tmp_path / "empty"
    empty.mkdir()
    for main, argv in (
        (spelling.main, ["--runs", str(empty)]),
        (spelling.main, ["--runs", str(probed_runs), "--pairs", str(bad)]),
        (spelling.main, ["--runs", str(probed_runs), "--pairs", str(tmp_path / "none.json")]),
        (spelling.main, ["--runs", str(probed_runs), "--generate", "5"]),
        (layers.main, ["--runs", str(probed_runs), "--baseline", "none"]),
        (layers.main, ["--runs", str(probed_runs), "--families", str(bad)]),
        (tradeoff.main, ["--runs", str(probed_runs), "--prefix", "word " * 100]),
        (norms.main, ["--runs", str(empty)]),
    ):
        with pytest.raises(SystemExit) as e:
            main(argv)
        assert str(e.value).startswith("error: ") and "\n" not in str(e.value), argv


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (generation.main, ["--samples=0"]),
        (generation.main, ["--top_p=0"]),
        (generation.main, ["--temperature=nan"]),
        (generation.main, ["--max_new_tokens=-1"]),
        (spelling.main, ["--generate=1000000"]),
        (spelling.main, ["--batch_size=0"]),
        (layers.main, ["--batch_size=many"]),
        (norms.main, ["--device=cuda:99"]),
        (tradeoff.main, ["--device=abacus"]),
        (norms.main, ["--seed=-1"]),
    ],
)
def test_values_out_of_range_are_refused_by_name(main, flags):
    with pytest.raises(SystemExit) as e:
        main(["--runs", "nowhere", *flags])
    assert str(e.value).startswith(f"error: argument {flags[0].split('=')[0]}: ") and "\n" not in str(e.value)


def test_a_model_of_nan_is_refused(probed_runs, tmp_path):
    folder = tmp_path / "kronecker_s1337"
    shutil.copytree(probed_runs / "kronecker_s1337", folder)
    net, _, _ = load_run(folder)
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


@pytest.mark.parametrize(
    ("main", "flag", "content"),
    [
        (spelling.main, "--pairs", '{"prompt_pairs": ["the typo"]}'),
        (spelling.main, "--pairs", '{"prompt_pairs": [{"category": 1, "clean": "a", "typo": "b"}]}'),
        (spelling.main, "--pairs", '{"prompt_pairs": [], "bpe": {"agg": [], "per_prompt": {}}}'),
        (layers.main, "--families", '{"families": {"run": ["runs"]}}'),
        (layers.main, "--families", '{"kron": {"probes": {"run": {"family_root": "run"}}}}'),
        (layers.main, "--families", "[]"),
        (tradeoff.main, "--pairs", '{"byte_similar": [["a"]], "kin": [], "synonyms": []}'),
        (generation.main, "--prompts", '{"prompts": {"normal": "x"}}'),
        (generation.main, "--prompts", '{"results": [{"condition": "odd"}]}'),
    ],
)
def test_files_of_another_shape_are_one_sentence(probed_runs, tmp_path, main, flag, content):
    (tmp_path / "given.json").write_text(content)
    with pytest.raises(SystemExit) as e:
        main(["--runs", str(probed_runs), flag, str(tmp_path / "given.json")])
    assert str(e.value).startswith("error: ") and "given.json" in str(e.value) and "\n" not in str(e.value)
