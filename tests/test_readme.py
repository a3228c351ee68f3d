"""The numbers of README and docs/ are those of the committed files, in both languages, and there are no others."""

import json
import re
from pathlib import Path

import pytest

from dsa.config import FAMILIES
from stages import lock, readme
from stages.html import anchor
from studies import failures_report
from studies.sweep_points import Point
from studies.sweep_report import Sweep
from tests import families
from tests.conftest import ROOT

PAGES = {path.relative_to(ROOT).as_posix(): path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))}
TRANSLATED = [name for name in PAGES if name.replace(".md", ".zh.md") in PAGES]
NUMBER = re.compile(r"(?<![\w.])(?<!\w-)[+-]?\d+(?:,\d{3})*(?:\.\d+)*")
# Numbers that are written by hand, and what they are of.
BY_HAND = {
    "README": {"5": "GB of the environment", "3.11": "the least Python"},
    "docs/full-run": {
        "10,000": "the profile's rows",
        "1,024": "the profile's least tokens",
        "32": "GB of a GPU",
        "24": "GB of a GPU",
        "16": "GB of a GPU",
        "40": "GB of disk, by arithmetic",
        "6": "GB of a checkpoint, by arithmetic",
        "2": "GB of a model, by arithmetic; hours, by FLOPs",
        "17": "GB of the published data",
    },
    "docs/limits": {"1": "the default of a variable"},
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def numbers():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return readme.context()


def blocks(name: str) -> dict[str, str]:
    return {match[2]: match[0] for match in readme.BLOCK.finditer(PAGES[name].read_text(encoding="utf-8"))}


def by_hand(text: str) -> str:
    """What is prose and no block, code or address."""
    return re.sub(
        r"```.*?```|`[^`\n]*`|\]\([^)]*\)|<!--.*?-->|^\d\. ", "", readme.BLOCK.sub("", text), flags=re.DOTALL | re.M
    )


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_are_those_of_the_committed_numbers(name, numbers):
    """`python -m stages.readme` makes them anew."""
    text = PAGES[name].read_text(encoding="utf-8")
    template = ROOT / "stages" / ("readme.zh.md.jinja" if name.endswith(".zh.md") else "readme.md.jinja")
    assert readme.filled(text, template, numbers) == text


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_languages_show_the_same_numbers(name):
    ours, theirs = blocks(name), blocks(name.replace(".md", ".zh.md"))
    assert list(ours) == list(theirs)
    for block in ours:
        assert sorted(NUMBER.findall(ours[block])) == sorted(NUMBER.findall(theirs[block])), block


@pytest.mark.parametrize("name", [page for name in TRANSLATED for page in (name, name.replace(".md", ".zh.md"))])
def test_no_other_number_is_typed_by_hand(name):
    known = BY_HAND.get(name.removesuffix(".md").removesuffix(".zh"), {})
    found = set(NUMBER.findall(by_hand(PAGES[name].read_text(encoding="utf-8"))))
    assert not found - known.keys()
    if not name.endswith(".zh.md"):  # nor does the list outlive the page; some are words in Chinese, or in English
        twin = PAGES[name.replace(".md", ".zh.md")].read_text(encoding="utf-8")
        assert not known.keys() - found - set(NUMBER.findall(by_hand(twin)))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere_within_the_repository(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name].read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        path = (PAGES[name].parent / file).resolve() if file else PAGES[name]
        assert path.exists() and path.is_relative_to(ROOT), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        assert not heading or heading in map(anchor, headings), target


def test_a_changed_number_changes_the_pages(numbers):
    text = PAGES["README.md"].read_text(encoding="utf-8")
    first, *others = numbers["runs"]
    dsa = first["rows"]["dsa"] | {"gap": [0.5, None], "exact": {"needles": 0.25}}
    runs = [first | {"rows": first["rows"] | {"dsa": dsa}}, *others]
    edited = readme.filled(text, ROOT / "stages/readme.md.jinja", numbers | {"runs": runs})
    row, *_ = (line for line in edited.splitlines() if "| **DSA** |" in line)
    assert "| +0.5000\u00a0±\u00a0– | – | 25.0\u00a0% |" in row
    assert by_hand(edited) == by_hand(text)


def test_dsa_is_faster_from_the_length_where_no_process_and_no_longer_row_says_otherwise():
    rows = {512: (1.2, 1.1), 1024: (1.1, 0.9), 2048: (1.5, 1.4), 4096: (2.0, 2.0)}
    lengths = {n: {"ratio": ratio, "least": least} for n, (ratio, least) in rows.items()}
    assert readme.faster_from(lengths) == 2048
    assert readme.faster_from({512: lengths[512]}) == 512 and readme.faster_from({1024: lengths[1024]}) is None
    ours = {"tables": {"prefill": [{"length": 8, "ratio": {"a": 2.0}}]}}
    other = {"tables": {"prefill": [{"length": n, "ratio": {"a": 3.0}, "ratio_range": {"a": [1, 4]}} for n in (8, 9)]}}
    expected = {8: {"ratio": 2.0, "least": 2.0}, 9: {"ratio": 3.0, "least": 1}}
    assert readme.cost_tables([ours, other]) == {"prefill": {"a": expected}}
    large, small = ({"tables": {"layer_train": [{"length": n, "ratio": {"a": n}}]}} for n in (1, 2))
    shapes = [{"shapes": {"layer": size}} for size in ("large", "small")]
    assert list(readme.cost_tables([large | shapes[0], small | shapes[1]])["layer_train"]["a"]) == [1]
    assert list(readme.cost_tables([large | shapes[0], small | shapes[0]])["layer_train"]["a"]) == [1, 2]


def test_means_of_the_sweep_are_those_of_its_page():
    sweep = json.loads(Path("reports/sweep.json").read_text(encoding="utf-8"))
    found, page = readme.sweep_means(sweep), Sweep(sweep)
    base, scarce = sweep["base"], {"topk": found["scarce"]}
    groups = (("topk", {}), ("indexer", scarce), ("warmup", scarce), ("ablation", scarce))
    for group, fixed in groups:
        assert len(found[group]) > 3
        for row in found[group]:
            point = Point(**base | fixed | {key: value for key, value in row.items() if key != "gap"})
            assert row["gap"] == pytest.approx(page.paired("gap", point).mean, abs=2e-5)


def test_numbers_of_other_models_than_the_locks_are_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lock.made_elsewhere({"models": lock.model_hashes(["models/dsa"])})  # no lock, so nothing is known
    text = "stages:\n  sparse:\n    outs:\n    - {path: models/dsa, md5: abc.dir}\n  model: {cmd: x}\n"
    Path("dvc.lock").write_text(text, encoding="utf-8")
    run = {"models": lock.model_hashes(["models/dsa"])}
    assert run["models"] == {"models/dsa": "abc.dir"} and not lock.made_elsewhere(run)
    assert lock.made_elsewhere({}) and lock.made_elsewhere({"models": {"models/dsa": None}})
    Path("dvc.lock").write_text(text.replace("abc", "abd"), encoding="utf-8")
    assert lock.made_elsewhere(run)


def test_a_studys_page_says_whether_its_models_are_the_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(failures_report, "draw", lambda *args: None)
    found = json.loads(Path("reports/failures.json").read_text(encoding="utf-8"))
    for models, said in (
        (lock.model_hashes(["models/dsa"]), "Made from the models of this repository's `dvc.lock`"),
        ({"models/dsa": "another"}, "Made from models of another run (commit"),
    ):
        failures_report.write_report(found | {"run": found["run"] | {"models": models}}, tmp_path)
        assert said in (tmp_path / "failures.md").read_text(encoding="utf-8")


def test_the_page_of_families_has_each_of_them_with_every_contract():
    """After a change of either: python -m tests.families."""
    found = json.loads((ROOT / "reports/families.json").read_text(encoding="utf-8"))
    assert all(
        sorted(found["outcomes"][name]) == sorted(FAMILIES) for name in (*families.contracts(), families.PIPELINE)
    )
    assert {outcome for of in found["outcomes"].values() for outcome in of.values()} == {"passed"}
    assert (ROOT / "reports/families.md").read_text(encoding="utf-8") == families.page(found) + "\n"
