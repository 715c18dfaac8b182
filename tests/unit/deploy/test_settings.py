"""Settings of a fleet: those of `quire serve` by its own rules, and a few of Serve's."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from quire.deploy.ray.__main__ import main
from quire.deploy.ray.settings import SettingsError, read


def test_options_are_those_of_quire_serve() -> None:
    args = {"model": "bundled", "replicas": "2", "max-model-len": 512, "kv_cache_bytes": "64MiB"}
    settings, engine, server = read(args | {"prefix-caching": False, "served-model-name": ["a", "b"], "cpus": 3})
    assert (settings.replicas, settings.max_replicas, settings.routing) == (2, None, "prefix")
    assert (engine.model, engine.max_model_len, engine.kv_cache_bytes) == ("bundled", 512, 64 << 20)
    assert engine.prefix_caching is False
    assert engine.threads == 3, "a replica computes on the cores that Ray gave it"
    assert server.served_model_name == ("a", "b")


@pytest.mark.parametrize(("value", "on"), [(True, True), ("true", True), (False, False), ("False", False)])
def test_a_switch_is_true_or_false_in_text_too(value: Any, on: bool) -> None:
    _, engine, server = read({"model": "bundled", "live-page": value, "prefix_caching": value, "graphs": value})
    assert (server.live_page, engine.prefix_caching, engine.graphs) == (on, on, on)
    assert engine.model == "bundled"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"replicas": 0}, "replicas is 0"),
        ({"replicas": "many"}, "replicas is 'many'"),
        ({"replicas": 4, "max_replicas": 2}, "max_replicas is 2"),
        ({"routing": "fastest"}, "routing is 'fastest'"),
        ({"cpus": 0}, "cpus is 0"),
        ({"gpus": -1}, "gpus is -1"),
        ({"port": 8000}, "port is 8000: it is not set here, but by http_options.port"),
        ({"write_timeout": 3}, "write-timeout is 3"),
        ({"max-model-len": "long"}, "max-model-len"),
        ({"max-modle-len": 3}, "max-modle-len"),
        ({"live-page": "maybe"}, "live-page is 'maybe': give true or false"),
        ({"live-page": None}, "live-page is None"),
        ({"no-live-page": False}, "no-live-page"),
        ({"drain-timeout": -1}, "drain-timeout"),
        ({"host": "0.0.0.0"}, "the line above says why"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(args: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        read(args)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["replicas=0"], "replicas is 0"),
        (["replicas"], "'replicas' is no setting"),
        (["port=http"], "port is 'http'"),
        (["port=70000"], "port is '70000'"),
        (["max-modle-len=3"], "max-modle-len"),
    ],
)
def test_a_wrong_word_is_one_line_and_exit_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    written = capsys.readouterr().err
    assert says in written
    assert written.count("\n") == 1


def test_a_port_in_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            main([f"port={port}"])
    assert ended.value.code == 2
    assert f"port is {port}" in capsys.readouterr().err
