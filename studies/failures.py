"""Where DSA still loses to dense attention, from a finished run: by length of the context, by layer, and by row.

    python -m studies.failures                                 # minutes: reports/failures.{json,md,png}
    python -m studies.failures --from reports/failures.json    # the page again, without the models

Losses in nats a token; every difference is paired, with a 95 % interval.
"""

import copy
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from dsa import DSAForCausalLM, load_model
from dsa.data.recall import Recall
from dsa.data.rows import IGNORE, examples
from dsa.evaluation.predictions import changed, predict
from stages import params
from stages.arms import PAIR, model_of
from stages.common import device_name, git_commit
from stages.files import read_rows
from stages.lock import model_hashes
from stages.statistics import HELD_OUT, Predictions, plain
from studies import common
from studies.common import interval
from studies.failures_report import write_report

OUT = Path("reports/failures.json")
SHORTEST = 1024  # tokens of context
TAIL = 512  # tokens at the end of a text, the same ones for each length of its context
TEXTS, VALUE_ROWS, LAYER_ROWS, SHOWN = 12, 5, 6, 5
CONTEXT = 24  # tokens of text before a token that is shown
SAME = 1e-3  # nats: as near as the model's loss must come to what the stage `evaluate` wrote


class FailuresError(SystemExit):
    """str() is the one line to show."""


@contextmanager
def sparse_in(model: DSAForCausalLM, layers: Iterable[int]) -> Iterator[None]:
    """Sparse attention in these layers and dense attention in all others, each layer with a config of its own."""
    layers = set(layers)
    attentions = [layer.self_attn for layer in model.model.layers]
    shared, mode = [attention.config for attention in attentions], model.config.attention_mode
    try:
        model.config.attention_mode = "dense"  # has the dense layers' mask made; sparse ones do not read it
        for i, attention in enumerate(attentions):
            attention.config = copy.deepcopy(model.config)
            attention.config.attention_mode = "sparse" if i in layers else "dense"
        yield
    finally:
        model.config.attention_mode = mode
        for attention, config in zip(attentions, shared, strict=True):
            attention.config = config


def losses(model: DSAForCausalLM, rows: list[dict], layers: Iterable[int]) -> np.ndarray:
    """-log p of each token of the rows but their first, one after the other, with sparse attention in these layers."""
    with sparse_in(model, layers):
        return torch.cat([predict(model, row["input_ids"]).nll for row in rows]).double().numpy()


