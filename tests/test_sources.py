import datetime
import errno
import gzip
import io
import itertools
import json
import logging
import os
import shutil
from collections import namedtuple
from decimal import Decimal

import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
from hub import Hub
from pyarrow import parquet
from safetensors.numpy import save

from dsa.data import http, sources
from dsa.data.rows import BadRow
from dsa.data.scan import parse
from dsa.data.sources import DiskTooSmall, NoPermission, NotFound, SourceError, Unreachable, WrongChecksum

ROWS = [{"id": i, "input": f"第{i}行 😀", "history": [["q", "a"]] * (i % 3)} for i in range(600)]
JSONL = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)
DOWN = "http://127.0.0.1:9"  # the discard port: nobody answers
FORMS = pytest.mark.parametrize("form", ["hf", "modelscope"])
ID = "owner/some.data-set"


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


def table(rows: list[dict]) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def model_files(**changes: bytes | None) -> dict[str, bytes]:
    files = {
        "config.json": b"{}",
        "generation_config.json": b"{}",
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer_config.json": b"{}",
        "model.safetensors": save({"weight": np.arange(10_000, dtype=np.float32)}),
        "README.md": b"not wanted",
        "onnx/model.safetensors": b"not wanted",
    } | changes
    return {name: data for name, data in files.items() if data is not None}


def uri(form: str, path: str = "") -> str:
    return f"{form}://datasets/{ID}" + (f"/{path}" if path else "")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with Hub() as server:
        server.set_environment(monkeypatch, tmp_path / "cache")
        yield server


@pytest.fixture
def read(tmp_path):
    """The rows of these sources, at most `count`, with no pause between attempts."""

    def call(*uris, count=None, spool=tmp_path / "spool"):
        dataset = sources.open_dataset(list(uris), spool, delay=0)
        lines = dataset.lines()
        rows = list(itertools.islice(lines, count))
        lines.close()
        return rows, dataset

    return call


def spooled(tmp_path) -> list:
    return sorted(path for path in (tmp_path / "spool").iterdir() if path.suffix != ".json")


# Formats


@FORMS
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", JSONL),
        ("a.jsonl.gz", gzip.compress(JSONL[:9000]) + gzip.compress(JSONL[9000:])),
        ("a.jsonl.zst", zstd(JSONL[:9000]) + zstd(JSONL[9000:])),
        ("data/a.parquet", table(ROWS)),
    ],
)
def test_every_format_gives_the_rows_of_the_file(form, name, data, hub, read):
    repository = hub.add("dataset", ID, {name: data, "README.md": b"# rows"})
    rows, dataset = read(uri(form, name))
    assert [json.loads(row) for row in rows] == ROWS
    if ".jsonl" in name:
        assert b"\n".join(rows) + b"\n" == JSONL
    assert dataset.fetched_bytes == dataset.read_bytes == len(data) == hub.sent(name)
    assert [(f.name, f.size, f.sha256) for f in dataset.files] == [(name, len(data), repository.sha256[name])]
    assert repository.commit.startswith(dataset.revision)
    assert dataset.uri == uri(form, name)


def test_a_folder_is_read_in_the_order_of_names_and_only_as_far_as_asked(hub, read):
    hub.add("dataset", ID, {"data/b.parquet": table(ROWS[300:]), "data/a.parquet": table(ROWS[:300]), "c.jsonl": b"x"})
    rows, dataset = read(uri("hf", "data"), count=300)
    assert [json.loads(row) for row in rows] == ROWS[:300]
    assert [f.name for f in dataset.files] == ["data/a.parquet", "data/b.parquet"]
    assert hub.sent("data/b.parquet") == 0
    assert [json.loads(row) for row in read(uri("hf", "data"))[0]] == ROWS
    assert read(uri("modelscope"))[1].files[0].name == "c.jsonl"


def test_bytes_come_as_published(hub, read):
    lines = [
        b'{"a": "\xff\xfe"}',
        b"",
        b"\xef\xbb\xbf{}",
        b"not json",
        b" spaces ",
        b"\xe2\x80\xa8",
        b"a\rb\x0bc\x00",
        b"last",
    ]
    hub.add("dataset", ID, {"a.jsonl": b"\n".join(lines)})
    assert read(uri("hf"))[0] == lines
    hub.add("dataset", ID, {"a.jsonl": b"one\r\ntwo\n\n"})
    assert read(uri("hf"))[0] == [b"one", b"two", b""]


