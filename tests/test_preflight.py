"""What the preflight says of a machine, and what it makes of its measurements. No GPU here: one is pretended."""

import json
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config

from dsa.data.hubs import SourceError
from stages import arms, estimate, params, preflight, steps
from stages.params import Indexer
from stages.preflight import OK, WRONG
from stages.steps import Cost
from tests.conftest import ROOT, corpus_model
from tests.hub import Hub

NO_MEMORY = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The project's params with its base model, steps that take no time, and no accelerate config."""
    for name in ("profiles", "data/base"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "default_config_file", str(tmp_path / "accelerate.yaml"))
    monkeypatch.setattr(preflight, "limit_memory", lambda: 2**33)
    monkeypatch.setattr(steps, "training", lambda kind, make, section, mean, longest: Cost({mean: 1.0, longest: 2.0}))
    rows = {name: Cost({2700: 0.5, 4096: 1.0}) for name in steps.CHOICES} | {"token": Cost({1: 0.01})}
    monkeypatch.setattr(steps, "evaluation", lambda *_: rows)
    monkeypatch.setattr(steps, "scoring", lambda *_: Cost({440: 0.1}))
    return tmp_path


@pytest.fixture
def profile(root):
    def change(**sections):
        path = root / "profiles/cpu.yaml"
        content = params.read(path)
        for name, values in sections.items():
            content[name] |= values
        path.write_text(params.dump(content), encoding="utf-8")
        return params.load()

    return change


def test_it_estimates_every_stage_that_takes_long(root):
    preflight.main()
    found = json.loads((root / "reports/preflight.json").read_text(encoding="utf-8"))
    assert {c["state"] for c in found["checks"]} == {OK}
    groups = {f"evaluate@{group}" for group in arms.GROUPS}
    assert found["stages"].keys() == {*steps.KINDS, *groups, "benchmark", "speed"}
    assert found["stages"]["window"]["seconds"] == 64.0  # of 32 steps of 2 rows of a second
    page = (root / "reports/preflight.md").read_text(encoding="utf-8")
    assert str(root) not in page and "| dense | 64.0 |" in page and "| device | ok |" in page


def test_another_timing_starts_nothing_anew(root, monkeypatch):
    """The stages that fetch depend on the file, and everything on them."""
    texts = set()
    for seconds in (1.0, 3.0):
        monkeypatch.setattr(steps, "scoring", lambda *_, s=seconds: Cost({440: s}))
        preflight.main()
        texts.add((root / "data/preflight.txt").read_bytes())
    assert len(texts) == 1
    for stage in ("model", "download"):
        assert "data/preflight.txt" in params.entry(stage, "cpu", ROOT)["deps"]


def ends(root, capsys) -> str:
    """The line with which it ends."""
    with pytest.raises(SystemExit) as error:
        preflight.main()
    assert not (root / "data/preflight.txt").exists()  # or the run would go on
    assert json.loads((root / "reports/preflight.json").read_text(encoding="utf-8"))["stages"] == {}
    (line,) = str(error.value).splitlines()
    assert f"{WRONG}  {line}" in capsys.readouterr().out
    return line


def test_a_kernel_that_is_wrong_here_ends_the_run(root, monkeypatch, capsys):
    def wrong(*_):
        raise RuntimeError("the key selection kernel is off by 1.0e-01 (relative). Set DSA_BACKEND=gather")

    monkeypatch.setattr("dsa.kernels.check.verify_cpu", wrong)
    assert "DSA_BACKEND=gather" in ends(root, capsys)


def test_without_kernels_there_is_nothing_to_compare(monkeypatch):
    """What a kernel that is wrong says to do about it."""
    monkeypatch.setenv("DSA_BACKEND", "gather")
    monkeypatch.setattr(preflight, "kernels_of", lambda *args: pytest.fail("compared"))
    assert preflight.agreement(None, None).state == preflight.NOTE


def test_a_full_disk_ends_the_run(root, monkeypatch, capsys):
    usage = shutil.disk_usage(root)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "GB are needed and 0.0 GB are free" in ends(root, capsys)


