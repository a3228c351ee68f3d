"""Real text that every installation has: the Python sources of the pinned packages.

The `cpu` profile has no network, so its "hub" is this module. It turns source files into rows with the schema of
deepctrl-sft-data: a long file as the input, an instruction, and an answer that can be checked against the file: its
continuation, a definition to look up far above (signature, docstring, constant, base class), or random facts to repeat.
Preference pairs, with COIG-P's schema, set the true definition against the same name with another definition's
right-hand side.

Families, not files, are the unit of the split: the modules of one sub-package are often near copies of each other, so a
whole sub-package is on one side (`dsa.data.rows.split_of`), and a held-out file that still shares many lines with the
training side is dropped.
"""

import ast
import gc
import importlib.util
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Literal

from dsa.data.rows import split_of

# Pure Python and the same on every platform, so that the same pins give the same rows
PACKAGES = """
    accelerate aiohttp asyncssh celery datasets dulwich dvc fontTools fsspec huggingface_hub kombu matplotlib mpmath
    networkx pandas prompt_toolkit pydantic pygments rich setuptools sympy transformers trl
""".split()  # noqa: SIM905
MIN_CHARS = 1_500  # shorter files hold nothing to look up
MAX_CHARS = 400_000  # longer ones are generated tables
MAX_FAMILY_CHARS = 8_000_000  # transformers/models alone would be a third of the corpus
LONG_LINE = 32  # characters; shorter lines are shared by unrelated files
MAX_SHARED = 0.2  # share of a held-out file's long lines that may also stand on the training side
MAX_QUESTIONS = 8
MAX_NOTES = 20
PAIRS_SHARE = 0.4  # of the rows that only need reaching back; the others hide notes in a text
MAX_ANSWER_CHARS = 90
GUESSABLE = re.compile(r"\((self|cls)?\)")  # a signature without a parameter of its own needs no look-up


@dataclass(frozen=True)
class SourceFile:
    path: str  # "transformers/models/qwen2/modeling_qwen2.py"
    text: str

    @property
    def family(self) -> str:
        """The package and its first sub-package: the unit of the train / test split."""
        folders = self.path.split("/")[:-1]
        return "/".join(folders[:2])


def source_files(packages: list[str] | Literal["default"]) -> list[SourceFile]:
    """The usable Python files of `packages` (default: PACKAGES), sorted by path, a family's total size capped.

    Raises ModuleNotFoundError when a package is not installed.
    """
    files, size = [], Counter()
    for package in sorted(PACKAGES if packages == "default" else packages):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"data.packages: {package!r} is not an installed package")
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
            text = path.read_text(encoding="utf-8", errors="replace")
            name = f"{package}/{path.relative_to(root).as_posix()}"
            file = SourceFile(name, text)
            if not MIN_CHARS <= len(text) <= MAX_CHARS or "\ufffd" in text:
                continue
            if size[file.family] + len(text) > MAX_FAMILY_CHARS:
                continue
            size[file.family] += len(text)
            files.append(file)
    return files


def long_lines(text: str) -> set[int]:
    """Hashes of the distinct stripped lines of at least `LONG_LINE` characters."""
    return {hash(line) for raw in text.splitlines() if len(line := raw.strip()) >= LONG_LINE}


def separate(files: list[SourceFile], test_fraction: float) -> tuple[list[SourceFile], list[SourceFile], int]:
    """Split files by family: (train, test, near_copies), the last the number of dropped test files."""
    train = [f for f in files if split_of(f.family, test_fraction) == "train"]
    held_out = [f for f in files if split_of(f.family, test_fraction) == "test"]
    seen = set().union(*(long_lines(f.text) for f in train)) if train else set()
    test = []
    for file in held_out:
        lines = long_lines(file.text)
        if lines and len(lines & seen) / len(lines) <= MAX_SHARED:
            test.append(file)
    return train, test, len(held_out) - len(test)