def lengths(longest: int) -> list[int]:
    """Of a context: powers of two from `SHORTEST`, and the longest that was trained."""
    powers = [SHORTEST << i for i in range((longest // SHORTEST).bit_length())]
    return [n for n in powers if n < longest] + [longest]


def ways(models: dict[str, DSAForCausalLM], topk: int, share: float) -> dict[str, tuple[DSAForCausalLM, dict]]:
    """How a context is attended to: {name: (model, changes of its config)}. share: of the longest context."""
    return {
        "dense": (models["dense"], {}),
        "every": (models["dsa"], {"attention_mode": "dense"}),
        "fixed": (models["dsa"], {"index_topk": topk}),
        "share": (models["dsa"], {"index_topk": round(share * topk)}),
    }


def text_losses(model: DSAForCausalLM, ids: list[int], length: int) -> float:
    """Mean loss of the last tokens of a text that is seen from so many tokens before its end on."""
    return predict(model, ids[-length:]).nll[-TAIL:].mean().item()


def value_losses(model: DSAForCausalLM, rows: list, seed: int, length: int) -> float:
    """Mean loss of the values that a row of pairs or needles asks for."""
    row = rows[seed % len(rows)](seed // len(rows), length)
    nll = predict(model, row.ids).nll
    return np.mean([nll[start - 1 : end - 1].mean().item() for start, end in row.spans])


def growth(gaps: np.ndarray, at: list[int], units: np.ndarray) -> dict:
    """Of gaps [rows, lengths]: the mean at each length, and how much it grows each time the length doubles."""
    doublings = np.log2(at)
    slopes = np.polyfit(doublings, gaps.T, 1)[0] if len(at) > 1 else np.zeros(len(gaps))
    return {"at": [interval(column, units) for column in gaps.T], "per_doubling": interval(slopes, units)}


def by_context(models: dict, texts: list[dict], families: np.ndarray, recall: Recall, topk: int, at: list[int]) -> dict:
    """The gap to the dense model, by length: of the same last tokens of each text, and of values to find."""
    makers = list(recall.tests.values())
    tests = {
        "text": (text_losses, [(row["input_ids"],) for row in texts], families),
        "values": (value_losses, [(makers, i) for i in range(VALUE_ROWS * len(makers))], None),
    }
    found = {}
    for test, (loss, rows, units) in tests.items():
        units = np.arange(len(rows)) if units is None else units
        table = {name: np.zeros((len(rows), len(at))) for name in ways(models, topk, 1)}
        for j, length in enumerate(tqdm(at, desc=f"lengths, {test}")):
            for name, (model, changes) in ways(models, topk, length / at[-1]).items():
                with changed(model.config, **changes):
                    table[name][:, j] = [loss(model, *row, length) for row in rows]
        gaps = {name: table[name] - table["dense"] for name in table if name != "dense"}
        found[test] = {name: growth(gap, at, units) for name, gap in gaps.items()}
        found[test] |= {"rows": len(rows), "units": len(np.unique(units)), "dense": table["dense"].mean(0)}
    return found


def by_layer(model: DSAForCausalLM, rows: list[dict], stored: np.ndarray) -> dict:
    """The answer loss where one layer alone is sparse, and where all are, minus that where none is.

    Args:
        rows: longer than k, each of another unit.
        stored: the loss of each of their tokens that the stage `evaluate` wrote for the model.

    Raises FailuresError where the model does not give them.
    """
    answers = np.concatenate([np.array(row["labels"][1:]) != IGNORE for row in rows])
    units = np.repeat(np.arange(len(rows)), [len(row["input_ids"]) - 1 for row in rows])[answers]
    layers = range(model.config.num_hidden_layers)
    dense, every = losses(model, rows, ()), losses(model, rows, layers)
    if abs((every - stored)[answers].mean()) > SAME:
        raise FailuresError("the model is not the one whose predictions are in data/evaluate: run dvc repro")
    alone = [losses(model, rows, (i,)) - dense for i in tqdm(layers, desc="layers")]
    return {
        "rows": len(rows),
        "alone": [interval(gap[answers], units) for gap in alone],
        "every": interval((every - dense)[answers], units),
    }


def by_row(model: DSAForCausalLM, tokenizer, predictions: Predictions, rows: list[dict]) -> dict:
    """Each row's gap, and of the rows where DSA loses most to dense attention the token where it loses most.

    Of both arms the loss is the stored one; "every" is that of DSA's weights with every key in sight.
    """
    gaps = (predictions.nll("dsa") - predictions.nll("dense")).astype(np.float64)
    counts = np.bincount(predictions.rows, predictions.answers, minlength=len(rows)).astype(int)
    sums = np.bincount(predictions.rows, gaps * predictions.answers, minlength=len(rows))
    means = np.divide(sums, counts, out=np.full(len(rows), -np.inf), where=counts > 0)
    shown = []
    for number in np.argsort(-means, kind="stable")[: min(SHOWN, (counts > 0).sum())].tolist():
        here, ids = predictions.rows == number, rows[number]["input_ids"]
        t = int(np.argmax(np.where(predictions.answers[here], gaps[here], -np.inf)))  # query t predicts token t + 1
        first = {arm: int(predictions.arrays[f"argmax_{arm}"][here][t]) for arm in PAIR}
        nll = {arm: predictions.nll(arm)[here][t] for arm in PAIR} | {"every": losses(model, [rows[number]], ())[t]}
        token = {
            "position": t + 1,
            "before": tokenizer.decode(ids[max(0, t + 1 - CONTEXT) : t + 1]),
            "token": tokenizer.decode([ids[t + 1]]),
            "nll": nll,
            "first": {arm: tokenizer.decode([i]) for arm, i in first.items()},
        }
        about = {"row": number, "family": predictions.families[number], "kind": predictions.kinds[number]}
        about |= {"length": len(ids), "gap": means[number], "sum": sums[number], "answer_tokens": counts[number]}
        shown.append(about | {"token": token})
    return {"gaps": means[counts > 0], "answer_tokens": counts[counts > 0], "total": sums.sum(), "shown": shown}


def analyse() -> dict:
    """All of the numbers of the page."""
    start, p = time.monotonic(), params.load()
    models = {arm: load_model(model_of(arm), dtype="float32").eval() for arm in PAIR}
    if torch.cuda.is_available():
        models = {arm: model.cuda() for arm, model in models.items()}
    tokenizer = AutoTokenizer.from_pretrained(model_of("dsa"))
    predictions, longest = Predictions(PAIR, p.data.split_by), p.data.max_length
    texts = list(read_rows(HELD_OUT))
    rows = examples(tokenizer, texts, longest)
    scored = rows[: len(predictions.arrays["lengths"])]
    if [len(row["input_ids"]) - 1 for row in scored] != predictions.arrays["lengths"].tolist():
        raise FailuresError(f"{HELD_OUT} does not hold the rows of data/evaluate: run dvc repro")
    long = [i for i, row in enumerate(rows) if len(row["input_ids"]) >= 7 * longest // 8][:TEXTS]
    families = np.unique([str(texts[i].get("data_source")) for i in long], return_inverse=True)[1]
    ids = [i for row in rows for i in row["input_ids"]]
    recall = Recall(tokenizer, torch.tensor(ids * (1 + 2 * longest // len(ids))))
    few = sorted(np.unique(predictions.unit_of, return_index=True)[1])[:LAYER_ROWS]  # each of another family
    if short := [i for i in few if len(scored[i]["input_ids"]) <= p.topk + 1]:
        raise FailuresError(f"row {short[0]} of {HELD_OUT} is no longer than k = {p.topk}: nothing to select")
    stored = np.concatenate([predictions.nll("dsa")[predictions.rows == i] for i in few])
    at = lengths(longest)
    with torch.no_grad():
        found = {
            "setup": {"topk": p.topk, "lengths": at, "tail": TAIL, "rows": len(scored), "families": predictions.count},
            "context": by_context(models, [rows[i] for i in long], families, recall, p.topk, at),
            "layers": by_layer(models["dsa"], [scored[i] for i in few], stored),
            "worst": by_row(models["dsa"], tokenizer, predictions, scored),
        }
    run = {"seconds": time.monotonic() - start, "device": device_name(), "commit": git_commit()}
    run["models"] = model_hashes([model_of(arm) for arm in PAIR])
    return plain(found | {"run": run})


def main() -> None:
    common.run(__doc__, analyse, write_report, OUT)


if __name__ == "__main__":
    main()
