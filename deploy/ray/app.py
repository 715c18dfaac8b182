"""The application that Ray Serve runs, as `import_path: quire.deploy.ray.app:build` of its config.

    client ──▶ Serve's proxy ──▶ Front (ingress.py) ──PrefixRouter──▶ Engine (replica.py): the application, its engine
                                                                      Engine …

Two deployments: whoever chooses a replica must have read the prompt, and Serve's proxy reads no bodies.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from ...engine.config import EngineConfig
from ...server.config import ServerConfig
from .call import Ask, Call, Everyone, Part, ReplicaLost
from .ingress import Ingress
from .replica import Replica, engine_client
from .router import PrefixRouter, RandomRouter
from .settings import ServeSettings, read

ENGINE, FRONT = "Engine", "Front"

FRONT_REQUESTS = 100_000  # open at once at the front, which only passes on: what is too much the replicas say

# Serve ends a replica so long after it has told it to drain, for good; the seconds beyond the drain itself are for its
# engine to end.
END_SECONDS = 10.0

STATS_SECONDS = 2.0  # between a replica's reports to routers: an engine that was started again holds nothing


class Engine(Replica):
    """One actor with an engine."""

    async def __init__(self, engine: EngineConfig, server: ServerConfig) -> None:
        super().__init__(serve.get_replica_context().replica_id.unique_id, engine_client(engine, server), server)
        await self.start()

    async def __del__(self) -> None:
        await self.stop()


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application from the settings of `settings.py`. Raises SettingsError."""
    settings, engine, server = read(args)
    engines = serve.deployment(Engine, name=ENGINE, **_scale(settings)).options(
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_ongoing_requests=engine.max_num_seqs + server.max_queued_requests,  # the application refuses before Serve
        graceful_shutdown_timeout_s=server.drain_timeout + END_SECONDS,
        **_routing(settings),
    )
    front = serve.deployment(
        serve.ingress(_front(server.max_body_bytes))(),
        name=FRONT,
        max_ongoing_requests=FRONT_REQUESTS,
        graceful_shutdown_timeout_s=server.drain_timeout + END_SECONDS,
        ray_actor_options={"num_cpus": 0},  # it moves bytes
    )
    return front.bind(engines.bind(engine, server))


def _scale(settings: ServeSettings) -> dict[str, Any]:
    if settings.max_replicas is None:
        return {"num_replicas": settings.replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=settings.replicas,
            max_replicas=settings.max_replicas,
            policy=AutoscalingPolicy(policy_function="quire.deploy.ray.autoscaling:queue_policy"),
        )
    }


def _routing(settings: ServeSettings) -> dict[str, Any]:
    routers = {"prefix": PrefixRouter, "random": RandomRouter}
    if settings.routing not in routers:
        return {}  # Serve's own: the less busy one of two
    return {
        "request_router_config": RequestRouterConfig(
            request_router_class=routers[settings.routing], request_routing_stats_period_s=STATS_SECONDS
        )
    }


def _front(max_body_bytes: int) -> Any:
    """What makes the front's application, where it runs."""

    def build_front() -> Ingress:
        handle = serve.get_deployment_handle(ENGINE, app_name=serve.get_replica_context().app_name)
        return Ingress(_ask(handle), _everyone(handle), max_body_bytes)

    return build_front


def _ask(handle: DeploymentHandle) -> Ask:
    streaming = handle.options(stream=True, method_name="answer")

    async def ask(call: Call) -> AsyncIterator[Part]:
        parts = streaming.remote(call)
        try:
            async for part in parts:
                yield part
        except (RayError, RayServeException) as error:
            raise ReplicaLost(type(error).__name__) from None
        finally:
            parts.cancel()

    return ask


def _everyone(handle: DeploymentHandle) -> Everyone:
    async def everyone(call: Call) -> list[tuple[str, int, bytes]]:
        answers = await handle.broadcast("whole", call).results_async(return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, tuple)]

    return everyone
