"""What the routes share: made once when the server starts, reached through the request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, cast

from starlette.requests import Request

from ..engine.messages import EngineReady
from . import errors
from .admission import Admission
from .auth import Keys
from .config import ServerConfig
from .dispatcher import Dispatcher
from .generate import GenerateRequest, Generation
from .inputs import TextSide
from .metrics import Metrics

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
    text: TextSide
    pool: ThreadPoolExecutor

    def model_name(self, asked: str | None) -> str:
        """The name to answer with. Raises 404 for a model that is not served."""
        if asked is not None and asked not in self.model_names:
            raise errors.model_not_found(asked)
        return asked or self.model_names[0]

    def tenant_salt(self, request: Request, client_salt: str | None) -> str:
        return self.keys.cache_salt(request.state.tenant, client_salt or "")

    async def in_pool(self, work: Callable[[], T]) -> T:
        """`work` on a text thread."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)

    async def open_generation(self, samples: int, prepare: Callable[[], GenerateRequest]) -> Generation:
        """Let a request in, then tokenize it. Raises ApiError; whoever gets the Generation must close it."""
        if self.dispatcher.trouble() is not None:
            raise errors.engine_dead()
        try:
            slot = self.admission.admit(samples)
        except errors.ApiError as error:
            self.metrics.rejected(error.code)
            raise
        try:
            prepared = await self.in_pool(prepare)
            return Generation(
                prepared,
                dispatcher=self.dispatcher,
                tokenizer=self.text.tokenizer,
                metrics=self.metrics,
                config=self.config,
                slot=slot,
            )
        except BaseException:
            slot.release()
            raise


def state_of(request: Request) -> State:
    return cast(State, request.app.state.quire)
