"""A stand-in for the Hugging Face hub on this machine: as much of its interface as uploading and downloading need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


class Hub:
    """Repositories by name: the files of each commit, newest last."""

    def __init__(self) -> None:
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.is_broken = False

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes] | None:
        commits = self.commits[repo_id]
        if revision == "main":
            return commits[-1]
        numbers = [n for n in range(len(commits)) if self.sha(repo_id, n) == revision]
        return commits[numbers[0]] if numbers else None

    def sha(self, repo_id: str, number: int = -1) -> str:
        return hashlib.sha1(f"{repo_id} {number % len(self.commits[repo_id])}".encode()).hexdigest()


@contextmanager
def running() -> Iterator[tuple[Hub, str]]:
    """A hub that serves, and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _fail(self, status: int, code: str) -> None:
        self._answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.is_broken:
            return self._fail(500, "InternalError")
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        if found:
            repo_id, kind, revision = found.group(1), found.group(2), found.group(3) or "main"
        else:
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/+(.+)", path)
            assert found, path
            repo_id, revision, kind = found.group(1), found.group(2), "file"
        if repo_id not in self.hub.commits:
            return self._fail(404, "RepoNotFound")
        files = self.hub.files(repo_id, revision)
        if files is None:
            return self._fail(404, "RevisionNotFound")
        commit = self.hub.sha(repo_id) if revision == "main" else revision
        if kind == "file":
            return self._send_file(files, found.group(3), commit)
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        if kind == "tree":
            return self._answer(entries)
        siblings = [{"rfilename": entry["path"]} for entry in entries]
        self._answer({"id": repo_id, "sha": commit, "siblings": siblings, "private": False})

    def _send_file(self, files: dict[str, bytes], name: str, commit: str) -> None:
        if name not in files:
            return self._fail(404, "EntryNotFound")
        digest = hashlib.sha1(files[name]).hexdigest()
        self._answer(files[name], ETag=f'"{digest}"', X_Repo_Commit=commit, Accept_Ranges="bytes")

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.hub.is_broken or not self.headers.get("Authorization"):
            return self._fail(500 if self.hub.is_broken else 401, "Refused")
        host = f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if repo_id in self.hub.commits:
                return self._answer({"url": f"{host}/{repo_id}"}, 409)
            self.hub.commits[repo_id] = [{}]
            return self._answer({"url": f"{host}/{repo_id}"})
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])  # fails where the card's head is none
            return self._answer({"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        assert found, path
        repo_id, kind = found.groups()
        if kind == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._answer(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        files = dict(self.hub.commits[repo_id][-1])
        for line in body.splitlines():
            part = json.loads(line)
            if part["key"] == "file":
                files[part["value"]["path"]] = base64.b64decode(part["value"]["content"])
        self.hub.commits[repo_id].append(files)
        sha = self.hub.sha(repo_id)
        self._answer({"success": True, "commitUrl": f"{host}/{repo_id}/commit/{sha}", "commitOid": sha})
