"""scripts/probes/generation.py: continuations by hand, slots, and the published flags."""

import json

from probe_runs import args_for, manual_forward, published

from engine.prompts import parse_prompt
from sample import load_run
from scripts.probes import generation


def test_greedy_continuation_is_the_argmax_of_each_step(probed_runs):
    net, tokenizer = load_run(probed_runs / "bpe_untied_s1337")
    args = args_for(max_new_tokens=6)
    ids = tokenizer.encode("The kidneys filter the")
    wanted = list(ids)
    for _ in range(6):
        wanted.append(int(manual_forward(net, wanted)[0].argmax()))
    other = tokenizer.encode("Rabbits like to eat")
    got = generation.complete(net, [(ids, {}), (other, {})], args, True)
    assert got[0] == wanted[len(ids) :] and len(got[1]) == 6


def test_a_slot_with_a_tokens_own_bytes_is_that_token(probed_runs):
    net, tokenizer = load_run(probed_runs / "kronecker_s1337")
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
    def judged(completion):
        return tuple(generation.judge(["zorblescope"], completion).values())

    assert judged("of a Zorblescope!") == (True, False)
    assert judged("the scope is a a a a") == (False, False)
    assert judged("a b a c a d a e a") == (False, True)
    assert generation.changed_words("The telescpoe is used", "The telescope is used") == ["telescpoe"]


def test_gibberish_rule_gives_the_published_flags(shared_dir):
    content, path = published(shared_dir, "generation_probe_results.json")
    for r in content["results"]:
        assert generation.judge([], r["completion"])["gibberish_flag"] == r["gibberish_flag"]
    prompts = generation.read_prompts(path)
    assert len(prompts) == 44
    forced = [p for p in prompts if p["condition"] == "forced_oov"]
    assert forced[0]["text"] == "{{kubernetes}} is a system for" and forced[0]["targets"] == ["kubernetes"]


def test_the_table_counts_each_conditions_continuations(probed_runs, capsys, tmp_path):
    path = tmp_path / "prompts.json"
    prompts = [
        {"prompt_id": 1, "normal": "The eye", "misspelled": "The eey"},
        {"prompt_id": 2, "normal": "The ear"},
    ]
    path.write_text(json.dumps({"prompts": prompts}))
    generation.main(
        [
            "--runs",
            str(probed_runs),
            f"--prompts={path}",
            "--samples=3",
            "--max_new_tokens=2",
            f"--out={tmp_path}",
        ]
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {(r[0], r[2]) for r in rows if r and r[0] in ("normal", "misspelled")} == {
        ("normal", "6"),
        ("misspelled", "3"),
    }
