"""Stage `harness@<arm>`: public benchmarks by lm-evaluation-harness, an optional extra, on the very model object.

Profiles without tasks end at once. A task is a name that lm-evaluation-harness knows, or the path of a task's YAML.
"""

import importlib.util
import sys
from pathlib import Path

from stages import params
from stages.files import write_json

TASKS = "data/local/tasks"  # where YAMLs that define a task have to be, and the files that they name
RULER = ("ruler", "niah_")  # how the names of RULER's tasks begin


def check(tasks: list[str]) -> None:
    """Raises ParamsError where a task could not be run: lm-evaluation-harness is missing or does not know it, or it is
    defined where DVC would not see a change."""
    names = [task for task in tasks if not Path(task).is_file()]
    if untracked := [task for task in tasks if task not in names and not params.tracked(task, TASKS)]:
        raise params.ParamsError(f"harness.tasks: not in {TASKS}, where DVC sees them change: {untracked}")
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise params.ParamsError("harness.tasks: needs lm-evaluation-harness (uv run --extra harness ...); [] for none")
    if names:
        from lm_eval.tasks import TaskManager

        if unknown := sorted(set(names) - set(TaskManager().all_tasks)):
            raise params.ParamsError(f"harness.tasks: neither a task of lm-evaluation-harness nor a file: {unknown}")


def numbers(results: dict) -> dict[str, dict[str, float]]:
    """{task: {metric: value, metric_stderr: value}} of lm-evaluation-harness's results, groups of tasks included.

    Its keys are "metric,filter" and "metric_stderr,filter", with "none" for no filter, among facts that are no metrics.
    A standard error that it does not know is left out.
    """
    found = {}
    for task, entries in (results["results"] | results.get("groups", {})).items():
        found[task] = {}
        for key, value in entries.items():
            metric, _, of = key.partition(",")
            if of and isinstance(value, int | float):
                name, stderr = metric.removesuffix("_stderr"), "_stderr" if metric.endswith("_stderr") else ""
                found[task][name + ("" if of == "none" else f",{of}") + stderr] = value
    return found


def score(arm: str, harness, seed: int) -> dict[str, dict[str, float]]:
    """As `numbers`. The metrics of RULER's tasks are their lengths."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from dsa import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    model = load_model(f"models/{arm}", dtype=dtype).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(f"models/{arm}")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=harness.max_length)

    def evaluate(tasks: list[str], lengths: list[int]) -> dict[str, dict[str, float]]:
        results = simple_evaluate(
            model=lm,
            tasks=tasks,
            limit=harness.limit,
            num_fewshot=harness.fewshot,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            metadata={"pretrained": f"models/{arm}", "max_seq_lengths": lengths},  # RULER measures by its tokenizer
        )
        return numbers(results)

    ruler = [task for task in harness.tasks if task.startswith(RULER)]
    others = [task for task in harness.tasks if task not in ruler]
    tasks = evaluate(others, harness.ruler_lengths) if others else {}
    # A length at a time: `limit` takes the first documents of a task, and those are all of the first length.
    for length in harness.ruler_lengths if ruler else ():
        found = evaluate(ruler, [length])
        of_length = {task: values[str(length)] for task, values in found.items() if task != "ruler"}
        if "ruler" in found:  # the harness averages its tasks at 4096 only
            of_length["ruler"] = sum(of_length.values()) / len(of_length)
        for task, value in of_length.items():
            tasks.setdefault(task, {})[str(length)] = value
    return tasks


def main(arm: str) -> None:
    p = params.load(f"harness@{arm}")
    metrics: dict = {"tasks": {}}
    if p.harness.tasks:
        from stages.common import measured

        with measured(metrics):
            metrics["tasks"] = score(arm, p.harness, p.seed)
    write_json(Path(f"reports/harness/{arm}.json"), metrics)


if __name__ == "__main__":
    main(sys.argv[1])
