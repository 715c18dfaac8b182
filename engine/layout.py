"""Which tensors a decoder is made of, where a checkpoint keeps them, and how they are joined.

One description serves the loader (what to read), its checks (what is missing, surplus or misshapen) and the planning
of memory (how much it will be). Names are without the leading `model.`. A linear goes by the name of its floats; what a
quantized checkpoint has in their place, `quant/` knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .model_config import DecoderConfig, MoeConfig
from .quant.scheme import Packing

Span = tuple[int, int]  # first and past the last


class Cut(NamedTuple):
    """What is held of a tensor: these spans of one dimension, end to end."""

    dim: int
    spans: tuple[Span, ...]

    @property
    def size(self) -> int:
        return sum(stop - start for start, stop in self.spans)


class Part(NamedTuple):
    """One tensor of a checkpoint. cut: what of it is held; None = all."""

    name: str
    shape: tuple[int, ...]
    cut: Cut | None = None

    @property
    def held(self) -> tuple[int, ...]:
        """The shape of what is held."""
        if self.cut is None:
            return self.shape
        return (*self.shape[: self.cut.dim], self.cut.size, *self.shape[self.cut.dim + 1 :])

    @property
    def linear(self) -> str:
        """The name of the module whose weight this is, as configurations have it."""
        name = self.name.removesuffix(".weight")
        return name if name == "lm_head" else f"model.{name}"


class Weight(NamedTuple):
    """A parameter: its parts laid end to end in memory, which for row-major matrices is a join of rows.

    shape: of what is held.
    layouts: the ways in which checkpoints store it, the usual one last.
    linear: a matrix that checkpoints may have quantized. Norms, biases, embeddings and routers stay floats.
    """

    shape: tuple[int, ...]
    layouts: tuple[tuple[Part, ...], ...]
    linear: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class AttentionWeights(NamedTuple):
    qkv: Weight  # [(Hq + 2 Hk) * D, d]
    qkv_bias: Weight | None
    o: Weight  # [d, Hq * D]
    o_bias: Weight | None
    q_norm: Weight | None
    k_norm: Weight | None


class FeedForwardWeights(NamedTuple):
    gate_up: Weight  # [2f, d]
    gate_up_bias: Weight | None
    down: Weight  # [d, f]
    down_bias: Weight | None


class MoeWeights(NamedTuple):
    router: Weight  # [E, d]
    gate_up: Weight  # [E, 2f, d]
    down: Weight  # [E, d, f]
    shared: FeedForwardWeights | None
    shared_gate: Weight | None  # [1, d]


class LayerWeights(NamedTuple):
    """enter and leave: the norms before and after attention and feed-forward; None where the family has none."""

    enter_attention: Weight | None
    attention: AttentionWeights
    leave_attention: Weight | None
    enter_ffn: Weight | None
    ffn: FeedForwardWeights | MoeWeights
    leave_ffn: Weight | None


class ModelWeights(NamedTuple):
    embedding: Weight  # [V, d]
    layers: tuple[LayerWeights, ...]
    norm: Weight  # [d]
    lm_head: Weight | None  # [V, d]; None = tied to the embedding


class Spans(NamedTuple):
    """What one rank holds of the dimensions that tensor parallelism cuts, and whether it adds the biases of sums."""

    q: Span  # rows of all query heads
    kv: Span  # rows of all key (or value) heads
    ffn: Span
    expert: Span  # hidden units of each expert of a mixture
    shared: Span  # of the expert that every token passes
    vocab: Span
    adds_biases: bool = True


def whole(config: DecoderConfig) -> Spans:
    """Everything."""
    moe = config.moe
    return Spans(
        q=(0, config.num_heads * config.head_dim),
        kv=(0, config.num_kv_heads * config.head_dim),
        ffn=(0, config.ffn),
        expert=(0, moe.ffn if moe else 0),
        shared=(0, moe.shared_ffn if moe else 0),
        vocab=(0, config.vocab_size),
    )


def model_weights(config: DecoderConfig, spans: Spans | None = None) -> ModelWeights:
    """spans: what is held of it; None = everything."""
    vocab, hidden = config.vocab_size, config.hidden
    spans = spans or whole(config)
    rows = _cut(vocab, 0, spans.vocab)
    return ModelWeights(
        embedding=_plain("embed_tokens.weight", vocab, hidden, cut=rows),
        layers=tuple(_layer(config, layer, spans) for layer in range(config.num_layers)),
        norm=_plain("norm.weight", hidden),
        lm_head=None if config.tied else _linear("lm_head.weight", vocab, hidden, cut=rows),
    )


def iter_weights(tree: tuple[object, ...]) -> Iterator[Weight]:
    """All parameters of a nest of the tuples above."""
    for entry in tree:
        if isinstance(entry, Weight):
            yield entry
        elif isinstance(entry, tuple):
            yield from iter_weights(entry)


def count_parameters(config: DecoderConfig) -> int:
    """Parameters of the model, a tied matrix counted once; nothing is loaded."""
    return sum(weight.size for weight in iter_weights(model_weights(config)))


def weight_bytes(
    config: DecoderConfig, dtype: torch.dtype, rounding: Packing | None = None, spans: Spans | None = None
) -> int:
    """Bytes of the parameters: floats in a dtype, linears as the checkpoint or `rounding` packs them.

    rounding: what the linears of the layers become while they are loaded; None = they stay.
    spans: what is held of them; None = everything.
    A kernel that packs a tied logits matrix holds that one a second time.
    """
    weights = model_weights(config, spans)
    return sum(_bytes(config, weight, dtype, rounding) for weight in iter_weights(weights._replace(lm_head=None))) + (
        0 if weights.lm_head is None else _bytes(config, weights.lm_head, dtype, None)
    )


def _bytes(config: DecoderConfig, weight: Weight, dtype: torch.dtype, rounding: Packing | None) -> int:
    if not weight.linear:
        return weight.size * dtype.itemsize
    total = 0
    for part in weight.layouts[-1]:
        storage = config.quantization and config.quantization.storage(part.linear)
        packing = storage.packing if storage else rounding
        total += packing.nbytes(*part.held) if packing else math.prod(part.held) * dtype.itemsize
    return total


def _cut(total: int, dim: int, *spans: Span) -> Cut | None:
    """None where the spans are the whole dimension."""
    cut = Cut(dim, spans)
    return None if cut.size == total else cut


def _linear(name: str, outputs: int, inputs: int, cut: Cut | None = None) -> Weight:
    return _plain(name, outputs, inputs, cut=cut)._replace(linear=True)


def _plain(name: str, *shape: int, cut: Cut | None = None) -> Weight:
    part = Part(name, shape, cut)
    return Weight(part.held, ((part,),))


def _rows(
    prefix: str, joint: str, parts: dict[str, int], spans: tuple[Span, ...], suffix: str, *columns: int
) -> Weight:
    """A matrix stored whole (Phi-3) or as several that are joined by rows; with no columns, their biases.

    parts: the rows of each; spans: those that are held of each
    """
    total, start, shifted = sum(parts.values()), 0, []
    for rows, (first, last) in zip(parts.values(), spans, strict=True):
        shifted.append((start + first, start + last))
        start += rows
    joined = Part(f"{prefix}{joint}.{suffix}", (total, *columns), _cut(total, 0, *shifted))
    single = tuple(
        Part(f"{prefix}{name}.{suffix}", (rows, *columns), _cut(rows, 0, span))
        for (name, rows), span in zip(parts.items(), spans, strict=True)
    )
    return Weight(joined.held, ((joined,), single), linear=bool(columns))


def _layer(config: DecoderConfig, layer: int, spans: Spans) -> LayerWeights:
    prefix = f"layers.{layer}."

    def norm(name: str, present: bool) -> Weight | None:
        return _plain(f"{prefix}{name}.weight", config.hidden) if present else None

    before, after = config.norms != "post", config.norms != "pre"
    mixture = config.moe if config.moe is not None and config.moe.layers[layer] else None
    return LayerWeights(
        enter_attention=norm("input_layernorm", before),
        attention=_attention(config, f"{prefix}self_attn.", spans),
        leave_attention=norm("post_attention_layernorm", after),
        # Llama's name for the norm before the feed-forward says where it stands, Gemma's what it does.
        enter_ffn=norm("pre_feedforward_layernorm" if after else "post_attention_layernorm", before),
        ffn=_moe(config, mixture, prefix, spans)
        if mixture
        else _feed_forward(config, f"{prefix}mlp.", config.ffn, spans.ffn, spans.adds_biases),
        leave_ffn=norm("post_feedforward_layernorm", after),
    )


def _attention(config: DecoderConfig, prefix: str, spans: Spans) -> AttentionWeights:
    hidden, head_dim = config.hidden, config.head_dim
    q, kv = config.num_heads * head_dim, config.num_kv_heads * head_dim
    parts, held = {"q_proj": q, "k_proj": kv, "v_proj": kv}, (spans.q, spans.kv, spans.kv)
    norms = {None: (0, 0), "head": (head_dim, head_dim), "full": (q, kv)}[config.qk_norm]
    return AttentionWeights(
        qkv=_rows(prefix, "qkv_proj", parts, held, "weight", hidden),
        qkv_bias=_rows(prefix, "qkv_proj", parts, held, "bias") if config.qkv_bias else None,
        o=_linear(f"{prefix}o_proj.weight", hidden, q, _cut(q, 1, spans.q)),
        o_bias=_plain(f"{prefix}o_proj.bias", hidden) if config.o_bias and spans.adds_biases else None,
        q_norm=_plain(f"{prefix}q_norm.weight", norms[0]) if config.qk_norm else None,
        k_norm=_plain(f"{prefix}k_norm.weight", norms[1]) if config.qk_norm else None,
    )


def _feed_forward(config: DecoderConfig, prefix: str, ffn: int, span: Span, adds_biases: bool) -> FeedForwardWeights:
    parts, held = {"gate_proj": ffn, "up_proj": ffn}, (span, span)
    return FeedForwardWeights(
        gate_up=_rows(prefix, "gate_up_proj", parts, held, "weight", config.hidden),
        gate_up_bias=_rows(prefix, "gate_up_proj", parts, held, "bias") if config.mlp_bias else None,
        down=_linear(f"{prefix}down_proj.weight", config.hidden, ffn, _cut(ffn, 1, span)),
        down_bias=_plain(f"{prefix}down_proj.bias", config.hidden) if config.mlp_bias and adds_biases else None,
    )


# One expert's gate, up and down matrices in checkpoints that store every expert by itself; a family's own come last.
QWEN_EXPERTS = {"mlp.": ("gate_proj", "up_proj", "down_proj")}
MIXTRAL_EXPERTS = {"block_sparse_moe.": ("w1", "w3", "w2")}


def _moe(config: DecoderConfig, moe: MoeConfig, prefix: str, spans: Spans) -> MoeWeights:
    hidden, experts, ffn = config.hidden, moe.num_experts, moe.ffn
    mixtral = config.model_type == "mixtral"
    all_names = QWEN_EXPERTS | MIXTRAL_EXPERTS if mixtral else MIXTRAL_EXPERTS | QWEN_EXPERTS

    def stack(name: str, which: slice, part: tuple[int, int], dim: int) -> Weight:
        """part: the shape of one matrix of an expert, whose dimension `dim` are its hidden units."""
        cut = _cut(ffn, dim, spans.expert)
        layouts: list[tuple[Part, ...]] = []
        for block, names in all_names.items():
            count = len(names[which])
            joint = tuple((i * ffn + spans.expert[0], i * ffn + spans.expert[1]) for i in range(count))
            layouts.append(
                (
                    Part(
                        f"{prefix}{block}experts.{name}",
                        (experts, count * part[0], part[1]),
                        _cut(count * ffn, 1 + dim, *joint),
                    ),
                )
            )
        for block, names in all_names.items():
            layouts.append(
                tuple(
                    Part(f"{prefix}{block}experts.{expert}.{matrix}.weight", part, cut)
                    for expert in range(experts)
                    for matrix in names[which]
                )
            )
        return Weight(layouts[0][0].held, tuple(layouts), linear=True)

    shared = None
    if moe.shared_ffn:
        shared = _feed_forward(config, f"{prefix}mlp.shared_expert.", moe.shared_ffn, spans.shared, spans.adds_biases)
    return MoeWeights(
        router=Weight(
            (experts, hidden),
            tuple((Part(f"{prefix}{block}gate.weight", (experts, hidden)),) for block in all_names),
        ),
        gate_up=stack("gate_up_proj", slice(0, 2), (ffn, hidden), 0),
        down=stack("down_proj", slice(2, 3), (hidden, ffn), 1),
        shared=shared,
        shared_gate=_plain(f"{prefix}mlp.shared_expert_gate.weight", 1, hidden) if shared else None,
    )
