"""An answer as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gptsmith.serve import errors
from gptsmith.serve.answer import Answer
from gptsmith.serve.worker import Ticket, Worker

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class EventStream(StreamingResponse):
    """The chunks of an answer. However they end, and even if they never began, the ticket is
    cancelled."""

    def __init__(self, answer: Answer, worker: Worker, ticket: Ticket) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = _events(answer, ticket)
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._worker, self._ticket = worker, ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.cancel(self._ticket)


async def _events(answer: Answer, ticket: Ticket) -> AsyncIterator[str]:
    """The chunks of an answer as events; an error is the last one."""
    for chunk in answer.opening():
        yield _event(chunk)
    try:
        async for progress in ticket.updates():
            for chunk in answer.chunks(progress):
                yield _event(chunk)
    except Exception as error:
        yield _event(errors.as_api_error(error).body)
        return
    for chunk in answer.closing():
        yield _event(chunk)
    yield "data: [DONE]\n\n"


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {_encode(data)}\n\n"
