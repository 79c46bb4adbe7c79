"""Other ways to compute the same embedding on a GPU, measured beside the package's own.

    python scripts/gpu/candidates.py                     on a GPU; scripts/gpu/recipe.py embedding runs it too
    python scripts/gpu/candidates.py train table FLAGS   train.py, its embedding going this way

kronecker/bag.py learns from the device how many of a batch's tokens are distinct, so the host waits for it: twice in
the forward pass and, compiled, twice in the backward one. The ways here have fixed shapes and never wait:

table   the embeddings of the whole vocabulary, then a lookup; the sums of the backward pass follow an order that is
        made once, since the bytes of a vocabulary do not change. Long runs (the rows that many tokens share) are cut
        into pieces of CHUNK, or one thread would add up thousands of rows.
slots   the distinct tokens, like the package, in as many slots as there could be at most; empty slots cost little.

Whichever is fastest in the training step should become the package's way; until it is measured, nothing is changed.
"""

import copy
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import torch
import torch.nn.functional as F
from torch import Tensor

from data.files import write_json, write_text
from engine.errors import sentences
from kronecker import KroneckerEmbedding
from scripts import provenance
from scripts.analysis.report import Table
from scripts.arguments import Parser, device
from scripts.bench.embedding import interleave
from scripts.bench.embedding_sides import Corpus, build, step

CHUNK = 64


def weighted(bag_TxM: Tensor, wT_DxM: Tensor, scale_Tx1: Tensor, shift_Tx1: Tensor) -> Tensor:
    """Embeddings (T, M) of T tokens whose rows of W^T are summed up in bag."""
    bag_TxM = bag_TxM.to(scale_Tx1.dtype)
    e_TxM = torch.addcmul(scale_Tx1 * bag_TxM, shift_Tx1, wT_DxM.sum(0, dtype=bag_TxM.dtype), value=-1)
    return e_TxM.to(wT_DxM.dtype)


class TableWay:
    """W^T (D, M) -> embeddings (N, M) through the table of all V tokens. coef (P + 1, 2) as in kronecker/bag.py."""

    def __init__(self, bytes_VxP: Tensor, lengths_V: Tensor, coef_Lx2: Tensor, D: int):
        V, P = bytes_VxP.shape
        device = bytes_VxP.device
        position_P = torch.arange(P, device=device)
        real_VxP = position_P < lengths_V[:, None]
        self.flat_K = (bytes_VxP.long() * P + position_P)[real_VxP]
        lengths = lengths_V.long()
        self.starts_V = lengths.cumsum(0) - lengths
        self.scale_Vx1, self.shift_Vx1 = coef_Lx2[lengths].unsqueeze(2).unbind(1)
        # the same sums backwards: for each row of W^T the tokens that have it, in pieces of CHUNK
        order_K = torch.argsort(self.flat_K, stable=True)
        self.token_K = torch.repeat_interleave(torch.arange(V, device=device), lengths)[order_K]
        counts_D = torch.bincount(self.flat_K, minlength=D)
        pieces_D = (counts_D + CHUNK - 1) // CHUNK
        first_D = counts_D.cumsum(0) - counts_D
        n_pieces = int(pieces_D.sum())
        row_C = torch.repeat_interleave(torch.arange(D, device=device), pieces_D)
        within_C = torch.arange(n_pieces, device=device) - (pieces_D.cumsum(0) - pieces_D)[row_C]
        self.starts_C = first_D[row_C] + within_C * CHUNK
        self.starts_D = pieces_D.cumsum(0) - pieces_D
        self.all_C = torch.arange(n_pieces, device=device)

    def forward(self, ids_N: Tensor, wT_DxM: Tensor) -> Tensor:
        bag_VxM = F.embedding_bag(self.flat_K, wT_DxM, self.starts_V, mode="sum")
        return weighted(bag_VxM, wT_DxM, self.scale_Vx1, self.shift_Vx1).index_select(0, ids_N)

    def backward(self, ids_N: Tensor, g_NxM: Tensor, D: int) -> Tensor:
        g_VxM = torch.ops.aten.embedding_dense_backward(g_NxM, ids_N, len(self.scale_Vx1), -1, False)
        g_VxM = g_VxM.to(self.scale_Vx1.dtype)
        shared_M = self.shift_Vx1[:, 0] @ g_VxM
        piece_CxM = F.embedding_bag(self.token_K, g_VxM * self.scale_Vx1, self.starts_C, mode="sum")
        grad_DxM = F.embedding_bag(self.all_C, piece_CxM, self.starts_D, mode="sum")
        return grad_DxM.sub_(shared_M).to(g_NxM.dtype)