@FORMS
@pytest.mark.parametrize("lengths", [True, False])
def test_empty_file(form, lengths, hub, read):
    hub.lengths = lengths
    hub.add("dataset", ID, {"a.jsonl": b"", "b.jsonl": b"x"})
    assert read(uri(form))[0] == [b"x"]


def test_many_files_come_in_pages(hub, read, monkeypatch):
    monkeypatch.setattr("dsa.data.hubs.ModelScope.PAGE", 4)
    hub.add("dataset", ID, {f"{i:03}.jsonl": b"%d" % i for i in range(23)})
    assert read(uri("modelscope"))[0] == [b"%d" % i for i in range(23)]


def test_text_that_a_table_stores_as_bytes_is_text(hub, read):
    """It became the text of a bytes literal, b'...', and was trained on."""
    rows = [
        {"output": row["input"].encode(), "history": [[turn.encode() for turn in t] for t in row["history"]]}
        for row in ROWS
    ]
    hub.add("dataset", ID, {"a.parquet": table(rows)})
    assert [json.loads(row) for row in read(uri("hf"))[0]] == [
        {"output": row["input"], "history": row["history"]} for row in ROWS
    ]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.string()])
def test_bytes_of_a_table_that_are_not_utf8_make_one_bad_row(kind, hub, read):
    """In a column of strings they ended the stage in a traceback: parquet does not check them."""
    texts = [b"good", b"\xff\xfe", "好".encode(), b"a" * 300, b"\xe5\xa5"] * 200
    stored = pa.array(texts, pa.large_binary() if kind == pa.large_binary() else pa.binary())
    if kind == pa.string():
        stored = pa.Array.from_buffers(kind, len(stored), stored.buffers())
    out = io.BytesIO()
    parquet.write_table(pa.table({"instruction": ["a"] * len(texts), "output": stored}), out)
    hub.add("dataset", ID, {"a.parquet": out.getvalue()})
    found = []
    for line in read(uri("hf"))[0]:
        try:
            found.append(parse(line)["output"].encode())
        except BadRow as reason:
            assert str(reason) == "not UTF-8"
            found.append(None)
    assert found == [None if text[0] == 0xFF or text == b"\xe5\xa5" else text for text in texts]


@pytest.mark.parametrize(
    "value", [datetime.datetime(2020, 1, 1), datetime.date(2020, 1, 1), Decimal("1.5"), datetime.timedelta(1)]
)
def test_types_that_json_lacks_are_refused_by_name(value, hub, read):
    """They were trained on as Python writes them."""
    hub.add("dataset", ID, {"a.parquet": table([{"id": 1, "output": [{"when": value}]}])})
    with pytest.raises(SourceError, match=f"a.parquet: column output: JSON has no {type(value).__name__}") as error:
        read(uri("hf"))
    assert "\n" not in str(error.value)


# Broken connections


@FORMS
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_dropped_connection_goes_on_where_it_broke(form, name, hub, read):
    data = {"a.jsonl": JSONL, "a.jsonl.gz": gzip.compress(JSONL, 1), "a.parquet": table(ROWS)}[name]
    hub.add("dataset", ID, {name: data})
    hub.breaks = [1000, 0, 301, 1, None]
    rows, dataset = read(uri(form))
    assert [json.loads(row) for row in rows] == ROWS
    assert hub.starts(name) == [0, 1000, 1000, 1301, 1302]
    assert hub.sent(name) == len(data) == dataset.fetched_bytes


def test_a_stream_that_ends_early_is_not_the_end_of_the_file(hub, read):
    hub.add("dataset", ID, {"a.jsonl": JSONL}, checksums=False)
    hub.lengths = False  # the connection's end is all that tells
    hub.breaks = [5000, 2000]
    rows, _ = read(uri("hf"))
    assert [json.loads(row) for row in rows] == ROWS
    assert hub.starts("a.jsonl") == [0, 5000, 7000]


def test_it_gives_up_after_five_attempts_without_a_byte(hub, read):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    hub.breaks = [1000] + [0] * 20
    with pytest.raises(Unreachable, match=r"^127\.0\.0\.1:\d+/datasets/owner/.* at byte 1000 .*HF_ENDPOINT") as error:
        read(uri("hf"))
    assert "\n" not in str(error.value)
    assert len(hub.requests) == 1 + http.ATTEMPTS - 1  # the first byte came in the first attempt of five


