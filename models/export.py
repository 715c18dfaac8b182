"""Write a checkpoint as an ordinary Hugging Face folder: `python -m models.export target` (or `draft`)."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from .llama import LlamaShape
from .tokenizer import CHAT_TEMPLATE, END_OF_TEXT, IM_END, SPECIAL_TOKENS, load_tokenizer
from .train import SHAPES, WORK

MODELS = Path(__file__).parent
FOLDERS = {"target": "quire-py-8m", "draft": "quire-py-1m"}


def config(shape: LlamaShape, end_of_text: int) -> dict[str, object]:
    """config.json; `matformer_widths` lists the nested feed-forward widths, each the first units of the one before."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "matformer_widths": list(shape.widths),
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rms_norm_eps": shape.eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
    }


def tokenizer_config(context: int) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in (END_OF_TEXT, IM_END)],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }


def generation_config(end_of_text: int, im_end: int) -> dict[str, object]:
    """Greedy decoding loops in most answers of a model this small; at 0.5 more end by themselves, and still parse."""
    return {
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "eos_token_id": [im_end, end_of_text],
        "pad_token_id": end_of_text,
    }


def write_json(file: Path, value: dict[str, object]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def export(name: str) -> Path:
    """The folder appears whole: it is written beside the old one, which it then replaces."""
    shape, folder = SHAPES[name], MODELS / FOLDERS[name]
    partial = WORK / folder.name
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = load_tokenizer(WORK / "tokenizer.json")
    end_of_text, im_end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(IM_END)
    weights = torch.load(WORK / f"{name}.pt")["model"]
    tensors = {f"model.{key}": value.to(torch.bfloat16).contiguous() for key, value in weights.items()}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner only
    tokenizer.save(str(partial / "tokenizer.json"))
    write_json(partial / "config.json", config(shape, end_of_text))
    write_json(partial / "tokenizer_config.json", tokenizer_config(shape.context))
    write_json(partial / "generation_config.json", generation_config(end_of_text, im_end))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=FOLDERS)
    print("wrote", export(parser.parse_args().model))


if __name__ == "__main__":
    main()
