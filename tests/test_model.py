"""model.py against written-out definitions."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, all_logits, arm_keys, model_keys
from torch.nn import functional as F

from engine.generation import pick
from engine.loss import CHUNK_BYTES
from model import GPT, GPTConfig

SHAPE = {
    "block_size": 16,
    "vocab_size": 50,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "bias": False,
    "pos_dim": 4,
}
ARMS = ["bpe_tied", "bpe_untied", "kronecker", "kronecker_tied", "bpe_lowrank", "bpe_hash"]


def byte_buffers(vocab=50, pos_dim=4):
    g = torch.Generator().manual_seed(5)
    lengths = torch.randint(0, pos_dim + 1, (vocab,), generator=g)
    data = torch.randint(0, 256, (vocab, pos_dim), generator=g)
    data[torch.arange(pos_dim) >= lengths[:, None]] = 0
    return data.to(torch.uint8), lengths.short()


def make(arm="bpe_untied", seed=1337, **changes) -> GPT:
    return GPT(GPTConfig(**SHAPE | changes | model_keys(arm)), byte_buffers(), seed=seed)


def test_names_are_nanogpts():
    blocks = [
        f"transformer.h.{i}.{n}.weight"
        for i in range(2)
        for n in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    ]
    body = [*blocks, "transformer.wpe.weight", "transformer.ln_f.weight"]
    assert set(make("bpe_tied").state_dict()) == {*body, "transformer.wte.weight"}
    assert set(make("bpe_untied").state_dict()) == {*body, "transformer.wte.weight", "lm_head.weight"}
    assert set(make("kronecker").state_dict()) == {
        *body,
        "transformer.wte.projection.weight",
        "lm_head.weight",
    }
    assert set(make("kronecker_tied").state_dict()) == {
        *body,
        "transformer.wte.projection.weight",
        "head_scale",
    }


def test_bodies_are_the_same_bit_for_bit_in_every_arm():
    hashes = {arm: make(arm).body_sha256() for arm in ARMS}
    assert len(set(hashes.values())) == 1
    assert make("kronecker", seed=1338).body_sha256() != hashes["kronecker"]
    first, second = (dict(make(arm).named_parameters()) for arm in ("bpe_tied", "kronecker"))
    shared = set(first) & set(second)
    assert len(shared) == 14
    assert all(torch.equal(first[n], second[n]) for n in shared)


def test_initial_spread_of_each_tensor():
    model = make("kronecker", n_embd=128, n_layer=4, vocab_size=50)
    std = {n: p.std().item() for n, p in model.named_parameters()}
    assert std["transformer.h.0.attn.c_attn.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["transformer.h.3.mlp.c_proj.weight"] == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert std["transformer.wte.projection.weight"] == pytest.approx(1 / math.sqrt(256 * 4), rel=0.05)
    assert std["lm_head.weight"] == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("arm", ARMS)
def test_first_loss_is_near_the_logarithm_of_the_vocabulary(arm):
    idx = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))
    _, loss = make(arm)(idx, idx.roll(-1, 1))
    assert loss.item() == pytest.approx(math.log(50), abs=0.15)


@pytest.mark.parametrize("arm", ARMS)
def test_loss_and_logits_against_plain_cross_entropy(arm):
    model = make(arm)
    idx = torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(1))
    targets = idx.roll(-1, 1)
    logits = all_logits(model, idx)
    torch.testing.assert_close(model(idx)[0], logits[:, -1:])
    expected = F.cross_entropy(logits.view(-1, 50), targets.view(-1))
    torch.testing.assert_close(model(idx, targets)[1], expected)
    with torch.no_grad():
        each = model(idx, targets, reduction="none")[1]
    torch.testing.assert_close(each, F.cross_entropy(logits.mT, targets, reduction="none"))  # (B, T) both


def test_attention_against_its_written_definition():
    torch.manual_seed(0)
    attn = make().transformer.h[0].attn
    x = torch.randn(2, 7, 32)
    q, k, v = (t.view(2, 7, 2, 16).transpose(1, 2) for t in attn.c_attn(x).split(32, dim=2))
    scores = (q @ k.transpose(-1, -2)) / 4.0
    scores = scores.masked_fill(torch.triu(torch.ones(7, 7, dtype=torch.bool), 1), -torch.inf)
    expected = attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 32))
    torch.testing.assert_close(attn(x), expected)


@pytest.mark.parametrize("arm", ["bpe_tied", "kronecker", "kronecker_tied"])
def test_every_way_to_the_loss_gives_one_loss_and_gradient_compiled_or_not(arm, monkeypatch):
    """One graph, no break; compiled, the chunked loss takes the form that a GPU takes."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 5 * 4 * 50)
    idx = torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(1))
    found = []
    for loss in ("full", "chunked"):
        for compiled in (False, True):
            model = make(arm, loss=loss)
            torch._dynamo.reset()
            run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
            value = run(idx, idx.roll(-1, 1))[1]
            value.backward()
            found.append([value.detach(), *(p.grad for p in model.parameters())])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_bfloat16_autocast_trains_close_to_float32():
    """Both matmuls of the loss go through the low format; the sum over chunks stays in float32."""
    idx = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(1))
    grads = []
    for enabled in (False, True):
        model = make("kronecker")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            _, loss = model(idx, idx.roll(-1, 1))
        loss.backward()
        assert loss.dtype == torch.float32
        grads.append([p.grad for p in model.parameters()])
    for exact, low in zip(*grads, strict=True):
        assert low.dtype == torch.float32
        assert (exact - low).norm() <= 0.03 * exact.norm() + 1e-6


