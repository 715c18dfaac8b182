"""A small Llama whose feed-forward layers are nested: the first m hidden units are a model of their own.

Parameter names are those of the Hugging Face checkpoint without the `model.` prefix, so exporting is a plain save.
MatFormer: arXiv 2310.07707.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaShape:
    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    widths: tuple[int, ...]  # nested feed-forward widths, widest first
    vocab: int = 4096
    context: int = 2048
    rope_theta: float = 10_000.0
    eps: float = 1e-5


TARGET = LlamaShape(256, layers=7, ffn=1024, heads=4, kv_heads=2, head_dim=64, widths=(1024, 512, 256, 128))
DRAFT = LlamaShape(128, layers=3, ffn=384, heads=4, kv_heads=2, head_dim=32, widths=(384,))


def rope_tables(shape: LlamaShape) -> tuple[Tensor, Tensor]:
    """cos and sin [context, head_dim], the two halves equal (the half-split layout of Hugging Face's Llama)."""
    frequencies = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    angles = torch.outer(torch.arange(shape.context, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [batch, heads, length, head_dim]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(batch, length, heads, self.head_dim).transpose(1, 2)

        q = rotate(split(self.q_proj(x), self.heads), cos, sin)
        k = rotate(split(self.k_proj(x), self.kv_heads), cos, sin)
        v = split(self.v_proj(x), self.kv_heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor, width: int) -> Tensor:
        """SwiGLU over the first `width` hidden units."""
        gate = F.linear(x, self.gate_proj.weight[:width])
        up = F.linear(x, self.up_proj.weight[:width])
        return F.linear(F.silu(gate) * up, self.down_proj.weight[:, :width])


class Layer(nn.Module):
    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, width: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x), width)


class Llama(nn.Module):
    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        cos, sin = rope_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)  # every layer starts as the identity
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02 if "embed" in name else shape.hidden**-0.5)

    def hidden_matrices(self) -> list[nn.Parameter]:
        return [p for p in self.layers.parameters() if p.ndim == 2]

    def hidden(self, tokens: Tensor, width: int | None = None) -> Tensor:
        """Normed hidden states [batch, length, hidden] of token ids [batch, length], with nested width `width`."""
        x = self.embed_tokens(tokens)
        length = tokens.shape[1]
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        cos, sin = self.cos[:length].to(dtype), self.sin[:length].to(dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, width or self.shape.ffn)
        return self.norm(x)

    def forward(self, tokens: Tensor, width: int | None = None) -> Tensor:
        """Logits [batch, length, vocab]."""
        return F.linear(self.hidden(tokens, width), self.embed_tokens.weight)


def cross_entropy(hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per token: hidden [batch, length, hidden], embedding [vocab, hidden], targets [batch, length]."""
    return F.cross_entropy(F.linear(hidden, embedding).flatten(0, 1).float(), targets.flatten())
