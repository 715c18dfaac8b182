"""`quire doctor`: what this machine has, what Quire would use of it, and what is missing."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import format_bytes, out

PACKAGES = (
    "quire", "torch", "triton", "tokenizers", "safetensors", "numpy", "msgspec", "pyzmq", "fastapi",
    "starlette", "uvicorn", "uvloop", "pydantic",
)  # fmt: skip
OPTIONAL = {"triton"}  # comes with the GPU builds of torch
# What changes speed by a factor: vector width, and the units that multiply bf16 or int8 matrices.
CPU_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `problem` says why Quire cannot serve here, and what to do about it."""

    topic: str
    name: str
    value: str
    problem: str | None = None


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Report versions, processor, memory, kernels, compiler and GPU. Exit code 1 if Quire cannot serve here."""
    findings = [*software(), *processor(), *resources(), *kernels(), *compiler(), *gpu(), *bundled_model()]
    problems = [finding for finding in findings if finding.problem]
    if as_json:
        report: dict[str, dict[str, str]] = {}
        for finding in findings:
            report.setdefault(finding.topic, {})[finding.name] = finding.value
        print(json.dumps({**report, "problems": [f"{p.name}: {p.problem}" for p in problems]}, indent=2))
    else:
        _show(findings)
    if problems:
        raise typer.Exit(1)


def software() -> list[Finding]:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    python = Finding(
        "software", "python", platform.python_version(), None if supported else "Quire needs Python 3.11 to 3.13"
    )
    return [python, Finding("software", "system", platform.platform()), *(_package(name) for name in PACKAGES)]


def _package(name: str) -> Finding:
    try:
        return Finding("software", name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding("software", name, "-", None if name in OPTIONAL else f"not installed: pip install {name}")


def processor() -> list[Finding]:
    lines = (line.split(":", 1) for line in _read("/proc/cpuinfo").splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return [
        Finding("processor", "model", fields.get("model name") or platform.processor() or platform.machine()),
        Finding("processor", "instructions", " ".join(flag for flag in CPU_FLAGS if flag in flags) or "unknown"),
    ]


def resources() -> list[Finding]:
    """As the engine sees them: cut by affinity and by the container's limits."""
    from ..engine.resolve import look_at_machine

    machine = look_at_machine("cpu")
    return [
        Finding("resources", "threads", str(machine.cores)),
        Finding("resources", "free memory", format_bytes(machine.free_bytes)),
        Finding("resources", "dtype of --dtype auto", "bfloat16" if machine.fast_bf16 else "float32"),
    ]


def kernels() -> list[Finding]:
    """What the registry would choose for the two dtypes a CPU serves in; one line per op."""
    import torch

    from ..kernels import Target, resolve

    findings: list[Finding] = []
    for dtype, kv_format in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        try:
            table = resolve(Target("cpu", dtype, head_dim=64, kv_format=kv_format))
        except Exception as error:
            findings.append(Finding("kernels", kv_format, "-", f"the registry fails: {error}"))
            continue
        chosen: dict[str, list[str]] = {}
        for op, implementation in table.describe().items():
            chosen.setdefault(implementation, []).append(op)
        findings += [Finding("kernels", f"{kv_format} {name}", " ".join(ops)) for name, ops in chosen.items()]
    return findings


def compiler() -> list[Finding]:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    return [Finding("compiler", "C++", found or "none (kernels written in C++ are not built)")]


def gpu() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        return [Finding("gpu", "device", "none")]
    findings = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        value = f"{card.name}, sm_{card.major}{card.minor}, {format_bytes(card.total_memory)}"
        findings.append(Finding("gpu", f"cuda:{index}", value))
    return findings


def bundled_model() -> list[Finding]:
    from ..engine.config import BUNDLED_MODEL
    from ..engine.errors import EngineStartError
    from ..engine.families import load_config
    from ..engine.loader import locate_model

    try:
        folder = locate_model(BUNDLED_MODEL, None)
        config = load_config(folder)
    except EngineStartError as error:
        return [Finding("model", BUNDLED_MODEL, "-", str(error))]
    return [Finding("model", BUNDLED_MODEL, f"{folder.name} ({config.model_type}, {config.num_layers} layers)")]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _show(findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    topic = None
    for finding in findings:
        heading = Text("" if finding.topic == topic else finding.topic, style="bold")
        topic = finding.topic
        value = Text(f"{finding.value}  ✗ {finding.problem}", style="red") if finding.problem else Text(finding.value)
        table.add_row(heading, finding.name, value)
    out.print(table)
    broken = sum(finding.problem is not None for finding in findings)
    out.print(f"[red]{broken} problem(s)[/]" if broken else "[green]Quire can serve on this machine.[/]")
