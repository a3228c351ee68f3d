"""Which models a page was made from, by dvc.lock."""

from collections.abc import Iterable
from pathlib import Path

from ruamel.yaml import YAML

LOCK = Path("dvc.lock")


def model_hashes(paths: Iterable[str]) -> dict[str, str | None]:
    """The hash of each model that dvc.lock has, None for one that it does not have."""
    stages = YAML(typ="safe").load(LOCK.read_text(encoding="utf-8"))["stages"] if LOCK.exists() else {}
    known = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", ())}
    return {path: known.get(path) for path in paths}


def made_elsewhere(run: dict) -> bool:
    """Whether the numbers of a study (its `run`) are of other models than those of dvc.lock, or may be."""
    models = run.get("models")
    return not models or None in models.values() or models != model_hashes(models)
