"""Rows of datasets and models by URI, from a hub or from disk.

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
from functools import partial
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet
from safetensors import SafetensorError, safe_open

from dsa.data.hubs import File, Hub, HuggingFace, ModelScope, Repo, SourceError, Unreachable, parse, room

log = logging.getLogger(__name__)

DATA_FILES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
MODEL_FILES = [
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
]
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
BUFFER = 2**20  # bytes
HUBS = {"hf": HuggingFace, "modelscope": ModelScope}


class Dataset:
    """Rows of one source. uri: the one used; revision: its commit, None for local files; files: in reading order.

    fetched_bytes: published bytes that came over the network so far.
    """

    fetched_bytes = 0

    def __init__(self, uri: str, revision: str | None, files: list[File], open_file: Callable[[File], io.IOBase]):
        self.uri, self.revision, self.open_file = uri, revision, open_file
        self.files = sorted((f for f in files if f.name.endswith(DATA_FILES)), key=lambda f: f.name)
        if not self.files:
            raise SourceError(f"{uri}: no data file there ({', '.join(DATA_FILES)})")
        rows = self._rows()
        # The listing and the files may be on different servers: is the first one to be had?
        self._lines = chain(list(islice(rows, 1)), rows)

    def lines(self) -> Iterator[bytes]:
        """The rows, once: JSON lines as published, without the line end, empty ones too; parquet as JSON.

        Text that is not UTF-8 stays so, for the reader of the line to find. Raises SourceError.
        """
        return self._lines

    def check_unchanged(self) -> None:
        """Raises SourceError where what was read is not what is there now."""

    def _rows(self) -> Iterator[bytes]:
        for file in self.files:
            try:
                with self.open_file(file) as raw:
                    if file.name.endswith(".parquet"):
                        rows = table_rows(raw, f"{self.uri}: {file.name}")
                    else:
                        rows = split(raw, file.name)
                    yield from rows
            except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
                raise SourceError(f"{self.uri}: {file.name} cannot be read: {error}") from error


class HubDataset(Dataset):
    """Of the files of a repository that its URI means."""

    def __init__(self, hub: Hub, repo: Repo):
        self.hub, self.repo = hub, repo
        commit, files = hub.files(repo)
        meant = [f for f in files if not repo.path or f.name == repo.path or f.name.startswith(repo.path + "/")]
        super().__init__(repo.uri, commit, meant, partial(hub.read, repo, commit))

    @property
    def fetched_bytes(self) -> int:
        return self.hub.fetched_bytes

    def check_unchanged(self) -> None:
        if self.repo.hub != "modelscope":  # read by its commit
            return
        try:
            _, now = self.hub.files(self.repo)
        except Unreachable as error:
            log.warning("whether it has changed while it was read is not known: %s", error)
            return
        if not set(self.files) <= set(now):
            raise SourceError(f"{self.uri}: changed on the server while it was read: run the stage again")


def table_rows(raw: io.IOBase, where: str) -> Iterator[bytes]:
    table = parquet.ParquetFile(raw)
    for group in range(table.num_row_groups):  # all at once, it would be read ahead to the end
        for batch in table.iter_batches(batch_size=256, row_groups=[group]):
            yield from as_json(batch, where)


def as_json(batch: pa.RecordBatch, where: str) -> Iterator[bytes]:
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
                yield from as_json(batch.slice(number, 1), where)
        return
    for row in rows:
        cells = []
        for column, value in row.items():
            try:
                cells.append(f"{to_json(column)}: {to_json(value)}")
            except TypeError as error:
                raise SourceError(f"{where}: column {column}: JSON has no {error}: publish it as text") from None
        yield f"{{{', '.join(cells)}}}".encode(errors="surrogateescape")


def split(raw: io.IOBase, name: str) -> Iterator[bytes]:
    stream = io.BufferedReader(raw, BUFFER)
    if name.endswith(".gz"):
        stream = io.BufferedReader(gzip.GzipFile(fileobj=stream), BUFFER)
    elif name.endswith(".zst"):
        stream = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd"), BUFFER)
    for line in stream:
        yield line.removesuffix(b"\n").removesuffix(b"\r")


def open_dataset(uris: list[str]) -> Dataset:
    """The first of these sources that can be reached. Raises SourceError, naming all if none can be reached."""
    return first_reachable(uris, _dataset)


def fetch_model(uris: list[str], target: Path) -> dict:
    """Config, tokenizer and safetensors of the first of these sources that can be reached, to the folder `target`.

    Returns {"source": URI, "revision": commit or None, "files": {name: {"bytes", "sha256"}}}. Raises SourceError.
    """
    return first_reachable(uris, partial(_model, target=target))


def first_reachable(uris: list[str], attempt: Callable):
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


def _dataset(uri: str) -> Dataset:
    repo = parse(uri)
    if repo is None:
        return _local_dataset(uri, Path(uri).expanduser())
    hub = HUBS[repo.hub]()
    try:
        return HubDataset(hub, repo)
    except Unreachable as error:
        if repo.hub == "hf" and (found := _cached_dataset(hub, repo)):
            return found
        raise error


def _cached_dataset(hub: HuggingFace, repo: Repo) -> Dataset | None:
    patterns = [repo.path, f"{repo.path}/*"] if repo.path else [f"*{suffix}" for suffix in DATA_FILES]
    try:
        folder = hub.snapshot(repo, patterns, offline=True)
        found = _local_dataset(repo.uri, folder / repo.path, folder)
    except SourceError:
        return None
    log.warning("%s: %s is not reached, the hub's cache is used", repo.uri, hub.endpoint)
    found.revision = folder.name
    return found


def _local_dataset(uri: str, path: Path, root: Path | None = None) -> Dataset:
    if not path.exists():
        raise SourceError(f"{uri}: no such file or folder")
    root = root or (path if path.is_dir() else path.parent)
    paths = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    paths = [p for p in paths if p.is_file()] if path.is_dir() else [path]

    def open_file(file: File) -> io.FileIO:
        raw = io.FileIO(root / file.name)
        if raw.read(len(LFS_POINTER)) == LFS_POINTER:
            raise SourceError(f"{raw.name}: only the pointer of a git-lfs file: run `git lfs pull` in its clone")
        raw.seek(0)
        return raw

    return Dataset(uri, None, [File(p.relative_to(root).as_posix(), p.stat().st_size) for p in paths], open_file)


def _model(uri: str, target: Path) -> dict:
    repo, revision, listed, folder = parse(uri), None, [], target
    if repo is None:
        folder = Path(uri).expanduser()
        if not folder.is_dir():
            raise SourceError(f"{uri}: no such folder")
    elif repo.hub == "hf":
        folder, listed = _hf_model(HuggingFace(), repo)
        revision = folder.name
    else:
        hub = ModelScope()
        revision, listed = hub.files(repo)
        listed = [file for file in listed if is_model_file(file.name)]
        check_names([file.name for file in listed], uri)
        with room(target, sum(file.size for file in listed), uri):
            for file in listed:
                with hub.read(repo, revision, file) as raw, (target / file.name).open("wb") as out:
                    shutil.copyfileobj(raw, out, BUFFER)
    paths = {path.name: path for path in sorted(folder.iterdir()) if is_model_file(path.name)}
    files = check_model(paths, {file.name: file.sha256 for file in listed}, uri)
    if folder != target:
        with room(target, sum(file["bytes"] for file in files.values()), uri):
            for name, path in paths.items():
                shutil.copyfile(path, target / name)
    return {"source": uri, "revision": revision, "files": files}


def _hf_model(hub: HuggingFace, repo: Repo) -> tuple[Path, list[File]]:
    """The commit's folder in the hub's cache, and what the hub lists, nothing if it is not reached."""
    try:
        _, listed = hub.files(repo)
        names = [file.name for file in listed if is_model_file(file.name)]
        check_names(names, repo.uri)
        return hub.snapshot(repo, names), listed
    except Unreachable as error:
        try:
            folder = hub.snapshot(repo, MODEL_FILES, offline=True)
        except Unreachable:
            raise error from None
    log.warning("%s: %s is not reached, the hub's cache is used", repo.uri, hub.endpoint)
    return folder, []


def is_model_file(name: str) -> bool:
    return "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES)


def check_names(names: Iterable[str], uri: str) -> None:
    names = set(names)
    tokenizers = ({"tokenizer.json"}, {"tokenizer.model"}, {"vocab.json", "merges.txt"})
    missing = [] if "config.json" in names else ["config.json"]
    if not any(name.endswith(".safetensors") for name in names):
        missing.append("*.safetensors")
    if not any(files <= names for files in tokenizers):
        missing.append("tokenizer.json (or vocab.json and merges.txt)")
    if missing:
        raise SourceError(f"{uri}: no {', no '.join(missing)} there")


def check_model(paths: dict[str, Path], listed: dict[str, str | None], uri: str) -> dict[str, dict]:
    """{name: {"bytes", "sha256"}}. Raises SourceError for a file that is missing, damaged or not as listed."""
    check_names(paths, uri)
    for name, path in paths.items():
        if name.endswith(".safetensors.index.json"):
            try:
                shards = set(json.loads(path.read_bytes())["weight_map"].values())
            except (ValueError, LookupError, AttributeError, TypeError) as error:
                raise SourceError(f"{uri}: {name} is no index of safetensors files") from error
            if missing := sorted(shards - paths.keys()):
                raise SourceError(f"{uri}: no {', no '.join(missing)} there, which {name} names")
    files = {}
    for name, path in paths.items():
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256}
        if (listed.get(name) or sha256) != sha256:
            path.resolve().unlink()  # out of the hub's cache, or the next run would find it again
            raise SourceError(f"{uri}: {name} has not the sha256 that the hub lists: it is deleted, try again")
        if name.endswith(".safetensors"):
            try:
                with safe_open(path, framework="numpy"):
                    pass
            except (SafetensorError, OSError) as error:
                raise SourceError(f"{uri}: {name} is damaged, cut short or a git-lfs pointer ({error})") from error
    return files
