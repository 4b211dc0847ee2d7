"""A stand-in of the hub's HTTP API on this machine: repositories are made, committed to and fetched from."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

TOKEN = "hf_writes"


class Hub:
    """Repositories by name: their files, and whether they are private."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.is_private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}  # of large files, by SHA-256
        self.url = ""
        self.is_full = False  # large files are refused

    def sha(self, name: str) -> str:
        """A commit's id: of what the repository holds."""
        return hashlib.sha1(repr(sorted(self.files[name].items())).encode()).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def _answer(self, status: int, body: bytes | dict[str, Any] = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"})
        hub = self.hub
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name.startswith("other/"):
                return self._answer(403, {"error": "Forbidden"})
            if name in hub.files:
                return self._answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
            hub.files[name], hub.is_private[name] = (
                {},
                "private" in (asked.get("visibility"), asked.get("private") and "private"),
            )
            return self._answer(200, {"url": f"{hub.url}/{name}"})
        if found := re.fullmatch(r"/api/models/(.+?)/preupload/main", self.path):
            files = json.loads(body)["files"]
            modes = [(file["path"], "lfs" if file["path"].endswith(".safetensors") else "regular") for file in files]
            told = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]
            return self._answer(200, {"files": told})
        if found := re.fullmatch(r"/(.+?)\.git/info/lfs/objects/batch", self.path):
            objects = [
                one | {"actions": {"upload": {"href": f"{hub.url}/blobs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(.+?)/commit/main", self.path):
            name = found[1]
            for line in filter(None, body.splitlines()):
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.files[name][value["path"]] = base64.b64decode(value["content"])
                if entry["key"] == "lfsFile":
                    hub.files[name][value["path"]] = hub.blobs[value["oid"]]
            told = {"commitUrl": f"{hub.url}/{name}/commit/{hub.sha(name)}", "commitOid": hub.sha(name)}
            return self._answer(200, told)
        return self._answer(404, {"error": f"no {self.path}"})

    def do_PUT(self) -> None:
        self.hub.blobs[self.path.removeprefix("/blobs/")] = self._body()
        self._answer(507 if self.hub.is_full else 200)

    def do_GET(self) -> None:
        hub = self.hub
        if found := re.fullmatch(r"/api/models/([^/]+/[^/?]+)(?:/revision/([^?]+))?(?:\?.*)?", self.path):
            name, revision = found[1], found[2] or "main"
            if name not in hub.files:
                return self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            if revision not in ("main", hub.sha(name)):
                return self._answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            siblings = [{"rfilename": file} for file in hub.files[name]]
            told = {"id": name, "sha": hub.sha(name), "private": hub.is_private[name], "siblings": siblings}
            return self._answer(200, told | {"tags": [], "downloads": 0, "likes": 0})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.*", self.path):
            files = hub.files[found[1]].items()
            told = [{"type": "file", "path": name, "size": len(content), "oid": name} for name, content in files]
            return self._answer(200, json.dumps(told).encode())
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)", self.path):
            name, file = found[1], found[3]
            content = hub.files[name][file]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self._answer(200, content, ETag=etag, X_Repo_Commit=hub.sha(name))
        return self._answer(404, {"error": f"no {self.path}"})

    do_HEAD = do_GET  # noqa: N815


@contextlib.contextmanager
def run_hub() -> Iterator[Hub]:
    """A hub that answers on a free port while the block runs."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
