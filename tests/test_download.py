"""The slice that `download` keeps of a source: what was scanned, and what ends it in one line."""

import errno
import gzip
import json
import os
from contextlib import contextmanager

import pytest
from transformers import AutoTokenizer

from dsa.data import sources
from dsa.data.scan import LongRows
from stages import download
from tests.conftest import ROOT

LINES = [
    json.dumps({"instruction": "Say it.", "output": "word " * (200 if i % 3 == 0 else 5)}).encode() for i in range(900)
]


@pytest.fixture
def scan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*LINES[:5], b"{", *LINES[5:]]))
    return LongRows(AutoTokenizer.from_pretrained(ROOT / "data/base"), 1000, 1, 100)


def test_the_slice_ends_at_the_last_wanted_row(scan):
    """It had the rows that the scan had read ahead."""
    metrics = download.fetch("sft", sources.open_dataset(["a.jsonl"]), scan, 4)
    assert gzip.decompress((download.RAW / "sft.jsonl.gz").read_bytes()).splitlines() == [
        *LINES[:5],
        b"{",
        *LINES[5:10],
    ]
    assert metrics["complete"] and (metrics["scanned"], metrics["kept"]) == (11, 4)
    assert metrics["bad_rows"] == {"malformed JSON": {"rows": 1, "row_numbers": [5]}}
    assert metrics["files"] == [{"name": "a.jsonl", "size": os.path.getsize("a.jsonl"), "sha256": None}]


def test_a_disk_that_is_full_is_one_line(scan, monkeypatch):
    @contextmanager
    def full(path):
        def write(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        yield write

    monkeypatch.setattr(download, "line_writer", full)
    with pytest.raises(sources.SourceError, match=r"^sft: no room left in data/raw: free some"):
        download.fetch("sft", sources.open_dataset(["a.jsonl"]), scan, 4)


def test_a_source_that_has_changed_is_no_slice(scan, monkeypatch):
    dataset = sources.open_dataset(["a.jsonl"])

    def changed():
        raise sources.SourceError("changed")

    monkeypatch.setattr(dataset, "check_unchanged", changed)
    with pytest.raises(sources.SourceError, match="changed"):
        download.fetch("sft", dataset, scan, 4)
