"""Where DSA fails, and what its gap to dense attention is made of, from a finished run of the pipeline.

    python -m studies.failures                                 # a minute: reports/failures.{json,md}, failures/*.png
    python -m studies.failures --from reports/failures.json    # the page again, without the model

Reads the predictions of all arms (data/evaluate) and the DSA model. Losses in nats a token; every difference is paired
token by token, with a 95 % interval that has rows as the independent units.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from dsa import DSAForCausalLM, load_model
from dsa.data.rows import IGNORE, examples
from dsa.evaluation.predictions import attention_mass, observe_dense
from stages import arms
from stages.common import device_name, git_commit
from stages.evaluate import is_lookup
from stages.files import read_rows
from stages.lock import model_hashes
from stages.statistics import Predictions, plain
from studies.common import interval, write
from studies.failures_report import write_report
from studies.probes import MissedKeys, QueryStatistics, losses

OUT = Path("reports/failures.json")
CONTRASTS = {  # {arm: its sign}; stages/arms.py says what the arms are
    "base": {"warmup": 1, "base": -1},
    "base_budget": {"oracle": 1, "base": -1},
    "base_indexer": {"warmup": 1, "oracle": -1},
    "trained": {"dsa": 1, "dense": -1},
    "trained_budget": {"dsa_oracle": 1, "dense": -1},
    "trained_indexer": {"dsa": 1, "dsa_oracle": -1},
    "change": {"dsa": 1, "dense": -1, "warmup": -1, "base": 1},
    "change_budget": {"dsa_oracle": 1, "dense": -1, "oracle": -1, "base": 1},
    "change_indexer": {"dsa": 1, "dsa_oracle": -1, "warmup": -1, "oracle": 1},
}
ARMS = tuple(dict.fromkeys(arm for signs in CONTRASTS.values() for arm in signs))
ROWS, TOKENS, KEYS = 5, 3, 5  # shown: rows, tokens of a row, missed keys of a token in a layer
CONTEXT = 40  # tokens of text before a token that is shown
SMALL = 0.01  # nats: a token whose loss differs by less counts as the same
LARGEST = 0.01  # share of the tokens that differ most
SAME = 1e-3  # nats: as near as the model's loss must come to what the stage `evaluate` wrote


class FailuresError(SystemExit):
    """str() is the one line to show."""


def decomposition(predictions: Predictions, families: np.ndarray) -> dict[str, dict]:
    """`CONTRASTS` over the answer tokens of the rows that all arms have.

    families: of each row; each contrast also has its interval with these as the units, for files of a family are alike.
    """
    n = min(len(predictions.nll(arm)) for arm in ARMS)
    which = predictions.answers[:n]
    rows = predictions.rows[:n][which]
    found = {}
    for name, signs in CONTRASTS.items():
        values = sum(sign * predictions.nll(arm)[:n][which].astype(np.float64) for arm, sign in signs.items())
        found[name] = interval(values, rows)
        if len(np.unique(families[rows])) > 1:
            found[name]["by_family"] = interval(values, families[rows])
    return found


def by_layer(model: DSAForCausalLM, rows: list[dict], stored: np.ndarray) -> tuple[dict, dict]:
    """Per layer: mass@k, recall@k, and the loss where it alone is sparse; and the sinks' part in it.

    Args:
        rows: longer than k.
        stored: the loss of each of their tokens that the stage `evaluate` wrote for the model.

    Raises FailuresError where the model does not give them.
    """
    topk, sinks, count = model.config.index_topk, model.config.index_sinks, model.config.num_hidden_layers
    which = np.concatenate([np.array(row["labels"][1:]) != IGNORE for row in rows])
    lengths = [len(row["input_ids"]) - 1 for row in rows]
    units = np.repeat(np.arange(len(rows)), lengths)
    dense, every = losses(model, rows, ()), losses(model, rows, range(count))
    if abs((every - stored)[which].mean()) > SAME:
        raise FailuresError("the model is not the one whose predictions are in data/evaluate: run dvc repro")
    alone = [losses(model, rows, (i,)) - dense for i in tqdm(range(count), desc="layers")]
    selection, statistics = [], []
    for row in tqdm(rows, desc="selection"):
        ids = torch.tensor([row["input_ids"]], device=model.device)
        selection.append(attention_mass(model, ids, topk))
        observer = QueryStatistics(topk, sinks)
        observe_dense(model, ids, observer)
        statistics.append(observer)
    beyond = [np.arange(1, n + 2) > topk for n in lengths]  # queries that see more than k keys

    def mean(name: str, i: int) -> np.ndarray:
        """Of a layer, over the queries beyond k of each row, then over the rows."""
        of_rows = [each.layers[i][name][..., b].mean(-1) for each, b in zip(statistics, beyond, strict=True)]
        return np.mean(of_rows, axis=0)

    missed = np.concatenate([each.missed()[:-1] for each in statistics])
    tokens = which & np.concatenate([b[:-1] for b in beyond])
    layers = {
        "rows": len(rows),
        "topk": topk,
        **{name: np.mean([each[name] for each in selection], axis=0) for name in ("mass", "oracle_mass", "recall")},
        "cost": [interval(gap[which], units[which]) for gap in alone],
        "cost_all_tokens": [interval(gap, units) for gap in alone],
        "every": interval((every - dense)[which], units[which]),
        "beyond_sum": interval((every - dense - sum(alone))[which], units[which]),
        "by_missed_mass": quarters((every - dense)[tokens], missed[tokens], units[tokens]),
    }
    heads = [mean("sink_mass", i) for i in range(count)]
    return layers, {
        "keys": sinks,
        "mass": [x.mean() for x in heads],
        "head_mass": [x.max() for x in heads],
        "uniform": np.mean([(sinks / np.arange(1, n + 2))[b].mean() for n, b in zip(lengths, beyond, strict=True)]),
        **{name: [mean(name, i) for i in range(count)] for name in ("all", "any", "oracle_all")},
    }


def quarters(gaps: np.ndarray, missed: np.ndarray, units: np.ndarray) -> list[dict]:
    """The mean gap of the quarter of the tokens with the least missed mass, and so on to that with the most."""
    group = np.searchsorted(np.quantile(missed, (0.25, 0.5, 0.75)), missed)
    found = []
    for i in range(4):
        some = group == i
        if len(np.unique(units[some])) > 1:
            found.append({"missed": missed[some].mean(), "gap": interval(gaps[some], units[some])})
    return found


def distribution(gaps: np.ndarray) -> dict:
    """How the sum of the gaps [tokens] is spread: what is lost, what is won, and the tokens that differ most."""
    largest = np.argsort(-np.abs(gaps), kind="stable")[: max(1, round(LARGEST * len(gaps)))]
    lost, won = gaps.clip(min=0).sum(), gaps.clip(max=0).sum()
    return {
        "tokens": len(gaps),
        "same": (np.abs(gaps) < SMALL).mean(),
        "lost": lost,
        "won": won,
        "largest": len(largest),
        "largest_lost": gaps[largest].clip(min=0).sum(),
        "largest_won": gaps[largest].clip(max=0).sum(),
    }


def gap_by_part(predictions: Predictions, gaps: np.ndarray, lookup: np.ndarray, topk: int) -> dict[str, dict]:
    """The gap of DSA to dense attention on parts of the answer tokens; parts of fewer than two rows are left out.

    The query of the token at position p sees p keys: up to k none can be missed.
    """
    lookup = lookup[predictions.rows]
    parts = {
        "all": np.ones(len(gaps), bool),
        "up_to_k": predictions.positions <= topk,
        "beyond_k": predictions.positions > topk,
        "lookup": lookup,
        "other": ~lookup,
    }
    found = {}
    for name, part in parts.items():
        part = part & predictions.answers
        if len(np.unique(predictions.rows[part])) > 1:
            found[name] = interval(gaps[part], predictions.rows[part])
            found[name]["absolute"] = np.abs(gaps[part]).mean()
    return found


def worst_rows(model, tokenizer, predictions: Predictions, rows: list[dict], texts: list[dict]) -> dict:
    """Each row's gap, and more of the rows where DSA loses most to dense attention, a token."""
    gaps = (predictions.nll("dsa") - predictions.nll("dense")).astype(np.float64)
    counts = np.bincount(predictions.rows, predictions.answers, minlength=len(rows)).astype(int)
    sums = np.bincount(predictions.rows, gaps * predictions.answers, minlength=len(rows))
    means = np.divide(sums, counts, out=np.full(len(rows), -np.inf), where=counts > 0)
    shown = []
    for number in np.argsort(-means, kind="stable")[: min(ROWS, (counts > 0).sum())].tolist():
        about = {"row": number, "source": str(texts[number].get("data_source")), "lookup": is_lookup(texts[number])}
        about |= {"gap": means[number], "sum": sums[number], "answer_tokens": counts[number]}
        shown.append(about | worst_tokens(model, tokenizer, predictions, number, rows[number]))
    return {"gaps": means[counts > 0], "answer_tokens": counts[counts > 0], "shown": shown}


