"""The stage `harness` against our own computation, on tasks that are defined here: `uv run --extra harness pytest`."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from dsa import Qwen2DSAForCausalLM, from_dense
from dsa.modeling import Qwen2DSAAttention
from stages import harness, params
from tests.conftest import ROOT

lm_eval = pytest.importorskip("lm_eval")

TOPK, LIMIT, NEW = 24, 4, 10
NAMES = ("path", "size", "count", "value", "limit", "offset")


def documents() -> list[dict]:
    """Pieces of code that are longer than top-k, each with three lines that may follow."""
    rows = []
    for i, name in enumerate(NAMES):
        others = NAMES[i + 1 :] + NAMES[:i]
        lines = [f"def make_{name}({', '.join(others)}):"]
        lines += [f"    {other} = int({other}) + {i + j}" for j, other in enumerate(others)]
        choices = [f"    return {name}", f"    return {others[0]} + {others[1]}", "    raise ValueError(count)"]
        rows.append({"text": "\n".join(lines), "choices": choices, "gold": i % 3})
    return rows


@torch.no_grad()
def greedy(model, ids: torch.Tensor) -> torch.Tensor:
    """The answer's tokens, each from a whole forward without a cache, up to the first of the model's eos ids."""
    start = ids.shape[1]
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] in model.generation_config.eos_token_id:
            break
    return ids[0, start:]


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    ids = tokenizer(context + continuation, return_tensors="pt").input_ids
    start = len(tokenizer(context).input_ids)
    logits = model(ids, use_cache=False).logits[0].log_softmax(-1)
    return logits[start - 1 : -1].gather(1, ids[0, start:, None]).sum().item()


def write_tasks(folder, rows: list[dict]) -> dict[str, str]:
    """The paths of a task of each kind."""
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "shots.jsonl").write_text(
        json.dumps({"text": "x = 1", "choices": ["y = 2"] * 3, "gold": 0}) + "\n", encoding="utf-8"
    )
    files = {"test": str(folder / "rows.jsonl"), "train": str(folder / "shots.jsonl")}
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "doc_to_text": "{{text}}"}
    common |= {"test_split": "test", "fewshot_split": "train"}
    tasks = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "target_delimiter": "\n",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "likelihood": {
            "output_type": "loglikelihood",
            "doc_to_target": "\n{{choices[gold]}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "perplexity"}],
        },
        "answer": {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["<never>"], "max_gen_toks": NEW, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
            "filter_list": [{"name": "whole", "filter": [{"function": "take_first"}]}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(params.dump({"task": name} | common | task), encoding="utf-8")
    return {name: str(folder / f"{name}.yaml") for name in tasks}


def settings(tasks: list[str], limit: int = LIMIT, fewshot: int | None = None, lengths: tuple = (4096,)):
    return SimpleNamespace(tasks=tasks, limit=limit, fewshot=fewshot, max_length=4096, ruler_lengths=list(lengths))


@pytest.fixture(scope="module", params=["dense", "dsa"])
def run(request, tmp_path_factory):
    """The stage, run on one arm of the repository's base model: what it wrote, and what its layers selected.

    Half of the answers to generate are the model's own, and a token of the first one is a second eos id.
    """
    root, arm = tmp_path_factory.mktemp(request.param), request.param
    mode = {"attention_mode": "sparse", "n_heads": 2} if arm == "dsa" else {"attention_mode": "dense", "n_heads": 0}
    model = from_dense(ROOT / "data/base", topk=TOPK, head_dim=16, dtype=torch.float32, **mode).eval()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/base")
    rows = documents()
    prompts = [tokenizer(row["text"], return_tensors="pt").input_ids for row in rows]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    model.generation_config.eos_token_id.append(greedy(model, prompts[0])[NEW // 2].item())
    answers = [greedy(model, prompt) for prompt in prompts]
    for i, row in enumerate(rows):
        row["answer"] = tokenizer.decode(answers[i], skip_special_tokens=True) if i % 2 == 0 else "no"
    model.save_pretrained(root / f"models/{arm}")
    tokenizer.save_pretrained(root / f"models/{arm}")

    tasks = write_tasks(root, rows)
    profile = params.read(ROOT / "profiles/cpu.yaml")
    profile["harness"] |= {"tasks": list(tasks.values()), "limit": LIMIT}
    (root / "profiles").mkdir()
    (root / "profiles/cpu.yaml").write_text(params.dump(profile), encoding="utf-8")
    for name in ("params.yaml", "dvc.yaml"):
        (root / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    selected, select = [], Qwen2DSAAttention.select

    def spy(self, index, q, k, visible):
        indices = select(self, index, q, k, visible)
        selected.append((index is not None, indices.shape[-1], k.shape[2]))
        return indices

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("HF_DATASETS_CACHE", str(root / "cache"))
        patch.setattr(Qwen2DSAAttention, "select", spy)
        harness.main(arm)
        patch.setattr(Qwen2DSAAttention, "select", select)
        written = json.loads((root / f"reports/harness/{arm}.json").read_text(encoding="utf-8"))
        yield SimpleNamespace(
            arm=arm, model=model, tokenizer=tokenizer, tasks=tasks, answers=answers, selected=selected, written=written
        )


def expected(run, before: str = "") -> dict[str, float]:
    right, right_by_length, true = [], [], []
    for row in documents()[:LIMIT]:
        values = [log_likelihood(run.model, run.tokenizer, before + row["text"], "\n" + c) for c in row["choices"]]
        by_length = [value / len(choice) for value, choice in zip(values, row["choices"], strict=True)]
        right.append(values.index(max(values)) == row["gold"])
        right_by_length.append(by_length.index(max(by_length)) == row["gold"])
        true.append(values[row["gold"]])
    perplexity = math.exp(-sum(true) / LIMIT)
    return {"acc": sum(right) / LIMIT, "acc_norm": sum(right_by_length) / LIMIT, "perplexity": perplexity}


def scores(tasks: dict) -> dict[str, float]:
    found = tasks["choice"] | tasks["likelihood"]
    return {name: value for name, value in found.items() if not name.endswith("_stderr")}


def test_scores_are_those_of_our_own_forward(run):
    assert scores(run.written["tasks"]) == pytest.approx(expected(run), rel=1e-4)
    assert set(run.written["tasks"]["choice"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert run.written["run"]["seconds"] > 0


def test_an_example_stands_before_the_question(run):
    found = harness.score(run.arm, settings([run.tasks["choice"], run.tasks["likelihood"]], fewshot=1), seed=0)
    assert scores(found) == pytest.approx(expected(run, "x = 1\ny = 2\n\n"), rel=1e-4)


def test_attention_of_the_arm_is_what_is_scored(run):
    if run.arm == "dense":
        assert not run.selected
        return
    assert run.selected and all(indexed and width == TOPK < keys for indexed, width, keys in run.selected)
    run.model.config.attention_mode = "dense"
    other = expected(run)
    run.model.config.attention_mode = "sparse"
    assert abs(other["perplexity"] / run.written["tasks"]["likelihood"]["perplexity"] - 1) > 0.01


def test_generation_with_the_cache_ends_at_every_eos_id(run):
    assert len(run.answers[0]) <= NEW // 2 + 1  # ends at the second id
    assert run.written["tasks"]["answer"]["exact_match,whole"] == 0.5
    assert set(run.written["tasks"]["answer"]) == {"exact_match,whole", "exact_match,whole_stderr"}


def test_limit_counts_ruler_documents_of_each_length(run, monkeypatch):
    """RULER's needles, which need no download: prompts of two lengths, of which the longer get the right answer."""
    if run.arm == "dense":
        pytest.skip("generation is replaced: one arm is enough")
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "download", lambda name: None)
    prompts = []

    def generate(self, input_ids, **kwargs):
        prompts.append(input_ids.shape[1])
        value = run.tokenizer.decode(input_ids[0]).split(" is: ")[1] if prompts[-1] > 600 else "nothing"
        answer = run.tokenizer(value.split(".")[0], return_tensors="pt").input_ids
        return torch.cat([input_ids, answer], 1)

    monkeypatch.setattr(Qwen2DSAForCausalLM, "generate", generate)
    found = harness.score(run.arm, settings(["niah_single_1"], limit=3, lengths=(600, 1000)), seed=0)
    assert {name: found["niah_single_1"][name] for name in ("600", "1000")} == {"600": 0.0, "1000": 1.0}
    assert [length > 600 for length in prompts] == [False] * 3 + [True] * 3


