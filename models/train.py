"""Train one model of the family: `python -m models.train target` (or `draft`), from the root of the checkout.

Muon for the hidden matrices, AdamW for the embedding and the norms, a warm-up/stable/decay schedule counted in tokens,
and one nested width per step. A checkpoint is written every two minutes and at SIGTERM; started again, training goes on
from it. Raising or lowering `--tokens` on a restart moves the decay, so its moment can be chosen late.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from . import llama
from .dataset import Dataset, held_out_windows, prepare
from .llama import DRAFT, TARGET, Layer, Llama

WORK = Path(__file__).parent / ".train"
SHAPES = {"target": TARGET, "draft": DRAFT}

# Single-threaded processes, one per core, that meet once per step: on a busy machine threads that meet after every
# operation lose most of their time waiting for each other (1,000 tokens/s against 2,500 beside four other programs).
PROCESSES = 2
BATCH_TOKENS = 8192  # small: the run is short of steps rather than of gradient quality
# Per token, attention costs 2.2 times as much in windows of 2,048 as in windows of 256, so most tokens are seen in
# short windows; the decay phase then teaches the long ones: every second step spans the whole context.
SHORT_LENGTH, LONG_LENGTH, LONG_EVERY = 256, 2048, 2
WARMUP_TOKENS = 100 * BATCH_TOKENS
DECAY_SHARE = 0.25
MUON_LR, ADAM_LR = 6e-3, 3e-3
WEIGHT_DECAY = 0.1
WIDTH_WEIGHTS = (0.52, 0.16, 0.16, 0.16)  # the full model is served most; each slice still gets every sixth step
LOG_EVERY = 20
CHECKPOINT_SECONDS = 120.0


def learning_rate(tokens: int, total: int) -> float:
    """The factor in [0, 1] after `tokens` of `total`: linear up, flat, linear down over the last quarter."""
    decay = DECAY_SHARE * total
    return min(1.0, (tokens + BATCH_TOKENS) / WARMUP_TOKENS, max(0.0, (total - tokens) / decay))


def optimizers(model: Llama, rank: int) -> list[torch.optim.Optimizer]:
    """Muon over this process's share of the matrices (orthogonalising them is costly), AdamW over the rest."""
    hidden = model.hidden_matrices()
    others = [p for p in model.parameters() if all(p is not h for h in hidden)]
    owned = hidden[rank::PROCESSES]
    return [
        torch.optim.Muon(owned, lr=MUON_LR, weight_decay=WEIGHT_DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def average_gradients(model: Llama, flags: list[bool]) -> list[bool]:
    """Average the gradients over the processes; each flag comes back true where any process raised it."""
    grads = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in grads] + [torch.tensor(flags, dtype=torch.float32)])
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat[: -len(flags)].split([g.numel() for g in grads]), strict=True):
        torch.div(part.view_as(grad), PROCESSES, out=grad)
    return [flag > 0 for flag in flat[-len(flags) :].tolist()]


def share_matrices(model: Llama) -> None:
    """Each process sends the matrices that its Muon has just stepped."""
    for owner in range(PROCESSES):
        owned = model.hidden_matrices()[owner::PROCESSES]
        flat = torch.cat([p.detach().flatten() for p in owned])
        dist.broadcast(flat, owner)
        for parameter, part in zip(owned, flat.split([p.numel() for p in owned]), strict=True):
            parameter.detach().copy_(part.view_as(parameter))


def width_of_step(step: int, widths: tuple[int, ...]) -> int:
    return random.Random(step).choices(widths, WIDTH_WEIGHTS[: len(widths)])[0]


def compile_parts() -> None:
    """Fuse what lies between the matrix products: 1.7 times the speed, compiled once per width."""
    Layer.forward = torch.compile(Layer.forward, dynamic=False)
    llama.cross_entropy = torch.compile(llama.cross_entropy, dynamic=False)


def loss_of(model: Llama, windows: Tensor, width: int) -> Tensor:
    """Mean nats per token over windows [sequences, length + 1]; only the common length is worth compiling for."""
    common = windows.shape[1] == SHORT_LENGTH + 1
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.compiler.set_stance("default" if common else "force_eager"):
        hidden = model.hidden(windows[:, :-1], width)
        return llama.cross_entropy(hidden, model.embed_tokens.weight, windows[:, 1:])


def window_length(step: int, tokens: int, total: int) -> int:
    decaying = tokens >= (1 - DECAY_SHARE) * total
    return LONG_LENGTH if decaying and step % LONG_EVERY == 0 else SHORT_LENGTH


def save(file: Path, state: dict[str, object]) -> None:
    """Atomically: a kill in the middle leaves the previous checkpoint."""
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, file)


def train(rank: int, name: str, total: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES)
    shape, file = SHAPES[name], WORK / f"{name}.pt"
    data, held_out = Dataset(WORK), held_out_windows(WORK)
    torch.manual_seed(0)
    model = Llama(shape)
    steppers, base_rates = optimizers(model, rank), (MUON_LR, ADAM_LR)
    step = 0
    if file.exists():
        state = torch.load(file)
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["optimizers"][rank], strict=True):
            stepper.load_state_dict(saved)
        step = state["step"]
    compile_parts()

    def report(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    report(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, from step {step} to {total:,} tokens")

    def checkpoint() -> None:
        states: list[object] = [None] * PROCESSES
        dist.all_gather_object(states, [s.state_dict() for s in steppers])
        if rank == 0:
            save(file, {"model": model.state_dict(), "optimizers": states, "step": step})
            with torch.no_grad():
                nats = loss_of(model, held_out, shape.ffn).item()
            report(f"step {step}  held-out {nats:.3f} nats per token")

    interrupted = False

    def ask_to_stop(*_: object) -> None:
        nonlocal interrupted
        interrupted = True

    # The children of an interrupted parent receive SIGINT.
    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)

    stop = False
    saved_at = logged_at = time.monotonic()
    logged_step, losses = step, []
    while (tokens := step * BATCH_TOKENS) < total and not stop:
        length = window_length(step, tokens, total)
        width = width_of_step(step, shape.widths)
        windows = data.batch(step, BATCH_TOKENS // length, length)[rank::PROCESSES]
        loss = loss_of(model, windows, width)
        loss.backward()
        save_due = rank == 0 and time.monotonic() - saved_at > CHECKPOINT_SECONDS
        stop, save_now = average_gradients(model, [interrupted, save_due])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = learning_rate(tokens, total)
        for stepper, rate in zip(steppers, base_rates, strict=True):
            for group in stepper.param_groups:
                group["lr"] = rate * factor
            stepper.step()
        model.zero_grad()
        share_matrices(model)
        step += 1
        if width == shape.ffn:
            losses.append(loss.item())
        if step % LOG_EVERY == 0:
            speed = (step - logged_step) * BATCH_TOKENS / (time.monotonic() - logged_at)
            left = (total - step * BATCH_TOKENS) / speed / 60
            report(
                f"step {step}  {step * BATCH_TOKENS / 1e6:.1f}M tokens  loss {sum(losses) / max(1, len(losses)):.3f}  "
                f"lr x{factor:.2f}  {speed:,.0f} tokens/s  {left:.0f} min left"
            )
            logged_at, logged_step, losses = time.monotonic(), step, []
        if save_now:
            checkpoint()
            saved_at = time.monotonic()
    checkpoint()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--tokens", type=float, required=True, help="how many tokens to train on in all, e.g. 40e6")
    arguments = parser.parse_args()
    prepare(WORK)
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        mp.spawn(train, (arguments.model, int(arguments.tokens), rendezvous), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
