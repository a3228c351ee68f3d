"""A local server that speaks as much of the Hugging Face and ModelScope protocols as dsa.data.hubs uses, and takes what
is pushed to the first, its files in the commit and none by LFS.

    with Hub() as hub:
        hub.add("dataset", "owner/name", {"a.jsonl": b"..."})
        hub.set_environment(monkeypatch)
        open_dataset(["hf://datasets/owner/name"], ...)

Both protocols see the same repositories. Files are at .../resolve/..., which redirects to /storage/..., as hubs do.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Request:
    """A request for a file: its path in the repository, where its Range starts, the body's bytes that were sent.

    token: whether it showed a token to the storage.
    """

    name: str
    start: int
    sent: int = 0
    status: int = 0
    token: bool = False


@dataclass
class Repository:
    files: dict[str, bytes]
    commit: str
    sha256: dict[str, str]
    """What the listing tells; a test may lie here. A file that is not in it has no checksum."""


@dataclass
class Hub:
    """repositories: (kind, id) -> Repository; requests: those for files, in order; paths: all GET and HEAD paths.

    breaks: after how many bytes the next answers with a file break off; None in it: that one does not.
    tag: what the ETags of all files start with; status: name of a file or repository -> HTTP status instead of it.
    token: what readers must show, None if all may read; storage: its host; ranges: whether Range is understood;
    lengths: whether Content-Length is told; answer: what it says instead of every listing.
    """

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    breaks: list[int | None] = field(default_factory=list)
    status: dict[str, int] = field(default_factory=dict)
    tag: str = "v1"
    token: str | None = None
    storage: str = "localhost"  # another host, which must not see the token
    ranges: bool = True
    lengths: bool = True
    answer: bytes | None = None

    def __enter__(self) -> "Hub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind: str, name: str, files: dict[str, bytes], *, checksums: bool = True) -> Repository:
        commit = hashlib.sha1(repr(sorted(files)).encode()).hexdigest()
        sha256 = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()} if checksums else {}
        self.repositories[kind, name] = Repository(dict(files), commit, sha256)
        return self.repositories[kind, name]

    def set_environment(self, monkeypatch, cache) -> None:
        """Point both hubs' clients here, with `cache` as the hub's cache. huggingface_hub reads its own at import."""
        import huggingface_hub

        monkeypatch.setenv("HF_ENDPOINT", self.url)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", self.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        for name in ("MODELSCOPE_ENDPOINT", "MODELSCOPE_API_TOKEN", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        # What it would ask the real hub for, to name in its requests the program that runs it
        monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", {}, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(cache / "token"))

    def sent(self, name: str) -> int:
        """Bytes of this file that left the server."""
        return sum(request.sent for request in self.requests if request.name == name)

    def starts(self, name: str) -> list[int]:
        return [request.start for request in self.requests if request.name == name]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a reader who hangs up is no error
            super().handle_error(*args)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), {key: values[0] for key, values in parse_qs(url.query).items()}
        self.hub.paths.append(path)
        repo_path = r"/([\w.-]+/[\w.-]+)"
        if match := re.fullmatch(r"/storage/(\w+)" + repo_path + "/(.+)", path):
            return self.storage(match[1], match[2], match[3])
        if match := re.fullmatch(r"/api/v1/(model|dataset)s" + repo_path + "/repo/(tree|files)", path):
            return self.modelscope_listing(match[1], match[2], query)
        if match := re.fullmatch(r"/api/(model|dataset)s" + repo_path + "(?:/(revision|tree)/(.+?))?", path):
            return self.huggingface_listing(match[1], match[2], match[3], match[4] or "main")
        if match := re.fullmatch(r"(?:/(model|dataset)s)?" + repo_path + "/resolve/([^/]+)/(.+)", path):
            return self.resolve(match[1] or "model", match[2], match[3], match[4])
        self.refuse(404)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.refuse(401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.repositories.setdefault((asked.get("type") or "model", name), Repository({}, "0" * 40, {}))
            return self.json({"url": f"{self.hub.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/(model|dataset)s/([\w.-]+/[\w.-]+)/(preupload|commit)/main", path):
            return self.preupload(body) if match[3] == "preupload" else self.commit(match[1], match[2], body)
        self.refuse(404)

    def preupload(self, body: bytes) -> None:
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
        ]
        self.json({"files": files})

    def commit(self, kind: str, name: str, body: bytes) -> None:
        values = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
        files = {value["path"]: base64.b64decode(value["content"]) for value in values}
        commit = self.hub.add(kind, name, self.hub.repositories[kind, name].files | files, checksums=False).commit
        self.json({"commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "success": True})

    def repository(self, kind: str, name: str, revision: str) -> Repository | None:
        """None, after the answer, for a reader who may not, and for what is not there."""
        shown = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        repository = self.hub.repositories.get((kind, name))
        if status := self.hub.status.get(name):
            self.refuse(status)
        elif self.hub.token and not shown:
            self.refuse(401)
        elif repository is None:
            self.refuse(404, "RepoNotFound")
        elif revision not in ("main", "master", repository.commit):
            self.refuse(404, "RevisionNotFound")
        else:
            return repository
        return None

    def huggingface_listing(self, kind: str, name: str, what: str | None, revision: str) -> None:
        if repository := self.repository(kind, name, revision):
            if what != "tree":
                return self.json({"id": name, "sha": repository.commit, "siblings": [], "tags": []})
            self.json([self.huggingface_entry(repository, path) for path in sorted(repository.files)])

    def huggingface_entry(self, repository: Repository, path: str) -> dict:
        size = len(repository.files[path])
        entry = {"type": "file", "path": path, "size": size, "oid": hashlib.sha1(path.encode()).hexdigest()}
        if path in repository.sha256:
            entry["lfs"] = {"oid": repository.sha256[path], "size": size, "pointerSize": 130}
        return entry

    def modelscope_listing(self, kind: str, name: str, query: dict) -> None:
        repository = self.repository(kind, name, query["Revision"])
        if repository is None:
            return
        files: list[dict] = [{"Path": "folder", "Type": "tree", "Size": 0, "Sha256": ""}]
        for path, data in sorted(repository.files.items()):
            entry = {"Path": path, "Name": path.split("/")[-1], "Type": "blob", "Size": len(data)}
            files.append(entry | {"Sha256": repository.sha256.get(path, ""), "Revision": repository.commit})
        size, page = int(query.get("PageSize", 10**6)), int(query.get("PageNumber", 1))
        # The full Id is often left empty by the real one
        data = {
            "Files": files[size * (page - 1) :][:size],
            "LatestCommitter": {"Id": "", "ShortId": repository.commit[:8]},
        }
        self.json({"Code": 200, "Success": True, "Message": "success", "Data": data, "TotalCount": len(files)})

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self.repository(kind, name, revision)
        if repository is None:
            return
        if path not in repository.files:
            return self.refuse(404, "EntryNotFound")
        self.send_response(302)
        storage = self.hub.url.replace("127.0.0.1", self.hub.storage)
        self.send_header("Location", f"{storage}/storage/{kind}/{name}/{path}?signature=1")
        self.send_header("Content-Length", "0")
        self.send_header("X-Repo-Commit", repository.commit)
        if path in repository.sha256:
            self.send_header("X-Linked-Size", str(len(repository.files[path])))
            self.send_header("X-Linked-ETag", f'"{repository.sha256[path]}"')
        else:
            self.send_header("X-Linked-Size", str(len(repository.files[path])))
            self.send_header("X-Linked-ETag", f'"{self.hub.tag}-{hashlib.sha1(path.encode()).hexdigest()}"')
        self.end_headers()

    def storage(self, kind: str, name: str, path: str) -> None:
        hub, data = self.hub, self.hub.repositories[kind, name].files[path]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if hub.ranges else None
        start = int(asked[1]) if asked else 0
        end = min(len(data), int(asked[2]) + 1) if asked and asked[2] else len(data)
        request = Request(path, start, token="Authorization" in self.headers or "Cookie" in self.headers)
        if self.command == "GET":
            hub.requests.append(request)
        if status := hub.status.get(path):
            request.status = status
            return self.refuse(status)
        if self.headers.get("Authorization", f"Bearer {hub.token}") != f"Bearer {hub.token}":
            return self.refuse(400)
        if start >= len(data) and asked:
            request.status = 416
            return self.refuse(416, length=len(data))
        request.status = 206 if asked else 200
        self.send_response(request.status)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        if hub.lengths:
            self.send_header("Content-Length", str(end - start))
        else:
            self.close_connection = True
        self.send_header("ETag", f'"{hub.tag}-{hashlib.sha1(path.encode()).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.body(request, data, start, end)

    def body(self, request: Request, data: bytes, start: int, asked: int) -> None:
        most = self.hub.breaks.pop(0) if self.hub.breaks else None
        end = asked if most is None else min(asked, start + most)
        try:
            for at in range(start, end, 2**16):
                piece = data[at : min(end, at + 2**16)]
                request.sent += len(piece)  # before the reader can have it and ask
                self.wfile.write(piece)
        except OSError:
            self.close_connection = True
        if end < asked:
            self.close_connection = True

    def json(self, content) -> None:
        body = self.hub.answer or json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "", length: int | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if length is not None:
            self.send_header("Content-Range", f"bytes */{length}")
        self.send_header("Content-Length", "0")
        self.end_headers()
