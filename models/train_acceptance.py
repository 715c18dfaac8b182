"""Train and judge acceptance heads: `python -m models.train_acceptance` (or only some: `draft 256`).

continuations ──▶ examples ──▶ head ──▶ its file
                                └─▶ traces of held-out modules ──▶ its rows of the table
"""

import argparse
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from .acceptance import Confidence, acceptance, calibration_error, examples, train_confidence
from .continuations import TEMPERATURES, Batch, prepare
from .evaluate import load_exported
from .export import FOLDERS, MODELS
from .llama import Llama
from .stopping import LONGEST, Played, Trace, play, trace
from .train import WORK

HOTTEST = 1.3  # any temperature may be asked for, and examples are made up to this one
COSTS = (1 / 50, 1 / 20, 1 / 10)  # of a draft's pass, where the target's is 1
RESAMPLES = 200  # of the held-out sequences, for the error of a gain


class Pair(NamedTuple):
    """A draft of the bundled target, and the file of its head. A slice drafts with the target's own folder."""

    model: str
    width: int
    file: str


PAIRS = {
    "draft": Pair("draft", 384, "acceptance_head.safetensors"),
    **{str(width): Pair("target", width, f"acceptance_head_ffn{width}.safetensors") for width in (128, 256)},
}


def train_pair(pair: Pair, target: Llama, draft: Llama, parts: dict[str, list[Batch]]) -> None:
    """Train a head, write its file, and print its rows of the table."""
    generator = torch.Generator().manual_seed(1)

    def all_examples(batches: list[Batch]) -> tuple[Tensor, ...]:
        data = [examples(target, draft, pair.width, batch, generator) for batch in batches]
        return tuple(map(torch.cat, zip(*data, strict=True)))

    head = train_confidence(*all_examples(parts["train"] + [at_any_temperature(b, generator) for b in parts["train"]]))
    save(pair, head)
    known, accepted = all_examples(parts["held_out"])
    name = f"{pair.model} {pair.width}"
    error = calibration_error(acceptance(head, known), accepted)
    print(f"{name}: {accepted.mean():.1%} of single guesses are accepted, calibration error {error:.1%}", flush=True)
    traces = [trace(target, draft, pair.width, batch, generator) for batch in parts["held_out"]]
    held_out = Trace(*map(torch.cat, zip(*traces, strict=True)))
    for temperature in TEMPERATURES:
        chosen = known[:, -1] == temperature
        error = calibration_error(acceptance(head, known[chosen]), accepted[chosen])
        for cost in COSTS:
            print(
                f"| {name} | {temperature:g} | {error:.1%} | {gain(head, held_out.at(temperature), cost)} |", flush=True
            )


def at_any_temperature(batch: Batch, generator: torch.Generator) -> Batch:
    return batch._replace(temperatures=HOTTEST * torch.rand(len(batch.temperatures), generator=generator))


def save(pair: Pair, head: Confidence) -> None:
    file = MODELS / FOLDERS[pair.model] / pair.file
    save_file({name: value.detach().contiguous() for name, value in head.named_parameters()}, file, {"format": "pt"})
    file.chmod(0o644)  # safetensors writes it for its owner only


def gain(head: Confidence, traces: Trace, cost: float) -> str:
    """The rest of a row: the best fixed length of these very texts, its rate, what a guess must be worth, its rate, and
    the gain with its standard error."""
    rejected, right = traces.rejected.tolist(), acceptance(head, traces.text).tolist()
    tails = iter(acceptance(head, traces.tails).tolist())
    own = [[next(tails) for is_wrong in wrong if is_wrong] for wrong in rejected]

    def played(go_on: float, limit: int) -> list[Played]:
        """By sequence."""
        return [play([a], [b], c, go_on, limit) for a, b, c in zip(rejected, right, own, strict=True)]

    fixed = {length: played(0.0, length) for length in range(1, LONGEST + 1)}
    best = max(fixed, key=lambda length: rate(fixed[length], cost))
    go_on = worth(rate(fixed[best], cost), cost, 1 - float(traces.rejected.float().mean()))
    stopped = played(go_on, LONGEST)
    pairs = list(zip(stopped, fixed[best], strict=True))
    ratio = rate(stopped, cost) / rate(fixed[best], cost)
    generator = torch.Generator().manual_seed(0)
    others = []
    for _ in range(RESAMPLES):
        some = [pairs[i] for i in torch.randint(len(pairs), (len(pairs),), generator=generator).tolist()]
        ours, theirs = zip(*some, strict=True)
        others.append(rate(ours, cost) / rate(theirs, cost))
    return (
        f"1:{1 / cost:.0f} | {best} | {rate(fixed[best], cost):.3f} | {go_on:.2f} | {rate(stopped, cost):.3f} | "
        f"{ratio - 1:+.1%} ± {float(torch.tensor(others).std()):.1%}"
    )


def worth(rate: float, cost: float, next_accepted: float) -> float:
    """How likely all guesses so far must be right for one more to pay: it wins a token with this probability times its
    own, and the time that it takes would make rate · cost tokens otherwise."""
    return rate * cost / next_accepted


def rate(played: list[Played] | tuple[Played, ...], cost: float) -> float:
    """Of all together."""
    return Played(*map(sum, zip(*played, strict=True))).rate(cost)


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
