"""What the hubs speak: their URIs, the files of a repository with sizes and checksums, and where each file is."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import httpx2
import huggingface_hub
from huggingface_hub import errors as hf
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers

from dsa.data.http import Broken, DiskTooSmall, File, NoPermission, NotFound, SourceError, Unreachable, Web

LISTING_ATTEMPTS = 3


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


class HuggingFace:
    """A hub that speaks Hugging Face's protocol. delay: see Web."""

    def __init__(self, delay: float):
        # Read here and not at import, as huggingface_hub's own constant is
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        mirror = "set HF_ENDPOINT to a mirror, or give another source in the profile"
        token = "set HF_TOKEN to a token that may read it, or check the name"
        self.web = Web(mirror, token, delay)
        self.web.session.headers.update(build_hf_headers())

    def files(self, repo: Repo) -> tuple[str, list[File]]:
        """The commit, and all files of the repository."""
        api = huggingface_hub.HfApi(endpoint=self.endpoint)

        def attempt():
            with self._errors(repo):
                commit = api.repo_info(repo.id, repo_type=repo.kind, revision=repo.revision, timeout=20).sha
                tree = list(api.list_repo_tree(repo.id, repo_type=repo.kind, revision=commit, recursive=True))
            files = [entry for entry in tree if isinstance(entry, RepoFile)]
            return commit, [File(f.path, f.size, f.lfs.sha256 if f.lfs else None) for f in files]

        return self.web.patiently(attempt, repo.uri, LISTING_ATTEMPTS)

    def url(self, repo: Repo, commit: str, name: str) -> str:
        return huggingface_hub.hf_hub_url(repo.id, name, repo_type=repo.kind, revision=commit, endpoint=self.endpoint)

    def snapshot(self, repo: Repo, patterns: list[str], offline: bool = False) -> Path:
        """The folder of the commit in the hub's cache. Fetches the files of these patterns, unless offline."""

        def attempt():
            with self._errors(repo):
                return huggingface_hub.snapshot_download(
                    repo.id,
                    repo_type=repo.kind,
                    revision=repo.revision,  # rather than its commit, so that the cache knows it when offline
                    allow_patterns=patterns,
                    endpoint=self.endpoint,
                    ignore_patterns=["*/*"] if repo.kind == "model" else None,
                    local_files_only=offline,
                )

        return Path(self.web.patiently(attempt, repo.uri, LISTING_ATTEMPTS))

    @contextmanager
    def _errors(self, repo: Repo) -> Iterator[None]:
        try:
            yield
        except (hf.HfHubHTTPError, hf.EntryNotFoundError, httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
            raise self._translated(repo, error) from error

    def _translated(self, repo: Repo, error: Exception) -> Exception:
        if isinstance(error, hf.LocalEntryNotFoundError):  # what happened before it looked into the cache
            error = error.__cause__ or error
        status = getattr(getattr(error, "response", None), "status_code", None)
        host = urlsplit(self.endpoint).netloc
        if isinstance(error, hf.OfflineModeIsEnabled | hf.LocalEntryNotFoundError):
            return Unreachable(f"{repo.uri}: HF_HUB_OFFLINE is set and the hub's cache does not have it: unset it")
        if status in (401, 403):
            return NoPermission(f"{repo.uri}: {host} refuses ({status}): {self.web.token}")
        if status == 404 or isinstance(error, hf.EntryNotFoundError):
            return NotFound(f"{repo.uri}: not found at {host}: check the name, the revision and the path")
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return DiskTooSmall(
                f"{repo.uri}: no room left in the hub's cache: set HF_HOME to a folder on a larger disk"
            )
        local = isinstance(error, OSError) and status is None
        if isinstance(error, hf.HFValidationError) or local or ((status or 500) < 500 and status not in (408, 429)):
            return SourceError(f"{repo.uri}: {error}")
        return Broken(f"{host} answers {status}" if status else f"no answer from {host} ({type(error).__name__})")


class ModelScope:
    """ModelScope's protocol. Environment variables as in its own library. delay: see Web."""

    PAGE = 200

    def __init__(self, delay: float):
        endpoint = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
        self.endpoint = (endpoint if "://" in endpoint else f"https://{endpoint}").rstrip("/")
        mirror = "set MODELSCOPE_ENDPOINT to a host that is reachable, or give another source in the profile"
        self.web = Web(mirror, "set MODELSCOPE_API_TOKEN to a token that may read it", delay)
        if token := os.environ.get("MODELSCOPE_API_TOKEN"):
            # Some of its interfaces want the one, some the other
            self.web.session.headers["Authorization"] = f"Bearer {token}"
            self.web.session.cookies.set("m_session_id", token, domain=urlsplit(self.endpoint).hostname, path="/")

    def files(self, repo: Repo) -> tuple[str, list[File]]:
        """The commit (short where the hub tells no more), and all files of the repository."""
        entries, page = [], 1
        while True:
            # Only datasets come in pages
            pages = {"PageNumber": page, "PageSize": self.PAGE} if repo.kind == "dataset" else {}
            data = self.web.patiently(partial(self._listing, repo, pages), repo.uri, LISTING_ATTEMPTS)
            got = data.get("Files") or []
            entries += got
            page += 1
            more = len(entries) < data["TotalCount"] if data.get("TotalCount") else len(got) == self.PAGE
            if not (pages and got and more):
                break
        latest = data.get("LatestCommitter") or {}
        commit = latest.get("Id") or latest.get("ShortId") or repo.revision
        if re.fullmatch("[0-9a-f]{40}", repo.revision):
            commit = repo.revision
        blobs = [entry for entry in entries if entry.get("Type") != "tree"]
        return commit, [File(entry["Path"], entry.get("Size"), entry.get("Sha256") or None) for entry in blobs]

    def url(self, repo: Repo, commit: str, name: str) -> str:
        # By the revision that was asked for: the commit may be short
        revision = quote(repo.revision, safe="")
        return f"{self.endpoint}/{repo.kind}s/{repo.id}/resolve/{revision}/{quote(name)}"

    def _listing(self, repo: Repo, pages: dict) -> dict:
        url = f"{self.endpoint}/api/v1/{repo.kind}s/{repo.id}/repo/{'tree' if repo.kind == 'dataset' else 'files'}"
        params = {"Revision": repo.revision, "Recursive": "True"} | pages
        try:
            answer = self.web.get(url, repo.uri, params=params).json()
        except ValueError as error:
            raise Broken(f"{urlsplit(url).netloc} answers no JSON") from error
        if answer.get("Code", 200) != 200 or answer.get("Data") is None:
            raise NotFound(f"{repo.uri}: {urlsplit(url).netloc} says: {answer.get('Message') or 'no data'}")
        return {"TotalCount": answer.get("TotalCount"), **answer["Data"]}


def hub_of(repo: Repo, delay: float) -> HuggingFace | ModelScope:
    return {"hf": HuggingFace, "modelscope": ModelScope}[repo.hub](delay)
