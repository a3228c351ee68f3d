"""What the project did not write is text on its pages: it opens no fence, ends no cell and runs no script."""

import json
import re
import shutil
from pathlib import Path

import markdown_it
import pytest

from benchmarks import failures_report, long_context_report, sweep_report
from stages import preference, report
from stages.markdown import block, code, escape
from tests.conftest import ROOT

HOSTILE = (
    "```\n# Heading\n\n</code><script>alert(1)</script> | cell | `b` **c** *d* __e__ [f](g) ![h](i) <img onerror=x>"
    "\n~~~~\n---\n* item \\| \\` &amp; ~~j~~ $k$ <!-- \r\n\x0b\u2028 ````"
)
RENDERER = markdown_it.MarkdownIt("commonmark").enable("table")  # html on, as elsewhere
NAMED_OUTSIDE = ("language", "data_source", "left_out", "bad_rows", "tasks")  # these sections' keys are
OURS = ("arms", "ablation", "form")  # strings that decide what is on a page


def replaced(content, text: str):
    """A report's numbers with `text` in the place of every string and of every name that is not ours."""
    if isinstance(content, dict):
        values = {key: value if key in OURS else replaced(value, text) for key, value in content.items()}
        return {key: {text: next(iter(v.values()))} if key in NAMED_OUTSIDE and v else v for key, v in values.items()}
    if isinstance(content, list):
        return [replaced(value, text) for value in content]
    return text if isinstance(content, str) else content


def structure(markdown: str) -> list:
    """Everything on a page but its words."""
    return [
        (token.type, token.tag, [(c.type, c.tag) for c in token.children or [] if c.type not in ("text", "softbreak")])
        for token in RENDERER.parse(markdown)
    ]


@pytest.mark.parametrize("text", ["a|b", "``x`", "`", "<|im_end|>", "<b>", "*_x_*", "\\", "[a](b)", "\x00\x1b", " x "])
def test_tokens_stay_what_they_are_in_a_table(text):
    cells = [t for t in RENDERER.parse(f"| a | b |\n|---|---|\n| {code(text)} | y |\n") if t.type == "inline"]
    (span,) = cells[2].children
    shown = text.replace("\x00\x1b", "\\x00\\x1b")
    assert (span.type, span.content, cells[3].content) == ("code_inline", shown, "y")
    fenced = block("x\n```\n" + text + "\n````\n# y")
    tokens = RENDERER.parse(f"before\n\n{fenced}\n\nafter")
    assert [t.type for t in tokens if t.type in ("fence", "heading_open")] == ["fence"]
    assert tokens[3].content == f"x\n```\n{shown}\n````\n# y\n"


@pytest.mark.parametrize(
    "text", ["a_b_c", "__init__", "**b**", "`c`", "a|b", "<script>", "&lt;", "[a](b)", "\\_", HOSTILE]
)
def test_a_name_reads_as_it_is_written(text):
    html = RENDERER.render(f"| {escape(text)} |\n|---|\n")
    shown = re.sub(r"\s+", " ", re.sub("<[^>]*>", "", html))
    one_line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.replace("\n", " "))
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        shown = shown.replace(entity, character)
    assert shown.strip() == re.sub(r"\s+", " ", one_line)


class SomePredictions:
    """Numbers of the shape of `stages.statistics.Predictions`; which, is of no importance to what is text."""

    def __init__(self, *args):
        pass

    def first(self, count):
        return self

    def agreement(self, *args):
        return 0.9

    def gap(self, *args, **kwargs):
        return 0.1, 0.01

    lookups = gap

    def summary(self, *args):
        return {"loss": 1.0, "gap": 0.1, "gap_se": 0.01, "retrieval": 0.1, "retrieval_tokens": 0.1}


@pytest.fixture
def report_with(tmp_path, monkeypatch):
    """report.md and report.html of the committed numbers, with another text for every string in them."""
    for name in ("reports", "profiles"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("params.yaml", "dvc.yaml", "data/base/pretrain.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "Predictions", SomePredictions)
    monkeypatch.setattr(report, "draw", lambda *args: None)
    pair, names = (0.5, 0.01), ("accuracy", "margin", "before", "after", "chosen", "kl", "lm_loss")
    difference = dict.fromkeys(("accuracy", "margin", "after"), pair)

    def summarize(metrics, beta, predictions):
        arms = {arm: dict.fromkeys(names, pair) | {"generations": m["generations"]} for arm, m in metrics.items()}
        counts = {"held_out_pairs": 4, "units": 4, "pairs": 4}
        return {"arms": arms, "difference": difference, "differs": dict.fromkeys(difference, False)} | counts

    monkeypatch.setattr(preference, "summarize", summarize)

    def write(text):
        for path in Path("reports").glob("*/*.json"):
            content = json.loads((ROOT / path).read_text())
            content.pop("python_packages", None)  # as with data that are not made here
            content |= {key: {"a": {"rows": 1}} for key in ("bad_rows",) if key in content}
            content |= {key: {"a": {"acc": 0.5}} for key in ("tasks",) if key in content}
            path.write_text(json.dumps(replaced(content, text)))
        report.main()
        return Path("reports/report.md").read_text(), Path("reports/report.html").read_text()

    return write


def test_no_text_of_data_or_model_changes_the_report(report_with):
    plain, plain_html = report_with("x")
    hostile, hostile_html = report_with(HOSTILE)
    assert structure(hostile) == structure(plain)
    assert re.findall("<[^> ]+", hostile_html) == re.findall("<[^> ]+", plain_html)


@pytest.mark.parametrize(
    "name,module", [("failures", failures_report), ("long_context", long_context_report), ("sweep", sweep_report)]
)
def test_no_text_of_data_or_model_changes_a_benchmarks_page(tmp_path, monkeypatch, name, module):
    found = json.loads((ROOT / f"reports/{name}.json").read_text())
    for function in [n for n in vars(module) if n.startswith("draw")]:
        monkeypatch.setattr(module, function, lambda *args, **kwargs: None)
    pages = []
    for text in ("x", HOSTILE):
        module.write_report(replaced(found, text), tmp_path)
        pages.append((tmp_path / f"{name}.md").read_text())
    assert structure(pages[1]) == structure(pages[0])
