"""A model that computes the very function of a small one, at the price of a large one.

Zero-output width and depth are added: hidden units of the feed-forward layers whose outputs are multiplied by zero, and
layers that add zero to the residual. Acceptance of guesses is then that of a model that was really trained, and a step
costs what one of the large model's size costs. What it cannot show is how well a small model guesses a large one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# 24 layers as in Qwen2.5-0.5B, each as wide as it takes to reach its 0.36 B parameters in them.
LAYERS, FFN = 24, 19_456


def write_costly_twin(source: Path, folder: Path, layers: int = LAYERS, ffn: int = FFN, seed: int = 0) -> None:
    """Write the twin of a Llama folder with float weights. ValueError when it would be smaller than its source.

    The weights that matter to nothing are random, not zero, wherever that keeps the function: zeros would be multiplied
    with less power, and so faster.
    """
    config = json.loads((source / "config.json").read_text())
    small_layers, small_ffn, hidden = config["num_hidden_layers"], config["intermediate_size"], config["hidden_size"]
    if layers < small_layers or ffn < small_ffn:
        raise ValueError(f"a twin of {layers} layers and {ffn} units is smaller than its source")
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "model.safetensors")

    def noise(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(dtype)

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in [name for name in tensors if name.startswith("model.layers.0.")] if layer >= small_layers else ():
            like = tensors[name]
            own = prefix + name.removeprefix("model.layers.0.")
            if own.endswith(("o_proj.weight", "down_proj.weight")):
                tensors[own] = torch.zeros_like(like)
            else:
                tensors[own] = noise(*like.shape, like.dtype) if like.ndim == 2 else torch.ones_like(like)
    for layer in range(layers):
        mlp = f"model.layers.{layer}.mlp."
        for name in ("gate_proj", "up_proj"):
            small = tensors[f"{mlp}{name}.weight"]
            tensors[f"{mlp}{name}.weight"] = torch.cat([small, noise(ffn - len(small), hidden, small.dtype)])
        small = tensors[f"{mlp}down_proj.weight"]
        tensors[f"{mlp}down_proj.weight"] = torch.cat([small, small.new_zeros(hidden, ffn - small.shape[1])], dim=1)

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    config |= {"num_hidden_layers": layers, "intermediate_size": ffn}
    if "matformer_widths" in config:
        config["matformer_widths"] = [ffn, *config["matformer_widths"]]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
