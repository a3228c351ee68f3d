"""Stage `model`: bring the base model to models/base."""

from pathlib import Path

from dsa.data import sources
from stages import check, params
from stages.common import measured
from stages.files import write_json

OUT = Path("models/base")


def main() -> None:
    p = params.load("model").model
    metrics: dict = {}
    with measured(metrics), params.one_line(sources.SourceError):
        metrics |= sources.fetch_model(p.source, OUT)
    for name, wanted in p.sha256.items():
        if (found := metrics["files"].get(name, {}).get("sha256")) != wanted:
            raise SystemExit(f"model.sha256: {name} from {metrics['source']} has {found}, expected {wanted}")
    check.base_model()
    write_json(Path("reports/data/model.json"), metrics)


if __name__ == "__main__":
    main()