def test_a_batch_that_the_processes_cannot_share_ends_the_run(root, profile, capsys):
    (root / "accelerate.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 2\n", encoding="utf-8")
    profile(dpo={"batch_size": 7})
    assert "dpo.batch_size: 7 rows cannot be split over 2 processes: make it a multiple of 2" in ends(root, capsys)


def test_what_no_process_holds_whole_is_not_measured(root, monkeypatch):
    (root / "accelerate.yaml").write_text("distributed_type: FSDP\nnum_processes: 2\n", encoding="utf-8")
    monkeypatch.setattr(steps, "training", lambda *_: pytest.fail("a step was taken"))
    preflight.main()
    assert json.loads((root / "reports/preflight.json").read_text(encoding="utf-8"))["stages"] == {}


def test_a_step_that_does_not_fit_ends_the_run_with_what_does_and_its_price(root, monkeypatch, capsys):
    def training(kind, make, section, mean, longest):
        if kind == "sparse" and longest > (2048 if section.gradient_checkpointing else 1024):
            raise NO_MEMORY
        return Cost({mean: 1.0, longest: 2.0}, peak=2**30)

    monkeypatch.setattr(steps, "training", training)
    line = ends(root, capsys)
    assert line.startswith("sparse: a row of 4096 tokens does not fit: data.max_length: 2048 and")
    assert "sparse.gradient_checkpointing: true (1.0 GB, 2.00 s a row of 2048 tokens)" in line


def test_another_error_of_a_step_is_no_lack_of_memory():
    def fails():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        steps.if_it_fits(fails)


def test_memory_that_is_refused_is_a_step_that_does_not_fit():
    assert steps.if_it_fits(lambda: torch.empty(2**44)) is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no limit")
def test_beyond_the_memory_that_is_free_allocation_fails():
    """The kernel would end the process, or another one, before anything could be said."""
    unlimited = "import resource; _, hard = resource.getrlimit(resource.RLIMIT_DATA); "
    unlimited += "resource.setrlimit(resource.RLIMIT_DATA, (hard, hard)); "  # whatever this process was given
    code = (
        unlimited
        + "import torch; from stages.common import limit_memory; free = limit_memory(); torch.empty({}).fill_(0)"
    )
    for size, refused in (("1000", False), ("(free + 2**28) // 4", True)):
        done = subprocess.run(
            [sys.executable, "-c", unlimited + code.format(size)], cwd=ROOT, capture_output=True, encoding="utf-8"
        )
        assert (done.returncode == 1) == refused and ("can't allocate memory" in done.stderr) == refused


def test_a_gpu_and_one_that_pytorch_does_not_see(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text("NVRM version: 470.1\n", encoding="utf-8")
    found = preflight.gpu()
    assert found.state == WRONG and "470.1" in found.says and "CUDA_VISIBLE_DEVICES=" in found.says
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30 * 2**30, 32 * 2**30))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "RTX")
    assert preflight.gpu().says.startswith("2 × RTX, 30.0 of 32.0 GB free")


