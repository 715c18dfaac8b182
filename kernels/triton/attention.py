"""Attention over pages on the GPU: what is launched for a step, and with which tiles.

sequences [0, short_seqs)  ─▶ short: split over the keys ─▶ reduce, where a sequence may be split ─┐
the rest                   ─▶ long: large tiles of queries ────────────────────────────────────────┴▶ o, lse
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import SHORT_ROWS, LayerKV, RaggedBatch
from ..registry import implements
from .attention_long import long, num_tiles
from .attention_shared import SharedPlan, plan_shared, shared
from .attention_short import NARROW, most_segments, reduce, short
from .attention_tile import LOG2_E, Form
from .hadamard import hadamard
from .kv_pages import E4M3, E4M3_BITS, INT4, INT8, PLAIN, Pages, describe
from .specialization import ARCHES, Specialization
from .support import INTERPRETED, on_gpu

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class AttentionPlan(NamedTuple):
    batch: RaggedBatch
    window: int | None
    shared: SharedPlan | None


class Tile(NamedTuple):
    """How a launch is shaped: keys of a tile, warps, and stages of the loads' pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# Of five stages two are for the block table and two for what it leads to: two tiles of keys and values are under way
# while one is computed with, in each of three or four blocks per multiprocessor.
_STAGES = 5


def short_tiles(pages: Pages, group: int, arch: int, dtype: tl.dtype) -> tuple[Tile, Tile | None]:
    """For few rows, which are bound by the bytes of the cache: for up to NARROW queries, and for more (None: never).

    The larger one is as large for two rows as for SHORT_ROWS: what a row is summed with must not change its bits.
    Twice its keys would not leave the registers for codes on their way to numbers.
    """
    if _is_exact(dtype):
        return Tile(NARROW.value, 32, 4, 3), Tile(32, 32, 4, 3)
    # As many bytes under way as registers allow: 16 KiB of keys or values a tile, a quarter of that for int8.
    keys = {INT8.value: 32, INT4.value: 128}.get(pages.coding, 64) if pages.columns <= 128 else 32
    narrow = Tile(NARROW.value, keys, 4, _STAGES)
    most = SHORT_ROWS * group
    if most <= NARROW.value:
        return narrow, None
    widest = 64 if pages.columns <= 128 and _is_large(arch) else 32
    return narrow, Tile(min(widest, triton.next_power_of_2(most)), 32, 4, _STAGES)


def long_tile(pages: Pages, arch: int, dtype: tl.dtype) -> Tile:
    """For many rows, which are bound by matrix products and exponentials: the largest that needs no local memory."""
    if _is_exact(dtype):
        return Tile(64, 32, 8, 3)
    plain = pages.coding == PLAIN.value and pages.columns <= 128
    if not _is_large(arch):
        if not plain:
            return Tile(64, 32, 8, _STAGES)
        return Tile(128, 64 if pages.columns <= 64 else 32, 8, _STAGES)
    wide = plain and not (arch >= 100 and pages.columns <= 64)
    return Tile(128, 64 if wide else 32, 8, _STAGES)


def _is_exact(dtype: tl.dtype) -> bool:
    """fp32 on a GPU: for checks. Its tiles take twice the memory, and no tensor core multiplies it."""
    return dtype == tl.float32 and not INTERPRETED


def _is_large(arch: int) -> bool:
    """H100, B200: 227 KiB of shared memory, and matrix products whose operands stay there instead of in registers."""
    return arch // 10 in (9, 10)


@functools.cache
def arch_of(device: torch.device) -> int:
    """Compute capability times ten; the interpreter goes by the tiles of an H100."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def prepare_attention(batch: RaggedBatch, block_size: int, window: int | None) -> AttentionPlan:
    """Once per step and window size; see the reference for what the window means. Nothing is read from the device.

    Groups with a window are not looked for: of a prefix long enough to be shared, few keys lie within a usual one.
    A step that is captured in a graph has no groups: `batch.shared` is of one step alone.
    """
    return AttentionPlan(batch, window, plan_shared(batch, block_size) if window is None else None)


@implements("attention", "triton", when=on_gpu, prepare=prepare_attention)
def attention(
    q: Tensor, cache: LayerKV, plan: Any, scale: float, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See the reference; attention_shared.py has when a row's rounding depends on others. scale > 0.

    q may be a slice of a wider row; entries of a head are neighbours.

    Every row is of some sequence (T = cu_q[S]): padding rows are those of sequences without keys.
    """
    if not scale > 0:
        raise ValueError(f"attention's scale is {scale}; it must be positive")
    batch = plan.batch
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if not batch.num_tokens:
        return out, lse
    if cache.spec.coding.rotates_keys:
        q = hadamard(q)
    if q.stride(2) != 1:
        q = q.contiguous()
    pages, k, v = describe(cache, arch_of(q.device))
    step = Step(
        plan,
        form(pages, q.shape[1], product_dtype(q, k, pages), bool(softcap), sinks is not None, plan),
        (q, k, v, cache.k_scale, cache.v_scale, sinks, out, lse),
        # to scores in base 2, or to those over the softcap, which is then given in base 2
        (scale / softcap, softcap * LOG2_E.value) if softcap else (scale * LOG2_E.value, 0.0),
    )
    if batch.short_seqs:
        _launch_short(step)
    if batch.short_seqs < batch.num_seqs:
        _launch_long(step)
    return out, lse


