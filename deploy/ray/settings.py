"""What a person sets: the options of `quire serve`, and a few of Serve's own beside them, all in one mapping.

    model=bundled replicas=2 max-model-len=4096

Options of `quire serve` mean what they mean there, in any of its spellings, with its variables and its checks: they are
read by its own command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import typer

from ...engine.config import EngineConfig
from ...server.cli_serve import CONTEXT, read_settings, serve, spelling
from ...server.config import ServerConfig

UsageError: Any = typer.BadParameter.__base__  # of unknown options as well; typer has no name of its own for it

ROUTINGS = ("prefix", "two_choices", "random")

# Where Serve listens, and how connections are kept there, is Serve's own: `http_options` of its config.
NOT_HERE = {
    "port": "http_options.port of Serve's config",
    "health-port": "Serve's own checks",
    "max-connections": "http_options and proxies of Serve's config",
    "write-timeout": "http_options of Serve's config",
}


class SettingsError(ValueError):
    """A setting that cannot be obeyed; the message names it, its value, and what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Of Serve's own.

    replicas      engines, each with a copy of the model; with `max_replicas` at least so many
    max_replicas  there are more when their queues fill, up to so many; None = always `replicas`
    routing       "prefix" = to the replica whose cache holds most of a prompt, "two_choices" = to the less busy one of
                  two, "random"
    cpus, gpus    that one replica takes, of Ray's resources
    """

    replicas: int = 1
    max_replicas: int | None = None
    routing: str = "prefix"
    cpus: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise SettingsError(f"replicas is {self.replicas}: at least 1 is needed")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise SettingsError(
                f"max_replicas is {self.max_replicas} and replicas {self.replicas}: raise the first or lower the second"
            )
        if self.routing not in ROUTINGS:
            raise SettingsError(f"routing is {self.routing!r}: choose one of {', '.join(ROUTINGS)}")
        if self.cpus < 1:
            raise SettingsError(f"cpus is {self.cpus}: a replica needs at least 1")
        if self.gpus < 0:
            raise SettingsError(f"gpus is {self.gpus}: at least 0 is needed")


def read(args: Mapping[str, Any]) -> tuple[ServeSettings, EngineConfig, ServerConfig]:
    """Raises SettingsError. Values may be text, as a command line has them."""
    own = {field.name for field in fields(ServeSettings)}
    given = {name.replace("-", "_"): value for name, value in args.items()}
    settings = ServeSettings(**{name: _number(name, value) for name, value in given.items() if name in own})
    engine, server = _serve_options({name: value for name, value in given.items() if name not in own})
    if engine.threads is None and engine.device != "cuda":
        engine = replace(engine, threads=settings.cpus)  # all cores of a machine are not one replica's
    return settings, engine, server


def _number(name: str, value: Any) -> Any:
    kind = {"replicas": int, "max_replicas": int, "cpus": int, "gpus": float}.get(name)
    if kind is None or value is None:
        return value
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise SettingsError(f"{name} is {value!r}: give a number") from None


def _serve_options(given: Mapping[str, Any]) -> tuple[EngineConfig, ServerConfig]:
    """As `quire serve` reads them."""
    command: Any = typer.main.get_command(_command())
    flags = [one for one in command.params if getattr(one, "is_flag", False)]
    switches = {name.removeprefix("--") for one in flags for name in (*one.opts, *one.secondary_opts)}
    words: list[str] = []
    for name, value in given.items():
        option = spelling(name)
        if option in NOT_HERE:
            raise SettingsError(f"{option} is {value!r}: it is not set here, but by {NOT_HERE[option]}; leave it out")
        if option == "model":
            words.append(str(value))
        elif option in switches:
            words.append(_switch(option, value))
        else:
            words += _words(option, value)
    try:
        with command.make_context("quire", words, **CONTEXT) as context:
            return read_settings(context)
    except typer.Exit:
        raise SettingsError("these settings are refused; the line above says why") from None
    except UsageError as error:
        raise SettingsError(error.format_message()) from None


def _command() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command(context_settings=CONTEXT)(serve)
    return app


def _switch(option: str, value: Any) -> str:
    """As a command line has it: by its name alone."""
    match str(value).lower():
        case "true":
            return f"--{option}"
        case "false":
            return f"--no-{option}"
    raise SettingsError(f"{option} is {value!r}: give true or false")


def _words(option: str, value: Any) -> list[str]:
    """As a command line has it: a list by repeating its name."""
    values = value if isinstance(value, list | tuple) else [value]
    return [word for one in values for word in (f"--{option}", str(one))]
