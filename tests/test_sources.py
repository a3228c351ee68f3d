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

import httpx2
import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
from hub import Hub
from pyarrow import parquet
from safetensors.numpy import save

from dsa.data import hubs, sources
from dsa.data.hubs import SourceError, Unreachable
from dsa.data.rows import BadRow
from dsa.data.scan import parse

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
    monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts
    with Hub() as server:
        server.set_environment(monkeypatch, tmp_path / "cache")
        yield server


NOISE = [{"input": np.random.default_rng(i).bytes(500).hex()} for i in range(600)]  # several blocks in every format
_lines = b"".join(json.dumps(row).encode() + b"\n" for row in NOISE)
FORMATS = {
    "a.jsonl": _lines,
    "a.jsonl.gz": gzip.compress(_lines),
    "a.jsonl.zst": zstd(_lines),
    "a.parquet": table(NOISE),
}


@pytest.fixture
def blocks(monkeypatch):
    """Small ones, several for each file."""
    monkeypatch.setattr(hubs, "BLOCK", 2**14)
    monkeypatch.setattr(sources, "BUFFER", 100)


def read(*uris, count=None):
    """The rows of these sources, at most `count`."""
    dataset = sources.open_dataset(list(uris))
    return list(itertools.islice(dataset.lines(), count)), dataset


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
def test_every_format_gives_the_rows_of_the_file(form, name, data, hub):
    repository = hub.add("dataset", ID, {name: data, "README.md": b"# rows"})
    rows, dataset = read(uri(form, name))
    assert [json.loads(row) for row in rows] == ROWS
    if ".jsonl" in name:
        assert b"\n".join(rows) + b"\n" == JSONL
    assert dataset.fetched_bytes == hub.sent(name) == len(data)
    assert [(f.name, f.size, f.sha256) for f in dataset.files] == [(name, len(data), repository.sha256[name])]
    assert repository.commit.startswith(dataset.revision)
    assert dataset.uri == uri(form, name)


def test_a_folder_is_read_in_the_order_of_names_and_only_as_far_as_asked(hub):
    hub.add("dataset", ID, {"data/b.parquet": table(ROWS[300:]), "data/a.parquet": table(ROWS[:300]), "c.jsonl": b"x"})
    rows, dataset = read(uri("hf", "data"), count=300)
    assert [json.loads(row) for row in rows] == ROWS[:300]
    assert [f.name for f in dataset.files] == ["data/a.parquet", "data/b.parquet"]
    assert hub.sent("data/b.parquet") == 0
    assert [json.loads(row) for row in read(uri("hf", "data"))[0]] == ROWS
    assert read(uri("modelscope"))[1].files[0].name == "c.jsonl"


def test_bytes_come_as_published(hub):
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
def test_empty_file(form, lengths, hub):
    hub.lengths = lengths
    hub.add("dataset", ID, {"a.jsonl": b"", "b.jsonl": b"x"})
    assert read(uri(form))[0] == [b"x"]


def test_many_files_come_in_pages(hub, monkeypatch):
    monkeypatch.setattr(hubs.ModelScope, "PAGE", 4)
    hub.add("dataset", ID, {f"{i:03}.jsonl": b"%d" % i for i in range(23)})
    assert read(uri("modelscope"))[0] == [b"%d" % i for i in range(23)]


def test_text_that_a_table_stores_as_bytes_is_text(hub):
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
def test_bytes_of_a_table_that_are_not_utf8_make_one_bad_row(kind, hub):
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
def test_types_that_json_lacks_are_refused_by_name(value, hub):
    """They were trained on as Python writes them."""
    hub.add("dataset", ID, {"a.parquet": table([{"id": 1, "output": [{"when": value}]}])})
    with pytest.raises(SourceError, match=f"a.parquet: column output: JSON has no {type(value).__name__}") as error:
        read(uri("hf"))
    assert "\n" not in str(error.value)


# Broken connections


