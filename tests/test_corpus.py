import json

import pytest

from dsa.data import corpus
from dsa.data.corpus import SourceFile
from dsa.data.rows import messages_of, split_of

SOURCE = '''"""A module."""
LIMIT = 4096
NAMES = ("a", "b")
lower = 3


class Base:
    pass


class Child(Base):
    """Child of a base."""

    def compute(self, x, y=2):
        """Adds."""
        return x + y

    def __init__(self, z):
        pass


def twice(a):
    pass


def twice(a, b):
    pass


def nothing():
    pass
'''


def test_definitions_are_unambiguous_and_stand_in_the_file():
    facts = {(kind, answer) for _, kind, _, answer in corpus.definitions(SOURCE)}
    assert facts == {
        ("constant", "LIMIT = 4096"),
        ("constant", 'NAMES = ("a", "b")'),
        ("base", "class Child(Base):"),
        ("docstring", "Child of a base."),
        ("docstring", "Adds."),
        ("signature", "def compute(self, x, y=2):"),
    }
    assert corpus.definitions("def broken(") == []


@pytest.fixture(scope="module")
def files():
    return corpus.source_files(["accelerate", "networkx"])


def test_the_same_packages_give_the_same_rows(files):
    first = list(corpus.rows([files], [1.0], 40, seed=0))
    second = list(corpus.rows([corpus.source_files(["networkx", "accelerate"])], [1.0], 40, seed=0))
    assert json.dumps(first) == json.dumps(second)
    assert first != list(corpus.rows([files], [1.0], 40, seed=1))


def test_rows_have_the_schema_and_checkable_answers(files):
    fields = "id instruction input output history type_keyword language data_source input_len output_len num_utter type"
    for row in corpus.rows([files], [1.0], 60, seed=3):
        assert list(row) == fields.split()
        messages = messages_of(row)
        if row["type_keyword"][0] == "lookup":
            for answer in messages[1::2]:
                assert answer["content"] in messages[0]["content"]
            assert len(row["type_keyword"]) == 1 + len(messages) // 2
        else:
            assert row["input"] and row["output"]


def test_no_family_is_on_both_sides_and_near_copies_are_dropped():
    def file(path, *lines):
        return SourceFile(path, "\n".join(lines))

    def block(name):
        return [f"a_rather_long_line_of_code_number_{i}_of_{name} = {i}" for i in range(40)]

    families = [f"package/part{i}" for i in range(60)]
    held_out = [f for f in families if split_of(f, 0.3) == "test"]
    files = [file(f"{f}/module.py", *block(f)) for f in families]
    files.append(file(f"{held_out[0]}/copy.py", *block(next(f for f in families if f not in held_out))))
    train, test, dropped = corpus.separate(files, 0.3)
    assert not {f.family for f in train} & {f.family for f in test}
    assert {f.family for f in test} == set(held_out)
    assert dropped == 1 and not any(f.path.endswith("copy.py") for f in test)


def test_a_missing_package_is_named():
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        corpus.source_files(["no_such_package"])
