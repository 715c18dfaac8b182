"""Acceptance heads from files, and that of SpecDec++ (arXiv 2405.19715): how likely the target accepts a guess.

    x = final hidden state where the guess Y is the input     D times: x += SiLU(W x + b)     a(Y) = softmax(V x + c)[1]

A chain stops once 1 - a(Y_1) · a(Y_2) · ... exceeds the threshold: some guess is likely rejected. As Y must be the
input, the pass that judges it draws the next guess already; that one is kept. Whether to go on so depends on nothing
but what was drawn before, and the output keeps its distribution.

A head is a file beside its draft model's weights, in one of three layouts:

    hidden.weight, hidden.bias, out.weight, out.bias                                  judges at once: confidence.py
    blocks.{i}.weight [d, d], blocks.{i}.bias [d], out.weight [2, d], out.bias [2]    of SpecDec++
    model.{i}.linear.weight, model.{i}.linear.bias, model.{D}.weight, model.{D}.bias  the same, as it was published

The published blocks are one module D times, and a safetensors file holds it once, as block 0. The others may, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import linear, silu

from ...kernels import Kernels
from ..errors import EngineStartError
from ..linear import Linear, make_linear
from .confidence import Confidence, Drawn, confidence_of

PAPER_THRESHOLD = 0.7  # the paper's choice for all of its tasks (section 4), for files that carry none
MAX_BLOCKS = 64  # the paper's have up to 4; bounds what a broken file may ask for

_OUT = re.compile(r"out|model\.\d+")


class Dense(NamedTuple):
    weight: Tensor
    bias: Tensor


class AcceptanceHead(NamedTuple):
    """threshold: of the probability that some guess is rejected. product: of rows with a dense layer."""

    blocks: tuple[Dense | Linear, ...]
    out: Dense | Linear
    threshold: float
    dtype: torch.dtype = torch.float32
    product: Callable[[Tensor, Any], Tensor] = lambda x, dense: linear(x, *dense)

    late: ClassVar[bool] = True  # it judges what a pass consumed, not what it drew

    def acceptance(self, drawn: Drawn) -> Tensor:
        """Of the tokens that are the inputs of these final hidden states: probabilities [R] float32."""
        x = drawn.hidden.to(self.dtype)
        for block in self.blocks:
            x = x + silu(self.product(x, block))
        return self.product(x, self.out).float().softmax(dim=-1)[:, 1]

    def least(self, asked: float) -> float:
        """Below which probability of all guesses a chain ends: the file's own. Its probabilities need not be true ones,
        and only the threshold that it was tuned with goes with them."""
        return 1 - self.threshold

    def on(self, kernels: Kernels) -> AcceptanceHead:
        """The same by a table of kernels.

        Torch's products leave threads that wait for more by spinning, on cores that the target's kernels compute on:
        with them a pass of the bundled draft took 2.7 ms on two cores, with the kernels' own 0.7.
        """
        layers = [
            make_linear(kernels, *dense) if isinstance(dense, Dense) else dense for dense in (*self.blocks, self.out)
        ]
        return self._replace(blocks=tuple(layers[:-1]), out=layers[-1], product=lambda x, layer: layer(x))


def head_path(folder: Path, width: int | None = None) -> Path:
    """Where a model's head is, if it has one. width: of a nested draft, whose head lies beside its target."""
    return folder / ("acceptance_head.safetensors" if width is None else f"acceptance_head_ffn{width}.safetensors")


def load_head(path: Path, hidden: int, dtype: torch.dtype, device: torch.device) -> AcceptanceHead | Confidence:
    """The head in a file, for a draft model whose hidden states have this size.

    Raises EngineStartError naming the tensor or the value, and what it should be.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise EngineStartError(f"{path} is not a whole safetensors file ({error}); make or download it again") from None
    if "hidden.weight" in tensors:
        return confidence_of(path, tensors, device)
    depth, prefix, out = _layout(path, tensors, metadata)

    def dense(name: str, outputs: int) -> Dense:
        parts = []
        for suffix, shape in (("weight", (outputs, hidden)), ("bias", (outputs,))):
            tensor = tensors.pop(f"{name}.{suffix}", None)
            if tensor is None:
                raise EngineStartError(f"{path}: tensor {name}.{suffix} is missing; make or download the head again")
            if tuple(tensor.shape) != shape:
                raise EngineStartError(
                    f"{path}: tensor {name}.{suffix} has shape {list(tensor.shape)}, the draft model's hidden size "
                    f"asks for {list(shape)}; take a head that was trained for this draft model"
                )
            parts.append(tensor.to(device, dtype, copy=True))
        return Dense(*parts)

    names = [prefix.format(i) for i in range(depth)]
    if depth > 1 and not any(f"{name}.weight" in tensors for name in names[1:]):
        blocks = (dense(names[0], hidden),) * depth
    else:
        blocks = tuple(dense(name, hidden) for name in names)
    head = AcceptanceHead(blocks, dense(out, 2), _threshold(path, metadata), dtype)
    if tensors:
        raise EngineStartError(f"{path}: {min(tensors)} belongs to no acceptance head of {depth} blocks")
    return head


def _layout(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[int, str, str]:
    """How many blocks there are, the name of the i-th, and that of the last linear."""
    outs = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    outs = [name for name in outs if _OUT.fullmatch(name)]
    if len(outs) != 1:
        raise EngineStartError(
            f"{path}: an acceptance head has one last linear, out.weight or model.D.weight; this file has {len(outs)}"
        )
    (out,) = outs
    published = out != "out"
    stored = sum(name.startswith("blocks.") and name.endswith(".weight") for name in tensors)
    depth = int(out.removeprefix("model.")) if published else _depth(path, metadata, stored)
    if depth > MAX_BLOCKS:
        raise EngineStartError(f"{path}: the head has {depth} blocks; at most {MAX_BLOCKS} are taken")
    return depth, "model.{}.linear" if published else "blocks.{}", out


def _depth(path: Path, metadata: dict[str, str], stored: int) -> int:
    text = metadata.get("depth", str(stored))
    if not re.fullmatch(r"\d{1,4}", text):
        raise EngineStartError(f"{path}: its metadata says depth = {text!r}; it must be a number of blocks")
    return int(text)


def _threshold(path: Path, metadata: dict[str, str]) -> float:
    text = metadata.get("threshold", str(PAPER_THRESHOLD))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise EngineStartError(f"{path}: its metadata says threshold = {text!r}; it must be a probability, 0 to 1")
    return value
