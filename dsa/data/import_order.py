"""Source files in an order in which what a file uses has been seen before it."""

import re
from collections.abc import Iterator
from itertools import groupby

from dsa.data.corpus import MAX_CHARS, SourceFile

IMPORT = re.compile(r"^\s*(?:from\s+(\.*)([\w.]*)\s+import\s+\(?([\w ,]*)|import\s+([\w.]+))", re.M)


def in_import_order(files: list[SourceFile]) -> list[SourceFile]:
    """The same files, package by package, each behind those of its package that it imports: what a file uses has been
    seen before it. Imports in a circle are cut where they are met."""
    by_module = {f.path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): f for f in files}
    ordered: dict[str, SourceFile] = {}

    def imported(file: SourceFile) -> Iterator[str]:
        folder = file.path.split("/")[:-1]
        for dots, module, names, plain in IMPORT.findall(file.text):
            module = module or plain
            base = [*folder[: len(folder) - len(dots) + 1], module] if dots else [module]
            base = ".".join(part for part in base if part)
            yield base
            yield from (f"{base}.{name}" for name in re.findall(r"\w+", names))

    def visit(file: SourceFile) -> None:
        seen.add(file.path)
        todo = [(file, imported(file))]
        while todo:
            top, modules = todo[-1]
            following = next((by_module[m] for m in modules if m in by_module and by_module[m].path not in seen), None)
            if following is None:
                ordered[top.path] = top
                todo.pop()
            elif following.path.split("/")[0] == top.path.split("/")[0]:
                seen.add(following.path)
                todo.append((following, imported(following)))

    seen: set[str] = set()
    for file in files:
        if file.path not in seen:
            visit(file)
    return list(ordered.values())


def families(files: list[SourceFile]) -> list[SourceFile]:
    """The files of each family in import order, one behind the other under their names, as texts of up to `MAX_CHARS`
    characters: what a single file is too short for."""
    joined: list[SourceFile] = []
    for family, members in groupby(sorted(in_import_order(files), key=lambda f: f.family), key=lambda f: f.family):
        parts = [""]
        for file in members:
            text = f"# {file.path}\n{file.text}\n"
            parts[-1:] = [parts[-1] + text] if len(parts[-1]) + len(text) <= MAX_CHARS else [parts[-1], text]
        joined += [SourceFile(f"{family}/{number}", part) for number, part in enumerate(filter(None, parts))]
    return joined
