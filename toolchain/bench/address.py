"""What an address leads to: which target speaks with it, and where."""

from __future__ import annotations

import http.client
import json
import os
import socket
import urllib.parse
from dataclasses import dataclass

from toolchain.bench.targets.openai import KEY_VARIABLES
from toolchain.core.errors import ToolchainError, UsageError

TIMEOUT_S = 10.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Address:
    scheme: str
    """grpc, http or https; empty when it was not said."""
    host: str
    port: int
    path: str = ""

    @property
    def local(self) -> bool:
        """Whether the server is on this machine, so that its GPUs can be watched."""
        return self.host in LOOPBACK or self.host == socket.gethostname()

    def url(self, kind: str) -> str:
        """As the target ``kind`` wants it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        if kind == "triton-grpc":
            return f"{host}:{self.port}"
        return f"{self.scheme or 'http'}://{host}:{self.port}{self.path}"


def parse_address(text: str) -> Address:
    """``host:port``, ``grpc://host:port`` or ``http(s)://host[:port][/v1]``. UsageError TC-701 for anything else."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "", text
    try:
        parts = urllib.parse.urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urllib.parse.SplitResult("", "", "", "", "")
    if port is None and scheme in ("http", "https"):
        port = 443 if scheme == "https" else 80
    bad = (
        not host
        or port is None
        or scheme not in ("", "grpc", "http", "https")
        or parts.query
        or parts.username
    )
    if bad or host is None or port is None or (scheme in ("", "grpc") and parts.path.strip("/")):
        raise UsageError(
            f"{text!r} is not the address of a server; expected host:port, grpc://host:port or http://host:port",
            hint="Triton's gRPC port is 8001 and its HTTP port 8000 unless it was started with others",
            code="TC-701",
        )
    return Address(scheme=scheme, host=host, port=port, path=parts.path.rstrip("/"))


def find_target(address: Address, wanted: str) -> str:
    """One of triton-grpc, triton-http and openai: ``wanted`` unless it is auto.

    Over HTTP /v2 is Triton's and /v1/models OpenAI's. Without a scheme both HTTP and gRPC are possible: a server that
    answers no HTTP is taken for gRPC. ToolchainError TC-702 when an HTTP server is neither.
    """
    if wanted != "auto":
        fits = ("", "grpc") if wanted == "triton-grpc" else ("", "http", "https")
        if wanted == "inprocess" or address.scheme not in fits:
            given = f"{address.scheme}://{address.host}:{address.port}"
            raise UsageError(f"target {wanted} does not go with {given}", code="TC-701")
        return wanted
    if address.scheme == "grpc":
        return "triton-grpc"
    for path, kind in (("/v2", "triton-http"), ("/v1/models", "openai")):
        if _speaks(address, path):
            return kind
    if address.scheme == "":
        return "triton-grpc"
    raise ToolchainError(
        f"{address.url('openai')} answers neither /v2 (Triton) nor /v1/models (OpenAI)",
        hint="check the address and the API key (TOOLCHAIN_API_KEY); --target says what the server is",
        code="TC-702",
    )


def _speaks(address: Address, path: str) -> bool:
    """Whether there is a JSON document at ``path``."""
    connect = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    connection = connect(address.host, address.port, timeout=TIMEOUT_S)
    key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), "")
    prefix = address.path.removesuffix("/v1")
    try:
        connection.request("GET", prefix + path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        return response.status == 200 and isinstance(json.loads(response.read()), dict)
    except (OSError, http.client.HTTPException, ValueError):
        return False
    finally:
        connection.close()
