"""Datasets and models by URI, from a hub or from disk.

    hf://Qwen/Qwen2.5-0.5B@REVISION                   a model on a Hugging Face hub (HF_ENDPOINT, HF_TOKEN, its cache)
    hf://datasets/OWNER/NAME@REVISION/PATH            a file of a dataset, or all data files in a folder of it
    modelscope://datasets/OWNER/NAME@REVISION/PATH    the same on ModelScope (MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN)
    anything else                                     a local file, or a folder such as a clone of the repository

Revision (default "main", on ModelScope "master") and path may be left out; a slash in a revision is written %2F.
"""

import fnmatch
import gzip
import hashlib
import io
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet
from safetensors import SafetensorError, safe_open

from dsa.data.http import (
    MARGIN,
    DiskTooSmall,
    File,
    NoPermission,
    NotFound,
    RemoteFile,
    SourceError,
    Unreachable,
    WrongChecksum,
    room,
    sha256_of,
)
from dsa.data.hubs import HuggingFace, ModelScope, Repo, hub_of, parse

__all__ = [
    "Dataset",
    "DiskTooSmall",
    "File",
    "NoPermission",
    "NotFound",
    "SourceError",
    "Unreachable",
    "WrongChecksum",
    "fetch_model",
    "open_dataset",
]

log = logging.getLogger(__name__)

DATA_FILES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
MODEL_FILES = [
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
]
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class LocalFile(io.FileIO):
    """A local file with the methods of a RemoteFile."""

    def connect(self) -> None:
        if self.read(len(LFS_POINTER)) == LFS_POINTER:
            raise SourceError(f"{self.name}: only the pointer of a git-lfs file: run `git lfs pull` in its clone")
        self.seek(0)

    def whole(self) -> Path:
        return Path(self.name)

    def tell(self) -> int:
        return self.end if self.closed else super().tell()

    def close(self) -> None:
        if not self.closed:
            self.end = super().tell()
        super().close()


class Dataset:
    """Rows of one source. uri: the one used; revision: its commit, None for local files; files: in reading order.

    fetched_bytes: published bytes that came over the network so far; read_bytes: published bytes of the rows so far.
    """

    def __init__(self, uri: str, revision: str | None, files: list[File], open_file: Callable[[File], io.RawIOBase]):
        self.uri, self.revision, self.files = uri, revision, files
        self.fetched_bytes = 0
        self._open_file, self._first = open_file, None
        self._raw, self._before, self._share = None, 0, None

    @property
    def read_bytes(self) -> int:
        if self._raw is None:
            return self._before
        return self._before + (self._raw.tell() if self._share is None else self._share)

    def connect(self) -> "Dataset":
        """Make sure that the first file can be had, for the listing and the files may be on different servers."""
        self._first = self._open_file(self.files[0])
        self._first.connect()
        return self

    def lines(self) -> Iterator[bytes]:
        """The rows from the first on: JSON lines as published, without the line end, empty ones too; parquet as JSON.

        Text that is not UTF-8 stays so, for the reader of the line to find.
        Raises SourceError; WrongChecksum only after the last row of a file.
        """
        self._before = 0
        for file in self.files:
            self._raw, self._first = self._first or self._open_file(file), None
            try:
                self._raw.connect()
                yield from self._parquet_rows(file) if file.name.endswith(".parquet") else _split(self._raw, file.name)
            except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
                raise SourceError(f"{self.uri}: {file.name} cannot be read: {error}") from error
            finally:
                self._before, self._share = self.read_bytes, None
                self._raw.close()
                self._raw = None

    def _parquet_rows(self, file: File) -> Iterator[bytes]:
        self._share = 0
        path = self._raw.whole()
        with parquet.ParquetFile(path) as table:
            done = 0
            for batch in table.iter_batches(batch_size=256):
                yield from _as_json(batch, f"{self.uri}: {file.name}")
                done += batch.num_rows
                self._share = path.stat().st_size * done // table.metadata.num_rows


def _as_json(batch: pa.RecordBatch, where: str) -> Iterator[bytes]:
    """A table's rows, text that is stored as bytes as text. Raises SourceError for types that JSON lacks."""

    def text(value: object) -> str:
        if isinstance(value, bytes):
            return value.decode(errors="surrogateescape")
        raise TypeError(type(value).__name__)

    to_json = json.JSONEncoder(ensure_ascii=False, default=text).encode

    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:  # in a column of strings: of one row, the others are sound
        if batch.num_rows == 1:
            yield b"\xff"
        else:
            for number in range(batch.num_rows):
                yield from _as_json(batch.slice(number, 1), where)
        return
    for row in rows:
        cells = []
        for column, value in row.items():
            try:
                cells.append(f"{to_json(column)}: {to_json(value)}")
            except TypeError as error:
                raise SourceError(f"{where}: column {column}: JSON has no {error}: publish it as text") from None
        yield f"{{{', '.join(cells)}}}".encode(errors="surrogateescape")


