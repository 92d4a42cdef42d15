"""A hub on 127.0.0.1 that serves directories as repositories: the routes that huggingface_hub asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SHA = hashlib.sha1(b"the only commit").hexdigest()


@contextmanager
def hub_server(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Yield (endpoint, log of requests as ``METHOD path bytes``)."""
    log: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            return None

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            """Repository information, its file tree, or a file of it."""
            path = self.path.partition("?")[0].strip("/")
            for name, directory in repositories.items():
                if path.startswith(f"api/models/{name}"):
                    self.send_info(name, directory, tree="/tree/" in path)
                    return
                if path.startswith(f"{name}/resolve/"):
                    file = directory / path.removeprefix(f"{name}/resolve/").partition("/")[2]
                    if file.is_file():
                        self.send_file(file, body=body)
                        return
            self.send_bytes(
                404, b"{}", {"X-Error-Code": "RepoNotFound" if "api" in path else "EntryNotFound"}
            )

        def send_info(self, name: str, directory: Path, *, tree: bool) -> None:
            files = {
                str(item.relative_to(directory)): item for item in directory.rglob("*") if item.is_file()
            }
            listing = [
                {"type": "file", "path": path, "size": item.stat().st_size, "oid": SHA}
                for path, item in files.items()
            ]
            siblings = [{"rfilename": path} for path in files]
            answer = listing if tree else {"id": name, "modelId": name, "sha": SHA, "siblings": siblings}
            self.send_bytes(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def send_file(self, file: Path, *, body: bool) -> None:
            data, status, extra = (
                file.read_bytes(),
                200,
                {"ETag": f'"{hashlib.md5(file.read_bytes()).hexdigest()}"'},
            )
            wanted = self.headers.get("Range")
            if wanted:
                begin, _, end = wanted.removeprefix("bytes=").partition("-")
                total = len(data)
                data = data[int(begin) : int(end or total) + 1]
                status, extra["Content-Range"] = 206, f"bytes {begin}-{int(begin) + len(data) - 1}/{total}"
            self.send_bytes(status, data, extra, body=body)

        def send_bytes(self, status: int, data: bytes, headers: dict[str, str], *, body: bool = True) -> None:
            log.append(f"{self.command} {self.path} {len(data) if body and self.command == 'GET' else 0}")
            self.send_response(status)
            for key, value in {"X-Repo-Commit": SHA, "Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body and self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
