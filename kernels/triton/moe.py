"""Mixtures of experts in four launches (two more where activations are quantized), none of which waits for the host.

topk_ids ──align──▶ order ──┬───────────────────────┐
x ──(quantize)──▶ gate_up + activation ──(quantize)──▶ down · routed weight ──▶ sum over k ──▶ out
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..packed import PackedWeight, RowFormat, weight_format
from ..reference.int4 import split_block
from ..registry import Target, implements
from .moe_align import align
from .moe_product import down, gate_up, sum_choices
from .rows import quantize_rows
from .specialization import Specialization
from .support import INTERPRETED, on_gpu

_SUM_BLOCK = 1024  # eight bf16 for each of 128 threads


class Experts(NamedTuple):
    """E weights [N, K] of one shape, as moe_product.py multiplies them."""

    product: str
    outputs: int  # N
    inputs: int  # K
    group: int  # inputs per scale, 0 = all
    codes: Tensor  # [E, N, K], or [E, K / 2, N] for int4
    scales: Tensor | None = None  # [E, G, N]
    zeros: Tensor | None = None  # [E, G, N]
    rows: RowFormat | None = None  # what the activations are quantized to
    warpgroups: bool = True  # the card multiplies from shared memory (wgmma, tcgen05), not from registers


class Mixture(NamedTuple):
    gate_up: Experts  # E of [2f, d]
    down: Experts  # E of [d, f]


class Tile(NamedTuple):
    rows: int
    columns: int
    block: int  # of K
    warps: int
    stages: int


def _rows_per_tile(choices: int, num_experts: int, wide: bool) -> int:
    """By the mean number of choices per expert; wide: of fp32 activations, whose products no tensor core makes.

    Up to 16 the weights' bytes are all that counts, and 16 rows are the least that a tensor core takes; above, tiles
    grow as long as what an expert's last tile wastes stays small beside the others.
    """
    mean = choices / num_experts
    return 16 if wide or mean <= 16 else 64 if mean <= 256 else 128


def _tile(experts: Experts, rows: int, wide: bool, sides: int) -> Tile:
    """wide: of fp32 activations, whose products no tensor core makes; sides: 2 where gate and up are made together."""
    if experts.product == "int4":
        block = split_block(experts.group or experts.inputs)
    elif experts.product in ("w8a8", "fp8"):
        block = 128
    else:
        block = next(size for size in (64, 32) if experts.group % size == 0)
    if wide:
        return Tile(rows, 64, block, 4, 2)
    if rows == 16:
        # Narrow tiles make more programs of a decode's few rows; four stages keep enough bytes in flight.
        return Tile(rows, 64, block, 4, 4)
    # The widths that do not spill: what is scaled after each K block is a third accumulator beside those of gate and
    # up, integers pass through one on their way to fp32, and on Ampere registers hold the operands too.
    if experts.warpgroups:
        columns = 64 if sides == 2 and experts.product in ("int4", "fp8", "w8a8") else 128
    else:
        columns = 128 // sides // (2 if experts.product in ("int4", "fp8") else 1)
    # A warp has 16 rows at least, and a thread 64 sums while eight warps can hold them so.
    return Tile(rows, columns, block, min(max(rows // 16, rows * columns * sides // 2048), 8), 3)


def _policy(rows: int) -> str:
    """Of a decode's tiles no two read the same weights; a prompt's do, and find them in L2."""
    return "evict_first" if rows == 16 else ""


def _mixture(x: Tensor, experts: Mixture, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    tokens, k = topk_ids.shape
    choices = tokens * k
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not choices:
        return out.zero_()
    num_experts = experts.gate_up.codes.shape[0]
    wide = x.dtype == torch.float32
    rows = _rows_per_tile(choices, num_experts, wide)
    plan = align(topk_ids.contiguous(), num_experts, rows)
    f, d = experts.down.inputs, experts.down.outputs

    hidden = torch.empty(choices, f, dtype=x.dtype, device=x.device)
    values, value_scales = _operand(x, experts.gate_up)
    tile = _tile(experts.gate_up, rows, wide, sides=2)
    gate_up[(plan.max_tiles * triton.cdiv(f, tile.columns),)](
        values,
        value_scales,
        experts.gate_up.codes,
        experts.gate_up.scales,
        experts.gate_up.zeros,
        hidden,
        plan.order,
        plan.experts,
        plan.tiles,
        choices,
        k,
        plan.max_tiles * rows,
        f,
        experts.gate_up.inputs,
        values.stride(0),
        ACTIVATION=activation,
        **_common(experts.gate_up, value_scales, tile),
    )

    values, value_scales = _operand(hidden, experts.down)
    parts = out if k == 1 else torch.empty(choices, d, dtype=x.dtype, device=x.device)
    tile = _tile(experts.down, rows, wide, sides=1)
    down[(plan.max_tiles * triton.cdiv(d, tile.columns),)](
        values,
        value_scales,
        experts.down.codes,
        experts.down.scales,
        experts.down.zeros,
        parts,
        topk_weights.contiguous(),
        plan.order,
        plan.experts,
        plan.tiles,
        choices,
        plan.max_tiles * rows,
        d,
        f,
        values.stride(0),
        **_common(experts.down, value_scales, tile),
    )
    if k > 1:
        sum_choices[(tokens, triton.cdiv(d, _SUM_BLOCK))](parts, out, d, k, BLOCK=_SUM_BLOCK)
    return out


def _operand(x: Tensor, experts: Experts) -> tuple[Tensor, Tensor | None]:
    """The rows that a product reads and their scales [rows, G]."""
    if experts.rows is None:
        return x, None
    rows = quantize_rows(x, experts.rows)
    return rows.codes, rows.scales


def _common(experts: Experts, row_scales: Tensor | None, tile: Tile) -> dict[str, Any]:
    """The arguments that both products take alike."""
    return {
        "x_groups": 1 if row_scales is None else row_scales.shape[1],
        "groups": 1 if experts.scales is None else experts.scales.shape[1],
        "expert_codes": experts.codes[0].numel(),
        "PRODUCT": experts.product,
        "GROUP": experts.group,
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.block,
        "EVICT": _policy(tile.rows),
        "INTERPRETED": INTERPRETED,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def prepare_moe(gate_up: Tensor, down: Tensor) -> Mixture:
    """Once per layer: gate_up [E, 2f, d] with the gate in the first f rows, down [E, d, f]."""
    has = _warpgroups(gate_up.device)
    return Mixture(
        *(Experts("plain", w.shape[1], w.shape[2], 0, w.contiguous(), warpgroups=has) for w in (gate_up, down))
    )


def _prepare_packed(gate_up: PackedWeight, down: PackedWeight) -> Mixture:
    """Once per layer: E weights [2f, d] with the gate in the first f outputs, and E of [d, f]."""
    return Mixture(_experts(gate_up), _experts(down))


def _experts(weight: PackedWeight) -> Experts:
    return Experts(
        "fp8" if weight.format == "fp8_block" else weight.format,
        weight.outputs,
        weight.inputs,
        0 if weight.group == weight.inputs else weight.group,
        weight.codes.contiguous(),
        weight.scales.contiguous(),
        None if weight.zeros is None else weight.zeros.contiguous(),
        weight_format(weight.format).rows(weight),
        _warpgroups(weight.codes.device),
    )


def _warpgroups(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _with_fp8(target: Target) -> str | None:
    if target.device == "cuda" and target.capability < (8, 9):
        return f"float8 needs a GPU of capability 8.9, this one has {target.capability[0]}.{target.capability[1]}"
    return on_gpu(target)


@implements("moe", "triton", when=on_gpu, prepare=prepare_moe)
def moe(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    """See the reference. What the gate makes is rounded to x's dtype, as is a choice's weighed result.

    A token's bits depend on the others only by the size of the tiles, which grows with choices per expert.
    """
    return _mixture(x, packed, topk_weights, topk_ids, activation)


@implements("moe_int4", "triton", when=on_gpu, prepare=_prepare_packed)
def moe_int4(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    """See the reference, and `moe`."""
    return _mixture(x, packed, topk_weights, topk_ids, activation)


@implements("moe_int8", "triton", when=on_gpu, prepare=_prepare_packed)
def moe_int8(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    """See the reference, and `moe`."""
    return _mixture(x, packed, topk_weights, topk_ids, activation)


@implements("moe_w8a8", "triton", when=on_gpu, prepare=_prepare_packed)
def moe_w8a8(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    """See the reference, and `moe`."""
    return _mixture(x, packed, topk_weights, topk_ids, activation)


@implements("moe_fp8", "triton", when=_with_fp8, prepare=_prepare_packed)
def moe_fp8(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    """See the reference, and `moe`."""
    return _mixture(x, packed, topk_weights, topk_ids, activation)


@implements("moe_fp8_block", "triton", when=_with_fp8, prepare=_prepare_packed)
def moe_fp8_block(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    """See the reference, and `moe`."""
    return _mixture(x, packed, topk_weights, topk_ids, activation)


class _Form(NamedTuple):
    """The types of one format's arguments."""

    name: str
    product: str
    group: int
    x: str
    codes: str
    scales: str | None = "*fp32:16"
    zeros: str | None = None


