"""One command on a machine with an NVIDIA GPU: are the Triton kernels right there, and how near the card's limits?

    python bench/gpu_check.py [--quick] [--only correct,attention] [--out FILE]

Needs torch and triton, and for the peer transformers; runs from a checkout that is not installed. Prints a table and
writes the same as JSON. Every section has its time and runs in processes of its own, so a kernel that is wrong, faults
or hangs is a row. Exit status: 0; 1 = a row is wrong or failed; 2 = there is no GPU.

`--interpret` runs the correctness section with tiny inputs in Triton's interpreter, on any machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def adopt_checkout() -> None:
    """Make this checkout the package `quire`, and keep its folders from being top-level packages."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "bench")]
    spec = importlib.util.spec_from_file_location("quire", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    if spec is None or spec.loader is None:
        raise ImportError(f"no package in {ROOT}")
    package = importlib.util.module_from_spec(spec)
    sys.modules["quire"] = package
    spec.loader.exec_module(package)


if not __package__:  # run as a file
    adopt_checkout()
    __package__ = "quire.bench"

from .gpu_isolation import run_section, run_shards, shard_of, work  # noqa: E402
from .gpu_rows import Item, Row, as_json, condensed, summary, table  # noqa: E402

# Seconds, full and quick, of the sections in the order in which they are worth having. "compile" fills Triton's cache
# for the timed ones, on all cores: a kernel takes one to three seconds the first time.
SECTIONS = {
    "ceilings": (30, 25),
    "correct": (110, 50),
    "compile": (60, 20),
    "attention": (70, 20),
    "products": (90, 20),
    "model": (120, 35),
    "experts": (30, 10),
    "small": (30, 12),
}
TIMED = ("attention", "products", "experts", "small", "model")
SHARDED = ("correct", "compile")
CORES_OF_A_SHARD, MOST_SHARDS = 2, 6  # a process that quantizes the largest matrix needs 8 GB of the card


def make_items(section: str, context: dict[str, Any]) -> list[Item]:
    """What a worker does. Imports torch, which the parent hardly needs."""
    import torch

    from . import gpu_ceilings, gpu_clock, gpu_correct
    from .gpu_inputs import Sizes

    torch.set_num_threads(max(1, torch.get_num_threads() // context.get("shard", (0, 1))[1]))
    if section == "ceilings":
        made = list(gpu_ceilings.items())
    elif section == "correct":
        device = "cpu" if context["interpret"] else "cuda"
        capability = (9, 0) if context["interpret"] else gpu_clock.capability()
        made = gpu_correct.items(device, Sizes(tiny=context["interpret"]), context["implementation"], capability)
    elif section == "compile":
        gpu_clock.only_compile()
        made = [item for name in TIMED if name != "model" for item in timed_items(name, context)]
    else:
        made = timed_items(section, context)
    return [tidied(item) for item in shard_of(made, context)]


def timed_items(section: str, context: dict[str, Any]) -> list[Item]:
    from . import gpu_attention, gpu_model, gpu_products, gpu_small
    from .gpu_clock import Ceilings

    makers = {
        "attention": gpu_attention.items,
        "products": gpu_products.linear_items,
        "experts": gpu_products.moe_items,
        "small": gpu_small.items,
        "model": gpu_model.items,
    }
    return list(makers[section](context["quick"], Ceilings(**context["ceilings"])))


def tidied(item: Item) -> Item:
    """The item, after what the one before it left on the device has been freed."""
    import gc

    import torch

    def run() -> list[Row]:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return item.run()

    return Item(item.key, run)


def card() -> dict[str, Any] | None:
    """The first GPU and the versions of what drives it; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        **versions(),
    }


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def ceilings_of(rows: list[Row]) -> dict[str, float] | None:
    """What the later sections divide by; None where copy or bf16 could not be measured."""
    found = {row.name: row.figure for row in rows if row.status == "ok" and row.figure is not None}
    if "copy" not in found or "bf16" not in found:
        return None
    scale = {"copy": 1e9, "bf16": 1e12, "fp8": 1e12, "int8": 1e12}
    return {name: found[name] * scale[name] for name in scale if name in found}


def check(sections: list[str], options: argparse.Namespace, machine: dict[str, Any], out: Path) -> list[Row]:
    """Run the sections one after the other; what is known is written after each."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    context: dict[str, Any] = {
        "interpret": options.interpret,
        "quick": options.quick,
        "implementation": options.implementation,
        "ceilings": None,
    }
    shards = 1 if options.interpret else max(1, min(MOST_SHARDS, (os.cpu_count() or 1) // CORES_OF_A_SHARD))
    rows: list[Row] = []
    for section in sections:
        seconds = SECTIONS[section][options.quick]
        if context["ceilings"] is None and section not in ("ceilings", "correct"):
            found = [Row(section, section, "skipped", note="the card's limits could not be measured")]
        elif section in SHARDED:
            found = run_shards(command, section, context, seconds, shards)
        else:
            found = run_section(command, section, context, seconds)
        if section == "compile":  # what went wrong will do so again when it is timed, and be told then
            continue
        if section == "ceilings":
            context["ceilings"] = ceilings_of(found)
        rows += found
        print(table(condensed(found) if section == "correct" else found), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**machine, "rows": as_json(rows)}, indent=1) + "\n")
    return rows


def default_out(name: str) -> Path:
    """In $OUT where it is set, else under bench/results."""
    slug = "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
    folder = os.environ.get("OUT")
    return (Path(folder) if folder else ROOT / "bench" / "results") / f"{datetime.now(UTC):%Y-%m-%d}-{slug}.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 minutes instead of 9")
    parser.add_argument("--only", metavar="SECTIONS", help=f"of {','.join(SECTIONS)}; ceilings are always measured")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--interpret", action="store_true", help="correctness alone, tiny, without a GPU")
    parser.add_argument("--implementation", default="triton", help="whose correctness is checked")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    # What the kernels are written for, and what Triton up to 3.9 does by default; 3.10 will have to be told.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if options.worker:
        return work(make_items)
    wanted = options.only.split(",") if options.only else list(SECTIONS)
    if unknown := [name for name in wanted if name not in SECTIONS]:
        parser.error(f"--only {','.join(unknown)}: no such section; choose from {', '.join(SECTIONS)}")

    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        machine: dict[str, Any] | None = {"card": "interpreter", **versions()}
        sections = ["correct"]
    else:
        machine = card()
        timed = any(name in TIMED for name in wanted)
        sections = [n for n in SECTIONS if n in wanted or n == "ceilings" or (n == "compile" and timed)]
    if machine is None:
        print("There is no CUDA device here; --interpret checks the kernels in Triton's interpreter.", file=sys.stderr)
        return 2
    started = time.monotonic()
    out = options.out or default_out(machine["card"])
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    rows = check(sections, options, machine, out)
    print(f"\n{summary(rows)}; {time.monotonic() - started:.0f} s; written to {out}")
    return 1 if any(row.status in ("wrong", "failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
