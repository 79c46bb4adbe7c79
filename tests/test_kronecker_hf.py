"""Inside transformers models: tied and untied heads, added tokens, round trips, refusal to guess or to run code."""

import copy
import json
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from kronecker import KroneckerEmbedding  # noqa: E402
from kronecker.hf import InducedHead, from_pretrained, save_pretrained, swap_input_embeddings  # noqa: E402

TOKENS = [bytes([65 + i % 26]) * (i % 5 + 1) for i in range(30)]
IDS = torch.tensor([[1, 5, 9, 29], [0, 2, 4, 8]])


def gpt2(tied=True, vocab_size=32):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=24, n_embd=12, n_layer=2, n_head=2, tie_word_embeddings=tied
    )
    return transformers.GPT2LMHeadModel(config).eval()


def llama(tied=True, vocab_size=32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize(
    ("tied", "tie"), [(False, None), (True, "untie"), (True, "induced"), (False, "induced")]
)
def test_swap_and_round_trip(make, tied, tie, tmp_path):
    model = make(tied)
    old_head = model.get_output_embeddings().weight.detach().clone()
    emb = swap_input_embeddings(model, TOKENS, pos_dim=4, tie=tie)
    assert model.get_input_embeddings() is emb and isinstance(emb, KroneckerEmbedding)
    head = model.get_output_embeddings()
    names = [name for name, _ in model.named_parameters()]
    assert sum("projection.weight" in name for name in names) == 1
    if tie == "induced":
        assert isinstance(head, InducedHead)
        assert not any(p.shape == (32, 12) for p in model.parameters())
    else:
        assert torch.equal(head.weight, old_head)

    # both ends learn, and the head does not drag the embedding along unless it is tied to it
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = emb.projection.weight.detach().clone()
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(before, emb.projection.weight)

    expected = model(IDS).logits
    save_pretrained(model, tmp_path / "m")
    loaded = from_pretrained(tmp_path / "m")
    torch.testing.assert_close(loaded(IDS).logits, expected)
    again = loaded.get_output_embeddings()
    assert isinstance(again, InducedHead) == (tie == "induced")
    if tie == "induced":
        with torch.no_grad():
            loaded.get_input_embeddings().projection.weight.zero_()
        assert float(loaded(IDS).logits.detach().abs().sum()) == 0


def test_induced_head_by_hand():
    emb = KroneckerEmbedding(30, 5, tokenizer=TOKENS, pos_dim=4)
    head = InducedHead(emb)
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(head(x), 0.02 * x @ emb.table().t())
    assert [name for name, _ in head.named_parameters()] == ["scale"]


def test_half_precision_model():
    model = gpt2().to(torch.bfloat16)
    emb = swap_input_embeddings(model, TOKENS, pos_dim=4, tie="induced")
    assert emb.projection.weight.dtype == torch.bfloat16
    assert model(IDS).logits.dtype == torch.bfloat16


def test_additions_survive(tmp_path):
    model = gpt2()
    emb = swap_input_embeddings(model, TOKENS, pos_dim=4, tie="untie", ngrams=16, rank=2, init_rms=0.1)
    with torch.no_grad():
        emb.ngram.weight.normal_()
        emb.residual_v.normal_()
    save_pretrained(model, tmp_path)
    torch.testing.assert_close(from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_generation():
    model = gpt2()
    swap_input_embeddings(model, TOKENS, pos_dim=4, tie="induced")
    out = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 7)


def test_generation_settings_survive(tmp_path):
    model = llama()
    swap_input_embeddings(model, TOKENS, pos_dim=4, tie="untie")
    model.generation_config.update(eos_token_id=[5, 7], repetition_penalty=1.3, max_new_tokens=7)
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path).generation_config
    assert (again.eos_token_id, again.repetition_penalty, again.max_new_tokens) == ([5, 7], 1.3, 7)


