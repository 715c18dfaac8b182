"""Every metric that a server can show, read from pages like those that Prometheus gets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from prometheus_client.parser import text_string_to_metric_families

from quire.engine.messages import EngineReady, Progress, StepStats
from quire.server.life import Life, LifeMetrics
from quire.server.metrics import ALIASED, Metrics

OWN_OF_TYPES = {"histogram": ("_bucket", "_sum", "_count")}
UNITS = ("seconds", "bytes", "tokens", "blocks")
RATIOS = ("perc", "ratio", "factor")


@dataclass(frozen=True, slots=True)
class Family:
    """name: as queries spell it, without what a histogram appends. labels: without `le`. extra_labels: those of them
    that are there only where tenants have names. needs: what a server must have for it, "" = nothing."""

    name: str
    type: str
    labels: tuple[str, ...]
    extra_labels: tuple[str, ...]
    text: str
    needs: str
    alias: str

    @property
    def unit(self) -> str:
        """By the name, as Prometheus has it; "" for a number of what the text says."""
        words = self.name.removesuffix("_total").split("_")
        if any(word in RATIOS for word in words):
            return "ratio"
        return next((unit for unit in UNITS if unit in words), "")

    @property
    def series(self) -> tuple[str, ...]:
        """Names of what a query can ask for."""
        return tuple(self.name + suffix for suffix in OWN_OF_TYPES.get(self.type, ("",)))


@cache
def families() -> tuple[Family, ...]:
    """Those of the engine's life first, the process's last."""
    with_all = _read(_page(tenants=True, speculation=True))
    without_tenants = _read(_page(tenants=False, speculation=True))
    without_speculation = _read(_page(tenants=True, speculation=False))
    found = []
    for name, (kind, labels, text) in with_all.items():
        few = without_tenants[name][1] if name in without_tenants else labels
        plain = name.removeprefix("quire_")
        found.append(
            Family(
                name=name,
                type=kind,
                labels=labels,
                extra_labels=tuple(label for label in labels if label not in few),
                text=text,
                needs="named tenants"
                if name not in without_tenants
                else "speculation"
                if name not in without_speculation
                else "",
                alias=f"vllm:{plain}" if {plain, plain.removesuffix("_total")} & ALIASED else "",
            )
        )
    return tuple(found)


def known_series() -> dict[str, Family]:
    return {name: family for family in families() for name in family.series}


def _read(page: str) -> dict[str, tuple[str, tuple[str, ...], str]]:
    """Name to (type, labels, text). Raises AssertionError for a family without a sample: then `_page` lacks what makes
    one, and nobody knows its labels."""
    found = {}
    for family in text_string_to_metric_families(page):
        assert family.samples, f"{family.name}: let _page() give it a sample"
        labels = tuple(label for label in family.samples[0].labels if label != "le")
        name = family.name + "_total" if family.type == "counter" else family.name
        found[name] = (family.type, labels, family.documentation)
    return found


def _page(*, tenants: bool, speculation: bool) -> str:
    """Of a server to which everything has happened once."""
    life = Life(lambda: 0.0, 10.0)
    life.progresses(Progress("load weights", {}, 0.5, settled=True))
    metrics = Metrics(_ready(speculation), "m", tenants={"alice"} if tenants else ())
    metrics.saw_step(StepStats(steps_total=1))
    metrics.sample_finished("stop", tokens=2, total_seconds=2.0, decode_seconds=1.0, ideal_seconds=1.0)
    metrics.expired("timeout")
    metrics.aborted("running")
    metrics.promise("ttft", True, "alice", 1)
    metrics.error(400, "invalid_value")
    metrics.rejected("server_overloaded")
    metrics.tenant_used("alice", 1, 1, 1)
    metrics.tenant_refused("alice", "rate_limit_exceeded")
    metrics.http("POST", "/v1/completions", 200, 1.0)
    return (LifeMetrics(life).render() + metrics.render()).decode()


def _ready(speculation: bool) -> EngineReady:
    return EngineReady(
        model_path="",
        model_type="llama",
        num_parameters=1,
        dtype="float32",
        device="cpu",
        vocab_size=256,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_n=4,
        scheduling_policy="fcfs",
        tenants=[],
        step_cost=[],
        max_logprobs=20,
        block_size=16,
        num_blocks=16,
        eos_token_ids=[0],
        kernels={},
        reasons={},
        startup_seconds={"load weights": 1.0},
        memory_bytes={"weights": 1},
        speculative_tree="chain:3" if speculation else "",
        num_speculative_tokens=3 if speculation else 0,
    )