class Step(NamedTuple):
    """The arguments that the launches of one layer share."""

    plan: AttentionPlan
    form: Form
    tensors: tuple[Tensor | None, ...]  # q, k and v pages, k and v scales, sinks, out, lse
    factors: tuple[float, float]  # `factor` and `softcap` of the kernels


def form(pages: Pages, q_heads: int, dtype: tl.dtype, softcap: bool, sinks: bool, plan: AttentionPlan) -> Form:
    """The form of a layer; the tiles are each launch's own."""
    tree = plan.batch.tree_mask is not None
    return Form(pages, q_heads, 0, 0, dtype, softcap, sinks, tree, plan.window is not None)


def tiled(form: Form, tile: Tile) -> Form:
    return replace(form, block_m=tile.block_m, block_n=tile.block_n)


def product_dtype(q: Tensor, k: Tensor, pages: Pages) -> tl.dtype:
    """Codes are exact in any dtype that q may have, plain keys in the wider of the two."""
    if INTERPRETED:
        return tl.float32
    return _DTYPES[torch.promote_types(q.dtype, k.dtype) if pages.coding == PLAIN.value else q.dtype]


def _launch_short(step: Step) -> None:
    plan = step.plan
    batch, window = plan.batch, plan.window
    q, *_, sinks, out, lse = step.tensors
    rows = min(batch.max_q, SHORT_ROWS)
    narrow, wide = short_tiles(step.form.pages, step.form.group, arch_of(q.device), step.form.dtype)
    if rows * step.form.group <= NARROW.value:
        wide = None
    form = tiled(step.form, narrow)
    tiles = triton.cdiv(rows * form.group, wide.block_m) if wide else 1
    parts = most_segments(batch.max_seq_len if window is None else min(batch.max_seq_len, window + rows - 1))
    if plan.shared:
        parts += plan.shared.most_segments
    states = min(batch.num_tokens, batch.short_seqs * rows) * form.q_heads * parts if parts > 1 else 0
    part = tuple(
        torch.empty(states * width, dtype=torch.float32, device=q.device) for width in (form.pages.head_dim, 1, 1)
    )
    shared_keys = None
    if plan.shared:
        shared_keys = plan.shared.shared_keys
        _launch_shared(step, plan.shared, part, parts)
    short[(form.pages.kv_heads * tiles, parts, batch.short_seqs)](
        *step.tensors,
        *part,
        batch.cu_q,
        batch.seq_lens,
        batch.positions,
        batch.tree_mask,
        batch.block_table,
        shared_keys,
        q.stride(0),
        q.stride(1),
        batch.block_table.stride(0),
        window or 0,
        *step.factors,
        parts,
        tiles,
        form,
        tiled(form, wide) if wide else None,
        plan.shared is not None,
        num_warps=narrow.warps,
        num_stages=narrow.stages,
    )
    if parts > 1:
        reduce[(form.q_heads, rows, batch.short_seqs)](
            sinks,
            out,
            lse,
            *part,
            batch.cu_q,
            batch.seq_lens,
            shared_keys,
            window or 0,
            parts,
            form,
            plan.shared is not None,
            num_warps=4,
        )


