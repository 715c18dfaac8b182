"""docs/migration.md against our command line: what it promises is there, and what is there stands in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from quire.engine.config import EngineConfig
from quire.server import cli
from quire.server.cli_serve import ALIASES, spelling
from quire.server.config import ServerConfig

PAGE = Path(__file__).parents[3] / "docs" / "migration.md"
NAME = re.compile(r"`(--[a-z0-9-]+)(?: [^`]*)?`")

# Options of `vllm serve` 0.33 and of the releases before it that people still have in their scripts, by its own source.
OF_VLLM = """
additional-config aggregate-engine-logging allow-credentials allowed-headers allowed-local-media-path allowed-methods
allowed-origins api-key api-server-count async-scheduling attention-backend block-size calculate-kv-scales
chat-template chat-template-content-format code-revision collect-detailed-traces compilation-config config
config-format convert cpu-offload-gb data-parallel-address data-parallel-backend data-parallel-rank data-parallel-size
data-parallel-size-local default-chat-template-kwargs device disable-access-log-for-endpoints disable-cascade-attn
disable-custom-all-reduce disable-fastapi-docs disable-hybrid-kv-cache-manager disable-log-stats
disable-sliding-window disable-uvicorn-access-log distributed-executor-backend download-dir dtype
enable-auto-tool-choice enable-chunked-prefill enable-dbo enable-expert-parallel enable-force-include-usage
enable-log-outputs enable-log-requests enable-lora enable-prefix-caching enable-prompt-embeds
enable-prompt-tokens-details enable-request-id-headers enable-server-load-tracking enable-sleep-mode
enable-ssl-refresh enable-tokenizer-info-endpoint enforce-eager eplb-config exclude-tools-when-tool-choice-none
fully-sharded-loras generation-config gpu-memory-utilization guided-decoding-backend h11-max-header-count
h11-max-incomplete-event-size headless hf-config-path hf-overrides hf-token host ignore-patterns io-processor-plugin
kv-cache-dtype kv-cache-memory-bytes kv-events-config kv-offloading-size kv-sharing-fast-prefill kv-transfer-config
limit-mm-per-prompt load-format log-config-file logits-processors logprobs-mode long-prefill-token-threshold
lora-dtype lora-modules mamba-cache-dtype max-cpu-loras max-log-len max-logprobs max-lora-rank max-loras max-model-len
max-num-batched-tokens max-num-partial-prefills max-num-queued-reqs max-num-queued-tokens max-num-seqs
max-parallel-loading-workers middleware mm-processor-kwargs model model-loader-extra-config no-async-scheduling
no-enable-prefix-caching num-gpu-blocks-override num-lookahead-slots num-scheduler-steps num-speculative-tokens
otlp-traces-endpoint override-generation-config override-pooler-config pipeline-parallel-size port
pt-load-map-location quantization reasoning-parser response-role return-tokens-as-token-ids revision root-path runner
safetensors-load-strategy scheduler-cls scheduling-policy seed served-model-name shutdown-timeout skip-tokenizer-init
spec-method spec-model spec-tokens speculative-config speculative-model sse-keep-alive-interval ssl-ca-certs
ssl-cert-reqs ssl-certfile ssl-ciphers ssl-keyfile stream-interval structured-outputs-config swap-space task
tensor-parallel-size tokenizer tokenizer-mode tokenizer-revision tool-call-parser tool-parser-plugin tool-server
trust-remote-code trust-request-chat-template uds use-tqdm-on-load uvicorn-log-level worker-cls worker-extension-cls
"""
VLLM = frozenset(OF_VLLM.split())


def options() -> set[str]:
    """Every name that `quire serve` takes, switches in both directions, without dashes."""
    names: set[str] = set()
    for parameter in get_command(cli.app).commands["serve"].params:  # type: ignore[attr-defined]
        names |= {name.removeprefix("--") for name in (*parameter.opts, *parameter.secondary_opts)}
    return names


def rows(heading: str) -> list[list[str]]:
    """The table under a heading, cell by cell."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")
    section = rest.partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def names_in(cell: str) -> list[str]:
    return [name.removeprefix("--") for name in NAME.findall(cell)]


SAME, OTHER, NONE = (
    rows(heading)
    for heading in (
        "Options that stay as they are",
        "Options that have another name, or are not needed",
        "What there is not",
    )
)


def test_the_page_has_its_tables() -> None:
    assert (len(SAME), len(OTHER), len(NONE)) > (30, 15, 10)


def test_every_right_hand_side_is_an_option() -> None:
    for table in (SAME, OTHER):
        for left, right, *_ in table:
            for name in names_in(right):
                assert name in options(), (left, right)


def test_what_stays_as_it_is_is_taken_as_it_is() -> None:
    for left, right, *_ in SAME:
        (old,), (new,) = names_in(left), names_in(right)
        assert spelling(old) == new, "the spelling is accepted, and means that"
        assert spelling(old.replace("-", "_")) == new


def test_every_name_of_vllms_that_we_take_is_listed() -> None:
    taken = {name for name in VLLM if spelling(name) in options()} - {"model"}
    listed = {name for left, *_ in SAME for name in names_in(left)}
    assert taken == listed


def test_every_alias_is_vllms_or_a_plural() -> None:
    assert set(ALIASES) - set(VLLM) == {"tenant-weight"}


def test_what_is_said_not_to_be_there_is_not() -> None:
    for left, *_ in NONE:
        for name in names_in(left):
            assert name in VLLM, name
            assert spelling(name) not in options(), name


def test_what_needs_no_option_or_another_is_vllms_and_not_ours() -> None:
    for left, *_ in OTHER:
        for name in names_in(left):
            assert name in VLLM, name
            assert spelling(name) not in options(), name


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--block-size", str(EngineConfig().block_size)),
        ("--max-num-seqs", str(EngineConfig().max_num_seqs)),
        ("--max-num-batched-tokens", str(EngineConfig().max_num_batched_tokens)),
        ("--max-logprobs", str(EngineConfig().max_logprobs)),
        ("--max-num-queued-reqs", str(ServerConfig().max_queued_requests)),
        ("--shutdown-timeout", f"{ServerConfig().drain_timeout:g} s"),
        ("--host", ServerConfig().host),
    ],
)
def test_defaults_are_told_as_they_are(option: str, said: str) -> None:
    (note,) = (note for left, _, note in SAME if left == f"`{option}`")
    assert re.search(rf"(?<![\d.]){re.escape(said)}(?![\d.])", note), note


def test_the_first_command_starts_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two commands at the top differ in one word, and ours is taken."""
    import shlex

    from typer.testing import CliRunner

    from quire.server import cli_serve

    theirs, ours = re.findall(r"^\$ (vllm|quire) serve +(.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)[:2]
    assert (theirs[0], ours[0]) == ("vllm", "quire")
    assert theirs[1] == ours[1]
    started: list[str] = []
    monkeypatch.setattr(cli_serve, "run", lambda engine, server: started.append(engine.model) or True)
    words = shlex.split(ours[1].replace("$KEY", "sk-1"))
    assert CliRunner().invoke(cli.app, ["serve", *words], env={"TERM": "dumb"}).exit_code == 0
    assert started == ["Qwen/Qwen3-8B"]
