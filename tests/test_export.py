"""An exported model loads where this package, Triton and the C compiler are not, and computes the same."""

import ast
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import check_imports, get_class_from_dynamic_module

from dsa import export, export_model, from_dense, load_indexer, load_model
from stages import arms
from stages import export as stage
from tests.conftest import ROOT, small_model
from tests.hub import Hub

TINY = {"topk": 6, "n_heads": 4, "head_dim": 8}
# Hides what a bare environment lacks: a module that is None in sys.modules is one that is not installed.
ELSEWHERE = """
import sys
sys.modules |= dict.fromkeys(("dsa", "triton", "ziglang", "accelerate", "datasets", "trl", "pandas", "scipy"))
import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    saved = torch.load(f"{path}/expected.pt")
    out = model(saved["ids"], labels=saved["ids"], output_indexer_kl=True)
    torch.testing.assert_close(out.logits, saved["logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.indexer_kl, saved["kl"], rtol=1e-3, atol=1e-5)
    (out.loss + out.indexer_kl.sum()).backward()
    kwargs = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    assert torch.equal(model.generate(saved["ids"], **kwargs), saved["generated"])
    model.save_pretrained(f"{path}/again")
    again = AutoModelForCausalLM.from_pretrained(f"{path}/again", trust_remote_code=True)
    assert torch.equal(again.eval()(saved["ids"]).logits, out.logits)
    print(type(model).__module__, type(model).__name__)
"""


@pytest.mark.slow
def test_it_loads_in_another_folder_without_this_package(ids, tmp_path):
    names = ("qwen2", "llama", "qwen3")
    for name in names:
        model = from_dense(small_model(name), **TINY)
        export_model(model, tmp_path / name)
        assert type(load_model(tmp_path / name)) is type(model)  # where the package is, its own code runs
        out = model(ids, output_indexer_kl=True)
        kwargs = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
        generated = model.generate(ids, **kwargs)
        expected = {"ids": ids, "logits": out.logits, "kl": out.indexer_kl, "generated": generated}
        torch.save({key: x.detach() for key, x in expected.items()}, tmp_path / name / "expected.pt")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", ELSEWHERE, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    shown = [line.split() for line in done.stdout.splitlines()]
    assert [name for _, name in shown] == ["Qwen2DSAForCausalLM", "LlamaDSAForCausalLM", "Qwen3DSAForCausalLM"]
    assert all(module.startswith("transformers_modules.") for module, _ in shown)


