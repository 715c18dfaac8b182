"""Tensor ops: a reference for each, faster implementations beside it, and the registry that chooses.

Importing the package registers everything: a module is in one of these lists, or its implementations do not exist.
"""

from __future__ import annotations

from importlib import import_module

from .registry import Implementation, Kernels, Target, implementations, ops, resolve

REFERENCE = ("activation", "attention", "kv", "linear", "moe", "norm", "rope", "sampling", "verify")
CPU = ("activation", "attention", "kv", "linear", "moe", "norm", "rope", "sampling")
NATIVE = ("attention", "linear", "rowwise")

for _module in REFERENCE:
    import_module(f".reference.{_module}", __name__)
for _module in CPU:
    import_module(f".cpu.{_module}", __name__)
for _module in NATIVE:
    import_module(f".cpu.native.{_module}", __name__)

__all__ = ["Implementation", "Kernels", "Target", "implementations", "ops", "resolve"]
