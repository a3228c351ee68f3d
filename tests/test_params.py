import ast
import shutil

import pytest
from dvc.utils.serialize import dumps_yaml, loads_yaml

from dsa.data import corpus
from stages import harness, params
from tests.conftest import ROOT


@pytest.fixture
def root(tmp_path):
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def change(path, **changes):
    content = params.read(path)
    path.write_text(params.dump(content | changes), encoding="utf-8")


@pytest.mark.parametrize("profile", sorted(p.stem for p in (ROOT / "profiles").glob("*.yaml")))
def test_every_profile_is_valid(root, profile):
    change(root / "params.yaml", profile=profile)
    assert params.load(root=root).profile == profile


@pytest.mark.parametrize(
    "changes,key",
    [
        ({"topk": 0}, "topk"),
        ({"topk": "many"}, "topk"),
        ({"topk": 1.5}, "topk"),
        ({"seed": -1}, "seed"),
        ({"indexer": {"n_heads": 4, "head_dim": 64, "dim": 3}}, "indexer.dim"),
        ({"indexer": {"n_heads": 0, "head_dim": 64}}, "indexer.n_heads"),
        ({"indexer": {"n_heads": 4, "head_dim": 30}}, "indexer.head_dim"),
        ({"indexer": {"n_heads": 4, "head_dim": 10**9}}, "indexer.head_dim"),
        ({"topk": 10**19}, "topk"),
        ({"seed": 2**31}, "seed"),
        ({"tok": 3}, "tok"),
        ({"profile": "gpu"}, "profile"),
        ({"profile": None}, "profile"),
        ({"dense": {"steps": 3}}, "dense.steps"),
        ({"dpo": {"beta": 0.1}}, "dpo.indexer"),
        ({"dpo": {"beta": float("inf"), "indexer": "kl"}}, "dpo.beta"),
    ],
)
def test_bad_params_end_with_one_line_that_names_the_key(root, changes, key):
    change(root / "params.yaml", **changes)
    with pytest.raises(SystemExit) as error:
        params.load(root=root)
    (line,) = str(error.value).splitlines()
    assert key in line and ".yaml" in line


def test_a_bad_profile_key_is_named(root):
    change(root / "profiles/cpu.yaml", dense={"steps": 3, "batch_size": 1, "learning_rate": 0.1, "epochs": 2})
    with pytest.raises(SystemExit, match=r"profiles/cpu.yaml: dense.epochs"):
        params.load(root=root)


