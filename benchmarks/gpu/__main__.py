"""A GPU that is there for ten minutes: are the kernels right on it, what do they cost, what does a step need?

    python -m benchmarks.gpu                            # at most 8 minutes; writes reports/gpu/<device>.json as it goes
    python -m benchmarks.gpu --page                     # reports/gpu/README.md from all that lies there
    python -m benchmarks.gpu --rehearse --out FOLDER    # on a CPU: Triton's interpreter, tiny sizes, meaningless times

No network and no DVC: it needs torch 2.11, triton 3.6 and transformers 5.17, or later ones, and numpy. The rounds come
in order of worth. Each part runs in a process of its own that is started anew behind a case that killed it, and a round
has what is left of its time and of that of the rounds before.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Lock

from benchmarks.gpu.page import write_page
from benchmarks.gpu.workers import run_round

TOTAL = 480  # seconds, the starts of processes included
ROUNDS: list[tuple[int, list[str]]] = [  # seconds, and parts that run side by side
    (100, ["right_float32", "right_bfloat16", "right_float16"]),
    (170, ["lengths"]),
    (120, ["steps"]),
    (80, ["compiled"]),
]


def git_commit() -> str | None:
    """With "+" where files have changed since; None where there is no repository to ask, or no git."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, encoding="utf-8")
    except OSError:
        return None
    return done.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, help="at most, 480 by default; the rounds shrink alike")
    parser.add_argument(
        "--parts", nargs="+", choices=[part for _, parts in ROUNDS for part in parts], help="only these"
    )
    parser.add_argument("--out", type=Path, default=Path("reports/gpu"), help="folder")
    parser.add_argument("--commit", default=None, help="of the code, where there is no repository to ask")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in Triton's interpreter")
    args = parser.parse_args()
    if args.page:
        write_page(args.out)
        return
    if args.rehearse:  # read by Triton's first import, in the processes that are started
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        os.environ.setdefault("DSA_BACKEND", "triton")
    total = args.seconds or (4 * TOTAL if args.rehearse else TOTAL)
    begin = time.monotonic()
    report = Report(args.out, {"commit": args.commit or git_commit(), "rehearsal": args.rehearse}, begin)
    deadline = begin
    for seconds, parts in ROUNDS:
        deadline += seconds * total / TOTAL
        asked = [part for part in parts if not args.parts or part in args.parts]
        run_round(asked, args.rehearse, deadline, report)
    if report.path:
        write_page(args.out)
    else:
        failed = {part: cases for part, cases in report.content["parts"].items() if cases}
        sys.exit(f"no result: {failed or 'without a CUDA device only --rehearse runs'}")


class Report:
    """The JSON file, written anew, whole, at every result."""

    def __init__(self, folder: Path, content: dict, begin: float):
        self.folder, self.content, self.begin = folder, content | {"parts": {}}, begin
        self.path: Path | None = None
        self.lock = Lock()

    def machine(self, found: dict) -> None:
        """What the device is: the file is named after it."""
        name = "".join(c if c.isalnum() else "-" for c in found["device"].lower())
        with self.lock:
            self.content = found | self.content
            self.path = self.folder / f"{name}.json"

    def put(self, part: str, case: str, result: dict) -> None:
        with self.lock:
            self.content["parts"].setdefault(part, {"cases": {}})["cases"][case] = result
            self.write()
        print(f"{time.monotonic() - self.begin:5.0f} s  {part}  {case}  {result}", flush=True)

    def left_out(self, part: str, cases: list[str]) -> None:
        """For want of time."""
        with self.lock:
            self.content["parts"].setdefault(part, {"cases": {}})["left_out"] = cases
            self.write()

    def write(self) -> None:
        from stages.files import write_json

        self.content["seconds"] = round(time.monotonic() - self.begin)
        if self.path:
            write_json(partial := self.path.with_suffix(".partial"), self.content)
            partial.replace(self.path)


if __name__ == "__main__":
    main()