def test_tied_table_gets_the_sum_of_both_gradients():
    tied, untied = make("bpe_tied"), make("bpe_untied")
    with torch.no_grad():
        untied.load_state_dict(tied.state_dict() | {"lm_head.weight": tied.transformer.wte.weight})
    idx = torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(1))
    for m in (tied, untied):
        m(idx, idx.roll(-1, 1))[1].backward()
    both = untied.transformer.wte.weight.grad + untied.lm_head.weight.grad
    torch.testing.assert_close(tied.transformer.wte.weight.grad, both)


def test_induced_tie_is_the_table_times_one_scalar():
    model = make("kronecker_tied")
    table = model.transformer.wte.table()
    assert table.shape == (50, 32)
    idx = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.embed(idx)[1], table[idx])
    model(idx, idx)[1].backward()
    assert model.head_scale.grad.abs() > 0
    assert model.transformer.wte.projection.weight.grad.abs().sum() > 0


def lively(model: GPT) -> GPT:
    """In eval mode, with larger weights: as initialised, a model says the same whatever it sees."""
    with torch.no_grad():
        for name, p in model.body_parameters():
            if p.dim() == 2:
                p.mul_(20 if "wpe" not in name else 5)
    return model.eval()


@pytest.mark.parametrize("arm", ["bpe_tied", "kronecker"])
def test_cached_generation_equals_plain_recomputation(arm):
    """Greedy tokens, 40 of them with a context of 16, so that the window slides too."""
    model = lively(make(arm))
    idx = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(2))
    fast = torch.cat(list(model.generate(idx, 40, temperature=0)), dim=1)
    slow = idx
    for _ in range(40):
        with torch.no_grad():
            slow = torch.cat((slow, model(slow[:, -16:])[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(fast, slow[:, 5:])


@pytest.mark.parametrize("arm", ["bpe_tied", "kronecker"])
def test_rows_of_different_lengths_generate_what_each_does_alone(arm):
    """With a context of 16, so that the window slides too: one row begins beyond it. The shortest has a slot."""
    model, rng = lively(make(arm)), torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 50, (1, n), generator=rng) for n in (2, 9, 20)]
    slot = {(0, 1): b"abc"} if arm == "kronecker" else {}
    alone = [
        torch.cat([*model.generate(p, 24, temperature=0, byte_overrides=slot if p is prompts[0] else {})], 1)
        for p in prompts
    ]
    filled = torch.cat([F.pad(p, (20 - p.size(1), 0), value=7) for p in prompts])
    moved, padding = {(0, 18 + p): b for (_, p), b in slot.items()}, torch.tensor([18, 11, 0])
    together = [*model.generate(filled, 24, temperature=0, byte_overrides=moved, padding=padding)]
    assert torch.equal(torch.cat(together, 1), torch.cat(alone))


def test_byte_override_equals_a_token_with_those_bytes():
    model = make("kronecker").eval()
    data, lengths = byte_buffers()
    token = int(lengths.argmax())
    raw = bytes(data[token, : lengths[token]].tolist())
    idx = torch.tensor([[1, 2, token, 3]])
    replaced = torch.tensor([[1, 2, 0, 3]])
    torch.testing.assert_close(model(replaced, byte_overrides={(0, 2): raw})[0], model(idx)[0])
    with pytest.raises(ValueError, match="no slot made from bytes"):
        make("bpe_tied")(idx, byte_overrides={(0, 2): b"x"})


def test_parameters_of_every_arm_at_124m():
    """By hand: 12 blocks of 12 C^2 + 2 C, wpe, ln_f; table 50304 x 768; projection 4096 x 768."""
    body = 12 * (12 * 768 * 768 + 2 * 768) + 1024 * 768 + 768
    table, projection, rank16 = 50304 * 768, 4096 * 768, 16 * (50304 + 768)
    expected = {
        "bpe_tied": (table, 0),
        "bpe_untied": (table, table),
        "bpe_lowrank": (61 * (50304 + 768), table),
        "bpe_hash": (3965 * 768 + 2 * 50304, table),
        "kronecker": (projection, table),
        "kronecker_tied": (projection, 1),
        "kronecker_permuted": (projection, table),
        "kronecker_s01": (projection, table),
        "kronecker_s01_lr3": (projection, table),
        "kronecker_ngrams": (projection + 16384 * 768, table),
        "kronecker_ngrams3k": (projection + 3072 * 768, table),
        "kronecker_rank4": (projection + rank16 // 4, table),
        "kronecker_rank16": (projection + rank16, table),
        "kronecker_rank16_ngrams2k": (projection + rank16 + 2048 * 768, table),
    }
    buffers = (torch.zeros(50304, 16, dtype=torch.uint8), torch.zeros(50304, dtype=torch.int16))
    assert expected.keys() == {path.stem for path in (ROOT / "config" / "arms").glob("*.py")}
    for arm, (table_side, head) in expected.items():
        assert arm_keys(arm)["arm"] == arm
        with torch.device("meta"):
            counts = GPT(GPTConfig(bias=False, **model_keys(arm)), buffers).count_parameters()
        assert (counts["input"], counts["head"], counts["body"]) == (table_side, head, body), arm
        assert counts["total"] == body + table_side + head
        if arm not in ("bpe_tied", "bpe_untied", "kronecker_ngrams"):
            assert counts["input"] < 0.15 * counts["stock_table"]
    assert 1 - projection / table == pytest.approx(0.919, abs=0.001)  # the paper's 91%


def test_additions_are_drawn_from_the_seed_and_start_at_the_papers_embedding():
    idx = torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(1))
    plain = make("kronecker", wte_init_rms=0.1)
    for more in ({"wte_ngrams": 64}, {"wte_rank": 4}):
        torch.manual_seed(7)
        one = make("kronecker", wte_init_rms=0.1, **more)
        torch.manual_seed(8)
        two = make("kronecker", wte_init_rms=0.1, **more)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        torch.testing.assert_close(one.transformer.wte(idx), plain.transformer.wte(idx))
        assert one.body_sha256() == plain.body_sha256()
        one(idx, idx.roll(-1, 1))[1].backward()
        grads = {n: p.grad.norm().item() for n, p in one.transformer.wte.named_parameters()}
        assert all(g > 0 for n, g in grads.items() if not n.endswith("residual_u")), grads  # v starts at 0
    torch.testing.assert_close(plain.transformer.wte(idx), 0.1 * make("kronecker").transformer.wte(idx))


def test_pick_keeps_to_top_k_and_top_p():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    g = torch.Generator().manual_seed(0)
    assert set(pick(logits, 1.0, 2, None, g).flatten().tolist()) == {0, 1}
    assert set(pick(logits, 1.0, None, 0.7, g).flatten().tolist()) == {0, 1}
    share = (pick(logits, 1.0, None, None, g) == 0).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.03)
    assert pick(logits, 0, None, None, g).unique().tolist() == [0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"n_head": 3}, "not a multiple"), ({"n_layer": 0}, "at least 1")],
)
def test_impossible_shapes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**SHAPE | changes)