def parse(text: str) -> ast.Module:
    """`ast.parse`, without the garbage collector: it would go through the growing tree again and again, in twice the
    time that parsing takes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        if enabled:
            gc.enable()


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Every statement, however deep, in no particular order; unlike `ast.walk` it looks into no expression."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            children = getattr(node, block, [])
            yield from children
            todo += children


@cache
def definitions(text: str) -> list[tuple[int, str, str, str]]:
    """Checkable facts of a Python file: (last line, kind, question, answer); every answer stands in the file.

    Lines count from 1. Names that are defined twice are left out: their question would have two answers.
    """
    try:
        tree = parse(text)
    except (SyntaxError, ValueError):
        return []
    lines, names, found = text.splitlines(), Counter(), []

    def add(name: str, kind: str, question: str, answer: str, line: int) -> None:
        if 3 <= len(answer) <= MAX_ANSWER_CHARS and not name.startswith("__"):
            found.append((name, line, kind, question, answer))

    for node in statements(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name, head = node.name, lines[node.lineno - 1].strip()
            names[name] += 1
            if isinstance(node, ast.ClassDef):
                if node.bases and head.endswith("):"):
                    add(name, "base", f"What is the base class of `{name}`?", head, node.lineno)
            elif head.endswith(":") and "(" in head and not GUESSABLE.search(head):
                add(name, "signature", f"What is the signature of `{name}`?", head, node.lineno)
            doc = node.body[0]
            if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str):
                first = next((s for s in doc.value.value.splitlines() if s.strip()), "").strip()
                if first and any(first in lines[i] for i in range(doc.lineno - 1, min(doc.lineno + 1, len(lines)))):
                    question = f"What is the first line of the docstring of `{name}`?"
                    add(name, "docstring", question, first, doc.lineno + 1)
        elif isinstance(node, ast.Assign) and node.lineno == node.end_lineno and len(node.targets) == 1:
            target, line = node.targets[0], lines[node.lineno - 1].strip()
            if isinstance(target, ast.Name):
                names[target.id] += 1
                plain = isinstance(node.value, ast.Constant | ast.Tuple | ast.List | ast.UnaryOp)
                if plain and line.startswith(target.id) and re.fullmatch(r"_?[A-Z][A-Z0-9_]+", target.id):
                    question = f"What is the value of the constant `{target.id}`?"
                    add(target.id, "constant", question, line, node.lineno)
    return [fact[1:] for fact in sorted(found, key=lambda f: f[1:]) if names[fact[0]] == 1]


def window(text: str, chars: int, rng: random.Random) -> tuple[int, list[str]]:
    """A run of whole lines of about `chars` characters: (number of its first line, lines)."""
    lines = text.splitlines()
    total, starts = 0, []
    for line in reversed(lines):  # lines from which at least `chars` characters follow
        total += len(line) + 1
        starts.append(total >= chars)
    starts.reverse()
    last = max((i for i, enough in enumerate(starts) if enough), default=0)
    first = rng.randint(0, last) if rng.random() < 0.7 else 0
    taken, size = [], 0
    for line in lines[first:]:
        if size >= chars:
            break
        taken.append(line)
        size += len(line) + 1
    return first + 1, taken


def continuation_row(file: SourceFile, chars: int, rng: random.Random) -> dict | None:
    """The first part of a window as input, the rest as the answer."""
    _, lines = window(file.text, chars, rng)
    cut = int(len(lines) * rng.uniform(0.1, 0.5))
    given, rest = "\n".join(lines[:cut]), "\n".join(lines[cut:])
    if not given.strip() or not rest.strip():
        return None
    return {
        "instruction": f"Continue the Python file {file.path}.",
        "input": given,
        "output": rest,
        "history": [],
        "type_keyword": ["continue"],
    }


def facts_in_window(file: SourceFile, chars: int, rng: random.Random) -> tuple[str, list[tuple[int, str, str, str]]]:
    """A window's text and the definitions in it."""
    first, lines = window(file.text, chars, rng)
    facts = [fact for fact in definitions(file.text) if first <= fact[0] - 1 and fact[0] < first + len(lines)]
    text = "\n".join(lines)
    return text, [fact for fact in facts if fact[3] in text]


def lookup_row(file: SourceFile, chars: int, rng: random.Random) -> dict | None:
    """A window, then questions about definitions in it, the last as the row's own turn, the others as its history."""
    text, facts = facts_in_window(file, chars, rng)
    if not facts:
        return None
    facts = rng.sample(facts, min(MAX_QUESTIONS, len(facts)))
    turns = [[question, answer] for _, _, question, answer in facts]
    turns[0][0] = f"{text}\n\n{turns[0][0]}"
    (question, answer), history = turns[-1], turns[:-1]
    kinds = [kind for _, kind, _, _ in facts]
    return {
        "instruction": question,
        "input": "",
        "output": answer,
        "history": history,
        "type_keyword": ["lookup", *kinds],
    }


def random_facts(rng: random.Random, words: list[str]) -> Iterator[tuple[str, str]]:
    """Random keys and values without end, each put together from the beginnings of two words; no key twice."""
    seen = set()
    while True:
        key, value = ("".join(w[: rng.randint(2, 5)] for w in rng.choices(words, k=2)) for _ in range(2))
        if key not in seen:
            seen.add(key)
            yield key, value


