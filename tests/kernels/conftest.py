"""Triton's interpreter without its largest cost: it searches all of triton.language anew at every inner call.

A kernel that is launched gets the language's functions replaced by interpreted ones. Each call of an inner function
(tl.sum is one) asks for the same replacement again, which finds nothing to do and took more than half of a test's time.
It is needed once per module that an inner function lives in.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    _replaced: set[str] = set()

    def _call(self: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        if self.fn.__module__ not in _replaced:
            interpreter._patch_lang(self.fn)
            _replaced.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call
