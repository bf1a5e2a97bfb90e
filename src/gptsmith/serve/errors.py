"""Errors of the API, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response


class ApiError(Exception):
    """An error response: HTTP status, message, and the field of the request that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else _INVALID)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


_INVALID = "invalid_request_error"
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def as_api_error(error: Exception) -> ApiError:
    """The response to an error that ended a request."""
    if isinstance(error, ApiError):
        return error
    return ApiError(400, str(error)) if isinstance(error, ValueError) else _failure(error)


def _failure(error: Exception) -> ApiError:
    return ApiError(500, f"{type(error).__name__}: {error}")


async def respond(request: Request, error: Exception) -> JSONResponse:
    """Starlette's handler of ApiError."""
    assert isinstance(error, ApiError)
    return error.response


async def busy(request: Request, error: Exception) -> JSONResponse:
    """Starlette's handler of QueueFull."""
    message = f"busy: {error}; try again"
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"}).response


async def disconnected(request: Request, error: Exception) -> Response:
    """Starlette's handler of a client that disconnected before its request was complete. Nobody
    reads the response."""
    return Response(status_code=499)


async def failed(request: Request, error: Exception) -> JSONResponse:
    """Starlette's handler of all other exceptions; the server's log has the traceback."""
    return _failure(error).response


async def unknown(request: Request, error: Exception) -> JSONResponse:
    """Starlette's handler of unknown paths (404) and methods (405)."""
    status = getattr(error, "status_code", 404)
    headers = getattr(error, "headers", None)
    message = f"{request.method} {request.url.path} is not served; see /openapi.json"
    return ApiError(status, message, headers=headers).response