def test_the_mean_of_ruler_is_taken_at_every_length(run, monkeypatch):
    """lm-evaluation-harness has -1 for the length 4096 where no document is of that length."""

    def simple_evaluate(tasks, metadata, **kwargs):
        (length,) = metadata["max_seq_lengths"]
        none = {"4096,none": -1} if length != 4096 else {}
        one = none | {f"{length},none": length / 16384, f"{length}_stderr,none": "N/A", "sample_len": 500}
        two = none | {f"{length},none": 0.0, f"{length}_stderr,none": "N/A", "sample_len": 500}
        group = {"4096,none": -1 if none else 0.125}
        return {"results": {"niah_single_1": one, "ruler_vt": two, "ruler": group}, "groups": {"ruler": group}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", simple_evaluate)
    found = harness.score(run.arm, settings(["ruler"], lengths=(4096, 8192)), seed=0)
    assert found["ruler"] == {"4096": 0.125, "8192": 0.25}
    assert found["niah_single_1"] == {"4096": 0.25, "8192": 0.5} and found["ruler_vt"] == {"4096": 0.0, "8192": 0.0}


def test_unknown_tasks_are_named_before_anything_runs():
    """Those that the full profile suggests are known."""
    lines = (ROOT / "profiles/qwen2.5-0.5b.yaml").read_text(encoding="utf-8").splitlines()
    suggested = next(line for line in lines if line.startswith("harness:")).split("tasks: [")[1].split("]")[0]
    suggested = suggested.split(", ")
    assert len(suggested) == 3
    with pytest.raises(params.ParamsError, match=r"harness\.tasks: .*\['cval-valid'\]"):
        harness.check([*suggested, "cval-valid"])
