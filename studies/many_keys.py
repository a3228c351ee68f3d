"""Questions that need many keys at once, which DSA can fail: which of two votes was cast more often.

    python -m studies.many_keys                                  # minutes: reports/many_keys.{json,md,png}
    python -m studies.many_keys --from reports/many_keys.json    # the page again, without the model

No single key has the answer: a query has to see the m votes that were cast, or a fair sample of them. The base model
never learned to count, so DSA's weights are trained on such rows first, under dense attention, with the indexer's loss:
the paper's warm-up, but with the backbone. Then these weights are asked with every key in sight, and with the k keys
that the indexer, the oracle or the window choose.
"""

import random
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm
from transformers import AutoTokenizer, TrainingArguments

from dsa import DSAForCausalLM, load_model
from dsa.data.rows import IGNORE, Collator, examples
from dsa.evaluation.predictions import changed
from dsa.training.trainer import DSATrainer, freeze
from stages import params
from stages.arms import model_of, sparse
from stages.common import device_name, git_commit
from stages.files import read_rows
from stages.lock import model_hashes
from stages.statistics import HELD_OUT, LEVEL, plain
from stages.training import LONG, trainer_options
from studies import common
from studies.many_keys_report import write_report

OUT = Path("reports/many_keys.json")
VOTES, QUESTION = (" True", " False"), "\nmost:"
ASKED = (1, 4, 8, 16, 32, 64, 128, 256)  # votes that were cast before each question
SHARE = 0.59375  # of the votes are for the one that was cast more often
EVERY = 4  # votes, between which a token of text stands
TRAINED_TEXT = 128  # tokens of a row to learn from before its first vote
TEXT = 448  # of a row to measure with
TRAINING = params.Training(steps=100, batch_size=4, learning_rate=5e-4)
INDEXER_RATE = 2e-3
ROWS = 24  # to measure with, a question of each number of votes in each
TOPK = (32, 128)


