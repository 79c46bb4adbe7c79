"""Write a trained run as a plain GPT-2 checkpoint of transformers, which needs nothing of this project.

    python -m scripts.export_hf out/demo/kronecker_s1337 exported/kronecker
    python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('exported/kronecker')"

The Kronecker table is computed once and stored as an ordinary wte.weight with an untied head; a head tied to it is
stored with its scalar multiplied in. With transformers installed the exported folder is loaded back and its logits
are compared with ours; they must agree to 1e-4.
"""

import argparse
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.errors import RunError
from kronecker.tokens import byte_level_alphabet, token_id_to_bytes
from sample import load_run

# transformers keeps these (in, out), as GPT-2's first code did
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
TOLERANCE = 1e-4


@torch.no_grad()
def gpt2_weights(model) -> tuple[dict[str, torch.Tensor], bool]:
    """(state_dict of GPT2LMHeadModel in float32, whether its head is tied)."""
    config, state = model.config, {k: v.detach().float().cpu() for k, v in model.state_dict().items()}
    table = model.transformer.wte.table() if config.wte == "kronecker" else model.transformer.wte.weight
    table = table.detach().float().cpu().contiguous()
    weights = {"transformer.wte.weight": table}
    for name, tensor in state.items():
        if name.startswith(("transformer.wpe.", "transformer.h.", "transformer.ln_f.")):
            weights[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
    if not config.bias:  # transformers' GPT-2 has biases everywhere; zeros change nothing
        for name in [n for n in weights if n.endswith(".weight") and ".wte." not in n and ".wpe." not in n]:
            width = weights[name].size(-1)
            weights[name.removesuffix("weight") + "bias"] = torch.zeros(width)
    if config.tie_weights and config.wte == "stock":
        return weights, True
    if config.tie_weights:
        weights["lm_head.weight"] = table * float(model.head_scale)
    else:
        weights["lm_head.weight"] = state["lm_head.weight"]
    return {name: tensor.contiguous() for name, tensor in weights.items()}, False


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
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "tie_word_embeddings": tied,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "torch_dtype": "float32",
    }


def tokenizer_json(backend) -> str | None:
    """A tokenizer.json for transformers; None for characters, or where the conversion would not be exact."""
    if hasattr(backend, "to_str"):
        return backend.to_str()
    if not hasattr(backend, "decode_single_token_bytes"):
        return None
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    ranks, alphabet = backend._mergeable_ranks, byte_level_alphabet()
    spelled = {piece: "".join(alphabet[byte] for byte in piece) for piece in ranks}
    merges = []
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(piece) > 1:
            left, right = last_merge(piece, rank, ranks)
            merges.append((spelled[left], spelled[right]))
    made = Tokenizer(models.BPE({spelled[piece]: rank for piece, rank in ranks.items()}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(backend._pat_str), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
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
def largest_difference(model, folder: Path) -> float:
    """Of the logits, ours against transformers' from the folder, over prefixes of random windows."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    length = min(model.config.block_size, 64)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    worst = 0.0
    for end in {1, 2, length // 2, length}:
        ours, _ = model(ids[:, :end])
        worst = max(worst, float((ours[:, -1].float() - expected[:, end - 1]).abs().max()))
    return worst


def export(run_dir, out_dir, which: str = "latest") -> str:
    """Export a run's folder; returns a sentence on what was written. Raises RunError, leaving nothing behind."""
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise RunError(f"{out_dir} already holds something: choose another folder or remove it")
    model, tokenizer, _ = load_run(run_dir, "cpu", which)
    unfinished = out_dir.with_name(out_dir.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        weights, tied = gpt2_weights(model)
        config = gpt2_config(model.config, tied, tokenizer.eot)
        save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
        write_json(unfinished / "config.json", config)
        write_json(
            unfinished / "generation_config.json", {k: config[k] for k in ("bos_token_id", "eos_token_id")}
        )
        said = [
            f"{sum(t.numel() for t in weights.values()):,} parameters",
            "tied head" if tied else "own head",
        ]
        description = tokenizer_json(tokenizer.backend)
        if description is None:
            said.append(f"without its tokenizer ({tokenizer.name} has no exact tokenizer.json)")
        else:
            (unfinished / "tokenizer.json").write_text(description, encoding="utf-8")
            end = (
                None
                if tokenizer.eot is None
                else token_id_to_bytes(tokenizer.backend, tokenizer.eot).decode()
            )
            write_json(
                unfinished / "tokenizer_config.json",
                {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end},
            )
        try:
            difference = largest_difference(model, unfinished)
        except ImportError:
            said.append("logits not compared (transformers is not installed)")
        else:
            if not difference <= TOLERANCE:
                raise RunError(
                    f"the exported logits differ from the run's by {difference:.1e}, over {TOLERANCE:.0e}"
                )
            said.append(f"logits equal to {difference:.1e}")
        if out_dir.exists():
            out_dir.rmdir()
        unfinished.rename(out_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return f"wrote {out_dir}: " + ", ".join(said)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.export_hf", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--which", default="latest", help="checkpoint: latest, best, or a step's number")
    args = parser.parse_args(argv)
    try:
        print(export(args.run, args.out, args.which))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
