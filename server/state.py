"""What the routes share: made once when the server starts, reached through the request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, cast

from starlette.requests import Request

from ..engine.messages import EngineReady
from ..engine.validation import check_order
from . import errors
from .admission import Admission, Slot
from .auth import Door
from .config import ServerConfig
from .cost import Asked, Experience
from .dispatcher import Dispatcher
from .generate import GenerateRequest, Generation
from .inputs import Order, TextSide
from .keys import TENANT, Key
from .life import Life
from .metrics import Metrics
from .promises import TIMEOUT_HEADER, header_timeout
from .protocol import OrderBody
from .quotas import Lease
from .registry import Registry

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class State:
    config: ServerConfig
    ready: EngineReady
    model_names: tuple[str, ...]
    created: int  # Unix seconds
    door: Door
    admission: Admission
    dispatcher: Dispatcher
    metrics: Metrics
    registry: Registry
    experience: Experience
    text: TextSide
    pool: ThreadPoolExecutor

    def model_name(self, asked: str | None) -> str:
        """The name to answer with. Raises 404 for a model that is not served."""
        if asked is not None and asked not in self.model_names:
            raise errors.model_not_found(asked)
        return asked or self.model_names[0]

    def name_tenants(self) -> None:
        """By the keys as they are now: the weights in the queue, and the series of metrics."""
        named = self.door.ring.named
        self.metrics.name_tenants(named)
        self.admission.set_weights(self.ready.tenant_weights | {key.name: key.weight or 1.0 for key in named.values()})

    def order_of(self, request: Request, body: OrderBody) -> Order:
        """Whose request it is: its key's tenant, or the one in the body if the key may speak for others. Raises 403 for
        what the key may not have, 400 for what is not served here.
        """
        key: Key = request.state.caller
        ring, limits = self.door.ring, self.text.limits
        tenant = body.tenant or key.name
        if tenant != key.name and TENANT not in key.scopes:
            raise errors.foreign_tenant(tenant)
        order = Order(
            key=key,
            label=body.request_id or request.state.request_id,
            notes=request.scope["state"],
            arrival=request.state.arrival,
            tenant=tenant,
            weight=ring.named[tenant].weight if tenant in ring.named else None,
            priority=self._priority(key, body.priority),
            cache_salt=ring.cache_salt(key.name and tenant, body.cache_salt or ""),
            slo=body.promises,
            timeout=_shorter(body.timeout, header_timeout(request.headers.get(TIMEOUT_HEADER))),
        )
        if limits.tenants and body.tenant is None and order.tenant not in limits.tenants:
            raise errors.invalid("`tenant` is required: this server shares itself out between named ones.", "tenant")
        check_order(order.priority, order.tenant, limits)
        request.state.body = body
        return order

    async def in_pool(self, work: Callable[[], T]) -> T:
        """`work` on a text thread."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)

    async def open_generation(self, asked: Asked, order: Order, prepare: Callable[[], GenerateRequest]) -> Generation:
        """Let a request in, then tokenize it. Raises ApiError; whoever gets the Generation must close it."""
        if (refusal := self.dispatcher.life.refusal()) is not None:
            raise refusal
        slot, lease = self._let_in(asked, order)
        try:
            prepared = await self.in_pool(prepare)
            self.experience.saw_text(prepared.encoded)
            generation = Generation(
                prepared,
                name=(order.key.name, order.label),
                registry=self.registry,
                dispatcher=self.dispatcher,
                tokenizer=self.text.tokenizer,
                metrics=self.metrics,
                experience=self.experience,
                config=self.config,
                slot=slot,
                lease=lease,
            )
            order.notes["generation"] = generation
            return generation
        except BaseException:
            slot.release()
            lease.settle(0)
            raise

    def _let_in(self, asked: Asked, order: Order) -> tuple[Slot, Lease]:
        """By the key's quotas first, so that who has used them up learns that, and then by the house."""
        try:
            lease = self.door.quotas.lease(order.key, self.experience.most_tokens(asked))
            try:
                cost, tokens = self.experience.cost(asked), self.experience.prompt_tokens(asked)
                return self.admission.admit(asked.samples, cost, order.tenant, prompt_tokens=tokens), lease
            except errors.ApiError:
                lease.settle(0)
                raise
        except errors.ApiError as error:
            self.metrics.rejected(error.code)
            self.metrics.tenant_refused(order.tenant, error.code)
            raise

    def _priority(self, key: Key, asked: int | None) -> int:
        """Under the policy that heeds it, a key's class is the most urgent that its requests may be."""
        if key.priority is None or self.ready.scheduling_policy != "priority":
            return asked or 0
        if asked is not None and asked < key.priority:
            raise errors.too_urgent(asked, key.priority)
        return key.priority if asked is None else asked


def _shorter(one: float | None, other: float | None) -> float | None:
    return min((limit for limit in (one, other) if limit is not None), default=None)


def state_of(request: Request) -> State:
    """Raises 503 while the first engine starts: there is no state before it serves."""
    state = request.app.state.quire
    if state is None:
        raise life_of(request).starting()
    return cast(State, state)


def life_of(request: Request) -> Life:
    return cast(Life, request.app.state.dispatcher.life)
