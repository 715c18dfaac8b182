"""Train, choose and judge acceptance heads: `python -m models.train_acceptance` (or only some: `draft 256`).

continuations ──▶ examples ──▶ heads ──▶ traces of other modules: the best head and threshold ──▶ its file
                                     └─▶ traces of held-out modules ──▶ its row of the table
"""

import argparse
from itertools import product
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from .acceptance import AcceptanceHead, Confidence, acceptance, calibration_error, examples, fit_confidence, train_head
from .continuations import Batch, prepare
from .evaluate import load_exported
from .export import FOLDERS, MODELS
from .llama import Llama
from .stopping import LONGEST, Played, Trace, play, trace
from .train import WORK

DEPTHS, WEIGHTS = (1, 3), (1.0, 6.0)
SHARE = 0.15  # of places that keep what the target wrote, in token mixing
MIXES = 3  # draws of the drafted tokens behind each text
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
COSTS = (1 / 50, 1 / 20, 1 / 10)  # of a draft's pass, where the target's is 1: the dearer, the lower the threshold
DEFAULT_COST = 1 / 20  # whose threshold is written into the file


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

    def gain(self, threshold: float, cost: float) -> float:
        """Over the best fixed length, in tokens per modelled second."""
        return self.stopped[threshold].rate(cost) / self.fixed[self.best_fixed(cost)].rate(cost) - 1

    def thresholds(self) -> dict[float, float]:
        """The best for each cost."""
        return {cost: max(THRESHOLDS, key=lambda t, cost=cost: self.gain(t, cost)) for cost in COSTS}

    def mean_gain(self) -> float:
        return sum(self.gain(threshold, cost) for cost, threshold in self.thresholds().items()) / len(COSTS)


def judge(acceptances: tuple[Tensor, Tensor], traces: Trace) -> Judged:
    """acceptances: what is foretold of the text's tokens [S, C], and of the tails [R, LONGEST]."""
    lists = traces.rejected.tolist(), acceptances[0].tolist(), acceptances[1].tolist()
    return Judged(
        {length: play(*lists, 1.0, length) for length in range(1, LONGEST + 1)},
        {threshold: play(*lists, threshold, LONGEST) for threshold in THRESHOLDS},
    )


def by_state(head: AcceptanceHead, traces: Trace) -> tuple[Tensor, Tensor]:
    return acceptance(head, traces.states), acceptance(head, traces.tails)


def by_confidence(table: Confidence, traces: Trace) -> tuple[Tensor, Tensor]:
    return table.acceptance(traces.chances), table.acceptance(traces.doubts)


def train_pair(pair: Pair, target: Llama, draft: Llama, parts: dict[str, list[Batch]]) -> None:
    """Train heads, keep the one that gains most on the modules kept for choosing, and print its rows of the table."""
    generator = torch.Generator().manual_seed(1)

    def all_examples(part: str, mixes: int) -> tuple[Tensor, ...]:
        data = [examples(target, draft, pair.width, b, SHARE, generator) for b in parts[part] for _ in range(mixes)]
        return tuple(map(torch.cat, zip(*data, strict=True)))

    def all_traces(part: str) -> Trace:
        traces = [trace(target, draft, pair.width, batch, generator) for batch in parts[part]]
        return Trace(*map(torch.cat, zip(*traces, strict=True)))

    states, chances, accepted = all_examples("train", MIXES)
    validate = all_traces("validate")
    found = []
    for depth, weight in product(DEPTHS, WEIGHTS):
        head = train_head(states, accepted, depth, weight)
        judged = judge(by_state(head, validate), validate)
        print(f"depth {depth} weight {weight:g}: {judged.mean_gain():+.1%}", flush=True)
        found.append((judged.mean_gain(), head, judged.thresholds()))
    _, head, thresholds = max(found, key=lambda one: one[0])
    save(pair, head, thresholds[DEFAULT_COST])
    table = fit_confidence(chances, accepted)
    table_thresholds = judge(by_confidence(table, validate), validate).thresholds()

    states, chances, accepted = all_examples("held_out", 1)
    held_out = all_traces("held_out")
    name = f"{pair.model} {pair.width}"
    print(f"{name}: {accepted.mean():.1%} of single guesses are accepted")
    print(f"calibration error of the head {calibration_error(acceptance(head, states), accepted):.1%}, ", end="")
    print(f"of q {calibration_error(table.acceptance(chances), accepted):.1%}")
    tell(f"{name}, head", judge(by_state(head, held_out), held_out), thresholds)
    tell(f"{name}, q", judge(by_confidence(table, held_out), held_out), table_thresholds)


def save(pair: Pair, head: AcceptanceHead, threshold: float) -> None:
    file = MODELS / FOLDERS[pair.model] / pair.file
    tensors = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in head.named_parameters()}
    save_file(tensors, file, {"format": "pt", "depth": str(len(head.blocks)), "threshold": str(threshold)})
    file.chmod(0o644)  # safetensors writes it for its owner only


def tell(name: str, judged: Judged, thresholds: dict[float, float]) -> None:
    """Rows of the table. The fixed length is the best of these very texts; the thresholds were chosen on others."""
    for cost, threshold in thresholds.items():
        length = judged.best_fixed(cost)
        fixed, stopped = judged.fixed[length].rate(cost), judged.stopped[threshold].rate(cost)
        gain = f"{judged.gain(threshold, cost):+.1%}"
        print(
            f"| {name} | 1:{1 / cost:.0f} | {length} | {fixed:.3f} | {threshold} | {stopped:.3f} | {gain} |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="*", help=f"some of {', '.join(PAIRS)}; default: all")
    chosen = parser.parse_args().pairs or list(PAIRS)
    target = load_exported("target", MODELS / FOLDERS["target"]).bfloat16()  # as it is served
    parts = prepare(WORK, target)
    for pair in (PAIRS[name] for name in chosen):
        draft = target if pair.model == "target" else load_exported(pair.model, MODELS / FOLDERS[pair.model]).bfloat16()
        train_pair(pair, target, draft, parts)


if __name__ == "__main__":
    main()
