"""The sweep's page from a few experiments whose means and errors are worked out by hand, and the commands it queues."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import TrainingArguments

from dsa import ablations, from_dense
from dsa.data.rows import Collator
from dsa.training.trainer import DSATrainer, freeze
from stages import compare, params, training
from stages.files import write_rows
from stages.statistics import ratio_interval
from studies import sweep, sweep_report
from studies.sweep_points import SCARCE_TOPK
from studies.sweep_report import CHANGES, Estimate, Sweep, estimate, indexer_cost, pareto, verdicts, write_report
from tests.conftest import ROOT

BASE = sweep.Point(topk=256, n_heads=4, head_dim=64, warmup_steps=40, seed=0)


def experiment(point, gap, share_gap=(0.0, 0.5), mass=0.9):
    """gap: what the two rows of 10 and 30 answer tokens add up to."""
    return {
        "name": point.name("sweep"),
        **point.__dict__,
        "metrics": {"gap_beyond_k": 0.1, "share": 0.5, "mass": mass, "oracle_mass": 0.95},
        "device": "a machine",
        "commit": "abc",
        "ran": ["sparse", "compare"],
        "reused": ["dense", "warmup", "filter"],
        "rows": {"gap": list(gap), "share_gap": list(share_gap)},
    }


def made(*experiments):
    return {
        "profile": "sweep",
        "base": BASE.__dict__,
        "context": 2048,
        "hidden_size": 192,
        "training": {"steps": 24, "warmup_batch": 4, "batch": 4},
        "rows": {"tokens": [10, 30], "lookups": [0, 2]},
        "experiments": list(experiments),
    }


def test_a_single_seed_has_the_interval_of_its_families():
    """That of statistics.ratio_interval, which needs no bootstrap; rows of one family are no independent rows."""
    rng = np.random.default_rng(1)
    families, counts = np.repeat(np.arange(30), 3), rng.integers(5, 40, 90).astype(float)
    sums = (counts * (0.1 + rng.normal(0, 0.05, 30)[families]))[None]
    e = estimate(sums, counts, families)
    by_family = (np.bincount(families, x) for x in (sums[0], counts))
    mean, half = ratio_interval(*by_family)
    assert (e.mean, e.seeds) == (pytest.approx(mean), 1) and e.high - e.mean == pytest.approx(half, rel=0.1)
    alone = estimate(sums, counts, np.arange(90))
    assert alone.high - alone.low < 0.8 * (e.high - e.low)


def test_an_interval_holds_the_mean_as_often_as_it_says_where_seeds_and_families_differ(monkeypatch):
    """Three seeds: twice their standard error would hold it in four of five cases."""
    monkeypatch.setattr(sweep_report, "DRAWS", 400)
    rng, counts, held = np.random.default_rng(0), np.full(12, 10.0), 0
    for _ in range(200):
        sums = 10 * (rng.normal(0, 0.03, (3, 1)) + rng.normal(0, 0.04, 12) + rng.normal(0, 0.01, (3, 12)))
        e = estimate(sums, counts, np.arange(12))
        held += e.low <= 0 <= e.high
    assert 0.91 < held / 200 <= 1


def test_no_spread_at_all_is_no_error():
    e = estimate(np.ones((2, 3)), np.ones(3), np.arange(3))
    assert (e.low, e.mean, e.high, e.p, e.p_large) == (1, 1, 1, 0, 1)


def test_points_are_paired_by_seed_and_row():
    """Seeds that differ by more than the points do not hide a difference that every seed and row has."""
    small = replace(BASE, topk=32)
    rows = []
    for seed, level in ((0, 0.0), (1, 40.0), (2, -40.0)):
        rows.append(experiment(replace(BASE, seed=seed), (level, -level / 2)))
        rows.append(experiment(replace(small, seed=seed), (level + 1, -level / 2 + 3)))
    s = Sweep(made(*rows, experiment(replace(small, seed=7), (1e3, 1e3))))  # a seed that the other point has not
    change = s.paired("gap", small, BASE)
    assert (change.mean, change.seeds) == (pytest.approx(0.1), 3)
    assert change.low == pytest.approx(0.1) and change.high == pytest.approx(0.1)
    assert s.paired("gap", BASE).high > 1  # gaps 0, 0.5 and -0.5
    assert s.paired("gap", BASE, replace(BASE, topk=999)) is None
    assert s.paired("share_gap", BASE).mean == pytest.approx(0.25)


def test_verdicts_and_front():
    """Of four comparisons, one that is within the margin by itself (d, p = 0.01) is not shown to be."""

    def line(size, cost, mean, p, p_large):
        gap = Estimate(mean, mean - 0.1, mean + 0.1, p, p_large, 3)
        return {"size": size, "flops": cost, "gap": gap, "gap_p": p}

    table = [line("a", 1, 0.5, 0, 1), line("b", 2, 0.02, 0.4, 0.7), line("c", 2, 0.0, 1, 0.001)]
    table.append(line("d", 4, 0.004, 0.1, 0.01))
    assert {k: [x["size"] for x in v] for k, v in verdicts([*table, {"gap": None}], "gap").items()} == {
        "within": ["c"],
        "worse": ["a"],
        "open": ["b", "d"],
    }
    assert [x["size"] for x in pareto(table, "flops")] == ["a", "c"]


def test_cost_of_the_indexer_by_hand():
    # 4 heads of 64 on a hidden size of 192: projections 192 * (256 + 64 + 4), scores 256 * 2048; twice each.
    assert indexer_cost(4, 64, 192, 2048) == {"bytes": 128, "flops": 2 * (62_208 + 524_288)}


def test_the_page_has_the_numbers_and_says_what_is_missing(tmp_path):
    rows = [experiment(replace(BASE, seed=s), (1.0 + 2 * s, 3.0 + 2 * s)) for s in (0, 1)]
    rows += [experiment(replace(BASE, topk=32, seed=s), (4.0, 12.0), mass=0.7) for s in (0, 1)]
    rows += [experiment(replace(BASE, topk=64), (1.0, 3.0))]
    rows += [experiment(replace(BASE, topk=64, n_heads=1, head_dim=16), (1.0, 3.0))]
    rows += [experiment(replace(BASE, topk=64, ablation="rope_all"), (2.0, 6.0)) | {"commit": "def"}]
    write_report(made(*rows), tmp_path)
    text = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert "| 256 | 1/8 | +0.1500 [" in text and "| 32 | 1/64 | +0.4000 [+0.4000, +0.4000] |" in text
    assert "not excluded: k = 32 (+0.4000 [+0.4000, +0.4000]), k = 64 (" in text
    assert "0.025 by Holm): none." in text
    assert "1 × 16" in text and "Fewer than two lengths of warm-up were run" in text
    planned = len({point for group in sweep.plan(BASE).values() for point in group})
    assert f"7 experiments of {planned} planned" in text and f"Missing: {planned - 7} planned points" in text
    assert "14 stages ran and 21 were reused (runs: sparse 7, compare 7)" in text
    assert "rope_all: the loss is worse than the paper's (+0.1000 [+0.1000, +0.1000], p < 0.001)" in text
    assert "commits abc, def" in text
    assert {p.name for p in (tmp_path / "sweep").iterdir()} == {"topk.png", "indexer.png", "ablation.png"}


def test_an_ablation_that_the_model_has_no_more_is_marked_with_its_commit(tmp_path):
    had, has = replace(BASE, topk=64, ablation="attached"), replace(BASE, topk=64, ablation="rope_all")
    rows = [experiment(point, (1.0, 3.0)) for point in (replace(BASE, topk=64), had, has)]
    write_report(made(*rows), tmp_path)
    text = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert "| attached † |" in text and "| rope_all |" in text
    assert "git checkout abc" in text
    write_report(made(rows[0], rows[2]), tmp_path)
    assert "†" not in (tmp_path / "sweep.md").read_text(encoding="utf-8")


def test_a_page_without_experiments(tmp_path):
    write_report(made(), tmp_path)
    text = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert text.count("Fewer than two") == 3 and "No ablation was run" in text
    assert not (tmp_path / "sweep").exists()


def test_sweeps_are_joined_where_they_are_the_same_experiment():
    first = made(experiment(BASE, (1.0, 3.0)), experiment(replace(BASE, topk=32), (1.0, 3.0)))
    again = experiment(BASE, (2.0, 3.0)) | {"commit": "def"}
    joined = sweep.join([first, made(again, experiment(replace(BASE, seed=1), (1.0, 3.0)))])
    assert [(x["topk"], x["seed"], x["commit"]) for x in joined["experiments"]] == [
        (32, 0, "abc"),
        (256, 0, "def"),
        (256, 1, "abc"),
    ]
    with pytest.raises(SystemExit, match="cannot be joined: rows"):
        sweep.join([first, made() | {"rows": {"tokens": [10, 31], "lookups": [0, 2]}}])


def test_the_file_holds_what_was_written(tmp_path):
    content = made(experiment(BASE, (1.0, 3.0)), experiment(replace(BASE, topk=32), (1.0, 3.0)))
    sweep.write(content, tmp_path / "sweep.json")
    assert json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8")) == content
    sweep.write(made(), tmp_path / "sweep.json")
    assert json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8")) == made()


def test_the_plan_covers_the_question_and_its_commands_set_existing_params(monkeypatch):
    monkeypatch.chdir(ROOT)
    base = sweep.base_point("sweep")
    plan = sweep.plan(base)
    assert len({p.topk for p in plan["topk"]}) >= 6 and len({p.seed for p in plan["topk"]}) >= 3
    assert len({(p.n_heads, p.head_dim) for p in plan["indexer"]}) >= 4
    assert {p.ablation for p in plan["ablation"]} == set(ablations.NAMES) <= set(CHANGES)
    for group in plan.values():  # each has what its points are compared with
        assert {replace(base, topk=p.topk, seed=p.seed) for p in group if p.topk in SCARCE_TOPK} <= set(group)
    files = {name: params.read(Path(name)) for name in ("params.yaml", "profiles/sweep.yaml")}
    for group in plan.values():
        for point in group:
            for setting in point.settings("sweep"):
                key, value = setting.split("=")
                file, _, key = key.rpartition(":")
                content = files[file or "params.yaml"]
                *path, last = key.split(".")
                for part in path:
                    content = content[part]
                assert last in content, setting
                content[last] = params.yaml().load(value)
            merged = params.merge(files["params.yaml"], files["profiles/sweep.yaml"], "profiles/sweep.yaml")
            params.Params.model_validate(merged)
    names = [p.name("sweep") for group in plan.values() for p in group]
    assert len(set(names)) == len({p for group in plan.values() for p in group})


def shown(name, point, **more):
    """A row of `dvc.api.exp_show`, in which every number is a float."""
    row = {
        "Experiment": name,
        "rev": "abc",
        "typ": "branch_base",
        "State": None,
        "profile": "sweep",
        "ablation": "none",
    }
    row |= {"seed": float(point.seed), "topk": float(point.topk), "warmup.steps": float(point.warmup_steps)}
    return row | {"indexer.n_heads": float(point.n_heads), "indexer.head_dim": float(point.head_dim)} | more


def test_experiments_are_read_by_their_state_and_params(monkeypatch):
    rows = {"tokens": [1], "lookups": [0], "family": ["a"], "gap": [0.1], "share_gap": [0.0]}
    files = {sweep.METRICS: {"gap": 0.1, "rows": rows}, sweep.TRAINED: {"run": {"device": "a machine"}}}
    monkeypatch.setattr(sweep, "output_of", lambda command: json.dumps(files[command[-1].removeprefix("abc:")]))
    log = (
        "Stage 'pretrain' didn't change, skipping\nStage 'dense' is cached - skipping run, checking out outputs\n"
        "Running stage 'sparse':\n> python\nRunning stage 'evaluate@dsa':\n"
    )
    logs = subprocess.CompletedProcess([], 0, stdout=log)
    monkeypatch.setattr(sweep.subprocess, "run", lambda *args, **options: logs)
    name = BASE.name("sweep")
    row = sweep.read_experiment(shown(name, BASE, State="Success"), "sweep")
    assert (row["ran"], row["reused"], row["rows"]) == (["sparse", "evaluate@dsa"], ["dense"], rows)
    assert row["device"] == "a machine" and row["topk"] == 256 and row["metrics"] == {"gap": 0.1}
    logs.returncode = 255
    assert sweep.read_experiment(shown(name, BASE), "sweep")["ran"] is None  # the log is gone
    # Where the commit has another profile, DVC gives its params the names of their files.
    both = {"profiles/sweep.yaml:warmup.steps": 40.0, "profiles/cpu.yaml:warmup.steps": 7.0, "warmup.steps": 7.0}
    assert sweep.read_experiment(shown(name, BASE, **both), "sweep")["warmup_steps"] == 40
    # A failed experiment shows the committed metrics of its parent: they are not its own.
    for state in ("Failed", "Queued", "Running"):
        assert sweep.read_experiment(shown(name, BASE, State=state), "sweep") is None
    assert sweep.read_experiment(dict.fromkeys(shown(name, BASE)), "sweep") is None  # cannot be read
    assert sweep.read_experiment(shown("another", BASE), "sweep") is None
    assert sweep.read_experiment(shown(name, BASE), "cpu") is None


def test_other_held_out_rows_are_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = [{"rows": {"tokens": [n], "lookups": [0], "family": ["a"]}} for n in (1, 2)]
    monkeypatch.setattr(sweep, "shown", lambda commit: rows)
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, 0))
    monkeypatch.setattr(sweep, "output_of", lambda command: "abc")
    monkeypatch.setattr(sweep, "read_experiment", lambda row, profile: row)
    with pytest.raises(SystemExit, match="same held-out rows"):
        sweep.collect("sweep")


def test_params_of_another_commit_are_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for name in ("params.yaml", "profiles/sweep.yaml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(sweep, "shown", lambda commit: pytest.fail("the params differ"))
    Path("params.yaml").write_text(
        Path("params.yaml").read_text(encoding="utf-8").replace("topk: 256", "topk: 128"), encoding="utf-8"
    )
    with pytest.raises(SystemExit, match="differ from those of HEAD"):
        sweep.collect("sweep")


def test_an_ablation_has_its_own_name_and_setting():
    point = replace(BASE, ablation="rope_all")
    assert point.name("sweep") == BASE.name("sweep") + "-rope-all"
    assert set(point.settings("sweep")) - set(BASE.settings("sweep")) == {"ablation=rope_all"}


def test_compare_writes_the_gap_and_its_row_sums(monkeypatch, tmp_path):
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/cpu.yaml").write_text(
        (ROOT / "profiles/cpu.yaml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    content = params.read(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text(params.dump(content | {"topk": 2}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("data/evaluate").mkdir(parents=True)
    Path("reports/evaluate").mkdir(parents=True)
    Path("data/long").mkdir(parents=True)
    write_rows(Path("data/long/test.jsonl.gz"), [{"data_source": name} for name in "abc"])
    common = {"lengths": [3, 2], "answers": [False, True, True, True, True], "lookup_row": [1]}
    for arm, nll, share in (("dense", [1.0, 1.0, 1.0, 1.0, 1.0], [0.5]), ("dsa", [9.0, 1.1, 1.3, 1.0, 1.0], [0.25])):
        np.savez(f"data/evaluate/{arm}.npz", **common, **{f"nll_{arm}": nll, f"share_{arm}": share})
        selection = {"mass": [0.8, 1.0], "oracle_mass": [0.9, 1.0], "recall": [0.5, 0.6]}
        numbers = {"arms": {arm: {"retrieval_tokens": share[0]}}, "selection": selection}
        Path(f"reports/evaluate/{arm}.json").write_text(json.dumps(numbers), encoding="utf-8")
    compare.main()
    written = json.loads(Path("reports/compare.json").read_text(encoding="utf-8"))
    assert written["gap"] == pytest.approx(0.1) and written["gap_beyond_k"] == pytest.approx(0.3)  # position 3 of row 0
    error = (2 * (0.2**2 + 0.2**2)) ** 0.5 / 4
    assert written["gap_ci"] == pytest.approx(12.706 * error, abs=1e-3)  # two families: t of one degree of freedom
    assert written["share_gap"] == -0.25 and written["mass"] == pytest.approx(0.9)
    assert written["rows"].pop("family") == ["a", "b"]
    assert written["rows"] == {"tokens": [2, 2], "gap": [0.4, 0], "lookups": [0, 1], "share_gap": [0, -0.25]}


def test_a_warmup_of_no_steps_is_valid_and_no_other_stage_of_none():
    content = params.read(ROOT / "profiles/sweep.yaml")
    assert params.WarmupTraining.model_validate(content["warmup"] | {"steps": 0}).steps == 0
    for steps in (0, -1):
        with pytest.raises(ValueError, match="steps"):
            params.Training.model_validate(content["dense"] | {"steps": steps})


def test_the_command_line_names_what_is_wrong():
    command = [sys.executable, "-m", "studies.sweep", "queue", "indxer"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode and "indxer" in done.stderr


def test_no_steps_of_training_change_nothing(dense_model, tmp_path):
    model = from_dense(dense_model, topk=8, n_heads=2, head_dim=8, attention_mode="dense")
    freeze(model, backbone=True, indexer=False)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    section = params.WarmupTraining(steps=0, batch_size=1, learning_rate=0.1)
    options = TrainingArguments(**training.trainer_options(section, tmp_path / "scratch", seed=0))
    row = {"input_ids": [5] * 9, "labels": [5] * 9}
    trainer = DSATrainer(model, options, train_dataset=[row], data_collator=Collator(0))
    result = training.run(trainer, tmp_path / "scratch")
    assert result["tokens"] == result["tokens_per_second"] == 0 and result["trained_parameters"] > 0
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    curve = training.write_curve(trainer.state.log_history, tmp_path / "curve.csv", training.LOGGED)
    assert training.first_and_last(curve) == {}
    assert "kl" in pd.read_csv(tmp_path / "curve.csv")