_FORMS = (
    _Form("bf16", "plain", 0, "*bf16:16", "*bf16:16", scales=None),
    _Form("int4", "int4", 128, "*bf16:16", "*u8:16", "*fp16:16", "*u8:16"),
    _Form("int8", "int8", 0, "*bf16:16", "*i8:16"),
    _Form("w8a8", "w8a8", 0, "*i8:16", "*i8:16"),
    _Form("fp8", "fp8", 0, "*fp8e4nv:16", "*fp8e4nv:16"),
    _Form("fp8_block", "fp8", 128, "*fp8e4nv:16", "*fp8e4nv:16"),
)


def specializations() -> list[Specialization]:
    """The forms that are compiled ahead of time: both products in every format, for decodes and for prompts."""
    products = ((gate_up, 2, {"k": "i32", "f": "i32:16"}), (down, 1, {"N": "i32:16", "shares": "*fp32:16"}))
    forms = [
        _specialization(kernel, sides, arguments, form, rows, arches)
        for form in _FORMS
        for rows in (16, 64, 128)
        for arches in ((80,), (90, 100))
        for kernel, sides, arguments in products
        if (rows != 64 or form.name in ("bf16", "int4")) and (form.product != "fp8" or arches != (80,))
    ]
    signature = {"parts": "*bf16:16", "out": "*bf16:16", "d": "i32:16", "k": "i32"}
    summing = Specialization("sum_choices", sum_choices, signature, {"BLOCK": _SUM_BLOCK}, needs=("wide",))
    return [*forms, summing]