def fast_tokenizer():
    """A byte-level tokenizer of 256 + 2 tokens, as transformers has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"th": 256, "the": 257}
    made = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def swapped(make, tied, tie, vocab_size=258, **options):
    tokenizer = fast_tokenizer()
    model = make(tied, vocab_size=vocab_size)
    swap_input_embeddings(model, tokenizer, pos_dim=8, tie=tie, **options)
    return model, tokenizer


def by_definition(emb, raw: bytes):
    """The embedding of bytes, from the dense codec and the projection alone."""
    code = torch.zeros(emb.char_dim, emb.pos_dim, dtype=torch.float64)
    for position, byte in enumerate(raw[: emb.pos_dim]):
        code[byte, position] = len(raw[: emb.pos_dim]) ** -0.5
    code = code.flatten()
    z = (code - code.mean()) / (code.std() + 1e-6)
    return (emb.projection.weight.detach().double() @ z).float()


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize(("tied", "tie"), [(False, None), (True, "untie"), (True, "induced")])
def test_added_tokens_have_their_own_bytes(make, tied, tie, tmp_path):
    model, tokenizer = swapped(make, tied, tie)
    ids = torch.tensor([tokenizer.encode("the thin thread")])
    before, embedded = model(ids).logits, model.get_input_embeddings()(ids)
    parameters = sum(p.numel() for p in model.get_input_embeddings().parameters())

    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "<|im_start|>"]})
    tokenizer.add_tokens(["naïve"])
    emb = model.resize_token_embeddings(len(tokenizer))
    assert emb is model.get_input_embeddings() and emb.num_embeddings == model.config.vocab_size == 261
    assert model(ids).logits.size(-1) == 261
    assert sum(p.numel() for p in emb.parameters()) == parameters  # nothing to migrate
    torch.testing.assert_close(emb(ids), embedded, rtol=0, atol=0)
    torch.testing.assert_close(model(ids).logits[..., :258], before)
    for text in ("<tool>", "<|im_start|>", "naïve"):
        (new,) = tokenizer.encode(text)
        assert new >= 258
        torch.testing.assert_close(
            emb(torch.tensor([new]))[0].detach(), by_definition(emb, text.encode()), rtol=1e-4, atol=1e-5
        )
    if tie != "induced":  # as transformers starts new rows: at the mean of the old ones
        head = model.get_output_embeddings().weight.detach()
        torch.testing.assert_close(head[258:], head[:258].mean(0).expand(3, -1), rtol=0, atol=1e-3)

    more = torch.tensor([tokenizer.encode("<tool>the naïve<|im_start|>")])
    model(more, labels=more).loss.backward()
    assert (
        model.generate(more, max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] == more.shape[1] + 2
    )

    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path, tokenizer=tokenizer)
    torch.testing.assert_close(loaded(more).logits, model(more).logits)
    tokenizer.add_tokens(["later"])
    loaded.resize_token_embeddings(len(tokenizer))
    assert loaded(torch.tensor([[261]])).logits.shape == (1, 1, 262)


@pytest.mark.parametrize(("tied", "tie"), [(True, "untie"), (True, "induced")])
def test_shrink_and_grow_again(tied, tie):
    model, tokenizer = swapped(gpt2, tied, tie, rank=2)
    emb = model.get_input_embeddings()
    with torch.no_grad():
        emb.residual_v.normal_()
    ids = torch.tensor([[1, 5, 99]])
    before, residual = model(ids).logits, emb.residual_u.detach().clone()
    model.resize_token_embeddings(100)
    torch.testing.assert_close(model(ids).logits, before[..., :100])
    with pytest.raises(IndexError):
        emb(torch.tensor([100]))
    emb.residual_u.requires_grad_(False)
    model.resize_token_embeddings(len(tokenizer))
    assert torch.equal(emb.residual_u[:100], residual[:100]) and not emb.residual_u.requires_grad
    assert torch.equal(emb.residual_u[100:], torch.zeros(158, 2))  # new ids begin without one
    torch.testing.assert_close(model(ids).logits[..., :100], before[..., :100])
    torch.testing.assert_close(
        emb(torch.tensor([257]))[0].detach(), by_definition(emb, b"the"), rtol=1e-4, atol=1e-5
    )


def test_padding_of_the_vocabulary():
    """Ids past the tokenizer's embed to zero until a token comes that fills them."""
    model, tokenizer = swapped(gpt2, True, "induced", vocab_size=264)
    emb = model.get_input_embeddings()
    assert model.resize_token_embeddings() is emb and emb.num_embeddings == 264
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert emb.num_embeddings == 320 and not emb(torch.tensor([258])).any()
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    assert emb.num_embeddings == 320
    torch.testing.assert_close(
        emb(torch.tensor([258]))[0].detach(), by_definition(emb, b"<new>"), rtol=1e-4, atol=1e-5
    )
    assert not emb(torch.tensor([259])).any()