def recall_row(file: SourceFile, chars: int, rng: random.Random) -> dict | None:
    """Random facts, asked for in another order: a JSON object that fills the row, or notes in a window of the file.

    Nothing but reaching back helps. The forms are those of dsa/data/recall.py, which the base model was trained on and
    which retrieval is measured with, here with other keys and values.
    """
    words = sorted(set(re.findall(r"[A-Za-z]{4,}", file.text)))
    if len(words) < 40:
        return None
    known = random_facts(rng, words)
    if rng.random() < PAIRS_SHARE:
        kind, told = "pairs", [f'"{key}": "{value}",' for key, value in islice(known, chars // 38)]
        lines = told
    else:
        kind, told = "notes", [f"    # note: {key} is {value}." for key, value in islice(known, MAX_NOTES)]
        _, lines = window(file.text, chars - 30 * MAX_NOTES, rng)
        for note in told:
            lines.insert(rng.randint(0, len(lines)), note)
    asked = rng.sample(told, min(MAX_NOTES, len(told)))
    return {
        "instruction": "Give these facts again, in another order." if kind == "pairs" else "Give the notes again.",
        "input": "\n".join(lines),
        "output": "\n".join(asked),
        "history": [],
        "type_keyword": ["recall", kind],
    }


def draw(sides: list[list[SourceFile]], shares: list[float], rng: random.Random) -> Iterator[SourceFile]:
    """Files without end: a side by its share, then one of its files by the square root of its length."""
    weights = [[len(f.text) ** 0.5 for f in files] for files in sides]
    while True:
        side = rng.choices(range(len(sides)), shares)[0]
        yield rng.choices(sides[side], weights[side])[0]


def rows(
    sides: list[list[SourceFile]],
    shares: list[float],
    count: int,
    seed: int,
    chars: tuple[int, int, int] = (1_500, 6_500, 5_500),
    lookup_share: float = 0.3,
    recall_share: float = 0.4,
) -> Iterator[dict]:
    """`count` rows in the schema of deepctrl-sft-data, the same for the same files and seed.

    `shares` gives how often each of the `sides` (training and held-out files) is drawn. A row's window has `chars`
    (least, most, likeliest) characters: by default some rows are too short, which gives `filter` its work.
    """
    rng = random.Random(seed)
    made = 0
    kinds = lookup_row, recall_row, continuation_row
    of_kinds = lookup_share, recall_share, 1 - lookup_share - recall_share
    for file in draw(sides, shares, rng):
        if made == count:
            return
        (make,) = rng.choices(kinds, of_kinds)
        row = make(file, int(rng.triangular(*chars)), rng)
        if row is None:
            continue
        made += 1
        yield {
            "id": made,
            **row,
            "language": "english",
            "data_source": file.family,
            "input_len": len(row["instruction"]) + len(row["input"]),
            "output_len": len(row["output"]),
            "num_utter": len(row["history"]) + 1,
            "type": int(row["type_keyword"][0] == "lookup"),
        }


def wrong_answer(kind: str, answer: str, others: list[str], rng: random.Random) -> str | None:
    """A plausible wrong answer: the asked-for name, the rest from another definition of its kind; None if none differs.

    "def load(path, mode):" with "def save(obj):" becomes "def load(obj):". Who only copies the name cannot tell them
    apart.
    """
    separator = {"signature": "(", "base": "(", "constant": "="}.get(kind)
    candidates = set()
    for other in others:
        if separator is None:
            candidates.add(other)
        elif separator in other:
            candidates.add(answer.partition(separator)[0] + separator + other.partition(separator)[2])
    candidates.discard(answer)
    return rng.choice(sorted(candidates)) if candidates else None


def preference_rows(
    sides: list[list[SourceFile]], shares: list[float], count: int, seed: int, chars: tuple[int, int, int]
) -> Iterator[dict]:
    """`count` rows in the schema of COIG-P; the arguments are those of `rows`.

    The prompt is a window of a file and a question about a definition in it, `chosen` the true answer.
    """
    rng = random.Random(seed)
    made = 0
    for file in draw(sides, shares, rng):
        if made == count:
            return
        text, facts = facts_in_window(file, int(rng.triangular(*chars)), rng)
        if not facts:
            continue
        _, kind, question, answer = rng.choice(facts)
        others = [f[3] for f in definitions(file.text) if f[1] == kind and f[3] != answer]
        wrong = wrong_answer(kind, answer, others, rng)
        if wrong is None:
            continue
        made += 1
        yield {
            "conversations": [{"from": "human", "value": f"{text}\n\n{question}"}],
            "chosen": {"from": "gpt", "value": answer},
            "rejected": {"from": "gpt", "value": wrong},
            "domain": kind,
            "data_source": file.family,
        }
