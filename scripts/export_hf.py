"""Write a trained run as a plain GPT-2 checkpoint of transformers, which needs nothing of this project.

    python scripts/export_hf.py out/demo/kronecker_s1337 exported/kronecker
    python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('exported/kronecker')"
    lm_eval --model hf --model_args pretrained=exported/kronecker --tasks lambada_openai

Whatever makes the input embeddings, they are computed once and stored as an ordinary wte.weight; a head tied to
anything but that very table is stored as its own, with its scalar multiplied in. The tokenizer goes beside it. With
transformers installed the exported folder is loaded back and its logits are compared with ours; they must agree
to 1e-4.
"""

import sys
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import torch
from safetensors.torch import save_file

from data.console import writing
from data.files import write_json, write_text
from engine.errors import RunError, sentences
from kronecker.tokens import byte_level_alphabet
from sample import load_run
from scripts.arguments import Parser

# transformers keeps these (in, out), as GPT-2's first code did
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
TOLERANCE = 1e-4


@torch.no_grad()
def gpt2_weights(model) -> tuple[dict[str, torch.Tensor], bool]:
    """(state_dict of GPT2LMHeadModel in float32 on the CPU, whether its head is tied) of a model on the CPU."""
    config, state = model.config, model.state_dict()
    table, embedded = model.embed(torch.arange(config.vocab_size)[None])
    weights = {"transformer.wte.weight": embedded[0]}
    for name, tensor in state.items():
        if name.startswith(("transformer.wpe.", "transformer.h.", "transformer.ln_f.")):
            weights[name] = tensor.t() if name.endswith(TRANSPOSED) else tensor
            if not config.bias and ".wpe." not in name:
                # transformers' GPT-2 has biases; zeros change nothing
                weights[name.removesuffix("weight") + "bias"] = torch.zeros(tensor.size(0))
    tied = model.lm_head is None and model.head_scale is None and config.wte_norm == "none"
    if model.lm_head is not None:
        weights["lm_head.weight"] = state["lm_head.weight"]
    elif not tied:
        weights["lm_head.weight"] = table * (1 if model.head_scale is None else model.head_scale)
    return {name: tensor.float().contiguous() for name, tensor in weights.items()}, tied


def gpt2_config(config, tied: bool, eot: int | None) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "tie_word_embeddings": tied,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "torch_dtype": "float32",
    }


def tokenizer_json(backend) -> str | None:
    """A tokenizer.json for a tokenizer's backend; None where the conversion would not be exact."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if hasattr(backend, "to_str"):
        return backend.to_str()
    if isinstance(backend, list):  # characters
        ids = {piece.decode(): i for i, piece in enumerate(backend)}
        made = Tokenizer(models.WordLevel(ids, unk_token=""))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
        return made.to_str()
    ranks, alphabet = backend._mergeable_ranks, byte_level_alphabet()
    spelled = {piece: "".join(alphabet[byte] for byte in piece) for piece in ranks}
    merges = []
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(piece) > 1:
            left, right = last_merge(piece, rank, ranks)
            merges.append((spelled[left], spelled[right]))
    made = Tokenizer(models.BPE({spelled[piece]: rank for piece, rank in ranks.items()}, merges))
    split = pre_tokenizers.Split(Regex(backend._pat_str), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(sorted(backend._special_tokens, key=backend._special_tokens.get))
    exact = all(made.token_to_id(text) == i for text, i in backend._special_tokens.items())
    for text in ("Hello, world! It's 2026.\n\n  def f(x):\n\treturn x  ", "naïve café 你好 🙂 नमस्ते  \n"):
        exact = exact and made.encode(text).ids == backend.encode_ordinary(text)
    return made.to_str() if exact else None


def last_merge(piece: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that BPE joins last to make `piece`: merge by rank, using only ranks below its own."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
        at = min(range(len(pair_ranks)), key=pair_ranks.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


@torch.no_grad()
def compare_logits(model, folder: Path) -> str:
    """What to say of the folder's logits in transformers beside ours, over prefixes of random windows.

    RunError where they differ; NaN differs from everything.
    """
    try:
        if sys.flags.optimize > 1:
            raise ImportError("transformers does not load under python -OO")
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        return f"logits not compared ({error})"
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    length = min(model.config.block_size, 64)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    ends = sorted({1, 2, length // 2, length} & set(range(1, length + 1)))
    ours = torch.stack([model(ids[:, :end])[0][:, -1] for end in ends], dim=1)
    difference = float((ours.float() - theirs(ids).logits[:, [end - 1 for end in ends]]).abs().max())
    if not difference <= TOLERANCE:
        differ = f"by {difference:.1e}, over {TOLERANCE:.0e}"
        raise RunError(f"the exported logits differ from the run's {differ}")
    return f"logits equal to {difference:.1e}"


def export(run_dir, out_dir, which: str = "latest") -> str:
    """Export a run's folder; returns a sentence on what was written. Raises RunError, leaving nothing behind."""
    out_dir = Path(out_dir).expanduser().resolve()
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise RunError(f"{out_dir} already holds something: choose another folder or remove it")
    model, tokenizer = load_run(run_dir, "cpu", which)
    weights, tied = gpt2_weights(model)
    config = gpt2_config(model.config, tied, tokenizer.eot)
    n_parameters = sum(t.numel() for t in weights.values())
    said = [f"{n_parameters:,} parameters, {'tied' if tied else 'own'} head"]
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{out_dir.name}.", dir=out_dir.parent) as unfinished:
        folder = Path(unfinished) / "whole"
        folder.mkdir()
        with writing(folder / "model.safetensors"):
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", config)
        special = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        write_json(folder / "generation_config.json", special)
        if description := tokenizer_json(tokenizer.backend):
            end = None if tokenizer.eot is None else tokenizer.decode([tokenizer.eot])
            kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size}
            about = kind | {"clean_up_tokenization_spaces": False, "eos_token": end, "bos_token": end}
            write_text(folder / "tokenizer.json", description)
            write_json(folder / "tokenizer_config.json", about)
        else:
            said.append(f"without its tokenizer ({tokenizer.name} has no exact tokenizer.json)")
        said.append(compare_logits(model, folder))
        if out_dir.exists():
            out_dir.rmdir()
        folder.rename(out_dir)
    return f"wrote {out_dir}: " + ", ".join(said)


def main(argv=None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--which", default="latest", help="checkpoint: latest, best, or a step's number")
    args = parser.parse_args(argv)
    with sentences():
        print(export(args.run, args.out, args.which))


if __name__ == "__main__":
    main()
