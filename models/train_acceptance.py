"""Train, choose and judge acceptance heads: `python -m models.train_acceptance` (or only some: `draft 256`).

continuations ──▶ examples ──▶ heads ──▶ traces of other modules: the best head and threshold ──▶ its file
                                     └─▶ traces of held-out modules ──▶ its row of the table
"""

import argparse
from itertools import product
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from .acceptance import AcceptanceHead, acceptance, calibration_error, examples, train_head
from .continuations import Batch, prepare
from .evaluate import load_exported
from .export import FOLDERS, MODELS
from .llama import Llama
from .stopping import LONGEST, Played, Trace, play, trace
from .train import WORK

DEPTHS, WEIGHTS = (1, 3), (1.0, 6.0)
SHARE = 0.15  # of places that keep what the target wrote, in token mixing
MIXES = 2  # draws of the drafted tokens behind each text
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
COSTS = (1 / 50, 1 / 20, 1 / 10)  # of a draft's pass, where the target's is 1; a head is chosen for them together


class Pair(NamedTuple):
    """A draft of the bundled target, and the file of its head. A slice drafts with the target's own folder."""

    model: str
    width: int
    file: str


PAIRS = {
    "draft": Pair("draft", 384, "acceptance_head.safetensors"),
    **{str(width): Pair("target", width, f"acceptance_head_ffn{width}.safetensors") for width in (128, 256)},
}


class Judged(NamedTuple):
    """Rules played over the same texts: drafts of each fixed length, and stopped by the head at each threshold."""

    fixed: dict[int, Played]
    stopped: dict[float, Played]

    def best_fixed(self, cost: float) -> int:
        return max(self.fixed, key=lambda length: self.fixed[length].rate(cost))

    def best_threshold(self, cost: float) -> float:
        return max(self.stopped, key=lambda threshold: self.stopped[threshold].rate(cost))

    def gain(self, threshold: float, cost: float) -> float:
        """Over the best fixed length, in tokens per modelled second."""
        return self.stopped[threshold].rate(cost) / self.fixed[self.best_fixed(cost)].rate(cost) - 1

    def mean_gain(self, threshold: float) -> float:
        return sum(self.gain(threshold, cost) for cost in COSTS) / len(COSTS)


def judge(head: AcceptanceHead, traces: list[Trace]) -> Judged:
    rejected = torch.cat([t.rejected for t in traces]).tolist()
    states = torch.cat([acceptance(head, t.states) for t in traces]).tolist()
    tails = torch.cat([acceptance(head, t.tails) for t in traces]).tolist()
    return Judged(
        {length: play(rejected, states, tails, 1.0, length) for length in range(1, LONGEST + 1)},
        {threshold: play(rejected, states, tails, threshold, LONGEST) for threshold in THRESHOLDS},
    )


def choose(pair: Pair, target: Llama, draft: Llama, parts: dict[str, list[Batch]]) -> tuple[AcceptanceHead, float]:
    """The head and the threshold that gain most on the modules kept for choosing."""
    generator = torch.Generator().manual_seed(1)
    data = [examples(target, draft, pair.width, b, SHARE, generator) for b in parts["train"] for _ in range(MIXES)]
    states, accepted = (torch.cat(column) for column in zip(*data, strict=True))
    traces = [trace(target, draft, pair.width, batch, generator) for batch in parts["validate"]]
    found = []
    for depth, weight in product(DEPTHS, WEIGHTS):
        head = train_head(states, accepted, depth, weight)
        judged = judge(head, traces)
        threshold = max(THRESHOLDS, key=judged.mean_gain)
        print(f"depth {depth} weight {weight:g}: gains {judged.mean_gain(threshold):.1%} at {threshold}", flush=True)
        found.append((judged.mean_gain(threshold), head, threshold))
    _, head, threshold = max(found, key=lambda one: one[0])
    return head, threshold


def report(
    pair: Pair, head: AcceptanceHead, threshold: float, target: Llama, draft: Llama, batches: list[Batch]
) -> None:
    """Rows of the table, on modules that no model has seen; the fixed length is the best of these very texts."""
    generator = torch.Generator().manual_seed(2)
    data = [examples(target, draft, pair.width, batch, SHARE, generator) for batch in batches]
    states, accepted = (torch.cat(column) for column in zip(*data, strict=True))
    error = calibration_error(acceptance(head, states), accepted)
    print(f"accepted of single drafts {accepted.mean():.3f}, calibration error {error:.2%}")
    judged = judge(head, [trace(target, draft, pair.width, batch, generator) for batch in batches])
    for cost in COSTS:
        length, own = judged.best_fixed(cost), judged.best_threshold(cost)
        fixed, stopped = judged.fixed[length], judged.stopped[threshold]
        print(
            f"| {pair.model} {pair.width} | 1:{1 / cost:.0f} | {length} | {fixed.rate(cost):.3f} "
            f"| {stopped.rate(cost):.3f} | {judged.gain(threshold, cost):+.1%} "
            f"| {own} | {judged.gain(own, cost):+.1%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="*", help=f"some of {', '.join(PAIRS)}; default: all")
    chosen = parser.parse_args().pairs or list(PAIRS)
    target = load_exported("target", MODELS / FOLDERS["target"]).bfloat16()  # as it is served
    parts = prepare(WORK, target)
    for pair in (PAIRS[name] for name in chosen):
        draft = target if pair.model == "target" else load_exported(pair.model, MODELS / FOLDERS[pair.model]).bfloat16()
        head, threshold = choose(pair, target, draft, parts)
        tensors = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in head.named_parameters()}
        file = MODELS / FOLDERS[pair.model] / pair.file
        metadata = {"format": "pt", "depth": str(len(head.blocks)), "threshold": str(threshold)}
        save_file(tensors, file, metadata=metadata)
        file.chmod(0o644)  # safetensors writes it for its owner only
        report(pair, head, threshold, target, draft, parts["held_out"])


if __name__ == "__main__":
    main()
