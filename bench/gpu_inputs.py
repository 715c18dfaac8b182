"""Seeded random inputs for every op, on the CPU; `moved` makes the device's own copy of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.batch import SHORT_ROWS, KVSpec, LayerKV, RaggedBatch
from ..kernels.kv_formats import kv_format, kv_formats
from ..kernels.packed import PackedWeight, RowFormat, stack_experts, weight_format, weight_formats
from ..kernels.reference.low_rank import LowRank
from ..kernels.reference.rope import rope_table
from ..kernels.reference.sampling import Bias, LogitEdits, Marks, Penalties
from ..kernels.testing import FORMATS, grow_tree, make_batch, make_cache, normal

PREPARED = object()  # stands where run takes what prepare made


@dataclass(frozen=True, slots=True)
class Sizes:
    """tiny: for the interpreter, which needs about a millisecond per tile."""

    tiny: bool

    def pick(self, usual: Any, tiny: Any) -> Any:
        return tiny if self.tiny else usual


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of one call. outcome: (run's arguments, its result) -> what is compared."""

    run: tuple[Any, ...]
    prepare: tuple[Any, ...] | None = None
    outcome: Callable[[tuple[Any, ...], Any], Any] = lambda arguments, result: result


@dataclass(frozen=True, slots=True)
class Case:
    """One call of an op to be compared.

    mismatches: the share of integer results that may differ. coarse: results are codes of few bits, of which a last-bit
    difference before may tip some to their neighbours.
    """

    op: str
    label: str
    make: Callable[[], Inputs]
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    kv_format: str = "bf16"
    mismatches: float = 0.0
    coarse: bool = False


