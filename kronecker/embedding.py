"""KroneckerEmbedding: the nn.Embedding that holds no table.

ids -> bytes of each token -> fixed Kronecker codec, never made dense (bag.py) -> one learned projection (d_model, D).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set

import torch
import torch.nn as nn
from torch import Tensor

from kronecker.additions import EMPTY, ngram_buckets
from kronecker.bag import embed, plan_ahead
from kronecker.codec import bag_coefficients, check_buffers, codec_output_dim
from kronecker.tokens import build_byte_buffer, utf8_safe_truncate

GeneratorFor = Callable[[str], torch.Generator]  # a parameter's name -> what it is drawn from


class KroneckerEmbedding(nn.Module):
    """Drop-in replacement for nn.Embedding: ids (...) -> embeddings (..., d_model). Paper: section 3.

    vocab_size: number of ids; ids past the tokenizer's own have no bytes and embed to zero.
    tokenizer: whatever build_byte_buffer takes; or give what it makes, byte_buffer (V, pos_dim) and length_buffer (V,).
    mode: "dynamic" computes embeddings from the weight at each call; "cached" keeps the (vocab_size, d_model)
        table while the module is in eval() mode and gradients are off, and so costs what nn.Embedding costs there. It is
        made anew when a parameter changes, or is replaced, where torch can see it. What goes around torch's count of
        changes (weight.data.mul_(), numpy) needs an eval() afterwards.
    projection_init: "normal" (std init_rms/sqrt(D), the paper's at init_rms 1) or "xavier" (times init_rms).
    length_normalize, z_normalize: the codec's two normalisations (both on in the paper).
    byte_extraction: "bytes" for the tokens' true bytes, "decode" for what the reference package extracts.
    row_major: lay projection.weight out as usual, as FSDP2's fully_shard and whatever flattens parameters demand
        (torch.optim.LBFGS, parameters_to_vector), instead of transposed, which spares a transposed copy of the weight
        and of its gradient at each step.

    Additions that the paper does not have, off by default (ngrams and rank add nothing at the start):
    init_rms: RMS of the embeddings of z-normalised codes at the start: it scales the initial projection alone.
    ngrams: number of buckets of a bag of hashed byte 2- and 3-grams, ngram.weight (ngrams, d_model), summed and
        divided by the square root of their count.
    rank: of a residual of each token's own, residual_u[id] @ residual_v, (vocab_size, rank) and (rank, d_model).

    state_dict() is exactly {"projection.weight": (d_model, D)}, row-major, and the additions' parameters. The bytes
    follow the module's device as plain attributes, so neither half() nor a meta-device start can spoil them.
    Raises ValueError for arguments that do not fit together, TypeError for a tokenizer of an unknown kind.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        tokenizer=None,
        char_dim: int = 256,
        pos_dim: int = 32,
        mode: str = "dynamic",
        byte_buffer: Tensor | None = None,
        length_buffer: Tensor | None = None,
        projection_init: str = "normal",
        length_normalize: bool = True,
        z_normalize: bool = True,
        *,
        byte_extraction: str = "bytes",
        row_major: bool = False,
        init_rms: float = 1.0,
        ngrams: int = 0,
        rank: int = 0,
    ):
        super().__init__()
        if mode not in ("dynamic", "cached"):
            raise ValueError(f"mode must be 'dynamic' or 'cached', but it is {mode!r}")
        if projection_init not in ("normal", "xavier"):
            raise ValueError(f"projection_init must be 'normal' or 'xavier', but it is {projection_init!r}")
        if ngrams < 0 or ngrams == 1 or (ngrams and pos_dim < 3):
            raise ValueError(f"ngrams is {ngrams} at pos_dim {pos_dim}: it needs 2 buckets and 3 bytes, or 0")
        if rank < 0:
            raise ValueError(f"rank is {rank}, but it must be at least 0")
        for name, size in {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "pos_dim": pos_dim,
            "char_dim": char_dim,
        }.items():
            if size < 1:
                raise ValueError(f"{name} is {size}, but it must be at least 1")
        if not 0 < init_rms < math.inf:
            raise ValueError(f"init_rms is {init_rms}, but it must be a positive number")
        self.vocab_size, self.d_model = vocab_size, d_model
        self.char_dim, self.pos_dim, self.D = char_dim, pos_dim, codec_output_dim(char_dim, pos_dim)
        self.mode, self.projection_init, self.byte_extraction = mode, projection_init, byte_extraction
        self.length_normalize, self.z_normalize = length_normalize, z_normalize
        self.init_rms, self.ngrams, self.rank = init_rms, ngrams, rank

        if byte_buffer is None or length_buffer is None:
            if tokenizer is None:
                raise ValueError("give either a tokenizer or both byte_buffer and length_buffer")
            byte_buffer, length_buffer = build_byte_buffer(tokenizer, pos_dim, byte_extraction)
        check_buffers(byte_buffer, length_buffer, char_dim, pos_dim)
        missing = vocab_size - len(length_buffer)
        if missing < 0:
            raise ValueError(f"vocab_size is {vocab_size}, but there are {len(length_buffer)} tokens")
        byte_buffer = nn.functional.pad(byte_buffer, (0, 0, 0, missing))
        length_buffer = nn.functional.pad(length_buffer, (0, missing))

        self.projection = nn.Linear(self.D, d_model, bias=False)
        if not row_major:
            self.projection.weight = nn.Parameter(torch.empty(self.D, d_model).t())
        if ngrams:
            zeros = torch.zeros(ngrams, d_model)  # given, so that no random number is drawn for it
            self.ngram = nn.EmbeddingBag(ngrams, d_model, mode="sum", padding_idx=EMPTY, _weight=zeros)
        if rank:
            self.residual_u = nn.Parameter(torch.empty(vocab_size, rank))
            self.residual_v = nn.Parameter(torch.empty(rank, d_model))
        self.reset_parameters()

        self._byte_buffer = byte_buffer.to(torch.uint8).contiguous()
        self._length_buffer = length_buffer.to(torch.int16).contiguous()
        self._coef = torch.empty(0)  # set by _place_constants
        self._table: Tensor | None = None  # mode="cached" only
        # of which parameters, where each lay and how often it had changed (not by id: that may become another's)
        self._table_of: list[tuple[nn.Parameter, int, int]] = []
        self._place_constants()
        self.register_state_dict_post_hook(_row_major_state)
        self.register_load_state_dict_pre_hook(_check_loaded_shape)

    def init_std(self) -> dict[str, float]:
        """Standard deviation that each parameter is drawn with, by name; the others start at zero."""
        fan = self.D if self.projection_init == "normal" else (self.D + self.d_model) / 2
        std = {"projection.weight": self.init_rms * fan**-0.5}
        if self.rank:  # u tells tokens apart from the first step, v = 0 starts at the paper's embedding
            std["residual_u"] = self.rank**-0.5
        return std

    def reset_parameters(self, generator_for: GeneratorFor | None = None) -> None:
        """Draw the parameters anew (init_std), equally in either layout of the projection.

        generator_for: gives each parameter's generator by the parameter's name; torch's own when None.
        """
        uniform = {"projection.weight"} if self.projection_init == "xavier" else set()
        draw(self, self.init_std(), generator_for, uniform)
        if self.ngrams:
            nn.init.zeros_(self.ngram.weight)
        if self.rank:
            nn.init.zeros_(self.residual_v)

    @torch.no_grad()
    def set_tokens(self, byte_buffer: Tensor, length_buffer: Tensor) -> None:
        """Embed another vocabulary, in place: bytes (vocab_size, pos_dim) and lengths (vocab_size,) of its tokens.

        The projection serves any vocabulary as it is. A residual of a token's own (rank) stays with its id, and is
        zero, to be learned, for an id that is new. Raises ValueError for buffers of another shape.
        """
        check_buffers(byte_buffer, length_buffer, self.char_dim, self.pos_dim)
        if self.rank:
            old, kept = self.residual_u, min(self.vocab_size, len(length_buffer))
            fresh = old.new_zeros(len(length_buffer), self.rank)
            fresh[:kept] = old[:kept]
            self.residual_u = nn.Parameter(fresh, requires_grad=old.requires_grad)
        self.vocab_size, self._table = len(length_buffer), None
        self._byte_buffer = byte_buffer.to(torch.uint8).contiguous()
        self._length_buffer = length_buffer.to(torch.int16).contiguous()
        self._place_constants()

    # nn.Embedding's names
    @property
    def num_embeddings(self) -> int:
        return self.vocab_size

    @property
    def embedding_dim(self) -> int:
        return self.d_model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings (*input_ids.shape, d_model) in the weight's dtype, for integer ids of any shape.

        Raises TypeError for ids that are not integers, IndexError (on CPU) for an id outside the vocabulary.
        """
        if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
            raise TypeError(f"token ids must be integers, but they are {input_ids.dtype}")
        ids = input_ids.long()
        return nn.functional.embedding(ids, self.table()) if self._caches() else self._embeddings(ids)

    def plan_ahead(self, input_ids: Tensor) -> None:
        """Do the part of forward() that needs no weights now, for this very tensor: for the thread of a loader.

        On the CPU only. Ids that are changed afterwards lose it.
        """
        if self.projection.weight.device.type == "cpu":
            plan_ahead(input_ids, (self._byte_buffer, self._length_buffer, self._coef), self.D)

    def table(self) -> Tensor:
        """The whole table codec(all tokens) W^T (vocab_size, d_model), differentiable; mode="cached" may keep it."""
        if self._caches():
            weights = [self.projection.weight]  # parameters() would take longer than a look-up of 1,024 ids
            weights += [self.ngram.weight] if self.ngrams else []
            weights += [self.residual_u, self.residual_v] if self.rank else []
            if self._table is None or any(
                p is not q or p.data_ptr() != at or p._version != n
                for p, (q, at, n) in zip(weights, self._table_of, strict=True)
            ):
                self._table = self._make_table()
                self._table_of = [(p, p.data_ptr(), p._version) for p in weights]
            return self._table
        return self._make_table()

    def _caches(self) -> bool:
        kept = self.mode == "cached" and not self.training and not torch.is_grad_enabled()
        return kept and not self.projection.weight.is_inference()  # whose changes torch does not count

    def _make_table(self) -> Tensor:
        return self._embeddings(torch.arange(self.vocab_size, device=self.projection.weight.device))

    def forward_with_byte_override(
        self,
        input_ids: Tensor,
        position_byte_overrides: Mapping[int | tuple[int, int], bytes] | None = None,
    ) -> Tensor:
        """forward(), but with the given bytes in place of some tokens (forced-OOV inference, section 6.12).

        Overrides of a single row (ids (L,) or (1, L)): {position: bytes}; of a batch: {(row, position): bytes}.
        Bytes past pos_dim are dropped as the tokens' own are.
        Raises IndexError for a position outside the input, TypeError for a value that is not bytes.
        """
        out = self.forward(input_ids)
        if not position_byte_overrides:
            return out
        rows_R = _flat_positions(input_ids, position_byte_overrides)
        kept = []
        for raw in position_byte_overrides.values():
            if not isinstance(raw, bytes | bytearray):
                raise TypeError(f"an override must be bytes, not {type(raw).__name__}")
            decoded = self.byte_extraction == "decode"
            kept.append(utf8_safe_truncate(bytes(raw), self.pos_dim) if decoded else raw[: self.pos_dim])
        bytes_RxP, lengths_R = build_byte_buffer(kept, self.pos_dim)
        check_buffers(bytes_RxP, lengths_R, self.char_dim, self.pos_dim)
        device = self.projection.weight.device
        ids_R, rows_R = torch.arange(len(kept), device=device), torch.tensor(rows_R, device=device)
        e_RxM = self._of_bytes(ids_R, bytes_RxP.to(device), lengths_R.to(device))
        return out.reshape(-1, self.d_model).index_copy(0, rows_R, e_RxM).view_as(out)

    def buffer_bytes(self) -> int:
        """Memory of the token bytes, lengths and coefficients."""
        return sum(t.numel() * t.element_size() for t in (self._byte_buffer, self._length_buffer, self._coef))

    def extra_repr(self) -> str:
        dims = f"char_dim={self.char_dim}, pos_dim={self.pos_dim}, D={self.D}"
        return f"{self.vocab_size}, {self.d_model}, {dims}, mode={self.mode!r}"

    # ---- inside ----

    def _embeddings(self, ids: Tensor) -> Tensor:
        e = self._of_bytes(ids, self._byte_buffer, self._length_buffer)
        if self.rank:
            e = e + nn.functional.embedding(ids, self.residual_u) @ self.residual_v
        return e

    def _of_bytes(self, ids: Tensor, bytes_VxP: Tensor, lengths_V: Tensor) -> Tensor:
        """Embeddings of ids of a vocabulary of these bytes, without what is a token's own."""
        weight = self.projection.weight
        if self._coef.device != weight.device or self._coef.dtype != _sum_dtype(weight):
            self._place_constants()  # the weight was moved by something else than the module's own to()
            bytes_VxP, lengths_V = bytes_VxP.to(weight.device), lengths_V.to(weight.device)
        e = embed(ids, weight, (bytes_VxP, lengths_V, self._coef))
        return e + self._ngram_term(bytes_VxP[ids], lengths_V[ids]) if self.ngrams else e

    def _ngram_term(self, bytes_: Tensor, lengths: Tensor) -> Tensor:
        """(..., M) for bytes (..., P) and lengths (...): the sum of their n-grams' rows / sqrt(count)."""
        buckets_NxG = ngram_buckets(bytes_.reshape(-1, self.pos_dim), lengths.reshape(-1), self.ngrams)
        count_Nx1 = (buckets_NxG != EMPTY).sum(1, keepdim=True).clamp(min=1)
        bag_NxM = self.ngram(buckets_NxG)
        return (bag_NxM * count_Nx1.to(bag_NxM.dtype).rsqrt()).view(*lengths.shape, self.d_model)

    def _place_constants(self) -> None:
        """Keep bytes and coefficients beside the weight; a meta weight leaves them where they are."""
        weight = self.projection.weight
        if weight.device.type == "meta":
            return
        self._byte_buffer = self._byte_buffer.to(weight.device)
        self._length_buffer = self._length_buffer.to(weight.device)
        coef = bag_coefficients(self.char_dim, self.pos_dim, self.length_normalize, self.z_normalize)
        self._coef = torch.tensor(coef, dtype=torch.float64).to(_sum_dtype(weight)).to(weight.device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._table = None
        self._place_constants()
        return self

    def train(self, mode: bool = True):
        self._table = None
        return super().train(mode)


@torch.no_grad()
def draw(
    module: nn.Module,
    std: Mapping[str, float],
    generator_for: GeneratorFor | None = None,
    uniform: Set[str] = frozenset(),
) -> None:
    """Fill the module's named parameters from N(0, std^2), or uniformly with that deviation where named so.

    The numbers are drawn in row-major order, on the device of the generator if there is one: the layout and the
    device of a parameter change nothing then. On the meta device there is nothing to draw.
    """
    for name, deviation in std.items():
        p, generator = module.get_parameter(name), None
        if p.is_meta:  # torch would load its compiler for the attempt
            continue
        if generator_for is None:
            fresh = torch.empty_like(p, memory_format=torch.contiguous_format)
        else:
            generator = generator_for(name)
            fresh = torch.empty(p.shape, dtype=p.dtype, device=generator.device)
        if name in uniform:
            half = math.sqrt(3) * deviation
            fresh.uniform_(-half, half, generator=generator)
        else:
            fresh.normal_(0, deviation, generator=generator)
        p.copy_(fresh)


def _sum_dtype(weight: Tensor) -> torch.dtype:
    """Bags of half-precision rows are scaled and shifted in float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _flat_positions(input_ids: Tensor, overrides: Mapping) -> list[int]:
    """Where each override stands in the flattened ids; its place is a position, or (row, position)."""
    if not input_ids.dim():
        raise IndexError("byte overrides need ids with at least one dimension")
    n_rows, L = math.prod(input_ids.shape[:-1]), input_ids.size(-1)
    flat = []
    for key in overrides:
        if not isinstance(key, tuple) and n_rows != 1:
            raise ValueError(f"the ids have {n_rows} rows: name overrides by (row, position), not {key!r}")
        row, p = key if isinstance(key, tuple) else (0, key)
        if not (0 <= row < n_rows and 0 <= p < L):
            raise IndexError(f"override position {key!r} is outside the {n_rows} x {L} ids")
        flat.append(row * L + p)
    return flat


def _row_major_state(module: KroneckerEmbedding, state: dict, prefix: str, _metadata) -> None:
    """Hand checkpoints an ordinary contiguous weight (safetensors refuses any other)."""
    key = prefix + "projection.weight"
    weight = state.get(key)
    if weight is not None and not weight.requires_grad and not weight.is_contiguous():
        state[key] = weight.contiguous()


def _check_loaded_shape(module: KroneckerEmbedding, state: dict, prefix: str, *_unused) -> None:
    weight = state.get(prefix + "projection.weight")
    if weight is None or tuple(weight.shape) == (module.d_model, module.D):
        return
    hint = ""
    if weight.dim() == 2 and weight.size(1) != module.D and weight.size(1) % module.char_dim == 0:
        hint = f" (its pos_dim was {weight.size(1) // module.char_dim}, here it is {module.pos_dim})"
    shapes = f"{tuple(weight.shape)}, but this embedding needs {(module.d_model, module.D)}"
    raise ValueError(f"the checkpoint's {prefix}projection.weight has shape {shapes}{hint}")
