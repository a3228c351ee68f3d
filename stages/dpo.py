"""Stage `dpo@<arm>`: preference optimisation of the dense baseline or of the DSA model, same rows, budget and seed.

The reference is the arm's own model before the stage; its log-probabilities are computed once. Sparse attention stays
on in policy and reference of the DSA arm.
"""

import os
import sys
from itertools import islice
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer
from trl import DPOConfig

from dsa import DSAForCausalLM, load_model
from dsa.data.rows import prompt_key, tokenize_pair
from dsa.evaluation.predictions import greedy
from dsa.training.dpo import DSADPOTrainer, PairScores, as_dataset, score_pair
from dsa.training.trainer import freeze
from stages import params
from stages.common import measured, owned
from stages.files import read_rows, write_json
from stages.training import checkpoints, first_and_last, run, save, trainer_options, use_all_cores, whole, write_curve

PAIRS = Path("data/pairs")
LOGGED = ("loss", "rewards/accuracies", "rewards/margins", "kl", "learning_rate", "grad_norm")


def on_disk(pairs: list[dict], folder: Path) -> Dataset:
    """The pairs where every process finds them: TRL keeps the reference's log-probabilities beside them, one process
    writes and all read. Raises ParamsError on a node that does not see the first one's files."""
    state = PartialState()
    with state.main_process_first():
        if state.is_main_process and not folder.exists():
            partial = folder.with_suffix(".partial")  # whole or not there: a run that was killed leaves no broken one
            as_dataset(pairs).save_to_disk(partial)
            partial.rename(folder)
    if not folder.exists():
        raise params.ParamsError(f"DSA_SCRATCH: {folder} is not there: nodes need a folder that they share")
    return Dataset.load_from_disk(folder)


def trainer_of(model: DSAForCausalLM, tokenizer, p: params.Params, folder: Path) -> DSADPOTrainer:
    dpo = p.dpo
    trains_indexer = model.config.index_n_heads > 0 and dpo.indexer == "kl"
    freeze(model, backbone=False, indexer=not trains_indexer)
    pairs = list(islice(read_rows(PAIRS / "train.jsonl.gz"), dpo.steps * dpo.batch_size))
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise params.ParamsError("accelerate's config: use_fsdp: not for preferences, see docs/distributed.md")
    options = DPOConfig(
        **trainer_options(dpo, folder, p.seed),
        beta=dpo.beta,
        max_length=p.preference.max_length,
        precompute_ref_log_probs=True,
        disable_dropout=True,
    )
    return DSADPOTrainer(
        model,
        args=options,
        train_dataset=on_disk(pairs, folder / "pairs"),
        eval_dataset=None,
        processing_class=tokenizer,
    )


def generate(tokenizer, reference: DSAForCausalLM, model: DSAForCausalLM, examples: list[dict]) -> list[dict]:
    """Greedy answers before and after, beside the chosen one."""
    return [
        {
            "prompt_end": tokenizer.decode(example["prompt_ids"][-60:]),
            "chosen": tokenizer.decode(example["chosen_ids"]),
            "before": tokenizer.decode(greedy(reference, example["prompt_ids"], 64)),
            "after": tokenizer.decode(greedy(model, example["prompt_ids"], 64)),
        }
        for example in examples
    ]


def write_scores(path: Path, scores: list[PairScores], units: list[str]) -> None:
    """Of each held-out pair, with the number of its unit: pairs of the same one are not independent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        margin=np.array([s.margin for s in scores]),
        before=np.array([s.reference_chosen - s.reference_rejected for s in scores]),
        chosen=np.array([s.policy_chosen - s.reference_chosen for s in scores]),
        kl=np.array([s.kl for s in scores]),
        tokens=np.array([s.tokens for s in scores]),
        unit=np.unique(units, return_inverse=True)[1],
    )


def optimise(arm: str, p: params.Params, folder: Path) -> None:
    """Train the arm's model and score it on the held-out pairs. folder: of checkpoints, and of the pairs."""
    dpo, source = p.dpo, Path("models") / arm
    metrics: dict = {}
    with measured(metrics):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = load_model(source, dtype="float32")
        held_out = list(islice(read_rows(PAIRS / "test.jsonl.gz"), dpo.held_out))
        test = [tokenize_pair(tokenizer, pair) for pair in held_out]
        trainer = trainer_of(model, tokenizer, p, folder)
        result = run(trainer, folder)
        model = whole(trainer)
        if model is None:
            return
        reference = load_model(source, dtype="float32").eval().to(model.device)
        model.eval()
        # In float32: bfloat16 would round the logits by as much as the policy moves.
        scores = [score_pair(model, reference, example) for example in tqdm(test, desc="held-out pairs")]
        samples = generate(tokenizer, reference, model, test[: dpo.generations])
    save(model, tokenizer, Path(f"models/dpo-{arm}"))
    curve = write_curve(trainer.state.log_history, Path(f"reports/dpo/{arm}.csv"), LOGGED)
    # What is independent of what: prompts, or where windows of the same files are drawn, the files' families.
    families = p.preference.split_by == "data_source"
    units = [pair["data_source"] if families else prompt_key(pair["prompt"]) for pair in held_out]
    write_scores(Path(f"data/dpo/{arm}.npz"), scores, units)
    margins = np.array([s.margin for s in scores])
    metrics |= {
        "pairs": len(trainer.train_dataset),  # TRL drops those whose answers do not fit
        "held_out_pairs": len(scores),
        **result,
        "reward_accuracy": round(float((margins > 0).mean()), 4),
        "reward_margin": round(float(dpo.beta * margins.mean()), 4),
        **first_and_last(curve),
        "generations": samples,
    }
    write_json(Path(f"reports/dpo/{arm}.json"), metrics)


def main(arm: str) -> None:
    p = params.load(f"dpo@{arm}")
    use_all_cores()
    with owned(checkpoints(f"dpo@{arm}")) as folder:
        optimise(arm, p, folder)


if __name__ == "__main__":
    main(sys.argv[1])
