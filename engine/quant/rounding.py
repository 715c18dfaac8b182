"""Quantizing a float checkpoint while it is loaded: which format, and one matrix at a time.

--quantization int4          the format's usual group
--quantization int4:32       another one
"""

from __future__ import annotations

from torch import Tensor

from ...kernels.packed import PackedWeight, join_rows, stack_experts, weight_format, weight_formats
from ..errors import EngineStartError
from .scheme import Packing, Scheme

# Weights that are rounded at once. Four bits hold about five fp32 copies of them: 20 MB, which stays small beside the
# matrices themselves. Blocks of 128 rows are never torn.
SLAB = 1 << 20
ROWS = 128


def parse_quantization(wish: str) -> Packing:
    """ "int4" or "int4:32". EngineStartError for an unknown format or a group that is no number."""
    name, colon, group = wish.partition(":")
    if name not in weight_formats():
        raise EngineStartError(
            f"quantization is {wish!r}; choose {', '.join(weight_formats())} (the model's checkpoint is not quantized)"
        )
    if colon and not group.isdecimal():
        raise EngineStartError(f"quantization is {wish!r}; the group must be a number of inputs, such as {name}:32")
    form = weight_format(name)
    return Packing(name, int(group) if colon else form.group, form.scale_bytes, form.zeros)


def choose_rounding(wish: str | None, scheme: Scheme | None) -> Packing | None:
    """What floats become on the way in; None = they stay, or the checkpoint is quantized already.

    EngineStartError for a wish that the checkpoint's own quantization is not.
    """
    if wish is None:
        return None
    if scheme is None:
        return parse_quantization(wish)
    if wish == scheme.method or scheme.formats == (wish,):
        return None
    raise EngineStartError(
        f"quantization is {wish!r}, but the checkpoint is quantized already ({scheme.method}: "
        f"{', '.join(scheme.formats)}); leave the option out, or give the unquantized model"
    )


def round_weight(weight: Tensor, packing: Packing) -> PackedWeight:
    """weight [(E,) N, K] floating point, to nearest, some rows at a time. Its shape is one that the packing takes."""
    if weight.dim() == 3:
        return stack_experts([round_weight(expert, packing) for expert in weight])
    quantize = weight_format(packing.format).quantize
    rows = max(SLAB // weight.shape[1] // ROWS, 1) * ROWS
    return join_rows([quantize(slab.float(), packing.group) for slab in weight.split(rows)])


def refuses_gpu(name: str, capability: tuple[int, int]) -> str | None:
    """Why a GPU of this capability cannot multiply weights of a format; None = it can.

    capability: as (9, 0) for an H100; (0, 0) where there is no GPU.
    """
    form = weight_format(name)
    if capability == (0, 0) or capability >= form.capability:
        return None
    fitting = [other for other in weight_formats() if capability >= weight_format(other).capability]
    needed, there = (".".join(map(str, version)) for version in (form.capability, capability))
    return f"{name} weights need a GPU of capability {needed} ({form.gpu}) or later, this one has {there}; " + (
        f"use {' or '.join(fitting)}" if fitting else "use unquantized weights"
    )
