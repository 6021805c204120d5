"""A hub of one model on the loopback interface, which remembers what it was asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(NamedTuple):
    endpoint: str  # for $HF_ENDPOINT
    asked: list[str]  # paths of all requests, in order

    @property
    def files(self) -> set[str]:
        """Names of the files that were asked for."""
        return {path.rpartition("/resolve/")[2].partition("/")[2] for path in self.asked if "/resolve/" in path}


@contextmanager
def serving(name: str, folder: Path) -> Iterator[Hub]:
    """Serve the files of a folder as the model of that name, for the length of a `with`."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(name, folder, asked))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_port}", asked)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(name: str, folder: Path, asked: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{name}/tree/"):
                self._answer(json.dumps([_entry(file) for file in sorted(folder.iterdir())]).encode())
            elif path == f"/api/models/{name}" or path.startswith(f"/api/models/{name}/revision/"):
                files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                self._answer(json.dumps({"id": name, "sha": COMMIT, "siblings": files}).encode())
            elif path.startswith(f"/{name}/resolve/") and (folder / path.rpartition("/")[2]).is_file():
                self._answer((folder / path.rpartition("/")[2]).read_bytes())
            else:
                code = "EntryNotFound" if path.startswith(f"/{name}/") else "RepoNotFound"
                self._answer(b"", status=404, code=code)

        do_HEAD = do_GET

        def _answer(self, body: bytes, status: int = 200, code: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if code is not None:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """Nothing on stderr."""

    return Handler


def _entry(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"type": "file", "path": file.name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