class Rows:
    """Makes rows of votes in a text. Each has as many tokens as any other of its size.

    Args:
        text: token ids.
    """

    def __init__(self, tokenizer, text: list[int]):
        self.question = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
        (self.votes,) = zip(*(tokenizer(v, add_special_tokens=False)["input_ids"] for v in VOTES), strict=True)
        self.text = [i for i in text if i not in self.votes]

    def __call__(self, seed: object, most: int, before: int) -> dict:
        """`before` tokens of text, then votes and a question at each of `ASKED` up to `most`, unanswered: the answer is
        a label alone. Whichever leads, it has `SHARE` of the votes so far, and each question draws anew who. Between
        two questions the votes of one kind come first and then those of the other: the latest do not tell."""
        rng = random.Random(f"many-keys-{seed}-{most}")
        asked = [m for m in ASKED if m <= most]
        at = rng.randrange(len(self.text) - before - most)
        text = iter(self.text[at : at + before + most])
        ids, labels, cast = list(islice(text, before)), [IGNORE] * before, [0, 0]
        for m in asked:
            leader, lead = rng.randrange(2), max(m // 2 + 1, round(SHARE * m))
            total = [lead, m - lead] if leader == 0 else [m - lead, lead]
            votes = [v for v in rng.sample((0, 1), 2) for _ in range(total[v] - cast[v])]
            for number, vote in enumerate(votes, sum(cast)):
                ids.append(self.votes[vote])
                ids += islice(text, int(number % EVERY == 0))
            cast = total
            ids += self.question
            labels += [IGNORE] * (len(ids) - len(labels)) + [self.votes[leader]]  # of the token that comes next
        ids += islice(text, 1)
        return {"input_ids": ids, "labels": labels}


def train(model: DSAForCausalLM, rows: list[dict], pad: int, seed: int) -> dict[str, float]:
    """Both losses under dense attention; their means over the last tenth of the steps."""
    freeze(model, backbone=False, indexer=False)
    model.config.attention_mode = "dense"
    with tempfile.TemporaryDirectory() as folder:
        options = trainer_options(TRAINING, Path(folder), seed) | {"save_strategy": "no"}
        options |= {"per_device_train_batch_size": TRAINING.batch_size, "gradient_accumulation_steps": 1}
        trainer = DSATrainer(
            model,
            TrainingArguments(**options),
            train_dataset=rows,
            data_collator=Collator(pad),
            indexer_learning_rate=INDEXER_RATE,
        )
        trainer.train()
    last = [log for log in trainer.state.log_history if "lm_loss" in log][-TRAINING.steps // 10 :]
    return {name: float(np.mean([log[name] for log in last])) for name in ("lm_loss", "kl")}


def ways() -> dict[str, dict]:
    """{name: what changes in the model's config}: every key in sight, and k of them by each choice."""
    found = {"dense": {"attention_mode": "dense"}}
    for k in TOPK:
        for name, selector in (("dsa", "indexer"), ("oracle", "oracle"), ("window", "window")):
            found[f"{name}_{k}"] = {**sparse(selector), "index_topk": k}
    return found


@torch.no_grad()
def right(model: DSAForCausalLM, rows: list[dict]) -> np.ndarray:
    """bool [rows, questions]: whether the answer is the model's first choice among all tokens."""
    found = []
    for row in rows:
        labels = torch.tensor(row["labels"][1:])
        at = (labels != IGNORE).nonzero()[:, 0]
        hidden = model.model(torch.tensor([row["input_ids"]], device=model.device), use_cache=False).last_hidden_state
        found.append((model.lm_head(hidden[0, at]).argmax(-1).cpu() == labels[at]).numpy())
    return np.array(found)


def share(answers: np.ndarray) -> dict[str, float]:
    """Of [rows] right, with Wilson's 95 % interval."""
    ci = stats.binomtest(int(answers.sum()), len(answers)).proportion_ci(LEVEL, method="wilson")
    return {"mean": answers.mean(), "low": ci.low, "high": ci.high}


def sampled(m: int, k: int) -> float:
    """How often k of m votes, drawn at random, tell which was cast more often; a tie tells in half of the cases."""
    lead, k = max(m // 2 + 1, round(SHARE * m)), min(k, m)
    drawn = stats.hypergeom(m, lead, k)
    return float(drawn.sf(k // 2) + (0.5 * drawn.pmf(k // 2) if k % 2 == 0 else 0))


def analyse() -> dict:
    """All of the numbers of the page."""
    start, p = time.monotonic(), params.load()
    model = load_model(model_of("dsa"), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(model_of("dsa"))
    if torch.cuda.is_available():
        model.cuda()

    def text(path: Path) -> list[int]:
        rows = examples(tokenizer, islice(read_rows(path), 64), p.data.max_length)
        return [i for row in rows for i in row["input_ids"]]

    make = Rows(tokenizer, text(LONG / "train.jsonl.gz"))
    seen = TRAINING.steps * TRAINING.batch_size
    learned = train(model, [make(i, ASKED[-1], TRAINED_TEXT) for i in range(seen)], tokenizer.pad_token_id, p.seed)
    model.eval()
    make = Rows(tokenizer, text(HELD_OUT))
    rows = [make(f"held-out-{i}", ASKED[-1], TEXT) for i in range(ROWS)]
    answers = {}
    for name, changes in tqdm(ways().items(), desc="ways"):
        with changed(model.config, **changes):
            answers[name] = right(model, rows)
    found = {name: {str(m): share(a[:, i]) for i, m in enumerate(ASKED)} for name, a in answers.items()}
    setup = {"asked": ASKED, "topk": TOPK, "share": SHARE, "rows": ROWS, "tokens": len(rows[0]["input_ids"])}
    setup |= {"steps": TRAINING.steps, "batch": TRAINING.batch_size, **learned}
    setup |= {"trained_tokens": seen * len(make(0, ASKED[-1], TRAINED_TEXT)["input_ids"]), "question": QUESTION}
    samples = {str(k): {str(m): sampled(m, k) for m in ASKED} for k in TOPK}
    run = {"seconds": time.monotonic() - start, "device": device_name(), "commit": git_commit()}
    run["models"] = model_hashes([model_of("dsa")])
    return plain({"setup": setup, "right": found, "sampled": samples, "run": run})


def main() -> None:
    common.run(__doc__, analyse, write_report, OUT)


if __name__ == "__main__":
    main()
