"""From a model's name to a decoder that runs.

    locate_model ──▶ folder ──load_config──▶ DecoderConfig ──load_decoder──▶ Decoder

Weights are read, cast and handed to the kernels' `prepare` one block at a time, so that the peak of memory is the
model and one block.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from ..kernels import Kernels
from ..kernels.reference.rope import rope_table
from .config import BUNDLED_MODEL
from .decoder import Attention, Block, Decoder, FeedForward, Join, MixtureOfExperts, make_join
from .errors import EngineStartError
from .layout import AttentionWeights, FeedForwardWeights, MoeWeights, Weight, iter_weights, model_weights
from .model_config import DecoderConfig
from .weights import Checkpoint

log = logging.getLogger(__name__)

BUNDLED_FOLDER = Path(__file__).resolve().parent.parent / "models" / "quire-py-8m"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
# Data only: no code, no pickles. Sub-folders and "consolidated" files hold second copies in other formats.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
HUB_SKIPPED = ["*/*", "consolidated*"]


def locate_model(name: str, revision: str | None = None) -> Path:
    """The folder of "bundled", of a path, or of a hub id (downloaded unless cached; never when HF_HUB_OFFLINE is set).

    Raises EngineStartError when there is no such folder, or the download fails.
    """
    if name == BUNDLED_MODEL:
        return _existing(BUNDLED_FOLDER, "the bundled model is not installed; give another model")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(name):
        return _existing(folder, "give a folder in Hugging Face layout, a hub id, or 'bundled'")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_SKIPPED
            )
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise EngineStartError(f"model {name!r} is no folder here and cannot be had from the hub: {reason}") from None


def _existing(folder: Path, remedy: str) -> Path:
    if not folder.is_dir():
        raise EngineStartError(f"there is no model folder {folder}; {remedy}")
    return folder


def load_decoder(
    path: Path,
    config: DecoderConfig,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    max_positions: int | None = None,
) -> Decoder:
    """Read the weights of the folder into a decoder.

    max_positions: the length of the tables of rotary angles; None = the model's context.
    Raises EngineStartError naming the tensor, its shape and the expected one.
    """
    started = time.perf_counter()
    weights = model_weights(config)
    with Checkpoint(path) as checkpoint:
        checkpoint.check(iter_weights(weights), spare=("lm_head.weight",) if config.tied else ())
        decoder = _Builder(config, kernels, dtype, device, checkpoint, max_positions or config.max_position).decoder()
    log.info("loading %s took %.1f s", path, time.perf_counter() - started)
    return decoder


class _Builder:
    """Reads weights and makes the decoder's parts of them."""

    def __init__(
        self,
        config: DecoderConfig,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
        checkpoint: Checkpoint,
        max_positions: int,
    ) -> None:
        self.config, self.kernels, self.checkpoint = config, kernels, checkpoint
        self.dtype, self.device = dtype, device
        self.windows = tuple(dict.fromkeys(config.windows))
        self.rope_tables = [self._rope_table(index, max_positions) for index in range(len(config.ropes))]

    def _rope_table(self, index: int, max_positions: int) -> Tensor:
        rope = self.config.ropes[index]
        table = rope_table(rope.rotary_dim, max_positions, rope.base, rope.scaling, self.config.max_position)
        return table.to(self.device)

    def decoder(self) -> Decoder:
        weights = model_weights(self.config)
        embedding = self._read(weights.embedding)
        blocks: list[tuple[Block, Join]] = []
        enters = [layer.enter_attention for layer in weights.layers[1:]] + [weights.norm]
        for index, (layer, next_enter) in enumerate(zip(weights.layers, enters, strict=True)):
            attention = self._attention(index, layer.attention)
            blocks.append((attention, self._join(layer.leave_attention, layer.enter_ffn)))
            ffn = self._moe(layer.ffn) if isinstance(layer.ffn, MoeWeights) else self._feed_forward(layer.ffn)
            blocks.append((ffn, self._join(layer.leave_ffn, next_enter)))
        return Decoder(
            self.config,
            self.kernels,
            embedding,
            self._optional(weights.layers[0].enter_attention),
            blocks,
            self.kernels.linear.prepare(embedding if weights.lm_head is None else self._read(weights.lm_head), None),
            self.windows,
        )

    def _read(self, weight: Weight) -> Tensor:
        return self.checkpoint.read(weight, self.dtype, self.device)

    def _optional(self, weight: Weight | None) -> Tensor | None:
        return None if weight is None else self._read(weight)

    def _linear(self, weight: Weight, bias: Weight | None) -> Any:
        return self.kernels.linear.prepare(self._read(weight), self._optional(bias))

    def _join(self, leave: Weight | None, enter: Weight | None) -> Join:
        return make_join(self.config, self.kernels, self._optional(leave), self._optional(enter))

    def _attention(self, layer: int, weights: AttentionWeights) -> Attention:
        rope = self.config.layer_ropes[layer]
        norms = None
        if weights.q_norm is not None and weights.k_norm is not None:
            norms = self._read(weights.q_norm), self._read(weights.k_norm)
        return Attention(
            self.config,
            self.kernels,
            layer=layer,
            plan=self.windows.index(self.config.windows[layer]),
            qkv=self._linear(weights.qkv, weights.qkv_bias),
            o=self._linear(weights.o, weights.o_bias),
            rope_table=None if rope is None else self.rope_tables[rope],
            qk_norms=norms,
        )

    def _feed_forward(self, weights: FeedForwardWeights) -> FeedForward:
        return FeedForward(
            self.config,
            self.kernels,
            gate_up=self._linear(weights.gate_up, weights.gate_up_bias),
            down=self._linear(weights.down, weights.down_bias),
        )

    def _moe(self, weights: MoeWeights) -> MixtureOfExperts:
        shared = None
        if weights.shared is not None and weights.shared_gate is not None:
            shared = self._feed_forward(weights.shared), self._linear(weights.shared_gate, None)
        return MixtureOfExperts(
            self.config,
            self.kernels,
            router=self._linear(weights.router, None),
            experts=self.kernels.moe.prepare(self._read(weights.gate_up), self._read(weights.down)),
            shared=shared,
        )
