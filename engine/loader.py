"""From a model's name to a decoder that runs.

    locate_model ──▶ folder ──load_config──▶ DecoderConfig ──load_decoder──▶ Decoder

Weights are read, cast or rounded, and handed to the kernels' `prepare` one matrix at a time, so that the peak of memory
is the model as it will be and one matrix (one layer's experts).
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from ..kernels import Kernels
from ..kernels.packed import RowFormat
from ..kernels.reference.rope import rope_table
from .config import BUNDLED_MODEL
from .decoder import (
    Attention,
    Block,
    Decoder,
    FeedForward,
    Join,
    MixtureOfExperts,
    QkNormed,
    make_join,
    make_norm,
    make_qk_norm,
)
from .errors import EngineStartError
from .kv_scales import all_kv_scale_names
from .layout import (
    AttentionWeights,
    FeedForwardWeights,
    LayerWeights,
    MoeWeights,
    Weight,
    iter_weights,
    model_weights,
)
from .linear import Rows
from .model_config import DecoderConfig, RopeConfig
from .parallel import ALONE, Alone
from .quant.scheme import Packing
from .reader import Reader
from .rotation import turn_columns, turn_rows
from .sharding import Share, share_of
from .weights import Checkpoint

log = logging.getLogger(__name__)

BUNDLED_FOLDER = Path(__file__).resolve().parent.parent / "models" / "quire-py-8m"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
# Data only: no code, no pickles. Sub-folders and "consolidated" files hold second copies in other formats.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
HUB_SKIPPED = ["*/*", "consolidated*"]


def locate_model(name: str, revision: str | None = None) -> Path:
    """The folder of "bundled", of a path, or of a hub id (downloaded unless cached; never when HF_HUB_OFFLINE is set).

    Raises EngineStartError when there is no such folder, the download fails, or a folder is to have a revision.
    """
    folder = Path(name).expanduser()
    if revision is not None and (name == BUNDLED_MODEL or folder.is_dir()):
        raise EngineStartError(f"revision is {revision!r}, and the model, {name!r}, is no hub id: leave revision out")
    if name == BUNDLED_MODEL:
        return _existing(BUNDLED_FOLDER, "the bundled model is not installed; give another model")
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
    *,
    rounding: Packing | None = None,
    turn_values: bool = False,
    group: Alone = ALONE,
    advance: Callable[[float], None] | None = None,
) -> Decoder:
    """Read the weights of the folder into a decoder.

    max_positions: the length of the tables of rotary angles; None = the model's context.
    rounding: what float matrices of the layers become; None = they stay.
    turn_values: the cache holds values rotated (its format `rotates_keys`).
    group: the ranks that share the model; of each cut weight only this rank's part is read.
    advance: told, now and then, which part of the layers is there, 0 to 1.
    Raises EngineStartError naming the tensor, its shape and the expected one.
    """
    started = time.perf_counter()
    weights = model_weights(config)
    with Checkpoint(path, config.quantization) as checkpoint:
        spare = [*all_kv_scale_names(config), *(["lm_head.weight"] if config.tied else [])]
        checkpoint.check(iter_weights(weights), spare=spare)
        reader = Reader(checkpoint, kernels, dtype, device, rounding, group)
        share = share_of(config, group.rank, group.size, rounding)
        builder = _Builder(config, share, kernels, reader, max_positions or config.max_position, turn_values)
        decoder = builder.decoder(advance or (lambda done: None))
    log.info("loading %s took %.1f s", path, time.perf_counter() - started)
    return decoder


def make_norms(
    config: DecoderConfig,
    kernels: Kernels,
    reader: Reader,
    layers: Sequence[LayerWeights],
    last: Weight,
    rows: Sequence[RowFormat | None],
) -> tuple[Callable[[Tensor], Rows] | None, list[Join]]:
    """What stands before the first block of these layers, between each and the next, and, with the norm `last`, behind
    them. rows: as each block wants its input."""
    enters = [norm for layer in layers for norm in (layer.enter_attention, layer.enter_ffn)]
    leaves = [norm for layer in layers for norm in (layer.leave_attention, layer.leave_ffn)]
    first = reader.optional(enters[0])
    joins = [
        make_join(config, kernels, reader.optional(leave), reader.optional(enter), wanted)
        for leave, enter, wanted in zip(leaves, [*enters[1:], last], [*rows[1:], None], strict=True)
    ]
    return None if first is None else make_norm(config, kernels, first, rows[0]), joins


class _Builder:
    """Makes the decoder's parts of what the reader gives."""

    def __init__(
        self,
        config: DecoderConfig,
        share: Share,
        kernels: Kernels,
        reader: Reader,
        max_positions: int,
        turn_values: bool,
    ) -> None:
        self.config, self.share, self.kernels, self.reader = config, share, kernels, reader
        self.group, self.turn_values = reader.group, turn_values
        self.windows = tuple(dict.fromkeys(config.windows))
        self.rope_tables = [self._rope_table(rope, max_positions) for rope in config.ropes]

    def _rope_table(self, rope: RopeConfig, max_positions: int) -> Tensor:
        table = rope_table(rope.rotary_dim, max_positions, rope.base, rope.scaling, self.config.max_position)
        return table.to(self.reader.device)

    def decoder(self, advance: Callable[[float], None]) -> Decoder:
        weights = model_weights(self.config, self.share.spans)
        embedding = self.reader.floats(weights.embedding)
        blocks: list[Block] = []
        for index, layer in enumerate(weights.layers):
            advance(index / len(weights.layers))
            ffn = self._moe(layer.ffn) if isinstance(layer.ffn, MoeWeights) else self._feed_forward(layer.ffn)
            blocks += [self.group.summed(self._attention(index, layer.attention)), self.group.summed(ffn)]
        lm_head = self.reader.logits_of(embedding) if weights.lm_head is None else self.reader.logits(weights.lm_head)
        first, joins = make_norms(
            self.config, self.kernels, self.reader, weights.layers, weights.norm, [block.rows for block in blocks]
        )
        return Decoder(
            self.config,
            self.kernels,
            embedding,
            self.group.embedding(self.kernels.embed.run, embedding),
            first,
            list(zip(blocks, joins, strict=True)),
            lm_head,
            self.windows,
        )

    def _attention(self, layer: int, weights: AttentionWeights) -> Attention:
        rope = self.config.layer_ropes[layer]
        held = self.share.config
        folds = self.turn_values and self.reader.is_plain(weights.qkv) and self.reader.is_plain(weights.o)
        bias = self.reader.optional(weights.qkv_bias)
        if folds and bias is not None:
            bias = self._turn_values(bias, 0).to(self.reader.dtype)
        return Attention(
            held,
            self.kernels,
            layer=layer,
            plan=self.windows.index(self.config.windows[layer]),
            qkv=self.reader.linear(weights.qkv, bias, self._turn_values if folds else None),
            o=self.reader.row_parallel(
                weights.o, self.reader.optional(weights.o_bias), self._turn_outputs if folds else None
            ),
            rope_table=None if rope is None else self.rope_tables[rope],
            norm_qk=self._qk_norm(weights.q_norm, weights.k_norm),
            turn_values=self.turn_values and not folds,
        )

    def _qk_norm(self, q: Weight | None, k: Weight | None) -> QkNormed | None:
        if q is None or k is None:
            return None
        norm = make_qk_norm(self.config, self.kernels, self.reader.floats(q), self.reader.floats(k))
        if self.config.qk_norm == "head":
            return norm
        return self.group.norms(norm, self.share.config.num_heads, self.config.num_kv_heads)

    def _turn_values(self, rows: Tensor, first: int) -> Tensor:
        """Rows [.., d] (or entries of the bias) of the joined q, k and v: those of v are turned."""
        held = self.share.config
        values = (held.num_heads + held.num_kv_heads) * held.head_dim
        kept, turned = rows[: max(values - first, 0)], rows[max(values - first, 0) :]
        if not len(turned):
            return rows
        return torch.cat([kept.float(), turn_rows(turned, self.config.head_dim, self.kernels.hadamard.run)])

    def _turn_outputs(self, rows: Tensor, first: int) -> Tensor:
        return turn_columns(rows, self.config.head_dim, self.kernels.hadamard.run)

    def _feed_forward(self, weights: FeedForwardWeights) -> FeedForward:
        return FeedForward(
            self.config,
            self.kernels,
            gate_up=self.reader.linear(weights.gate_up, self.reader.optional(weights.gate_up_bias)),
            down=self.reader.row_parallel(weights.down, self.reader.optional(weights.down_bias)),
        )

    def _moe(self, weights: MoeWeights) -> MixtureOfExperts:
        shared = None
        if weights.shared is not None and weights.shared_gate is not None:
            shared = self._feed_forward(weights.shared), self.reader.as_stored(weights.shared_gate)
        return MixtureOfExperts(
            self.config,
            self.kernels,
            router=self.reader.as_stored(weights.router),
            experts=self.reader.experts(weights.gate_up, weights.down),
            shared=shared,
        )
