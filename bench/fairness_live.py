"""The visitor and the flood of `fairness.py` at a running server, over HTTP.

Tenants are told by the request field `tenant` (a key needs the scope of that name); the policy is the server's own. A
first text stands for a first token.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from dataclasses import replace

import aiohttp

from ..scheduler.traces import arrival_times
from .capacity_live import open_loop
from .client import COMPLETIONS, ServerError, Target, send, served_model, tokenize
from .dataset import POOL_TEXT, Ask
from .fairness import FLOOD, VISITOR, FairnessConfig, Stay, Visit, flood_length, visit_length
from .metrics import Record

PATIENCE = 1800.0  # seconds for one request: the flood's last may wait long


def over_http(config: FairnessConfig) -> dict[str, Stay]:
    """{"solo", "server"}. Raises ServerError when the server cannot be asked."""
    return asyncio.run(_measure(config))


async def _measure(config: FairnessConfig) -> dict[str, Stay]:
    base_url = (config.url or "").rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as session:
        model, context = await served_model(session, base_url, config.model)
        if context is None:
            raise ServerError("/v1/models tells no max_model_len, which the lengths are chosen by")
        pool = sorted(set(await tokenize(session, base_url, model, POOL_TEXT)))
        body = {"temperature": 0.0, "ignore_eos": True}
        visitor = Target(base_url, COMPLETIONS, model, body | {"tenant": VISITOR}, headers)
        flooder = replace(visitor, extra_body=body | {"tenant": FLOOD})
        draw = random.Random(config.seed)

        def asks(count: int, prompt_len: int, output_len: int) -> list[Ask]:
            return [Ask(token_ids=tuple(draw.choices(pool, k=prompt_len)), output_len=output_len) for _ in range(count)]

        def visits() -> list[Ask]:
            return asks(config.visits, visit_length(config, context), config.visit_output_len)

        times = arrival_times(config.visits, config.visit_rate, seed=config.seed)
        solo = _stay(await open_loop(session, visitor, visits(), times), math.inf)
        flood = asks(config.flood_requests, flood_length(config, context), config.flood_output_len)
        start = time.perf_counter()
        tasks = [asyncio.create_task(send(session, flooder, ask)) for ask in flood]
        try:
            records = await open_loop(session, visitor, visits(), times)
            served = all(task.done() for task in tasks)
            ended = [_checked(task.result()) for task in tasks if task.done()]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        flood_end = max(record.last for record in ended) - start if served else math.inf
        return {"solo": solo, "server": _stay(records, flood_end)}


def _stay(records: list[Record], flood_end: float) -> Stay:
    start = min(record.due for record in records)
    return Stay([Visit(record.due - start, record.ttft) for record in map(_checked, records)], flood_end)


def _checked(record: Record) -> Record:
    if record.error is not None:
        raise ServerError(f"a request failed: {record.error} {record.detail}")
    return record
