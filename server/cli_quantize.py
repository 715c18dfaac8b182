"""`quire quantize`: a model in four bits, calibrated on a text of what it will read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import option, out
from .cli_progress import bar

MODEL, TEXT = "Model", "Calibration"
WINDOW = 1024  # tokens


def quantize(
    model: Annotated[str, typer.Argument(help='"bundled", a folder, or a hub id.', metavar="MODEL")],
    target: Annotated[Path, option(MODEL, "Folder to make.", "--out", metavar="DIR")],
    text: Annotated[
        list[Path], option(TEXT, "A text file, or a folder of .txt, .md and .py files; may be given more than once.")
    ],
    revision: Annotated[str | None, option(MODEL, "Revision of a hub id.")] = None,
    group: Annotated[int, option(MODEL, "Inputs that share a scale: 32, 64 or 128.", min=32)] = 128,
    tokens: Annotated[int, option(TEXT, "Tokens to calibrate on.", min=1)] = 65_536,
    window: Annotated[
        int | None, option(TEXT, "Tokens that the model reads at once; nothing = 1024, or its context.", min=2)
    ] = None,
) -> None:
    """Write a model with four-bit weights that make up for their rounding on a text (GPTQ), ready for `quire serve`.

    --quantization int4 of `quire serve` needs no text and rounds to nearest: quicker, and several times the error.
    """
    from ..engine.families import load_config
    from ..engine.loader import locate_model
    from ..engine.quant.calibrate import quantize_model

    source = locate_model(model, revision)
    context = load_config(source).max_position
    if window is not None and window > context:
        raise typer.BadParameter(
            f"{window}: the model's context is {context}, give at most that", param_hint="--window"
        )
    windows = _windows(source, text, tokens, window or min(WINDOW, context))
    with bar(f"calibrating on {sum(map(len, windows))} tokens") as shown:
        quantize_model(source, target, windows, group, shown.show)
    out.print(f"wrote {target}; serve it with: quire serve {target}", markup=False)


def _windows(source: Path, paths: list[Path], tokens: int, window: int) -> list[list[int]]:
    """Token ids of windows that lie evenly over all the texts, so many tokens together at most."""
    from tokenizers import Tokenizer

    from ..engine.errors import EngineStartError

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    found: list[list[int]] = []
    for file in (file for path in paths for file in _files(path)):
        ids = tokenizer.encode(file.read_text(encoding="utf-8", errors="replace")).ids
        found += [ids[i : i + window] for i in range(0, len(ids), window)]
    found = [ids for ids in found if len(ids) > 1]
    if not found:
        raise EngineStartError(f"--text {', '.join(map(str, paths))}: no text was found there; give a text file")
    wanted = max(1, min(len(found), tokens // window))
    return [found[i * len(found) // wanted] for i in range(wanted)]


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".py")) if path.is_dir() else [path]
