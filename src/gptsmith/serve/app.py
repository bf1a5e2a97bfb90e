"""The HTTP application: OpenAI's API, and the chat page, for the models of one server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from gptsmith.generate.request import Generation, QueueFull
from gptsmith.generate.request import Request as TextRequest
from gptsmith.serve import embeddings, errors, openapi
from gptsmith.serve.access import LOOPBACK, PAGE, Access
from gptsmith.serve.answer import Answer, ChatAnswer, CompletionAnswer
from gptsmith.serve.errors import ApiError
from gptsmith.serve.events import EventStream
from gptsmith.serve.metrics import Metrics
from gptsmith.serve.options import ServeOptions
from gptsmith.serve.protocol import (
    ChatBody,
    ClassifyBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    Generating,
    TokenizeBody,
    parse,
    several,
)
from gptsmith.serve.served import ServedModel
from gptsmith.serve.worker import Ticket, Worker

PAGE_FILES = Path(__file__).parent / "page"
T = TypeVar("T")


class Server:
    """The models, the thread that computes, and the handlers of all paths."""

    def __init__(self, models: Mapping[str, ServedModel], options: ServeOptions) -> None:
        self.models = models
        self.metrics = Metrics()
        engines = [model.engine for model in models.values() if model.engine is not None]
        self.worker = Worker(engines, options.max_batch_size, options.max_queue, self.metrics)
        # Templates and tokenizers: beside the event loop, one at a time for each model, so that
        # long texts for one do not hold up the others.
        self._threads = {name: ThreadPoolExecutor(1, f"tokenizer of {name}") for name in models}

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.close)
            for thread in self._threads.values():
                thread.shutdown(cancel_futures=True)

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/", self.page),
            Mount(PAGE.rstrip("/"), StaticFiles(directory=PAGE_FILES)),
            Route("/health", self.health),
            Route("/metrics", self.report_metrics),
            Route("/openapi.json", self.describe_api),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/embeddings", self.embed, methods=["POST"]),
            Route("/v1/classify", self.classify, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]

    # Generation

    async def chat(self, request: Request) -> Response:
        body = parse(await request.body(), ChatBody)
        model = self.find(body.model)
        self.worker.check_queue(model.generating_engine(), body.n)
        ids = await self._beside(
            model,
            model.chat_ids,
            body.messages,
            body.tools,
            body.continue_final_message,
            body.continue_token_ids,
        )
        answer = ChatAnswer(model, body, [ids] * body.n, [""] * body.n)
        scored = body.top_logprobs if body.logprobs else None
        stop_ids = (*model.chat_stop_ids, *body.stop_token_ids)
        return await self._answer(request, answer, body.limit, stop_ids, scored)

    async def complete(self, request: Request) -> Response:
        body = parse(await request.body(), CompletionBody)
        model = self.find(body.model)
        prompts = several(body.prompt)
        count, most = len(prompts) * body.n, self.worker.max_running + self.worker.max_waiting
        if count > most:
            raise ApiError(400, f"{count:,} completions, but at most {most} at a time")
        self.worker.check_queue(model.generating_engine(), count)
        encoded = [await self._beside(model, model.prompt_ids, prompt) for prompt in prompts]
        echoes = [""] * len(prompts)
        if body.echo:
            echoes = [
                p if isinstance(p, str) else await self._beside(model, model.tokenizer.decode, p)
                for p in prompts
            ]
        answer = CompletionAnswer(
            model, body, _repeated(encoded, body.n), _repeated(echoes, body.n)
        )
        stop_ids = (*model.tokenizer.special_ids.eos_ids, *body.stop_token_ids)
        return await self._answer(request, answer, body.max_tokens, stop_ids, body.logprobs)

    async def _answer(
        self,
        request: Request,
        answer: Answer,
        limit: int | None,
        stop_ids: Sequence[int],
        scored: int | None,
    ) -> Response:
        body: Generating = answer.body
        model = answer.model
        model.checked_ids(body.stop_token_ids, "stop_token_ids")
        model.checked_ids(body.logit_bias, "logit_bias")
        constraint = body.constraint()
        requests: list[TextRequest] = []
        for i, ids in enumerate(answer.prompts):
            sampling = body.sampling(model.max_new_tokens(ids, limit, answer.field))
            matcher = None
            if constraint is not None:
                matcher = await self._beside(
                    model, model.compile, constraint, body.constraint_field
                )
            requests.append(
                TextRequest(
                    ids,
                    sampling.with_seed(sampling.seed + i % body.n),
                    body.stop,
                    stop_ids,
                    context_shift=False,
                    logprobs=scored,
                    prompt_logprobs=scored if getattr(body, "echo", False) else None,
                    logit_bias=body.logit_bias,
                    constraint=matcher,
                    namespace=request.scope["namespace"],
                )
            )
        ticket = self.worker.submit(model.generating_engine(), requests)
        answer.generations = ticket.generations
        if body.stream:
            return EventStream(answer, self.worker, ticket)
        generations = await self._finished(request, ticket)
        if generations is None:
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(answer.whole())

    async def _finished(self, request: Request, ticket: Ticket) -> list[Generation] | None:
        """The generations of a ticket; None if the client closes the connection before they end."""
        result = asyncio.ensure_future(ticket.result())
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                return None
            return result.result()
        except Exception as error:  # the worker has logged it: the connection need not be closed
            raise errors.as_api_error(error) from None
        finally:
            result.cancel()
            gone.cancel()
            self.worker.cancel(ticket)

    # Other uses of a model

    async def embed(self, request: Request) -> Response:
        body = parse(await request.body(), EmbeddingBody)
        model = self.find(body.model)
        most = self.worker.max_running
        self.worker.check_queue(model.generating_engine(), min(len(body.inputs), most))

        def encode() -> list[list[int]]:
            return [model.prompt_ids(text, param="input") for text in body.inputs]

        prompts = await self._beside(model, encode)
        for ids in prompts:
            model.max_new_tokens(ids, 0, "input")
        requests = embeddings.requests(prompts, request.scope["namespace"])
        found: list[Generation] = []
        for start in range(0, len(requests), most):  # others get places between
            part = requests[start : start + most]
            ticket = self.worker.submit(model.generating_engine(), part)
            generations = await self._finished(request, ticket)
            if generations is None:
                return Response(status_code=499)
            found += generations

        def answer() -> Response:
            return JSONResponse(embeddings.answer(model.name, body, found))

        return await self._beside(model, answer)

    async def classify(self, request: Request) -> Response:
        body = parse(await request.body(), ClassifyBody)
        model = self.find(body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        found = await self._beside(model, model.classify, texts)
        data = [{"index": i, **prediction} for i, prediction in enumerate(found)]
        return JSONResponse({"object": "list", "model": model.name, "data": data})

    async def tokenize(self, request: Request) -> Response:
        body = parse(await request.body(), TokenizeBody)
        model = self.find(body.model)

        def answer() -> Response:
            if body.prompt is None:
                ids = model.chat_ids(
                    body.messages, (), body.continue_final_message, body.continue_token_ids
                )
            else:
                ids = model.prompt_ids(body.prompt, body.add_special_tokens)
            names = {i: model.token_name(i) for i in set(ids)}
            return JSONResponse(
                {
                    "count": len(ids),
                    "max_model_len": model.context_length,
                    "tokens": ids,
                    "token_strs": [names[i] for i in ids],
                }
            )

        return await self._beside(model, answer)

    async def detokenize(self, request: Request) -> Response:
        body = parse(await request.body(), DetokenizeBody)
        model = self.find(body.model)
        ids = model.checked_ids(body.tokens, "tokens")
        return JSONResponse({"prompt": await self._beside(model, model.tokenizer.decode, ids)})

    # The server

    async def list_models(self, request: Request) -> Response:
        data = [model.describe() for model in self.models.values()]
        return JSONResponse({"object": "list", "data": data})

    async def show_model(self, request: Request) -> Response:
        return JSONResponse(self.find(request.path_params["name"]).describe())

    async def health(self, request: Request) -> Response:
        alive = self.worker.is_alive()
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def report_metrics(self, request: Request) -> Response:
        self.metrics.show(self.worker.engines)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def describe_api(self, request: Request) -> Response:
        return JSONResponse(openapi.document())

    async def page(self, request: Request) -> Response:
        return FileResponse(PAGE_FILES / "index.html", headers={"Cache-Control": "no-cache"})

    def find(self, name: str | None) -> ServedModel:
        """The model of this name. ApiError (404) that lists the names."""
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None or name not in self.models:
            names = ", ".join(self.models)
            raise ApiError(
                404,
                f"no model {name!r} here: {names}" if name else f"model: give one of {names}",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    async def _beside(self, model: ServedModel, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in the thread of a model, beside the event loop."""
        loop, thread = asyncio.get_running_loop(), self._threads[model.name]
        return await loop.run_in_executor(thread, function, *arguments)


async def _disconnected(request: Request) -> None:
    """Return when the client has closed the connection."""
    with suppress(ClientDisconnect):
        while (await request.receive())["type"] != "http.disconnect":
            pass


def _repeated(items: Sequence[T], n: int) -> list[T]:
    return [item for item in items for _ in range(n)]


def create_app(
    models: Mapping[str, ServedModel], options: ServeOptions, keys: Sequence[str] = ()
) -> Starlette:
    """The application for these models, by name. keys: API keys, of which clients need one."""
    server = Server(models, options)
    middleware = [
        Middleware(
            Access,
            keys=keys,
            hosts=(*LOOPBACK, options.host, *options.allow_host),
            origins=options.allow_origin,
            max_body_bytes=options.max_body_bytes,
        )
    ]
    if options.allow_origin:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=options.allow_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=server.routes(),
        middleware=middleware,
        exception_handlers={
            ApiError: errors.respond,
            QueueFull: errors.busy,
            ClientDisconnect: errors.disconnected,
            404: errors.unknown,
            405: errors.unknown,
            Exception: errors.failed,
        },
        lifespan=server.lifespan,
    )
    app.state.server = server
    return app
