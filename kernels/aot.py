"""Compiles every Triton kernel for A100, H100 and B200 on a machine without a GPU, and holds it to what it used before.

    modules of kernels/triton ── specializations() ─▶ triton.compile(target) ─▶ PTX, cubin ─▶ Usage
                                                      tuned/resources.json ──▶ problems(now, recorded)

`python -m quire.kernels.aot` prints the table and fails on a kernel that no longer compiles, on spills that were not
there, on shared memory beyond the card's, and on a kernel without the instructions that it says it needs.
`--record` writes the table down, for this version of Triton.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .triton.specialization import ARCHES, Specialization

RECORD = Path(__file__).parent / "tuned" / "resources.json"

# Per block, bytes: CUDA C Programming Guide, technical specifications per compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
_SHARED_RESERVED = 1024  # by the system, per block
_REGISTERS_PER_SM, _WARPS_PER_SM, _BLOCKS_PER_SM = 65536, 64, 32
_REGISTER_UNIT = 256  # registers are given to a warp in such pieces

_MMA = {"tcgen05": r"tcgen05\.mma", "wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync"}
_WIDE = r"ld\.global\S*\.v4\.[bfsu]32|ld\.global\S*\.v2\.[bfsu]64|cp\.async\.cg\.shared\.global|cp\.async\.bulk"


@dataclass(frozen=True, slots=True)
class Usage:
    """What one compiled kernel takes of a streaming multiprocessor.

    registers: per thread; stack: bytes of local memory per thread, spills among them; shared: bytes per block;
    mma: the tensor-core instructions it uses, or ""; wide: 128-bit global loads and copies in the PTX;
    blocks: how many fit on one multiprocessor.
    """

    registers: int
    stack: int
    shared: int
    mma: str
    wide: int
    blocks: int


def module_names() -> list[str]:
    """The modules of kernels/triton."""
    package = import_module(".triton", __package__)
    return [module.name for module in iter_modules(package.__path__)]


def specializations_of(module_name: str) -> dict[str, Specialization]:
    """What a module lists, by "module/name"; nothing where it launches nothing. Import errors pass through."""
    module = import_module(f".triton.{module_name}", __package__)
    listed = module.specializations() if hasattr(module, "specializations") else []
    result = {f"{module_name}/{specialization.name}": specialization for specialization in listed}
    if len(result) != len(listed):
        raise ValueError(f"{module_name} lists a name twice; a specialization's name is unique in its module")
    return result


def catalogue() -> dict[str, Specialization]:
    """Every specialization, by "module/name"."""
    return {key: value for name in module_names() for key, value in specializations_of(name).items()}


def first_of_each_module(keys: Iterable[str]) -> list[str]:
    """A sample of a catalogue that is compiled in seconds."""
    firsts: dict[str, str] = {}
    for key in keys:
        firsts.setdefault(key.split("/")[0], key)
    return list(firsts.values())


def source(specialization: Specialization) -> ASTSource:
    """The compiler's input. ValueError names the arguments that are missing or unknown."""
    arguments = specialization.kernel.arg_names
    given = {**specialization.signature, **specialization.constexprs}
    missing, unknown = [a for a in arguments if a not in given], [a for a in given if a not in arguments]
    twice = [a for a in specialization.signature if a in specialization.constexprs]
    if missing or unknown or twice:
        raise ValueError(f"{specialization.name}: arguments missing {missing}, unknown {unknown}, given twice {twice}")
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for index, argument in enumerate(arguments):
        type_name, _, multiple = specialization.signature.get(argument, "constexpr").partition(":")
        if multiple not in ("", "16"):
            raise ValueError(f"{specialization.name}: {argument}: hint {multiple!r}; only ':16' is known")
        signature[argument] = type_name
        if multiple:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(specialization.kernel, signature, dict(specialization.constexprs), attributes)


