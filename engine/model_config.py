"""What a decoder is, read from a folder's config.json: one frozen description for every model family.

    config.json ──load_config──▶ DecoderConfig ──▶ decoder.py (what to compute), loader.py (which tensors to read)

Only JSON is read: `auto_map` and any Python in the folder are never executed. The families' differences live in
`families.py`; everything after it sees only `DecoderConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .quant.scheme import Scheme

Norms = Literal["pre", "post", "both"]
QkNorm = Literal["head", "full"]
Activation = Literal["silu", "gelu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """One set of rotary angles.

    base        theta
    rotary_dim  leading entries of a head that are rotated; the rest pass through
    scaling     None, or a checkpoint's rope parameters with `rope_type` and that type's numbers
    """

    base: float
    rotary_dim: int
    scaling: dict[str, object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """A mixture of experts in place of a feed-forward.

    ffn          hidden width of one expert
    renormalize  the chosen experts' probabilities are scaled to sum to 1
    shared_ffn   width of the expert that every token passes, weighed by a sigmoid gate; 0 = none
    layers       per layer: whether its feed-forward is this mixture
    """

    num_experts: int
    top_k: int
    ffn: int
    renormalize: bool
    shared_ffn: int
    layers: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer.

    norms            "pre": before attention and feed-forward (Llama); "post": after each, inside the residual branch
                     (OLMo 2); "both": before and after (Gemma 2 and 3)
    norm_offset      added to every norm's weight (Gemma: 1)
    qk_norm          None; "head": each head over head_dim (Qwen3); "full": all heads of a row at once (OLMo 2)
    tied             the logits' matrix is the embedding
    embedding_scale  multiplies embeddings (Gemma: sqrt(hidden))
    softcaps         x -> c * tanh(x / c) on attention scores and on logits; 0 = off
    ropes            the distinct sets of angles; layer_ropes: per layer an index into them, None = no positions (NoPE)
    windows          per layer: None, or w = a query sees the last w positions, itself included
    max_position     the context it was trained (and stretched) for, in tokens
    quantization     how the checkpoint stores its linears; None = as floats
    nested_widths    of feed-forwards whose first so many units were trained as a model of their own (MatFormer); none =
                     the checkpoint does not say
    """

    model_type: str
    vocab_size: int
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    max_position: int
    activation: Activation
    norms: Norms
    eps: float
    norm_offset: float
    qk_norm: QkNorm | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied: bool
    embedding_scale: float
    attention_scale: float
    attention_softcap: float
    logit_softcap: float
    ropes: tuple[RopeConfig, ...]
    layer_ropes: tuple[int | None, ...]
    windows: tuple[int | None, ...]
    moe: MoeConfig | None
    eos_token_ids: tuple[int, ...]
    quantization: Scheme | None = None
    nested_widths: tuple[int, ...] = ()
