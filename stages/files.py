"""Rows and numbers on disk, the same bytes for the same content."""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a gzipped JSON lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a gzipped file, undecoded."""
    with gzip.open(path, "rb") as file:
        for line in file:
            yield line.rstrip(b"\r\n")


@contextmanager
def line_writer(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A function that writes a line to a gzipped file, the same bytes for the same lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0, compresslevel=6) as file:
        yield lambda line: file.write(line + b"\n")


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Gzipped JSON lines."""
    with line_writer(path) as write:
        for row in rows:
            write(json.dumps(row, ensure_ascii=False).encode())


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
