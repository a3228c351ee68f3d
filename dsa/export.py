"""A model that travels: with the code that it needs, it loads where transformers and torch are, and nothing else.

`AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)` copies the code of a model by the relative imports
that it finds, and only from one flat folder. So each module of this package that the model needs is written there under
its whole name, `dsa.kernels.cpu.attend` as dsa_kernels_cpu_attend.py, with its imports changed and nothing else. The C
sources stay behind: on a CPU such a model runs on PyTorch alone.
"""

import ast
import json
from pathlib import Path

from huggingface_hub import HfApi

from dsa.modeling import DSAForCausalLM

PACKAGE = Path(__file__).parent
ENTRY = '''"""For `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`: DeepSeek Sparse Attention.

The files dsa_*.py beside this one are the modules of the package `dsa`, written here by its module dsa.export.
"""

from .dsa_config import {config}
from .{home} import {model}

__all__ = ["{config}", "{model}"]
'''
# transformers looks for what a file imports before it loads it, but not within `try`.
OPTIONAL = ["try:", "    {}", "except ImportError:", "    raise"]


def export_model(model: DSAForCausalLM, path: str | Path, tokenizer=None, card: str | None = None) -> None:
    """Write the model and its code, and the tokenizer and the model card (README.md) if they are given."""
    path = Path(path)
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    home, names = type(model).__module__, {"config": type(model.config).__name__, "model": type(model).__name__}
    (path / "modeling_dsa.py").write_text(ENTRY.format(home=flat(home), **names), encoding="utf-8")
    for module, source in sources(home).items():
        (path / f"{flat(module)}.py").write_text(source, encoding="utf-8")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    auto = {"AutoConfig": names["config"], "AutoModelForCausalLM": names["model"]}
    config["auto_map"] = {name: f"modeling_dsa.{cls}" for name, cls in auto.items()}
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if card is not None:
        (path / "README.md").write_text(card, encoding="utf-8")


def push(path: str | Path, repo_id: str) -> str:
    """Upload what `export_model` wrote to a hub, as `OWNER/NAME`, and return the commit's address.

    Needs a token that may write there (HF_TOKEN, or `hf auth login`); HF_ENDPOINT names another hub.
    """
    hub = HfApi()
    hub.create_repo(repo_id, exist_ok=True)
    return hub.upload_folder(repo_id=repo_id, folder_path=path).commit_url


def sources(root: str) -> dict[str, str]:
    """{module: its flattened source} of a module of this package and of all that it imports from there."""
    found, todo = {}, {root}
    while todo:
        module = todo.pop()
        found[module], imported = flattened(file_of(module).read_text(encoding="utf-8"))
        todo |= imported - found.keys()
    return found


def flattened(source: str) -> tuple[str, set[str]]:
    """The source with imports of this package's modules made relative, and those modules."""
    lines, imported = source.splitlines(), set()
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in sorted(nodes, key=lambda node: node.lineno, reverse=True):  # from the end: lines keep their numbers
        first = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        if first.split(".")[0] == "dsa":
            new = [line for name in node.names for line in relative(node.module, name, imported)]
        elif first.split(".")[0] == "triton":
            new = [line.format(ast.unparse(node)) for line in OPTIONAL]
        else:
            continue
        lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + line for line in new]
    return "\n".join(lines) + "\n", imported


def relative(module: str, name: ast.alias, imported: set[str]) -> list[str]:
    """`from module import name` within the flat folder; the module that it loads is added to `imported`."""
    alias = f" as {name.asname}" if name.asname else ""
    if file_of(submodule := f"{module}.{name.name}") is None:
        imported.add(module)
        return [f"from .{flat(module)} import {name.name}{alias}"]
    imported.add(submodule)
    # The first line is there for transformers, which copies the file that such a line names.
    names_it = f"from .{flat(submodule)} import __name__ as _"
    return [names_it, f"from . import {flat(submodule)} as {name.asname or name.name}"]


def flat(module: str) -> str:
    return module.replace(".", "_")


def file_of(module: str) -> Path | None:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
