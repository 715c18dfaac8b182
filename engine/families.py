"""Every supported model family in one table, and the reading of its config.json into a `DecoderConfig`.

A family is what a model type implies without saying it: which norms, which biases, which keys. To add one, add a row
to `FAMILIES`, its tensor names to `layout.py` if they are new, and a case to the oracle tests.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .config_fields import (
    LAYER_TYPES,
    MAX_EXPERTS,
    MAX_FFN,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_LAYERS,
    MAX_POSITION,
    MAX_VOCAB,
    ConfigFields,
    read_json,
)
from .model_config import Activation, DecoderConfig, MoeConfig, Norms, QkNorm
from .quant.methods import read_scheme
from .rope_fields import Ropes, gemma3_ropes, same_rope, smollm3_ropes, smollm3_rotates

log = logging.getLogger(__name__)

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}

Windows = Callable[[ConfigFields, int], list[int | None]]


def load_config(folder: Path) -> DecoderConfig:
    """The description of the model in a folder. Raises EngineStartError naming file, key, value and remedy."""
    fields = ConfigFields(folder / "config.json", read_json(folder / "config.json"))
    if fields.has("auto_map"):
        log.warning(
            "%s: auto_map names code of the model's own; it is ignored, nothing in the folder is executed", folder
        )
    family = _family(fields)
    layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    hidden = fields.integer("hidden_size", 1, MAX_HIDDEN)
    heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    head_dim = _head_dim(fields, family, hidden, heads)
    max_position = fields.integer("max_position_embeddings", 1, MAX_POSITION)
    vocab_size = fields.integer("vocab_size", 1, MAX_VOCAB)
    windows = family.windows(fields, layers)
    ropes, layer_ropes = family.ropes(fields, family.rope_base, head_dim, windows)
    moe = family.moe(fields, layers) if family.moe else None
    ffn = fields.integer("intermediate_size", 1, MAX_FFN)
    attention_cap, logit_cap = family.softcaps
    return DecoderConfig(
        model_type=fields.text("model_type"),
        vocab_size=vocab_size,
        hidden=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(fields, heads),
        head_dim=head_dim,
        ffn=ffn,
        max_position=max_position,
        activation=_activation(fields, family),
        norms=family.norms,
        eps=fields.number("rms_norm_eps", 1e-12, 0.1, family.eps),
        norm_offset=1.0 if family.gemma else 0.0,
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias(fields),
        o_bias=family.o_bias(fields),
        mlp_bias=family.mlp_bias(fields),
        tied=fields.flag("tie_word_embeddings", family.tied),
        embedding_scale=math.sqrt(hidden) if family.gemma else 1.0,
        attention_scale=(fields.number("query_pre_attn_scalar", 1e-3, 1e6, 256) if family.gemma else head_dim) ** -0.5,
        attention_softcap=_softcap(fields, "attn_logit_softcapping", attention_cap),
        logit_softcap=_softcap(fields, "final_logit_softcapping", logit_cap),
        ropes=ropes,
        layer_ropes=layer_ropes,
        windows=tuple(None if width is None or width >= max_position else width for width in windows),
        moe=moe,
        eos_token_ids=_eos_token_ids(folder, fields, vocab_size),
        quantization=read_scheme(folder, fields),
        nested_widths=tuple(fields.integers("matformer_widths", 1, ffn)),
    )


def _family(fields: ConfigFields) -> Family:
    model_type = fields.text("model_type")
    family = FAMILIES.get(model_type)
    if family is None:
        fields.refuse("model_type", f"is not supported; supported are {', '.join(sorted(FAMILIES))}")
    architectures = fields.values.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        fields.refuse("architectures", f"must be [{family.architecture!r}]; only text generation is served")
    if fields.has("use_bidirectional_attention") and fields.flag("use_bidirectional_attention", False):
        fields.refuse("use_bidirectional_attention", "must be false; an encoder cannot generate text")
    return family


def _head_dim(fields: ConfigFields, family: Family, hidden: int, heads: int) -> int:
    if not fields.has("head_dim") and family.head_dim is None and hidden % heads:
        fields.refuse("hidden_size", f"must be a multiple of num_attention_heads = {heads}, or head_dim must be given")
    head_dim = fields.integer("head_dim", 2, MAX_HEAD_DIM, family.head_dim or hidden // heads)
    if head_dim % 2:
        fields.refuse("head_dim", f"the size of a head, {head_dim}, must be even: rotary angles turn pairs")
    return head_dim


def _kv_heads(fields: ConfigFields, heads: int) -> int:
    kv_heads = fields.integer("num_key_value_heads", 1, heads, heads)
    if heads % kv_heads:
        fields.refuse("num_key_value_heads", f"must divide num_attention_heads = {heads}")
    return kv_heads


def _activation(fields: ConfigFields, family: Family) -> Activation:
    key = "hidden_activation" if family.gemma else "hidden_act"
    name = fields.text(key, "gelu_pytorch_tanh" if family.gemma else "silu")
    if name not in ACTIVATIONS:
        fields.refuse(key, f"must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _softcap(fields: ConfigFields, key: str, default: float) -> float:
    """An absent key means the family's own cap; null and 0 mean none."""
    if key in fields.values and fields.values[key] is None:
        return 0.0
    return fields.number(key, 0, 1e6, default)


