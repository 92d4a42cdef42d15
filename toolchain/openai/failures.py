"""Failures in the shape of OpenAI's API, and what the model's messages become in it."""

from __future__ import annotations

import re
from typing import Any

RETRY_S = 1
"""Retry-After of a full queue: a row is free again within moments."""
RESTART_S = 3
"""Retry-After while the engine is away: `toolchain serve` reloads a dead model in a few seconds."""

CLIENT_LEFT = 499
"""The status in metrics of a request whose client has gone; nobody receives it."""


class ApiError(Exception):
    """One failure as clients of OpenAI's API read it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """``kind``: the ``type`` of the error object. ``param``: the field of the request that is at fault."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def to_json(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


def bad_field(param: str, message: str, *, code: str | None = None) -> ApiError:
    """400 for one field of the request."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def too_long(
    tokens: int | str, limit: int, *, wanted: int | None = None, param: str = "messages"
) -> ApiError:
    """400 ``context_length_exceeded``. ``wanted``: tokens asked for beside the ``tokens`` of the prompt."""
    asked = f"the prompt has {tokens} tokens"
    if wanted is not None:
        asked += f" and {wanted} more were asked for"
    return ApiError(
        400,
        f"This model's maximum context length is {limit} tokens, prompt and answer together; {asked}. Shorten the "
        "prompt or lower max_tokens.",
        param=param,
        code="context_length_exceeded",
    )


def unavailable(message: str, *, retry_after_s: int = RESTART_S) -> ApiError:
    """503: the same request may succeed later."""
    return ApiError(503, message, kind="server_error", code="unavailable", retry_after_s=retry_after_s)


def timed_out(message: str) -> ApiError:
    """504: the model did not answer in time; the request was cancelled."""
    return ApiError(504, message, kind="server_error", code="timeout")


def busy(message: str) -> ApiError:
    """429: the queue is full."""
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", retry_after_s=RETRY_S)


_PATTERNS: tuple[tuple[str, str], ...] = (
    (r"TC-505|TC-512|queue is full|maximum queue size|[Rr]equest timeout expired", "busy"),
    (r"TC-513", "late"),
    (r"TC-506|TC-514|is being restarted|engine process is gone|given up after", "away"),
    (r"max_seq_len|maximum context length|should not exceed max_num_tokens", "too_long"),
    (r"TC-501|TC-503|TC-511|TC-515|not supported|unexpected inference input", "bad"),
    (r"[Ss]tub process|not healthy|unloaded|unknown model|is not ready|no available versions", "away"),
    (r"[Ff]ailed to connect|[Ss]ocket closed|[Cc]onnection re(set|fused)", "away"),
    (r"request was cancelled|[Rr]equest cancelled", "cancelled"),
)
"""What the messages of our models and of tritonserver's core contain -> what they mean. By text, because a gRPC stream
of tritonserver carries no status beside the message, and 2.51 crashes where a client asks for one
(``triton_grpc_error``) and the model refuses the request."""


def from_model(message: str, *, param: str | None = None) -> ApiError:
    """The ApiError of an error that the model, or tritonserver for it, answered."""
    meaning = next((meaning for pattern, meaning in _PATTERNS if re.search(pattern, message)), "")
    if meaning == "busy":
        return busy(message)
    if meaning == "late":
        return timed_out(message)
    if meaning == "too_long":
        return ApiError(400, message, param=param, code="context_length_exceeded")
    if meaning == "bad":
        return ApiError(400, message, param=param)
    if meaning == "away":
        return unavailable(message)
    if meaning == "cancelled":
        return unavailable(f"{message} by the server", retry_after_s=RETRY_S)
    return ApiError(500, message, kind="server_error")
