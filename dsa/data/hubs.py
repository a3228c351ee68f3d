"""Hugging Face's and ModelScope's hubs: the files of a repository, each read over HTTP block by block as it is needed,
and errors that say in one line what to do."""

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import httpx2
from fsspec.spec import AbstractBufferedFile
from huggingface_hub import HfApi, HfFileSystem, snapshot_download
from huggingface_hub import errors as hf
from huggingface_hub.hf_api import RepoFile

BLOCK = 2**22  # bytes that are fetched ahead of what is read
PAUSES = (1, 2, 4, 8)  # seconds before a failed request is repeated
MARGIN = 2 * 10**8  # bytes of disk left free beside what is written


class SourceError(RuntimeError):
    """Why a source cannot be used, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class Unreachable(SourceError):
    """The server does not answer, or breaks off again and again; another source may do."""


class Offline(Unreachable):
    """No server may be asked."""


@dataclass(frozen=True)
class File:
    """A file of a source: its path there, bytes, hash (None: not told)."""

    name: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Repo:
    """A hub's URI taken apart. kind: "model" or "dataset"."""

    uri: str
    hub: str
    kind: str
    id: str
    revision: str
    path: str


def parse(uri: str) -> Repo | None:
    """None for a local path. Raises SourceError for a hub's URI of another form."""
    hub, separator, rest = uri.partition("://")
    if not separator:
        return None
    match = re.fullmatch(r"(datasets/|models/)?([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/(.*))?", rest)
    if hub not in ("hf", "modelscope") or match is None or match[2].startswith(("datasets/", "models/", "spaces/")):
        raise SourceError(f"{uri}: not of the form hf:// or modelscope:// [datasets/]OWNER/NAME[@REVISION][/PATH]")
    revision = unquote(match[3] or {"hf": "main", "modelscope": "master"}[hub])
    kind = "dataset" if match[1] == "datasets/" else "model"
    return Repo(uri, hub, kind, match[2], revision, (match[4] or "").strip("/"))


@contextmanager
def room(
    folder: Path, need: int, what: str, advice: str = "free some, or set up the project on a larger disk"
) -> Iterator[None]:
    """Make the folder, for writing about `need` bytes in it. Raises SourceError, before or when they do not fit."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < need + MARGIN:
        needed = f"{(need + MARGIN) / 1e9:.2f} GB are needed in {folder} and {free / 1e9:.2f} GB are free"
        raise SourceError(f"{what}: {needed}: {advice}")
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SourceError(f"{what}: no room left in {folder}: {advice}") from error


class Hub:
    """What both hubs have. A subclass has `files`, a repository's commit and files, and `open`, one of them.

    endpoint: its URL; mirror, token: what to set when it is unreachable or refuses; fetched_bytes: of files, so far;
    pauses: seconds before a failed request for a part of a file is repeated.
    """

    endpoint: str
    mirror: str
    token: str
    pauses = PAUSES
    fetched_bytes = 0

    def read(self, repo: Repo, commit: str, file: File) -> AbstractBufferedFile:
        """A file, of which the blocks are fetched that are read. It raises SourceError."""
        what = f"{repo.uri}: {file.name}"
        raw = self.patiently(what, partial(self.open, repo, commit, file))
        fetch = raw.cache.fetcher

        def checked(start: int, end: int) -> bytes:
            piece = self.patiently(what, partial(fetch, start, end), self.pauses)
            if len(piece) != end - start:
                sent = f"the server sends {len(piece)} bytes for {end - start}"
                raise SourceError(f"{what}: {sent}: the file is not as listed, or no parts of files are served")
            self.fetched_bytes += len(piece)
            return piece

        raw.cache.fetcher = checked
        return raw

    def patiently(self, what: str, call: Callable, pauses: tuple[int, ...] = PAUSES):
        """The result of `call`, repeated while the server cannot be reached. Raises SourceError."""
        for pause in (*pauses, None):
            try:
                return call()
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, RuntimeError) as error:
                failure = self.explain(what, error)
                if pause is None or type(failure) is not Unreachable:
                    raise failure from error
                wait = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
            time.sleep(max(pause, min(int(wait), 300) if wait.isdigit() else 0))

    def explain(self, what: str, error: Exception) -> SourceError:
        if isinstance(error, hf.LocalEntryNotFoundError):  # what happened before it looked into the cache
            error = error.__cause__ or error
        if isinstance(error, SourceError):
            return error
        response = getattr(error, "response", None)
        status, host = getattr(response, "status_code", None), urlsplit(self.endpoint).netloc
        if isinstance(error, hf.OfflineModeIsEnabled | hf.LocalEntryNotFoundError):
            return Offline(f"{what}: HF_HUB_OFFLINE is set and the hub's cache does not have it: unset it")
        if status in (401, 403):
            return SourceError(f"{what}: {host} refuses ({status}): {self.token}")
        if status in (404, 410):
            return SourceError(f"{what}: not found at {host}: check the name, the revision and the path")
        if status in (408, 425, 429) or (status or 0) >= 500:
            return Unreachable(f"{what}: {response.url.host} answers {status}: {self.mirror}")
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return SourceError(f"{what}: no room left in the hub's cache: set HF_HOME to a folder on a larger disk")
        if status or isinstance(error, hf.HFValidationError | httpx2.InvalidURL | OSError):
            return SourceError(f"{what}: {error}")
        return Unreachable(f"{what}: no answer from {host} ({type(error).__name__}): {self.mirror}")


class HuggingFace(Hub):
    """A hub that speaks Hugging Face's protocol, through its own library."""

    mirror = "set HF_ENDPOINT to a mirror, or give another source in the profile"
    token = "set HF_TOKEN to a token that may read it, or check the name"
    pauses = ()  # its library has its own

    def __init__(self):
        # Read here and not at import, as huggingface_hub's own constant is
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    def files(self, repo: Repo) -> tuple[str, list[File]]:
        api = HfApi(endpoint=self.endpoint)

        def listing():
            commit = api.repo_info(repo.id, repo_type=repo.kind, revision=repo.revision, timeout=20).sha
            return commit, list(api.list_repo_tree(repo.id, repo_type=repo.kind, revision=commit, recursive=True))

        commit, tree = self.patiently(repo.uri, listing)
        files = [entry for entry in tree if isinstance(entry, RepoFile)]
        return commit, [File(f.path, f.size, f.lfs.sha256 if f.lfs else None) for f in files]

    def open(self, repo: Repo, commit: str, file: File) -> AbstractBufferedFile:
        path = f"{'datasets/' if repo.kind == 'dataset' else ''}{repo.id}@{commit}/{file.name}"
        hub = HfFileSystem(endpoint=self.endpoint, skip_instance_cache=True)
        return hub.open(path, "rb", size=file.size, block_size=BLOCK)

    def snapshot(self, repo: Repo, patterns: list[str], offline: bool = False) -> Path:
        """The folder of the commit in the hub's cache. Fetches the files of these patterns, unless offline."""

        def call():
            return snapshot_download(
                repo.id,
                repo_type=repo.kind,
                revision=repo.revision,  # rather than its commit, so that the cache knows it when offline
                allow_patterns=patterns,
                endpoint=self.endpoint,
                ignore_patterns=["*/*"] if repo.kind == "model" else None,
                local_files_only=offline,
            )

        return Path(self.patiently(repo.uri, call))


