"""A hub on this machine: the few endpoints that its client asks for, over HTTP, so that the client's own code is what is tested."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_of_the_test"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((len(self.commits), sorted(self.files))).encode()).hexdigest()


@dataclass
class Hub:
    """Its repositories by name, and every request it saw: (method, path)."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    seen: list[tuple[str, str]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.seen.append((self.command, path))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*found.groups())
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if self._may_read(found[1]):
                repository = self.hub.repositories[found[1]]
                siblings = [{"rfilename": name} for name in repository.files]
                self._say(
                    200,
                    {
                        "id": found[1],
                        "sha": repository.sha,
                        "private": repository.private,
                        "siblings": siblings,
                    },
                )
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", path):
            if self._may_read(found[1]):
                files = self.hub.repositories[found[1]].files
                inside = {name: data for name, data in files.items() if name.startswith(found[3] or "")}
                rows = [
                    {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                    for name, data in inside.items()
                ]
                self._say(200, rows) if rows else self._say(
                    404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound"}
                )
        else:
            self._say(404, {"error": f"nothing at {path}"})

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.seen.append((self.command, path))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---\n")[1]
            self._say(200, {"errors": [] if "tags:" in front else [{"message": "no tags"}], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._say(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.hub.repositories:
                self._say(
                    409, {"error": "You already created this model repo", "url": f"{self.hub.address}/{name}"}
                )
            elif name.startswith("someone-else/"):
                self._say(403, {"error": "You don't have the rights to create a model under this namespace"})
            else:
                self.hub.repositories[name] = Repository(
                    asked.get("private") or asked.get("visibility") == "private"
                )
                self._say(200, {"url": f"{self.hub.address}/{name}"})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]
            self._say(200, {"files": files})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            repository = self.hub.repositories[found[1]]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    repository.commits.append(line["value"]["summary"])
                else:
                    repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._say(
                200,
                {
                    "commitUrl": f"{self.hub.address}/{found[1]}/commit/{repository.sha}",
                    "commitOid": repository.sha,
                    "hookOutput": "",
                },
            )
        else:
            self._say(404, {"error": f"nothing at {path}"})

    def _may_read(self, name: str) -> bool:
        repository = self.hub.repositories.get(name)
        if repository and (not repository.private or self.headers.get("Authorization") == f"Bearer {TOKEN}"):
            return True
        self._say(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return False

    def _file(self, name: str, revision: str, path: str) -> None:
        if not self._may_read(name):
            return
        repository = self.hub.repositories[name]
        if revision not in ("main", repository.sha):
            self._say(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        elif path not in repository.files:
            self._say(
                404,
                {"error": "no such entry"},
                {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.sha},
            )
        else:
            data = repository.files[path]
            self._send(200, data, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": repository.sha})

    def _say(self, code: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send(
            code, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        )

    def _send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that is there inside the context."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
