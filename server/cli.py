"""`quire`: one command line for serving, talking, measuring, planning and checking.

Commands import what they need when they run, so that `quire --help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import __version__
from ..engine.errors import QuireError
from .cli_bench import bench_app
from .cli_chat import chat
from .cli_doctor import doctor
from .cli_keys import keys
from .cli_options import err, out
from .cli_plan import plan
from .cli_quantize import quantize
from .cli_serve import CONTEXT, serve
from .cli_tune import tune

app = typer.Typer(
    name="quire",
    help="Serve language models, and find out how well.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"quire {__version__}")
        raise typer.Exit


@app.callback()
def quire(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command(context_settings=CONTEXT)(serve)
app.command()(keys)
app.command()(chat)
app.add_typer(bench_app, name="bench")
app.command()(plan)
app.command()(quantize)
app.command()(doctor)
app.command()(tune)


def main() -> None:
    """Expected failures end in one line and exit code 1; a traceback is a bug in Quire."""
    try:
        app()
    except QuireError as error:
        err.print(f"[bold red]quire:[/] {type(error).__name__.removesuffix('Error')}: ", end="")
        err.print(str(error), markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