def test_a_frozen_head_stays_frozen_and_a_cached_table_is_made_anew():
    model, tokenizer = swapped(gpt2, True, "untie", mode="cached")
    model.get_output_embeddings().requires_grad_(False)
    emb = model.get_input_embeddings()
    with torch.no_grad():
        emb(torch.tensor([0]))  # makes the table
        tokenizer.add_tokens(["<new>"])
        model.resize_token_embeddings(len(tokenizer))
        torch.testing.assert_close(emb(torch.tensor([258])), emb.table()[258:])
    assert not any(p.requires_grad for p in model.get_output_embeddings().parameters())


def test_copies_resize_themselves():
    model, _ = swapped(gpt2, True, "induced")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.resize_token_embeddings(100)
        assert copied.get_input_embeddings().num_embeddings == copied(IDS).logits.size(-1) == 100
    assert model.get_input_embeddings().num_embeddings == model(IDS).logits.size(-1) == 258


def test_resizing_refuses_to_guess(tmp_path):
    model, tokenizer = swapped(gpt2, True, "untie")
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"grows from 258 to 300 ids, .* give the tokenizer"):
        loaded.resize_token_embeddings(300)
    assert loaded.config.vocab_size == loaded.get_input_embeddings().num_embeddings == 258
    with pytest.raises(ValueError, match="256 tokens, the first of id 0, have other bytes in this tokenizer"):
        loaded.resize_token_embeddings(300, tokenizer=[bytes([i, i]) for i in range(256)])
    assert loaded.resize_token_embeddings(300, tokenizer=tokenizer).num_embeddings == 300


OWN_CODE = "raise SystemExit('the code was run')"


def test_code_in_a_folder_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks"))
    save_pretrained(swapped(gpt2, True, "untie")[0], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(OWN_CODE)
    with pytest.raises(ValueError, match="code of its own, which is never run"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("kronecker"),
        lambda c: c.update(kronecker=[1]),
        lambda c: c["kronecker"].pop("rank"),
        lambda c: c["kronecker"].update(pos_dim="8"),
        lambda c: c["kronecker"].update(pos_dim=4),
        lambda c: c["kronecker"].update(tokenizer="/etc/passwd"),
        lambda c: c["kronecker"].update(tie="knot"),
        lambda c: c.update(n_layer=3),
        lambda c: c.update(model_type="nothing"),
        lambda c: c.update(vocab_size=9),
    ],
)
def test_a_config_of_another_shape(change, tmp_path):
    save_pretrained(swapped(gpt2, True, "untie")[0], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is no folder that this module can load: [^\n]+$"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["kronecker.safetensors", "model.safetensors", "config.json"])
def test_a_damaged_file(name, tmp_path):
    save_pretrained(swapped(gpt2, True, "untie")[0], tmp_path)
    (tmp_path / name).write_bytes(b"[1, 2]")
    with pytest.raises(ValueError, match=r"is no folder that this module can load"):
        from_pretrained(tmp_path)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="say tie='untie'"):
        swap_input_embeddings(gpt2(tied=True), TOKENS, pos_dim=4)
    with pytest.raises(ValueError, match="tie must be"):
        swap_input_embeddings(gpt2(), TOKENS, pos_dim=4, tie="yes")
    with pytest.raises(ValueError, match="swap it first"):
        save_pretrained(gpt2(), tmp_path)
    model = gpt2()
    emb = swap_input_embeddings(model, TOKENS, pos_dim=4, tie="untie")
    with pytest.raises(ValueError, match="is a KroneckerEmbedding already"):
        swap_input_embeddings(model, TOKENS, pos_dim=4, tie="untie")
    for size in (0, -5):
        with pytest.raises(ValueError, match=f"a vocabulary of {size} ids is none"):
            model.resize_token_embeddings(size)
    assert model.get_input_embeddings() is emb and emb.num_embeddings == model(IDS).logits.size(-1)
    with pytest.raises(ValueError, match=r"holds no kronecker\.safetensors"):
        from_pretrained(tmp_path / "nothing")
