"""The status endpoint of ``toolchain serve``: supervision as Prometheus metrics, health for Kubernetes, JSON for
``toolchain status``. Triton's own metrics stay where they are."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from toolchain.core.errors import UsageError
from toolchain.serve.health import Health

LOCAL = ("127.0.0.1", "::1")
ENDPOINTS = "/metrics, /health/live, /health/ready, /status"


class AdminServer:
    """Listens from ``start`` to ``stop``, in a thread of its own. ``port`` 0 chooses a free one."""

    def __init__(self, health: Health, facts: Callable[[], dict[str, Any]], *, host: str, port: int) -> None:
        """``facts``: what /status says beside the health. UsageError TC-624 for a port in use."""
        self.health = health
        self.facts = facts
        try:
            self._server = _Listener((host, port), self)
        except OSError as error:
            raise UsageError(
                f"status port {port} on {host} cannot be used: {error.strerror}",
                hint="choose another with --status-port, or 0 for any free one",
                code="TC-624",
            ) from error
        self.port = int(self._server.server_address[1])
        self._registry = _registry(health)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="status", daemon=True
        )

    def start(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, client: str) -> tuple[int, str, bytes]:
        """(HTTP status, content type, body). ``client``: its address; /status names paths, for this machine alone."""
        if path == "/metrics":
            from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

            return 200, CONTENT_TYPE_LATEST, generate_latest(self._registry)
        if path == "/status" and client not in LOCAL:
            return _json(403, {"error": "/status is for clients on the same machine"})
        if path == "/status":
            return _json(200, {**self.facts(), **self.health.snapshot()})
        if path == "/health/live":
            return _json(200, {"live": True})
        if path == "/health/ready":
            return _json(200 if self.health.ready else 503, self.health.snapshot())
        return _json(404, {"error": f"no such path; expected one of {ENDPOINTS}"})


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], admin: AdminServer) -> None:
        self.admin = admin
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    timeout = 10.0

    def do_GET(self) -> None:
        status, kind, body = self.server.admin.answer(self.path.partition("?")[0], self.client_address[0])
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every second: they are no news."""


def _json(status: int, value: dict[str, Any]) -> tuple[int, str, bytes]:
    return status, "application/json", (json.dumps(value, indent=2) + "\n").encode()


def _registry(health: Health) -> Any:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    registry.register(_HealthMetrics(health))
    return registry


PER_MODEL = {
    "toolchain_serve_model_up": ("up", "1 when the last probe of the model was answered"),
    "toolchain_serve_last_probe_timestamp_seconds": ("last_probe", "Unix time of the last sign of life"),
    "toolchain_serve_stub_probe_seconds": ("stub_seconds", "How long the stub took to answer the last probe"),
    "toolchain_serve_engine_probe_seconds": ("engine_seconds", "How long the last probe's token took"),
    "toolchain_serve_requests_running": ("running", "Requests in the batch at the last look"),
    "toolchain_serve_requests_waiting": ("waiting", "Requests in the queue at the last look"),
}


class _HealthMetrics:
    """Reads ``Health`` whenever it is asked: there is no second copy of the numbers."""

    def __init__(self, health: Health) -> None:
        self._health = health

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        models = self._health.snapshot()["models"]
        for name, (key, text) in PER_MODEL.items():
            family = GaugeMetricFamily(name, text, labels=["model"])
            for model in models:
                family.add_metric([model["name"]], float(model[key]))
            yield family
        recoveries = CounterMetricFamily(
            "toolchain_serve_recoveries",
            "Times that supervision had to bring the model back",
            labels=["model"],
        )
        for model in models:
            recoveries.add_metric([model["name"]], model["recoveries"])
        yield recoveries
        yield GaugeMetricFamily(
            "toolchain_serve_draining", "1 while running streams end", value=float(self._health.draining)
        )
        yield GaugeMetricFamily(
            "toolchain_serve_start_timestamp_seconds", "Unix time of the start", value=self._health.started
        )