@pytest.mark.parametrize("init_rms", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("arm", ["bpe_untied", "kronecker", "bpe_lowrank", "bpe_hash"])
def test_the_output_starts_at_the_rms_asked_for(arm, init_rms):
    model = make(arm, wte_init_rms=init_rms, vocab_size=2000, n_embd=64)
    has_bytes = torch.ones(2000, dtype=torch.bool)
    if arm == "kronecker":
        has_bytes[50:] = False
        has_bytes[:50] = byte_buffers()[1] > 0
    rms = model.wte_table()[has_bytes].square().mean().sqrt().item()
    assert rms == pytest.approx(init_rms, rel=0.1)
    # the knob scales what the seed draws, and nothing else
    usual = make(arm, vocab_size=2000, n_embd=64)
    factor = init_rms / usual.config.wte_init_rms
    torch.testing.assert_close(model.wte_table(), factor * usual.wte_table(), rtol=1e-4, atol=1e-5 * init_rms)
    assert model.body_sha256() == usual.body_sha256()


@pytest.mark.parametrize("init_rms", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("wte", ["stock", "kronecker", "lowrank", "hash"])
def test_a_tied_head_starts_near_ln_v_at_any_scale(wte, init_rms):
    config = GPTConfig(
        **SHAPE | {"vocab_size": 512, "wte": wte, "tie_weights": True, "wte_init_rms": init_rms}
    )
    model = GPT(config, byte_buffers(), seed=1)
    assert (model.head_scale is None) == (init_rms == 0.02)
    idx = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))
    _, loss = model(idx, idx.roll(1, 1))
    assert loss.item() == pytest.approx(math.log(512), abs=0.15)


