"""Rows that need what came before, and the pre-training on them: what a target promises must stand in the row."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from dsa.data.corpus import SourceFile
from dsa.data.import_order import families, in_import_order
from dsa.data.recall import Recall, positions
from dsa.training.induction import induction
from stages.params import Phase
from stages.pretrain import Steps


@pytest.fixture(scope="module")
def recall():
    tokenizer = AutoTokenizer.from_pretrained("data/base")
    text = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(4000))
    return Recall(tokenizer, torch.tensor(tokenizer(text, verbose=False)["input_ids"]))


def contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[i : i + len(part)] == part for i in range(len(ids) - len(part) + 1))


def targets(row) -> list[tuple[int, int]]:
    """[start, end) of each run of tokens with a weight."""
    edges = [0.0, *(float(w > 0) for w in row.weights), 0.0]
    starts = [i for i in range(len(edges) - 1) if edges[i] < edges[i + 1]]
    ends = [i for i in range(len(edges) - 1) if edges[i] > edges[i + 1]]
    return list(zip(starts, ends, strict=True))


@pytest.mark.parametrize("length", [64, 300, 1024])
@pytest.mark.parametrize("kind", ["stream", "table", "copy", "needles", "text"])
def test_rows_have_the_length_and_depend_on_the_seed_alone(recall, kind, length):
    rows = [recall.kinds[kind](random.Random(seed), length, 10**9) for seed in (1, 1, 2)]
    assert all(len(row.ids) == len(row.weights) == length for row in rows)
    assert rows[0] == rows[1] != rows[2]
    assert any(rows[0].weights)


@pytest.mark.parametrize("kind", ["stream", "table", "copy"])
def test_what_is_to_be_known_stands_earlier(recall, kind):
    """A target that cannot be found teaches to guess."""
    for seed in range(10):
        row = recall.kinds[kind](random.Random(seed), 400, 30)
        for start, end in targets(row):
            assert contains(row.ids[:start], row.ids[start:end]), (seed, start)


def test_answers_of_needles_have_half_of_the_weight_and_stand_in_the_text(recall):
    for seed in range(10):
        row = recall.needles(random.Random(seed), 600, 10**9)
        answers = sum(sum(row.weights[start:end]) for start, end in row.spans)
        assert answers == pytest.approx(sum(row.weights) / 2, rel=0.2)
        assert all(contains(row.ids[: row.spans[0][0]], row.ids[start:end]) for start, end in row.spans)


@pytest.mark.parametrize("length", [256, 2048])
def test_rows_to_measure_with_fill_the_length_and_ask_at_every_depth(recall, length):
    pairs, needles = recall.pairs_row(0, length), recall.needles_row(0, length)
    assert length - 16 < len(pairs.ids) <= length and len(needles.ids) == length
    assert sorted(pairs.depths) == [(i + 0.5) / 20 for i in range(20)]
    assert sorted(needles.depths) == [(i + 0.5) / 10 for i in range(10)]
    for row in (pairs, needles):
        first = row.context
        assert row.facts > 0 and 0 < first < row.spans[0][0]
        where = [at for start, end in row.spans for at in range(first) if row.ids[at : at + 2] == row.ids[start:end]]
        assert len(where) >= len(row.spans)
    depth = {d: pairs.ids.index(pairs.ids[s], 0) for (s, _), d in zip(pairs.spans, pairs.depths, strict=True)}
    assert depth[0.025] < depth[0.975]


def test_a_row_without_room_for_its_questions_is_an_error(recall):
    with pytest.raises(ValueError, match="20 questions do not fit into 128 tokens"):
        recall.pairs_row(0, 128)


def test_jumps_keep_order_and_reach_no_further_than_asked():
    spans = []
    for seed in range(200):
        position = positions(random.Random(seed), 100, 5000)
        assert position[0] == 0 and (position.diff() >= 1).all() and position[-1] < 5000
        spans.append(position[-1].item())
    assert max(spans) > 4000 > 1000 > min(spans)
    assert torch.equal(positions(random.Random(0), 100, 0), torch.arange(100))


def test_a_step_is_made_from_its_number_alone(recall):
    """Else a run that goes on from a checkpoint would see other rows."""
    phases = [
        Phase(length=64, rows=2, steps=3, mix="first", learning_rate=1e-2),
        Phase(length=128, rows=1, steps=2, mix="second", learning_rate=1e-3, far=500, gaps=1.0),
    ]
    mixes = {"first": {"stream": 1.0}, "second": {"copy": 0.5, "text": 0.5}}
    cfg = SimpleNamespace(phases=phases, mixes=mixes, last_learning_rate=5e-5)
    steps, again = Steps(recall, None, cfg, 0), Steps(recall, None, cfg, 0)
    assert len(steps) == 5
    whole = [steps[i] for i in range(5)]
    assert torch.equal(again[4]["input_ids"], whole[4]["input_ids"])
    assert [tuple(step["input_ids"].shape) for step in whole] == [(2, 65)] * 3 + [(1, 129)] * 2
    assert whole[4]["position_ids"].shape == (1, 128) and whole[4]["position_ids"][0, -1] > 127
    rates = [steps.learning_rate(i) for i in (0, 60, 3)]
    assert rates[0] < 1e-2 / 50 and rates[2] == pytest.approx(1e-3 * 4 / 60)


def test_the_constructed_circuit_copies_before_any_training():
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(0)
    plain, built = Qwen2ForCausalLM(config).eval(), Qwen2ForCausalLM(config).eval()
    induction(built)
    ids = torch.randint(512, (2, 60), generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    with torch.no_grad():
        right = [(m(ids).logits[:, 61:-1].argmax(-1) == ids[:, 62:]).float().mean().item() for m in (plain, built)]
    assert right[0] < 0.05 and right[1] > 0.5


def test_a_file_stands_behind_what_it_imports():
    def file(name, *imports):
        return SourceFile(f"pkg/{name}.py", "\n".join(imports) + "\nx = 1\n")

    files = [
        file("a", "from . import b", "from .c import x"),
        file("b", "import pkg.sub.d"),
        file("c", "from .a import y"),  # a circle
        SourceFile("pkg/sub/d.py", "from ..e import x\n"),
        file("e"),
        SourceFile("other/z.py", "from pkg import a\n"),
    ]
    order = [f.path for f in in_import_order(files)]
    assert sorted(order) == sorted(f.path for f in files)
    assert order.index("pkg/e.py") < order.index("pkg/sub/d.py") < order.index("pkg/b.py") < order.index("pkg/a.py")


def test_a_familys_files_become_one_text_in_import_order_and_long_ones_several(monkeypatch):
    monkeypatch.setattr("dsa.data.import_order.MAX_CHARS", 60)
    files = [
        SourceFile("pkg/one/a.py", "from pkg.one import b\n"),
        SourceFile("pkg/one/b.py", "B = 1\n"),
        SourceFile("pkg/one/c.py", "C = 1  # " + "long " * 6),
        SourceFile("pkg/two/d.py", "from pkg.one import a\n"),
    ]
    joined = families(files)
    assert [(f.family, f.text.count("# pkg/")) for f in joined] == [("pkg/one", 2), ("pkg/one", 1), ("pkg/two", 1)]
    assert joined[0].text == "# pkg/one/b.py\nB = 1\n\n# pkg/one/a.py\nfrom pkg.one import b\n\n"
    assert len({f.path for f in joined}) == len(joined)