def test_a_server_that_is_busy_is_asked_again(hub, read, monkeypatch):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    hub.status["a.jsonl"] = 503
    monkeypatch.setattr(http.time, "sleep", lambda _: len(hub.requests) < 3 or hub.status.clear())
    assert len(read(uri("modelscope"))[0]) == len(ROWS)
    assert [request.status for request in hub.requests] == [503, 503, 503, 200]


def test_pauses_grow(monkeypatch):
    pauses = []
    monkeypatch.setattr(http.time, "sleep", pauses.append)

    def attempt():
        raise http.Broken("down", wait=6 if len(pauses) == 1 else 0)

    with pytest.raises(Unreachable):
        http.Web("set A", "set B", 1.0).patiently(attempt, "file")
    assert pauses == [1, 6, 4, 8]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_server_without_range(name, hub, read):
    data = {"a.jsonl": JSONL, "a.parquet": table(ROWS)}[name]
    hub.add("dataset", ID, {name: data})
    hub.ranges = False
    hub.breaks = [1000, 500, 4000]
    rows, dataset = read(uri("hf"))
    assert [json.loads(row) for row in rows] == ROWS
    assert dataset.fetched_bytes == len(data)


# The head of a large file, and the spool


@pytest.mark.parametrize("compress", [bytes, zstd])
def test_the_first_rows_of_a_large_file_take_a_few_megabytes(compress, hub, read, tmp_path):
    line = json.dumps({"input": "x" * 100}).encode() + b"\n"
    name = "a.jsonl" if compress is bytes else "a.jsonl.zst"
    noise = np.random.default_rng(0).integers(0, 256, 48 * 2**20, dtype=np.uint8).tobytes()
    data = line * 1000 + noise.replace(b"\n", b" ")
    hub.add("dataset", ID, {name: compress(data)})
    rows, dataset = read(uri("hf"), count=100)
    assert rows == [line[:-1]] * 100
    assert dataset.fetched_bytes <= 3 * 2**20
    assert spooled(tmp_path)[0].stat().st_size == dataset.fetched_bytes
    assert hub.sent(name) < 24 * 2**20  # what the system's socket buffers take, too


@FORMS
def test_a_later_run_goes_on_with_the_spool(form, hub, read, tmp_path, monkeypatch):
    monkeypatch.setattr(http, "PIECE", 4096)
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    hub.breaks = [10_000, *[0] * http.ATTEMPTS]
    with pytest.raises(Unreachable):
        read(uri(form))
    assert spooled(tmp_path)[0].read_bytes() == JSONL[:10_000]
    hub.requests.clear()
    hub.breaks.clear()
    rows, dataset = read(uri(form))
    assert b"\n".join(rows) + b"\n" == JSONL
    assert hub.starts("a.jsonl") == [10_000]
    assert dataset.fetched_bytes == hub.sent("a.jsonl") == len(JSONL) - 10_000
    assert dataset.read_bytes == len(JSONL)
    hub.requests.clear()
    assert read(uri(form))[0] == rows
    assert hub.requests == []  # all is there, and the listing says that it is the same file


@pytest.mark.parametrize("changed", ["etag", "size"])
def test_another_version_of_the_file_starts_over(changed, hub, read, tmp_path):
    hub.add("dataset", ID, {"a.jsonl": JSONL}, checksums=False)
    hub.breaks = [10_000, *[0] * http.ATTEMPTS]
    with pytest.raises(Unreachable):
        read(uri("hf"))
    new = JSONL.replace(b"input", b"INPUT") + (b"" if changed == "etag" else b"more\n")
    hub.repositories["dataset", ID].files["a.jsonl"] = new
    hub.tag = "v2"
    rows, _ = read(uri("hf"))
    assert b"\n".join(rows) + b"\n" == new
    assert spooled(tmp_path)[0].read_bytes() == new


def test_a_change_while_rows_are_in_use_is_an_error(hub, read, tmp_path, monkeypatch):
    monkeypatch.setattr(http, "PIECE", 4096)
    hub.add("dataset", ID, {"a.jsonl": JSONL}, checksums=False)
    hub.breaks = [10_000]
    dataset = sources.open_dataset([uri("hf")], tmp_path / "spool", delay=0)
    reader = io.BufferedReader
    monkeypatch.setattr(sources.io, "BufferedReader", lambda raw, _: reader(raw, 100))
    lines = dataset.lines()
    next(lines)
    hub.tag = "v2"
    with pytest.raises(SourceError, match="changed on the server while it was read"):
        list(lines)


