"""What the project did not write is text on its pages: it opens no fence, ends no cell and runs no script."""

import json
import re

import markdown_it
import pytest

from stages.markdown import block, code, escape
from studies import failures_report, sweep_report
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


@pytest.mark.parametrize("name,module", [("failures", failures_report), ("sweep", sweep_report)])
def test_no_text_of_data_or_model_changes_a_benchmarks_page(tmp_path, monkeypatch, name, module):
    found = json.loads((ROOT / f"reports/{name}.json").read_text(encoding="utf-8"))
    for function in [n for n in vars(module) if n.startswith("draw")]:
        monkeypatch.setattr(module, function, lambda *args, **kwargs: None)
    pages = []
    for text in ("x", HOSTILE):
        module.write_report(replaced(found, text), tmp_path)
        pages.append((tmp_path / f"{name}.md").read_text(encoding="utf-8"))
    assert structure(pages[1]) == structure(pages[0])
