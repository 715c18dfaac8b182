"""How likely the target accepts a drafted token Y, by how sure the draft was of it.

    f(Y) = log q(Y), log q of the likeliest and of the next, entropy of q, q(Y), temperature       q = softmax(logits)
    a(Y) = sigmoid(v · SiLU(W f(Y) + b) + c)

All of it is known when Y is drawn. The head of SpecDec++ (Huang, Guo and Wang 2024, arXiv 2405.19715) looks at the
final hidden state where Y is the input, a pass later, which has forgotten how sure the draft was. Labels as there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .continuations import Batch, distributions, draw, next_logits, tempered
from .llama import Llama

FEATURES, WIDTH = 6, 32  # 16 units foretell as well on two batches, 64 no better
LEAST_LOG = -12.0  # what is less likely is all alike
EPOCHS, EXAMPLES, RATE = 4, 2048, 4e-3  # of AdamW with a one-cycle schedule; by then the loss has come to rest


class Confidence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, WIDTH)
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Log odds of acceptance [...] of features [..., FEATURES]."""
        return self.out(F.silu(self.hidden(x)))[..., 0]


def features(logits: Tensor, tokens: Tensor, temperatures: Tensor) -> Tensor:
    """[..., FEATURES] of tokens [...] drawn behind logits [..., V], which no temperature has divided yet."""
    log_q = logits.log_softmax(-1)
    own = log_q.gather(-1, tokens[..., None])[..., 0]
    first, second = log_q.topk(2, dim=-1).values.unbind(-1)
    entropy = torch.special.entr(log_q.exp()).sum(-1)
    return torch.stack([own, first, second, entropy, own.exp(), temperatures.expand_as(own)], -1).clamp(min=LEAST_LOG)


@torch.no_grad()
def examples(
    target: Llama, draft: Llama, width: int, batch: Batch, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Of tokens drawn by the draft behind the target's text: features [N, FEATURES], P(accepted) [N]."""
    first = batch.num_prompt
    known, labels = [], []
    for tokens, temperatures, p in distributions(target, batch):
        logits = next_logits(draft, draft.hidden(tokens, width)[:, first - 1 : -1])
        q = tempered(logits, temperatures)
        drafted = draw(q, generator)
        chance = q.gather(-1, drafted[..., None])[..., 0]
        known.append(features(logits, drafted, temperatures[:, None]).flatten(0, 1))
        labels.append((p.gather(-1, drafted[..., None])[..., 0] / chance).clamp(max=1).flatten())
    return torch.cat(known), torch.cat(labels)


def train_confidence(known: Tensor, accepted: Tensor, seed: int = 0) -> Confidence:
    """For features [N, FEATURES] with the labels [N], by the cross-entropy of the labels, which is least at them."""
    torch.manual_seed(seed)
    head = Confidence()
    mean, scale = known.mean(0), known.std(0) + 1e-3
    standard = (known - mean) / scale
    optimizer = torch.optim.AdamW(head.parameters(), RATE, weight_decay=0.05)
    steps = EPOCHS * (len(known) // EXAMPLES)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.05)
    for _ in range(EPOCHS):
        order = torch.randperm(len(known))
        for chosen in order[: len(order) // EXAMPLES * EXAMPLES].split(EXAMPLES):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(head(standard[chosen]), accepted[chosen]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():  # the standardising becomes part of the first layer
        head.hidden.weight /= scale
        head.hidden.bias -= head.hidden.weight @ mean
    return head.eval()


@torch.no_grad()
def acceptance(head: Confidence, known: Tensor) -> Tensor:
    """a [...] of features [..., FEATURES]."""
    return head(known).sigmoid()


def calibration_error(predicted: Tensor, accepted: Tensor, bins: int = 10) -> float:
    """Mean distance between prediction and truth, over bins of equal width [N] in proportion to what is in them."""
    which = (predicted * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins).index_add_(0, which, predicted - accepted)
    return float(gaps.abs().sum() / len(predicted))