def _specialization(
    kernel: Any, sides: int, arguments: dict[str, str], form: _Form, rows: int, arches: tuple[int, ...]
) -> Specialization:
    experts = Experts(form.product, 4096, 4096, form.group, torch.empty(1, 0), warpgroups=arches != (80,))
    constants = _common(experts, None, _tile(experts, rows, False, sides)) | {"INTERPRETED": False}
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    signature = {"x": form.x, "codes": form.codes, "out": "*bf16:16", "choices": "i32"}
    signature |= dict.fromkeys(("order", "owners", "tiles"), "*i32:16")
    signature |= dict.fromkeys(("max_rows", "K", "x_stride", "expert_codes"), "i32:16")
    signature |= arguments
    if kernel is gate_up:
        constants["ACTIVATION"] = "silu"
    optional = {"scales": form.scales, "zeros": form.zeros, "x_scales": None if form.x == "*bf16:16" else "*fp32:16"}
    for name, kind in optional.items():
        if kind is None:
            constants[name] = None
        else:
            signature[name] = kind
    if form.group:
        signature |= {"x_groups": "i32", "groups": "i32"}
    return Specialization(
        name=f"{kernel.__name__}/{form.name}/m{rows}{'/ampere' if arches == (80,) else ''}",
        kernel=kernel,
        signature=signature,
        constexprs={name: value for name, value in constants.items() if name not in signature},
        num_warps=warps,
        num_stages=stages,
        arches=arches,
        needs=("mma", "wide"),
    )
