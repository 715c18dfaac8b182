"""Bad inputs by the ten thousand, counted: `make fuzz`, and a small share of each kind in the default tests.

    python tests/security/fuzz.py [kind …] [--scale 1.0] [--seed 1]

Every kind makes nearly right inputs (`mutate.py`) and says what was refused in the way that is promised, what was
taken, and what went wrong. Exit code 1 if anything did.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from security import fuzz_http
from security.mutate import mutated_bytes, mutated_json
from security.tally import Tally

# ---------------------------------------------------------------- model folders


def folders(count: int, seed: int) -> Tally:
    """Folders of which one file is nearly right: read to the last tensor, or refused with EngineStartError."""
    from conftest import make_tiny_model, write_byte_tokenizer

    tally, rng = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        good = make_tiny_model(Path(scratch, "good"), hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        write_byte_tokenizer(good)
        (good / "generation_config.json").write_text(
            json.dumps({"eos_token_id": [257], "temperature": 0.5, "top_k": 5})
        )
        (good / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
        read_folder(good)
        names = sorted(path.name for path in good.iterdir())
        contents = {name: (good / name).read_bytes() for name in names}
        bad = Path(scratch, "bad")
        shutil.copytree(good, bad)
        for _ in range(count):
            name = rng.choice([*names, "model.safetensors", "config.json"])
            (bad / name).write_bytes(mutated_file(rng, name, contents[name]))
            _judge_folder(tally, bad, name)
            (bad / name).write_bytes(contents[name])
    return tally


def mutated_file(rng: random.Random, name: str, content: bytes) -> bytes:
    if name.endswith(".safetensors"):
        return mutated_safetensors(rng, content)
    if name.endswith(".json") and rng.random() < 0.8:
        return json.dumps(mutated_json(rng, json.loads(content))).encode()
    return mutated_bytes(rng, content)


def mutated_safetensors(rng: random.Random, content: bytes) -> bytes:
    """The length, the header as JSON, its bytes, or the tensors' data."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    match rng.randrange(5):
        case 0:
            size = rng.choice((0, 1, size - 1, size + 1, len(content), 2**31, 2**32, 2**63, 2**64 - 1, 100 << 20))
        case 1:
            header = mutated_bytes(rng, header)
            size = len(header)
        case 2:
            data = rng.choice(
                (data[:-1], data + b"\x00", b"", data[: rng.randrange(len(data))], mutated_bytes(rng, data))
            )
        case _:
            entries = json.loads(header)
            name = rng.choice(list(entries))
            entry = entries[name]
            match rng.randrange(6):
                case 0:
                    entry["data_offsets"] = rng.choice(
                        ([0, 2**63], [8, 0], [-8, 8], [0, 0], [0, 4, 8], "x", [2**64, 0])
                    )
                case 1:
                    entry["shape"] = rng.choice(([2**32, 2**32], [2**63, 2], [-1, -1], [0], [], [1] * 1000, "x", [1.5]))
                case 2:
                    entry["dtype"] = rng.choice(("F128", "F64", "I8", "", 7, None, "f32", "BOOL", "F8_E4M3", "U8"))
                case 3:
                    entries["copy"] = entry
                case 4:
                    del entries[name]
                case _:
                    entries = mutated_json(rng, entries)
            header = json.dumps(entries).encode()
            size = len(header)
    return size.to_bytes(8, "little") + header + data


def read_folder(folder: Path) -> None:
    """All that a start reads. Raises EngineStartError."""
    import torch

    from quire.engine.chat import load_chat_template
    from quire.engine.config import EngineConfig
    from quire.engine.families import load_config
    from quire.engine.loader import load_decoder
    from quire.engine.resolve import choose_kernels, look_at_machine, resolve
    from quire.engine.tokenizer import load_tokenizer

    settings = EngineConfig(model=str(folder), dtype="float32", threads=1, max_model_len=32, num_blocks=8)
    config = load_config(folder)
    resolved = resolve(settings, config, look_at_machine("cpu"), None)
    kernels = choose_kernels(settings, resolved, config, resolved.kv_cache_dtype)
    load_decoder(folder, config, kernels, torch.float32, torch.device("cpu"), 32)
    load_chat_template(load_tokenizer(folder))


def _judge_folder(tally: Tally, folder: Path, what: str) -> None:
    from quire.engine.errors import EngineStartError

    begin = time.monotonic()
    try:
        read_folder(folder)
        tally.taken += 1
    except EngineStartError:
        tally.refused += 1
        tally.how[what] += 1
    except BaseException as error:
        kept = Path(tempfile.mkdtemp(prefix="fuzz-")) / what
        kept.write_bytes((folder / what).read_bytes())
        tally.troubles.append(f"{what}: {type(error).__name__}: {str(error)[:200]} ({kept})")
    if time.monotonic() - begin > 60:
        tally.troubles.append(f"{what}: reading took {time.monotonic() - begin:.0f} s")