def _eos_token_ids(folder: Path, fields: ConfigFields, vocab_size: int) -> tuple[int, ...]:
    """generation_config.json knows the ends of a turn that config.json often lacks; both count."""
    ids = fields.integers("eos_token_id", 0, vocab_size - 1)
    path = folder / "generation_config.json"
    if path.is_file():
        ids = ConfigFields(path, read_json(path)).integers("eos_token_id", 0, vocab_size - 1) + ids
    return tuple(dict.fromkeys(ids))


# Sliding windows, per layer.


def _no_windows(fields: ConfigFields, layers: int) -> list[int | None]:
    return [None] * layers


def _every_layer(default: int | None) -> Windows:
    """One window for all layers; null is none, an absent key the family's default (Mistral 7B v0.1: 4096)."""

    def windows(fields: ConfigFields, layers: int) -> list[int | None]:
        if "sliding_window" not in fields.values:
            return [default] * layers
        return [fields.optional_integer("sliding_window", 1, MAX_POSITION)] * layers

    return windows


def _if_used(windows: Windows) -> Windows:
    """Qwen's files carry a window that counts only where `use_sliding_window` says so."""
    return lambda fields, layers: (
        windows(fields, layers) if fields.flag("use_sliding_window", False) else [None] * layers
    )


def _by_layer_type(slides: Callable[[ConfigFields, int], bool]) -> Windows:
    """`layer_types` says which layers slide; files older than that key follow the rule slides(fields, layer)."""

    def windows(fields: ConfigFields, layers: int) -> list[int | None]:
        if fields.has("layer_types"):
            sliding = [kind == "sliding_attention" for kind in fields.choices("layer_types", LAYER_TYPES, layers)]
        else:
            sliding = [slides(fields, layer) for layer in range(layers)]
        width = fields.integer("sliding_window", 1, MAX_POSITION, 4096) if any(sliding) else None
        return [width if slide else None for slide in sliding]

    return windows


def _qwen_slides(fields: ConfigFields, layer: int) -> bool:
    return layer >= fields.integer("max_window_layers", 0, MAX_LAYERS, 28)


def _qwen2_moe_slides(fields: ConfigFields, layer: int) -> bool:
    return layer % 2 == 0 and layer < fields.integer("max_window_layers", 0, MAX_LAYERS, 28)


def _gemma2_slides(fields: ConfigFields, layer: int) -> bool:
    return layer % 2 == 0


def _gemma3_slides(fields: ConfigFields, layer: int) -> bool:
    return (layer + 1) % fields.integer("sliding_window_pattern", 1, MAX_LAYERS, 6) != 0


def _smollm3_slides(fields: ConfigFields, layer: int) -> bool:
    return not smollm3_rotates(fields, layer)


# Mixtures of experts.


