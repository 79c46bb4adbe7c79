"""Inside transformers models: tied and untied heads, round trips, refusal to guess."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from kronecker import KroneckerEmbedding  # noqa: E402
from kronecker.hf import InducedHead, from_pretrained, save_pretrained, swap_input_embeddings  # noqa: E402

TOKENS = [bytes([65 + i % 26]) * (i % 5 + 1) for i in range(30)]
IDS = torch.tensor([[1, 5, 9, 29], [0, 2, 4, 8]])


def gpt2(tied=True):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=12, n_layer=2, n_head=2, tie_word_embeddings=tied
    )
    return transformers.GPT2LMHeadModel(config).eval()


def llama(tied=True):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
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


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="say tie='untie'"):
        swap_input_embeddings(gpt2(tied=True), TOKENS, pos_dim=4)
    with pytest.raises(ValueError, match="tie must be"):
        swap_input_embeddings(gpt2(), TOKENS, pos_dim=4, tie="yes")
    with pytest.raises(ValueError, match="swap it first"):
        save_pretrained(gpt2(), tmp_path)
    with pytest.raises(ValueError, match=r"holds no kronecker\.safetensors"):
        from_pretrained(tmp_path / "nothing")