class ModelScope(Hub):
    """ModelScope's protocol. Environment variables as in its own library, which is a large one for two URLs."""

    PAGE = 200
    mirror = "set MODELSCOPE_ENDPOINT to a host that is reachable, or give another source in the profile"
    token = "set MODELSCOPE_API_TOKEN to a token that may read it"

    def __init__(self):
        endpoint = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
        self.endpoint = (endpoint if "://" in endpoint else f"https://{endpoint}").rstrip("/")
        # Ranges and sizes are of the published bytes
        headers, cookies = {"Accept-Encoding": "identity"}, httpx2.Cookies()
        if token := os.environ.get("MODELSCOPE_API_TOKEN"):
            # Some of its interfaces want the one, some the other
            headers["Authorization"] = f"Bearer {token}"
            cookies.set("m_session_id", token, domain=urlsplit(self.endpoint).hostname)
        timeout = httpx2.Timeout(60, connect=20)
        self.web = httpx2.Client(headers=headers, cookies=cookies, timeout=timeout, follow_redirects=True)

    def files(self, repo: Repo) -> tuple[str, list[File]]:
        try:
            return self._files(repo)
        except (AttributeError, LookupError, TypeError) as error:
            raise SourceError(f"{repo.uri}: {self.endpoint} lists files in an unknown form ({error!r})") from error

    def open(self, repo: Repo, commit: str, file: File) -> AbstractBufferedFile:
        # By the revision that was asked for: the commit may be short
        revision = quote(repo.revision, safe="")
        url = f"{self.endpoint}/{repo.kind}s/{repo.id}/resolve/{revision}/{quote(file.name)}"
        return WebFile(self.web, url, size=file.size, block_size=BLOCK)

    def _files(self, repo: Repo) -> tuple[str, list[File]]:
        entries, page = [], 1
        while True:
            # Only datasets come in pages
            pages = {"PageNumber": page, "PageSize": self.PAGE} if repo.kind == "dataset" else {}
            data, total = self.patiently(repo.uri, partial(self._listing, repo, pages))
            got = data.get("Files") or []
            entries += got
            page += 1
            more = len(entries) < total if total else len(got) == self.PAGE
            if not (pages and got and more):
                break
        latest = data.get("LatestCommitter") or {}
        commit = latest.get("Id") or latest.get("ShortId") or repo.revision  # short where the hub tells no more
        if re.fullmatch("[0-9a-f]{40}", repo.revision):
            commit = repo.revision
        blobs = [entry for entry in entries if entry.get("Type") != "tree"]
        return commit, [File(entry["Path"], int(entry["Size"]), entry.get("Sha256") or None) for entry in blobs]

    def _listing(self, repo: Repo, pages: dict) -> tuple[dict, int | None]:
        url = f"{self.endpoint}/api/v1/{repo.kind}s/{repo.id}/repo/{'tree' if repo.kind == 'dataset' else 'files'}"
        params = {"Revision": repo.revision, "Recursive": "True"} | pages
        answer = self.web.get(url, params=params).raise_for_status().json()
        if answer.get("Code", 200) != 200 or answer.get("Data") is None:
            raise SourceError(f"{repo.uri}: {urlsplit(url).netloc} says: {answer.get('Message') or 'no data'}")
        return answer["Data"], answer.get("TotalCount", answer["Data"].get("TotalCount"))


class WebFile(AbstractBufferedFile):
    """A file at a URL behind fsspec's block cache. fs: the client."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        with self.fs.stream("GET", self.path, headers={"Range": f"bytes={start}-{end - 1}"}) as response:
            response.raise_for_status()
            total = response.headers.get("Content-Range", f"/{self.size}").rpartition("/")[2]
            if total != str(self.size):
                raise OSError(f"the server has {total} bytes, the hub lists {self.size}")
            if response.status_code != 206 and (start, end) != (0, self.size):
                raise OSError(f"{response.url.host} does not serve parts of files")
            return response.read()