class Slots:
    """The same through min(N, V) slots for the distinct tokens of the batch."""

    def __init__(self, bytes_VxP: Tensor, lengths_V: Tensor, coef_Lx2: Tensor, D: int):
        self.bytes_VxP, self.lengths_V, self.coef_Lx2, self.D = bytes_VxP, lengths_V.long(), coef_Lx2, D

    def forward(self, ids_N: Tensor, wT_DxM: Tensor) -> Tensor:
        V, P = self.bytes_VxP.shape
        device = ids_N.device
        S = min(len(ids_N), V)
        used_V = torch.zeros(V, dtype=torch.bool, device=device).index_fill_(0, ids_N, True)
        slot_V = used_V.cumsum(0) - 1
        # slot S is the bin of all tokens that are not there
        token_S = torch.zeros(S + 1, dtype=torch.long, device=device)
        token_S = token_S.scatter_(0, torch.where(used_V, slot_V, S), torch.arange(V, device=device))[:S]
        alive_S = torch.arange(S, device=device) < used_V.sum()
        lengths_S = self.lengths_V[token_S] * alive_S
        position_P = torch.arange(P, device=device)
        flat_SxP = self.bytes_VxP[token_S].long() * P + position_P
        self.flat_SxP = flat_SxP.masked_fill(position_P >= lengths_S[:, None], self.D)  # a row of zeros
        self.inverse_N, self.lengths_S = slot_V[ids_N], lengths_S
        self.scale_Sx1, self.shift_Sx1 = self.coef_Lx2[lengths_S].unsqueeze(2).unbind(1)
        bag_SxM = F.embedding_bag(self.flat_SxP, F.pad(wT_DxM, (0, 0, 0, 1)), mode="sum", padding_idx=self.D)
        return weighted(bag_SxM, wT_DxM, self.scale_Sx1, self.shift_Sx1).index_select(0, self.inverse_N)

    def backward(self, ids_N: Tensor, g_NxM: Tensor, D: int) -> Tensor:
        S, P = self.flat_SxP.shape
        g_SxM = torch.ops.aten.embedding_dense_backward(g_NxM, self.inverse_N, S, -1, False)
        g_SxM = g_SxM.to(self.scale_Sx1.dtype)
        shared_M = self.shift_Sx1[:, 0] @ g_SxM
        bag_K = torch.arange(S, device=ids_N.device)[:, None].expand(S, P).reshape(-1)
        grad = torch.ops.aten._embedding_bag_dense_backward(
            g_SxM * self.scale_Sx1, self.flat_SxP.reshape(-1), bag_K, self.lengths_S, self.lengths_S, D + 1, False,
            0, None, D,
        )  # fmt: skip
        return grad[:D].sub_(shared_M).to(g_NxM.dtype)


class _Candidate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids_N, weight_MxD, way):
        ctx.way, ctx.D = way, weight_MxD.size(1)
        ctx.save_for_backward(ids_N)
        return way.forward(ids_N, weight_MxD.t().contiguous())

    @staticmethod
    def backward(ctx, g_NxM):
        (ids_N,) = ctx.saved_tensors
        return None, ctx.way.backward(ids_N, g_NxM.contiguous(), ctx.D).t(), None


