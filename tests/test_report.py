"""report.md and report.html from numbers that are changed here: what they say, and what is text on them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from stages import params, preference, report
from stages.markdown import NBSP
from tests.conftest import ROOT
from tests.test_markdown import HOSTILE, replaced, structure

FAMILIES = "no file family of the held-out rows was seen in any training, the base model's included"


class SomePredictions:
    """Numbers of the shape of `stages.statistics.Predictions`; no test here is about which."""

    def __init__(self, *args):
        pass

    rows, positions, count = np.arange(2), np.arange(2), 14
    kinds = np.array(["lookup", "continue"])

    def first(self, count):
        return self

    def agreement(self, *args):
        return 0.9

    def gap(self, *args, **kwargs):
        return 0.1, 0.01

    lookups = gap


def summarize(metrics, beta, predictions):
    pair, names = (0.5, 0.01), ("accuracy", "margin", "before", "after", "chosen", "kl", "lm_loss")
    arms = {arm: dict.fromkeys(names, pair) for arm in metrics}
    difference = dict.fromkeys(("accuracy", "margin", "after"), pair)
    counts = {"held_out_pairs": 4, "units": 4, "pairs": 4}
    return {"arms": arms, "difference": difference, "differs": dict.fromkeys(difference, False)} | counts


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """report.md and report.html of the committed numbers after an edit of each file, (its name, its content)."""
    for name in ("reports", "profiles"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("params.yaml", "dvc.yaml", "data/base/pretrain.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "Predictions", SomePredictions)
    monkeypatch.setattr(report, "draw", lambda *args: None)
    monkeypatch.setattr(preference, "summarize", summarize)

    def write(edit=lambda name, content: content):
        for path in Path("reports").glob("*/*.json"):
            name = path.relative_to("reports").with_suffix("").as_posix()
            path.write_text(
                json.dumps(edit(name, json.loads((ROOT / path).read_text(encoding="utf-8")))), encoding="utf-8"
            )
        report.main()
        return tuple(Path(f"reports/report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))

    return write


def changed(file: str, **values):
    """An edit of one file; a name with dots is a path."""

    def edit(name, content):
        for key, value in values.items() if name == file else ():
            *sections, last = key.split("__")
            section = content
            for part in sections:
                section = section[part]
            section[last] = value
        return content

    return edit


def test_no_text_of_data_or_model_changes_the_report(pages):
    def all_strings(text):
        def edit(name, content):
            content.pop("python_packages", None)  # as with data that are not made here
            content |= {key: {"a": {"rows": 1}} for key in ("bad_rows",) if key in content}
            content |= {key: {"a": {"acc": 0.5}} for key in ("tasks",) if key in content}
            return replaced(content, text)

        return edit

    plain, plain_html = pages(all_strings("x"))
    hostile, hostile_html = pages(all_strings(HOSTILE))
    assert structure(hostile) == structure(plain)
    assert re.findall("<[^> ]+", hostile_html) == re.findall("<[^> ]+", plain_html)


def test_what_the_base_model_has_seen_is_said_where_it_is_known(pages):
    """It was claimed wherever the profile named the embedded base model, with a user's own rows too."""
    assert FAMILIES in pages()[0]
    own_rows = changed("data/download", sft__source="rows.jsonl")
    others_base = changed("data/model", source="hf://Qwen/Qwen2.5-0.5B")
    other_families = changed("data/download", python_packages__test_families=["pygments", "json"])
    for edit in (own_rows, others_base, other_families):
        text, _ = pages(edit)
        assert FAMILIES not in text and "what the base model has seen of them is not known" in text
    assert "no data source of theirs is among the rows that were trained on" in pages(own_rows)[0]
    profile = params.read(Path("profiles/cpu.yaml"))
    profile["data"]["split_by"] = "prompt"
    Path("profiles/cpu.yaml").write_text(params.dump(profile), encoding="utf-8")
    text, _ = pages()
    assert FAMILIES not in text and "no prompt of theirs is among the rows that were trained on" in text


def test_the_same_training_is_said_where_it_was(pages):
    said = ("Trained for the same", "same rows, same order", "same pairs, order, budget")
    assert all(words in pages()[0] for words in said)
    text, _ = pages(changed("train/dense", tokens=5, rows=1))
    assert "(5 dense," in text and not any(words in text for words in said[:2]) and said[2] in text
    assert said[2] not in pages(changed("dpo/dsa", tokens=5))[0]


