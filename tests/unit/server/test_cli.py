from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner, Result

from quire.engine.config import EngineConfig
from quire.engine.errors import EngineStartError
from quire.engine.resolve import Machine
from quire.server import cli, cli_doctor, cli_serve
from quire.server.cli_chat import printable
from quire.server.cli_options import format_bytes, parse_bytes, parse_overrides
from quire.server.cli_serve import is_loopback
from quire.server.config import ServerConfig
from quire.server.keys import digest_of
from quire.server.keys_file import parse_keys

Settings = tuple[EngineConfig, ServerConfig]
WIDE = {"COLUMNS": "200", "TERM": "dumb"}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("QUIRE_") or name == "OPENAI_API_KEY":
            monkeypatch.delenv(name)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What `quire serve` would have started."""
    started: list[Settings] = []
    monkeypatch.setattr(cli_serve, "run", lambda engine, server: started.append((engine, server)) or True)
    return started


def invoke(*args: str, env: dict[str, str] | None = None, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, args, env={**WIDE, **(env or {})}, input=stdin)


def serve_settings(served: list[Settings], *args: str, env: dict[str, str] | None = None) -> Settings:
    result = invoke("serve", *args, env=env)
    assert result.exit_code == 0, result.output
    return served.pop()


def options_of(command: str) -> set[str]:
    return {parameter.name or "" for parameter in get_command(cli.app).commands[command].params}  # type: ignore[attr-defined]


# the whole


def test_help_needs_none_of_the_heavy_packages() -> None:
    heavy = ["torch", "transformers", "fastapi", "uvicorn", "aiohttp", "httpx", "numpy", "zmq"]
    code = f"import sys, quire.server.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [[], ["serve"], ["chat"], ["bench"], ["bench", "serve"], ["plan"], ["doctor"]])
def test_every_command_explains_itself(command: list[str]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version() -> None:
    assert invoke("--version").output.startswith("quire ")


def test_an_expected_failure_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(engine: EngineConfig, server: ServerConfig) -> bool:
        raise EngineStartError("there is no model folder [red]x[/]")

    monkeypatch.setattr(cli_serve, "run", fail)
    monkeypatch.setattr(sys, "argv", ["quire", "serve", "x"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 1
    assert "there is no model folder [red]x[/]" in capsys.readouterr().err


# serve


def test_every_setting_is_an_option_and_there_are_not_too_many() -> None:
    settings = {field.name for config in (EngineConfig, ServerConfig) for field in fields(config)}
    options = options_of("serve")
    assert settings <= options
    assert options - settings == {"config", "api_key_file", "insecure_no_auth"}
    assert len(options) <= 66


def test_nothing_given_is_the_defaults(served: list[Settings]) -> None:
    assert serve_settings(served) == (EngineConfig(), ServerConfig())


def test_a_failed_start_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_serve, "run", lambda engine, server: False)
    assert invoke("serve").exit_code == 1


def test_options_reach_their_settings(served: list[Settings]) -> None:
    args = "some/model --dtype float32 --kv-cache-bytes 1.5GiB --kernels attention=reference --kernels linear=cpu"
    more = "--no-prefix-caching --served-model-name a --served-model-name b --port 0 --vllm-metrics --threads 3"
    engine, server = serve_settings(served, *args.split(), *more.split())
    assert engine == EngineConfig(
        model="some/model",
        dtype="float32",
        kv_cache_bytes=3 << 29,
        kernels={"attention": "reference", "linear": "cpu"},
        prefix_caching=False,
        threads=3,
    )
    assert server == ServerConfig(served_model_name=("a", "b"), port=0, vllm_metrics=True)


@pytest.mark.parametrize(
    ("args", "field", "value"),
    [
        ("--no-enable-prefix-caching", "prefix_caching", False),
        ("--enable-prefix-caching", "prefix_caching", True),
        ("--kv-cache-memory-bytes 64", "kv_cache_bytes", 64),
        ("--num-gpu-blocks-override 64", "num_blocks", 64),
        ("--max_model_len 64", "max_model_len", 64),
        ("--shutdown-timeout 7", "drain_timeout", 7.0),
        ("--sse-keep-alive-interval 7", "keep_alive_interval", 7.0),
        ("--max-num-queued-reqs 7", "max_queued_requests", 7),
        ("--tenant-weight a=2 --tenant-weight b=0.5", "tenant_weights", {"a": 2.0, "b": 0.5}),
        ("--spec-method ngram", "speculative_method", "ngram"),
        ("--spec-model some/model", "speculative_model", "some/model"),
        ("--spec-tokens 7", "num_speculative_tokens", 7),
    ],
)
def test_spellings_from_habit(served: list[Settings], args: str, field: str, value: object) -> None:
    engine, server = serve_settings(served, *args.split())
    assert getattr(engine if hasattr(engine, field) else server, field) == value


def test_order_and_promises_reach_their_settings(served: list[Settings], tmp_path: Path) -> None:
    args = "--scheduling-policy fair --tenant-weights a=1,b=3 --slo-itl-ms 40 --prefill-chunking time --max-n 10000"
    engine, server = serve_settings(served, *args.split(), "--prefix-eviction", "phase", "--max-queue-seconds", "2.5")
    assert engine == EngineConfig(
        scheduling_policy="fair",
        tenant_weights={"a": 1.0, "b": 3.0},
        slo_itl_ms=40.0,
        prefill_chunking="time",
        max_n=10_000,
        prefix_eviction="phase",
    )
    assert server == ServerConfig(max_queue_seconds=2.5)
    path = tmp_path / "quire.yaml"
    path.write_text("tenant-weight: {a: 1, b: 2}\nscheduling-policy: fair\nmax-queue-seconds: 3")
    env = {"QUIRE_SLO_ITL_MS": "50", "QUIRE_MAX_N": "7"}
    engine, server = serve_settings(served, "--config", str(path), env=env)
    assert (engine.tenant_weights, engine.scheduling_policy) == ({"a": 1.0, "b": 2.0}, "fair")
    assert (engine.slo_itl_ms, engine.max_n, server.max_queue_seconds) == (50.0, 7, 3.0)
    assert serve_settings(served, env={"QUIRE_TENANT_WEIGHTS": "a=1,b=2"})[0].tenant_weights == {"a": 1.0, "b": 2.0}


def test_speculation_reaches_its_settings(served: list[Settings], tmp_path: Path) -> None:
    args = "--speculative-method nested --speculative-model h/4 --num-speculative-tokens 5 --speculative-tree chain"
    engine, _ = serve_settings(served, *args.split(), "--speculative-adaptive", "off")
    assert engine == EngineConfig(
        speculative_method="nested",
        speculative_model="h/4",
        num_speculative_tokens=5,
        speculative_adaptive=False,
    )
    assert serve_settings(served, "--speculative-tree", "rsd-c:2,2,1")[0].speculative_tree == "rsd-c:2,2,1"


@pytest.mark.parametrize(("word", "meaning"), [("on", True), ("off", False), ("OFF", False)])
def test_a_switch_from_everywhere(served: list[Settings], tmp_path: Path, word: str, meaning: bool) -> None:
    path = tmp_path / "quire.yaml"
    path.write_text(f"speculative-adaptive: {word}")  # YAML makes a boolean of it
    for engine, _ in (
        serve_settings(served, "--speculative-adaptive", word),
        serve_settings(served, env={"QUIRE_SPECULATIVE_ADAPTIVE": word}),
        serve_settings(served, "--config", str(path)),
    ):
        assert engine.speculative_adaptive is meaning


def test_every_alias_means_an_option() -> None:
    names = options_of("serve")
    assert {name.removeprefix("no-").replace("-", "_") for name in cli_serve.ALIASES.values()} <= names


def test_command_line_wins_over_environment_over_file_over_default(served: list[Settings], tmp_path: Path) -> None:
    path = tmp_path / "quire.yaml"
    path.write_text(
        "max-num-seqs: 1\nblock_size: 1\nport: 1\nkernels: {linear: cpu}\napi-key: [k]\nenable-prefix-caching: false"
    )
    env = {"QUIRE_BLOCK_SIZE": "2", "QUIRE_PORT": "2"}
    engine, server = serve_settings(served, "--config", str(path), "--port", "3", env=env)
    assert (engine.max_num_seqs, engine.block_size, server.port) == (1, 2, 3)
    assert engine.max_num_batched_tokens == EngineConfig().max_num_batched_tokens
    assert engine.kernels == {"linear": "cpu"}
    assert engine.prefix_caching is False
    assert server.api_key == ("k",)


def test_the_model_may_come_from_file_and_environment(served: list[Settings], tmp_path: Path) -> None:
    path = tmp_path / "quire.yaml"
    path.write_text("model: from-file")
    assert serve_settings(served, "--config", str(path))[0].model == "from-file"
    assert serve_settings(served, "--config", str(path), env={"QUIRE_MODEL": "from-env"})[0].model == "from-env"
    assert serve_settings(served, env={"QUIRE_CONFIG": str(path)})[0].model == "from-file"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max-seqs: 3", "unknown max-seqs; did you mean max-num-seqs?"),
        ("- a\n- b", "option: value"),
        ("a: [", "is not YAML"),
        ("port: 1\nport: 2", "port is given twice"),
        ("max-model-len: 1\nmax_model_len: 2", "max_model_len is given twice"),
        ("wholly-else: 1", "quire serve --help"),
        ("port: many", "--port"),
        ("config: other.yaml", "unknown config"),
        ("x: !!python/object/apply:os.getcwd []", "--config"),
    ],
)
def test_bad_files_are_refused(served: list[Settings], tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "quire.yaml"
    path.write_text(content)
    result = invoke("serve", "--config", str(path))
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not served


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00port: 1"])
def test_files_that_cannot_be_read_are_refused(served: list[Settings], tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "quire.yaml"
    if content is not None:
        path.write_bytes(content)
    result = invoke("serve", "--config", str(path))
    assert result.exit_code == 2
    assert str(path) in result.output
    assert result.output.count("\n") == 1
    assert not served


def test_an_empty_file_changes_nothing(served: list[Settings], tmp_path: Path) -> None:
    path = tmp_path / "quire.yaml"
    path.write_text("# nothing yet\n")
    assert serve_settings(served, "--config", str(path)) == (EngineConfig(), ServerConfig())


def test_where_values_came_from_is_said_but_keys_never(served: list[Settings], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-file\n\n sk-file-2 \n")
    args = ["serve", "--port", "9", "--api-key", "sk-line", "--api-key-file", str(keys)]
    result = invoke(*args, env={"QUIRE_BLOCK_SIZE": "16"})
    assert "port = 9  (command line)" in result.output
    assert "block-size = 16  (environment)" in result.output
    assert "sk-" not in result.output
    assert served[0][1].api_key == ("sk-line", "sk-file", "sk-file-2")
    from_env = invoke("serve", env={"QUIRE_API_KEY": "sk-env"})
    assert "sk-" not in from_env.output
    assert served[1][1].api_key == ("sk-env",)
    assert "sk-env" not in invoke("serve", "--help", env={"QUIRE_API_KEY": "sk-env"}).output


@pytest.mark.parametrize(
    ("option", "value"), [("--port", "tcp://10.0.0.1:8000"), ("--drain-timeout", "soon"), ("--max-num-seqs", "0")]
)
def test_a_refused_value_is_named_with_its_option(option: str, value: str) -> None:
    refused = invoke("serve", option, value)
    assert refused.exit_code == 2
    assert option in refused.output
    assert value in refused.output
    assert len(refused.output.strip().splitlines()) == 1


def test_a_misspelled_variable_is_refused(served: list[Settings]) -> None:
    result = invoke("serve", env={"QUIRE_MAX_SEQS": "sk-secret", "QUIRE_PORT": "8001"})
    assert result.exit_code == 2
    assert "QUIRE_MAX_SEQS" in result.output
    assert "did you mean max-num-seqs?" in result.output
    assert "QUIRE_PORT" not in result.output
    assert "sk-secret" not in result.output
    assert result.output.count("\n") == 1
    assert not served


def test_variables_that_kubernetes_sets_for_a_service_are_not_misspelled(served: list[Settings]) -> None:
    names = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP", "PORT_80_TCP_ADDR")
    serve_settings(served, env={f"QUIRE_PROD_{name}": "10.0.0.1" for name in names})
    assert invoke("serve", env={"QUIRE_PROD_HOST": "10.0.0.1"}).exit_code == 2


def test_an_open_door_needs_a_key_or_a_word(served: list[Settings], tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.org", ""):
        refused = invoke("serve", "--host", host)
        assert refused.exit_code == 2, host
        assert "--insecure-no-auth" in refused.output
    assert not served
    assert serve_settings(served, "--host", "0.0.0.0", "--api-key", "k")[1].host == "0.0.0.0"
    assert serve_settings(served, "--host", "0.0.0.0", "--insecure-no-auth")[1].api_key == ()
    empty = tmp_path / "keys"
    empty.write_text("\n")
    assert "holds no key" in invoke("serve", "--host", "0.0.0.0", "--api-key-file", str(empty)).output


def test_the_open_door_is_refused_in_one_line(served: list[Settings]) -> None:
    refused = invoke("serve", "--host", "0.0.0.0")
    assert refused.exit_code == 2
    assert refused.output.startswith("quire: --host 0.0.0.0 can be reached from other machines")
    assert refused.output.count("\n") == 1
    assert not served


def test_a_keys_file_is_read_before_anything_starts(served: list[Settings], tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    made = CliRunner().invoke(cli.app, ["keys", "alice"], env=WIDE)
    path.write_text(made.stdout)
    _, server = serve_settings(served, "--host", "0.0.0.0", "--api-keys-file", str(path))
    assert server.api_keys_file == path
    for args, says in (
        (["--tenant-weight", "a=2"], "exclude each other"),
        (["--api-keys-file", str(tmp_path / "none")], "does not exist"),
    ):
        refused = invoke("serve", "--api-keys-file", str(path), *args)
        assert refused.exit_code == 2
        assert says in refused.output
    path.write_text(made.stdout + "  rpm: many\n")
    broken = invoke("serve", "--api-keys-file", str(path))
    assert broken.exit_code == 2
    assert "line 3: `rpm`" in broken.output
    assert broken.output.count("\n") == 1
    assert not served


def test_a_key_is_made_and_shown_once() -> None:
    made, again = (CliRunner().invoke(cli.app, ["keys", "alice"], env=WIDE) for _ in range(2))
    assert made.exit_code == 0
    key = made.stderr.split()[-1]
    assert key.startswith("qk-")
    assert len(key) > 40
    assert key not in made.stdout
    assert key not in again.output
    (entry,) = parse_keys(made.stdout, "keys.yaml")
    assert entry.name == "alice"
    assert entry.digests == (digest_of(key),)
    both = parse_keys(made.stdout + made.stdout.replace("alice", "bob").replace("sha256: ", "sha256: ab")[:-3], "x")
    assert [entry.name for entry in both] == ["alice", "bob"], "entries can be appended"
    wrong = invoke("keys", "a b")
    assert wrong.exit_code == 2
    assert "`name`" in wrong.output
    assert "qk-" not in wrong.output


def test_an_empty_key_is_none(served: list[Settings]) -> None:
    assert invoke("serve", "--api-key", "").exit_code == 2
    assert not served
    assert serve_settings(served, env={"QUIRE_API_KEY": ""})[1].api_key == ()


def test_settings_do_not_show_their_keys() -> None:
    assert "sk-1" not in repr(ServerConfig(api_key=("sk-1",)))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "args",
    [
        "--kernels attention",
        "--kernels =x",
        "--kv-cache-bytes 2XB",
        "--kv-cache-bytes -1",
        "--max-num-seqs 0",
        "--port 70000",
        "--nonsense",
        "--tenant-weights a",
        "--tenant-weights =2",
        "--tenant-weights a=much",
        "--max-queue-seconds -1",
        "--max-queue-seconds nan",
        "--max-queue-seconds soon",
        "--request-timeout 0",
        "--request-timeout inf",
        "--drain-timeout nan",
        "--max-n many",
        "--slo-itl-ms fast",
        "--log-level loud",
        "--speculative-adaptive maybe",
        "--speculative-adaptive true",
        "--num-speculative-tokens 0",
        "--num-speculative-tokens four",
    ],
)
def test_bad_options_are_refused(served: list[Settings], args: str) -> None:
    result = invoke("serve", *args.split())
    assert result.exit_code == 2
    assert args.split()[0].removesuffix("s") in result.output
    assert "Traceback" not in result.output
    assert result.output.count("\n") == 1
    assert not served


@pytest.mark.parametrize("args", [["nonsense"], ["bench", "nonsense"], ["plan", "--nonsense"], ["bench", "serve", "a"]])
def test_every_command_refuses_in_one_line(args: list[str]) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.output.startswith("quire")
    assert result.output.count("\n") == 1


@pytest.mark.parametrize("args", [[], ["bench"]])
def test_a_command_that_needs_another_lists_them(args: list[str]) -> None:
    assert "Usage" in invoke(*args).output


# sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("17", 17), ("17B", 17), ("2KiB", 2048), ("2 gib", 2 << 30), ("1.5GiB", 3 << 29), ("2GB", 2 * 10**9)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2G", "two", "1e9", "-1", "2GiB2", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="not a size"):
        parse_bytes(text)


@given(st.integers(0, 1 << 50))
def test_a_size_survives_being_written(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.05, abs=1)


def test_overrides_from_one_variable() -> None:
    assert parse_overrides(["attention=reference,linear=cpu", " moe=cpu "]) == {
        "attention": "reference",
        "linear": "cpu",
        "moe": "cpu",
    }


# plan


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 100,
        "max_position_embeddings": 1000,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without fast bf16 and with 1 MiB free."""
    made = Machine(cuda=False, fast_bf16=False, cores=2, free_bytes=1 << 20)
    monkeypatch.setattr("quire.engine.resolve.look_at_machine", lambda device: made)


