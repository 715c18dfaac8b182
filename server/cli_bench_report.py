"""What the benchmarks have in common: their failures, their table, their JSON, their report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import err, option, out
from .cli_progress import Bar, bar

if TYPE_CHECKING:
    from rich.console import RenderableType

JsonFile = Annotated[Path | None, option("Report", "Write the result here as JSON.", "--json")]
ReportFile = Annotated[
    Path | None, option("Report", "Draw the result as a page (.html) or a picture (.png).", "--report")
]
Seed = Annotated[int, option("Load", "Of everything that is drawn.")]


@contextmanager
def failures() -> Iterator[None]:
    """An expected failure is one line and exit code 1."""
    from ..bench.client import ServerError
    from ..bench.live import RequestFailed

    try:
        yield
    except (ServerError, RequestFailed, ValueError) as error:
        err.print("[bold red]quire bench:[/] ", end="")
        err.print(str(error), markup=False)
        raise typer.Exit(1) from None


@contextmanager
def measuring(json_file: Path | None, report_file: Path | None = None) -> Iterator[Bar]:
    """Shows that something goes on; an expected failure is one line. The files are those of the result."""
    with failures():
        check_files(json_file, report_file)
        with bar("measuring") as shown:
            yield shown


def check_files(json_file: Path | None, report_file: Path | None = None) -> None:
    """Raises ValueError for a file that could not be written after a long measurement."""
    if report_file is not None:
        from ..bench.report_page import check_report

        check_report(report_file)
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise ValueError(f"--json {json_file}: give a file in a folder that exists")


def show(
    table: RenderableType, result: dict[str, Any], json_file: Path | None, report_file: Path | None = None
) -> None:
    out.print(table)
    write(result, json_file, report_file)


def write(result: dict[str, Any], json_file: Path | None, report_file: Path | None) -> None:
    if json_file is not None:
        json_file.write_text(json.dumps(plain(result), indent=2) + "\n", encoding="utf-8")
    if report_file is not None:
        from ..bench.report_page import write_report

        write_report(plain(result), report_file)


def plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity: what is not known is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def words(text: str) -> tuple[str, ...]:
    """ "a,b" -> ("a", "b")."""
    return tuple(word.strip() for word in text.split(",") if word.strip())