@FORMS
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_broken_connection_loses_and_doubles_nothing(form, name, hub, blocks):
    hub.add("dataset", ID, {name: FORMATS[name]})
    hub.breaks = [1000, 0, None, 301, 1, None]
    found, dataset = read(uri(form))
    assert [json.loads(row) for row in found] == NOISE
    assert not hub.breaks and dataset.fetched_bytes == hub.sent(name) - 1302
    dataset.check_unchanged()


@FORMS
def test_a_stream_that_ends_early_is_not_the_end_of_the_file(form, hub, blocks):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    hub.lengths = False  # the connection's end is all that tells
    assert [json.loads(row) for row in read(uri(form))[0]] == ROWS
    hub.breaks = [None, 200]
    with pytest.raises(SourceError, match=r"a\.jsonl: the server sends 200 bytes"):
        read(uri(form))


@FORMS
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_it_gives_up_after_some_attempts(form, name, hub, blocks):
    """What the libraries in between make of the error of a read is one line too."""
    hub.add("dataset", ID, {name: FORMATS[name]})
    hub.breaks = [None, 1000] + [0] * 20
    variable = {"hf": "HF_ENDPOINT", "modelscope": "MODELSCOPE_ENDPOINT"}[form]
    with pytest.raises(Unreachable, match=rf"{name}: no answer from 127\.0\.0\.1:\d+ .*{variable}") as error:
        list(sources.open_dataset([uri(form)]).lines())
    assert "\n" not in str(error.value)
    assert 4 <= len(hub.requests) <= 7


@FORMS
@pytest.mark.parametrize("what", [ID, "a.jsonl"])
@pytest.mark.parametrize("status", [400, 410, 412, 416, 418, 429, 500, 504])
def test_every_refusal_is_one_line(form, what, status, hub):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    hub.status[what] = status
    with pytest.raises(SourceError, match=rf"^{uri(form)}: .*") as error:
        read(uri(form))
    assert "\n" not in str(error.value)
    assert isinstance(error.value, Unreachable) == (status in (429, 500, 504))


@FORMS
@pytest.mark.parametrize("what", [ID, "a.jsonl"])
def test_a_server_that_is_busy_is_asked_again(form, what, hub, monkeypatch):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    hub.status[what] = 503
    monkeypatch.setattr("time.sleep", lambda _: len(hub.paths) < 3 or hub.status.clear())
    assert len(read(uri(form))[0]) == len(ROWS)


def test_pauses_grow(monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)

    def attempt():
        headers = {"Retry-After": "6"} if len(pauses) == 1 else {}
        httpx2.Response(429, headers=headers, request=httpx2.Request("GET", "https://a")).raise_for_status()

    with pytest.raises(Unreachable, match=r"^file: a answers 429: set MODELSCOPE_ENDPOINT"):
        hubs.ModelScope().patiently("file", attempt)
    assert pauses == [1, 6, 4, 8]


@FORMS
def test_a_server_without_range(form, hub, monkeypatch):
    """A file that is one block is read; of a longer one the wrong bytes would be."""
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    hub.ranges = False
    hub.breaks = [1000, 500, None]
    rows, dataset = read(uri(form))
    assert [json.loads(row) for row in rows] == ROWS
    assert dataset.fetched_bytes == len(JSONL)
    monkeypatch.setattr(hubs, "BLOCK", 4096)
    monkeypatch.setattr(sources, "BUFFER", 100)
    with pytest.raises(SourceError, match="parts of files"):
        read(uri(form))


HTML = b"<html>Sign in to the wireless network</html>"


@pytest.mark.parametrize(
    ("form", "answer"), [("hf", HTML), *(("modelscope", answer) for answer in (HTML, b"[1]", b'{"Data": [1]}', b"{}"))]
)
def test_what_no_hub_answers_is_one_line(form, answer, hub):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    hub.answer = answer
    with pytest.raises(SourceError) as error:
        read(uri(form))
    assert uri(form) in str(error.value) and "\n" not in str(error.value)


# The head of a large file


