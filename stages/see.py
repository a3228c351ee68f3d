"""Stage `see`: what the model reads, token by token: `python -m stages.see [--model MODEL] [TEXTFILE]`.

A page without a network, on which a click on a token shows the keys that each layer selected for it, what attention to
all keys would have given them, and what was missed; and a picture of the token that loses most to a recency window of
the same k. By default both are of the longest held-out row with look-ups that fits the picture, in reports/see/; those
of a text of one's own are in see/.
"""

import argparse
import base64
import sys
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import AutoTokenizer

from dsa import load_model
from dsa.data.rows import IGNORE, examples
from dsa.evaluation.predictions import answer_spans, changed, evidence_distance, predict
from dsa.evaluation.selections import LayerSelection, selections
from dsa.masks import membership
from stages.files import read_rows
from stages.see_figure import COLORS, Page, draw

ROWS = Path("data/long/test.jsonl.gz")
LONGEST = 1536  # tokens: what a picture holds, and a page of a megabyte
ENTRIES = 24  # keys that attention wants most, of each query and layer
Layers = dict[str, LayerSelection]  # by name, those that are shown


def held_out(tokenizer, rows: list[dict]) -> dict:
    """Ids and labels of the longest row with look-ups of at most LONGEST tokens; where there is none, of the first, cut
    to as many."""
    found = examples(tokenizer, [row for row in rows if "lookup" in (row.get("type_keyword") or [])])
    fitting = [row for row in found if len(row["input_ids"]) <= LONGEST]
    return (
        max(fitting, key=lambda row: len(row["input_ids"]), default=None) or examples(tokenizer, rows[:1], LONGEST)[0]
    )


def shown(layers: list[LayerSelection]) -> Layers:
    """As many as there are colours, spread over all; where each key-value head selects for itself, of its heads."""
    every = {}
    for number, layer in enumerate(layers, start=1):
        for head in range(len(layer.indices)):
            name = f"layer {number}" + (f", head {head + 1}" if len(layer.indices) > 1 else "")
            every[name] = LayerSelection(*(x[head] for x in vars(layer).values()))
    chosen = np.linspace(0, len(every) - 1, min(len(every), len(COLORS))).round().astype(int)
    return {name: every[name] for name in np.array(list(every))[chosen].tolist()}


def packed(array: np.ndarray) -> str:
    """An array's bytes, for the page's script."""
    return base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()


def root(shares: np.ndarray) -> np.ndarray:
    """Shares as bytes: 255 times their square root, so that small ones are told apart."""
    return (255 * shares.clip(0, 1) ** 0.5).round().astype(np.uint8)


def html(about: str, pieces: list[str], says: list[tuple[str, int]], layers: Layers, topk: int, asking: int) -> str:
    """The page, which opens at the token `asking`. says: the likeliest token behind each, and its probability in %."""
    indices, wanted, mass, missed = (
        np.stack([getattr(layer, field.name).numpy() for layer in layers.values()]) for field in fields(LayerSelection)
    )
    data = {
        "about": about,
        "pieces": pieces,
        "says": says,
        "layers": list(layers),
        "topk": topk,
        "entries": wanted.shape[-1],
        "asking": asking,
        "selected": packed(np.packbits(membership(torch.from_numpy(indices), len(pieces)).numpy(), axis=-1)),
        "wanted": packed(wanted.astype("<i2")),
        "mass": packed(root(mass)),
        "missed": packed(root(missed)),
    }
    here = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=here, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return templates.get_template("see.html.jinja").render(data=data)


def evidence(pieces: list[str], labels: list[int], token: int) -> range:
    """The tokens above that have the text of the answer that `token` is in; empty where there are none."""
    for start, end in answer_spans(labels):
        distance = evidence_distance(pieces, (start, end)) if start <= token < end else None
        if distance is not None:
            first = stop = start - distance
            while "".join(pieces[start : end - 1]).strip() not in "".join(pieces[first:stop]):
                stop += 1
            return range(first, stop)
    return range(0)


def read(layer: LayerSelection, query: int) -> dict[int, float]:
    """The keys that a layer selected for a query, with what attention to all gives to each; 0 where it is little."""
    mass = dict(zip(layer.wanted[query].tolist(), layer.mass[query].tolist(), strict=True))
    return {key: mass.get(key, 0.0) for key in layer.indices[query].tolist() if key >= 0}


def look(model, tokenizer, row: dict, about: str, out: Path) -> None:
    """The page and the picture of a row. Both begin at the token, of those in answers that DSA continues rightly, whose
    continuation loses most when each query keeps its latest keys instead."""
    ids, labels, topk = row["input_ids"], row["labels"], model.config.index_topk
    observed, logits = selections(model, ids, ENTRIES)
    layers, p = shown(observed), logits.softmax(-1)
    with changed(model.config, selector="window"):
        window = predict(model, ids)
    true = torch.tensor(ids[1:])
    p_true, p_window = p[:-1].gather(1, true[:, None])[:, 0], (-window.nll).exp()
    candidates = (torch.tensor(labels[1:]) != IGNORE) & (p[:-1].argmax(-1) == true)
    asking = int((p_true.log() - p_window.log()).masked_fill(~candidates, -torch.inf).argmax())
    pieces, best = tokenizer.batch_decode([[i] for i in ids]), p.max(-1)
    says = zip(tokenizer.batch_decode(best.indices[:, None]), (100 * best.values).round().int().tolist(), strict=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "page.html").write_text(html(about, pieces, list(says), layers, topk, asking), encoding="utf-8")
    follows, other = pieces[asking + 1].strip(), tokenizer.decode([window.argmax[asking]]).strip()
    picture = Page(
        pieces=pieces[: asking + 1],
        layers={name: read(layer, asking) for name, layer in layers.items()},
        held={name: 1 - layer.missed[asking].item() for name, layer in layers.items()},
        definition=evidence(pieces, labels, asking + 1),
        window=topk,
        answer=[f"DSA: {follows!r} {p_true[asking]:.0%}", f"window: {other!r} ({follows!r} {p_window[asking]:.2%})"],
    )
    draw(picture, out / "source.png")


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.see", description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", type=Path, metavar="TEXTFILE")
    parser.add_argument("--model", default="models/dsa")
    asked = parser.parse_args(arguments)
    for path in (asked.model, asked.text or ROWS):
        if not Path(path).exists():
            raise SystemExit(f"{path}: not there")
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    model = load_model(asked.model, dtype="float32", attention_mode="sparse").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if asked.text:
        ids = tokenizer(asked.text.read_text(encoding="utf-8"))["input_ids"][:LONGEST]
        row, about, out = {"input_ids": ids, "labels": ids}, str(asked.text), "see"
    else:
        row, about, out = held_out(tokenizer, list(read_rows(ROWS))), "a held-out row", "reports/see"
    look(model, tokenizer, row, f"{asked.model}, k = {model.config.index_topk}, {about}", Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
