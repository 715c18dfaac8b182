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
from .admission import Admission
from .auth import Keys, tenant_of
from .config import ServerConfig
from .cost import Asked, Experience
from .dispatcher import Dispatcher
from .generate import GenerateRequest, Generation
from .inputs import Order, TextSide
from .life import Life
from .metrics import Metrics
from .protocol import GenerateBody

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class State:
    config: ServerConfig
    ready: EngineReady
    model_names: tuple[str, ...]
    created: int  # Unix seconds
    keys: Keys
    admission: Admission
    dispatcher: Dispatcher
    metrics: Metrics
    experience: Experience
    text: TextSide
    pool: ThreadPoolExecutor

    def model_name(self, asked: str | None) -> str:
        """The name to answer with. Raises 404 for a model that is not served."""
        if asked is not None and asked not in self.model_names:
            raise errors.model_not_found(asked)
        return asked or self.model_names[0]

    def order_of(self, request: Request, body: GenerateBody) -> Order:
        """Whose request it is: the tenant of the body, else of the key. Raises 400 for one that is not served here."""
        key_digest, limits = request.state.key_digest, self.text.limits
        order = Order(
            arrival=request.state.arrival,
            tenant=body.tenant or tenant_of(key_digest),
            priority=body.priority or 0,
            cache_salt=self.keys.cache_salt(key_digest, body.cache_salt or ""),
            slo=body.promises,
            timeout=body.timeout,
        )
        if limits.tenants and body.tenant is None and order.tenant not in limits.tenants:
            raise errors.invalid("`tenant` is required: this server shares itself out between named ones.", "tenant")
        check_order(order.priority, order.tenant, limits)
        return order

    async def in_pool(self, work: Callable[[], T]) -> T:
        """`work` on a text thread."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)

    async def open_generation(self, asked: Asked, tenant: str, prepare: Callable[[], GenerateRequest]) -> Generation:
        """Let a request in, then tokenize it. Raises ApiError; whoever gets the Generation must close it."""
        if (refusal := self.dispatcher.life.refusal()) is not None:
            raise refusal
        try:
            slot = self.admission.admit(asked.samples, self.experience.cost(asked), tenant)
        except errors.ApiError as error:
            self.metrics.rejected(error.code)
            raise
        try:
            prepared = await self.in_pool(prepare)
            self.experience.saw_prompts(asked, sum(len(prompt.token_ids) for prompt in prepared.prompts))
            return Generation(
                prepared,
                dispatcher=self.dispatcher,
                tokenizer=self.text.tokenizer,
                metrics=self.metrics,
                experience=self.experience,
                config=self.config,
                slot=slot,
            )
        except BaseException:
            slot.release()
            raise


def state_of(request: Request) -> State:
    """Raises 503 while the first engine starts: there is no state before it serves."""
    state = request.app.state.quire
    if state is None:
        raise life_of(request).starting()
    return cast(State, state)


def life_of(request: Request) -> Life:
    return cast(Life, request.app.state.dispatcher.life)
