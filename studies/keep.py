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

PAGES = ["report.md", "report.html", "report.json", "summary.json", "compare.json", "preflight.md", "preflight.json"]
FOLDERS = ["figures", "data", "train", "dpo", "evaluate", "benchmark"]
LINK = re.compile(r"""(\]\(|href=")(?!figures/|report\.|preflight\.|[a-z]+:|#)""")  # of a page, to what is not kept


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
    for page in (*to.glob("*.md"), *to.glob("*.html")):
        page.write_text(LINK.sub(r"\1../", page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
