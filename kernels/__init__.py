"""Tensor ops: a reference for each, faster implementations beside it, and the registry that chooses.

Importing the package registers everything: a module is in one of these lists, or its implementations do not exist.
"""

from __future__ import annotations

import os
from importlib import import_module

import torch

from .registry import Implementation, Kernels, Target, implementations, ops, resolve

REFERENCE = (
    "activation",
    "attention",
    "draft",
    "embedding",
    "fp8",
    "hadamard",
    "int4",
    "int8",
    "kv",
    "kv_formats",
    "linear",
    "low_rank",
    "moe",
    "norm",
    "residual",
    "rope",
    "routing",
    "rows",
    "sampling",
    "verify",
)
CPU = ("activation", "attention", "kv", "linear", "moe", "norm", "rope", "sampling")
NATIVE = (
    "attention",
    "cache",
    "draft",
    "embedding",
    "linear",
    "linear_quantized",
    "linear_w8a8",
    "moe",
    "rows",
    "rowwise",
    "sampling",
    "verify",
)
TRITON: tuple[str, ...] = (
    "activation",
    "attention",
    "draft",
    "edits",
    "greedy",
    "hadamard",
    "kv",
    "linear_codes",
    "linear_int4",
    "linear_int8",
    "logprobs",
    "low_rank",
    "merge_states",
    "moe",
    "norm",
    "rope",
    "rope_kv_write",
    "rows",
    "sampling",
    "verify",
)

for _module in REFERENCE:
    import_module(f".reference.{_module}", __name__)
for _module in CPU:
    import_module(f".cpu.{_module}", __name__)
for _module in NATIVE:
    import_module(f".cpu.native.{_module}", __name__)
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    for _module in TRITON:
        import_module(f".triton.{_module}", __name__)

__all__ = ["Implementation", "Kernels", "Target", "implementations", "ops", "resolve"]
