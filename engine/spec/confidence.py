"""How likely the target accepts a guess Y, by how sure the draft model was of it: known as soon as Y is drawn.

    f(Y) = log q(Y), log q of the likeliest and of the next, entropy of q, q(Y), temperature       q = softmax(logits)
    a(Y) = sigmoid(v · SiLU(W f(Y) + b) + c)

A chain goes on while a(Y_1) · a(Y_2) · ..., the probability that all are right, is at least what the scheduler asks
for (`DraftOrder.go_on`): with less, another guess wins less than its time is worth. Y is kept whatever is found about
it. So whether there is another depends on nothing but guesses that are verified, and the output keeps its distribution.
To drop Y for being unlikely would change it: what is left to verify is then not drawn from q any more.

A head is a file of hidden.weight [units, 6], hidden.bias [units], out.weight [1, units] and out.bias [1].
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from ...kernels.cpu.sampling import single_thread
from ..errors import EngineStartError

FEATURES = 6
LEAST_LOG = -12.0  # as in training: what is less likely is all alike
LEAST_SUMMED = -50.0  # finite, and times its own probability nothing
MAX_UNITS = 1024  # ours have 32; bounds what a broken file may ask for


class Drawn(NamedTuple):
    """What a pass of a draft model gave R chains.

    hidden        [R, d] its final states
    logits        [R, V] float32, edited as the request wants them, before temperature and filters
    tokens        [R] int64: the guesses drawn
    temperatures  [R] float32
    """

    hidden: Tensor
    logits: Tensor
    tokens: Tensor
    temperatures: Tensor


class Confidence(NamedTuple):
    """float32 [units, FEATURES], [units], [units], []."""

    weight: Tensor
    bias: Tensor
    out: Tensor
    out_bias: Tensor

    late: ClassVar[bool] = False

    def acceptance(self, drawn: Drawn) -> Tensor:
        """Of the guesses that a pass drew: probabilities [R] float32."""
        with single_thread():
            x = features(drawn.logits, drawn.tokens, drawn.temperatures)
            hidden = silu(linear(x, self.weight, self.bias))
            return ((hidden * self.out).sum(-1) + self.out_bias).sigmoid()

    def least(self, asked: float) -> float:
        """Below which probability of all guesses a chain ends. asked: by the scheduler."""
        return asked


def features(logits: Tensor, tokens: Tensor, temperatures: Tensor) -> Tensor:
    """[R, FEATURES] of tokens [R] drawn behind logits [R, V]."""
    log_q = logits.log_softmax(dim=-1)
    own = log_q.gather(-1, tokens[:, None])[:, 0]
    first, second = log_q.topk(2, dim=-1).values.unbind(-1)
    # What is forbidden is -inf, and adds nothing. torch.special.entr takes ten times as long.
    entropy = -(log_q.exp() * log_q.clamp(min=LEAST_SUMMED)).sum(-1)
    return torch.stack([own, first, second, entropy, own.exp(), temperatures], dim=-1).clamp(min=LEAST_LOG)


def confidence_of(path: Path, tensors: dict[str, Tensor], device: torch.device) -> Confidence:
    """The head that a file's tensors are. Raises EngineStartError naming the tensor, and what it should be."""
    units = tensors["hidden.weight"].numel() // FEATURES
    if units > MAX_UNITS:
        raise EngineStartError(f"{path}: the head has {units} units; at most {MAX_UNITS} are taken")
    shapes = {"hidden.weight": (units, FEATURES), "hidden.bias": (units,), "out.weight": (1, units), "out.bias": (1,)}
    for name, shape in shapes.items():
        if name not in tensors:
            raise EngineStartError(f"{path}: tensor {name} is missing; make or download the head again")
        if tuple(tensors[name].shape) != shape:
            raise EngineStartError(
                f"{path}: tensor {name} has shape {list(tensors[name].shape)}, a head of {units} units has "
                f"{list(shape)}; make or download it again"
            )
    if surplus := tensors.keys() - shapes:
        raise EngineStartError(f"{path}: {min(surplus)} belongs to no head of {', '.join(shapes)}")
    weight, bias, out, out_bias = (tensors[name].to(device, torch.float32, copy=True) for name in shapes)
    return Confidence(weight, bias, out[0], out_bias[0])
