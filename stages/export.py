"""A trained model for others: `python -m stages.export OUT [--arm dsa] [--push OWNER/NAME]`, after `dvc repro`.

OUT then holds weights, tokenizer, the code (dsa/export.py) and a model card with the run's numbers; `--push` puts it on
a hub too. From either `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` loads it. For the arm warmup,
OUT has indexer.safetensors beside: `dsa.load_indexer` joins it to a base that the hub already has.
"""

import argparse
import json
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoTokenizer

from dsa import export_model, load_model, save_indexer
from dsa.export import push
from stages import params
from stages.arms import LABELS, model_of
from stages.common import git_commit
from stages.markdown import page

REPORTS = Path("reports")
FILES = ("data/model.json", "data/filter.json", "report.json")
REFERENCE = {"dsa": "dense", "warmup": "base"}  # the same weights, or the same budget, under dense attention


def card(model, arm: str) -> str:
    """The model card of an arm, in Markdown."""
    p = params.load()
    read = {name: json.loads((REPORTS / name).read_text(encoding="utf-8")) for name in FILES}
    base, rows, report = (read[name] for name in FILES)
    found = {row["arm"]: row for table in ("trained", "untrained") for row in report[table]}
    own, other = found[arm], found[REFERENCE[arm]]
    context = {
        "p": p,
        "config": model.config,
        "label": LABELS[arm],
        "reference": LABELS[REFERENCE[arm]],
        "base": base["source"] + (f" at {base['revision']}" if base["revision"] else ""),
        "hub_id": base["source"].removeprefix("hf://").split("@")[0] if base["source"].startswith("hf://") else None,
        "rows": rows,
        "loss": own["loss"],
        "loss_dense": other["loss"],
        "gap": own["gap"][0],
        "gap_ci": own["gap"][1],
        "share": own["retrieval_tokens"] if own["lookups"] else None,
        "share_dense": other["retrieval_tokens"],
        "backbone": sum(parameter.numel() for parameter in model.backbone_parameters()),
        "indexer": sum(parameter.numel() for parameter in model.indexer_parameters()),
        "commit": git_commit(),
    }
    return page(Path(__file__).with_name("model_card.md.jinja"), context)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--arm", choices=REFERENCE, default="dsa")
    parser.add_argument("--push", metavar="OWNER/NAME", help="where to on a hub: of HF_ENDPOINT, with HF_TOKEN")
    asked = parser.parse_args(arguments)
    path = model_of(asked.arm)
    if not Path(path).is_dir():
        raise SystemExit(f"{path}: not there, `dvc repro` trains it and `dvc pull` fetches it")
    if asked.out.exists() and (not asked.out.is_dir() or any(asked.out.iterdir())):
        raise SystemExit(f"{asked.out}: is there already")
    p = params.load()
    model = load_model(path, attention_mode="sparse", index_topk=p.topk)  # the warm-up's own mode is dense
    export_model(model, asked.out, AutoTokenizer.from_pretrained(path), card(model, asked.arm))
    if asked.arm == "warmup":
        save_indexer(model, asked.out / "indexer.safetensors")
    if asked.push:
        try:
            print(push(asked.out, asked.push))
        except (HfHubHTTPError, ValueError) as error:
            raise SystemExit(f"{asked.push}: {str(error).splitlines()[0]}") from None


if __name__ == "__main__":
    main()