def moved(value: Any, device: torch.device | str) -> Any:
    """A copy with every tensor on the device, through tuples, lists, and dataclasses."""
    if isinstance(value, Tensor):
        return value.clone() if value.device == torch.device(device) else value.to(device)
    if is_dataclass(value) and not isinstance(value, type) and not isinstance(value, KVSpec):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    if isinstance(value, tuple):
        entries = [moved(entry, device) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
    if isinstance(value, list):
        return [moved(entry, device) for entry in value]
    return value


def all_cases(sizes: Sizes) -> Iterator[Case]:
    """Every op's calls; an op that none of these knows is found by the check itself."""
    yield from _attention(sizes)
    yield from _cache(sizes)
    yield from _rows(sizes)
    yield from _linear(sizes)
    yield from _experts(sizes)
    yield from _sampling(sizes)


def batch_of(q_lens: Sequence[int], contexts: Sequence[int], block_size: int) -> RaggedBatch:
    """Sequences with few rows first, as the engine sorts them."""
    batch = make_batch(q_lens, contexts, block_size)
    longer = [i for i, n in enumerate(q_lens) if n > SHORT_ROWS]
    batch.short_seqs = longer[0] if longer else len(q_lens)
    return batch


def attention_inputs(
    q_lens: Sequence[int],
    contexts: Sequence[int],
    spec: KVSpec,
    q_heads: int,
    dtype: torch.dtype,
    *,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: bool = False,
    tree: bool = False,
) -> Inputs:
    batch = batch_of(q_lens, contexts, spec.block_size)
    if tree:
        grow_tree(batch, 0, [-1, -1, 0, 0, 1, 2, 4][: q_lens[0] - 1])
    # A slice of a joined qkv, as a layer has it: rows are strided.
    joined = normal((batch.num_tokens, q_heads + 2 * spec.num_kv_heads, spec.head_dim), dtype, 3)
    extra = normal((q_heads,), torch.float32, 4) if sinks else None
    return Inputs(
        run=(joined[:, :q_heads], make_cache(batch, spec), PREPARED, spec.head_dim**-0.5, softcap, extra),
        prepare=(batch, spec.block_size, window),
    )


def _attention(sizes: Sizes) -> Iterator[Case]:
    decodes = sizes.pick(([1] * 8, [0, 1, 15, 16, 255, 700, 1500, 4000]), ([1, 1, 1], [0, 15, 40]))
    mixed = sizes.pick(([1, 1, 4, 100, 257], [300, 0, 60, 0, 511]), ([1, 3, 18], [30, 0, 20]))
    drafts = sizes.pick(([8, 5, 1], [600, 33, 9]), ([8, 1], [20, 3]))
    shapes = {"decodes": decodes, "mixed": mixed}

    def case(label: str, lens: Any, dtype: torch.dtype, kv: str, dim: int, heads: tuple[int, int], **how: Any) -> Case:
        spec = KVSpec(16, heads[1], dim, kv)
        make = lambda: attention_inputs(*lens, spec, heads[0], dtype, **how)  # noqa: E731
        return Case("attention", f"{label} {kv} d{dim} {heads[0]}/{heads[1]}", make, dtype, dim, kv)

    for kv in kv_formats():
        dtype = kv_format(kv).storage if kv in FORMATS.values() else torch.bfloat16
        for label, lens in shapes.items():
            yield case(label, lens, dtype, kv, sizes.pick(128, 64), sizes.pick((32, 8), (4, 2)))
        yield case("tree", drafts, dtype, kv, 64, sizes.pick((14, 2), (3, 1)), tree=True)
        yield case("window", mixed, dtype, kv, 64, (4, 4), window=sizes.pick(128, 9))
    for dim in sizes.pick((96, 256), (96,)):
        yield case("mixed", mixed, torch.bfloat16, "bf16", dim, (4, 2))
    yield case("softcap", mixed, torch.bfloat16, "bf16", 64, (4, 2), softcap=30.0)
    yield case("sinks", mixed, torch.bfloat16, "bf16", 64, (8, 1), sinks=True)

    def states() -> Inputs:
        outputs = [normal((33, 8, 128), torch.bfloat16, i) for i in range(3)]
        lses = [normal((33, 8), torch.float32, 9 + i) for i in range(3)]
        lses[0][0] = lses[1][0] = lses[2][0] = -torch.inf
        return Inputs((outputs, lses))

    yield Case("merge_states", "3 x 33 rows", states)
    yield Case("hadamard", "d128", lambda: Inputs((normal((33, 8, 128), torch.bfloat16),)))


def _stored(arguments: tuple[Any, ...], result: Any) -> Any:
    """What a cache holds now, decoded; block 0 is nobody's."""
    cache: LayerKV = next(argument for argument in arguments if isinstance(argument, LayerKV))
    coding = cache.spec.coding
    pages = []
    for codes, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        pages.append(coding.decode(codes[1:], scale[1:] if coding.scale == "token" and scale is not None else scale))
    return result, pages


def _cache(sizes: Sizes) -> Iterator[Case]:
    q_lens, contexts = sizes.pick(([1, 1, 40], [300, 15, 30]), ([1, 5], [18, 2]))
    heads, dim = 4, 64

    for kv in kv_formats():
        dtype = kv_format(kv).storage if kv in FORMATS.values() else torch.bfloat16
        spec = KVSpec(16, heads, dim, kv)

        def write(spec: KVSpec = spec, dtype: torch.dtype = dtype) -> Inputs:
            batch = batch_of(q_lens, contexts, 16)
            qkv = normal((batch.num_tokens, 4 * heads, dim), dtype, 5)
            k, v = qkv[:, 2 * heads : 3 * heads], qkv[:, 3 * heads :]
            return Inputs((k, v, make_cache(batch, spec), batch.slot_mapping), outcome=_stored)

        def rotate_and_write(spec: KVSpec = spec, dtype: torch.dtype = dtype) -> Inputs:
            batch = batch_of(q_lens, contexts, 16)
            qkv = normal((batch.num_tokens, 4 * heads, dim), dtype, 5)
            q, k, v = qkv[:, : 2 * heads], qkv[:, 2 * heads : 3 * heads], qkv[:, 3 * heads :]
            angles = rope_table(dim, 512, 10000.0, None, 512)
            cache = make_cache(batch, spec)
            return Inputs((q, k, v, batch.positions, angles, False, cache, batch.slot_mapping), outcome=_stored)

        def compact(spec: KVSpec = spec) -> Inputs:
            cache = make_cache(batch_of(q_lens, contexts, 16), spec)
            return Inputs((cache, torch.tensor([18, 20, 21]), torch.tensor([17, 18, 19])), outcome=_stored)

        def copy(spec: KVSpec = spec) -> Inputs:
            cache = make_cache(batch_of(q_lens, contexts, 16), spec)
            return Inputs((cache, torch.tensor([1, 2]), torch.tensor([2, 3])), outcome=_stored)

        coarse = kv not in FORMATS.values()
        yield Case("kv_write", kv, write, dtype, dim, kv, coarse=coarse)
        yield Case("rope_kv_write", kv, rotate_and_write, dtype, dim, kv, coarse=coarse)
        yield Case("kv_compact", kv, compact, dtype, dim, kv)
        yield Case("kv_copy_blocks", kv, copy, dtype, dim, kv)


def _rows(sizes: Sizes) -> Iterator[Case]:
    formats = {
        "int8": RowFormat(torch.int8),
        "int8 g128": RowFormat(torch.int8, 128),
        "int8 static": RowFormat(torch.int8, 0, torch.tensor(0.02)),
        "fp8": RowFormat(torch.float8_e4m3fn),
        "fp8 g128": RowFormat(torch.float8_e4m3fn, 128),
        "fp8 static": RowFormat(torch.float8_e4m3fn, 0, torch.tensor(0.01)),
    }
    rows = 33 if not sizes.tiny else 3
    for width in sizes.pick((896, 4096, 8192), (96,)):
        for dtype in (torch.bfloat16, torch.float32):
            x, residual = normal((rows, width), dtype), normal((rows, width), dtype, 1)
            weight, wide = normal((width,), dtype, 2), normal((rows, 2 * width), dtype, 3)
            name = f"d{width} {FORMATS[dtype]}"

            def plain(*arguments: Any) -> Callable[[], Inputs]:
                return lambda: Inputs(arguments)

            yield Case("rms_norm", name, plain(x, weight, 1e-6, 0.0), dtype)
            yield Case("add_rms_norm", name, plain(x, residual, weight, 1e-6, 1.0), dtype)
            yield Case("silu_and_mul", name, plain(wide), dtype)
            yield Case("gelu_and_mul", name, plain(wide), dtype)
            yield Case("add_residual", name, plain(x, residual), dtype)
            yield Case("add_gated", name, plain(x, normal((rows, 1), dtype, 4), residual), dtype)
            ids = torch.arange(rows).flip(0)
            yield Case("embed", name, plain(ids, x, 1.5), dtype)
            yield Case("take_rows", name, plain(x, ids), dtype)
            yield Case("route", name, plain(x, 4, True), dtype)
            yield Case("soft_cap", name, plain(30 * normal((rows, width), torch.float32, 5), 30.0), dtype)
            for label, to in formats.items():
                for op, arguments in (
                    ("quantize_rows", (x, to)),
                    ("rms_norm_rows", (x, weight, 1e-6, 0.0, to)),
                    ("add_rms_norm_rows", (x, residual, weight, 1e-6, 0.0, to)),
                    ("silu_and_mul_rows", (wide, to)),
                    ("gelu_and_mul_rows", (wide, to)),
                ):
                    yield Case(op, f"{name} {label}", plain(*arguments), dtype, coarse=True)
    for interleaved in (False, True):
        for rotary in (128, 64):
            qkv = normal((rows, 12, 128), torch.bfloat16, 6)
            positions = torch.arange(rows) * 3
            table = rope_table(rotary, 512, 10000.0, None, 512)
            label = f"rotary {rotary}{' interleaved' if interleaved else ''}"
            arguments = (qkv[:, :8], qkv[:, 8:10], positions, table, interleaved)
            yield Case("rope", label, lambda arguments=arguments: Inputs(arguments))


@lru_cache(maxsize=32)  # int4 searches the range of each group; nobody writes to what is returned
def packed_weight(name: str, outputs: int, inputs: int, group: int | None = None, seed: int = 7) -> PackedWeight:
    return weight_format(name).quantize(normal((outputs, inputs), torch.float32, seed) * inputs**-0.5, group)


def _linear(sizes: Sizes) -> Iterator[Case]:
    outputs, inputs = sizes.pick((1536 + 64, 1024), (96, 256))
    counts = sizes.pick((1, 2, 5, 16, 33, 64, 130, 300), (1, 5, 17))

    def case(op: str, label: str, rows: int, weight: Callable[[], Any], dtype: torch.dtype, bias: bool) -> Case:
        def make() -> Inputs:
            offset = normal((outputs,), dtype, 8) if bias else None
            return Inputs((normal((rows, inputs), dtype, rows), PREPARED), prepare=(weight(), offset))

        return Case(op, f"{label} M={rows}", make, dtype)

    for name in weight_formats():
        groups = (None, 32, 64, 0) if name == "int4" else (None, 64) if name == "int8" else (None,)
        for group in groups:
            for rows in counts if group is None else counts[:3]:
                label = name if group is None else f"{name} g{group}"
                weight = lambda name=name, group=group: packed_weight(name, outputs, inputs, group)  # noqa: E731
                yield case(weight_format(name).linear, label, rows, weight, torch.bfloat16, rows % 2 == 1)
        plain = lambda name=name: packed_weight(name, outputs, inputs)  # noqa: E731
        yield case(weight_format(name).linear, f"{name} fp16", 5, plain, torch.float16, False)

    def symmetric() -> PackedWeight:
        return replace(packed_weight("int4", outputs, inputs), zeros=None)

    def ordered() -> PackedWeight:
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(1))
        return replace(packed_weight("int4", outputs, inputs), order=order)

    for rows in counts[:3]:
        yield case("linear_int4", "symmetric", rows, symmetric, torch.bfloat16, False)
        yield case("linear_int4", "act-order", rows, ordered, torch.bfloat16, False)
    yield case("logits", "bf16", 5, lambda: normal((outputs, inputs), torch.bfloat16, 7), torch.bfloat16, False)
    yield case("linear", "bf16", 5, lambda: normal((outputs, inputs), torch.bfloat16, 7), torch.bfloat16, True)

    def side_path() -> Inputs:
        rows = 9
        factors = LowRank(normal((3, 16, inputs), torch.bfloat16, 1), normal((3, outputs, 16), torch.bfloat16, 2))
        index = torch.tensor([0, 1, 2, -1, 0, 0, 2, 1, -1])
        y, x = normal((rows, outputs), torch.bfloat16, 3), normal((rows, inputs), torch.bfloat16, 4)
        return Inputs((y, x * inputs**-0.5, factors, index))

    yield Case("low_rank", "3 pairs of rank 16", side_path)