def plan_of(folder: Path, *args: str) -> dict[str, Any]:
    result = invoke("plan", str(folder), "--json", *args)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64
PARAMETERS = 100 * 64 + 3 * LAYER + 64


@pytest.mark.usefixtures("machine")
def test_plan_counts_by_hand(model_folder: Path) -> None:
    made = plan_of(model_folder, "--dtype", "bfloat16", "--block-size", "16", "--max-num-seqs", "2")
    assert made["parameters"] == PARAMETERS
    assert made["weight_bytes"] == 2 * PARAMETERS
    assert made["kv_bytes_per_token"] == 2 * 3 * 2 * 16 * 2  # key and value, layers, heads, head size, bytes
    assert made["block_bytes"] == 16 * made["kv_bytes_per_token"]
    assert made["total_bytes"] == made["weight_bytes"] + made["num_blocks"] * made["block_bytes"]
    assert made["cached_tokens"] == (made["num_blocks"] - 1) * 16
    assert made["max_concurrency"] == pytest.approx(made["cached_tokens"] / made["max_model_len"])
    half = plan_of(model_folder, "--dtype", "bfloat16", "--block-size", "16", "--tensor-parallel-size", "2")
    assert half["tensor_parallel_size"] == 2
    assert 2 * half["block_bytes"] == made["block_bytes"]
    assert 0.5 * made["weight_bytes"] < half["weight_bytes"] < 0.51 * made["weight_bytes"]  # norms are held by both
    auto = plan_of(model_folder)
    assert (auto["dtype"], auto["weight_bytes"]) == ("float32", 4 * PARAMETERS)


