"""Against the reference package from PyPI: same names, same numbers, checkpoints both ways."""

import inspect

import pytest
import torch

import kronecker

reference = pytest.importorskip("kronecker_embeddings")


@pytest.fixture(scope="module")
def gpt2_fast(shared_dir):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / "gpt2-hf")


def pair(**kwargs):
    tokens = [b"", b"a", b"the", " été".encode(), b"\xff\x00", b"0123456789abcdef", b"<|endoftext|>"]
    buffer, lengths = kronecker.build_byte_buffer(tokens, 16)
    args = {"pos_dim": 16, "byte_buffer": buffer, "length_buffer": lengths, **kwargs}
    torch.manual_seed(0)
    ours = kronecker.KroneckerEmbedding(len(tokens), 24, **args)
    theirs = reference.KroneckerEmbedding(len(tokens), 24, **args)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_every_public_name_with_the_same_leading_arguments():
    for name in reference.__all__:
        if name == "__version__":
            continue
        ours = list(inspect.signature(getattr(kronecker, name)).parameters)
        theirs = list(inspect.signature(getattr(reference, name)).parameters)
        assert ours[: len(theirs)] == theirs, name


@pytest.mark.parametrize("z_normalize", [True, False])
@pytest.mark.parametrize("length_normalize", [True, False])
def test_codec(length_normalize, z_normalize):
    ours, _ = pair()
    args = (ours._byte_buffer, ours._length_buffer, 256, 16, length_normalize, z_normalize)
    torch.testing.assert_close(
        kronecker.kronecker_codec(*args), reference.kronecker_codec(*args), rtol=1e-5, atol=1e-5
    )
    assert kronecker.codec_output_dim(7, 3) == reference.codec_output_dim(7, 3) == 21
    for raw in (b"", b"word", b"much longer than the eight kept"):
        torch.testing.assert_close(
            kronecker.encode_single(raw, pos_dim=8), reference.encode_single(raw, pos_dim=8)
        )


@pytest.mark.parametrize("mode", ["dynamic", "cached"])
@pytest.mark.parametrize("z_normalize", [True, False])
@pytest.mark.parametrize("length_normalize", [True, False])
def test_forward_and_gradient(mode, length_normalize, z_normalize):
    ours, theirs = pair(mode=mode, length_normalize=length_normalize, z_normalize=z_normalize)
    ids = torch.tensor([[0, 1, 2, 2], [3, 4, 5, 6]])
    a, b = ours(ids), theirs(ids)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    g = torch.randn_like(a)
    a.backward(g)
    b.backward(g)
    torch.testing.assert_close(
        ours.projection.weight.grad, theirs.projection.weight.grad, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("projection_init", ["normal", "xavier"])
@pytest.mark.parametrize("row_major", [True, False])
def test_same_seed_same_initial_weight(projection_init, row_major):
    buffers = dict(
        zip(("byte_buffer", "length_buffer"), kronecker.build_byte_buffer([b"a", b"b"], 4), strict=True)
    )
    args = {"pos_dim": 4, "projection_init": projection_init, **buffers}
    torch.manual_seed(5)
    theirs = reference.KroneckerEmbedding(2, 8, **args)
    torch.manual_seed(5)
    ours = kronecker.KroneckerEmbedding(2, 8, row_major=row_major, **args)
    assert torch.equal(ours.projection.weight, theirs.projection.weight)


def test_checkpoints_load_both_ways():
    ours, theirs = pair()
    with torch.no_grad():
        theirs.projection.weight.add_(0.1)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(torch.arange(7)), theirs(torch.arange(7)), rtol=1e-4, atol=1e-4)


def test_byte_override():
    ours, theirs = pair()
    ids = torch.tensor([[1, 2, 3]])
    overrides = {0: b"zyzzyva", 2: b""}
    torch.testing.assert_close(
        ours.forward_with_byte_override(ids, overrides),
        theirs.forward_with_byte_override(ids, overrides),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("pos_dim", [16, 32])
def test_decode_extraction_on_all_of_gpt2(gpt2_fast, gpt2_encoding, pos_dim):
    bytes_ref, lengths_ref = reference.build_byte_buffer(gpt2_fast, pos_dim)
    for tokenizer in (gpt2_fast, gpt2_fast.backend_tokenizer, gpt2_encoding):
        bytes_VxP, lengths_V = kronecker.build_byte_buffer(tokenizer, pos_dim, "decode")
        assert torch.equal(bytes_VxP, bytes_ref) and torch.equal(lengths_V, lengths_ref)
    ours = kronecker.coverage_stats(lengths_ref, pos_dim)
    assert ours == reference.coverage_stats(lengths_ref, pos_dim)


@pytest.mark.parametrize("limit", range(9))
def test_utf8_safe_truncate(limit):
    for raw in ("aé日🙂b".encode(), b"\xff\xfe\xfd\xfc\xfb\xfa", b"plain"):
        assert kronecker.utf8_safe_truncate(raw, limit) == reference.utf8_safe_truncate(raw, limit)