def worst_tokens(model, tokenizer, predictions: Predictions, number: int, row: dict) -> dict:
    """The answer tokens of a row where DSA loses most, with the keys that attention wanted and the indexer missed.

    Of both arms the loss is the stored one; "dsa_as_dense" is that of DSA's weights with every key in sight.
    """
    here = predictions.rows == number
    ids, answers, topk = row["input_ids"], predictions.answers[here], model.config.index_topk
    nll = {arm: predictions.nll(arm)[here].astype(np.float64) for arm in ("dense", "dsa")}
    first = {arm: predictions.arrays[f"argmax_{arm}"][here] for arm in nll}
    gap = nll["dsa"] - nll["dense"]
    nll["dsa_as_dense"] = losses(model, [row], ())
    order = np.argsort(-np.where(answers, gap, -np.inf), kind="stable")
    queries = order[: min(TOKENS, answers.sum())].tolist()  # query t predicts token t + 1
    missed, statistics = MissedKeys(queries, topk, KEYS), QueryStatistics(topk, model.config.index_sinks)
    for observer in (missed, statistics):
        observe_dense(model, torch.tensor([ids], device=model.device), observer)

    def key(t: int, s: int, mass: float) -> dict:
        return {"position": s, "distance": t - s, "text": tokenizer.decode([ids[s]]), "mass": mass}

    tokens = [
        {
            "position": t + 1,
            "before": tokenizer.decode(ids[max(0, t + 1 - CONTEXT) : t + 1]),
            "token": tokenizer.decode([ids[t + 1]]),
            "gap": gap[t],
            "nll": {arm: values[t] for arm, values in nll.items()},
            "first": {arm: tokenizer.decode([int(tokens[t])]) for arm, tokens in first.items()},
            "layers": [{"missed": x[t][0], "keys": [key(t, s, m) for s, m in x[t][1]]} for x in missed.layers],
        }
        for t in queries
    ]
    return {"length": len(ids), "missed": statistics.missed()[:-1][answers].mean(), "tokens": tokens}