@pytest.mark.parametrize(
    "section,key,value,said",
    [
        ("data", "min_tokens", 4096, r"data.max_length: .* rows over data.min_tokens = 4096 would all be cut"),
        ("data", "samples", 10**19, r"data.samples: .* less than 2147483648"),
        ("dense", "steps", 10**19, r"dense.steps: "),
        ("dense", "weight_decay", float("inf"), r"dense.weight_decay: "),
        ("sparse", "weight_decay", 1e19, r"sparse.weight_decay: "),
        ("pretrain", "hidden_size", 10**9, r"pretrain.hidden_size: "),
        ("evaluate", "topk_sweep", [32, 10**19], r"evaluate.topk_sweep.1: "),
        ("evaluate", "retrieval", {"lengths": [10**19], "rows": 1}, r"evaluate.retrieval.lengths.0: "),
        ("benchmark", "decode", [10**19], r"benchmark.decode.0: "),
        ("preference", "domains", [], r"preference.domains"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(root, section, key, value, said):
    """All but inf were accepted."""
    values = params.read(root / "profiles/cpu.yaml")[section]
    change(root / "profiles/cpu.yaml", **{section: values | {key: value}})
    with pytest.raises(SystemExit, match=rf"profiles/cpu\.yaml: {said}") as error:
        params.load(root=root)
    assert len(str(error.value).splitlines()) == 1


def test_the_warmup_is_not_checkpointed(root):
    """Its backbone keeps nothing for backward; transformers would make it recompute, and keep, all of it."""
    warmup = {"steps": 3, "batch_size": 1, "learning_rate": 0.1, "gradient_checkpointing": True}
    change(root / "profiles/cpu.yaml", warmup=warmup)
    with pytest.raises(SystemExit, match=r"profiles/cpu.yaml: warmup.gradient_checkpointing"):
        params.load(root=root)


def test_a_missing_key_and_broken_yaml_are_named(root):
    (root / "params.yaml").write_text("profile: cpu\nseed: 0\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"params.yaml|cpu.yaml: topk"):
        params.load(root=root)
    (root / "params.yaml").write_text("profile: [cpu\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="not valid YAML"):
        params.load(root=root)


def test_a_stage_cannot_read_what_it_does_not_declare(root):
    view = params.load("dense", root)
    assert view.dense.steps > 0 and view.data.max_length > 0
    for read in (lambda: view.topk, lambda: view.data.samples, lambda: view.indexer, lambda: view.sparse):
        with pytest.raises(SystemExit, match=r"dvc.yaml: dense: reads the param"):
            read()
    assert params.load("evaluate@dsa", root).topk == params.load(root=root).topk
    with pytest.raises(SystemExit, match="topk"):
        _ = params.load("evaluate@dense", root).topk


def test_every_stage_reads_its_params_through_its_own_declaration():
    """Each stage module loads its params by its own name, so the check above holds for all of them."""
    stages = params.read(ROOT / "dvc.yaml")["stages"]
    for name in stages:
        tree = ast.parse((ROOT / f"stages/{name}.py").read_text(encoding="utf-8"))
        loads = [
            n
            for n in ast.walk(tree)
            if isinstance(n, ast.Call) and ast.unparse(n.func) in ("params.load", "params_module.load")
        ]
        declares = "params" in stages[name].get("do", stages[name])
        assert len(loads) == declares, name
        assert all(name in ast.unparse(load.args[0]) for load in loads), name


@pytest.mark.parametrize("section,folder", [("model", "model"), ("data", "rows"), ("preference", "rows")])
def test_a_local_source_that_dvc_does_not_watch_is_refused(root, monkeypatch, section, folder):
    """It was edited, and `dvc repro` said that nothing had changed. DVC does not look into links to folders either."""
    monkeypatch.chdir(root)
    watched, elsewhere = root / "data/local" / folder, root / "elsewhere"
    for path in (watched, elsewhere):
        path.mkdir(parents=True)
        (path / "a.jsonl").touch()
    (watched / "link").symlink_to(elsewhere)
    (watched / "b.jsonl").symlink_to(elsewhere / "a.jsonl")
    profile = params.read(root / "profiles/cpu.yaml")

    def load(source):
        change(root / "profiles/cpu.yaml", **{section: profile[section] | {"source": source}})
        return params.load(root=root)

    for source in ("a.jsonl", "b.jsonl", "", "missing.jsonl"):
        load([f"data/local/{folder}/{source}", "hf://datasets/a/b"])
        load(str(watched / source))
    for source in ("elsewhere", str(elsewhere / "a.jsonl"), f"data/local/{folder}/link", "~/a.jsonl",
                   f"data/local/{folder}/link/a.jsonl", f"data/local/{folder}/../x.jsonl"):  # fmt: skip
        with pytest.raises(SystemExit, match=rf"cpu\.yaml: {section}\.source: .* is not in data/local/{folder}, "):
            load(["hf://datasets/a/b", source])


def test_what_is_read_from_disk_is_a_dependency():
    """The folders that the check above allows are those that DVC watches."""
    stages = params.read(ROOT / "dvc.yaml")["stages"]
    assert {"data/base", "data/local/model"} <= set(stages["model"]["deps"])
    assert {"pyproject.toml", "data/local/rows", "dsa/data/corpus.py"} <= set(stages["download"]["deps"])
    assert harness.TASKS in stages["harness"]["do"]["deps"]


@pytest.mark.parametrize("profile", ["cpu", "sweep"])
def test_the_default_packages_are_those_of_the_corpus(profile, monkeypatch):
    """Two profiles of the same rows had a list each. A stage that reads it depends on where it stands, see above."""
    packages = params.load(root=ROOT, profile=profile).data.packages
    assert packages == "default" and len(corpus.PACKAGES) == len(set(corpus.PACKAGES)) > 20
    monkeypatch.setattr(corpus, "PACKAGES", ["networkx"])
    assert {file.family.split("/")[0] for file in corpus.source_files(packages)} == {"networkx"}


def test_the_sweeps_profile_is_the_defaults_but_for_its_length():
    """DVC follows a value in the file that a stage names, so what the two share stands in both, and is the same."""
    cpu, sweep = (params.read(ROOT / f"profiles/{name}.yaml") for name in ("cpu", "sweep"))
    assert cpu.keys() - sweep.keys() == {"pretrain"} and not sweep.keys() - cpu.keys()
    differ = {name for name in sweep if sweep[name] != cpu[name]}
    assert differ == {"dense", "sparse", "evaluate"}
    for name in ("dense", "sparse"):
        assert cpu[name] | {"steps": cpu[name]["steps"] // 2} == sweep[name]


def test_the_long_profile_is_the_defaults_but_for_its_size():
    cpu, long = (params.load(root=ROOT, profile=name) for name in ("cpu", "long"))
    for name in ("dense", "warmup", "sparse"):  # the same recipe, over rows four times as long
        same = {"learning_rate", "weight_decay"} | ({"indexer_learning_rate"} if name == "sparse" else set())
        assert getattr(cpu, name).model_dump(include=same) == getattr(long, name).model_dump(include=same)
    assert long.dense.steps == long.sparse.steps and long.dense.batch_size == long.sparse.batch_size
    for name in ("model", "preference", "dpo", "harness"):
        assert getattr(cpu, name) == getattr(long, name)
    assert long.data.max_length == 4 * cpu.data.max_length == 64 * params.load(root=ROOT).topk


def test_the_rehearsal_is_the_full_run_but_for_its_length():
    """What it says of sources, recipes and checks is only worth something if they are the full run's own."""
    full, short = (params.read(ROOT / f"profiles/qwen2.5-0.5b{name}.yaml") for name in ("", "-rehearsal"))
    assert short.keys() - full.keys() == {"rehearsal"} and not full.keys() - short.keys()
    fewer = {
        "data": {"samples", "max_length", "mean_tokens", "test_fraction"},
        "preference": {"pairs", "max_length", "test_fraction"},
        "dpo": {"steps", "batch_size", "held_out", "generations"},
        "evaluate": set(full["evaluate"]),
        "benchmark": set(full["benchmark"]),
        "speed": set(full["speed"]),
    } | {name: {"steps", "batch_size"} for name in ("dense", "warmup", "sparse")}
    for section, values in full.items():
        kept = values.keys() - fewer.get(section, set())
        assert short[section].keys() == values.keys()
        assert {k: short[section][k] for k in kept} == {k: values[k] for k in kept}


def test_a_task_that_dvc_does_not_watch_is_refused(tmp_path):
    """Its YAML was edited, and `dvc repro` said that nothing had changed."""
    (tmp_path / "mine.yaml").write_text("task: mine", encoding="utf-8")
    with pytest.raises(params.ParamsError, match=r"harness\.tasks: not in data/local/tasks.*mine\.yaml"):
        harness.check([str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize("written", ["1e-5", "1E-5", "+1e-05", "5e-05", "1.0e-5", "0.00001", "1e2", "3"])
def test_a_number_is_one_however_it_is_written(root, written):
    """dvc #5971: PyYAML reads YAML 1.1, where 1e-5 is a string."""
    file = root / "params.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("beta: 0.1", f"beta: {written}"), encoding="utf-8")
    assert params.load(root=root).dpo.beta == float(written)
    profile = root / "profiles/cpu.yaml"
    profile.write_text(
        profile.read_text(encoding="utf-8").replace("learning_rate: 5.0e-4", "learning_rate: 5e-4"), encoding="utf-8"
    )
    assert params.load(root=root).dense.learning_rate == 5e-4


@pytest.mark.parametrize("beta", [1e-5, 0.00005, 1e-300, 0.3])
def test_what_dvc_writes_is_read(root, beta):
    """As after `dvc exp run -S dpo.beta=...`."""
    content = params.read(root / "params.yaml")
    content["dpo"]["beta"] = beta
    (root / "params.yaml").write_text(dumps_yaml(content), encoding="utf-8")
    assert params.load(root=root).dpo.beta == beta
    assert params.read(root / "params.yaml") == loads_yaml(params.dump(content)) == content


@pytest.mark.parametrize("written", ["yes", "'0.1'", ".nan", ".inf", "1e300", "0.1.0", "1e", "0x"])
def test_what_is_no_number_is_named(root, written):
    file = root / "params.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("beta: 0.1", f"beta: {written}"), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"params.yaml: dpo.beta"):
        params.load(root=root)
