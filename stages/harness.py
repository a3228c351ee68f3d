"""Stage `harness@<arm>`: public benchmarks by lm-evaluation-harness, an optional extra, on the very model object.

Profiles without tasks end at once.
"""

import sys
from pathlib import Path

from stages import params
from stages.common import measured, write_json


def score(arm: str, harness, seed: int) -> dict:
    """{task: {metric: value, metric_stderr: value}}, groups of tasks included."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from dsa import Qwen2DSAForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    model = Qwen2DSAForCausalLM.from_pretrained(f"models/{arm}", dtype=dtype).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(f"models/{arm}")
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=harness.max_length),
        tasks=harness.tasks,
        limit=harness.limit,
        num_fewshot=harness.fewshot,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        metadata={"pretrained": f"models/{arm}", "max_seq_lengths": harness.ruler_lengths},
    )
    tasks = results["results"] | results.get("groups", {})
    return {
        task: {name.replace(",none", ""): value for name, value in numbers.items() if isinstance(value, int | float)}
        for task, numbers in tasks.items()
    }


def main(arm: str) -> None:
    p = params.load(f"harness@{arm}")
    metrics: dict = {"tasks": {}}
    if p.harness.tasks:
        with measured(metrics):
            metrics["tasks"] = score(arm, p.harness, p.seed)
    write_json(Path(f"reports/harness/{arm}.json"), metrics)


if __name__ == "__main__":
    main(sys.argv[1])
