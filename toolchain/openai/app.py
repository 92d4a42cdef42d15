"""The routes of the endpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

from toolchain.openai.answer import Answer
from toolchain.openai.failures import ApiError, bad_field, unavailable
from toolchain.openai.fields import ChatRequest, CompletionRequest, Sampling
from toolchain.openai.health import Readiness
from toolchain.openai.inputs import model_inputs, wanted_logprobs
from toolchain.openai.metrics import Metrics, Stopwatch
from toolchain.openai.prompts import Prompt, chat_prompt, completion_prompts
from toolchain.openai.refusals import from_validation, refuse_unsupported
from toolchain.openai.settings import Bounds, ServedModel
from toolchain.openai.shapes import ChatShape, CompletionShape
from toolchain.openai.texts import Texts
from toolchain.openai.upstream import Upstream


class Endpoint:
    """The answers to each route. ``draining`` says whether the server is about to stop."""

    def __init__(
        self,
        upstream: Upstream,
        models: Mapping[str, ServedModel],
        texts: Mapping[str, Texts],
        *,
        bounds: Bounds,
        metrics: Metrics,
    ) -> None:
        self._upstream = upstream
        self._models = models
        self._texts = texts
        self._bounds = bounds
        self._metrics = metrics
        self._created = int(time.time())
        self._readiness = Readiness(upstream, models, timeout_s=bounds.probe_timeout_s)
        self._names = {alias: model for model, served in models.items() for alias in (*served.aliases, model)}
        self.draining = False

    async def chat(self, request: ChatRequest) -> Answer:
        model, stopwatch = self._accept(request)
        prompt = await chat_prompt(request, self._texts[model], self._models[model].max_seq_len)
        return self._answer(request, model, [prompt], stopwatch)

    async def completions(self, request: CompletionRequest) -> Answer:
        model, stopwatch = self._accept(request)
        prompts = await completion_prompts(request, self._texts[model], self._models[model].max_seq_len)
        return self._answer(request, model, prompts, stopwatch)

    def _accept(self, request: Sampling) -> tuple[str, Stopwatch]:
        model = self._model(request.model)
        refuse_unsupported(request)
        return model, Stopwatch(self._metrics, model)

    def _model(self, name: str) -> str:
        if name not in self._names:
            raise ApiError(
                404,
                f"The model {name!r} does not exist; served: {', '.join(self._names)}",
                param="model",
                code="model_not_found",
            )
        return self._names[name]

    def _answer(
        self, request: Sampling, model: str, prompts: Sequence[Prompt], stopwatch: Stopwatch
    ) -> Answer:
        n = request.n or 1
        if n * len(prompts) > self._bounds.max_choices:
            raise bad_field(
                "n", f"{n} answers to {len(prompts)} prompts are more than {self._bounds.max_choices}"
            )
        limit = self._models[model].max_seq_len
        generations = [
            self._upstream.open(model, model_inputs(request, prompt, index, limit))
            for prompt in prompts
            for index in range(n)
        ]
        include_usage = bool(request.stream_options and request.stream_options.include_usage)
        kind = ChatShape if isinstance(request, ChatRequest) else CompletionShape
        shape = kind(
            request.model, logprobs=wanted_logprobs(request) is not None, include_usage=include_usage
        )
        return Answer(
            self._upstream,
            generations,
            shape=shape,
            prompts=prompts,
            texts=self._texts[model],
            stopwatch=stopwatch,
            stream=bool(request.stream),
            include_usage=include_usage,
            timeout_s=self._bounds.request_timeout_s,
        )

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._described(name) for name in self._names]}

    async def model(self, name: str) -> dict[str, Any]:
        self._model(name)
        return self._described(name)

    def _described(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "toolchain",
            "max_model_len": self._models[self._names[name]].max_seq_len,
        }

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        if self.draining:
            raise unavailable("the server is shutting down")
        found = await self._readiness.check()
        models = {model: problem or "ready" for model, problem in found.items()}
        ready = not any(found.values())
        document = {"status": "ready" if ready else "not ready", "models": models}
        return JSONResponse(document, status_code=200 if ready else 503)

    async def metrics(self) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self) -> dict[str, str]:
        return {"version": version("toolchain")}


def make_app(endpoint: Endpoint) -> FastAPI:
    """The FastAPI application. Answers are made as text by ``Answer``, hence no response models."""
    app = FastAPI(title="toolchain: OpenAI-compatible endpoint", version=version("toolchain"), redoc_url=None)
    chat, completions = _bodies(endpoint)
    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", endpoint.models)
    app.add_api_route("/v1/models/{name:path}", endpoint.model)
    app.add_api_route("/health", endpoint.health)
    app.add_api_route("/health/ready", endpoint.ready, response_model=None)
    app.add_api_route("/metrics", endpoint.metrics, response_model=None)
    app.add_api_route("/version", endpoint.version)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    return app


def _bodies(endpoint: Endpoint) -> tuple[Any, Any]:
    """Functions whose one argument FastAPI takes for the body; bound methods would do as well, but show no doc."""

    async def chat(request: ChatRequest) -> Response:
        """Chat completions, whole or streamed."""
        return await endpoint.chat(request)

    async def completions(request: CompletionRequest) -> Response:
        """Completions of texts, whole or streamed."""
        return await endpoint.completions(request)

    return chat, completions


def _reply(error: ApiError) -> JSONResponse:
    return JSONResponse(error.to_json(), status_code=error.status, headers=error.headers)


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    return _reply(error if isinstance(error, ApiError) else ApiError(500, str(error), kind="server_error"))


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    return _reply(from_validation(error.errors() if isinstance(error, RequestValidationError) else []))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Routes that do not exist, methods that a route does not have, bodies that cannot be parsed."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else str(error)
    headers = dict(getattr(error, "headers", None) or {})
    known = ApiError(status, f"{request.method} {request.url.path}: {detail}")
    return JSONResponse(known.to_json(), status_code=status, headers=headers)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    """A fault of ours: the server's log has the traceback, the client gets no inside of it."""
    return _reply(ApiError(500, "internal error of the endpoint; see the server's log", kind="server_error"))
