"""What a format costs in quality: bits per byte and KL divergence from the plain model, and what it saves in memory.

    text ─ windows ─▶ plain model ─▶ log p ─┐
                  └─▶ with a format ─▶ log q ┴─▶ -log q of the text, Σ p (log p - log q), agreement on the best token

The model runs as it does in the engine: same loader, same kernels, keys and values through the paged cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.table import Table
from tokenizers import Tokenizer

from ..engine.families import load_config
from ..engine.kv_cache import allocate, kv_spec
from ..engine.layout import weight_bytes
from ..engine.loader import load_decoder, locate_model
from ..engine.quant.calibrate import BLOCK_SIZE, one_prompt
from ..engine.quant.rounding import parse_quantization
from ..kernels import Target, resolve
from ..kernels.kv_formats import kv_format
from ..models.corpus import split_library

# A window advances by half its length, so that all but a text's first tokens have at least half a window before them.
STRIDE_SHARE = 0.5
PLAIN = "bf16"
DTYPE, CPU = torch.bfloat16, torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityConfig:
    """What is measured beside the plain model, and on what.

    weights  names as for --quantization, or folders with a quantized form of the same model
    kv       names of kernels/kv_formats.py
    text     None = the modules that the bundled model never saw
    tokens   how many are scored
    """

    model: str
    weights: tuple[str, ...]
    kv: tuple[str, ...]
    text: Path | None = None
    tokens: int = 40_000
    window: int = 1024


@dataclass(slots=True)
class Window:
    """ids [T + 1]: the model reads the first T; of their predictions the last `fresh` have not been scored before."""

    ids: torch.Tensor
    fresh: int


def windows(texts: Sequence[Sequence[int]], length: int, tokens: int) -> Iterator[Window]:
    """Overlapping windows over each text until so many tokens are scored; no window spans two texts."""
    stride = int(length * STRIDE_SHARE)
    scored = 0
    for ids in texts:
        end = 1  # ids[:end] are accounted for
        for start in range(0, len(ids) - 1, stride):
            window = torch.tensor(ids[start : start + length + 1])
            fresh = min(start + len(window) - end, tokens - scored)
            if fresh <= 0:
                return
            # When the budget ends within a window, only what it allows of it is read.
            window = window[: end - start + fresh]
            yield Window(window, fresh)
            scored += fresh
            end = start + len(window)
            if end == len(ids):
                break


class Variant:
    """The model in one format of weights and of keys and values."""

    def __init__(self, config: QualityConfig, weights: str | None, kv: str) -> None:
        calibrated = weights is not None and Path(weights).is_dir()
        folder = locate_model(weights if calibrated else config.model)  # type: ignore[arg-type]
        model = load_config(folder)
        rounding = None if weights is None or calibrated else parse_quantization(weights)
        kernels = resolve(Target("cpu", DTYPE, model.head_dim, kv))
        self.decoder = load_decoder(
            folder, model, kernels, DTYPE, CPU, rounding=rounding, turn_values=kv_format(kv).rotates_keys
        )
        spec = kv_spec(model, BLOCK_SIZE, kv)
        self.cache = allocate(spec, model.num_layers, -(-config.window // BLOCK_SIZE) + 1, CPU)
        self.weight_bytes = weight_bytes(model, DTYPE, rounding)
        self.kv_bytes = model.num_layers * spec.block_bytes / BLOCK_SIZE

    @torch.inference_mode()
    def log_probabilities(self, window: Window) -> torch.Tensor:
        """[fresh, V] fp32: what the model thinks of each token that this window scores."""
        hidden = self.decoder.forward(one_prompt(window.ids[:-1].tolist(), CPU), self.cache)
        return self.decoder.logits(hidden[-window.fresh :]).log_softmax(-1)


def compare(config: QualityConfig, weights: str | None, kv: str) -> dict[str, Any]:
    """One row: a variant beside the plain model, window by window."""
    texts, bytes_per_token = read_texts(config)
    plain, variant = Variant(config, None, PLAIN), Variant(config, weights, kv)
    nats = plain_nats = divergence = agreed = 0.0
    scored = 0
    for window in windows(texts, config.window, config.tokens):
        targets = window.ids[-window.fresh :]
        p, q = plain.log_probabilities(window), variant.log_probabilities(window)
        plain_nats += F.nll_loss(p, targets, reduction="sum").item()
        nats += F.nll_loss(q, targets, reduction="sum").item()
        divergence += F.kl_div(q, p, log_target=True, reduction="sum").item()
        agreed += (p.argmax(-1) == q.argmax(-1)).sum().item()
        scored += window.fresh
    bits = 1 / (math.log(2) * scored * bytes_per_token)
    return {
        "weights": Path(weights).name if weights else PLAIN,
        "kv": kv,
        "tokens": scored,
        "bits_per_byte": nats * bits,
        "change": nats / plain_nats - 1,
        "kl": divergence / scored,
        "same_first": agreed / scored,
        "weight_bytes": variant.weight_bytes,
        "weight_share": variant.weight_bytes / plain.weight_bytes,
        "kv_bytes_per_token": variant.kv_bytes,
        "kv_share": variant.kv_bytes / plain.kv_bytes,
    }


def read_texts(config: QualityConfig) -> tuple[list[list[int]], float]:
    """The tokens of every text, each behind the token that begins one; and UTF-8 bytes per token over all."""
    tokenizer = Tokenizer.from_file(str(locate_model(config.model) / "tokenizer.json"))
    texts = [config.text.read_text()] if config.text else [module.text for module in split_library().held_out]
    first = [0] if config.text is None else []  # the bundled model's texts begin with its end-of-text token
    encoded = [first + tokenizer.encode(text).ids for text in texts]
    return encoded, sum(len(text.encode()) for text in texts) / sum(len(ids) - 1 for ids in encoded)


def measure(config: QualityConfig) -> dict[str, Any]:
    """Every format by itself: weights with plain keys and values, then keys and values with plain weights."""
    rows = [compare(config, None, PLAIN)]
    rows += [compare(config, weights, PLAIN) for weights in config.weights]
    rows += [compare(config, None, kv) for kv in config.kv]
    return {"settings": asdict(config) | {"text": config.text and str(config.text)}, "rows": rows}


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        *("weights", "KV", "bits/byte", "change", "KL", "same", "weight MB", "KV B/token", "saved"),
        title="quality by format; KL in nats per token, same = share of tokens whose best guess is the plain model's",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in shown.columns[2:]:
        column.justify = "right"
    for row in result["rows"]:
        shown.add_row(
            row["weights"],
            row["kv"].removesuffix("_per_token_head"),
            f"{row['bits_per_byte']:.4f}",
            f"{row['change']:+.2%}",
            f"{row['kl']:.4f}",
            f"{row['same_first']:.1%}",
            f"{row['weight_bytes'] / 1e6:.2f}",
            f"{row['kv_bytes_per_token']:.0f}",
            f"{1 / min(row['weight_share'], row['kv_share']):.2f}x",
        )
    return shown