def test_storages_with_tags_of_their_own_are_no_change_where_a_checksum_is_listed(hub, read):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    hub.breaks = [10_000, *[0] * http.ATTEMPTS]
    with pytest.raises(Unreachable):
        read(uri("modelscope"))
    hub.breaks, hub.tag = [], "another storage"
    assert len(read(uri("modelscope"))[0]) == len(ROWS)
    assert hub.starts("a.jsonl")[-1] == 10_000


def test_a_spool_file_that_is_cut_is_not_the_end(hub, read, tmp_path):
    hub.add("dataset", ID, {"a.jsonl": JSONL * 60})
    read(uri("hf"))
    lines = sources.open_dataset([uri("hf")], tmp_path / "spool").lines()
    next(lines)
    os.truncate(spooled(tmp_path)[0], 10)
    with pytest.raises(SourceError, match="was cut while it was read"):
        list(lines)


def test_a_reader_keeps_its_version_while_another_fetches_a_new_one(hub, read, tmp_path):
    hub.add("dataset", ID, {"a.jsonl": JSONL * 60})
    dataset = sources.open_dataset([uri("hf")], tmp_path / "spool")
    lines = dataset.lines()
    first = [next(lines)]
    hub.add("dataset", ID, {"a.jsonl": JSONL[::-1]})
    assert b"\n".join(read(uri("hf"))[0]) == JSONL[::-1]
    assert first + list(lines) == JSONL.splitlines() * 60
    assert b"\n".join(read(uri("hf"))[0]) == JSONL[::-1]


def test_a_spool_file_of_unknown_origin_is_not_used(hub, read, tmp_path):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    read(uri("hf"), count=1)
    path = spooled(tmp_path)[0]
    path.write_bytes(b"rubbish\n" * 10)
    path.with_name(path.name + ".json").unlink()
    rows, _ = read(uri("hf"))
    assert b"\n".join(rows) + b"\n" == JSONL


