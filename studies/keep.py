"""Keep the page and the numbers of a run with another profile beside the default run's.

    dvc exp run -S profile=long
    python -m studies.keep          # reports/ to reports/long/

Its lock goes with them: what the numbers were computed from. `git restore .` and `dvc checkout` bring the default run
back, and leave what is kept.
"""

import re
import shutil
import subprocess
from pathlib import Path

from stages import params
from stages.html import to_html

PAGES = ["report.md", "report.json", "summary.json", "compare.json", "preflight.md", "preflight.json"]
FOLDERS = ["figures", "data", "train", "dpo", "evaluate", "benchmark"]
LINK = re.compile(r"\]\((?!figures/|report\.|preflight\.|[a-z]+:|#)")  # of a page, to what is not kept
OF_THE_DEFAULT_RUN = {
    "[where it loses]": "[where the default run loses]",
    "(see/page.html) shows": "(see/page.html) shows, of the default run's model,",
}


def main(reports: Path = Path("reports")) -> None:
    profile = params.load().profile
    committed = subprocess.run(["git", "show", "HEAD:params.yaml"], capture_output=True, encoding="utf-8", check=True)
    if f"profile: {profile}" in committed.stdout:
        raise SystemExit(f"params.yaml: profile: {profile} is the committed one, whose pages are those in {reports}")
    to = reports / profile
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    for name in PAGES:
        shutil.copy(reports / name, to)
    for name in FOLDERS:
        shutil.copytree(reports / name, to / name)
    shutil.copy("dvc.lock", to)
    for page in to.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for said, here in OF_THE_DEFAULT_RUN.items():
            text = text.replace(said, here)
        page.write_text(LINK.sub("](../", text), encoding="utf-8")
    (to / "report.html").write_text(to_html((to / "report.md").read_text(encoding="utf-8"), to), encoding="utf-8")


if __name__ == "__main__":
    main()