def test_it_is_pushed_to_a_hub_and_loads_from_there(ids, tmp_path, monkeypatch):
    """From a hub the code comes file by file, each by the imports of the last."""
    model = from_dense(small_model(), **TINY)
    export_model(model, tmp_path / "out", card="---\nlicense: apache-2.0\n---\n# A model\n")
    with Hub(token="secret") as hub:
        hub.set_environment(monkeypatch, tmp_path / "cache")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        url = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setenv("HF_TOKEN", "secret")
        export.push(tmp_path / "out", "someone/small-dsa")
        pushed = hub.repositories["model", "someone/small-dsa"].files
        assert pushed == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        loaded = AutoModelForCausalLM.from_pretrained("someone/small-dsa", trust_remote_code=True)
        assert type(loaded) is type(model)  # where the package is, its own code runs; elsewhere the hub's:
        cls = get_class_from_dynamic_module("modeling_dsa.Qwen2DSAForCausalLM", "someone/small-dsa")
        remote = cls.from_pretrained("someone/small-dsa")
        assert cls.__module__.startswith("transformers_modules.") and type(remote.config).__module__ != "dsa.config"
        for other in (loaded, remote):
            torch.testing.assert_close(other.eval()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        monkeypatch.setenv("HF_TOKEN", "another")
        with pytest.raises(HfHubHTTPError):
            export.push(tmp_path / "out", "someone/small-dsa")


def test_no_file_asks_for_what_a_bare_environment_lacks(tmp_path, monkeypatch):
    """A hub's files are checked one by one, before anything runs."""
    export_model(from_dense(small_model("llama"), **TINY), tmp_path)
    for name in ("dsa", "triton", "ziglang"):
        monkeypatch.setitem(sys.modules, name, None)
    files = sorted(tmp_path.glob("*.py"))
    assert len(files) > 20
    for file in files:
        named = check_imports(file)
        assert not [name for name in named if not (tmp_path / f"{name}.py").is_file()], file


def test_only_imports_are_changed():
    source = '''"""Text that says from dsa.masks import Slab."""
from math import pi
from dsa import kernels, reference as plain
from dsa.masks import (
    Slab,
    Visibility as V,
)

def f():
    import triton
    from dsa.kernels import check  # a comment
    return check, pi, "from dsa import x"
'''
    expected = '''"""Text that says from dsa.masks import Slab."""
from math import pi
from .dsa_kernels import __name__ as _
from . import dsa_kernels as kernels
from .dsa_reference import __name__ as _
from . import dsa_reference as plain
from .dsa_masks import Slab
from .dsa_masks import Visibility as V

def f():
    try:
        import triton
    except ImportError:
        raise
    from .dsa_kernels_check import __name__ as _
    from . import dsa_kernels_check as check
    return check, pi, "from dsa import x"
'''
    flattened, imported = export.flattened(source)
    assert flattened == expected
    assert imported == {"dsa.kernels", "dsa.reference", "dsa.masks", "dsa.kernels.check"}


def test_every_module_that_is_needed_is_there_and_no_other():
    found = export.sources("dsa.modeling")
    assert {"dsa.modeling", "dsa.config", "dsa.kernels.check", "dsa.kernels.triton.views"} <= found.keys()
    assert not [
        name for name in found if name.startswith(("dsa.training", "dsa.data", "dsa.evaluation", "dsa.families"))
    ]
    for name, source in found.items():
        for node in ast.walk(ast.parse(source)):
            assert not (isinstance(node, ast.ImportFrom) and not node.level and node.module.startswith("dsa")), name


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The repository's params and reports, and a model where the pipeline would have put it."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("profiles", "reports"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.png", "*.html"))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/base")
    for arm, mode in (("dsa", "sparse"), ("warmup", "dense")):
        tokenizer.save_pretrained(tmp_path / "models" / arm)
        from_dense(small_model(), **TINY, attention_mode=mode).save_pretrained(tmp_path / "models" / arm)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("arm", ["dsa", "warmup"])
def test_a_trained_arm_is_exported_with_a_card_of_the_runs_numbers(project, arm):
    stage.main(["out", "--arm", arm])
    card = (project / "out/README.md").read_text(encoding="utf-8")
    report = json.loads((project / "reports/report.json").read_text(encoding="utf-8"))
    (own,) = (row for table in ("trained", "untrained") for row in report[table] if row["arm"] == arm)
    for number in (f"{own['loss']:.4f}", f"{own['gap'][0]:+.4f}", "4 heads of 8 in each of 3 layers"):
        assert number in card
    assert arms.LABELS[arm] in card and "{{" not in card and str(project) not in card
    model = load_model(project / "out")
    assert model.config.attention_mode == "sparse" and model.config.index_topk == 256
    assert AutoTokenizer.from_pretrained(project / "out").chat_template
    if arm == "warmup":
        joined = load_indexer(small_model(), project / "out/indexer.safetensors")
        assert all(torch.equal(*pair) for pair in zip(joined.parameters(), model.parameters(), strict=True))


def test_what_is_exported_is_pushed_on_request_and_a_hub_that_refuses_is_one_line(project, monkeypatch, capsys):
    monkeypatch.setattr(stage, "push", lambda path, name: f"{path} to {name}")
    stage.main(["out", "--push", "someone/dsa"])
    assert capsys.readouterr().out == "out to someone/dsa\n"

    def refused(path, name):
        raise HfHubHTTPError("401 Unauthorized\nlog in", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(stage, "push", refused)
    with pytest.raises(SystemExit, match=r"^someone/dsa: 401 Unauthorized$"):
        stage.main(["again", "--push", "someone/dsa"])


def test_what_cannot_be_exported_is_one_line(project):
    (project / "full").mkdir()
    (project / "full/a").touch()
    with pytest.raises(SystemExit, match=r"^full: is there already$"):
        stage.main(["full"])
    shutil.rmtree(project / "models/dsa")
    with pytest.raises(SystemExit, match=r"^models/dsa: not there, "):
        stage.main(["out"])