def routing(rows: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights [T, k] that sum to 1 and distinct ids [T, k]; the last expert is nobody's choice."""
    scores = normal((rows, experts), torch.float32, 11)
    scores[:, -1] = -torch.inf
    weights, ids = scores.softmax(-1).topk(top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), ids


def _experts(sizes: Sizes) -> Iterator[Case]:
    experts, top_k, hidden, ffn = sizes.pick((16, 4, 512, 256), (4, 2, 128, 128))

    def stacked(name: str, outputs: int, inputs: int) -> PackedWeight:
        return stack_experts([packed_weight(name, outputs, inputs, seed=20 + e) for e in range(experts)])

    for name in ("", *weight_formats()):
        for rows in sizes.pick((1, 33, 200), (3,)):

            def make(name: str = name, rows: int = rows) -> Inputs:
                if name:
                    weights: tuple[Any, ...] = stacked(name, 2 * ffn, hidden), stacked(name, hidden, ffn)
                else:
                    weights = (
                        normal((experts, 2 * ffn, hidden), torch.bfloat16, 1) * hidden**-0.5,
                        normal((experts, hidden, ffn), torch.bfloat16, 2) * ffn**-0.5,
                    )
                shares, ids = routing(rows, experts, top_k)
                return Inputs((normal((rows, hidden), torch.bfloat16), PREPARED, shares, ids, "silu"), prepare=weights)

            op = weight_format(name).moe if name else "moe"
            yield Case(op, f"{rows} rows, {top_k} of {experts}", make)


def sampling_rows(rows: int, vocab: int) -> tuple[Tensor, ...]:
    """logits, temperature, top_k, top_p, min_p, seeds, sample_index, positions: every mixture of filters."""
    index = torch.arange(rows)
    return (
        3 * normal((rows, vocab), torch.float32),
        torch.where(index % 5 == 0, 0.0, 0.5 + 0.1 * (index % 7)).float(),
        torch.where(index % 3 == 1, 40, 0),
        torch.where(index % 4 == 2, 0.9, 1.0).float(),
        torch.where(index % 6 == 3, 0.05, 0.0).float(),
        index * 7919 + 1,
        torch.zeros(rows, dtype=torch.int64),
        index + 100,
    )


def _sampling(sizes: Sizes) -> Iterator[Case]:
    vocab, rows = sizes.pick((128256, 64), (1000, 6))
    fp32 = torch.float32
    made = sampling_rows(rows, vocab)
    # By how much a mass of top_p may be rounded differs; a token on the border may fall on either side.
    yield Case("sample", f"{rows} x {vocab}", lambda: Inputs(made), fp32, mismatches=0.02)
    yield Case("probabilities", f"{rows} x {vocab}", lambda: Inputs(made[:5]), fp32)
    yield Case("greedy", f"{rows} x {vocab}", lambda: Inputs(made[:1]), fp32)
    ids = torch.arange(rows) * 13 % vocab
    yield Case("token_logprobs", f"{rows} x {vocab}, 5 rivals", lambda: Inputs((made[0], ids, 5)), fp32)

    def edits() -> Inputs:
        r, c = torch.arange(rows), torch.arange(rows) * 17 % vocab
        penalties = Penalties(r, c, torch.full((rows,), 1.3), torch.full((rows,), 0.5))
        marks = LogitEdits(penalties, Bias(r, c + 1, torch.full((rows,), 2.0)), Marks(r, c + 2), Marks(r[:2], c[:2]))
        return Inputs((made[0], marks))

    yield Case("process_logits", f"{rows} x {vocab}", edits, fp32)

    def trees() -> Inputs:
        count, nodes, words = sizes.pick((16, 9, 1000), (2, 5, 50))
        generator = torch.Generator().manual_seed(5)
        target, draft = (torch.randn(count, nodes, words, generator=generator).softmax(-1) for _ in range(2))
        parents = torch.tensor([-1, *(i // 2 for i in range(nodes - 1))]).expand(count, -1).contiguous()
        tokens = torch.randint(words, (count, nodes), generator=generator)
        # Siblings are drawn without replacement: give each its own token.
        tokens = (tokens + torch.arange(nodes)) % words
        seeds = torch.arange(count) + 3
        return Inputs((target, draft, tokens, parents, seeds, torch.zeros_like(seeds), torch.full_like(seeds, 40)))

    yield Case("verify", "trees", trees, fp32, mismatches=0.02)

    def nodes(words: int, children: int) -> Inputs:
        count = sizes.pick(24, 5)
        q = torch.randn(count, words, generator=torch.Generator().manual_seed(6)).softmax(-1)
        numbers = torch.arange(count)
        return Inputs((q, children, numbers + 3, torch.zeros_like(numbers), numbers + 40, numbers % 7))

    # Of an odd vocabulary a node's noise begins within a quad of columns.
    for words, children in ((sizes.pick(10_000, 50), 3), (sizes.pick(10_001, 51), 1)):
        name = f"{children} of {words}"
        yield Case("draw_children", name, partial(nodes, words, children), fp32, mismatches=0.02)
