"""What the benchmarks that show a table have in common: their failures, their table, their JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import err, option, out

if TYPE_CHECKING:
    from rich.console import RenderableType

JsonFile = Annotated[Path | None, option("Report", "Write the result here as JSON.", "--json")]
Seed = Annotated[int, option("Load", "Of everything that is drawn.")]


@contextmanager
def measuring() -> Iterator[None]:
    """Shows that something goes on; an expected failure is one line and exit code 1."""
    from ..bench.client import ServerError
    from ..bench.live import RequestFailed

    try:
        with err.status("measuring"):
            yield
    except (ServerError, RequestFailed, ValueError) as error:
        err.print("[bold red]quire bench:[/] ", end="")
        err.print(str(error), markup=False)
        raise typer.Exit(1) from None


def show(table: RenderableType, result: dict[str, Any], json_file: Path | None) -> None:
    out.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(plain(result), indent=2) + "\n", encoding="utf-8")


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
