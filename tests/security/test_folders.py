"""A model's folder is a stranger's: nothing in it runs, and one that is broken stops the start with its reason."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from security import fuzz

from quire.engine.errors import EngineStartError

CANARY = "open({path!r}, 'w').write('run')\n"
# Reads the folder as a start does, and prints every file below it that is opened, imported, compiled or executed.
WATCHED = """
import json, os, sys
sys.path.insert(0, {tests!r})
from security.fuzz import read_folder
from pathlib import Path

folder, seen = Path({folder!r}), []

def watch(event, args):
    if event in ("open", "import", "exec", "compile", "os.exec", "subprocess.Popen", "os.posix_spawn", "ctypes.dlopen"):
        seen.append((event, [str(getattr(arg, "co_filename", arg))[:500] for arg in args if arg is not None]))

read_folder(Path({good!r}))  # what libraries import when they are first used is theirs
sys.addaudithook(watch)
read_folder(folder)
below = [(event, args) for event, args in seen if any(str(folder) in arg or "modeling_x" in arg for arg in args)]
print(json.dumps(below))
"""


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.advisory(
    *("CVE-2025-66448", "CVE-2026-22807", "CVE-2026-27893", "CVE-2026-41523", "CVE-2026-46432", "CVE-2025-32434"),
    *("CVE-2025-24357", "CVE-2025-3162", "CVE-2025-67729", "CVE-2026-24747", "CVE-2022-1471", "CVE-2026-15971"),
    *("CVE-2026-111391",),
)
def test_nothing_in_the_folder_runs(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Python's own audit events: of the folder only data files are opened, and no code is made of them."""
    canary = tmp_path / "canary"
    code = CANARY.format(path=str(canary))
    auto_map = {
        "AutoConfig": "modeling_x.Config",
        "AutoModelForCausalLM": "modeling_x.Model",
        "AutoTokenizer": "tokenizer.T",
    }
    change(folder / "config.json", auto_map=auto_map, trust_remote_code=True, activation_function="modeling_x.act")
    change(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="tokenizer.T")
    for name in ("modeling_x.py", "tokenizer.py", "configuration_x.py", "__init__.py", "sitecustomize.py", "setup.py"):
        (folder / name).write_text(code)
    (folder / "evil.pth").write_text(f"import os; {code}")
    (folder / "conftest.py").symlink_to(folder / "modeling_x.py")
    (folder / "loop").symlink_to(folder)
    pickled = b"cbuiltins\nexec\n(V" + code.encode() + b"tR."
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "x.ckpt", "x.pkl", "optimizer.pickle", "model.npy"):
        (folder / name).write_bytes(pickled)
    script = WATCHED.format(tests=str(Path(__file__).parents[1]), folder=str(folder), good=str(tiny_model))
    for where in (tmp_path, folder):  # as the working directory too, where `import tokenizer` would find it
        ran = subprocess.run(
            [sys.executable, "-P", "-c", script], cwd=where, capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, ran.stderr
        events = json.loads(ran.stdout)
        opened = {Path(arg).name for event, args in events if event == "open" for arg in args if str(folder) in arg}
        assert "config.json" in opened
        assert {Path(name).suffix for name in opened} <= {".json", ".safetensors", ".jinja"}, opened
        assert {event for event, _ in events} <= {"open"}, events
    assert not canary.exists()


def test_the_watch_sees_what_it_is_for(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    """A twin that imports from the folder is caught."""
    (folder / "modeling_x.py").write_text("")
    script = WATCHED.format(tests=str(Path(__file__).parents[1]), folder=str(folder), good=str(tiny_model))
    script = script.replace("\nread_folder(folder)", f"\nsys.path.append({str(folder)!r})\nimport modeling_x")
    ran = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=300)
    assert {event for event, _ in json.loads(ran.stdout)} >= {"open", "exec"}


def test_a_folder_with_pickles_alone_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(EngineStartError, match="only pickled weights"):
        fuzz.read_folder(folder)


@pytest.mark.advisory("CVE-2026-15976", "CVE-2026-47155")
def test_a_corrupt_file_is_never_replaced_by_another(folder: Path) -> None:
    """Beside a truncated safetensors lie the same weights in other formats: they are not tried."""
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    (folder / "pytorch_model.bin").write_bytes(whole)
    (folder / "consolidated.pth").write_bytes(whole)
    with pytest.raises(EngineStartError, match=r"model.safetensors is not a whole safetensors file"):
        fuzz.read_folder(folder)


@pytest.mark.advisory("CVE-2026-7302", "CVE-2024-37032", "CVE-2024-39719")
@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/../model.safetensors", "..", "", ".", "x.bin", "x\x00.safetensors"],
)
def test_an_index_leads_nowhere_else(folder: Path, name: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(EngineStartError):
        fuzz.read_folder(folder)


CONFIGS: list[dict[str, Any]] = [
    *(
        {field: value}
        for field in ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size")
        for value in (0, -1)
    ),
    *({field: 10**9} for field in ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size")),
    *({field: 2**63} for field in ("intermediate_size", "max_position_embeddings", "num_key_value_heads")),
    *({"rms_norm_eps": value} for value in (float("nan"), float("inf"), -1, "x", True)),
    *({"rope_theta": value} for value in (0, -1, float("nan"), 1e400, "x")),
    *({"num_key_value_heads": value} for value in (0, 3, 5)),
    *({"model_type": value} for value in ("os.system", "../x", "", 7, None, ["llama"], "__class__")),
    *({"hidden_act": value} for value in ("os.system", "torch.nn.Linear", "__import__", 1, "eval")),
    *(
        {"rope_scaling": value}
        for value in ({"rope_type": "x"}, {"rope_type": "yarn", "factor": 0}, "x", [], {"type": 1})
    ),
    *({"quantization_config": value} for value in ({"quant_method": "x"}, {"quant_method": 1}, "x", [], {"bits": -1})),
    *({"eos_token_id": value} for value in (-1, 2**40, "x", [1.5], [None])),
    {"torch_dtype": "__builtins__", "num_attention_heads": True},
    {"architectures": ["../x"], "model_type": "x" * 100_000},
]


@pytest.mark.advisory(
    "CVE-2025-66960", "CVE-2024-12055", "CVE-2025-0312", "CVE-2025-0315", "CVE-2025-0317", "CVE-2026-41523"
)
@pytest.mark.parametrize("fields", CONFIGS, ids=lambda fields: json.dumps(fields)[:50])
def test_configurations_that_no_model_has(folder: Path, fields: dict[str, Any]) -> None:
    change(folder / "config.json", **fields)
    with pytest.raises(EngineStartError) as caught:
        fuzz.read_folder(folder)
    assert len(str(caught.value)) < 2000


def entry(dtype: str, shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def packed(header: bytes, data: bytes = b"\x00" * 64, size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header + data


HEADERS = {
    "nothing": b"",
    "short": b"\x08\x00",
    "longer than the file": packed(b"{}", size=1 << 20),
    "no end": packed(b"{}", size=2**64 - 1),
    "a hundred megabytes": packed(b"{" + b" " * (101 << 20) + b"}", b""),
    "no JSON": packed(b"{]"),
    "a list": packed(b"[]"),
    "deep": packed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "deep lists": packed(b'{"a":' + b"[" * 200_000),
    "overlap": packed(json.dumps({"a": entry("F32", [8], 0, 32), "b": entry("F32", [8], 16, 48)}).encode()),
    "gap": packed(json.dumps({"a": entry("F32", [4], 0, 16), "b": entry("F32", [8], 32, 64)}).encode()),
    "beyond the end": packed(json.dumps({"a": entry("F32", [1024], 0, 4096)}).encode()),
    "backwards": packed(json.dumps({"a": entry("F32", [4], 32, 16)}).encode()),
    "negative": packed(b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}'),
    "product overflows": packed(json.dumps({"a": entry("F32", [2**33, 2**33], 0, 64)}).encode()),
    "product overflows to the size": packed(json.dumps({"a": entry("U8", [2**32, 2**32, 64], 0, 64)}).encode()),
    "shape and size differ": packed(json.dumps({"a": entry("F32", [3], 0, 64)}).encode()),
    "twice": packed(
        b'{"a": {"dtype":"F32","shape":[16],"data_offsets":[0,64]},'
        b' "a": {"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    ),
    "dtype": packed(json.dumps({"a": entry("F1024", [16], 0, 64)}).encode()),
    "no text": packed(b'{"\xff\xfe": {"dtype":"F32","shape":[16],"data_offsets":[0,64]}}'),
    "many": packed(json.dumps({f"t{i}": entry("F32", [0], 0, 0) for i in range(100_000)}).encode(), b""),
}


@pytest.mark.advisory(
    *("CVE-2024-21802", "CVE-2024-23605", "CVE-2024-21825", "CVE-2024-21836", "CVE-2024-23496", "CVE-2025-53630"),
    *("CVE-2026-33298", "CVE-2026-7482", "CVE-2025-52566", "CVE-2025-49847"),
)
@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_weights_that_lie(folder: Path, name: str) -> None:
    (folder / "model.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(EngineStartError) as caught:
        fuzz.read_folder(folder)
    assert len(str(caught.value)) < 2000


@pytest.mark.advisory("CVE-2024-32878", "CVE-2024-41130")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_that_end_too_soon(folder: Path, name: str) -> None:
    """At two hundred places of each file."""
    whole = (folder / name).read_bytes()
    for part in range(200):
        (folder / name).write_bytes(whole[: len(whole) * part // 200])
        with pytest.raises(EngineStartError):
            fuzz.read_folder(folder)


@pytest.mark.advisory("CVE-2025-49847", "CVE-2025-52566")
@pytest.mark.parametrize(
    "make",
    [
        lambda t: t["model"]["vocab"].update({"a" * (1 << 20): 300}),
        lambda t: t["model"]["vocab"].update({"x": 2**31}),
        lambda t: t["model"]["vocab"].update({"x": -1}),
        lambda t: t["model"]["vocab"].update({"x": 2**64}),
        lambda t: t["model"]["vocab"].update({"x": 4_000_000_000}),
        lambda t: t["model"].update({"merges": [["no", "such"]]}),
        lambda t: t["model"].update({"merges": ["a"] * 1000}),
        lambda t: t.update({"added_tokens": [{"id": 2**32 - 1, "content": "x", "special": True}]}),
        lambda t: t.update({"added_tokens": [{"id": 3, "content": "", "special": True}]}),
        lambda t: t.update({"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x" * 100}}),
        lambda t: t.update(
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(" * 5000}, "behavior": "Isolated"}}
        ),
        lambda t: t.update({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 10_000}}),
        lambda t: t.update({"post_processor": {"type": "TemplateProcessing"}}),
        lambda t: t.update({"truncation": {"max_length": 0, "strategy": "LongestFirst", "stride": 5}}),
        lambda t: t.clear(),
    ],
)
def test_tokenizers_that_lie(folder: Path, make: Callable[[dict[str, Any]], object]) -> None:
    """Refused, or harmless: none of them takes the process along."""
    description = json.loads((folder / "tokenizer.json").read_text())
    make(description)
    (folder / "tokenizer.json").write_text(json.dumps(description))
    with contextlib.suppress(EngineStartError):
        fuzz.read_folder(folder)


TEMPLATES = {
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "flood": "{{ 'x' * 10**10 }}",
    "includes itself": "{% include 'chat_template.jinja' %}",
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('true').x.y }}",
    "no template": "{% for %}",
    "undefined": "{{ nothing.at.all }}",
    "recursive": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.advisory("CVE-2026-115911", "CVE-2026-5760", "CVE-2025-61620")
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_cannot_write_a_greeting_stops_the_start(folder: Path, name: str) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    with pytest.raises(EngineStartError, match=r"chat_template.jinja: the chat template is not usable"):
        fuzz.read_folder(folder)


@pytest.mark.advisory("CVE-2026-115911")
def test_a_server_with_such_a_template_ends_with_its_reason(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATES["endless"])
    command = [
        sys.executable,
        "-P",
        "-m",
        "quire.server.cli",
        "serve",
        str(folder),
        "--port",
        "0",
        "--dtype",
        "float32",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert ran.returncode == 1
    assert "the chat template is not usable" in textwrap.dedent(ran.stderr + ran.stdout).replace("\n", " ")
    assert "Traceback" not in ran.stderr


def test_folders_that_are_nearly_right() -> None:
    tally = fuzz.folders(200, seed=5)
    assert tally.troubles == []
    assert tally.refused > 50
    assert tally.taken > 5
