"""Stage `download`: the scanned slice of the data source, as published, to data/raw/.

The cpu profile's source is `python-packages`: rows in deepctrl-sft-data's schema, made from the installed packages.
"""

from pathlib import Path

from tqdm import tqdm

from dsa import corpus
from stages import params
from stages.common import measured, write_json, write_rows

CORPUS_SEED = 0  # not the experiment's: another seed of the experiment trains on the same rows


def main() -> None:
    data = params.load("download").data
    if data.source != "python-packages":
        raise params.ParamsError(f"data.source: {data.source!r} is not python-packages")
    metrics: dict = {}
    with measured(metrics):
        train, test, near_copies = corpus.separate(corpus.source_files(data.packages), data.test_fraction)
        shares = [1 - data.test_fraction, data.test_fraction]
        rows = corpus.rows([train, test], shares, data.rows, CORPUS_SEED)
        write_rows(Path("data/raw/sft.jsonl.gz"), tqdm(rows, total=data.rows, desc="rows"))
    metrics |= {
        "rows": data.rows,
        "train_files": len(train),
        "test_files": len(test),
        "test_files_dropped_as_near_copies": near_copies,
        "test_families": sorted({file.family for file in test}),
    }
    write_json(Path("reports/data/download.json"), metrics)


if __name__ == "__main__":
    main()