@FORMS
@pytest.mark.parametrize("compress", [bytes, zstd])
def test_the_first_rows_of_a_large_file_take_a_few_megabytes(form, compress, hub):
    line = json.dumps({"input": "x" * 100}).encode() + b"\n"
    name = "a.jsonl" if compress is bytes else "a.jsonl.zst"
    noise = np.random.default_rng(0).integers(0, 256, 48 * 2**20, dtype=np.uint8).tobytes()
    data = line * 1000 + noise.replace(b"\n", b" ")
    hub.add("dataset", ID, {name: compress(data)})
    rows, dataset = read(uri(form), count=100)
    assert rows == [line[:-1]] * 100
    assert dataset.fetched_bytes == hub.sent(name) <= 6 * 2**20


def test_the_head_of_a_table_does_not_take_the_whole_file(hub, monkeypatch):
    monkeypatch.setattr(hubs, "BLOCK", 2**16)
    out, noise = io.BytesIO(), np.random.default_rng(0)
    rows = [{"input": noise.bytes(1000).hex()} for _ in range(4000)]
    parquet.write_table(pa.Table.from_pylist(rows), out, row_group_size=400)
    hub.add("dataset", ID, {"a.parquet": out.getvalue()})
    found, dataset = read(uri("hf"), count=100)
    assert [json.loads(row) for row in found] == rows[:100]
    assert dataset.fetched_bytes < len(out.getvalue()) / 4


@pytest.mark.parametrize("size", ["same", "other"])
def test_a_change_while_rows_are_in_use_is_an_error(size, hub, blocks):
    """ModelScope's master moves; a commit on the other hub does not."""
    repository = hub.add("dataset", ID, {"a.jsonl": JSONL})
    _, dataset = read(uri("modelscope"), count=1)
    new = JSONL.replace(b"input", b"INPUT") + (b"" if size == "same" else b"more\n")
    hub.add("dataset", ID, {"a.jsonl": new})
    assert repository is not hub.repositories["dataset", ID]
    with pytest.raises(SourceError, match="changed on the server while it was read" if size == "same" else "hub lists"):
        list(dataset.lines())
        dataset.check_unchanged()


# Errors


def test_the_next_source_is_tried_only_when_one_is_unreachable(hub, monkeypatch, caplog):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    monkeypatch.setenv("MODELSCOPE_DOMAIN", DOWN)
    with caplog.at_level(logging.WARNING):
        rows, dataset = read(uri("modelscope", "a.jsonl"), uri("hf", "a.jsonl"))
    assert (len(rows), dataset.uri) == (len(ROWS), uri("hf", "a.jsonl"))
    assert "modelscope://" in caplog.text and "127.0.0.1:9" in caplog.text
    with pytest.raises(SourceError, match="no data file there"):
        read(uri("hf", "b.jsonl"), uri("hf", "a.jsonl"))


def test_the_storage_behind_the_hub_may_be_what_is_unreachable(hub, monkeypatch, tmp_path):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    (tmp_path / "b.jsonl").write_bytes(b"x")
    hub.status["a.jsonl"] = 502
    assert read(uri("hf"), str(tmp_path / "b.jsonl"))[0] == [b"x"]