def _split(raw: io.RawIOBase, name: str) -> Iterator[bytes]:
    stream = io.BufferedReader(raw, 2**20)
    if name.endswith(".gz"):
        stream = io.BufferedReader(gzip.GzipFile(fileobj=stream), 2**20)
    elif name.endswith(".zst"):
        stream = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd"), 2**20)
    for line in stream:
        yield line.removesuffix(b"\n").removesuffix(b"\r")


def open_dataset(uris: list[str], spool: Path, *, delay: float = 1.0) -> Dataset:
    """The first of these sources that can be reached. Raises SourceError, naming all if none can be reached.

    spool: folder for the published bytes that are fetched; a later call goes on with them.
    delay: seconds before a failed request is repeated, doubled each time.
    """
    return _first_reachable(uris, lambda uri: _dataset(uri, spool, delay))


def fetch_model(uris: list[str], target: Path, spool: Path, *, delay: float = 1.0) -> dict:
    """Config, tokenizer and safetensors of the first of these sources that can be reached, to the folder `target`.

    Returns {"source": URI, "revision": commit or None, "files": {name: {"bytes", "sha256"}}}. Raises SourceError.
    """
    return _first_reachable(uris, lambda uri: _model(uri, target, spool, delay))


def _first_reachable(uris: list[str], attempt: Callable):
    failures = []
    for uri in uris:
        try:
            return attempt(uri)
        except Unreachable as error:
            failures.append(error)
            if len(failures) < len(uris):
                log.warning("%s; the next source is tried", error)
    if len(failures) == 1:
        raise failures[0]
    raise Unreachable(f"none of the sources can be reached: {'; '.join(str(f) for f in failures) or 'none is given'}")


def _dataset(uri: str, spool: Path, delay: float) -> Dataset:
    repo = parse(uri)
    if repo is None:
        return _local_dataset(uri, Path(uri).expanduser())
    hub = hub_of(repo, delay)
    try:
        commit, files = hub.files(repo)
    except Unreachable as error:
        if repo.hub == "hf" and (found := _cached_dataset(hub, repo)):
            return found
        raise error

    def open_file(file: File) -> RemoteFile:
        return RemoteFile(hub.web, hub.url(repo, commit, file.name), commit, file, _spool(spool, repo, file), grown)

    def grown(count: int) -> None:
        dataset.fetched_bytes += count

    meant = [f for f in files if not repo.path or f.name == repo.path or f.name.startswith(repo.path + "/")]
    dataset = Dataset(uri, commit, _data_files(meant, uri), open_file)
    return dataset.connect()


def _spool(folder: Path, repo: Repo, file: File) -> Path:
    """Not by revision: the spool file of an old one makes room for the new one."""
    name = hashlib.blake2b(f"{repo.hub} {repo.kind} {repo.id} {file.name}".encode(), digest_size=6).hexdigest()
    return folder / f"{name}-{Path(file.name).name}"


def _cached_dataset(hub: HuggingFace, repo: Repo) -> Dataset | None:
    patterns = [repo.path, f"{repo.path}/*"] if repo.path else [f"*{suffix}" for suffix in DATA_FILES]
    try:
        folder = hub.snapshot(repo, patterns, offline=True)
        found = _local_dataset(repo.uri, folder / repo.path, folder)
    except (Unreachable, NotFound):
        return None
    log.warning("%s: %s is not reached, the hub's cache is used", repo.uri, hub.endpoint)
    found.revision = folder.name
    return found


def _local_dataset(uri: str, path: Path, root: Path | None = None) -> Dataset:
    if not path.exists():
        raise NotFound(f"{uri}: no such file or folder")
    root = root or (path if path.is_dir() else path.parent)
    paths = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    paths = [p for p in paths if p.is_file()] if path.is_dir() else [path]
    files = _data_files([File(p.relative_to(root).as_posix(), p.stat().st_size) for p in paths], uri)
    try:
        return Dataset(uri, None, files, lambda file: LocalFile(root / file.name)).connect()
    except PermissionError as error:
        raise NoPermission(f"{uri}: {error}") from error


