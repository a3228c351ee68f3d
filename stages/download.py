"""Stage `download`: of each data source the slice that has enough usable rows, line by line as published.

The sources are streamed: a scan, the same as the stage that selects the rows makes, says when to stop. The cpu
profile's source `python-packages` is no hub: it makes rows with the schemas of deepctrl-sft-data and COIG-P from the
sources of the installed packages.
"""

import json
from collections import deque
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

from dsa.data import corpus, sources
from dsa.data.import_order import families
from dsa.data.scan import LongRows, Pairs, Scan, TooManyBadRows
from stages import params
from stages.common import measured
from stages.files import line_writer, write_json

RAW = Path("data/raw")
PACKAGES = "python-packages"
STREAM_ROOM = 2 * 10**9  # bytes of disk to be free for the slice of a source; nobody knows how much it will be
CORPUS_SEED = 0  # not the experiment's: another seed of the experiment trains on the same rows
ROW_CHARS = (0.7, 3.2, 2.7)  # of a row, least, most and likeliest, times data.max_length: some are too short or cut
FILES_SUFFICE = 8192  # tokens; longer rows are made of whole packages, in import order
PAIR_CHARS = (900, 1_500, 1_300)  # of a pair's prompt: short, for a pair is two rows


class PythonPackages:
    """A "hub" without a network, with the face of `dsa.data.sources.Dataset`."""

    def __init__(self, make, separated: tuple[list, list, int], row_fraction: float, count: int, chars: tuple):
        self.uri, self.revision, self.files, self.fetched_bytes = PACKAGES, None, [], 0
        self.train, self.test, self.near_copies = separated
        sides = [self.train, self.test]
        if chars[0] > ROW_CHARS[0] * FILES_SUFFICE:
            sides = [families(side) for side in sides]
        self.rows = make(sides, [1 - row_fraction, row_fraction], count, CORPUS_SEED, chars)

    def lines(self) -> Iterator[bytes]:
        for row in self.rows:
            yield json.dumps(row, ensure_ascii=False).encode()

    def check_unchanged(self) -> None:
        pass

    def summary(self) -> dict:
        return {
            "train_files": len(self.train),
            "test_files": len(self.test),
            "test_files_dropped_as_near_copies": self.near_copies,
            "test_families": sorted({file.family for file in self.test}),
        }


def fetch(name: str, dataset, scan: Scan, wanted: int) -> dict:
    """Copy lines to data/raw/<name>.jsonl.gz until the scan has kept `wanted` rows, or to the end."""
    need = min(sum(file.size for file in dataset.files), STREAM_ROOM)
    with (
        sources.room(RAW, need, name),
        line_writer(RAW / f"{name}.jsonl.gz") as write,
        tqdm(total=wanted, desc=name, unit=" usable rows") as progress,
    ):
        read: deque[bytes] = deque()  # but not written: a scan reads ahead

        def copied() -> Iterator[bytes]:
            for line in dataset.lines():
                read.append(line)
                yield line

        def write_scanned() -> None:
            nonlocal written
            for _ in range(scan.tally.scanned - written):
                write(read.popleft())
            written = scan.tally.scanned

        written = 0
        for _ in islice(scan(copied()), wanted):
            write_scanned()
            megabytes, seconds = dataset.fetched_bytes / 1e6, progress.format_dict["elapsed"]
            fetched = f"{megabytes:,.1f} MB fetched, {megabytes / max(seconds, 1e-3):,.1f} MB/s"
            progress.set_postfix_str(f"{scan.tally.scanned:,} rows, {fetched}", refresh=False)
            progress.update()
        write_scanned()
    dataset.check_unchanged()
    return {
        "source": dataset.uri,
        "revision": dataset.revision,
        "files": [vars(file) for file in dataset.files],
        "fetched_bytes": dataset.fetched_bytes,
        "complete": scan.tally.kept == wanted,
        **scan.tally.summary(),
    }


def main() -> None:
    p = params.load("download")
    data, preference = p.data, p.preference
    metrics: dict = {}
    tokenizer = AutoTokenizer.from_pretrained("models/base")

    @cache
    def separated() -> tuple[list, list, int]:
        return corpus.separate(corpus.source_files(data.packages), data.test_fraction)

    def open_source(uris: list[str], make, fraction: float, count: int | None, chars: tuple):
        if PACKAGES not in uris:
            return sources.open_dataset(uris)
        if count is None:
            raise params.ParamsError(f"profiles: the source {PACKAGES} needs the key rows")
        return PythonPackages(make, separated(), fraction, count, chars)

    with measured(metrics), params.one_line(sources.SourceError, TooManyBadRows, ModuleNotFoundError):
        long_rows = LongRows(tokenizer, data.max_length, data.max_bad_rows, data.min_tokens)
        chars = tuple(round(data.max_length * share) for share in ROW_CHARS)
        dataset = open_source(data.source, corpus.rows, data.test_fraction, data.rows, chars)
        metrics["sft"] = fetch("sft", dataset, long_rows, data.samples)
        pairs = Pairs(tokenizer, preference.max_length, preference.max_bad_rows, preference.domains)
        fraction = preference.test_fraction
        dataset = open_source(preference.source, corpus.preference_rows, fraction, preference.rows, PAIR_CHARS)
        metrics["preference"] = fetch("preference", dataset, pairs, preference.pairs)
    if isinstance(dataset, PythonPackages):
        metrics["python_packages"] = dataset.summary()
    write_json(Path("reports/data/download.json"), metrics)


if __name__ == "__main__":
    main()