# ---------------------------------------------------------------- frames to the engine


def frames(count: int, seed: int) -> Tally:
    """Messages to an engine that are nearly right: refused when they are decoded or by an error of their own, or run.

    Between them good requests get the tokens that they get alone, and in the end nothing is held.
    """
    from conftest import make_tiny_model

    from quire.engine.config import EngineConfig
    from quire.engine.core import EngineCore
    from quire.engine.messages import Abort, AddRequest, Shutdown, down_decoder, encoder
    from quire.scheduler.params import SamplingParams

    tally, rng = Tally(), random.Random(seed)
    good = [
        AddRequest("good", [1, 2, 3], SamplingParams(max_tokens=4, seed=3), arrival=time.monotonic(), timeout=80_000.0),
        AddRequest("many", [9] * 40, SamplingParams(max_tokens=3, n=2, logprobs=2, stop_token_ids=(5,), top_k=4)),
        AddRequest(
            "biased", [7], SamplingParams(max_tokens=2, logit_bias={5: 1.0}, bad_words=((1, 2),), prompt_logprobs=1)
        ),
        Abort(["good", "many"]),
        Abort(["many"], 1),
    ]
    plain = [msgspec.msgpack.decode(encoder.encode(message)) for message in good]
    with tempfile.TemporaryDirectory() as scratch:
        model = make_tiny_model(Path(scratch, "tiny"), hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        config = EngineConfig(
            model=str(model), dtype="float32", threads=1, max_model_len=96, max_num_seqs=8, check=True
        )
        core = EngineCore(config)
        alone = _tokens(core, good[0])
        for i in range(count):
            which = rng.randrange(len(good))
            if rng.random() < 0.5:
                frame = mutated_bytes(rng, encoder.encode(good[which]))
            else:
                frame = msgspec.msgpack.encode(_packable(mutated_json(rng, plain[which])))
            try:
                message = down_decoder.decode(frame)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                tally.refused += 1
                tally.how[type(error).__name__] += 1
                continue
            if isinstance(message, Shutdown):
                continue
            try:
                chunks = core.handle(message)
                while core.has_work:
                    chunks += core.step()
                if isinstance(message, AddRequest) and not any(chunk.finish_reason for chunk in chunks):
                    tally.troubles.append(f"no end for {message!r:.300}")
            except BaseException as error:
                tally.troubles.append(f"{type(error).__name__}: {str(error)[:200]} for {message!r:.300}")
                core = EngineCore(config)
                continue
            failed = any(chunk.error is not None for chunk in chunks)
            tally.refused += failed
            tally.taken += not failed
            tally.how["error of its own"] += failed
            if i % 500 == 0 and _tokens(core, good[0]) != alone:
                tally.troubles.append("a good request got other tokens")
        if core.scheduler.pool.num_used:
            tally.troubles.append(f"{core.scheduler.pool.num_used} blocks are held")
        if _tokens(core, good[0]) != alone:
            tally.troubles.append("a good request got other tokens")
    return tally


def _tokens(core: Any, request: Any) -> list[int]:
    chunks = core.handle(request)
    while core.has_work:
        chunks += core.step()
    assert all(chunk.error is None for chunk in chunks), chunks
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def _packable(value: Any) -> Any:
    """Without what msgpack cannot write: integers of more than 64 bits."""
    if isinstance(value, dict):
        return {key: _packable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_packable(item) for item in value]
    return value if not isinstance(value, int) or -(2**63) <= value < 2**64 else 2**63


KINDS: dict[str, tuple[int, Callable[[int, int], Tally]]] = {
    "folders": (10_000, folders),
    "frames": (25_000, frames),
    "bodies": (10_000, fuzz_http.on_a_house(fuzz_http.bodies)),
    "described": (5_000, fuzz_http.on_a_house(fuzz_http.described)),
    "raw": (5_000, fuzz_http.on_a_house(fuzz_http.raw)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="all without any")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of inputs")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    total, wrong = 0, 0
    for kind in options.kinds or KINDS:
        count, function = KINDS[kind]
        begin = time.monotonic()
        tally = function(int(count * options.scale), options.seed)
        total, wrong = total + tally.cases, wrong + len(tally.troubles)
        print(
            f"{kind}: {tally.cases} inputs, {tally.refused} refused, {tally.taken} taken, {len(tally.troubles)} wrong, "
            f"{time.monotonic() - begin:.0f} s; {dict(tally.how.most_common(8))}",
            flush=True,
        )
        for trouble in tally.troubles[:20]:
            print("   ", trouble)
    print(f"{total} inputs, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
