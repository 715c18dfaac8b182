"""What a person sets about the HTTP side, and nothing else: frozen, spelled as on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..engine.validation import TIMEOUT_BOUNDS
from .parsing.syntaxes import REASONING_PARSERS, TOOL_PARSERS


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of one HTTP server.

    host, port            where it listens
    health_port           where /health, /ready, /live and /metrics are answered as well, by a thread of their own: a
                          busy or blocked event loop does not delay them; None = nowhere
    served_model_name     the names that requests may use; the first is the one shown. Empty = the model folder's name
    api_key               keys that open /v1 and the tokenizer routes
    api_keys_file         further keys, with names and quotas (keys_file.py). With neither, open to all who reach it
    allowed_hosts         names accepted in the Host header; empty = loopback names when bound to loopback, else any
    max_queued_requests   samples that may wait beyond those that can run; past it new requests get 503 with Retry-After
    max_queued_tokens     prompt tokens that may wait, known or estimated from bytes; past it 503 as well; None = none
    max_queue_seconds     predicted wait in the queue past which new requests get 503 as well; None = no such bound
    max_connections       open connections; past it a new one gets 503 before anything is read from it
    max_body_bytes        of a request body; past it 413
    request_timeout       seconds from arrival to the last token; past it the engine ends the request (504). A request's
                          own `timeout` holds where it is shorter
    drain_timeout         seconds that running requests get to finish after SIGTERM
    write_timeout         seconds that one write to a client may take before its request is aborted: nobody reads there
    keep_alive_interval   seconds without a token after which a stream gets a comment, so that proxies keep it open
    hang_timeout          seconds without a sign of life from the engine's loop after which /health and /ready say 503;
                          after twice as many the engine is killed, and started again
    max_engine_restarts   times in a row that the engine is started again when it has ended; past it the server ends
    text_threads          threads that tokenize, and processes that render chat templates for them
    trust_request_chat_template   requests may bring a template of their own; it runs in the same sandbox
    tokenizer_info        /tokenizer_info shows the tokenizer's marks and the chat template to who may ask the model
    generation_config     "auto" = the model's own sampling defaults, "none" = OpenAI's
    tool_call_parser      how the model spells calls of tools: "auto" = as its chat template does, "none" = no tools
    reasoning_parser      how it marks its thinking: "auto" = as its chat template does, "none" = all text is content
    live_page             the page at / that shows the engine at work, and /steps, which feeds it
    vllm_metrics          repeat the metrics that dashboards and gateways know under their `vllm:` names
    otlp_traces_endpoint  where OpenTelemetry spans are sent (OTLP over HTTP); None = there are none
    log_json              one JSON object a line
    log_level             of our own lines: "debug", "info", "warning", "error"
    """

    host: str = "127.0.0.1"
    port: int = 8000
    health_port: int | None = None
    served_model_name: tuple[str, ...] = ()
    api_key: tuple[str, ...] = field(default=(), repr=False)
    api_keys_file: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    max_queued_requests: int = 1024
    max_queued_tokens: int | None = None
    max_queue_seconds: float | None = None
    max_connections: int = 1024
    max_body_bytes: int = 2 * 1024 * 1024
    request_timeout: float = 600.0
    drain_timeout: float = 30.0
    write_timeout: float = 60.0
    keep_alive_interval: float = 15.0
    hang_timeout: float = 9.0  # whoever looks at /ready again and again knows within ten
    max_engine_restarts: int = 5
    text_threads: int = 2
    trust_request_chat_template: bool = False
    tokenizer_info: bool = False
    generation_config: str = "auto"
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    live_page: bool = True
    vllm_metrics: bool = False
    otlp_traces_endpoint: str | None = None
    log_json: bool = False
    log_level: str = "info"

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, for a word that is none of the choices or a time that is none."""
        for name, choices in (
            ("generation_config", ("auto", "none")),
            ("tool_call_parser", TOOL_PARSERS),
            ("reasoning_parser", REASONING_PARSERS),
            ("log_level", ("debug", "info", "warning", "error")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if "" in self.api_key:
            raise ValueError("api_key is empty: give a key, or leave it out")
        if self.health_port is not None and self.health_port == self.port:
            raise ValueError(f"health_port must be another port than {self.port}, where everything else is answered")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_traces_endpoint must be an http:// or https:// address, not {endpoint!r}")
        for name, (low, high) in _SECONDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must be between {low:g} and {high:g} seconds, not {value!r}")


DAY = 86400.0
_SECONDS = {
    "request_timeout": TIMEOUT_BOUNDS,
    "max_queue_seconds": (0.0, DAY),
    "drain_timeout": (0.0, DAY),
    "write_timeout": (0.0, DAY),
    "keep_alive_interval": (0.0, DAY),
    "hang_timeout": (0.0, DAY),
}
