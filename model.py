"""GPT-2 in one file, with the input embedding as a switch.

`wte` is 'stock' (a learned table), 'kronecker' (a fixed byte codec and one learned projection, arXiv 2605.29459), or a
control of the codec's size ('lowrank', 'hash'); the head is tied to it or has its own weights. Parameters bear nanoGPT's
names, and each is drawn from a generator seeded by (seed, its own name): the body of every arm is the same bit for bit.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from engine.generation import Linear, linear, padded, pick
from engine.loss import cross_entropy, liger_loss, matmul_dtype
from kronecker import KroneckerEmbedding, controls

# RMS of an embedding's output at the start: a learned table's in GPT-2, and the projection's in the paper.
USUAL_RMS = {"stock": 0.02, "lowrank": 0.02, "hash": 0.02, "kronecker": 1.0}
# The trainable matrix whose norms are logged.
WTE_MATRIX = {"stock": "weight", "lowrank": "u", "hash": "rows", "kronecker": "projection.weight"}


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64: faster matmuls
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    gelu: str = "none"  # 'tanh' is the approximation that OpenAI's own weights were trained with
    wte: str = "stock"
    tie_weights: bool = True
    pos_dim: int = 16
    char_dim: int = 256
    wte_init_rms: float = 0.0  # 0: the usual one, USUAL_RMS
    wte_norm: str = "none"
    wte_permute_seed: int = 0
    wte_ngrams: int = 0
    wte_rank: int = 0
    length_normalize: bool = True
    z_normalize: bool = True
    loss: str = "auto"  # how head and cross-entropy are computed; the value is the same up to rounding

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "pos_dim", "char_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: change one")
        for name in ("wte_permute_seed", "wte_ngrams", "wte_rank"):
            if self.wte != "kronecker" and getattr(self, name):
                raise ValueError(f"{name} means nothing with wte={self.wte!r}: it belongs to wte='kronecker'")
        usual = USUAL_RMS[self.wte]
        self.wte_init_rms = self.wte_init_rms or usual
        if self.wte == "kronecker" and self.wte_init_rms != usual and not self.z_normalize:
            raise ValueError("wte_init_rms means nothing with z_normalize=False: codes have no RMS of 1")


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, past: Tensor | None = None, pos: int = 0, mask=None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if past is not None:  # (2, B, n_head, block_size, head_size), filled up to `pos`
            past[0, :, :, pos : pos + T], past[1, :, :, pos : pos + T] = k, v
            k, v = past[0, :, :, : pos + T], past[1, :, :, : pos + T]
        # after the prompt one token comes at a time and may look at all that is there
        dropout = self.dropout if self.training else 0.0
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout, self.gelu = nn.Dropout(config.dropout), config.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, past: Tensor | None = None, pos: int = 0, mask=None) -> Tensor:
        x = x + self.attn(self.ln_1(x), past, pos, mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. `byte_buffers` = (uint8 (V', pos_dim), int16 (V',)) as kronecker.build_byte_buffer makes them."""

    def __init__(self, config: GPTConfig, byte_buffers=None, seed: int = 1337):
        super().__init__()
        self.config = config
        wte = input_embedding(config, byte_buffers)
        transformer = {
            "wte": wte,
            "wpe": undrawn_table(config.block_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
        }
        self.transformer = nn.ModuleDict(transformer)
        # A tied head has no weights of its own, and so no second name in a checkpoint.
        self.lm_head = None if config.tie_weights else Linear(config.n_embd, config.vocab_size, bias=False)
        # A tied head multiplies by a table of RMS 0.02, as GPT-2's does: where the table starts at another, a learned
        # scalar makes up for it. (Without it the first loss of kronecker_tied would be about 94 instead of ln V.)
        scaled_tie = config.tie_weights and config.wte_init_rms != 0.02
        self.head_scale = nn.Parameter(torch.tensor(0.02 / config.wte_init_rms)) if scaled_tie else None
        self.liger = liger_loss() if config.loss == "liger" else None
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's initialisation, every tensor from its own generator, on the CPU whatever the device."""
        if self.transformer.wpe.weight.is_meta:
            return
        for name, p in self.named_parameters():
            if name.startswith("transformer.wte.") and self.config.wte != "stock":
                continue  # draws its own, below
            elif name == "transformer.wte.weight":
                std = self.config.wte_init_rms
            elif name.endswith("c_proj.weight"):  # as many residual branches add up as there are c_proj
                std = 0.02 / math.sqrt(2 * self.config.n_layer)
            elif p.dim() == 2:
                std = 0.02
            elif name.endswith(".bias"):
                std = 0.0
            else:
                continue  # LayerNorms start as ones, as they were made
            p.copy_(torch.empty(p.shape).normal_(0, std, generator=generator(seed, name)))
        if self.config.wte != "stock":
            self.transformer.wte.reset_parameters(lambda name: generator(seed, f"transformer.wte.{name}"))

    def forward(
        self, idx, targets=None, reduction="mean", byte_overrides=None, past=None, pos: int = 0, padding=None
    ):
        """(logits, loss) for int64 idx (B, T), each a tensor or None.

        With targets (B, T): logits is None, and loss the mean in nats, or (B, T) with reduction='none'.
        Without: logits (B, 1, V) of the last position only. `byte_overrides` {(row, position): bytes}
        embeds those positions from the given bytes (kronecker only). `past` is make_cache()'s tensor,
        already filled up to `pos`. `padding` int64 (B,): the first so many positions of a row (those in `past`
        counted too) are filling, which no other position sees; the row's text starts after them, at position 0.
        """
        x, weight = self.hidden(idx, byte_overrides, past, pos, padding)
        if targets is None:
            return linear(x[:, -1:], weight), None
        if self.liger is not None and reduction == "mean" and torch.is_grad_enabled():
            dtype = matmul_dtype(x)
            return None, self.liger(weight.to(dtype), x.flatten(0, 1).to(dtype), targets.flatten())
        loss = cross_entropy(x.flatten(0, 1), weight, targets.flatten(), reduction, self.config.loss)
        return None, loss if reduction == "mean" else loss.view(targets.shape)

    def hidden(
        self, idx: Tensor, byte_overrides=None, past=None, pos: int = 0, padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(what the head multiplies (B, T, n_embd), the head's weight (V, n_embd)); arguments as forward's."""
        T = idx.size(1)
        if pos + T > self.config.block_size:
            raise ValueError(f"{pos + T} tokens do not fit into block_size {self.config.block_size}")
        table, x = self.embed(idx, byte_overrides)
        places, mask = (slice(pos, pos + T), None) if padding is None else padded(padding, pos, pos + T)
        x = self.transformer.drop(x + self.transformer.wpe.weight[places])
        for i, block in enumerate(self.transformer.h):
            x = block(x, None if past is None else past[i], pos, mask)
        x = self.transformer.ln_f(x)
        if self.head_scale is not None:
            x = x * self.head_scale
        return x, table if self.lm_head is None else self.lm_head.weight

    def embed(self, idx: Tensor, byte_overrides=None) -> tuple[Tensor | None, Tensor]:
        """(table (V, n_embd) if the tied head needs it, embeddings (B, T, n_embd))."""
        wte, table = self.transformer.wte, None
        if byte_overrides and self.config.wte != "kronecker":
            raise ValueError(f"wte={self.config.wte!r} has no slot made from bytes; use a kronecker arm")
        if self.lm_head is None:
            table = self.wte_table()  # once for the lookup and the head alike
        if byte_overrides:
            x = wte.forward_with_byte_override(idx, byte_overrides)
        else:
            x = wte(idx) if table is None else F.embedding(idx, table)
        if self.config.wte_norm == "rms":
            x = F.rms_norm(x, (self.config.n_embd,), eps=1e-6)
        return table, x

    def plan_ahead(self, idx: Tensor) -> None:
        """Prepare the embedding of a batch before its step, in a thread that waits anyway; changes no number."""
        if self.config.wte == "kronecker" and self.lm_head is not None:  # a tied head takes the whole table
            self.transformer.wte.plan_ahead(idx)

    def make_cache(self, batch: int, length: int) -> Tensor:
        """Empty keys and values: (n_layer, 2, batch, n_head, length, head_size)."""
        c = self.config
        shape = (c.n_layer, 2, batch, c.n_head, length, c.n_embd // c.n_head)
        return self.transformer.wpe.weight.new_zeros(shape)

    @torch.no_grad()
    def generate(
        self,
        idx,
        max_new_tokens,
        temperature=1.0,
        top_k=0,
        top_p=None,
        generator=None,
        byte_overrides=None,
        padding: Tensor | None = None,
    ):
        """Yield max_new_tokens tensors (B, 1) that continue idx (B, T); temperature 0 takes the likeliest token.

        Rows of different lengths are filled up at the left, `padding` (B,) saying by how much (see forward).
        Keys and values are cached until the context is full; after that the whole window is computed for each token.
        """
        block_size, overrides = self.config.block_size, dict(byte_overrides or {})
        length = min(block_size, idx.size(1) + max_new_tokens)
        past, done = self.make_cache(len(idx), length) if idx.size(1) <= block_size else None, 0
        for _ in range(max_new_tokens):
            start = max(0, idx.size(1) - block_size)
            if start:
                window = {(row, p - start): b for (row, p), b in overrides.items() if p >= start}
                left = None if padding is None else (padding - start).clamp(min=0)
                logits, _ = self(idx[:, start:], byte_overrides=window, padding=left)
            else:
                slots = None if done else overrides
                logits, _ = self(idx[:, done:], byte_overrides=slots, past=past, pos=done, padding=padding)
                done = idx.size(1)
            token = pick(logits[:, -1].float(), temperature, top_k, top_p, generator)
            idx = torch.cat((idx, token), dim=1)
            yield token

    def body_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Everything but the input embedding and the head: what is equal in all arms."""
        outside = ("transformer.wte.", "lm_head.", "head_scale")
        return [(n, p) for n, p in self.named_parameters() if not n.startswith(outside)]

    def body_sha256(self) -> str:
        digest = hashlib.sha256()
        for name, p in sorted(self.body_parameters()):
            digest.update(f"{name}{tuple(p.shape)}".encode())
            digest.update(p.detach().cpu().contiguous().numpy())
        return digest.hexdigest()

    def count_parameters(self) -> dict[str, int]:
        """Trainable numbers by part; `stock_table` is what the learned table would have."""
        total = sum(p.numel() for p in self.parameters())
        wte = sum(p.numel() for p in self.transformer.wte.parameters())
        body = sum(p.numel() for _, p in self.body_parameters())
        table = self.config.vocab_size * self.config.n_embd
        return {"input": wte, "body": body, "head": total - wte - body, "total": total, "stock_table": table}

    def wte_table(self) -> Tensor:
        """Embedding of every token, (V, n_embd)."""
        wte = self.transformer.wte
        return wte.weight if self.config.wte == "stock" else wte.table()

    @torch.no_grad()
    def wte_norms(self) -> dict[str, float]:
        """wte/rms: RMS of the embedding's output over the vocabulary. wte/weight_norm: mean Euclidean norm of
        the rows of its trainable matrix (paper: the projection's stays near 1.0, a learned table's drifts)."""
        weight = self.transformer.wte.get_parameter(WTE_MATRIX[self.config.wte])
        rms = self.wte_table().float().square().mean().sqrt()
        return {"wte/rms": rms.item(), "wte/weight_norm": weight.float().norm(dim=1).mean().item()}


def input_embedding(config: GPTConfig, byte_buffers: tuple[Tensor, Tensor] | None) -> nn.Module:
    """The module ids (...) -> (..., n_embd) that config.wte names; the controls get the codec's number of parameters."""
    if config.wte == "stock":
        return undrawn_table(config.vocab_size, config.n_embd)
    V, d, rms = config.vocab_size, config.n_embd, config.wte_init_rms
    budget = d * config.char_dim * config.pos_dim
    if config.wte == "lowrank":
        return controls.LowRankEmbedding(V, d, controls.lowrank_rank(V, d, budget), init_rms=rms)
    if config.wte == "hash":
        return controls.HashEmbedding(V, d, controls.hash_buckets(V, d, budget), init_rms=rms)
    if byte_buffers is None:
        raise ValueError("wte='kronecker' needs the bytes of the tokens: pass byte_buffers")
    if config.wte_permute_seed:
        byte_buffers = controls.permute_bytes(*byte_buffers, config.wte_permute_seed)
    return KroneckerEmbedding(
        V,
        d,
        byte_buffer=byte_buffers[0],
        length_buffer=byte_buffers[1],
        mode="cached",  # generation and evaluation look up in a table; training never keeps one
        char_dim=config.char_dim,
        pos_dim=config.pos_dim,
        length_normalize=config.length_normalize,
        z_normalize=config.z_normalize,
        init_rms=rms,
        ngrams=config.wte_ngrams,
        rank=config.wte_rank,
    )


def undrawn_table(rows: int, width: int) -> nn.Embedding:
    """nn.Embedding without numbers of its own: init_weights draws them (and on the meta device, where parameters
    are only counted, drawing would load torch's compiler, which takes longer than torch itself)."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for every (seed, name)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
