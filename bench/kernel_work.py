"""What `quire bench kernels` gives each op to do: arguments, the bytes and operations that this takes, torch's own way.

    Subject (implementation, format, shape) ──WORK[op]──▶ at(rows) ──▶ Work (calls in turn, bytes, operations, aten)

Bytes are what must move at the least: every input read once, every output written once. Operations are those of
products alone. What lies in weights and caches is there so often that the copies exceed every cache, and the calls go
through them in turn, as the layers of a step do; activations are where the op before has left them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.config import EngineConfig
from ..kernels.batch import KVSpec, LayerKV, RaggedBatch
from ..kernels.kv_formats import kv_formats
from ..kernels.packed import PackedWeight, RowFormat, stack_experts, weight_format
from ..kernels.reference.int4 import ZERO, from_codes, unpack_int4
from ..kernels.reference.rope import rope_table
from ..kernels.reference.sampling import Bias, LogitEdits, Penalties
from ..kernels.registry import Implementation
from ..kernels.testing import make_batch, make_cache, normal

BF16 = torch.bfloat16
BEYOND_CACHE = 512 << 20  # bytes: twice the largest last-level cache that two cores are likely to share
BLOCK_SIZE = EngineConfig().block_size  # tokens of a page
CONTEXT = 1024  # tokens before each sequence's rows
MOST_DECODES = 64  # so many rows are one of each sequence; more are a chunk of one prompt
INT8_ROWS = RowFormat(torch.int8)

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a decoder layer; the default is that of a model of half a billion parameters, with experts for `moe`."""

    hidden: int = 896
    ffn: int = 4864
    heads: int = 14
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 32_768
    experts: int = 16
    top_k: int = 4
    expert_ffn: int = 608

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of a layer's products: q k v, o, gate and up, down."""
        queries, both = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        return (
            (queries + both, self.hidden),
            (self.hidden, queries),
            (2 * self.ffn, self.hidden),
            (self.hidden, self.ffn),
        )


@dataclass(frozen=True, slots=True)
class Work:
    """The same work on one copy of the weights after another: by the implementation, and by torch's operators.

    aten      empty = torch has none
    nbytes, operations  of one call; integers: whether the operations are of int8
    """

    calls: tuple[Call, ...]
    nbytes: float
    operations: float = 0
    aten: tuple[Call, ...] = ()
    integers: bool = False


@dataclass(frozen=True, slots=True)
class Subject:
    implementation: Implementation
    format: str  # of the weights, of the keys and values, or of the rows
    shape: Shape

    def rows(self, rows: int, width: int, seed: int = 0) -> Tensor:
        return normal((rows, width), BF16, seed)


At = Callable[[int], Work]
WORK: dict[str, Callable[[Subject], At]] = {}


def prepared(*ops: str) -> Callable[[Callable[[Subject], At]], Callable[[Subject], At]]:
    """The work of ops on what is made once, whatever the number of rows."""

    def declare(make: Callable[[Subject], At]) -> Callable[[Subject], At]:
        WORK.update(dict.fromkeys(ops, make))
        return make

    return declare


def rowwise(*ops: str) -> Callable[[Callable[[Subject, int], Work]], Callable[[Subject, int], Work]]:
    """The work of ops that have nothing but their rows."""

    def declare(make: Callable[[Subject, int], Work]) -> Callable[[Subject, int], Work]:
        WORK.update({op: lambda subject: partial(make, subject) for op in ops})
        return make

    return declare


KV_OPS = ("attention", "kv_write", "rope_kv_write", "kv_copy_blocks", "kv_compact")
ON_LOGITS = ("greedy", "sample", "probabilities", "draw_children", "verify", "token_logprobs", "process_logits")


def formats(op: str) -> tuple[str, ...]:
    """The formats that an op is measured in: of a bf16 model, its own or whatever else its cache may hold."""
    if op in KV_OPS:
        return tuple(name for name in kv_formats() if name not in ("fp32", "fp16"))
    kind, _, name = op.partition("_")
    if kind in ("linear", "moe") and name:
        return (name,)
    return ("int8",) if op.endswith("_rows") and op != "take_rows" else ("fp32",) if op in ON_LOGITS else ("bf16",)