def _launch_shared(step: Step, groups: SharedPlan, part: tuple[Tensor, ...], parts: int) -> None:
    batch = step.plan.batch
    q, k, v, k_scale, v_scale, *_ = step.tensors
    tile = long_tile(step.form.pages, arch_of(q.device), step.form.dtype)
    form = replace(tiled(step.form, tile), tree=False)
    tiles = num_tiles(len(groups.rows), groups.num_groups, form.group, tile.block_m)
    shared[(form.pages.kv_heads, tiles, groups.most_segments)](
        q,
        k,
        v,
        k_scale,
        v_scale,
        *part,
        groups.shared_keys,
        groups.rows,
        groups.cu_rows,
        groups.seqs,
        batch.block_table,
        q.stride(0),
        q.stride(1),
        batch.block_table.stride(0),
        *step.factors,
        parts,
        groups.num_groups,
        form,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _launch_long(step: Step) -> None:
    batch = step.plan.batch
    q = step.tensors[0]
    tile = long_tile(step.form.pages, arch_of(q.device), step.form.dtype)
    form = tiled(step.form, tile)
    tiles = num_tiles(batch.num_tokens, batch.num_seqs - batch.short_seqs, form.group, tile.block_m)
    long[(form.pages.kv_heads, tiles)](
        *step.tensors,
        batch.cu_q,
        batch.seq_lens,
        batch.positions,
        batch.tree_mask,
        batch.block_table,
        q.stride(0),
        q.stride(1),
        batch.block_table.stride(0),
        step.plan.window or 0,
        *step.factors,
        batch.short_seqs,
        batch.num_seqs,
        form,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def specializations() -> list[Specialization]:
    """Decodes, verifications and prompts of the usual heads and formats."""
    bf16 = "*bf16:16"
    codes = {PLAIN: bf16, E4M3: "*fp8e4nv:16", E4M3_BITS: "*u8:16", INT8: "*i8:16", INT4: "*u8:16"}
    arches = {E4M3: (90, 100), E4M3_BITS: (80,)}

    def types(coding: tl.constexpr) -> dict[str, str]:
        scale = {PLAIN: None, E4M3: "*fp32:16", E4M3_BITS: "*fp32:16"}.get(coding, "*fp16:16")
        scales = {} if scale is None else {"k_scales": scale, "v_scales": scale}
        ints = dict.fromkeys(("cu_q", "seq_lens", "block_table"), "*i32:16") | {"positions": "*i64:16"}
        strides = {"q_row_stride": "i32:16", "q_head_stride": "i32:16", "table_stride": "i32"}
        return (
            {"q": bf16, "k_pages": codes[coding], "v_pages": codes[coding], "out": bf16, "lse": "*fp32:16"}
            | scales
            | ints
            | strides
            | {"window": "i32", "factor": "fp32", "softcap": "fp32"}
        )

    result = []

    def listed(
        name: str, kernel: Any, coding: tl.constexpr, arch: int, tile: Tile, more: dict[str, str], **constexprs: Any
    ) -> None:
        given = {"k_scales": None, "v_scales": None, "sinks": None, "tree_mask": None, "shared_keys": None} | constexprs
        needs = ("mma", "wide")
        if kernel is long and coding is INT4:  # 32 keys of four bits are 8 bytes for each of 256 threads
            needs = ("mma",)
        elif kernel is reduce:
            needs = ("wide",)
        signature = {k: v for k, v in (types(coding) | more).items() if k in kernel.arg_names}
        result.append(
            Specialization(
                name=f"{name}/sm{arch}",
                kernel=kernel,
                signature=signature,
                constexprs={k: v for k, v in given.items() if k in kernel.arg_names and k not in signature},
                num_warps=tile.warps,
                num_stages=tile.stages,
                arches=(arch,),
                needs=needs,
            )
        )

    parts = {"part_acc": "*fp32:16", "part_m": "*fp32:16", "part_l": "*fp32:16", "parts": "i32", "tiles": "i32"}
    for head_dim, coding, name in (
        (64, PLAIN, "d64/plain"),
        (128, PLAIN, "d128/plain"),
        (256, PLAIN, "d256/plain"),
        (128, E4M3, "d128/fp8"),
        (128, E4M3_BITS, "d128/fp8-bytes"),
        (128, INT8, "d128/int8"),
        (128, INT4, "d128/int4"),
    ):
        pages = Pages(coding.value, 8, head_dim, 16)
        form = Form(pages, 32, 0, 0, tl.bfloat16, False, False, False, False)
        for arch in arches.get(coding, ARCHES):
            narrow, wide = short_tiles(pages, form.group, arch, form.dtype)
            for rows, larger in ((1, None), (SHORT_ROWS, wide)):
                given = {"FORM": tiled(form, narrow), "WIDE": tiled(form, larger) if larger else None, "SHARED": False}
                listed(f"short/{name}/{rows}", short, coding, arch, narrow, parts, **given)
            tile = long_tile(pages, arch, form.dtype)
            given = {"FORM": tiled(form, tile)}
            listed(f"long/{name}", long, coding, arch, tile, dict.fromkeys(("short_seqs", "num_seqs"), "i32"), **given)
            if name == "d128/plain":
                listed(f"reduce/{name}", reduce, coding, arch, Tile(1, 1, 4, 3), parts, **given, SHARED=False)
                groups = dict.fromkeys(("shared_keys", "rows", "cu_rows", "seqs"), "*i32:16") | {"num_groups": "i32"}
                listed(f"shared/{name}", shared, coding, arch, tile, parts | groups, **given)
    return result
