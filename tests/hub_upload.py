"""A hub on 127.0.0.1 that takes uploads: the routes that huggingface_hub asks for when it commits to a repository."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = hashlib.sha1(b"uploaded").hexdigest()
TOKEN = "hf_writesHere0123456789"
LARGE = (".safetensors",)
"""Stored apart, as the hub decides by .gitattributes."""


@dataclass
class Hub:
    """What stands in the only repository, and what happened."""

    endpoint: str = ""
    repositories: dict[str, bool] = field(default_factory=dict)
    """Name -> private."""
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    """Branch -> path -> content."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """SHA-256 -> content of large files."""
    messages: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)
    """Beginning of a path -> status to answer with."""
    failing_uploads: int = 0
    """How many transfers of large files still fail with 503."""


@contextmanager
def hub_upload() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            return None

        def do_GET(self) -> None:
            self.handle_request()

        def do_POST(self) -> None:
            self.handle_request()

        def do_PUT(self) -> None:
            self.handle_request()

        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0].strip("/")
            hub.log.append(f"{self.command} {path} {len(body)}")
            for prefix, status in hub.answers.items():
                if path.startswith(prefix):
                    return self.answer(status, {"error": "not this time"})
            if not path.startswith("storage/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid username or password."})
            status, value = self.route(path, body)
            return self.answer(status, value)

        def route(self, path: str, body: bytes) -> tuple[int, Any]:
            if path == "api/repos/create":
                asked = json.loads(body)
                name = (
                    f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                )
                # Versions of huggingface_hub send the one or the other.
                hub.repositories.setdefault(
                    name, asked.get("visibility") == "private" or bool(asked.get("private"))
                )
                return 200, {"url": f"{hub.endpoint}/{name}", "name": name}
            if path == "api/validate-yaml":
                return 200, {"errors": [], "warnings": []}
            if path.endswith("/info/lfs/objects/batch"):
                return 200, {
                    "transfer": "basic",
                    "objects": list(map(self.offer, json.loads(body)["objects"])),
                }
            if path.startswith("storage/"):
                return self.store(path.removeprefix("storage/"), body)
            kind, _, branch = (
                path.partition("api/models/")[2].partition("/")[2].partition("/")[2].partition("/")
            )
            if kind == "branch":
                hub.branches.setdefault(branch, dict(hub.branches["main"]))
                return 200, {}
            if branch not in hub.branches:
                return 404, {"error": "no such revision"}
            if kind == "tree":
                return 200, [
                    {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                    for name, data in hub.branches[branch].items()
                ]
            if kind == "preupload":
                return 200, {"files": [self.mode(item) for item in json.loads(body)["files"]]}
            if kind == "commit":
                return self.commit(branch, body)
            return 404, {"error": path}

        def mode(self, item: dict[str, Any]) -> dict[str, Any]:
            mode = "lfs" if item["path"].endswith(LARGE) else "regular"
            return {"path": item["path"], "uploadMode": mode, "shouldIgnore": False}

        def offer(self, item: dict[str, Any]) -> dict[str, Any]:
            """What is known already is not sent again."""
            link = {"href": f"{hub.endpoint}/storage/{item['oid']}"}
            return {**item} if item["oid"] in hub.objects else {**item, "actions": {"upload": link}}

        def store(self, digest: str, body: bytes) -> tuple[int, Any]:
            if hub.failing_uploads:
                hub.failing_uploads -= 1
                return 503, {"error": "busy"}
            assert hashlib.sha256(body).hexdigest() == digest
            hub.objects[digest] = body
            return 200, {}

        def commit(self, branch: str, body: bytes) -> tuple[int, Any]:
            files = hub.branches[branch]
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    hub.messages.append(value["summary"])
                elif entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
                elif entry["key"] == "deletedFile":
                    files.pop(value["path"], None)
            name = next(iter(hub.repositories))
            return 200, {"commitUrl": f"{hub.endpoint}/{name}/commit/{COMMIT}", "commitOid": COMMIT}

        def answer(self, status: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
