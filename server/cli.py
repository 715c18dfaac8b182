"""`quire`: one command line for serving, talking, measuring, planning and checking.

Commands import what they need when they run, so that `quire --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # the base of all that options can be wrong by


class OneLine(TyperGroup):
    """What is wrong with a command line is said in one line, exit code 2, for people and for logs."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except UsageError as error:
            if not standalone_mode:
                raise
            self._explain(error)
            sys.exit(2)
        except typer.Abort:
            sys.exit(1)
        return sys.exit(code if isinstance(code, int) else 0) if standalone_mode else code

    def _explain(self, error: Any) -> None:
        from pydantic import ValidationError

        if type(error).__name__ == "NoArgsIsHelpError":
            out.print(error.ctx.get_help(), markup=False)
            return
        text = " ".join(error.format_message().split())
        if isinstance(error.__cause__, ValidationError):  # pydantic says what it wants, and not what it got
            text += f"; it is {error.__cause__.errors()[0]['input']!r:.80}"
        err.print(f"{error.ctx.command_path if error.ctx else 'quire'}: {text}", markup=False)


app = typer.Typer(
    name="quire",
    cls=OneLine,
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
