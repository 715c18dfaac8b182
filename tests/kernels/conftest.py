"""Fixtures for the compiled kernels, and Triton's interpreter without its largest cost."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from quire.kernels.cpu.native import library


@pytest.fixture(params=library.levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor has, in turn."""
    library.use_level(library.levels().index(request.param))
    yield request.param
    library.use_level(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# Triton's interpreter searches all of triton.language anew at every inner call. A kernel that is launched gets the
# language's functions replaced by interpreted ones; each call of an inner function (tl.sum is one) asks for the same
# replacement again, which finds nothing to do and took more than half of a test's time. It is needed once per module
# that an inner function lives in.
if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    _replaced: set[str] = set()

    def _call(self: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        if self.fn.__module__ not in _replaced:
            interpreter._patch_lang(self.fn)
            _replaced.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call
