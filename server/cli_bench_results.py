"""`quire bench compare | report`: what was measured before, side by side or drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_bench_report import JsonFile, failures, plain
from .cli_options import option, out

Result = Annotated[Path, typer.Argument(help="What --json wrote.", show_default=False)]


def bench_compare(
    a: Result,
    b: Result,
    across: Annotated[
        list[str] | None,
        option("Compare", "What may differ though it changes what is measured: model_id, host … (repeatable)."),
    ] = None,
    seed: Annotated[int, option("Compare", "Of the bootstrap.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Two results of `quire bench serve`: ratios B / A with bootstrap intervals, and differences of paired requests."""
    with failures():
        from ..bench import compare
        from ..bench.plots import loads_of

        one, other = read_result(a), read_result(b)
        compared = compare.compare(one, other, tuple(across or ()), seed)
        servers = compare.server_differences(*(loads_of(result)[0] for result in (one, other)))
    for part in compare.tables(compared, servers):
        out.print(part)
    if json_file is not None:
        text = json.dumps(plain(compare.as_json(compared, servers)), indent=2)
        json_file.write_text(text + "\n", encoding="utf-8")


def bench_report(
    result: Result,
    target: Annotated[Path, option("Report", "Page (.html) or picture (.png) to write.", "--out", show_default=False)],
) -> None:
    """Draw a result of `quire bench serve | capacity | overload` that --json wrote."""
    with failures():
        from ..bench.report_page import write_report

        write_report(read_result(result), target)
    out.print(f"wrote {target}", markup=False)


def read_result(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that is no JSON object."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path} holds no result: give what --json wrote")
    return result
