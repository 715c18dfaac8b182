"""Bits per byte on the held-out modules, of every nested width and of the draft: `python -m models.evaluate`."""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from .corpus import Module, split_library, xz_bits_per_byte
from .export import FOLDERS, MODELS
from .llama import Llama
from .tokenizer import END_OF_TEXT, load_tokenizer
from .train import SHAPES

# A window advances by half its length, so that every token but a file's first has at least half a window before it.
STRIDE_SHARE = 0.5


def load_exported(name: str, folder: Path) -> Llama:
    """The exported bf16 weights, computed with in fp32."""
    model = Llama(SHAPES[name])
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): value.float() for name, value in weights.items()})
    return model.eval()


@torch.no_grad()
def nats(model: Llama, ids: list[int], width: int) -> float:
    """-log p of ids[1:] given ids[0], in windows of the model's context."""
    context = model.shape.context
    stride = int(context * STRIDE_SHARE)
    total, scored = 0.0, 1  # ids[:scored] are accounted for
    for start in range(0, len(ids), stride):
        window = torch.tensor(ids[start : start + context + 1])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(window[None, :-1], width)[0]
        fresh = len(window) - (scored - start)
        total += F.cross_entropy(logits[-fresh:].float(), window[-fresh:], reduction="sum").item()
        scored = start + len(window)
        if scored == len(ids):
            break
    return total


def bits_per_byte(model: Llama, tokenizer: Tokenizer, modules: list[Module], width: int) -> float:
    total = sum(nats(model, tokenizer.encode(END_OF_TEXT + m.text).ids, width) for m in modules)
    return total / math.log(2) / sum(len(m.text.encode()) for m in modules)


def parameters(model: Llama, width: int) -> int:
    """How many parameters a slice of this feed-forward width uses."""
    unused = 3 * model.shape.hidden * (model.shape.ffn - width) * model.shape.layers
    return sum(p.numel() for p in model.parameters()) - unused


def measure(folder: Path) -> list[dict[str, object]]:
    """One row per nested width and model, and one for `xz -9`: bits per byte on held-out library and test modules."""
    split = split_library()
    groups = {"library": split.held_out, "tests": split.held_out_tests}
    rows: list[dict[str, object]] = []
    for name, folder_name in FOLDERS.items():
        model = load_exported(name, folder / folder_name)
        tokenizer = load_tokenizer(folder / folder_name / "tokenizer.json")
        for width in model.shape.widths:
            figures = {g: round(bits_per_byte(model, tokenizer, m, width), 3) for g, m in groups.items()}
            rows.append({"model": folder_name, "ffn": width, "parameters": parameters(model, width), **figures})
    rows.append({"model": "xz -9"} | {group: round(xz_bits_per_byte(m), 3) for group, m in groups.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=MODELS, help="the folder that holds the exported models")
    rows = measure(parser.parse_args().models)
    print("| model | FFN width | parameters | library, bits/byte | tests, bits/byte |")
    print("|---|---|---|---|---|")
    for r in rows:
        size = f"{r['parameters'] / 1e6:.2f} M" if "parameters" in r else ""
        print(f"| {r['model']} | {r.get('ffn', '')} | {size} | {r['library']:.3f} | {r['tests']:.3f} |")


if __name__ == "__main__":
    main()
