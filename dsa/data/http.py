"""Files on a web server, read like local ones, and errors that say in one line what to do.

A RemoteFile writes the published bytes that it fetches to a spool file, and reads from there. It asks the server only
for what is missing (HTTP Range), when it is needed: a broken connection goes on where it broke, and so does the next
process after a killed one.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3

ATTEMPTS = 5  # in a row without a new byte
PIECE = 2**20  # bytes; what is fetched and not read is at most this, beside the buffers of the connection
TIMEOUT = (20, 60)  # seconds: to connect, between two packets
STREAM_ROOM = 2 * 10**9  # bytes of disk that a file read from its head may take; nobody knows how much it will be
MARGIN = 2 * 10**8  # bytes of disk left free beside a file that is fetched whole


class SourceError(RuntimeError):
    """Why a source cannot be used, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class Unreachable(SourceError):
    """The server does not answer, or breaks off again and again; another source may do."""


class NotFound(SourceError):
    """There is no such repository, revision or file."""


class NoPermission(SourceError):
    """The server or the file system refuses."""


class WrongChecksum(SourceError):
    """The bytes are not those that the hub lists."""


class DiskTooSmall(SourceError):
    """The spool's file system has no room."""


class Broken(Exception):
    """A request that may succeed when it is repeated. wait: seconds that the server asked for."""

    def __init__(self, reason: str, wait: float = 0):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class File:
    """A file of a source: its path there, bytes (None: not told), hash (None: not told)."""

    name: str
    size: int | None
    sha256: str | None = None


class Session(requests.Session):
    """One that shows its own token. requests would show what ~/.netrc has for the host, after a redirect too."""

    def prepare_request(self, request: requests.Request) -> requests.PreparedRequest:
        prepared = super().prepare_request(request)
        if "Authorization" in self.headers:
            prepared.headers["Authorization"] = self.headers["Authorization"]
        return prepared

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        shown = prepared_request.headers.get("Authorization")
        stays = shown is not None and not self.should_strip_auth(response.request.url, prepared_request.url)
        super().rebuild_auth(prepared_request, response)
        if stays:
            prepared_request.headers["Authorization"] = shown


class Web:
    """The HTTP side of a hub. mirror, token: what to set when it is unreachable or refuses, for the messages.

    delay: seconds before the first repetition of a failed request, doubled for each further one.
    """

    def __init__(self, mirror: str, token: str, delay: float):
        self.session = Session()
        # Ranges, sizes and checksums are of the published bytes
        self.session.headers["Accept-Encoding"] = "identity"
        self.mirror, self.token, self.delay = mirror, token, delay

    def patiently(self, attempt: Callable, what: str, attempts: int = ATTEMPTS):
        """The result of `attempt`, called again while it raises Broken; after `attempts` times Unreachable."""
        for failures in range(1, attempts + 1):
            try:
                return attempt()
            except Broken as error:
                if failures == attempts:
                    raise Unreachable(f"{what}: {error}: {self.mirror}") from error
                time.sleep(max(error.wait, self.delay * 2 ** (failures - 1)))
        raise AssertionError("attempts is not positive")

    def get(self, url: str, what: str, **options) -> requests.Response:
        """The answer to one GET, of status 200, 206 or 416. Raises Broken, NoPermission, NotFound, SourceError."""
        try:
            response = self.session.get(url, timeout=TIMEOUT, **options)
        except requests.exceptions.RequestException as error:
            raise Broken(f"no answer from {urlsplit(url).netloc} ({type(error).__name__})") from error
        status, host = response.status_code, urlsplit(response.url).netloc
        if status in (200, 206, 416):
            return response
        response.close()
        if status in (408, 425, 429) or status >= 500:
            wait = response.headers.get("Retry-After", "")
            raise Broken(f"{host} answers {status}", min(int(wait), 300) if wait.isdigit() else 0)
        if status in (401, 403):
            raise NoPermission(f"{what}: {host} refuses ({status}): {self.token}")
        if status in (404, 410):
            raise NotFound(f"{what}: not found at {host} ({status}): check the name, the revision and the path")
        raise SourceError(f"{what}: {host} answers {status}")