def test_norm_behind_the_token_embedding():
    model = make("bpe_untied", wte_norm="rms")
    idx = torch.arange(16)[None]
    _, x = model.embed(idx)
    table = model.transformer.wte.weight
    by_hand = table[:16] / (table[:16].square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(x[0], by_hand)
    assert model.state_dict().keys() == make("bpe_untied").state_dict().keys()  # no parameters


def test_permuted_bytes_change_the_input_side_alone():
    plain, permuted = make("kronecker"), make("kronecker", wte_permute_seed=3)
    assert torch.equal(plain.transformer.wte.projection.weight, permuted.transformer.wte.projection.weight)
    assert plain.body_sha256() == permuted.body_sha256()
    assert not torch.equal(plain.wte_table(), permuted.wte_table())
    rows = [sorted(map(tuple, model.wte_table().tolist())) for model in (plain, permuted)]
    assert rows[0] == rows[1]  # the same embeddings, dealt out to other tokens


@pytest.mark.parametrize(
    ("arm", "keys", "says"),
    [
        ("bpe_untied", {"wte_rank": 4}, "wte_rank means nothing with wte='stock'"),
        ("bpe_lowrank", {"wte_ngrams": 8}, "wte_ngrams means nothing with wte='lowrank'"),
        ("bpe_hash", {"wte_permute_seed": 1}, "wte_permute_seed means nothing with wte='hash'"),
        (
            "kronecker",
            {"z_normalize": False, "wte_init_rms": 0.1},
            "wte_init_rms means nothing with z_normalize",
        ),
        ("bpe_lowrank", {"vocab_size": 10**6}, "are too few for a table of rank 1"),
    ],
)
def test_a_knob_without_meaning_is_refused(arm, keys, says):
    with pytest.raises(ValueError, match=says):
        make(arm, **keys)


def test_generation_and_slots_on_every_arm():
    for arm in ARMS:
        model = make(arm)
        tokens = torch.cat(list(model.generate(torch.tensor([[1, 2]]), 4, temperature=0)), dim=1)
        assert tokens.shape == (1, 4)
        if not arm.startswith("kronecker"):
            with pytest.raises(ValueError, match="no slot made from bytes"):
                model(torch.tensor([[1, 2]]), byte_overrides={(0, 0): b"ab"})


def test_counting_parameters_does_not_load_the_compiler():
    """It would take longer than torch's own start. In a process of its own: here it may be loaded already."""
    code = (
        "import sys, torch\nfrom model import GPT, GPTConfig\n"
        "buffers = (torch.zeros(64, 16, dtype=torch.uint8), torch.zeros(64, dtype=torch.int16))\n"
        f"for keys in {list(map(model_keys, ARMS))!r}:\n"
        "    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=64, **keys)\n"
        "    with torch.device('meta'):\n        GPT(config, buffers)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