@pytest.mark.usefixtures("machine")
def test_plan_within_a_budget(model_folder: Path) -> None:
    block = 10 * 2 * 3 * 2 * 16 * 2
    budget = str(2 * PARAMETERS + 41 * block + block // 2)
    args = ("--dtype", "float16", "--max-model-len", "100", "--block-size", "10", "--memory", budget)
    made = plan_of(model_folder, *args)
    assert (made["num_blocks"], made["cached_tokens"], made["max_concurrency"]) == (41, 400, 4.0)
    assert "41 blocks" in invoke("plan", str(model_folder), *args).output
    exact = str(2 * PARAMETERS + 11 * block)  # the null block and just one request
    assert plan_of(model_folder, *args[:-1], exact)["max_concurrency"] == 1.0
    assert invoke("plan", str(model_folder), *args[:-1], str(int(exact) - 1)).exit_code == 1


@pytest.mark.usefixtures("machine")
def test_plan_that_does_not_fit_is_exit_code_1_with_a_remedy(model_folder: Path) -> None:
    for budget in (["--kv-cache-bytes", "10KiB"], ["--memory", "600KiB"], ["--memory", "1KiB"]):
        result = invoke("plan", str(model_folder), "--max-model-len", "1000", *budget)
        assert result.exit_code == 1, budget
        assert "does not fit" in result.output


def test_plan_refuses_what_it_cannot_do(model_folder: Path) -> None:
    assert "choose auto" in invoke("plan", str(model_folder), "--dtype", "int3").output
    assert invoke("plan", str(model_folder), "--memory", "1GiB", "--kv-cache-bytes", "1GiB").exit_code == 2
    with pytest.raises(EngineStartError, match="no model folder"):
        CliRunner().invoke(cli.app, ["plan", "./nowhere"], catch_exceptions=False)


# doctor


def test_doctor_reports_and_its_exit_code_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = cli_doctor.Finding("model", "bundled", "fine")
    monkeypatch.setattr(cli_doctor, "bundled_model", lambda: [healthy])
    result = invoke("doctor", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["problems"]) == (0, [])
    assert report["kernels"]
    monkeypatch.setattr(cli_doctor, "bundled_model", lambda: [cli_doctor.Finding("model", "bundled", "-", "missing")])
    broken = invoke("doctor")
    assert broken.exit_code == 1
    assert "missing" in broken.output


# chat


class Server:
    """Answers every chat with what `answer` makes of the request."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.authorization: list[str | None] = []
        self.answer: Callable[[dict[str, Any]], tuple[int, str]] = lambda body: (200, sse("Hel", "lo\x1b[2J", "!"))
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(200, json.dumps({"data": [{"id": "tiny"}]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.authorization.append(self.headers["Authorization"])
                self.reply(*outer.answer(body))

            def reply(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


def sse(*pieces: str) -> str:
    events = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return ": comment\n\n" + "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def test_chat_answers_a_pipe_once(server: Server) -> None:
    args = ["chat", "--base-url", server.url + "/v1/", "--system-prompt", "be brief", "--max-tokens", "7"]
    result = invoke(*args, stdin="hi\n", env={"QUIRE_API_KEY": "k"})
    assert result.exit_code == 0, result.output
    assert result.stdout == "Hello[2J!\n"  # the escape that would clear a terminal is gone
    assert server.authorization == ["Bearer k"]
    assert server.bodies == [
        {
            "model": "tiny",
            "max_tokens": 7,
            "stream": True,
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi\n"}],
        }
    ]


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """A person at a terminal, who leaves after the last line."""
    left = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("quire.server.cli_chat.is_interactive", lambda: True)


def test_a_conversation_remembers_and_forgets(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "one", "", "two", "/what", "/reset", "three", "/exit", "never")
    assert invoke("chat", "--base-url", server.url).exit_code == 0
    said = [[message["content"] for message in body["messages"]] for body in server.bodies]
    answer = "Hello\x1b[2J!"  # what the model said, unchanged, is what it is reminded of
    assert said == [["one"], ["one", answer, "two"], ["three"]]


def test_a_refused_message_is_shown_and_taken_back(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = server.answer
    refusal = 400, json.dumps({"error": {"message": "too long"}})
    server.answer = lambda body: refusal if body["messages"][-1]["content"] == "bad" else fine(body)
    typed(monkeypatch, "bad", "good")
    result = invoke("chat", "--base-url", server.url)
    assert result.exit_code == 0
    assert "HTTP 400: too long" in result.output
    assert [message["content"] for message in server.bodies[-1]["messages"]] == ["good"]


def test_an_error_inside_a_stream_fails_the_pipe(server: Server) -> None:
    server.answer = lambda body: (200, 'data: {"error": {"message": "engine died"}}\n\ndata: [DONE]\n\n')
    result = invoke("chat", "--base-url", server.url, stdin="hi")
    assert result.exit_code == 1
    assert "engine died" in result.output


@pytest.mark.parametrize("command", [["chat"], ["bench", "serve"]])
def test_without_a_server_the_command_that_starts_one_is_shown(command: list[str]) -> None:
    result = invoke(*command, "--base-url", "http://127.0.0.1:9", stdin="hi")
    assert result.exit_code == 1
    assert "quire serve" in result.output


@given(st.text())
def test_printable_text_cannot_steer_a_terminal(text: str) -> None:
    assert all(c in "\n\t" or c.isprintable() for c in printable(text))
    assert printable("naïve 你好 🙂\n\tok") == "naïve 你好 🙂\n\tok"


# bench


@pytest.mark.parametrize(
    "args",
    [
        "--goodput ttft",
        "--goodput ttft:5 surprise",
        "--request-rate 0",
        "--extra-body {",
        "--extra-body 3",
        "--metric-percentiles 50,x",
        "--endpoint /v1/embeddings",
        "--request-rate fast",
        "--request-rate ,",
        "--trace absent.jsonl",
        "--trace absent.jsonl --request-rate 1,2",
        "--time-scale 2",
        "--report page.pdf",
        "--report absent/page.html",
        "--json absent/result.json",
    ],
)
def test_bench_refuses_bad_settings_before_it_connects(args: str) -> None:
    result = invoke("bench", "serve", "--base-url", "http://127.0.0.1:9", *args.split())
    assert result.exit_code == 1
    assert "No server" not in result.output
    assert args.split()[0] in result.output
    assert result.output.count("\n") == 1


def test_bench_takes_several_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    monkeypatch.setattr("quire.server.cli_bench.measure", lambda loads, *files: bool(measured.extend(loads)))
    assert invoke("bench", "serve", "--request-rate", "1,2.5,inf", "--seed", "7").exit_code == 0
    assert [(load.request_rate, load.seed) for load in measured] == [(1.0, 7), (2.5, 8), (None, 9)]


def test_bench_takes_limits_as_vllm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    monkeypatch.setattr("quire.server.cli_bench.measure", lambda loads, *files: bool(measured.extend(loads)))
    result = invoke(
        "bench", "serve", "--goodput", "ttft:500", "tpot:50", "--max-concurrency", "3", "--goodput", "e2el:9"
    )
    assert result.exit_code == 0, result.output
    assert measured[0].goodput == {"ttft": 0.5, "e2el": 0.009, "tpot": 0.05}
    assert measured[0].concurrency == 3
    assert invoke("bench", "serve", "surprise").exit_code == 2


def test_bench_with_a_failed_request_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.server.cli_bench.measure", lambda loads, *files: True)
    assert invoke("bench", "serve").exit_code == 1