class Candidate(KroneckerEmbedding):
    """A KroneckerEmbedding whose sums go its `way`."""

    way = TableWay

    def _place_constants(self) -> None:
        super()._place_constants()
        if self.projection.weight.device.type != "meta":
            self._way = self.way(self._byte_buffer, self._length_buffer, self._coef, self.D)

    def forward(self, ids: Tensor) -> Tensor:
        out = _Candidate.apply(ids.reshape(-1), self.projection.weight, self._way)
        return out.view(*ids.shape, -1)

    def plan_ahead(self, input_ids: Tensor) -> None:
        """Nothing follows from the ids alone."""


def going(way, module: KroneckerEmbedding) -> Candidate:
    """The same embedding, with the same weight, whose sums go another way."""
    other = copy.copy(module)
    other.__class__, other.way = Candidate, way
    other._place_constants()
    return other


SETTINGS = [
    (50_304, 768, 16, 65_536),
    (50_304, 768, 16, 8_192),
    (131_072, 4_096, 32, 65_536),
]  # V, d, pos_dim, ids
TOY = [(512, 32, 8, 300)]


def measure(device: str, settings=SETTINGS, rounds: int = 20) -> list[dict]:
    """Median ms of forward and backward of every way and of nn.Embedding, interleaved."""
    rows, corpus = [], Corpus(None)
    for V, d, pos_dim, n in settings:
        for dtype in (torch.float32, torch.bfloat16):
            what = (V, d, pos_dim, corpus.buffers(V, pos_dim), device, dtype)
            package = build("kronecker", *what)
            sides = {"package": package, "table": going(TableWay, package), "slots": going(Slots, package)}
            sides["nn.Embedding"] = build("embedding", *what)
            ids = corpus.ids("text", n, V).to(device)
            g = torch.randn(n, d, device=device, dtype=dtype)
            runs = {name: partial(step, module, ids, g) for name, module in sides.items()}
            ms = interleave(runs, rounds, device)
            rows.append({"V": V, "d": d, "pos_dim": pos_dim, "tokens": n, "dtype": str(dtype)[6:], "ms": ms})
    return rows


def ways_table(rows: list[dict]) -> Table:
    """Milliseconds of the package's way, of the candidates and of nn.Embedding."""
    cells = []
    for r in rows:
        embedding = f"{r['V']:,} x {r['d']:,}, pos_dim {r['pos_dim']}"
        cells.append([embedding, r["dtype"], f"{r['tokens']:,}", *(f"{ms:.3f}" for ms in r["ms"].values())])
    header = ["embedding", "dtype", "tokens", *(f"{side}, ms" for side in rows[0]["ms"])]
    note = "Forward and backward; ids by a Zipf law."
    return Table("Ways to the same embedding", header, cells, left=2, note=note)


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:2] == ["train", "table"]:  # slots keeps something between its passes, which no compiler takes
        import model
        import train

        model.KroneckerEmbedding = Candidate
        sys.exit(train.cli(argv[2:]))
    parser = Parser(__doc__)
    parser.add_argument("--device", type=device, default="auto", help="cpu, cuda, auto (%(default)s)")
    parser.add_argument("--toy", action="store_true", help="one small setting, three rounds")
    parser.add_argument("--out", type=Path, help="write candidates.json and candidates.md to this folder")
    args = parser.parse_args(argv)
    with sentences():
        rows = measure(args.device, TOY, 3) if args.toy else measure(args.device)
        table, made = ways_table(rows), provenance.provenance(__file__, argv)
        print(table.text())
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            write_json(args.out / "candidates.json", made | {"rows": rows})
            source = f"`{made['command']}` at commit {made['commit']}, {made['machine']}, {made['date']}."
            write_text(args.out / "candidates.md", f"{table.markdown()}\n\n{source}\n")


if __name__ == "__main__":
    main()
