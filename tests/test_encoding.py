"""That no text file is read or written in the encoding of the user's locale."""

import ast

from tests.conftest import ROOT

OPENS = {"read_text", "write_text", "open", "TextIOWrapper"}


def is_text(call: ast.Call) -> bool:
    """Whether this opens a text file: no argument is a mode with a b in it."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    values = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
    return name in OPENS and not any(isinstance(v, str) and "b" in v and set(v) <= set("rwxab+") for v in values)


def test_text_files_have_an_encoding():
    """A comment in params.yaml ended the last stage where the locale is zh_CN.GBK. Ruff's PLW1514 sees a method call
    only where it knows that the object is a path."""
    missing = []
    for room in ("dsa", "stages", "benchmarks", "studies", "tests"):
        for path in sorted((ROOT / room).rglob("*.py")):
            calls = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)]
            without = [c for c in calls if is_text(c) and "encoding" not in {keyword.arg for keyword in c.keywords}]
            missing += [f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}" for call in without]
    assert not missing