def test_a_model_is_known_by_its_config_before_its_weights_are_fetched(monkeypatch, tmp_path):
    corpus_model().save_pretrained(tmp_path / "model")
    shutil.copy(ROOT / "data/base/tokenizer.json", tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with Hub() as hub:
        hub.set_environment(monkeypatch, tmp_path / "cache")
        commit = hub.add("model", "a/b", files).commit
        for uri in ("hf://a/b", "modelscope://a/b"):
            config, revision, size = preflight.published(uri)
            assert config.vocab_size == 4096 and commit.startswith(revision) and size == sum(map(len, files.values()))
        assert not hub.sent("model.safetensors")
        with pytest.raises(SourceError, match=r"not found at .*: check the name, the revision"):
            preflight.published("hf://a/b@nosuch")
        hub.token = "secret"
        with pytest.raises(SourceError, match="set HF_TOKEN to a token that may read it"):
            preflight.published("hf://a/b")


@pytest.mark.parametrize("content,said", [('{"model_type": "gpt2"}', "gpt2"), ("{", "JSON"), ("{}", "model_type")])
def test_a_model_that_has_no_dsa_is_refused_by_its_config(tmp_path, content, said):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(SourceError, match=said) as error:
        preflight.published(str(tmp_path))
    assert len(str(error.value).splitlines()) == 1


def test_rows_that_are_not_there_are_said(monkeypatch, tmp_path):
    with Hub() as hub:
        hub.set_environment(monkeypatch, tmp_path / "cache")
        found = hub.add("dataset", "a/b", {"rows.jsonl": b'{"instruction": "a"}\n' * 9})
        checked = preflight.rows_of("rows", ["modelscope://datasets/a/b"])
        assert checked.state == OK and found.commit[:8] in checked.says
        assert preflight.rows_of("rows", ["modelscope://datasets/a/c"]).state == WRONG


def test_a_cost_goes_through_what_was_measured():
    cost = Cost({100: 1.0, 200: 3.0})
    assert [cost.seconds(n) for n in (100, 200)] == pytest.approx([1, 3])
    assert cost.seconds(400) == pytest.approx(10)  # 0.005 n + 0.00005 n^2
    assert Cost({100: 1.0}).seconds(250) == 2.5
    assert Cost({100: 1.0, 200: 1.5}).seconds(400) >= 1.5  # noise makes no row cheaper than a shorter one


@pytest.mark.parametrize("group", arms.GROUPS)
def test_rows_are_counted_as_evaluate_scores_them(group, monkeypatch):
    """By running the stage's own methods, with a model that only counts."""
    from stages import evaluate

    p = params.load(root=ROOT, profile="smoke")
    counted = 0

    def count(*_, **__):
        nonlocal counted
        counted += 1

    class Counting(evaluate.Evaluation):
        def __init__(self):
            self.p, self.options, self.metrics = p, p.evaluate, {"arms": {}}

        def predictions(self, name, changes, rows):
            for _ in range(rows):
                count()
            return dict.fromkeys(("loss", "loss_all_tokens", "retrieval", "retrieval_tokens"), 0.0), []

        def arm(self, name, arm):
            self.predictions(name, arm.changes, self.options.rows if arm.trained_by else self.options.control_rows)
            self.metrics["arms"][name] = {}

        def selection(self):
            for _ in range(self.options.statistics_rows):
                count()

        generations = floors = heatmap = lambda self: None
        model = type("", (), {"config": None})
        recall = SimpleNamespace(tests={"pairs": 1, "needles": 2})  # a row of 20 questions or two of ten

    def retrieval(model, tests, lengths, rows, name):
        for _ in range(sum(tests.values()) * rows * len(lengths)):
            count()
        return []

    monkeypatch.setattr(evaluate, "retrieval", retrieval)
    monkeypatch.setattr(evaluate, "changed", lambda *_, **__: __import__("contextlib").nullcontext())
    evaluation = Counting()
    for name, arm in arms.of(group).items():
        evaluation.arm(name, arm)
    for what in arms.GROUPS[group].measures:
        getattr(evaluation, what)()
    assert sum(estimate.evaluated(group, p, 256, 1200).values()) == counted


@pytest.mark.slow
def test_steps_of_every_kind_are_measured_by_the_stages_own_trainers(monkeypatch):
    monkeypatch.setenv("DSA_MICRO_BATCH", "2")  # rows of a forward pass
    config = Qwen2Config(**corpus_model().config.to_dict())
    p = params.load(root=ROOT, profile="smoke")
    make = partial(steps.model_of, config, Indexer(n_heads=2, head_dim=16), 16)
    for kind in steps.KINDS:
        section = p.dpo if kind.startswith("dpo") else p.sparse
        cost = steps.if_it_fits(steps.training, kind, make, section, 40, 64)
        assert cost.rows.keys() == {40, 64} and min(cost.rows.values()) > 0 and cost.once > 0
    rows = steps.evaluation(make, 40, 64)
    assert rows.keys() == {*steps.CHOICES, "token"} and steps.scoring(make, 40).seconds(40) > 0
