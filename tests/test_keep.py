"""A run of another profile is kept beside the default's, its links as good as before."""

import shutil
import subprocess

import pytest

from studies import keep
from tests.conftest import ROOT


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The committed run as if it were one of the profile smoke, in a clone of its own."""
    for name in ("reports", "profiles"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("params.yaml", "dvc.yaml", "dvc.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "params.yaml"], [*identity, "commit", "-qm", "run"]):
        subprocess.run(["git", *command], check=True)
    return tmp_path


def test_pages_numbers_and_lock_are_kept_and_links_lead_where_they_led(run):
    params = (run / "params.yaml").read_text(encoding="utf-8")
    (run / "params.yaml").write_text(params.replace("profile: cpu", "profile: smoke"), encoding="utf-8")
    keep.main()
    kept = run / "reports/smoke"
    assert (kept / "dvc.lock").read_bytes() == (run / "dvc.lock").read_bytes()
    assert {path.name for path in kept.iterdir()} == {*keep.PAGES, "report.html", *keep.FOLDERS, "dvc.lock"}
    page = (kept / "report.md").read_text(encoding="utf-8")
    assert "](../../README.md)" in page and "](figures/payoff.png)" in page and "](report.json)" in page
    assert "](../log.md)" in page and "[where the default run loses](../failures.md)" in page
    assert 'href="../log.md"' in (kept / "report.html").read_text(encoding="utf-8")


def test_the_committed_profiles_own_pages_are_where_they_are(run):
    with pytest.raises(SystemExit, match="profile: cpu is the committed one"):
        keep.main()