def analyse(model_path: Path, rows_file: Path, count: int) -> dict:
    """All of the numbers of the page; the losses of single layers on the first `count` held-out rows."""
    start = time.monotonic()
    predictions = Predictions(arms.groups_of(*ARMS))
    model = load_model(model_path, dtype="float32").eval()
    if torch.cuda.is_available():
        model.cuda()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    topk, lengths = model.config.index_topk, predictions.arrays["lengths"]
    texts = list(read_rows(rows_file))[: len(lengths)]
    rows = examples(tokenizer, texts, int(lengths.max()) + 1)
    answers = [np.array(row["labels"][1:]) != IGNORE for row in rows]
    if [len(x) for x in answers] != lengths.tolist() or (np.concatenate(answers) != predictions.answers).any():
        raise FailuresError(f"{rows_file} does not hold the rows of data/evaluate: run dvc repro")
    families = np.unique([str(text.get("data_source")) for text in texts], return_inverse=True)[1]
    lookup = np.array([is_lookup(text) for text in texts])
    gaps = (predictions.nll("dsa") - predictions.nll("dense")).astype(np.float64)
    short = [row for row in rows[:count] if len(row["input_ids"]) <= topk + 1]
    if short:
        raise FailuresError(f"{len(short)} of the first {count} rows are no longer than k = {topk}: nothing to select")
    layers, sinks = by_layer(model, rows[:count], predictions.nll("dsa")[: lengths[:count].sum()])
    found = {
        "model": {"path": model_path.as_posix(), "topk": topk, "layers": model.config.num_hidden_layers},
        "rows": {"all": len(rows), "families": int(families.max()) + 1, "source": rows_file.as_posix()},
        "decomposition": decomposition(predictions, families),
        "layers": layers,
        "sinks": sinks | {"text": tokenizer.decode(rows[0]["input_ids"][: sinks["keys"]])},
        "parts": gap_by_part(predictions, gaps, lookup, topk),
        "distribution": distribution(gaps[predictions.answers]),
        "worst": worst_rows(model, tokenizer, predictions, rows, texts),
    }
    run = {"seconds": time.monotonic() - start, "device": device_name(), "commit": git_commit()}
    run["models"] = model_hashes([model_path.as_posix()])
    return plain(found | {"run": run})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/dsa"), help="the trained DSA model")
    parser.add_argument("--rows-file", type=Path, default=Path("data/long/test.jsonl.gz"), help="the held-out rows")
    parser.add_argument("--rows", type=int, default=16, help="rows for what is measured layer by layer")
    parser.add_argument("--from", dest="source", type=Path, help="this file instead of the model and the predictions")
    args = parser.parse_args()
    if args.source:
        found = json.loads(args.source.read_text(encoding="utf-8"))
    else:
        with torch.no_grad():
            found = analyse(args.model, args.rows_file, args.rows)
        write(found, OUT)
    write_report(found, OUT.parent)


if __name__ == "__main__":
    main()
