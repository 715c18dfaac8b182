"""The acceptance head of SpecDec++: how likely the target accepts a drafted token, by the draft's hidden state.

    a = softmax(out(x))[1],   x <- x + SiLU(W x + b), `depth` times;   x = the final state where the token is the input

So the state of the pass that consumes a token speaks of that token, not of the next one. Huang, Guo and Wang,
"SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths", 2024 (arXiv 2405.19715).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .continuations import Batch, distributions, draw, probabilities
from .llama import Llama

EPOCHS, EXAMPLES, RATE = 5, 2048, 2e-3  # of AdamW with a cosine schedule; by then the loss has come to rest


class AcceptanceHead(nn.Module):
    def __init__(self, hidden: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth))
        self.out = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., 2] of rejection and acceptance, of final hidden states [..., d]."""
        for block in self.blocks:
            x = x + F.silu(block(x))
        return self.out(x)


def acceptance_loss(logits: Tensor, accepted: Tensor, weight: float) -> Tensor:
    """-sum(w (1 - P) log(1 - a) + P log a) / sum(w (1 - P) + P): logits [N, 2], probabilities of acceptance P [N].

    Its least is at a = P / (P + w (1 - P)).
    """
    rejection, acceptance = logits.log_softmax(-1).unbind(-1)
    rejected = weight * (1 - accepted)
    return -(rejected * rejection + accepted * acceptance).sum() / (rejected + accepted).sum()


def mix(written: Tensor, drafted: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token mixing: each place keeps what was written with probability `share`, and has the drafted token otherwise.

    Returns the mixed tokens and where they are drafted ones: only these have a label.
    """
    is_draft = torch.rand(written.shape, generator=generator) >= share
    return torch.where(is_draft, drafted, written), is_draft


@torch.no_grad()
def examples(
    target: Llama, draft: Llama, width: int, batch: Batch, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Of drafted tokens: final states [N, d], q [N] that they were drawn with, and probabilities of acceptance [N]."""
    first = batch.num_prompt
    states, chances, labels = [], [], []
    for tokens, temperatures, p in distributions(target, batch):
        q = probabilities(draft, draft.hidden(tokens, width)[:, first - 1 : -1], temperatures)
        drafted = draw(q, generator)[..., None]
        chance = q.gather(-1, drafted)[..., 0]
        accepted = (p.gather(-1, drafted)[..., 0] / chance).clamp(max=1)
        mixed, is_draft = mix(tokens[:, first:], drafted[..., 0], share, generator)
        hidden = draft.hidden(torch.cat([tokens[:, :first], mixed], 1), width)[:, first:]
        states.append(hidden[is_draft])
        chances.append(chance[is_draft])
        labels.append(accepted[is_draft])
    return torch.cat(states), torch.cat(chances), torch.cat(labels)


def train_head(states: Tensor, accepted: Tensor, depth: int, weight: float, seed: int = 0) -> AcceptanceHead:
    """A head for states [N, d] with the labels [N]; its acceptance has the weight taken out again (see `calibrate`)."""
    torch.manual_seed(seed)
    head = AcceptanceHead(states.shape[1], depth)
    optimizer = torch.optim.AdamW(head.parameters(), RATE, weight_decay=0.1)
    steps = EPOCHS * (len(states) // EXAMPLES)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.03)
    for _ in range(EPOCHS):
        order = torch.randperm(len(states))
        for chosen in order[: len(order) // EXAMPLES * EXAMPLES].split(EXAMPLES):
            optimizer.zero_grad()
            acceptance_loss(head(states[chosen].float()), accepted[chosen], weight).backward()
            optimizer.step()
            schedule.step()
    calibrate(head, weight)
    return head.eval()


def calibrate(head: AcceptanceHead, weight: float) -> None:
    """The weighted loss is least at odds of acceptance that are 1 / weight of the true ones: give them back."""
    with torch.no_grad():
        head.out.bias[1] += math.log(weight)


@torch.no_grad()
def acceptance(head: AcceptanceHead, states: Tensor) -> Tensor:
    """a [...] of states [..., d]."""
    return head(states.float()).softmax(-1)[..., 1]


class Confidence(NamedTuple):
    """What q of the drafted token tells by itself: its acceptance, between these edges [B - 1] of q, is rates [B]."""

    edges: Tensor
    rates: Tensor

    def acceptance(self, chances: Tensor) -> Tensor:
        return self.rates[torch.bucketize(chances, self.edges)]


def fit_confidence(chances: Tensor, accepted: Tensor, bins: int = 32) -> Confidence:
    """Bins that hold equally many of the drafted tokens' q [N], and the mean acceptance in each."""
    edges = chances.quantile(torch.linspace(0, 1, bins + 1)[1:-1])
    which = torch.bucketize(chances, edges)
    total = torch.zeros(bins).index_add_(0, which, accepted)
    return Confidence(edges, total / torch.bincount(which, minlength=bins).clamp(min=1))


def calibration_error(predicted: Tensor, accepted: Tensor, bins: int = 10) -> float:
    """Mean distance between prediction and truth, over bins of equal width [N] in proportion to what is in them."""
    which = (predicted * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins).index_add_(0, which, predicted - accepted)
    return float(gaps.abs().sum() / len(predicted))