def test_all_unreachable_is_one_line_with_all(hub, monkeypatch):
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
def test_no_permission(form, status, what, hub):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    hub.status[what] = status
    variable = {"hf": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[form]
    with pytest.raises(SourceError, match=rf"refuses .*{variable}") as error:
        read(uri(form, "a.jsonl"), "other.jsonl")
    assert "\n" not in str(error.value) and "a.jsonl" in str(error.value)


@FORMS
@pytest.mark.parametrize("storage", ["localhost", "127.0.0.1"])
def test_the_token_is_shown_although_netrc_has_another(form, storage, hub, monkeypatch, tmp_path):
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
def test_the_token_is_shown_to_the_hub(form, hub, monkeypatch):
    hub.add("dataset", ID, {"a.jsonl": JSONL})
    hub.token = "secret"
    with pytest.raises(SourceError, match=r"refuses \(401\)"):
        read(uri(form))
    monkeypatch.setenv({"hf": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[form], "secret")
    assert len(read(uri(form))[0]) == len(ROWS)
    assert not hub.requests[-1].token  # the storage is another host


@FORMS
@pytest.mark.parametrize("rest", ["owner/other/a.jsonl", ID + "/b.jsonl", ID + "@v7/a.jsonl", ID + "/README.md"])
def test_not_found(form, rest, hub):
    hub.add("dataset", ID, {"a.jsonl": JSONL, "README.md": b""})
    with pytest.raises(SourceError, match=r"not found|no data file|says") as error:
        read(f"{form}://datasets/{rest}")
    assert "\n" not in str(error.value) and rest in str(error.value)


@pytest.mark.parametrize("bad", ["hf://datasets/name", "https://example.org/a/b.jsonl", "s3://a/b", "hf://models/a"])
def test_uris_of_no_known_form(bad, hub):
    with pytest.raises(SourceError, match="not of the form"):
        read(bad)


@pytest.mark.parametrize("listed", [10, len(JSONL) + 10])
def test_size_other_than_listed(listed, hub, monkeypatch):
    commit = hub.add("dataset", ID, {"a.jsonl": JSONL}).commit
    monkeypatch.setattr(hubs.ModelScope, "files", lambda *_: (commit, [hubs.File("a.jsonl", listed)]))
    with pytest.raises(SourceError, match=f"the hub lists {listed}"):
        read(uri("modelscope"))


@FORMS
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_damaged_files(form, name, hub):
    data = {"a.jsonl.gz": gzip.compress(JSONL), "a.jsonl.zst": zstd(JSONL), "a.parquet": table(ROWS)}[name]
    hub.add("dataset", ID, {name: data[:-20]})
    with pytest.raises(SourceError, match=f"{name} cannot be read") as error:
        read(uri(form))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("free", [1000, 10**12])
def test_disk_too_small(free, monkeypatch, tmp_path):
    """Before the first byte, or while it is written."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, free))
    needed = r"rows: 5\.20 GB are needed in .* and 0\.00 GB are free: free some"
    with (
        pytest.raises(SourceError, match=needed if free == 1000 else "rows: no room left in"),
        hubs.room(tmp_path / "raw", 5 * 10**9, "rows"),
    ):
        assert free > 1000
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Local files and the hub's cache


def test_a_local_clone_is_read_like_the_hub(tmp_path):
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
    assert read(str(clone / "data" / "b.jsonl.gz"))[0] == [b"2", b"3"]
    with pytest.raises(SourceError, match="no such file or folder"):
        read(str(clone / "none"))
    (clone / "a.jsonl").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(SourceError, match="git lfs pull"):
        read(str(clone))


def test_offline_the_hubs_cache_is_used(hub, monkeypatch):
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
        return sources.fetch_model(list(uris), tmp_path / "model")

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


@pytest.mark.parametrize("form", ["hf", "modelscope"])
@pytest.mark.parametrize(
    ("missing", "named"),
    [("config.json", "config.json"), ("model.safetensors", r"\*\.safetensors"), ("tokenizer.json", "tokenizer.json")],
)
def test_a_model_that_lacks_a_file(form, missing, named, hub, fetch):
    hub.add("model", "a/b", model_files(**{missing: None}))
    with pytest.raises(SourceError, match=f"{form}://a/b: no {named}"):
        fetch(f"{form}://a/b")
    assert hub.requests == []


def test_a_model_that_lacks_a_shard(hub, fetch):
    index = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}).encode()
    hub.add("model", "a/b", model_files(**{"model.safetensors.index.json": index}))
    with pytest.raises(SourceError, match=r"no model-2\.safetensors there"):
        fetch("hf://a/b")


@FORMS
def test_weights_with_the_wrong_checksum(form, hub, fetch, tmp_path):
    repository = hub.add("model", "a/b", model_files())
    right = repository.sha256["model.safetensors"]
    repository.sha256["model.safetensors"] = "1" * 64
    with pytest.raises(SourceError, match="sha256"):
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
    with pytest.raises(SourceError, match="no such folder"):
        fetch("models/none")


@FORMS
def test_a_private_model(form, hub, fetch):
    hub.add("model", "a/b", model_files())
    hub.token = "secret"
    with pytest.raises(SourceError, match=r"refuses \(401\)"):
        fetch(f"{form}://a/b")