def room(folder: Path, need: int, what: str) -> None:
    """Raise DiskTooSmall unless `folder` can take `need` more bytes."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise DiskTooSmall(
            f"{what}: {need / 1e9:.2f} GB are needed in {folder} and {free / 1e9:.2f} GB are free:"
            " set DSA_SCRATCH to a folder on a larger disk"
        )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class Note:
    """What the bytes of a spool file are; kept beside it."""

    url: str
    revision: str
    size: int | None
    sha256: str | None
    etag: str | None = None

    def same(self, other: "Note") -> bool:
        """Whether the bytes of both are of one file. The URL may differ: mirrors have the same files."""
        if None not in (self.size, other.size) and self.size != other.size:
            return False
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return self.revision == other.revision


class RemoteFile(io.RawIOBase):
    """The published bytes of a remote file, read once from its start.

    path: the spool file, which is thrown away if it is of another version of the file.
    grown: called with the number of bytes whenever some were fetched.
    """

    def __init__(self, web: Web, url: str, revision: str, file: File, path: Path, grown: Callable = int):
        self.web, self.url, self.path, self.grown = web, url, path, grown
        self.what = url.split("://", 1)[-1]
        self.note = Note(url, revision, file.size, file.sha256)
        self.note_path = path.with_name(path.name + ".json")
        self.position, self.hash = 0, hashlib.sha256()
        self.response, self.ended = None, False
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            old = Note(**json.loads(self.note_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            old = None
        if old is None or not old.same(self.note):
            path.unlink(missing_ok=True)
        elif old.url == url:  # another mirror may have other tags
            self.note.etag = old.etag
        self._open()
        if self.note.size is not None and self.have > self.note.size:
            self._discard("shorter than before")
        self._write_note()

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    @property
    def complete(self) -> bool:
        return self.ended or self.have == self.note.size

    def readinto(self, buffer) -> int:
        if self.position == 0 and self.unsure:
            self.connect()  # is the start, read from the spool, still that of the file on the server?
        while self.position == self.have and not self.complete:
            self._fetch()
        self.spool.seek(self.position)
        count = self.spool.readinto(memoryview(buffer)[: self.have - self.position])
        self.hash.update(memoryview(buffer)[:count])
        self.position += count
        if count == 0 and self.position < self.have:
            raise SourceError(f"{self.what}: {self.path} was cut while it was read: run the stage again")
        if count == 0 and self.note.sha256:
            self._check(self.hash.hexdigest())
        return count

    def whole(self) -> Path:
        """Fetch all that is missing; the spool file's path. Raises DiskTooSmall before the first byte."""
        if self.note.size is not None:
            room(self.path.parent, self.note.size - self.have + MARGIN, self.what)
        if self.unsure:
            self.connect()
        while not self.complete:
            self._fetch()
        if self.note.sha256:
            self._check(sha256_of(self.path))
        return self.path

    def connect(self) -> None:
        """Have a connection that will send what is missing, if anything is. Raises SourceError."""
        if self.response is None and not self.complete:
            self.web.patiently(self._connect, self.what)

    def close(self) -> None:
        if not self.closed:
            self._hang_up()
            self.spool.close()
        super().close()

    def _connect(self) -> None:
        left = STREAM_ROOM if self.note.size is None else min(self.note.size - self.have, STREAM_ROOM)
        room(self.path.parent, left, self.what)
        ask = {"Range": f"bytes={self.have}-"} if self.have else {}
        response = self.web.get(self.url, self.what, headers=ask, stream=True)
        total, start = _extent(response, self.have)
        if response.status_code == 416 and total == self.have:
            self.note.size, self.ended = total, True
            return response.close()
        etag = _etag(response, self.note.sha256 is None)
        resized = response.status_code == 416 or (None not in (total, self.note.size) and total != self.note.size)
        if self.have and (resized or (None not in (etag, self.note.etag) and etag != self.note.etag)):
            response.close()
            self._discard("another ETag or size")
            return self._connect()
        if resized:
            response.close()
            raise SourceError(f"{self.what}: the server has {total} bytes, the hub lists {self.note.size}")
        if start > self.have:
            response.close()
            raise Broken(f"the server sends from byte {start} instead of {self.have}")
        self.note.etag, self.note.size = etag, self.note.size if total is None else total
        self._write_note()
        self.response, self.unsure = response, False
        try:
            while start < self.have:  # the server does not know Range
                start += len(self._receive(min(PIECE, self.have - start)) or self._break())
        except Broken:
            self._hang_up()
            raise

    def _fetch(self) -> None:
        """Append the next piece to the spool file, however often the connection breaks before it comes."""

        def attempt() -> bytes:
            if self.response is None and not self.complete:
                self._connect()
            try:
                return b"" if self.complete else self._receive(PIECE)
            except Broken:
                self._hang_up()
                raise

        piece = self.web.patiently(attempt, self.what)
        self.ended = not piece
        try:
            # At its place rather than at the end, so that two processes with one spool write the same
            self.spool.seek(self.have)
            while piece:
                written = self.spool.write(piece)
                self.have += written
                self.grown(written)
                piece = piece[written:]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            room(self.path.parent, (self.note.size or self.have + MARGIN) - self.have, self.what)
            raise DiskTooSmall(f"{self.what}: no room left in {self.path.parent}: set DSA_SCRATCH") from error
        if self.complete:
            self._hang_up()

    def _receive(self, most: int) -> bytes:
        """What has arrived, b"" only at the end of a file of untold size."""
        try:
            piece = self.response.raw.read1(most, decode_content=False)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Broken(f"broke off at byte {self.have} ({type(error).__name__})") from error
        return piece if piece or self.note.size is None else self._break()

    def _break(self):
        raise Broken(f"the connection ended at byte {self.have} of {self.note.size}")

    def _check(self, sha256: str) -> None:
        if sha256 != self.note.sha256:
            self.path.unlink(missing_ok=True)
            self.note_path.unlink(missing_ok=True)
            raise WrongChecksum(
                f"{self.what}: sha256 is {sha256}, the hub lists {self.note.sha256}: the file is deleted, try again"
            )

    def _discard(self, why: str) -> None:
        """Start over, which must not be once rows of the old bytes are in use."""
        self.spool.close()
        self.path.unlink(missing_ok=True)  # a new file rather than this one cut: another process may be reading it
        self._open()
        if self.position:
            raise SourceError(f"{self.what}: changed on the server while it was read ({why}): run the stage again")

    def _open(self) -> None:
        self.spool = open(self.path, "r+b" if self.path.exists() else "w+b", buffering=0)  # noqa: SIM115
        self.have = self.spool.seek(0, os.SEEK_END)
        self.unsure = self.have > 0  # that these bytes are still the server's
        self.note.etag = self.note.etag if self.have else None

    def _write_note(self) -> None:
        # In one step: a spool file with half a note would be of no use
        new = self.note_path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(asdict(self.note)), encoding="utf-8")
        new.replace(self.note_path)

    def _hang_up(self) -> None:
        if self.response is not None:
            self.response.close()
            self.response = None


def _extent(response: requests.Response, asked: int) -> tuple[int | None, int]:
    """The size of the whole file, None if not told, and where in it the answer starts (if not told, where asked)."""
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdigit() else None, 0
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    if match is None:
        return None, asked
    return int(match[2]) if match[2].isdigit() else None, int(match[1] or 0)


def _etag(response: requests.Response, storage: bool) -> str | None:
    """The file's tag: the hub's own, or else, where asked for, that of the storage to which the hub redirects.

    A hub may have several storages, with tags of their own; a file with a listed checksum can do without those.
    """
    for answer in (*response.history, response):
        if "X-Linked-ETag" in answer.headers:
            return answer.headers["X-Linked-ETag"].removeprefix("W/")
    return response.headers["ETag"].removeprefix("W/") if storage and "ETag" in response.headers else None
