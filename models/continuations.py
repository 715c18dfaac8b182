"""What the target writes behind prompts of the library: what acceptance heads learn from and are judged on."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from .corpus import Module, split_library
from .export import FOLDERS, MODELS
from .llama import Llama, rotate
from .tokenizer import END_OF_TEXT, load_tokenizer


class Part(NamedTuple):
    """Batches of BATCH prompts; the seed of the first, others follow."""

    batches: int
    seed: int


# A head has some three hundred weights; the held-out texts are as many as the gains in tokens a second need to be known
# to half a per cent at temperature 1.
PARTS = {"train": Part(4, 0), "held_out": Part(4, 2000)}
BATCH, CONTINUATION = 144, 192
PROMPT_LENGTHS = (64, 128, 256)  # of one batch after another
TEMPERATURES = (1.0, 0.5, 0.0)  # of one prompt after another; 0 = greedy
ROWS = 16  # sequences whose distributions are held at once: 50 MB each for target and draft
# Every tenth training module is kept apart: what heads look at was chosen on those; the held-out ones judge.
APART_EVERY = 10

Cache = list[tuple[Tensor, Tensor]]  # by layer: keys and values [batch, kv_heads, room, head_dim]


def empty_cache(model: Llama, batch: int, room: int) -> Cache:
    shape = model.shape
    size = (batch, shape.kv_heads, room, shape.head_dim)
    dtype = model.embed_tokens.weight.dtype
    return [(torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)) for _ in range(shape.layers)]


def forward_cached(model: Llama, tokens: Tensor, start: int, cache: Cache, width: int | None = None) -> Tensor:
    """Hidden states [batch, length, d] of tokens [batch, length] at positions start, start + 1, ...

    Either a whole prompt (start = 0) or one token behind what is cached; keys and values of `tokens` are added.
    """
    batch, length = tokens.shape
    end = start + length
    cos, sin = model.cos[start:end], model.sin[start:end]
    x = model.embed_tokens(tokens)
    for layer, (keys, values) in zip(model.layers, cache, strict=True):
        attention, normed = layer.self_attn, layer.input_layernorm(x)

        def heads(y: Tensor, head_dim: int = attention.head_dim) -> Tensor:
            return y.view(batch, length, -1, head_dim).transpose(1, 2)

        keys[:, :, start:end] = rotate(heads(attention.k_proj(normed)), cos, sin)
        values[:, :, start:end] = heads(attention.v_proj(normed))
        q = rotate(heads(attention.q_proj(normed)), cos, sin)
        y = F.scaled_dot_product_attention(
            q, keys[:, :, :end], values[:, :, :end], is_causal=start == 0, enable_gqa=True
        )
        x = x + attention.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x), width or model.shape.ffn)
    return model.norm(x)


def next_logits(model: Llama, hidden: Tensor) -> Tensor:
    """[..., V] float32 of hidden states [..., d]."""
    return F.linear(hidden.float(), model.embed_tokens.weight.float())


def tempered(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Next-token distributions [batch, ..., V] of logits [batch, ..., V]; temperatures [batch], 0 = greedy."""
    t = temperatures.view(-1, *[1] * (logits.ndim - 1))
    likeliest = F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return torch.where(t == 0, likeliest, (logits / t.clamp(min=1e-4)).softmax(-1))


def probabilities(model: Llama, hidden: Tensor, temperatures: Tensor) -> Tensor:
    """The same of hidden states [batch, ..., d]."""
    return tempered(next_logits(model, hidden), temperatures)


@torch.no_grad()
def sample(
    model: Llama, prompts: Tensor, count: int, temperatures: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`count` tokens behind each prompt [batch, length]: (tokens [batch, count], the states they were drawn from)."""
    batch, length = prompts.shape
    cache = empty_cache(model, batch, length + count)
    drawn, states = [prompts], []
    for i in range(count):
        states.append(forward_cached(model, drawn[-1], length + i - 1 if i else 0, cache)[:, -1])
        drawn.append(draw(probabilities(model, states[-1], temperatures), generator)[:, None])
    return torch.cat(drawn[1:], 1), torch.stack(states, 1)


def draw(chances: Tensor, generator: torch.Generator) -> Tensor:
    """One token [...] of each distribution [..., V], which need not sum to 1."""
    below = chances.cumsum(-1)
    sought = torch.rand(chances.shape[:-1], generator=generator)[..., None] * below[..., -1:]
    return torch.searchsorted(below, sought, right=True)[..., 0].clamp(max=chances.shape[-1] - 1)


def cut_prompts(
    modules: list[Module], tokenizer: Tokenizer, count: int, length: int, generator: torch.Generator
) -> Tensor:
    """`count` windows [count, length] from anywhere in the modules; each module as likely as it is long."""
    texts = [END_OF_TEXT + module.text for module in modules]
    ids = torch.tensor([i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids])
    starts = torch.randint(len(ids) - length, (count,), generator=generator)
    return ids[starts[:, None] + torch.arange(length)]


class Batch(NamedTuple):
    tokens: Tensor  # [batch, length]: prompts, then CONTINUATION tokens
    states: Tensor  # [batch, CONTINUATION, d]: the target's, that these were drawn from
    temperatures: Tensor  # [batch]

    @property
    def num_prompt(self) -> int:
        return self.tokens.shape[1] - self.states.shape[1]


def distributions(target: Llama, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """By ROWS sequences: (tokens [S, length], temperatures [S], what the target drew from [S, CONTINUATION, V])."""
    for tokens, states, temperatures in zip(*(field.split(ROWS) for field in batch), strict=True):
        yield tokens, temperatures, probabilities(target, states, temperatures)


def prepare(folder: Path, target: Llama) -> dict[str, list[Batch]]:
    """The batches of each part. Each is sampled once and kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    split = split_library()
    tokenizer = load_tokenizer(MODELS / FOLDERS["target"] / "tokenizer.json")
    training = [m for i, m in enumerate(split.library) if i % APART_EVERY]
    modules = {"train": training, "held_out": split.held_out}
    parts: dict[str, list[Batch]] = {part: [] for part in PARTS}
    for part, number in ((name, i) for name, (batches, _) in PARTS.items() for i in range(batches)):
        file = folder / f"continuations_{part}_{number}.safetensors"
        if not file.exists():
            generator = torch.Generator().manual_seed(PARTS[part].seed + number)
            length = PROMPT_LENGTHS[number % len(PROMPT_LENGTHS)]
            prompts = cut_prompts(modules[part], tokenizer, BATCH, length, generator)
            temperatures = torch.tensor(TEMPERATURES).repeat(BATCH // len(TEMPERATURES))
            tokens, states = sample(target, prompts, CONTINUATION, temperatures, generator)
            kept = Batch(torch.cat([prompts, tokens], 1), states, temperatures)
            save_file(kept._asdict(), file)
            print(f"sampled {file.name}", flush=True)
        parts[part].append(Batch(**load_file(file)))
    return parts
