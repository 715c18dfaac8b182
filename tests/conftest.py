"""Fixtures that more than one folder uses: a tiny random model and an engine that runs on a thread."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

# One thread: the models are tiny, and where cores are shared a second one mostly waits (20 times slower when measured
# on two busy cores).
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU the Triton kernels run in their interpreter; it must be asked for before they are decorated.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

TINY = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def make_tiny_model(folder: Path, **changes: object) -> Path:
    """A random fp32 model whose logits are far enough apart that rounding does not decide the greedy token."""
    import torch
    from safetensors.torch import save_file

    config = TINY | changes
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = d // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]
    tensors = {"model.embed_tokens.weight": normal(v, d, scale=1.0), "model.norm.weight": torch.ones(d)}
    tensors["lm_head.weight"] = normal(v, d, scale=1.0)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        tensors |= {
            p + "input_layernorm.weight": torch.ones(d),
            p + "post_attention_layernorm.weight": torch.ones(d),
            p + "self_attn.q_proj.weight": normal(d, d),
            p + "self_attn.k_proj.weight": normal(kv, d),
            p + "self_attn.v_proj.weight": normal(kv, d),
            p + "self_attn.o_proj.weight": normal(d, d),
            p + "self_attn.q_proj.bias": normal(d),
            p + "self_attn.k_proj.bias": normal(kv),
            p + "self_attn.v_proj.bias": normal(kv),
            p + "mlp.gate_proj.weight": normal(f, d),
            p + "mlp.up_proj.weight": normal(f, d),
            p + "mlp.down_proj.weight": normal(d, f),
        }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose first 256 ids are bytes, then <bos> and <eos>, and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(hidden)}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": template}))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-shaped, 3 layers, 300 logits, fp32; a tokenizer of bytes."""
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def narrow_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without its last 60 tokens and their logits: 240 are left, of the same values."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / "narrow"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"vocab_size": 240, "bos_token_id": 238, "eos_token_id": 239})
    )
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        name: tensors[name][:240].contiguous() for name in tensors if len(tensors[name]) == config["vocab_size"]
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with sizes that no kernel divides: heads of 18, 54 hidden, 70 inner."""
    sizes = {"hidden_size": 54, "intermediate_size": 70, "num_attention_heads": 3, "num_key_value_heads": 3}
    return make_tiny_model(tmp_path_factory.mktemp("models") / "odd", **sizes)
