"""A local server that speaks the part of the hub's protocol that downloads use, and fails when told to."""

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0" * 20


class HubServer:
    """Serves one dataset repository. Use as a context manager; .endpoint goes into HF_ENDPOINT.

    cut: name -> how many bytes of each coming answer are sent before the connection closes, one number an answer.
    statuses: name -> statuses of the coming GETs of this file, before it is served.
    swapped: name -> content that is sent instead of what the hash was taken of.
    """

    def __init__(self, repo: str, files: dict[str, bytes]):
        self.repo, self.files = repo, files
        self.cut: dict[str, list[int]] = {}
        self.statuses: dict[str, list[int]] = {}
        self.swapped: dict[str, bytes] = {}
        self.gets: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.tokens: set[str] = set()
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def describe(self, name: str) -> dict:
        content = self.files[name]
        sha256 = hashlib.sha256(content).hexdigest()
        lfs = {"oid": sha256, "size": len(content), "pointerSize": 134}
        return {"type": "file", "path": name, "size": len(content), "oid": "0" * 40, "lfs": lfs}

    def list_folder(self, prefix: str) -> list[dict]:
        inside = {name.removeprefix(prefix).partition("/")[0] for name in self.files if name.startswith(prefix)}
        folder = {"type": "directory", "oid": "0" * 40, "size": 0}
        paths = sorted(prefix + name for name in inside)
        return [self.describe(path) if path in self.files else folder | {"path": path} for path in paths]


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.route(send_body=True)

    def do_HEAD(self) -> None:
        self.route(send_body=False)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        if f"/api/datasets/{self.hub.repo}/paths-info/" not in self.path:
            return self.answer(404, {"error": "no such page"})
        try:
            paths = json.loads(body)["paths"]
        except ValueError:  # a form
            paths = [unquote(part.partition("=")[2]) for part in body.split("&") if part.startswith("paths=")]
        self.answer(200, [self.hub.describe(path) for path in paths if path in self.hub.files])

    def route(self, send_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        revisions = f"/api/datasets/{self.hub.repo}/revision/"
        resolve = f"/datasets/{self.hub.repo}/resolve/"
        if path == f"/api/datasets/{self.hub.repo}" or path.startswith(revisions):
            siblings = [{"rfilename": name} for name in self.hub.files]
            return self.answer(200, {"id": self.hub.repo, "sha": COMMIT, "siblings": siblings, "tags": []})
        tree = f"/api/datasets/{self.hub.repo}/tree/"
        if path.startswith(tree):
            folder = path.removeprefix(tree).partition("/")[2]
            return self.answer(200, self.hub.list_folder(f"{folder}/" if folder else ""))
        if path.startswith(resolve):
            name = path.removeprefix(resolve).partition("/")[2]
            if name in self.hub.files:
                return self.send_file(name, path.removeprefix(resolve).partition("/")[0], send_body)
        self.answer(404, {"error": f"no such page: {path}"}, {"X-Error-Code": "EntryNotFound"})

    def send_file(self, name: str, revision: str, send_body: bool) -> None:
        hub, sha256 = self.hub, hashlib.sha256(self.hub.files[name]).hexdigest()
        content = hub.swapped.get(name, hub.files[name]) if send_body else hub.files[name]
        begin, cut = 0, None
        if send_body:
            with hub.lock:
                hub.gets[name] += 1
                if hub.statuses.get(name):
                    headers = {"Retry-After": "1"} if hub.statuses[name][0] == 429 else {}
                    return self.answer(hub.statuses[name].pop(0), {"error": "not now"}, headers)
                if asked := self.headers.get("Range"):
                    hub.ranges.append(asked)
                    begin = int(asked.removeprefix("bytes=").partition("-")[0])
                cut = hub.cut[name].pop(0) if hub.cut.get(name) else None
        self.send_response(206 if begin else 200)
        commit = revision if len(revision) == 40 else COMMIT
        for key, value in {
            "X-Repo-Commit": commit,
            "ETag": f'"{sha256}"',
            "X-Linked-ETag": f'"{sha256}"',
            "X-Linked-Size": str(len(hub.files[name])),
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(content) - begin),
            "Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}",
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if send_body:
            self.wfile.write(content[begin : begin + cut] if cut is not None else content[begin:])
            if cut is not None:
                self.close_connection = True

    def answer(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