def compile_for(specialization: Specialization, arch: int) -> Usage:
    """Compile one specialization for one architecture. Whatever the compiler raises passes through."""
    # FP fusion is what the JIT defaults to up to Triton 3.9; said here, so that the figures do not follow the default.
    options = {
        "num_warps": specialization.num_warps,
        "num_stages": specialization.num_stages,
        "enable_fp_fusion": True,
    }
    compiled = triton.compile(source(specialization), target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    # A kernel with specialized warps runs more of them than it asked for.
    warps = getattr(compiled.metadata, "total_num_warps", None) or specialization.num_warps
    ptx = compiled.asm["ptx"]
    return Usage(
        registers,
        stack,
        shared,
        "+".join(name for name, pattern in _MMA.items() if re.search(pattern, ptx)),
        len(re.findall(_WIDE, ptx)),
        blocks_per_sm(arch, registers, shared, warps),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) per thread of the one kernel in a cubin, by the cuobjdump that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return parse_resources(text)


def parse_resources(text: str) -> tuple[int, int]:
    """(registers, stack bytes) from cuobjdump's "REG:40 STACK:0 SHARED:0 LOCAL:0 ..."; the largest of all functions."""
    rows = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if not rows:
        raise ValueError(f"no resource usage in cuobjdump's output: {text[:200]!r}")
    return max(int(r[0]) for r in rows), max(int(r[1]) + int(r[2]) for r in rows)


def blocks_per_sm(arch: int, registers: int, shared: int, warps: int) -> int:
    """How many blocks are resident on one multiprocessor at once; 0 where not even one is."""
    of_a_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    return min(
        _REGISTERS_PER_SM // (of_a_warp * warps),
        _SHARED_PER_SM[arch] // (shared + _SHARED_RESERVED),
        _WARPS_PER_SM // warps,
        _BLOCKS_PER_SM,
    )


def problems(arch: int, usage: Usage, needs: Iterable[str], recorded: Mapping[str, object] | None) -> Iterator[str]:
    """Why a compiled kernel is refused. Without a record, only what the card and the kernel demand is checked."""
    if usage.shared > SHARED_LIMIT[arch]:
        yield f"{usage.shared} bytes of shared memory, a block has {SHARED_LIMIT[arch]}"
    if usage.blocks == 0:
        yield "no block fits on a multiprocessor"
    if "mma" in needs and not usage.mma:
        yield "no tensor-core instruction"
    if "wide" in needs and not usage.wide:
        yield "no 128-bit load or copy from global memory"
    if recorded is not None and usage.stack > int(str(recorded["stack"])):
        yield f"{usage.stack} bytes of stack per thread, {recorded['stack']} were recorded: new spills"


def _measure(key: str, arch: int) -> Usage | str:
    """For a worker process: the usage, or why there is none."""
    try:
        return compile_for(specializations_of(key.split("/")[0])[key], arch)
    except Exception as error:
        return f"does not compile: {type(error).__name__}: {str(error).strip()[-400:]}"


def measure(keys: Iterable[tuple[str, int]], jobs: int = 1) -> Iterator[tuple[str, int, Usage | str]]:
    """Compile (specialization, arch) pairs, in order, on so many processes; a string says why one failed."""
    pairs = list(keys)
    if jobs == 1:
        yield from ((key, arch, _measure(key, arch)) for key, arch in pairs)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = pool.map(_measure, [key for key, _ in pairs], [arch for _, arch in pairs])
        yield from ((key, arch, result) for (key, arch), result in zip(pairs, results, strict=True))


def triton_series() -> str:
    """ "3.9": figures are recorded by it, for another compiler allocates otherwise."""
    return ".".join(triton.__version__.split(".")[:2])


def load_record(path: Path = RECORD) -> dict[str, dict[str, dict[str, dict[str, object]]]]:
    """{triton series: {specialization: {arch: usage}}}; empty where nothing was recorded."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_record(listed: Iterable[str], found: Mapping[str, dict[str, dict[str, object]]], path: Path = RECORD) -> None:
    """Set what was found for this series of Triton; entries of kernels that are listed no more go."""
    record = load_record(path)
    old, keys = record.get(triton_series(), {}), set(listed)
    record[triton_series()] = {key: old.get(key, {}) | found.get(key, {}) for key in sorted(keys & {*old, *found})}
    text = json.dumps(record, indent=1, sort_keys=True)
    # A usage per line, so that a diff of the file reads like the table.
    path.write_text(re.sub(r"\{[^{}]*\}", lambda usage: " ".join(usage[0].split()), text) + "\n")


def _listed() -> tuple[dict[str, Specialization], int]:
    """The catalogue, and how many modules could not be asked for theirs; it prints why."""
    listed: dict[str, Specialization] = {}
    failures = 0
    for name in module_names():
        try:
            listed |= specializations_of(name)
        except Exception as error:
            failures += 1
            print(f"{name}\n    REFUSED: cannot be listed: {type(error).__name__}: {error}")
    return listed, failures


def _row(key: str, arch: int, usage: Usage) -> str:
    return (
        f"{key:<58}{arch:>4}{usage.registers:>6}{usage.stack:>7}{usage.shared:>8}"
        f"{usage.blocks:>7}{usage.wide:>6}  {usage.mma}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m quire.kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", type=int, action="append", choices=ARCHES, help="default: all")
    parser.add_argument("--only", default="", metavar="TEXT", help="specializations whose module/name contains this")
    parser.add_argument("--sample", action="store_true", help="the first specialization of each module alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--record", action="store_true", help="write what was found to tuned/resources.json")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1: kernels are interpreted, there is nothing to compile; unset it", file=sys.stderr)
        return 2

    listed, refused = _listed()
    wanted: list[tuple[str, int]] = []
    for arch in options.arch or ARCHES:
        keys = [key for key, value in listed.items() if options.only in key and arch in value.arches]
        wanted += [(key, arch) for key in (first_of_each_module(keys) if options.sample else keys)]
    recorded = {} if options.record else load_record().get(triton_series(), {})
    found: dict[str, dict[str, dict[str, object]]] = {}
    print(f"{'specialization':<58}{'sm':>4}{'regs':>6}{'stack':>7}{'shared':>8}{'blocks':>7}{'wide':>6}  mma")
    for key, arch, result in measure(wanted, options.jobs):
        if isinstance(result, str):
            complaints = [result]
            print(f"{key:<58}{arch:>4}")
        else:
            found.setdefault(key, {})[str(arch)] = asdict(result)
            complaints = list(problems(arch, result, listed[key].needs, recorded.get(key, {}).get(str(arch))))
            print(_row(key, arch, result))
        refused += bool(complaints)
        for complaint in complaints:
            print(f"    REFUSED: {complaint}", flush=True)
    print(f"{len(wanted)} compiled with triton {triton.__version__}, {refused} refused")
    if options.record:
        write_record(listed, found)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
