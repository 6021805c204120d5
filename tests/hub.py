"""A hub of one model, or of one data set, on the loopback interface, which remembers what it was asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(NamedTuple):
    endpoint: str  # for $HF_ENDPOINT
    asked: list[str]  # paths of all requests, in order

    @property
    def files(self) -> set[str]:
        """Names of the files that were asked for."""
        return {path.rpartition("/resolve/")[2].partition("/")[2] for path in self.asked if "/resolve/" in path}


@contextmanager
def serving(name: str, folder: Path, kind: str = "models") -> Iterator[Hub]:
    """Serve the files of a folder as the model, or the data set, of that name, for the length of a `with`."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(name, folder, kind, asked))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_port}", asked)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(name: str, folder: Path, kind: str, asked: list[str]) -> type[BaseHTTPRequestHandler]:
    api = f"/api/{kind}/{name}"
    files = f"/{name}/" if kind == "models" else f"/{kind}/{name}/"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            path, _, query = self.path.partition("?")
            if path.startswith(f"{api}/tree/"):
                under = folder / path.removeprefix(f"{api}/tree/").partition("/")[2]
                found = under.rglob("*") if "recursive=true" in query.lower() else under.glob("*")
                self._answer(json.dumps([_entry(file, folder) for file in sorted(found)]).encode())
            elif path == api or path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": _entry(file, folder)["path"]} for file in sorted(folder.rglob("*"))]
                self._answer(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
            elif path.startswith(f"{files}resolve/") and (folder / _resolved(path)).is_file():
                self._answer((folder / _resolved(path)).read_bytes())
            else:
                self._answer(b"", status=404, code="EntryNotFound" if path.startswith(files) else "RepoNotFound")

        def do_POST(self) -> None:
            asked.append(self.path)
            body = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
            found = [folder / path for path in body.get("paths", []) if (folder / path).exists()]
            self._answer(json.dumps([_entry(file, folder) for file in found]).encode())

        do_HEAD = do_GET

        def _answer(self, body: bytes, status: int = 200, code: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if code is not None:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """Nothing on stderr."""

    return Handler


def _resolved(path: str) -> str:
    """The file that a path names after /resolve/REVISION/."""
    return unquote(path.partition("/resolve/")[2].partition("/")[2])


def _entry(file: Path, folder: Path) -> dict[str, Any]:
    path = file.relative_to(folder).as_posix()
    if file.is_dir():
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}
    content = file.read_bytes()
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
