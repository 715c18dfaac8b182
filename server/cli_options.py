"""Where an option's value comes from: command line, then QUIRE_… environment, then --config YAML, then the default."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

ENV_PREFIX = "QUIRE"
OTHERS = ("QUIRE_NATIVE_LIBRARY",)  # variables that are read elsewhere

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

UNITS = {"": 1, "B": 1, **{f"{p}iB": 1 << 10 * i for i, p in enumerate("KMGT", 1)}}
UNITS |= {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}


def option(panel: str, help: str, *names: str, **settings: Any) -> Any:
    """A typer option in a group of the help page."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_envvar=False, **settings)


def parse_bytes(text: str | int) -> int:
    """ "2GiB", "1.5 GB" or a plain number of bytes; GiB counts 1024s, GB counts 1000s."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = next((u for u in UNITS if match and u.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise typer.BadParameter(f"{text!r} is not a size; write for example 512MiB, 2GiB or a number of bytes")
    return int(float(match[1]) * UNITS[unit])


def parse_switch(text: str | bool) -> bool:
    """ "on" or "off", as a word or as the boolean that YAML makes of it."""
    if isinstance(text, bool):
        return text
    if text.lower() not in ("on", "off"):
        raise typer.BadParameter(f"{text!r} is neither on nor off")
    return text.lower() == "on"


def format_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def parse_overrides(pairs: Iterable[str]) -> dict[str, str]:
    """["attention=reference"] -> {"attention": "reference"}; commas separate as well, as in an environment variable."""
    return _parse_pairs(pairs, "OP=IMPLEMENTATION", "--kernels")


def parse_weights(pairs: Iterable[str]) -> dict[str, float]:
    """["alice=2"] -> {"alice": 2.0}; commas separate as well. The engine checks names and ranges."""
    weights = {}
    for tenant, weight in _parse_pairs(pairs, "NAME=WEIGHT", "--tenant-weight").items():
        try:
            weights[tenant] = float(weight)
        except ValueError:
            raise typer.BadParameter(
                f"the weight of {tenant} is {weight!r}; give a number", param_hint="--tenant-weight"
            ) from None
    return weights


def _parse_pairs(pairs: Iterable[str], form: str, hint: str) -> dict[str, str]:
    values = {}
    for pair in (part.strip() for text in pairs for part in text.split(",") if part.strip()):
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{pair!r} is not {form}", param_hint=hint)
        values[name] = value
    return values


def read_config_file(ctx: typer.Context, path: Path | None) -> Path | None:
    """Callback of --config: the file's values become defaults of the other options. Keys are options without dashes."""
    if path is None:
        return None
    spelling = ctx.token_normalize_func or str
    known = {str(parameter.name) for parameter in ctx.command.params} - {"config"}
    values: dict[str, Any] = {}
    for key, value in _read_pairs(path):
        name = spelling(key).replace("-", "_")
        if name not in known:
            raise typer.BadParameter(f"{path}: unknown {key}; {meant(name, known)}", param_hint="--config")
        if name in values:
            raise typer.BadParameter(f"{path}: {key} is given twice; leave one out", param_hint="--config")
        values[name] = value
    for name, value in values.items():
        if isinstance(value, dict):  # kernels: {attention: reference}
            values[name] = [f"{key}={item}" for key, item in value.items()]
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return path


def _read_pairs(path: Path) -> list[tuple[str, Any]]:
    """The file's lines as they stand there, a key that comes twice included."""
    import yaml

    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise typer.BadParameter(f"{path}: expected `option: value` lines", param_hint="--config")
        return [(str(loader.construct_object(key)), loader.construct_object(value, True)) for key, value in node.value]
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} is no text: {error.reason}", param_hint="--config") from error
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}", param_hint="--config") from error
    except (ValueError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} is not YAML: {_one_line(error)}", param_hint="--config") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def meant(name: str, known: Iterable[str]) -> str:
    """What somebody who wrote `name` may have had in mind, as an option is spelled."""
    close = get_close_matches(name, sorted(known), n=1)
    return f"did you mean {close[0].replace('_', '-')}?" if close else "`quire serve --help` lists what there is"


# A pod is told of every service of its namespace: of one whose name begins with "quire", by such variables.
KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT(_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)?$")


def unknown_environment(ctx: typer.Context) -> list[str]:
    """QUIRE_… variables that no option of this command reads, each with what may have been meant: misspelled ones."""
    known = {f"{ENV_PREFIX}_{parameter.name}".upper(): str(parameter.name) for parameter in ctx.command.params}
    unknown = [name for name in os.environ if name.startswith(ENV_PREFIX + "_") and name not in (*known, *OTHERS)]
    return [
        f"{name} is in the environment, and no option reads it; "  # its value may be a key
        f"{meant(name.removeprefix(ENV_PREFIX + '_').lower(), known.values())}"
        for name in sorted(unknown)
        if KUBERNETES.search(name) is None
    ]


def changed_values(ctx: typer.Context, secret: Iterable[str] = ()) -> dict[str, tuple[Any, str]]:
    """{option: (value, where it came from)} of everything that is not a default."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    named = {"COMMANDLINE": "command line", "ENVIRONMENT": "environment", "DEFAULT_MAP": "config file"}
    return {
        name: ("…" if name in secret else ctx.params[name], named[source.name])
        for name, source in sources.items()
        if source is not None and source.name in named
    }
