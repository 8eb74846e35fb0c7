"""A package index and a Hub with one repository, to read and to write, on 127.0.0.1."""

import hashlib
import json
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPO = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server:
    """Serves paths from memory, as a package index and as a Hub; counts and spoils requests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}  # of the index, by name
        self.repo: dict[str, bytes] = {}  # of the Hub's one repository, by path
        self.cut: set[str] = set()  # send half of these, once, then hang up
        self.stall: set[str] = set()  # send half of these, then wait
        self.stalled = threading.Event()
        self.released = threading.Event()
        self.requests: list[tuple[str, str]] = []
        self.created: list[dict[str, Any]] = []  # what was asked for at each creation
        self.token = "hf_right"  # that may write
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.requests.append((self.command, self.path))
                server.answer(self)

            def do_POST(self) -> None:
                server.requests.append((self.command, self.path))
                server.receive(self, self.rfile.read(int(self.headers["Content-Length"] or 0)))

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, *args: Any) -> None:
                pass

        class QuietServer(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:
                pass  # clients of these tests are killed

        self.http = QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def count(self, end: str) -> int:
        return sum(path.endswith(end) for method, path in self.requests if method == "GET")

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.split("?")[0]
        if path == "/simple/tiny-model/":
            links = "".join(f'<a href="/files/{name}">{name}</a>' for name in self.files)
            self.send(request, links.encode(), "text/html")
        elif path.startswith("/files/"):
            self.send(request, self.files[path.removeprefix("/files/")])
        elif path.startswith("/api/models/closed/"):
            self.refuse(request, 403, "GatedRepo")
        elif path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
            siblings = [{"rfilename": name} for name in self.repo]
            info = {"id": REPO, "sha": COMMIT, "siblings": siblings}
            self.send(request, json.dumps(info).encode(), "application/json")
        elif path.startswith(f"/api/models/{REPO}/revision/"):
            self.refuse(request, 404, "RevisionNotFound")
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
                for name, data in self.repo.items()
            ]
            self.send(request, json.dumps(tree).encode(), "application/json")
        elif path.startswith(f"/{REPO}/resolve/"):
            self.send(request, self.repo[path.split("/", 5)[5]])
        else:
            self.refuse(request, 404, "RepoNotFound")

    def receive(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        """Makes a repository, and takes a commit, if the token may write."""
        path = request.path.split("?")[0]
        if request.headers["Authorization"] != f"Bearer {self.token}":
            return self.refuse(request, 401, "", b"{}")
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            name = f"{self.created[-1]['organization']}/{self.created[-1]['name']}"
            if name != REPO:
                return self.refuse(request, 403, "", b"{}")
            answer: dict[str, Any] = {"url": f"{self.url}/{name}"}
        elif path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif path == f"/api/models/{REPO}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": name, **mode} for name in names]}
        elif path == f"/api/models/{REPO}/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repo[line["value"]["path"]] = b64decode(line["value"]["content"])
            url = f"{self.url}/{REPO}/commit/{COMMIT}"
            answer = {"commitUrl": url, "commitOid": COMMIT, "success": True}
        else:
            return self.refuse(request, 404, "RepoNotFound")
        self.send(request, json.dumps(answer).encode(), "application/json")

    def refuse(
        self, request: BaseHTTPRequestHandler, status: int, code: str, body: bytes = b""
    ) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def send(self, request: BaseHTTPRequestHandler, data: bytes, kind: str = "a/b") -> None:
        start = 0
        if request.headers["Range"]:
            start = int(request.headers["Range"].removeprefix("bytes=").rstrip("-"))
        body = data[start:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("ETag", f'"{etag(data)}"')
        request.send_header("X-Repo-Commit", COMMIT)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        name = request.path.split("/")[-1]
        if request.command == "HEAD":
            return
        if name in self.stall:
            request.wfile.write(body[: len(body) // 2])
            body = body[len(body) // 2 :]
            self.stalled.set()
            self.released.wait(60)
        if name in self.cut:
            self.cut.remove(name)
            request.wfile.write(body[: len(body) // 2])
            request.close_connection = True
            return
        request.wfile.write(body)


def etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
