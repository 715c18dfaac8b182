"""The bundled models: a tokenizer that loses nothing, folders that load, nested weights, an honest held-out split."""

import random

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from quire.models.chat import conversation, documented, first_sentence, functions_of, render
from quire.models.corpus import Module, is_near_duplicate, long_lines, split_library
from quire.models.export import FOLDERS, MODELS
from quire.models.llama import Llama, LlamaShape
from quire.models.train import SHAPES, WARMUP_TOKENS, learning_rate, window_length

TOTAL_BYTES = 20_000_000


@pytest.fixture(scope="module", params=FOLDERS.values())
def folder(request):
    return MODELS / request.param


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(MODELS / FOLDERS["target"] / "tokenizer.json"))


@pytest.fixture(scope="module")
def nested():
    torch.manual_seed(0)
    shape = LlamaShape(32, layers=2, ffn=64, heads=2, kv_heads=1, head_dim=16, widths=(64, 32), vocab=50, context=16)
    model = Llama(shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_any_text_survives_the_tokenizer(tokenizer):
    rng = random.Random(0)
    texts = ["", "\n\n\n    x\t= 1\r\n", "naïve 日本語 🦆\u200b", "\x00\x7f", "  \n \n", "if a:\n\tpass\n        b"]
    texts += ["".join(map(chr, rng.choices(range(128), k=20) + rng.choices(range(0xD800), k=20))) for _ in range(50)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_every_byte_has_a_token(tokenizer):
    spelled = "".join(chr(code) for code in range(256)).encode("latin-1").decode("latin-1")
    assert tokenizer.decode(tokenizer.encode(spelled).ids) == spelled
    assert sum(len(token) == 1 for token in tokenizer.get_vocab()) == 256


def test_digits_stand_alone_and_chat_marks_are_single_tokens(tokenizer):
    assert tokenizer.encode("2048").tokens == list("2048")
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>").ids == [0, 1, 2]


def test_both_models_share_the_tokenizer():
    one, other = ((MODELS / name / "tokenizer.json").read_text() for name in FOLDERS.values())
    assert one == other


def test_all_files_stay_small():
    files = [file for name in FOLDERS.values() for file in (MODELS / name).iterdir()]
    assert sum(file.stat().st_size for file in files) <= TOTAL_BYTES


def test_transformers_loads_the_folder_and_agrees_with_the_training_module(folder):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    name = next(name for name, folder_name in FOLDERS.items() if folder_name == folder.name)
    ours = Llama(SHAPES[name])
    ours.load_state_dict(
        {k.removeprefix("model."): v.float() for k, v in load_file(folder / "model.safetensors").items()}
    )
    tokens = torch.arange(3, 203)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), loaded(tokens).logits, atol=1e-4, rtol=0)
    assert loaded.generation_config.eos_token_id == [2, 0]
    assert tuple(loaded.config.matformer_widths) == SHAPES[name].widths


def test_the_chat_template_is_what_training_saw(folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [("system", "Be brief."), ("user", "Hi"), ("assistant", "def hi(): ...")]
    as_dicts = [{"role": role, "content": content} for role, content in messages]
    assert tokenizer.apply_chat_template(as_dicts, tokenize=False) == render(messages)
    prompt = tokenizer.apply_chat_template(as_dicts[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == render(messages[:2]) + "<|im_start|>assistant\n"
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_slice_of_full_width_is_the_full_model(nested):
    tokens = torch.randint(50, (2, 16))
    assert torch.equal(nested(tokens, 64), nested(tokens))
    assert not torch.allclose(nested(tokens, 32), nested(tokens))


def test_a_slice_reads_only_the_first_units(nested):
    tokens = torch.randint(50, (2, 16))
    before = nested(tokens, 32)
    with torch.no_grad():
        for layer in nested.layers:
            layer.mlp.gate_proj.weight[32:] = torch.nan
            layer.mlp.up_proj.weight[32:] = torch.nan
            layer.mlp.down_proj.weight[:, 32:] = torch.nan
    assert torch.equal(nested(tokens, 32), before)


def test_the_held_out_modules_are_in_no_training_text():
    split = split_library()
    training = split.library + split.tests
    held_out = split.held_out + split.held_out_tests
    assert {m.path for m in training}.isdisjoint(m.path for m in held_out + split.duplicates)
    held_out_lines = [long_lines(m) for m in held_out]
    assert not any(is_near_duplicate(long_lines(m), other) for m in training[::10] for other in held_out_lines)


def test_a_conversation_holds_the_function_and_ends():
    source = 'def largest(a, b):\n    """Return the largest of two numbers."""\n    return a if a > b else b\n'
    ((function, lines),) = functions_of(Module("m.py", source))
    assert documented(function)
    text = conversation(function, lines, random.Random(1))
    assert text.startswith("<|im_start|>user\n")
    assert text.endswith("return a if a > b else b<|im_end|>\n")


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return x.  Or not.", "Return x"),
        ("Return\n    x, e.g.\n\nMore.", "Return x, e.g"),
        ("Use version 3.11 of it", "Use version 3.11 of it"),
    ],
)
def test_first_sentence(docstring, sentence):
    assert first_sentence(docstring) == sentence


def test_the_schedule_warms_up_holds_and_decays():
    total = 40_000_000
    assert learning_rate(0, total) < 0.05
    assert learning_rate(WARMUP_TOKENS, total) == learning_rate(total // 2, total) == 1.0
    assert learning_rate(int(0.875 * total), total) == pytest.approx(0.5)
    assert learning_rate(total, total) == 0.0
    assert {window_length(step, total // 2, total) for step in range(8)} == {256}
    assert {window_length(step, int(0.9 * total), total) for step in range(8)} == {256, 2048}
