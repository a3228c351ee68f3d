"""What a stage imports is among its deps in dvc.yaml: else a change of it leaves a stale result that passes for new."""

import ast
import importlib
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

PIPELINES = ("dvc.yaml", "studies/dvc.yaml")
# Modules that are no dep of any stage, nor what they alone import, and why.
NOWHERE = {
    "dsa/__init__.py": "gives names to what other modules define",
    "stages/params.py": "hands on the values that DVC tracks one by one",
    "stages/check.py": "ends a run early that would end later, or does nothing",
    "stages/unattended.py": "runs DVC",
    "stages/common.py": "says what a run cost, and keeps what a killed one goes on from",
}
FULL_ATTENTION = "every query attends to all keys, by transformers' own attention"
NO_INDEXER = "the model has no indexer"
RULED_OUT = {  # of a stage: modules that it imports and whose code it does not run, and why
    "dense": {
        "dsa/attention.py": FULL_ATTENTION,
        "dsa/kernels": FULL_ATTENTION,
        "dsa/cache.py": "training has no cache",
        "dsa/evaluation/predictions.py": NO_INDEXER,
        "dsa/indexer.py": NO_INDEXER,
        "dsa/losses.py": NO_INDEXER,
        "dsa/reference.py": NO_INDEXER,
        "dsa/selector.py": NO_INDEXER,
    },
    "warmup": {"dsa/attention.py": FULL_ATTENTION, "dsa/cache.py": "training has no cache"},
    "sparse": {"dsa/cache.py": "training has no cache"},
    "window": {
        "dsa/cache.py": "training has no cache",
        "dsa/evaluation/predictions.py": NO_INDEXER,
        "dsa/indexer.py": NO_INDEXER,
        "dsa/losses.py": NO_INDEXER,
    },
    "harness": {"dsa/losses.py": "nothing is trained"},
}


def file_of(module: str) -> str | None:
    """The file of a module of this project, None for one of a library."""
    path = Path(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if (ROOT / file).is_file():
            return file.as_posix()
    return None


@cache
def imports(file: str) -> set[str]:
    """The project's files that a file imports, at its head or within a function."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {file_of(name.name) for name in node.names}
        elif isinstance(node, ast.ImportFrom) and file_of(node.module):
            for name in node.names:
                submodule = file_of(f"{node.module}.{name.name}")
                if submodule is None and node.module == "dsa":  # where the name comes from
                    submodule = file_of(getattr(importlib.import_module("dsa"), name.name).__module__)
                found.add(submodule or file_of(node.module))
    return {file for file in found if file and file not in NOWHERE}


def closure(file: str) -> set[str]:
    reached, todo = set(), {file}
    while todo:
        reached |= todo
        todo = set().union(*map(imports, todo)) - reached
    return reached


def covered(file: str, deps) -> bool:
    return any(file == dep or file.startswith(f"{dep}/") for dep in deps)


def stages(pipeline: str) -> dict[str, tuple[str, list[str]]]:
    """{stage: (the module that it runs, its deps)}, a foreach stage once."""
    found = {}
    for name, stage in yaml.safe_load((ROOT / pipeline).read_text(encoding="utf-8"))["stages"].items():
        stage = stage.get("do", stage)
        command = stage["cmd"] if isinstance(stage["cmd"], str) else stage["cmd"][-1]
        found[name] = command.split("-m ")[1].split()[0], stage["deps"]
    return found


ALL = {name: stage for pipeline in PIPELINES for name, stage in stages(pipeline).items()}


@pytest.mark.parametrize("name", ALL)
def test_what_a_stage_imports_is_among_its_deps(name):
    module, deps = ALL[name]
    used = closure(file_of(module))
    ruled_out = RULED_OUT.get(name, {})
    assert sorted(file for file in used if not covered(file, [*deps, *ruled_out])) == []
    code = {dep for dep in deps if dep.startswith(("dsa/", "stages/", "studies/")) and Path(dep).suffix in ("", ".py")}
    assert sorted(dep for dep in code if not any(covered(file, [dep]) for file in used)) == []  # nor is more than that
    assert not [x for x in ruled_out if covered(x, deps) or not any(covered(file, [x]) for file in used)]
    assert all((ROOT / dep).exists() for dep in code)


def test_the_exceptions_are_of_stages_and_modules_that_exist():
    assert RULED_OUT.keys() <= ALL.keys() and all((ROOT / file).is_file() for file in NOWHERE)
