"""The graph that DVC sees, and the smoke profile from end to end in a clone of its own."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages import params
from stages.checkpoints import intact
from tests.conftest import ROOT

BIN = Path(sys.executable).parent
KNOB_FREE = {"preflight", "pretrain", "model", "download", "filter", "pairs", "dense", "warmup", "dpo@dense"}
KNOB_FREE |= {"evaluate@dense", "evaluate@dpo_dense"}
USES_TOPK = {"sparse", "window", "evaluate@warmup", "evaluate@dsa", "evaluate@window", "evaluate@dpo_dsa"}
USES_TOPK |= {"benchmark", "compare", "report", "speed"}

pytestmark = pytest.mark.slow


def run(command, cwd, check=True, **env):
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | env
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8")
    if check and done.returncode:
        raise AssertionError(f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def copy_of_project(target):
    """A fresh copy of the project's files in a repository without a git identity."""
    files = run(["git", "ls-files", "-co", "--exclude-standard"], ROOT).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    run(["git", "init", "-q"], target)
    run(["git", "add", "-A"], target)
    run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "a"], target)
    return target


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return copy_of_project(tmp_path_factory.mktemp("clone") / "project")


@pytest.fixture(scope="module")
def no_identity(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return {"HOME": str(home), "GIT_CONFIG_NOSYSTEM": "1", "DSA_SCRATCH": str(home / "scratch")}


def would_run(clone, *changes):
    """The stages whose lock no longer fits after a change of params, by DVC's own word."""
    run(["git", "checkout", "-q", "params.yaml", "profiles"], clone)
    for file, edit in changes:
        path = clone / file
        content = params.read(path)
        edit(content)
        path.write_text(params.dump(content), encoding="utf-8")
    status = json.loads(run(["dvc", "status", "--json", "dvc.yaml"], clone).stdout)
    run(["git", "checkout", "-q", "params.yaml", "profiles"], clone)
    return {
        stage
        for stage, reasons in status.items()
        if any(
            "changed deps" in r and any(p in str(r["changed deps"]) for p in ("params.yaml", "profiles/"))
            for r in reasons
            if isinstance(r, dict)
        )
    }


def downstream(stages, changed):
    """What runs again when `changed` do: everything that depends on their outputs."""
    outs = {}
    for name, stage in stages.items():
        for key in ("outs", "metrics", "plots"):
            for out in stage.get(key, []):
                outs[next(iter(out)) if isinstance(out, dict) else out] = name
    reached = set(changed)
    while True:
        more = {
            name
            for name, stage in stages.items()
            for dep in stage.get("deps", [])
            if any(owner in reached and (out == dep or out.startswith(dep + "/")) for out, owner in outs.items())
        }
        if more <= reached:
            return reached
        reached |= more


def resolved(clone):
    """dvc.yaml with its foreach stages spelled out."""
    stages = params.read(clone / "dvc.yaml")["stages"]
    names = [f"{name}@{item}" if item else name for name in stages for item in stages[name].get("foreach", [None])]
    return {name: params.entry(name, "cpu", clone) for name in names}


def test_topk_reruns_what_uses_it_and_nothing_else(clone):
    stages = resolved(clone)
    changed = would_run(clone, ("params.yaml", lambda c: c.update(topk=1024)))
    assert changed == USES_TOPK
    assert not downstream(stages, changed) & KNOB_FREE


def test_the_indexer_leaves_data_and_baseline_alone(clone):
    changed = would_run(clone, ("params.yaml", lambda c: c["indexer"].update(n_heads=8)))
    assert changed == {"preflight", "warmup", "benchmark", "report"}
    reached = downstream(resolved(clone), changed - {"preflight"})  # what passes is always the same
    assert "sparse" in reached and not reached & {
        "dense",
        "window",
        "filter",
        "download",
        "evaluate@dense",
        "dpo@dense",
    }


def test_preference_knobs_rerun_what_reads_them(clone):
    changed = would_run(clone, ("params.yaml", lambda c: c["dpo"].update(beta=0.2)))
    assert changed == {"dpo@dense", "dpo@dsa", "report"}
    changed = would_run(clone, ("params.yaml", lambda c: c["dpo"].update(indexer="kl")))
    assert changed == {"dpo@dsa", "report"}


def test_a_profile_leaf_reruns_the_stage_that_reads_it(clone):
    def steps(content):
        content["sparse"]["steps"] += 1

    assert would_run(clone, ("profiles/cpu.yaml", steps)) == {"preflight", "sparse", "window", "report"}


def test_the_committed_results_are_those_of_the_committed_params(clone):
    assert would_run(clone) == set()
    status = json.loads(run(["dvc", "status", "--json", "dvc.yaml"], clone).stdout)
    assert not [s for s, why in status.items() if "changed command" in str(why) or "new" in str(why)], status


def test_commands_are_constant_and_dependencies_exist(clone):
    for name, stage in resolved(clone).items():
        assert "${" not in stage["cmd"], name
        for dep in stage["deps"]:
            made = dep.startswith(("models/", "data/", "reports/"))
            assert made or (clone / dep).exists(), f"{name}: {dep}"


@pytest.mark.parametrize("change", ["topk=many", "indexer.n_heads=0"])  # tests/test_params.py has the others
def test_a_bad_param_is_one_line_before_any_work(clone, no_identity, change):
    done = run(["dvc", "exp", "run", "-S", change], clone, check=False, **no_identity)
    assert done.returncode
    key = change.split("=")[0]
    assert sum(key in line and "params.yaml" in line for line in (done.stdout + done.stderr).splitlines()) == 1
    run(["git", "checkout", "-q", "."], clone)


def test_an_unknown_param_is_refused(clone, no_identity):
    done = run(["dvc", "exp", "run", "-S", "top_k=3"], clone, check=False, **no_identity)
    assert done.returncode and "top_k" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def smoke(clone, no_identity):
    """The whole pipeline, killed hard once in the middle of sparse training."""
    run(["git", "checkout", "-q", "."], clone)
    knobs = params.read(clone / "params.yaml")
    (clone / "params.yaml").write_text(params.dump(knobs | {"profile": "smoke"}), encoding="utf-8")
    shutil.rmtree(clone / "reports", ignore_errors=True)
    (clone / "dvc.lock").unlink(missing_ok=True)
    run(["dvc", "repro", "evaluate@dense", "warmup"], clone, **no_identity)
    environment = os.environ | no_identity | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    first = subprocess.Popen(
        ["accelerate", "launch", "-m", "stages.sparse"],
        cwd=clone,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    scratch = Path(no_identity["DSA_SCRATCH"])
    deadline = time.monotonic() + 240
    while not any(intact(path) for path in scratch.glob("sparse-*/checkpoint-1")):
        assert time.monotonic() < deadline and first.poll() is None, "no checkpoint appeared"
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    run(["dvc", "repro"], clone, **no_identity)
    return clone


def test_smoke_runs_every_stage_and_writes_the_report(smoke):
    report = (smoke / "reports/report.md").read_text(encoding="utf-8")
    assert "Profile `smoke`" in report and "{{" not in report
    assert not [line for line in report.splitlines() if line.startswith("|") and line != line.rstrip()]
    html = (smoke / "reports/report.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == report.count("](figures/") >= 6
    assert 'src="figures' not in html
    for name in ("report.md", "report.html", "summary.json"):
        assert str(smoke) not in (smoke / "reports" / name).read_text(encoding="utf-8")
    summary = json.loads((smoke / "reports/summary.json").read_text(encoding="utf-8"))
    assert summary["gap"] == pytest.approx(summary["loss_dsa"] - summary["loss_dense"], abs=2e-4)


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(smoke, no_identity):
    def result():
        metrics = json.loads((smoke / "reports/train/sparse.json").read_text(encoding="utf-8"))
        return (
            metrics["resumed_at_step"],
            metrics["last"],
            (smoke / "reports/train/sparse.csv").read_text(encoding="utf-8"),
        )

    resumed, last, curve = result()
    assert resumed >= 1
    assert not list(Path(no_identity["DSA_SCRATCH"]).glob("sparse-*"))  # a stage that ends deletes its scratch
    weights = (smoke / "models/dsa/model.safetensors").read_bytes()
    run(["dvc", "repro", "-f", "-s", "sparse"], smoke, **no_identity)
    again, last_again, curve_again = result()
    assert again == 0
    assert last_again == last and curve_again == curve
    assert (smoke / "models/dsa/model.safetensors").read_bytes() == weights


def test_a_second_repro_runs_nothing(smoke, no_identity):
    run(["dvc", "repro"], smoke, **no_identity)
    out = run(["dvc", "repro"], smoke, **no_identity).stdout
    assert "Running stage" not in out and "Data and pipelines are up to date" in out


def test_exp_run_of_a_variant_runs_only_what_depends_on_it(smoke, no_identity):
    run(["git", "add", "-A"], smoke)
    run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "smoke"], smoke)
    done = run(["dvc", "exp", "run", "-S", "topk=1024", "compare"], smoke, **no_identity)
    ran = {line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")}
    assert ran == {"sparse", "evaluate@dsa", "compare"}  # of all that would, see above
    shown = json.loads(run(["dvc", "metrics", "show", "--json"], smoke).stdout)
    assert "reports/summary.json" in shown[""]["data"]


def test_a_local_source_that_was_edited_is_read_again(clone, no_identity):
    """`dvc repro` said that nothing had changed, and without data/raw the run cache brought the old rows back."""
    text = " ".join(f"word{i}" for i in range(900))

    def write(answer):
        sft = {"instruction": "a", "output": answer + text}
        pair = {"conversations": [{"from": "human", "value": "a"}]}
        pair |= {"chosen": {"from": "gpt", "value": answer}, "rejected": {"from": "gpt", "value": "no"}}
        for name, row in (("sft", sft), ("pairs", pair)):
            (clone / f"data/local/rows/{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")

    def raw():
        run(["dvc", "repro", "download"], clone, **no_identity)
        return b"".join(gzip.decompress(path.read_bytes()) for path in (clone / "data/raw").iterdir()).decode()

    path = clone / "profiles/smoke.yaml"
    profile = params.read(path)
    profile["data"] |= {"source": "data/local/rows/sft.jsonl", "samples": 1}
    profile["preference"] |= {"source": "data/local/rows/pairs.jsonl", "pairs": 1}
    knobs = params.read(clone / "params.yaml")
    try:
        path.write_text(params.dump(profile), encoding="utf-8")
        (clone / "params.yaml").write_text(params.dump(knobs | {"profile": "smoke"}), encoding="utf-8")
        write("one")
        assert raw().count("one") == 2
        write("two")
        shutil.rmtree(clone / "data/raw")
        assert raw().count("two") == 2
        write("one")
        shutil.rmtree(clone / "data/raw")
        assert raw().count("one") == 2  # the run cache's, and right
    finally:
        run(["git", "checkout", "-q", "params.yaml", "profiles", "dvc.lock"], clone)
