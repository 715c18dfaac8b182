"""Which function computes an op on this machine: declared by references, chosen once, frozen.

    @op            reference function  ──┐
    @implements    cpu, triton, ...    ──┴─▶ resolve(target, overrides) ─▶ Kernels ─▶ layers call kernels.<op>.run(...)

The reference *is* the op: its signature is the schema, its docstring the contract, its result the test oracle.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch

Fn = TypeVar("Fn", bound=Callable[..., Any])

# By device, the first usable one is taken. On a CPU, Triton is an interpreter: a check by name, never a choice.
PREFERENCE = {"cuda": ("triton", "reference"), "cpu": ("native", "cpu", "reference", "triton")}


@dataclass(frozen=True, slots=True)
class Target:
    """What an implementation may depend on: the device type, the activations' dtype, the head size, the KV format.

    capability: of the GPU, as (9, 0) for an H100; (0, 0) where there is none.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    kv_format: str
    capability: tuple[int, int] = (0, 0)


When = Callable[[Target], str | None]  # None = usable, else the reason why not


def always(target: Target) -> str | None:
    """The predicate of an implementation that runs everywhere."""
    return None


def on(device: str) -> When:
    """The predicate of an implementation that runs on one kind of device."""
    return lambda target: None if target.device == device else f"runs on {device}, the target is {target.device}"


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute an op.

    prepare does what is done once per weight or once per step; its result takes the place of the raw argument in run.
    """

    op: str
    name: str
    run: Callable[..., Any]
    prepare: Any  # a function, or None where the op has nothing to prepare
    when: When


_OPS: dict[str, dict[str, Implementation]] = {}


@overload
def op(reference: Fn) -> Fn: ...


@overload
def op(*, prepare: Callable[..., Any]) -> Callable[[Fn], Fn]: ...


def op(reference: Fn | None = None, *, prepare: Callable[..., Any] | None = None) -> Any:
    """Declare an op by its reference function; the op's name is the function's."""

    def declare(function: Fn) -> Fn:
        name = function.__name__
        if name in _OPS:
            raise ValueError(f"op {name!r} is declared twice")
        _OPS[name] = {"reference": Implementation(name, "reference", function, prepare, always)}
        return function

    return declare if reference is None else declare(reference)


def implements(op_name: str, name: str, *, when: When, prepare: Callable[..., Any] | None = None) -> Callable[[Fn], Fn]:
    """Register another implementation of a declared op; its signature must equal the reference's."""

    def register(function: Fn) -> Fn:
        known = implementations(op_name)
        reference = known["reference"]
        if name in known:
            raise ValueError(f"op {op_name!r} has two implementations named {name!r}")
        if name not in PREFERENCE["cpu"]:
            raise ValueError(f"{op_name}/{name}: no rank among {', '.join(PREFERENCE['cpu'])}")
        _check_signature(f"{op_name}/{name}", function, reference.run)
        if (prepare is None) != (reference.prepare is None):
            raise ValueError(f"{op_name}/{name}: prepare must be given exactly where the reference has one")
        if prepare is not None and reference.prepare is not None:
            _check_signature(f"{op_name}/{name} prepare", prepare, reference.prepare)
        known[name] = Implementation(op_name, name, function, prepare, when)
        return function

    return register


def _check_signature(what: str, function: Callable[..., Any], reference: Callable[..., Any]) -> None:
    theirs, ours = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()] for f in (function, reference)
    )
    if theirs != ours:
        raise ValueError(f"{what}: signature {inspect.signature(function)} differs from {inspect.signature(reference)}")


def ops() -> tuple[str, ...]:
    """The names of all declared ops."""
    return tuple(sorted(_OPS))


def implementations(op_name: str) -> dict[str, Implementation]:
    """Every registered implementation of one op, by name."""
    if op_name not in _OPS:
        raise ValueError(f"unknown op {op_name!r}; choose from {', '.join(ops())}")
    return _OPS[op_name]


class Kernels:
    """The resolved table: one attribute per op, an `Implementation`. Immutable."""

    _table: dict[str, Implementation]
    _reasons: dict[str, dict[str, str]]

    def __init__(self, table: Mapping[str, Implementation], reasons: Mapping[str, Mapping[str, str]]) -> None:
        # Plain attributes, so that kernels.<op> in a layer costs one dictionary look-up.
        self.__dict__.update(table)
        self.__dict__["_table"] = dict(table)
        self.__dict__["_reasons"] = {name: dict(why) for name, why in reasons.items()}

    def __getattr__(self, name: str) -> Implementation:
        raise AttributeError(f"no op {name!r}; there are {', '.join(self.__dict__.get('_table', ()))}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("the table of kernels is resolved once and never changed; resolve() a new one")

    def describe(self) -> dict[str, str]:
        """{op: the implementation taken}"""
        return {name: implementation.name for name, implementation in self._table.items()}

    def reasons(self) -> dict[str, dict[str, str]]:
        """{op: {implementation: why it was not taken}}, for ops that have more than one."""
        return {name: dict(why) for name, why in self._reasons.items() if why}


def resolve(target: Target, overrides: Mapping[str, str] | None = None) -> Kernels:
    """Choose one implementation per op: the override where there is one, else the first usable one by PREFERENCE.

    ValueError for an unknown op or implementation (with the choices), and for an override the target cannot run.
    """
    overrides = overrides or {}
    for name in overrides:
        implementations(name)
    table: dict[str, Implementation] = {}
    reasons: dict[str, dict[str, str]] = {}
    for name in ops():
        table[name], reasons[name] = _choose(name, target, overrides.get(name))
    return Kernels(table, reasons)


def _choose(name: str, target: Target, wish: str | None) -> tuple[Implementation, dict[str, str]]:
    candidates = implementations(name)
    if wish is not None and wish not in candidates:
        raise ValueError(f"op {name!r} has no implementation {wish!r}; choose from {', '.join(candidates)}")
    refusals = {c.name: why for c in candidates.values() if (why := c.when(target)) is not None}
    if wish in refusals:
        raise ValueError(f"implementation {wish!r} of op {name!r} cannot be used: {refusals[wish]}")
    taken = wish or next(n for n in PREFERENCE[target.device] if n in candidates and n not in refusals)
    passed_over = f"{'overridden by' if wish else 'less preferred than'} {taken}"
    return candidates[taken], {n: refusals.get(n, passed_over) for n in candidates if n != taken}