def test_two_readers_of_one_spool_do_not_harm_each_other(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(http, "PIECE", 4096)
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    readers = [sources.open_dataset([uri("hf")], tmp_path / "spool").lines() for _ in range(2)]
    rows = [list(itertools.islice(readers[i], n)) for i, n in [(0, 100), (1, 300), (0, None), (1, None)]]
    assert rows[0] + rows[2] == rows[1] + rows[3] == JSONL.splitlines()


# Errors


def test_the_next_source_is_tried_only_when_one_is_unreachable(hub, read, monkeypatch, caplog):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    monkeypatch.setenv("MODELSCOPE_DOMAIN", DOWN)
    with caplog.at_level(logging.WARNING):
        rows, dataset = read(uri("modelscope", "a.jsonl"), uri("hf", "a.jsonl"))
    assert (len(rows), dataset.uri) == (len(ROWS), uri("hf", "a.jsonl"))
    assert "modelscope://" in caplog.text and "127.0.0.1:9" in caplog.text
    with pytest.raises(NotFound):
        read(uri("hf", "b.jsonl"), uri("hf", "a.jsonl"))


def test_the_storage_behind_the_hub_may_be_what_is_unreachable(hub, read, monkeypatch, tmp_path):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    (tmp_path / "b.jsonl").write_bytes(b"x")
    hub.status["a.jsonl"] = 502
    assert read(uri("hf"), str(tmp_path / "b.jsonl"))[0] == [b"x"]


def test_all_unreachable_is_one_line_with_all(hub, read, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_DOMAIN", DOWN)
    monkeypatch.setenv("HF_ENDPOINT", DOWN)
    with pytest.raises(Unreachable) as error:
        read(uri("modelscope", "a.jsonl"), uri("hf", "a.jsonl"))
    message = str(error.value)
    assert "\n" not in message
    for part in (uri("modelscope", "a.jsonl"), uri("hf", "a.jsonl"), "MODELSCOPE_ENDPOINT", "HF_ENDPOINT"):
        assert part in message


@FORMS
@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("what", [ID, "a.jsonl"])
def test_no_permission(form, status, what, hub, read):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    hub.status[what] = status
    variable = {"hf": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[form]
    with pytest.raises(NoPermission, match=variable) as error:
        read(uri(form, "a.jsonl"), "other.jsonl")
    assert "\n" not in str(error.value) and "a.jsonl" in str(error.value)


@FORMS
@pytest.mark.parametrize("storage", ["localhost", "127.0.0.1"])
def test_the_token_is_shown_although_netrc_has_another(form, storage, hub, read, monkeypatch, tmp_path):
    """What ~/.netrc has for the hub was shown instead: 401, and the advice to set what was set (huggingface_hub #2765).

    Storage of the hub's own host is asked with the token too, storage elsewhere without.
    """
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else", encoding="utf-8")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    hub.token, hub.storage = "secret", storage
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "secret")
    assert len(read(uri(form))[0]) == len(ROWS)
    assert hub.requests[-1].token is (storage == "127.0.0.1")


@FORMS
def test_the_token_is_shown_to_the_hub(form, hub, read, monkeypatch):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    hub.token = "secret"
    with pytest.raises(NoPermission):
        read(uri(form))
    monkeypatch.setenv({"hf": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[form], "secret")
    assert len(read(uri(form))[0]) == len(ROWS)
    assert not hub.requests[-1].token  # the storage is another host


@FORMS
@pytest.mark.parametrize("rest", ["owner/other/a.jsonl", ID + "/b.jsonl", ID + "@v7/a.jsonl", ID + "/README.md"])
def test_not_found(form, rest, hub, read):
    hub.add("dataset", ID, {"a.jsonl": JSONL, "README.md": b""})
    with pytest.raises(NotFound) as error:
        read(f"{form}://datasets/{rest}")
    assert "\n" not in str(error.value) and rest in str(error.value)


@pytest.mark.parametrize("bad", ["hf://datasets/name", "https://example.org/a/b.jsonl", "s3://a/b", "hf://models/a"])
def test_uris_of_no_known_form(bad, hub, read):
    with pytest.raises(SourceError, match="not of the form"):
        read(bad)


@FORMS
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_wrong_checksum(form, name, hub, read, tmp_path):
    repository = hub.add("dataset", ID, {name: JSONL if name == "a.jsonl" else table(ROWS)})
    repository.sha256[name] = "0" * 64
    with pytest.raises(WrongChecksum, match="sha256"):
        read(uri(form))
    assert list((tmp_path / "spool").iterdir()) == []


def test_size_other_than_listed(hub, read):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    listing = hub.repositories["dataset", ID]
    hub.repositories["dataset", ID].files["a.jsonl"] = JSONL
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsa.data.hubs.HuggingFace.files", lambda *_: (listing.commit, [sources.File("a.jsonl", 10)]))
        with pytest.raises(SourceError, match="the hub lists 10"):
            read(uri("hf"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_damaged_files(name, hub, read):
    data = {"a.jsonl.gz": gzip.compress(JSONL), "a.jsonl.zst": zstd(JSONL), "a.parquet": table(ROWS)}[name]
    hub.add("dataset", ID, {name: data[:-20]})
    with pytest.raises(SourceError, match=f"{name} cannot be read") as error:
        read(uri("hf"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_disk_too_small(name, hub, read, monkeypatch):
    hub.add("dataset", ID, {name: JSONL if name == "a.jsonl" else table(ROWS)})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(DiskTooSmall, match=r"0\.\d+ GB are needed in .* 0\.00 GB are free.*DSA_SCRATCH"):
        read(uri("hf"))
    assert hub.sent(name) == 0


def test_disk_full_while_writing(hub, read, tmp_path, monkeypatch):
    hub.add("dataset", ID, {"a.jsonl": JSONL})

    class Full(io.FileIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(http, "open", lambda path, mode, buffering: Full(path, mode), raising=False)
    with pytest.raises(DiskTooSmall, match="DSA_SCRATCH"):
        read(uri("hf"))


# Local files and the hub's cache


def test_a_local_clone_is_read_like_the_hub(read, tmp_path):
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    (clone / ".git").mkdir()
    (clone / ".git" / "x.jsonl").write_bytes(b"not data")
    (clone / "data" / "b.jsonl.gz").write_bytes(gzip.compress(b"2\n3"))
    (clone / "a.jsonl").write_bytes(b"1")
    (clone / "c.parquet").write_bytes(table([{"id": 4}]))
    (clone / "README.md").write_bytes(b"#")
    rows, dataset = read(str(clone))
    assert rows == [b"1", b'{"id": 4}', b"2", b"3"]
    assert [f.name for f in dataset.files] == ["a.jsonl", "c.parquet", "data/b.jsonl.gz"]
    assert (dataset.revision, dataset.fetched_bytes) == (None, 0)
    assert dataset.read_bytes == sum(f.size for f in dataset.files)
    assert read(str(clone / "data" / "b.jsonl.gz"))[0] == [b"2", b"3"]
    with pytest.raises(NotFound):
        read(str(clone / "none"))
    (clone / "a.jsonl").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(SourceError, match="git lfs pull"):
        read(str(clone))


def test_offline_the_hubs_cache_is_used(hub, read, monkeypatch):
    hub.add("dataset", ID, {"data/a.jsonl": JSONL, "b.jsonl": b"x"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE is set"):
        read(uri("hf", "data/a.jsonl"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.hf_hub_download(ID, "data/a.jsonl", repo_type="dataset", endpoint=hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.paths.clear()
    for path in ("data/a.jsonl", "data", ""):
        rows, dataset = read(uri("hf", path))
        assert b"\n".join(rows) + b"\n" == JSONL
        assert dataset.revision == hub.repositories["dataset", ID].commit
        assert dataset.files[0].name == "data/a.jsonl"
    with pytest.raises(Unreachable):
        read(uri("hf", "b.jsonl"))
    assert hub.paths == []


# Models


@pytest.fixture
def fetch(tmp_path):
    def call(*uris):
        return sources.fetch_model(list(uris), tmp_path / "model", tmp_path / "spool", delay=0)

    return call


@pytest.mark.parametrize("form", ["hf", "modelscope", "local"])
def test_a_model_is_brought_whole_and_nothing_else(form, hub, fetch, tmp_path):
    files = model_files()
    repository = hub.add("model", "Qwen/Qwen2.5-0.5B", files)
    source = f"{form}://Qwen/Qwen2.5-0.5B"
    if form == "local":
        source = str(tmp_path / "clone")
        for name, data in files.items():
            (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "clone" / name).write_bytes(data)
    else:
        hub.breaks = [None] * 4 + [100, 1000, None]
    result = fetch(source)
    wanted = {name: data for name, data in files.items() if "not wanted" not in str(data)}
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == wanted
    assert result["source"] == source
    assert result["files"] == {n: {"bytes": len(d), "sha256": repository.sha256[n]} for n, d in wanted.items()}
    assert result["revision"] is None if form == "local" else repository.commit.startswith(result["revision"])
    assert not (tmp_path / "spool").exists() or not list((tmp_path / "spool").iterdir())


@pytest.mark.parametrize("form", ["hf", "modelscope"])
@pytest.mark.parametrize(
    ("missing", "named"),
    [("config.json", "config.json"), ("model.safetensors", r"\*\.safetensors"), ("tokenizer.json", "tokenizer.json")],
)
def test_a_model_that_lacks_a_file(form, missing, named, hub, fetch):
    hub.add("model", "a/b", model_files(**{missing: None}))
    with pytest.raises(NotFound, match=f"{form}://a/b: no {named}"):
        fetch(f"{form}://a/b")
    assert hub.requests == []


def test_a_model_that_lacks_a_shard(hub, fetch):
    index = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}).encode()
    hub.add("model", "a/b", model_files(**{"model.safetensors.index.json": index}))
    with pytest.raises(NotFound, match=r"no model-2\.safetensors there"):
        fetch("hf://a/b")


@FORMS
def test_weights_with_the_wrong_checksum(form, hub, fetch, tmp_path):
    repository = hub.add("model", "a/b", model_files())
    right = repository.sha256["model.safetensors"]
    repository.sha256["model.safetensors"] = "1" * 64
    with pytest.raises(WrongChecksum, match="sha256"):
        fetch(f"{form}://a/b")
    repository.sha256["model.safetensors"] = right
    assert fetch(f"{form}://a/b")["files"]["model.safetensors"]["sha256"] == right


def test_weights_that_are_cut_short(hub, fetch):
    hub.add("model", "a/b", model_files(**{"model.safetensors": model_files()["model.safetensors"][:-100]}))
    with pytest.raises(SourceError, match=r"model\.safetensors is damaged, cut short"):
        fetch("hf://a/b")


def test_a_model_offline_and_from_the_second_source(hub, fetch, monkeypatch):
    hub.add("model", "a/b", model_files())
    first = fetch("hf://a/b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch("hf://a/b") == first
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", DOWN)
    assert fetch("hf://a/b") == first
    hub.add("model", "c/d", model_files())
    assert fetch("hf://c/d", "modelscope://c/d")["source"] == "modelscope://c/d"
    with pytest.raises(Unreachable, match="HF_ENDPOINT"):
        fetch("hf://c/d")
    with pytest.raises(NotFound, match="no such folder"):
        fetch("models/none")


@FORMS
def test_a_private_model(form, hub, fetch):
    hub.add("model", "a/b", model_files())
    hub.token = "secret"
    with pytest.raises(NoPermission):
        fetch(f"{form}://a/b")