def _mixtral_moe(fields: ConfigFields, layers: int) -> MoeConfig:
    num_experts = fields.integer("num_local_experts", 1, MAX_EXPERTS, 8)
    return MoeConfig(
        num_experts=num_experts,
        top_k=fields.integer("num_experts_per_tok", 1, num_experts, 2),
        ffn=fields.integer("intermediate_size", 1, MAX_FFN),
        renormalize=True,
        shared_ffn=0,
        layers=(True,) * layers,
    )


def _qwen_moe(shared: bool) -> Callable[[ConfigFields, int], MoeConfig]:
    def read(fields: ConfigFields, layers: int) -> MoeConfig:
        key = "num_experts" if fields.has("num_experts") else "num_local_experts"
        num_experts = fields.integer(key, 1, MAX_EXPERTS)
        step = fields.integer("decoder_sparse_step", 1, MAX_LAYERS, 1)
        dense = fields.integers("mlp_only_layers", 0, layers - 1)
        return MoeConfig(
            num_experts=num_experts,
            top_k=fields.integer("num_experts_per_tok", 1, num_experts),
            ffn=fields.integer("moe_intermediate_size", 1, MAX_FFN),
            renormalize=fields.flag("norm_topk_prob", False),
            shared_ffn=fields.integer("shared_expert_intermediate_size", 1, MAX_FFN) if shared else 0,
            layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers)),
        )

    return read


# Biases.

Flag = Callable[[ConfigFields], bool]


def _never(fields: ConfigFields) -> bool:
    return False


def _key(name: str, default: bool) -> Flag:
    return lambda fields: fields.flag(name, default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the table. Defaults are Llama's.

    architecture  the class name that config.json must carry in `architectures`
    gemma         the habits of Gemma: norms around weight - 1, scaled embeddings, query_pre_attn_scalar, GELU
    head_dim      where config.json has none; None = hidden / heads
    softcaps      attention and logits, where config.json has none; 0 = off
    """

    architecture: str
    norms: Norms = "pre"
    qk_norm: QkNorm | None = None
    qkv_bias: Flag = _never
    o_bias: Flag = _never
    mlp_bias: Flag = _never
    windows: Windows = _no_windows
    ropes: Callable[[ConfigFields, float, int, list[int | None]], Ropes] = same_rope
    rope_base: float = 10_000.0
    moe: Callable[[ConfigFields, int], MoeConfig] | None = None
    head_dim: int | None = None
    gemma: bool = False
    softcaps: tuple[float, float] = (0.0, 0.0)
    tied: bool = False
    eps: float = 1e-6


_attention_bias = _key("attention_bias", False)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        mlp_bias=_key("mlp_bias", False),
    ),
    "mistral": Family(architecture="MistralForCausalLM", windows=_every_layer(4096)),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM", qkv_bias=lambda fields: True, windows=_if_used(_by_layer_type(_qwen_slides))
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        qk_norm="head",
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        windows=_if_used(_by_layer_type(_qwen_slides)),
        head_dim=128,
    ),
    "phi3": Family(architecture="Phi3ForCausalLM", windows=_every_layer(None), eps=1e-5),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        norms="both",
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        windows=_by_layer_type(_gemma2_slides),
        head_dim=256,
        gemma=True,
        softcaps=(50.0, 30.0),
        tied=True,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        norms="both",
        qk_norm="head",
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        windows=_by_layer_type(_gemma3_slides),
        ropes=gemma3_ropes,
        rope_base=1_000_000.0,
        head_dim=256,
        gemma=True,
        tied=True,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        mlp_bias=_key("mlp_bias", False),
        windows=_if_used(_by_layer_type(_smollm3_slides)),
        ropes=smollm3_ropes,
        rope_base=2_000_000.0,
        tied=True,
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        norms="post",
        qk_norm="full",
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        eps=1e-5,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        windows=_every_layer(None),
        rope_base=1_000_000.0,
        moe=_mixtral_moe,
        eps=1e-5,
    ),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        qkv_bias=_key("qkv_bias", True),
        windows=_if_used(_by_layer_type(_qwen2_moe_slides)),
        moe=_qwen_moe(shared=True),
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        qk_norm="head",
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        windows=_if_used(_every_layer(4096)),
        moe=_qwen_moe(shared=False),
    ),
}
