"""A stand-in for the hub's API, as much of it as an upload asks for, on the loopback device."""

import base64
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What the hub has, and what goes wrong there.

    Attributes:
      url: of its API.
      repos: by id the files of a model.
      private: which of them are.
      refused: an expression that a refused request's path matches; empty for none.
      asked: every request, as method and path.
    """

    def __init__(self) -> None:
        self.url = ""
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.refused = ""
        self.asked: list[str] = []
        self._objects: dict[str, bytes] = {}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON."""
        self.asked.append(f"{method} {path}")
        if self.refused and re.search(self.refused, path):
            return 403, {"error": "you may not do that"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/(\w+/[\w-]+)\.git/info/lfs/objects/batch", path):
            return 200, self._batch(json.loads(body))
        if match := re.fullmatch(r"/objects/(\w+)", path):
            self._objects[match[1]] = body
            return 200, {}
        match = re.fullmatch(r"/api/models/(\w+/[\w-]+)(/\w+)?(/main)?", path)
        if not match or match[1] not in self.repos:
            return 404, {"error": "no such repository"}
        repo, action = match[1], match[2]
        if action == "/preupload":
            return 200, {"files": [_mode(file) for file in json.loads(body)["files"]]}
        if action == "/commit":
            return 200, self._commit(repo, body)
        if action == "/tree":
            return 200, [_entry(name, data) for name, data in self.repos[repo].items()]
        return 200, {"id": repo, "sha": "0" * 40, "siblings": []}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.repos:
            return 409, {"error": "it is there already", "url": f"{self.url}/{repo}"}
        self.repos[repo] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(repo)
        return 200, {"url": f"{self.url}/{repo}"}

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.url}/objects/{o['oid']}"}}}
            for o in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _commit(self, repo: str, body: bytes) -> dict[str, Any]:
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self._objects[value["oid"]]
        return {"commitUrl": f"{self.url}/{repo}/commit/1", "commitOid": "1" * 40}


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    large = file["path"].endswith(".safetensors")
    return {
        "path": file["path"],
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": False,
    }


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """A hub that is empty."""
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else _chunks(self)
            status, value = found.answer(self.command, self.path.partition("?")[0], body)
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _do

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


def _chunks(handler: BaseHTTPRequestHandler) -> bytes:
    """A body of unknown length."""
    body = b""
    if "chunked" in handler.headers.get("Transfer-Encoding", ""):
        while size := int(handler.rfile.readline(), 16):
            body += handler.rfile.read(size)
            handler.rfile.readline()
        handler.rfile.readline()
    return body