def copies(nbytes: int) -> range:
    """As many as it takes for nothing to be found in a cache when its turn comes again."""
    return range(min(1024, 1 + BEYOND_CACHE // nbytes))


# ---- products


def stored(name: str, outputs: int, inputs: int) -> Tensor | PackedWeight:
    """A weight of random values in a format; of int4 random codes, as a search for their range takes seconds."""
    if name == "bf16":
        return normal((outputs, inputs), BF16) * inputs**-0.5
    if name != "int4":
        return weight_format(name).quantize(normal((outputs, inputs), torch.float32) * inputs**-0.5, None)
    group = next((g for g in (128, 64, 32) if inputs % g == 0), inputs)
    shape = (inputs // group, outputs)
    return from_codes(
        torch.randint(16, (outputs, inputs)),
        torch.full(shape, 0.01),
        torch.randint(16, shape, dtype=torch.uint8),
        group,
    )


def aten_product(weight: Tensor | PackedWeight, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """x -> x · weightᵀ + bias by torch's operator for the format, on a copy of the weight; None = it has none."""
    if isinstance(weight, Tensor):
        plain = weight.clone()
        return lambda x: F.linear(x, plain, bias)
    if weight.format == "int8" and weight.scales.shape[0] == 1:
        codes, scales = weight.codes.clone(), weight.scales[0].to(BF16)
        return lambda x: torch._weight_int8pack_mm(x, codes, scales)
    if weight.format == "int4" and weight.outputs % 16 == 0 and weight.zeros is not None:
        by_lane = torch._convert_weight_to_int4pack_for_cpu(unpack_int4(weight.codes, weight.group).int(), 1)
        offsets = (ZERO - weight.zeros.float()) * weight.scales.float()
        scales = torch.stack((weight.scales.float(), offsets), dim=-1).to(BF16)
        return lambda x: torch._weight_int4pack_mm_for_cpu(x, by_lane, weight.group, scales)
    if weight.format == "w8a8":
        across, scales = weight.codes.clone().T, weight.scales[0].clone()

        def integers(x: Tensor) -> Tensor:
            steps = x.float().abs().amax(-1, keepdim=True) / 127
            return (torch._int_mm((x / steps).round().to(torch.int8), across) * steps * scales).to(BF16)

        return integers
    return None


def nbytes_of(weight: Tensor | PackedWeight) -> int:
    return weight.nbytes


def after(*functions: Callable[[], object]) -> Call:
    """One call that makes all of them."""

    def run() -> None:
        for function in functions:
            function()

    return run


@prepared("linear", "linear_int8", "linear_int4", "linear_w8a8", "linear_fp8", "linear_fp8_block")
def layer_products(subject: Subject) -> At:
    """The four products of a layer, one after the other."""
    shapes = subject.shape.matrices
    weights = [stored(subject.format, *shape) for shape in shapes]
    layers = copies(sum(map(nbytes_of, weights)))
    prepare = subject.implementation.prepare
    packed = [[prepare(weight, None) for weight in weights] for _ in layers]
    aten = [[aten_product(weight, None) for weight in weights] for _ in layers]
    if None in aten[0]:
        aten = []

    def at(rows: int) -> Work:
        x = {inputs: subject.rows(rows, inputs) for _, inputs in shapes}
        xs = [x[inputs] for _, inputs in shapes]
        run = subject.implementation.run
        return Work(
            calls=tuple(after(*(partial(run, a, w) for a, w in zip(xs, layer, strict=True))) for layer in packed),
            nbytes=sum(map(nbytes_of, weights)) + sum(2 * rows * (n + k) for n, k in shapes),
            operations=sum(2 * rows * n * k for n, k in shapes),
            aten=tuple(
                after(*(partial(f, a) for a, f in zip(xs, layer, strict=True) if f is not None)) for layer in aten
            ),
            integers=subject.format == "w8a8",
        )

    return at


@prepared("logits")
def logits(subject: Subject) -> At:
    shape = (subject.shape.vocab, subject.shape.hidden)
    weight = normal(shape, BF16)
    packed = [subject.implementation.prepare(weight, None) for _ in copies(weight.nbytes)]
    plain = [weight.clone() for _ in packed]

    def at(rows: int) -> Work:
        x = subject.rows(rows, shape[1])
        return Work(
            calls=tuple(partial(subject.implementation.run, x, w) for w in packed),
            nbytes=weight.nbytes + x.nbytes + 4 * rows * shape[0],
            operations=2 * rows * shape[0] * shape[1],
            aten=tuple(lambda w=w: F.linear(x, w).float() for w in plain),  # type: ignore[misc]
        )

    return at


@prepared("moe", "moe_int8", "moe_int4", "moe_w8a8", "moe_fp8", "moe_fp8_block")
def experts(subject: Subject) -> At:
    s = subject.shape
    kinds = ((2 * s.expert_ffn, s.hidden), (s.hidden, s.expert_ffn))
    if subject.format == "bf16":
        weights: list[Any] = [normal((s.experts, *kind), BF16) * kind[1] ** -0.5 for kind in kinds]
    else:
        weights = [stack_experts([stored(subject.format, *kind)] * s.experts) for kind in kinds]  # type: ignore[list-item]
    layer_bytes = sum(map(nbytes_of, weights))
    packed = [subject.implementation.prepare(*weights) for _ in copies(layer_bytes)]

    def at(rows: int) -> Work:
        x = subject.rows(rows, s.hidden)
        shares, ids = normal((rows, s.experts), torch.float32).softmax(-1).topk(s.top_k, dim=-1)
        chosen = ids.unique().numel()
        return Work(
            calls=tuple(partial(subject.implementation.run, x, w, shares, ids, "silu") for w in packed),
            nbytes=layer_bytes * chosen / s.experts + 2 * x.nbytes,
            operations=2 * rows * s.top_k * 3 * s.hidden * s.expert_ffn,
            integers=subject.format == "w8a8",
        )

    return at


# ---- keys and values


def sequences(rows: int, context: int) -> RaggedBatch:
    """Decodes of as many sequences; beyond MOST_DECODES a chunk of one prompt."""
    if rows <= MOST_DECODES:
        return make_batch([1] * rows, [context] * rows, BLOCK_SIZE)
    return make_batch([rows], [context], BLOCK_SIZE)


def spec(subject: Subject) -> KVSpec:
    return KVSpec(BLOCK_SIZE, subject.shape.kv_heads, subject.shape.head_dim, subject.format)


def cache_copies(cache: LayerKV) -> list[LayerKV]:
    def copied(scale: Tensor | None) -> Tensor | None:
        return None if scale is None else scale.clone()

    each = sum(tensor.nbytes for tensor in cache.per_slot)
    return [
        replace(
            cache,
            k=cache.k.clone(),
            v=cache.v.clone(),
            k_scale=copied(cache.k_scale),
            v_scale=copied(cache.v_scale),
        )
        for _ in copies(each)
    ]


def fused_attention(q: Tensor, cache: LayerKV, batch: RaggedBatch, scale: float) -> Call:
    """torch's: keys and values gathered by the block table, then its fused product."""
    table, length = batch.block_table.long(), batch.max_seq_len
    grouped = q.unflatten(0, (batch.num_seqs, -1)).transpose(1, 2)
    context = length - batch.max_q
    mask = None
    if batch.max_q > 1:
        mask = torch.arange(length) <= context + torch.arange(batch.max_q)[:, None]

    def run() -> Tensor:
        k, v = (pages[table].flatten(1, 2)[:, :length].transpose(1, 2) for pages in (cache.k, cache.v))
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale, enable_gqa=True)

    return run


@rowwise("attention")
def attention(subject: Subject, rows: int) -> Work:
    s, kv = subject.shape, spec(subject)
    batch = sequences(rows, CONTEXT)
    q, scale = normal((rows, s.heads, s.head_dim), BF16), s.head_dim**-0.5
    caches = cache_copies(make_cache(batch, kv))
    plan = subject.implementation.prepare(batch, BLOCK_SIZE, None)
    keys = int(batch.seq_lens.sum())
    seen = int((batch.positions + 1).sum())  # pairs of a row and a key that it sees
    return Work(
        calls=tuple(partial(subject.implementation.run, q, cache, plan, scale, 0.0, None) for cache in caches),
        nbytes=keys * kv.block_bytes / BLOCK_SIZE + 2 * q.nbytes,
        operations=4 * seen * s.heads * s.head_dim,
        aten=tuple(fused_attention(q, cache, batch, scale) for cache in caches) if subject.format == "bf16" else (),
    )


@dataclass(frozen=True, slots=True)
class Written:
    """What a layer writes: the rows' queries, keys and values as slices of one product, and where they go."""

    q: Tensor
    k: Tensor
    v: Tensor
    cache: LayerKV
    batch: RaggedBatch
    angles: Tensor

    @property
    def new_bytes(self) -> float:
        return self.k.shape[0] * self.cache.spec.block_bytes / BLOCK_SIZE


def written(subject: Subject, rows: int) -> Written:
    s = subject.shape
    batch = sequences(rows, 0)
    joined = normal((rows, s.heads + 2 * s.kv_heads, s.head_dim), BF16)
    q, k, v = joined.split((s.heads, s.kv_heads, s.kv_heads), dim=1)
    angles = rope_table(s.head_dim, max(rows, 2), 1e4)
    return Written(q, k, v, make_cache(batch, spec(subject)), batch, angles)


@rowwise("kv_write")
def kv_write(subject: Subject, rows: int) -> Work:
    w = written(subject, rows)

    def copied() -> None:
        for new, pages in ((w.k, w.cache.k), (w.v, w.cache.v)):
            pages.flatten(0, 1)[w.batch.slot_mapping] = new

    return Work(
        calls=(partial(subject.implementation.run, w.k, w.v, w.cache, w.batch.slot_mapping),),
        nbytes=2 * w.k.nbytes + w.new_bytes,
        aten=(copied,) if subject.format == "bf16" else (),
    )


@rowwise("rope_kv_write")
def rope_kv_write(subject: Subject, rows: int) -> Work:
    w = written(subject, rows)
    arguments = (w.q, w.k, w.v, w.batch.positions, w.angles, False, w.cache, w.batch.slot_mapping)
    return Work(
        calls=(partial(subject.implementation.run, *arguments),),
        nbytes=2 * w.q.nbytes + 3 * w.k.nbytes + w.new_bytes,
    )


@rowwise("rope")
def rope(subject: Subject, rows: int) -> Work:
    s = subject.shape
    q, k = normal((rows, s.heads, s.head_dim), BF16), normal((rows, s.kv_heads, s.head_dim), BF16, 1)
    angles = rope_table(s.head_dim, rows, 1e4)
    return Work(
        calls=(partial(subject.implementation.run, q, k, torch.arange(rows), angles, False),),
        nbytes=2 * (q.nbytes + k.nbytes) + angles.nbytes,
    )


@rowwise("kv_copy_blocks")
def kv_copy_blocks(subject: Subject, rows: int) -> Work:
    """As many blocks as rows."""
    kv = spec(subject)
    cache = make_cache(make_batch([1], [2 * rows * BLOCK_SIZE], BLOCK_SIZE), kv)
    source = torch.arange(1, rows + 1)

    def copied() -> None:
        for pages in cache.per_slot:
            pages[source + rows] = pages[source]

    return Work(
        calls=(partial(subject.implementation.run, cache, source, source + rows),),
        nbytes=2 * rows * kv.block_bytes,
        aten=(copied,),
    )


@rowwise("kv_compact")
def kv_compact(subject: Subject, rows: int) -> Work:
    kv = spec(subject)
    cache = make_cache(make_batch([1], [2 * rows + BLOCK_SIZE], BLOCK_SIZE), kv)
    source = torch.arange(rows) + BLOCK_SIZE

    def copied() -> None:
        for pages in cache.per_slot:
            flat = pages.flatten(0, 1)
            flat[source + rows] = flat[source]

    return Work(
        calls=(partial(subject.implementation.run, cache, source, source + rows),),
        nbytes=2 * rows * kv.block_bytes / BLOCK_SIZE,
        aten=(copied,),
    )


@rowwise("hadamard")
def hadamard(subject: Subject, rows: int) -> Work:
    x = normal((rows, subject.shape.heads, subject.shape.head_dim), BF16)
    return Work(calls=(partial(subject.implementation.run, x),), nbytes=2 * x.nbytes)


# ---- the rest of a layer


@rowwise("rms_norm", "rms_norm_rows")
def rms_norm(subject: Subject, rows: int) -> Work:
    width = subject.shape.hidden
    x, weight = subject.rows(rows, width), normal((width,), BF16, 1)
    coded = subject.format == "int8"
    arguments = (x, weight, 1e-6, 0.0, *([INT8_ROWS] if coded else []))
    return Work(
        calls=(partial(subject.implementation.run, *arguments),),
        nbytes=x.nbytes + (rows * (width + 4) if coded else x.nbytes) + weight.nbytes,
        aten=() if coded else (lambda: F.rms_norm(x, (width,), weight, 1e-6),),
    )


@rowwise("add_rms_norm", "add_rms_norm_rows")
def add_rms_norm(subject: Subject, rows: int) -> Work:
    width = subject.shape.hidden
    x, residual, weight = subject.rows(rows, width), subject.rows(rows, width, 1), normal((width,), BF16, 2)
    coded = subject.format == "int8"
    arguments = (x, residual, weight, 1e-6, 0.0, *([INT8_ROWS] if coded else []))

    def added() -> Tensor:
        return F.rms_norm(residual.add_(x), (width,), weight, 1e-6)

    return Work(
        calls=(partial(subject.implementation.run, *arguments),),
        nbytes=3 * x.nbytes + (rows * (width + 4) if coded else x.nbytes) + weight.nbytes,
        aten=() if coded else (added,),
    )


@rowwise("silu_and_mul", "gelu_and_mul", "silu_and_mul_rows", "gelu_and_mul_rows")
def gate(subject: Subject, rows: int) -> Work:
    width = subject.shape.ffn
    x = subject.rows(rows, 2 * width)
    coded = subject.format == "int8"
    act = F.silu if subject.implementation.op.startswith("silu") else partial(F.gelu, approximate="tanh")
    return Work(
        calls=(partial(subject.implementation.run, x, *([INT8_ROWS] if coded else [])),),
        nbytes=x.nbytes + rows * (width + 4 if coded else 2 * width),
        aten=() if coded else (lambda: act(x[:, :width]) * x[:, width:],),
    )


@rowwise("quantize_rows")
def quantize_rows(subject: Subject, rows: int) -> Work:
    x = subject.rows(rows, subject.shape.hidden)

    def coded() -> Tensor:
        steps = x.float().abs().amax(-1, keepdim=True) / 127
        return (x / steps).round().to(torch.int8)

    return Work(
        calls=(partial(subject.implementation.run, x, INT8_ROWS),),
        nbytes=x.nbytes + x.numel() + 4 * rows,
        aten=(coded,),
    )


@rowwise("embed")
def embed(subject: Subject, rows: int) -> Work:
    table = normal((subject.shape.vocab, subject.shape.hidden), BF16)
    ids = torch.arange(rows) * 7919 % subject.shape.vocab
    return Work(
        calls=(partial(subject.implementation.run, ids, table, 1.0),),
        nbytes=4 * rows * subject.shape.hidden + ids.nbytes,
        aten=(lambda: F.embedding(ids, table),),
    )


@rowwise("take_rows")
def take_rows(subject: Subject, rows: int) -> Work:
    x, chosen = subject.rows(2 * rows, subject.shape.hidden), 2 * torch.arange(rows)
    return Work(
        calls=(partial(subject.implementation.run, x, chosen),),
        nbytes=x.nbytes + chosen.nbytes,
        aten=(lambda: x.index_select(0, chosen),),
    )


@rowwise("add_residual")
def add_residual(subject: Subject, rows: int) -> Work:
    x, residual = (subject.rows(rows, subject.shape.hidden, seed) for seed in (0, 1))
    return Work(
        calls=(partial(subject.implementation.run, x, residual),), nbytes=3 * x.nbytes, aten=(lambda: x + residual,)
    )


@rowwise("add_gated")
def add_gated(subject: Subject, rows: int) -> Work:
    out, expert = (subject.rows(rows, subject.shape.hidden, seed) for seed in (0, 1))
    opening = subject.rows(rows, 1, 2)
    return Work(
        calls=(partial(subject.implementation.run, out, opening, expert),),
        nbytes=3 * out.nbytes + opening.nbytes,
        aten=(lambda: out + opening.sigmoid() * expert,),
    )


@rowwise("route")
def route(subject: Subject, rows: int) -> Work:
    scores, top_k = subject.rows(rows, subject.shape.experts), subject.shape.top_k
    return Work(
        calls=(partial(subject.implementation.run, scores, top_k, True),),
        nbytes=scores.nbytes + 12 * rows * top_k,
        aten=(lambda: scores.float().softmax(-1).topk(top_k, dim=-1),),
    )


# ---- from logits to tokens


def scores_of(subject: Subject, rows: int) -> Tensor:
    return 3 * normal((rows, subject.shape.vocab), torch.float32)


@rowwise("soft_cap")
def soft_cap(subject: Subject, rows: int) -> Work:
    scores = scores_of(subject, rows)
    return Work(
        calls=(partial(subject.implementation.run, scores, 30.0),),
        nbytes=2 * scores.nbytes,
        aten=(lambda: torch.tanh(scores / 30) * 30,),
    )


@rowwise("greedy")
def greedy(subject: Subject, rows: int) -> Work:
    scores = scores_of(subject, rows)
    return Work(
        calls=(partial(subject.implementation.run, scores),), nbytes=scores.nbytes, aten=(lambda: scores.max(dim=-1),)
    )


def filters(rows: int) -> tuple[Tensor, ...]:
    """temperature 0.8, top_k 50, top_p 0.9 and no min_p in every row."""
    full = torch.full
    return full((rows,), 0.8), full((rows,), 50), full((rows,), 0.9), torch.zeros(rows)


def shortlist(scores: Tensor) -> tuple[Tensor, Tensor]:
    """torch's way of the same filters: probabilities of the 50 most likely, those beyond 0.9 of the mass at 0."""
    values, ids = (scores / 0.8).topk(50, dim=-1)
    shares = values.softmax(-1)
    return shares.masked_fill(shares.cumsum(-1) - shares > 0.9, 0.0), ids


@rowwise("sample")
def sample(subject: Subject, rows: int) -> Work:
    scores, index = scores_of(subject, rows), torch.arange(rows)

    def drawn() -> Tensor:
        shares, ids = shortlist(scores)
        return ids.gather(-1, shares.multinomial(1))

    return Work(
        calls=(partial(subject.implementation.run, scores, *filters(rows), index, 0 * index, index),),
        nbytes=scores.nbytes,
        aten=(drawn,),
    )


@rowwise("probabilities")
def probabilities(subject: Subject, rows: int) -> Work:
    scores = scores_of(subject, rows)

    def spread() -> Tensor:
        shares, ids = shortlist(scores)
        return torch.zeros_like(scores).scatter_(-1, ids, shares / shares.sum(-1, keepdim=True))

    return Work(
        calls=(partial(subject.implementation.run, scores, *filters(rows)),), nbytes=2 * scores.nbytes, aten=(spread,)
    )


@rowwise("draw_children")
def draw_children(subject: Subject, rows: int) -> Work:
    """Two of each node."""
    q, index, count = scores_of(subject, rows).softmax(-1), torch.arange(rows), min(2, subject.shape.vocab)
    return Work(
        calls=(partial(subject.implementation.run, q, count, index, 0 * index, index, 0 * index),),
        nbytes=q.nbytes,
        aten=(lambda: q.multinomial(count),),
    )


@rowwise("verify")
def verify(subject: Subject, rows: int) -> Work:
    """A chain of four guesses for each row."""
    p = scores_of(subject, 5 * rows).softmax(-1).view(rows, 5, -1)
    q = p.roll(1, dims=1)
    tokens = q.argmax(-1).roll(1, dims=1)
    parents, index = torch.arange(-1, 4).expand(rows, 5).contiguous(), torch.arange(rows)
    return Work(
        calls=(partial(subject.implementation.run, p, q, tokens, parents, index, 0 * index, index),),
        nbytes=p.nbytes + q.nbytes,
    )


@rowwise("token_logprobs")
def token_logprobs(subject: Subject, rows: int) -> Work:
    scores, ids = scores_of(subject, rows), torch.arange(rows)

    def ranked() -> object:
        table = scores.log_softmax(-1)
        mine = table.gather(-1, ids[:, None])
        return (table > mine).sum(-1), table.topk(5, dim=-1)

    return Work(calls=(partial(subject.implementation.run, scores, ids, 5),), nbytes=scores.nbytes, aten=(ranked,))


@rowwise("process_logits")
def process_logits(subject: Subject, rows: int) -> Work:
    """Penalties on 256 tokens of each row and a bias on one."""
    scores, seen = scores_of(subject, rows), min(256, subject.shape.vocab)
    every = torch.arange(rows)
    at, columns = every.repeat_interleave(seen), torch.arange(seen).repeat(rows)
    ones = torch.ones(rows * seen)
    edits = LogitEdits(Penalties(at, columns, 1.2 * ones, 0.5 * ones), Bias(every, every % seen, torch.ones(rows)))
    return Work(calls=(partial(subject.implementation.run, scores, edits),), nbytes=2 * scores.nbytes)


def unknown(ops: Iterable[str]) -> list[str]:
    """Of some ops those that nobody has given work here."""
    return sorted(set(ops) - WORK.keys())
