"""The probes on tiny runs: against values worked out another way, and against the published files' own figures."""

import html
import json
import math
import shutil

import numpy as np
import pytest
import torch

import model as gpt
from data.tokenizers import load_tokenizer
from engine import checkpoint
from engine.prompts import parse_prompt
from kronecker import build_byte_buffer
from sample import load_run
from scripts.analysis.runs import Run
from scripts.probes import common, generation, layers, norms, spelling, tradeoff, typos

ARMS = {"bpe_tied": ("stock", True), "bpe_untied": ("stock", False), "kronecker": ("kronecker", False)}
SEEDS = (1337, 1338)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matmuls: a second thread only waits for the first, and for whatever else runs on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_tokenizer(path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    words = [
        w
        for f in json.loads((common.DATA / "word_families.json").read_text())["families"]
        for w in f["exact_family"]
    ]
    words += [w for p in json.loads((common.DATA / "tradeoff_pairs.json").read_text())["kin"] for w in p]
    prompts = json.loads((common.DATA / "spelling_pairs.json").read_text())["prompt_pairs"]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tok.train_from_iterator([" ".join(words), *(p["clean"] for p in prompts)] * 2, trainer)
    tok.save(str(path))


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    """Untrained runs of three arms and two seeds, in the folders that training would have left."""
    root = tmp_path_factory.mktemp("probes") / "tiny"
    for arm, (wte, tied) in ARMS.items():
        for seed in SEEDS:
            folder = root / f"{arm}_s{seed}"
            folder.mkdir(parents=True)
            if not (root / "tokenizer.json").exists():
                train_tokenizer(root / "tokenizer.json")
            (folder / "tokenizer.json").write_bytes((root / "tokenizer.json").read_bytes())
            spec = {"kind": "hf", "name": "tiny", "file": "tokenizer.json"}
            tokenizer = load_tokenizer(spec, base_dir=folder)
            shape = {
                "block_size": 48,
                "vocab_size": 1024,
                "n_layer": 2,
                "n_head": 2,
                "n_embd": 32,
                "bias": False,
            }
            config = shape | {
                "wte": wte,
                "tie_weights": tied,
                "pos_dim": 16,
                "byte_extraction": "bytes",
                "max_iters": 2,
            }
            buffers = build_byte_buffer(tokenizer.backend, 16) if wte == "kronecker" else None
            net = gpt.GPT(gpt.GPTConfig(**shape, wte=wte, tie_weights=tied, pos_dim=16), buffers, seed=seed)
            with torch.no_grad():  # untrained blocks do nearly nothing; make them count
                for name, p in net.named_parameters():
                    if ".h." in name and p.dim() == 2:
                        p.mul_(5)
            (folder / "config.json").write_text(json.dumps(config))
            matched = dict.fromkeys(("body_sha256", "data_sha256", "val_sha256", "schedule_sha256"), "")
            record = {"arm": arm, "seed": seed, "tokens_per_step": 1} | matched
            (folder / "run.json").write_text(json.dumps(record))
            (folder / "data_meta.json").write_text(json.dumps({"tokenizer": spec}))
            metrics = [
                {"iter": i, "val/loss": 7.0, "wte/rms": 0.02 * (1 + i), "wte/weight_norm": 1.0}
                for i in (0, 1, 2)
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
            checkpoint.save(folder, 2, net.state_dict(), {}, {})
    return root


def published(shared_dir, name):
    path = shared_dir / "reference" / name
    if not path.exists():
        pytest.skip(f"the published {name} is not here")
    return json.loads(path.read_text(encoding="utf-8")), path


def manual_forward(net, ids):
    """Logits (V,) and final hidden state (n_embd,) at the last position, written out without the model's forward."""
    t = net.transformer
    x = (t.wte(torch.tensor([ids])) + t.wpe.weight[: len(ids)]).detach()
    for block in t.h:
        x = block(x)
    x = t.ln_f(x)[0, -1]
    weight = net.wte_table() if net.lm_head is None else net.lm_head.weight
    return (weight @ x).detach().double(), x.detach()


# ---- spelling


@pytest.mark.parametrize("arm", ARMS)
def test_spelling_record_against_a_forward_by_hand(runs_dir, arm):
    net, tokenizer, _ = load_run(runs_dir / f"{arm}_s1337")
    pairs = json.loads((common.DATA / "spelling_pairs.json").read_text())["prompt_pairs"][:12]
    records = spelling.measure(net, tokenizer, pairs, batch_size=3)
    for p, r in zip(pairs, records, strict=True):
        a, ha = manual_forward(net, tokenizer.encode(p["clean"]))
        b, hb = manual_forward(net, tokenizer.encode(p["typo"]))
        pa, pb = torch.softmax(a, 0).numpy(), torch.softmax(b, 0).numpy()
        assert r["kl_clean_to_typo"] == pytest.approx(float((pa * np.log(pa / pb)).sum()), abs=1e-5)
        assert r["cosine_hidden"] == pytest.approx(float(ha @ hb / ha.norm() / hb.norm()), abs=1e-5)
        assert (r["top1_clean_id"], r["top1_typo_id"]) == (pa.argmax(), pb.argmax())
        assert r["top1_matches"] == (pa.argmax() == pb.argmax())
        top = pa.argmax()
        assert r["logprob_drop"] == pytest.approx(math.log(pa[top]) - math.log(pb[top]), abs=1e-5)


def test_spelling_of_equal_prompts_is_zero(runs_dir):
    net, tokenizer, _ = load_run(runs_dir / "kronecker_s1337")
    (r,) = spelling.measure(net, tokenizer, [{"category": "x", "clean": "The eye", "typo": "The eye"}])
    assert r["kl_clean_to_typo"] == pytest.approx(0, abs=1e-6) and r["cosine_hidden"] == pytest.approx(
        1, abs=1e-5
    )
    assert r["top1_matches"] and r["logprob_drop"] == pytest.approx(0, abs=1e-5)


def test_spelling_aggregates_as_published(shared_dir):
    content, path = published(shared_dir, "robustness_results.json")
    for arm in ("bpe", "kron"):
        ours = spelling.aggregate(arm, content[arm]["per_prompt"])
        theirs = content[arm]["agg"]
        assert ours["overall"] == pytest.approx(theirs["overall"])
        assert set(ours["by_category"]) == set(theirs["by_category"])
        for c in theirs["by_category"]:
            assert ours["by_category"][c] == pytest.approx(theirs["by_category"][c])
    by_run = {(a, 1): content[a]["per_prompt"] for a in ("bpe", "kron")}
    c = spelling.compare_arms(by_run, "kron", "bpe", 0)
    assert c["kl_percent"] == pytest.approx(-7.56, abs=0.01)  # the paper's 7.6%
    assert c["top1_difference"]["mean"] == pytest.approx(0.0818, abs=1e-4)  # its 8.2 points
    assert c["categories_won_or_tied"] == [10, 11]
    pairs, agg = typos.read_pairs(path)
    assert len(pairs) == 110 and set(agg) == {"bpe", "kron"}


# ---- generation


def test_greedy_continuation_is_the_argmax_of_each_step(runs_dir):
    net, tokenizer, _ = load_run(runs_dir / "bpe_untied_s1337")
    args = args_for(max_new_tokens=6)
    ids = tokenizer.encode("The kidneys filter the")
    wanted = list(ids)
    for _ in range(6):
        wanted.append(int(manual_forward(net, wanted)[0].argmax()))
    other = tokenizer.encode("Rabbits like to eat")
    got = generation.complete(net, [(ids, {}), (other, {})], args, True)
    assert got[0] == wanted[len(ids) :] and len(got[1]) == 6


def args_for(**changes):
    import argparse

    base = dict(max_new_tokens=5, temperature=0.7, top_p=0.9, batch_size=8, seed=42, samples=2)
    return argparse.Namespace(**(base | changes))


def test_a_slot_with_a_tokens_own_bytes_is_that_token(runs_dir):
    net, tokenizer, _ = load_run(runs_dir / "kronecker_s1337")
    plain = tokenizer.encode("The helper filter the")
    ids, slots = parse_prompt("The {{helper}} filter the", tokenizer, 1024)
    (token,) = tokenizer.encode(" helper")  # one token here, so the slot must be the same thing
    assert slots == {1: b" helper"} and plain == [ids[0], token, *ids[2:]]
    novel, other = (
        parse_prompt(f"The {{{{{w}}}}} filter the", tokenizer, 1024) for w in ("zorblescope", "quin")
    )
    args = args_for(max_new_tokens=8)
    same = generation.complete(net, [(plain, {}), (ids, slots), novel, other], args, True)
    assert same[0] == same[1]
    a, b = (generation.complete(net, [x], args, True)[0] for x in (novel, other))
    assert [a, b] == same[2:]  # alone as in a batch


def test_echo_and_gibberish_rules():
    assert generation.echoes(["zorblescope"], "of a Zorblescope!") == (True, True)
    assert generation.echoes(["zorblescope"], "the zorblesc is") == (False, True)
    assert generation.echoes(["zorblescope"], "the scope is") == (False, False)
    assert generation.changed_words("The telescpoe is used", "The telescope is used") == ["telescpoe"]
    assert generation.is_gibberish("a b a c a d a e a") and not generation.is_gibberish("a b a c a d a")
    assert generation.longest_common("kitten", "mittens") == 5


def test_gibberish_rule_gives_the_published_flags(shared_dir):
    content, path = published(shared_dir, "generation_probe_results.json")
    for r in content["results"]:
        assert generation.is_gibberish(r["completion"]) == r["gibberish_flag"]
    prompts = generation.read_prompts(path)
    assert len(prompts) == 44
    forced = [p for p in prompts if p["condition"] == "forced_oov"]
    assert forced[0]["text"] == "{{kubernetes}} is a system for" and forced[0]["targets"] == ["kubernetes"]
    assert generation.published_rates(path)["misspelled"]["kron"]["echo"] > 0


# ---- layers


def test_layer_scores_and_aggregates_as_published(shared_dir):
    content, path = published(shared_dir, "layered_probe_results.json")
    for arm in ("bpe", "kron"):
        probes = content[arm]["probes"]
        for f in probes.values():
            for p in f["per_probe"]:
                for level in layers.LEVELS:
                    got = layers.scores(
                        p[level]["top10_strings"], p["probe"], f["family_root"], f["exact_family"]
                    )
                    assert got == pytest.approx({s: p[level][s] for s in "LMS"}), (p["probe"], level)
        ours = layers.aggregate(probes)
        for level, values in content[arm]["overall_aggregate"].items():
            assert ours["overall_aggregate"][level] == pytest.approx(values, abs=2e-4), level
        for family, levels in content[arm]["per_family_aggregate"].items():
            assert set(levels) == set(ours["per_family_aggregate"][family])
            for level, values in levels.items():
                assert ours["per_family_aggregate"][family][level] == pytest.approx(values, abs=2e-4)
    families, arms = layers.read_families(path)
    assert len(families) == 6 and set(arms) == {"bpe", "kron"}


def test_layer_neighbours_against_a_plain_search(runs_dir):
    net, tokenizer, _ = load_run(runs_dir / "kronecker_s1337")
    families = json.loads((common.DATA / "word_families.json").read_text())["families"]
    run = Run("x", "kronecker", 1337, {}, {})
    result = layers.measure(net, tokenizer, run, families, False, args_for(batch_size=100))
    assert result["sanity_checks"]["self_retrieval_pass"] and result["sanity_checks"]["probe_in_vocab_pass"]
    n = tokenizer.n_vocab
    t = net.transformer
    x = (net.wte_table()[:n] + t.wpe.weight[0]).detach()
    after = t.h[0](x[:, None])[:, 0].detach()
    entry = result["probes"]["help"]["per_probe"][0]
    token = entry["first_token_id"]
    assert entry["whole"] and tokenizer.decode([token]).strip() == "help"
    for level, rows in (("E_raw", net.wte_table()[:n].detach()), ("L0", after)):
        rows = rows - rows.mean(0)
        cosines = torch.nn.functional.cosine_similarity(rows, rows[token][None], dim=1)
        cosines[token] = -2
        assert entry[level]["top10_ids"] == cosines.topk(10).indices.tolist()
    assert entry["E_raw"]["top10_ids"] == entry["E_post"]["top10_ids"]
    assert entry["E_raw"]["S"] > 0.3  # helper, helped, ... share their bytes with help


# ---- trade-off and norms


def test_tradeoff_cosines(runs_dir):
    net, tokenizer, _ = load_run(runs_dir / "kronecker_s1337")
    pairs = tradeoff.read_pairs(common.DATA / "tradeoff_pairs.json", 0)
    result = tradeoff.measure(net, tokenizer, pairs, "")
    assert result["levels"] == ["embedding", "block 0", "block 1"]
    words = sorted({w for p in pairs.values() for pair in p for w in pair})
    table = net.wte_table().detach()
    means = torch.stack([table[tokenizer.encode(" " + w)].mean(0) for w in words])
    means -= means.mean(0)
    a, b = means[words.index("compute")], means[words.index("commute")]
    got = result["pairs"]["byte_similar"]["compute/commute"][0]
    assert got == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-4)
    assert result["cosine"]["kin"][0] > result["cosine"]["synonyms"][0] + 0.2
    assert abs(result["cosine"]["random"][0]) < 0.1


def test_norms_drift():
    d = norms.drift([0, 500, 1000], [0.5, 1.0, 2.0])
    assert (d["first"], d["last"], d["ratio"], d["highest"]) == (0.5, 2.0, 4.0, 2.0)
    assert d["late_slope_per_1000"] == pytest.approx(1.0)  # +1 over 500 steps, of 2: 100% per 1,000


# ---- commands


@pytest.mark.parametrize("name", ["spelling", "generation", "layers", "tradeoff", "norms"])
def test_commands_write_json_figure_and_section(runs_dir, name, capsys):
    module = globals()[name]
    extra = {"generation": ["--samples", "2", "--max_new_tokens", "4"]}.get(name, [])
    module.main(["--runs", str(runs_dir), *extra])
    printed = capsys.readouterr().out
    assert "kronecker" in printed and max(map(len, printed.splitlines())) <= 120
    folder = runs_dir / "compare"
    result = json.loads((folder / "probes" / f"{name}.json").read_text())
    assert result["provenance"]["command"].startswith("python ") and result["provenance"]["date"]
    assert (folder / "probes" / f"{name}.png").stat().st_size > 5000
    section = json.loads((folder / "sections" / f"{name}.json").read_text())
    page = html.unescape((folder / "report.html").read_text())
    assert section["title"] in page and all(
        t["table"]["title"] in page for t in section["blocks"] if "table" in t
    )


def test_records_have_the_published_keys(shared_dir, runs_dir):
    net, tokenizer, _ = load_run(runs_dir / "kronecker_s1337")
    run = Run("x", "kronecker", 1337, {}, {})
    theirs, _ = published(shared_dir, "robustness_results.json")
    (ours,) = spelling.measure(net, tokenizer, [{"category": "c", "clean": "The eye", "typo": "The eey"}])
    assert set(theirs["kron"]["per_prompt"][0]) == set(ours)
    assert set(theirs["kron"]["agg"]["overall"]) == set(spelling.summarise([ours]))
    theirs, _ = published(shared_dir, "generation_probe_results.json")
    prompts = generation.read_prompts(common.DATA / "generation_prompts.json")[:3]
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


def test_errors_are_one_sentence(tmp_path, runs_dir):
    bad = tmp_path / "pairs.json"
    bad.write_text('{"prompt_pairs": [{"clean": "a"}]}')
    empty = tmp_path / "empty"
    empty.mkdir()
    for main, argv in (
        (spelling.main, ["--runs", str(empty)]),
        (spelling.main, ["--runs", str(runs_dir), "--pairs", str(bad)]),
        (spelling.main, ["--runs", str(runs_dir), "--pairs", str(tmp_path / "none.json")]),
        (spelling.main, ["--runs", str(runs_dir), "--generate", "5"]),
        (layers.main, ["--runs", str(runs_dir), "--baseline", "none"]),
        (layers.main, ["--runs", str(runs_dir), "--families", str(bad)]),
        (tradeoff.main, ["--runs", str(runs_dir), "--prefix", "word " * 100]),
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


def test_a_model_of_nan_is_refused(runs_dir, tmp_path):
    folder = tmp_path / "kronecker_s1337"
    shutil.copytree(runs_dir / "kronecker_s1337", folder)
    net, _, _ = load_run(folder)
    state = net.state_dict()
    next(iter(state.values()))[0, 0] = math.nan
    shutil.rmtree(folder / "ckpt")
    checkpoint.save(folder, 2, state, {}, {})
    with pytest.raises(SystemExit, match=r"error: .*kronecker_s1337.* is not finite"):
        tradeoff.main(["--runs", str(folder)])


def test_unfinished_runs_do_not_pass_for_their_arm(runs_dir, tmp_path, capsys):
    root = tmp_path / "some"
    for name in ("kronecker_s1337", "kronecker_s1338", "bpe_tied_s1337"):
        shutil.copytree(runs_dir / name, root / name)
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


def test_untrained_twin_is_step_zero(runs_dir):
    for arm in ARMS:
        net, tokenizer, config = load_run(runs_dir / f"{arm}_s1338")
        twin = spelling.untrained_twin(net, tokenizer, config, 1338)
        body = dict(twin.body_parameters())
        for name, p in net.body_parameters():  # the fixture's body is step 0's, its matrices times 5
            factor = 5 if ".h." in name and p.dim() == 2 else 1
            assert torch.equal(p, body[name] * factor), name
