"""What structured output costs: compiling a grammar, one mask, and a step with and without.

    python -m quire.bench.masks --model DIR --streams 1 8 --rounds 5

JSON lines. For each grammar: milliseconds to compile, microseconds per mask along texts that it allows, drawn at random
(median, 99th percentile, largest). Then output tokens a second of streams that follow the first grammar over those of
the same streams without, in turn: masks are filled while the model computes, so the ratio is what is left to see.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from statistics import median
from typing import Any

import numpy as np

from ..engine.grammar import GrammarState, Vocabulary
from ..engine.messages import AddRequest
from ..engine.tokenizer import load_tokenizer
from ..scheduler.params import Grammar, SamplingParams
from .live import start_engine

TEXT = {"type": "string", "maxLength": 40}
PERSON = {
    "type": "object",
    "properties": {
        "name": TEXT,
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mail": {"type": "string", "pattern": r"^[a-z.]{1,20}@[a-z]{1,20}\.(com|org|net)$"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 4},
    },
    "required": ["name", "age", "mail", "tags"],
    "additionalProperties": False,
}
NESTED = {
    "type": "object",
    "properties": {
        "people": {"type": "array", "items": PERSON, "minItems": 2, "maxItems": 4},
        "note": {"anyOf": [TEXT, {"type": "null"}]},
    },
    "required": ["people", "note"],
    "additionalProperties": False,
}
GRAMMARS = {
    "endless text": Grammar(kind="regex", source=r'"[^"\\]{200,}"'),
    "schema": Grammar(kind="json_schema", source=json.dumps(PERSON)),
    "nested schema": Grammar(kind="json_schema", source=json.dumps(NESTED)),
    "any object": Grammar(kind="json_object"),
    "regex": Grammar(kind="regex", source=r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d{1,6})?Z"),
    "choice": Grammar(kind="choice", source=json.dumps([f"label {i}" for i in range(200)])),
}
WALK = 200  # tokens of a drawn text at most


def walk(vocabulary: Vocabulary, grammar: Grammar, draw: random.Random) -> list[float]:
    """Seconds of each mask along one text."""
    state = GrammarState(vocabulary, vocabulary.compile(grammar))
    seconds = []
    for _ in range(WALK):
        started = time.perf_counter()
        mask = state.mask(())
        seconds.append(time.perf_counter() - started)
        tokens = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        token = int(draw.choice(tokens))
        if token in vocabulary.ends:
            break
        state.append(token)
    return seconds


def masks(vocabulary: Vocabulary, rounds: int, seed: int) -> list[dict[str, Any]]:
    """One row for each grammar."""
    draw = random.Random(seed)
    rows = []
    for name, grammar in GRAMMARS.items():
        compiling = []
        seconds: list[float] = []
        for _ in range(rounds):
            started = time.perf_counter()
            vocabulary.compile(grammar)
            compiling.append(time.perf_counter() - started)
            seconds += walk(vocabulary, grammar, draw)
        rows.append(
            {
                "grammar": name,
                "vocabulary": vocabulary.vocab_size,
                "compile_ms": round(1e3 * median(compiling), 2),
                "masks": len(seconds),
                "mask_us": round(1e6 * median(seconds), 1),
                "mask_us_p99": round(1e6 * float(np.quantile(seconds, 0.99)), 1),
                "mask_us_most": round(1e6 * max(seconds), 1),
            }
        )
    return rows


def steps(model: str, threads: int | None, streams: int, rounds: int) -> dict[str, Any]:
    """Tokens a second with a grammar over those without, for streams of 100 tokens that begin with the same prompt."""
    core = start_engine(model=model, threads=threads, max_num_seqs=streams)
    prompt = load_tokenizer(core.ready.model_path).encode("def main():\n    ")
    ratios, speeds = [], []
    for turn in range(rounds + 1):
        speed = {}
        for name, grammar in (("without", None), ("with", GRAMMARS["endless text"])):
            started, tokens = time.perf_counter(), 0
            for i in range(streams):
                params = SamplingParams(max_tokens=100, seed=i, ignore_eos=grammar is None, grammar=grammar)
                core.handle(AddRequest(f"{name}-{turn}-{i}", prompt, params))
            while core.has_work:
                tokens += sum(len(chunk.token_ids) for chunk in core.step())
            speed[name] = tokens / (time.perf_counter() - started)
        if turn:  # the first one warms up
            ratios.append(speed["with"] / speed["without"])
            speeds.append(speed["without"])
    return {
        "streams": streams,
        "tokens_per_second_without": round(median(speeds), 1),
        "with_over_without": round(median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    core = start_engine(model=args.model, threads=args.threads, max_num_seqs=1)
    vocabulary = Vocabulary(load_tokenizer(core.ready.model_path), core.ready.vocab_size)
    for row in masks(vocabulary, args.rounds, args.seed):
        print(json.dumps(row), flush=True)
    for streams in args.streams:
        print(json.dumps(steps(args.model, args.threads, streams, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