def test_devices_and_precision_are_those_of_the_training(pages):
    """The report may be written elsewhere, and stages may come from a cache."""
    assert "Trained on CPU (" in pages()[0]

    def elsewhere(name, content):
        if name.split("/")[0] in ("train", "dpo"):
            content["run"]["device"] = "NVIDIA H100"
        return content | ({"precision": "float32"} if name == "train/dense" else {})

    text, _ = pages(elsewhere)
    assert "Trained on NVIDIA H100, in bfloat16 autocast and float32" in text


def test_answers_are_right_and_wrong_where_they_are_known_to_be(pages):
    assert "a right and a wrong answer" in pages()[0]
    text, _ = pages(changed("data/download", preference__source="hf://datasets/m-a-p/COIG-P"))
    assert "a chosen and a rejected answer" in text and "right answer" not in text


def test_exact_answers_are_called_few_where_they_are(pages):
    assert "Exact answers are few" in pages()[0]
    assert "Exact answers are few" not in pages(changed("evaluate/dense", arms__dense__retrieval=0.5))[0]


def test_the_headline_says_which_rows_lose_and_that_drift_is_no_merit(pages):
    """The mean alone stood there, of rows that gain and rows that lose; and a window that is better than dense
    attention where both see every key looked like a merit of the window."""
    head = pages()[0].split("## After training")[0]
    for words in (
        "in the 1 that look up definitions (a loss)",
        "in the 1 that continue a file (a loss)",
        "14 file families",
    ):
        assert words in head.replace(NBSP, " ")
    caption = next(line for line in pages()[0].splitlines() if line.startswith("*Loss of each trained arm"))
    assert f"the window +0.1000{NBSP}±{NBSP}0.0100" in caption and "what training did" in caption


def test_every_number_of_the_page_is_in_a_json_file(pages):
    """The window's interval and the share of the same first choice stood on the page alone."""
    markdown, _ = pages()
    tables = json.loads(Path("reports/report.json").read_text(encoding="utf-8"))
    window = next(row for row in tables["trained"] if row["arm"] == "window_trained")
    assert window["gap"] == [0.1, 0.01] and window["agreement"] == 0.9
    tables["trained"][-1] |= {"gap": [0.7, None], "agreement": 0.123}
    p = params.load("report")
    report.write_page(p, report.read_stages(), tables)
    edited = Path("reports/report.md").read_text(encoding="utf-8")
    row = next(line for line in edited.splitlines() if line.startswith("| recency window, trained"))
    assert f"+0.7000{NBSP}±{NBSP}–" in row and f"12.3{NBSP}%" in row and row not in markdown


def test_the_html_page_has_contents_folds_times_and_scrolls_wide_tables(pages):
    markdown, html = pages()
    assert '<meta name="viewport"' in html
    names = re.findall(r'<a href="#([^"]+)">', html)
    assert names == re.findall(r'<h2 id="([^"]+)">', html) and len(names) == markdown.count("\n## ") > 9
    assert len(set(names)) == len(names) and "what-it-costs" in names  # README links to it
    assert html.count('<div class="wide"><table>') == html.count("<table>") == html.count("</table></div>")
    times = html.split("<details>")[1].split("</details>")[0]
    assert times.count("<tr>") > 20 and '<td style="text-align:right">' in times
    assert (
        html.count("<figure>") == html.count("<figcaption>") == html.count('src="data:image/png') == html.count("<img")
    )
    for page in ("../README.md", "sweep.md", "failures.md", "log.md", "report.json"):
        assert f'href="{page}"' in html and Path("reports", page).suffix in (".md", ".json")


def test_numbers_do_not_break_and_one_row_is_one(pages):
    markdown, _ = pages(changed("evaluate/dense", arms__dense__rows=1))
    assert f"1{NBSP}held-out row of" in markdown
    own = re.sub(r"```.*?```|`[^`\n]*`", "", markdown, flags=re.DOTALL)
    assert "\\x" not in own and f"within ±{NBSP}0.01" in own
    assert not re.findall(r"\d [±%]|± \d", own)


def test_spaces_that_a_template_writes_are_not_escaped(pages):
    assert r"\xa0" not in "".join(pages())
