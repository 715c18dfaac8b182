"""`quire tune`: measure on this GPU which tiles the quantized products are fastest with."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_options import err, option, out
from .cli_plan import config_folder
from .cli_progress import bar

if TYPE_CHECKING:
    from ..bench.tune import Measured

WHAT = "What is measured"
NO_GPU = 2  # the exit code of a machine that has nothing to measure


def tune(
    model: Annotated[
        str | None,
        option(WHAT, '"bundled", a folder, or a hub id: its layers\' shapes; nothing = those of Llama 8B and 70B.'),
    ] = None,
    ops: Annotated[
        list[str] | None,
        option(WHAT, "linear_int4, linear_int8, linear_w8a8, linear_fp8, linear_fp8_block; nothing = all.", "--ops"),
    ] = None,
    rows: Annotated[
        list[int] | None, option(WHAT, "Rows of a step: 16, 32, 64 … 4096; nothing = all.", "--rows")
    ] = None,
    folder: Annotated[
        Path | None, option("Report", "Where the tables go; nothing = into the package, which reads them.", "--out")
    ] = None,
) -> None:
    """Measure the tiles of quantized products on this GPU and write them down. Takes minutes for each op.

    Exit code 2 where there is no GPU. An engine reads the tables when it starts.
    """
    from ..bench import tune as measurement

    defaults = measurement.TuneConfig()
    config = measurement.TuneConfig(
        model=None if model is None else config_folder(model, None),
        ops=tuple(name for text in ops for name in text.split(",")) if ops else defaults.ops,
        rows=tuple(rows) if rows else defaults.rows,
        out=folder or defaults.out,
    )
    try:
        measurement.check(config)
        with bar("products") as shown:
            total, over = measurement.most_products(config), itertools.count(1)

            def tell(measured: Measured) -> None:
                _tell(measured)
                shown.show(next(over), total)

            paths = measurement.run(config, tell)
    except measurement.NoGpu as error:
        err.print("[bold red]quire tune:[/] ", end="")
        err.print(str(error), markup=False)
        raise typer.Exit(NO_GPU) from None
    except ValueError as error:
        err.print("[bold red]quire tune:[/] ", end="")
        err.print(str(error), markup=False)
        raise typer.Exit(1) from None
    for path in paths:
        out.print(f"wrote {path}", markup=False)


def _tell(measured: Measured) -> None:
    rows, outputs, inputs, _ = measured.shape
    before = f", {measured.default_seconds / measured.seconds:.2f} x the rule's" if measured.default_seconds else ""
    out.print(
        f"{measured.op} {rows} x {inputs} -> {outputs}: {measured.seconds * 1e6:.1f} µs{before}  "
        f"{' '.join(f'{name} {value}' for name, value in measured.tile._asdict().items())}",
        markup=False,
    )