def _data_files(files: list[File], uri: str) -> list[File]:
    chosen = sorted((f for f in files if f.name.endswith(DATA_FILES)), key=lambda f: f.name)
    if not chosen:
        raise NotFound(f"{uri}: no data file there ({', '.join(DATA_FILES)})")
    return chosen


def _model(uri: str, target: Path, spool: Path, delay: float) -> dict:
    repo, revision, listed, spooled = parse(uri), None, [], []
    if repo is None:
        folder = Path(uri).expanduser()
        if not folder.is_dir():
            raise NotFound(f"{uri}: no such folder")
        paths = {path.name: path for path in folder.iterdir()}
    elif repo.hub == "hf":
        folder, listed = _hf_model(HuggingFace(delay), repo)
        revision, paths = folder.name, {path.name: path for path in folder.iterdir()}
    else:
        hub = ModelScope(delay)
        revision, listed = hub.files(repo)
        listed = [file for file in listed if _is_model_file(file.name)]
        _check_names([file.name for file in listed], uri)
        spooled = [_spool(spool, repo, file) for file in listed]
        for file, path in zip(listed, spooled, strict=True):
            with RemoteFile(hub.web, hub.url(repo, revision, file.name), revision, file, path) as remote:
                remote.whole()
        paths = {file.name: path for file, path in zip(listed, spooled, strict=True)}
    paths = {name: path for name, path in sorted(paths.items()) if _is_model_file(name)}
    files = _check_model(paths, {file.name: file.sha256 for file in listed}, uri)
    target.mkdir(parents=True, exist_ok=True)
    room(target, sum(file["bytes"] for file in files.values()) + MARGIN, uri)
    for name, path in paths.items():
        shutil.copyfile(path, target / name)
    for path in spooled:
        path.unlink()
        path.with_name(path.name + ".json").unlink()
    return {"source": uri, "revision": revision, "files": files}


def _hf_model(hub: HuggingFace, repo: Repo) -> tuple[Path, list[File]]:
    """The commit's folder in the hub's cache, and what the hub lists, nothing if it is not reached."""
    try:
        _, listed = hub.files(repo)
        names = [file.name for file in listed if _is_model_file(file.name)]
        _check_names(names, repo.uri)
        return hub.snapshot(repo, names), listed
    except Unreachable as error:
        try:
            folder = hub.snapshot(repo, MODEL_FILES, offline=True)
        except Unreachable:
            raise error from None
    log.warning("%s: %s is not reached, the hub's cache is used", repo.uri, hub.endpoint)
    return folder, []


def _is_model_file(name: str) -> bool:
    return "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES)


def _check_names(names: Iterable[str], uri: str) -> None:
    names = set(names)
    tokenizers = ({"tokenizer.json"}, {"tokenizer.model"}, {"vocab.json", "merges.txt"})
    missing = [] if "config.json" in names else ["config.json"]
    if not any(name.endswith(".safetensors") for name in names):
        missing.append("*.safetensors")
    if not any(files <= names for files in tokenizers):
        missing.append("tokenizer.json (or vocab.json and merges.txt)")
    if missing:
        raise NotFound(f"{uri}: no {', no '.join(missing)} there")


def _check_model(paths: dict[str, Path], listed: dict[str, str | None], uri: str) -> dict[str, dict]:
    """{name: {"bytes", "sha256"}}. Raises NotFound for a missing file, WrongChecksum, SourceError for a damaged one."""
    _check_names(paths, uri)
    for name, path in paths.items():
        if name.endswith(".safetensors.index.json"):
            try:
                shards = set(json.loads(path.read_bytes())["weight_map"].values())
            except (ValueError, LookupError, AttributeError, TypeError) as error:
                raise SourceError(f"{uri}: {name} is no index of safetensors files") from error
            if missing := sorted(shards - paths.keys()):
                raise NotFound(f"{uri}: no {', no '.join(missing)} there, which {name} names")
    files = {}
    for name, path in paths.items():
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        if (expected := listed.get(name)) and expected != files[name]["sha256"]:
            path.resolve().unlink()  # out of the hub's cache, or the next run would find it again
            raise WrongChecksum(f"{uri}: {name} has not the sha256 that the hub lists: it is deleted, try again")
        if name.endswith(".safetensors"):
            try:
                with safe_open(path, framework="numpy"):
                    pass
            except (SafetensorError, OSError) as error:
                raise SourceError(f"{uri}: {name} is damaged, cut short or a git-lfs pointer ({error})") from error
    return files
