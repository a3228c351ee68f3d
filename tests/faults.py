"""A campaign of faults: each stage of a small run is hit, run again, and compared with a run that nothing hit.

    python -m tests.faults                                  # everything, each stage once: hours
    python -m tests.faults --only kill term --times 3       # some of FAULTS, three random moments each
    python -m tests.faults --only memory --stages sparse

Random moments and sizes are drawn by --seed. Writes reports/faults.json and from it reports/faults.md, after every
trial; the faults that are not in --only keep what stands there. As root on Linux the project lies on a disk of its own
in memory, which the campaign can fill and make read-only; elsewhere those faults are left out, and the table says so.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from stages import params
from stages.files import write_json
from tests.conftest import ROOT
from tests.test_reproducible import small_project

REPORT = ROOT / "reports/faults.json"
DISK = "3g"
MEASURED = {"run", "tokens_per_second", "resumed_at_step"}  # of a stage's JSON: no two runs have the same
UNHASHED = {"preflight", "benchmark", "speed", "report"}  # their outputs are measurements
TRAINING = ("dense", "warmup", "sparse", "window", "dpo@dense", "dpo@dsa")
PATIENCE = 600  # seconds, after which a run hangs
CLOCK = """
import random, time
real, draw, off = time.time, random.Random(0), 0.0
def jumping():
    global off
    off += draw.choice([0, 0, 0, 0, -86400, 86400, 3600, -3600])
    return real() + off
time.time = jumping
"""


@dataclass
class Ended:
    """How a run ended: its code, and what it said."""

    code: int
    said: str

    @property
    def manner(self) -> str:
        if self.code == 0:
            return "nothing happened"
        if self.code < 0:
            return "killed"
        return "traceback" if "Traceback" in self.said else "message"


class Project:
    """A small run in a folder of its own. seconds: of each stage when nothing hits it; files: of its outputs then."""

    def __init__(self, folder: Path, draw: random.Random):
        self.folder, self.draw, self.root = folder, draw, folder / "project"
        home = folder / "home"
        home.mkdir()
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = os.environ | {"HOME": str(home), "DSA_SCRATCH": str(home / "scratch"), "PATH": binaries}
        self.environment |= {"HF_HUB_OFFLINE": "1", "TMPDIR": str(home)}
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a stage would spend most of its time on compiling
        small_project(self.root, dense={"steps": 6}, warmup={"steps": 6}, sparse={"steps": 6}, dpo={"steps": 6})
        (self.root / "dvc.lock").unlink()
        shutil.rmtree(self.root / "reports")
        pipeline = params.read(self.root / "dvc.yaml")["stages"]
        names = [f"{n}@{item}" if item else n for n in pipeline for item in pipeline[n].get("foreach", [None])]
        self.stages = [name for name in names if name != "pretrain"]  # which is frozen
        self.seconds: dict[str, float] = {}
        self.files: dict[str, dict] = {}

    def make(self, wanted: list[str]) -> None:
        """The run that nothing hits, up to the wanted stages."""
        last = max(self.stages.index(name) for name in wanted)
        for stage in self.stages[: last + 1]:
            begin = time.monotonic()
            if (ended := self.run(*repro(stage))).code:
                raise SystemExit(f"{stage} without a fault: {ended.said[-2000:]}")
            self.seconds[stage], self.files[stage] = time.monotonic() - begin, self.outputs(stage)
            print(f"{stage}: {self.seconds[stage]:.0f} s", flush=True)
        shutil.rmtree(self.root / ".dvc/cache/runs", ignore_errors=True)  # of which DVC would take the result

    def outs(self, stage: str) -> list[Path]:
        entry = params.entry(stage, "smoke", self.root)
        outs = [
            out if isinstance(out, str) else next(iter(out))
            for key in ("outs", "metrics")
            for out in entry.get(key, [])
        ]
        return [self.root / out for out in outs]

    def outputs(self, stage: str) -> dict[str, bytes | dict | None]:
        """Of each output file, its bytes, or of a JSON file what in it is no measurement."""
        found = {}
        for out in self.outs(stage):
            for path in sorted(p for p in out.rglob("*") if p.is_file()) if out.is_dir() else [out]:
                content = path.read_bytes() if path.is_file() else None
                if path.suffix == ".json" and "reports" in path.parts and content:
                    content = unmeasured(json.loads(content))
                found[str(path.relative_to(self.root))] = content is not None if stage in UNHASHED else content
        return found

    def forget(self, stage: str) -> None:
        """As before the stage ran for the first time."""
        for out in self.outs(stage):
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        lock = params.read(self.root / "dvc.lock")
        lock["stages"].pop(stage, None)
        (self.root / "dvc.lock").write_text(params.dump(lock), encoding="utf-8")

    def start(self, *command: str, before: Callable | None = None, **environment: str) -> subprocess.Popen:
        self.log = (self.folder / "log").open("w+", encoding="utf-8", errors="replace")

        def prepare() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
            if before:
                before()

        return subprocess.Popen(
            ["dvc", *command],
            cwd=self.root,
            env=self.environment | environment,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
            preexec_fn=prepare,
        )

    def end(self, process: subprocess.Popen) -> Ended:
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = 0
        finally:
            if hangs := process.poll() is None:  # or the campaign itself is told to end
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.log.seek(0)
        return Ended(1, "Traceback: hangs") if hangs else Ended(code, self.log.read())

    def run(self, *command: str, **more) -> Ended:
        return self.end(self.start(*command, **more))

    @property
    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("home/scratch/*/checkpoint-*/sha256.json"))


def repro(stage: str) -> list[str]:
    """This stage and no other; not from the runs that DVC remembers."""
    return ["repro", "--single-item", "--no-run-cache", stage]


def unmeasured(content):
    if isinstance(content, dict):
        return {key: unmeasured(value) for key, value in content.items() if key not in MEASURED}
    return [unmeasured(value) for value in content] if isinstance(content, list) else content


def signalled(number: int) -> Callable:
    def fault(project: Project, stage: str) -> Ended:
        process = project.start(*repro(stage))
        time.sleep(project.draw.uniform(0.5, project.seconds[stage]))
        if process.poll() is None:
            os.killpg(process.pid, number)
        return project.end(process)

    return fault


def limited(kind: int, least: int, most: int) -> Callable:
    def fault(project: Project, stage: str) -> Ended:
        size = int(project.draw.uniform(least, most))
        return project.run(*repro(stage), before=lambda: resource.setrlimit(kind, (size, size)))

    return fault


def full_disk(project: Project, stage: str) -> Ended:
    """So many bytes are free, up to what the stage writes into the workspace and into DVC's cache."""
    size = sum(path.stat().st_size for out in project.outs(stage) for path in [*out.rglob("*"), out] if path.is_file())
    project.forget(stage)
    filler, left = project.folder / "filler", project.draw.randrange(4 * size)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(project.folder).free - left))
    try:
        return project.run(*repro(stage))
    finally:
        filler.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def read_only_cache(project: Project, stage: str) -> Ended:
    with read_only(project.root / ".dvc/cache"):
        return project.run(*repro(stage))


def two_at_once(project: Project, stage: str) -> Ended:
    """The second says that the first is at work; the first is not disturbed."""
    first = project.start(*repro(stage))
    time.sleep(project.draw.uniform(0.2, project.seconds[stage] / 2))
    log, second = project.log, project.run(*repro(stage))
    project.log = log
    if project.end(first).code:
        return Ended(1, "Traceback: the first was disturbed")
    return second


def flip_a_bit(path: Path, draw: random.Random) -> None:
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def damaged_checkpoint(project: Project, stage: str) -> Ended:
    """A kill as soon as there is a checkpoint, of which one bit flips in one file."""
    process = project.start(*repro(stage))
    while process.poll() is None and not project.checkpoints:
        time.sleep(0.01)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    ended = project.end(process)
    files = [path for path in project.checkpoints[-1].parent.iterdir() if path.stat().st_size]
    flip_a_bit(project.draw.choice(files), project.draw)
    return ended


def cut_model(project: Project, stage: str) -> Ended:
    """A weight file of the workspace is cut short, before a stage that reads it."""
    entry = params.entry(stage, "smoke", project.root)
    models = [project.root / dep for dep in entry["deps"] if dep.startswith("models/")]
    path = project.draw.choice(models) / "model.safetensors"
    path.chmod(0o644)
    os.truncate(path, project.draw.randrange(path.stat().st_size))
    return project.run("repro", stage)  # with what it depends on


def damaged_cache(project: Project, stage: str) -> Ended:
    """A bit flips in DVC's cache, in an output of the stage that the workspace has lost."""
    again = project.run(*repro(stage))
    if again.code:
        return again
    lock = params.read(project.root / "dvc.lock")["stages"][stage]["outs"]
    out = project.draw.choice([out for out in lock if out["path"].startswith(("models/", "data/"))])
    cached = project.root / ".dvc/cache/files/md5" / out["md5"][:2] / out["md5"][2:]
    if cached.suffix == ".dir":
        listed = project.draw.choice(json.loads(cached.read_text(encoding="utf-8")))["md5"]
        cached = cached.parents[1] / listed[:2] / listed[2:]
    flip_a_bit(cached, project.draw)
    path = project.root / out["path"]
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return project.run("checkout", out["path"])


def jumping_clock(project: Project, stage: str) -> Ended:
    (project.folder / "clock").mkdir(exist_ok=True)
    (project.folder / "clock/sitecustomize.py").write_text(CLOCK, encoding="utf-8")
    return project.run(*repro(stage), PYTHONPATH=str(project.folder / "clock"))


MB = 2**20
FAULTS: dict[str, tuple[str, Callable]] = {
    "kill": ("kill -9 of all processes, at a random moment", signalled(signal.SIGKILL)),
    "term": ("SIGTERM to all processes, at a random moment", signalled(signal.SIGTERM)),
    "int": ("SIGINT (Ctrl-C), at a random moment", signalled(signal.SIGINT)),
    "disk": ("disk full, at a random byte", full_disk),
    "file": ("no file may be larger than a random size", limited(resource.RLIMIT_FSIZE, MB // 10, 20 * MB)),
    "memory": ("memory refused beyond a random size", limited(resource.RLIMIT_DATA, 100 * MB, 1500 * MB)),
    "read-only": ("DVC's cache is read-only", read_only_cache),
    "twice": ("a second `dvc repro` meanwhile", two_at_once),
    "checkpoint": ("kill -9, then a bit flips in the last checkpoint", damaged_checkpoint),
    "cut": ("a model of the workspace is cut short", cut_model),
    "cache": ("a bit flips in DVC's cache, the workspace is empty", damaged_cache),
    "clock": ("the clock jumps by hours and days", jumping_clock),
}
NEEDS_DISK = {"disk", "read-only"}


def applies(fault: str, stage: str, project: Project) -> bool:
    entry = params.entry(stage, "smoke", project.root)
    if fault == "checkpoint":
        return stage in TRAINING
    if fault == "cut":
        return any(dep.startswith("models/") and "." not in dep for dep in entry["deps"])
    return fault != "cache" or any(str(out).startswith(("models/", "data/")) for out in entry.get("outs", []))


def trial(project: Project, fault: str, stage: str) -> dict:
    """One fault, and what the next run made of it."""
    shutil.rmtree(project.folder / "home/scratch", ignore_errors=True)
    if fault != "cut":  # what is in the cache need not be written again
        shutil.rmtree(project.root / ".dvc/cache/files", ignore_errors=True)
    if fault != "disk":
        project.forget(stage)
    first = FAULTS[fault][1](project, stage)
    again = project.run(*repro(stage))
    result = "same" if not again.code and project.outputs(stage) == project.files[stage] else "another result"
    found = {"stage": stage, "first": first.manner, "then": result if not again.code else again.manner}
    if found["then"] != "same" or found["first"] == "traceback":
        said = re.sub(r"/\S*/site-packages/", "", (again if again.code else first).said)
        lines = [line for line in said.splitlines() if line.strip()]
        found["said"] = [line[:300] for line in lines if "rror" in line][-3:] or lines[-3:]
    if found["then"] != "same":  # and go on from what is right
        project.forget(stage)
        shutil.rmtree(project.folder / "home/scratch", ignore_errors=True)
        project.run("repro", "--no-run-cache", stage)
    return found


def table(trials: dict[str, list[dict]]) -> str:
    head = [
        "fault",
        "times",
        "stages",
        "did nothing",
        "killed",
        "message",
        "traceback",
        "then the same result",
        "other",
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for fault, (what, _) in FAULTS.items():
        of = trials.get(fault)
        if not of:
            lines.append([what, "0", *["–"] * (len(head) - 2)])
            continue
        first = [
            str(sum(t["first"] == manner for t in of))
            for manner in ("nothing happened", "killed", "message", "traceback")
        ]
        same = sum(t["then"] == "same" for t in of)
        lines.append([what, str(len(of)), str(len({t["stage"] for t in of})), *first, str(same), str(len(of) - same)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(trials: dict[str, list[dict]]) -> None:
    write_json(REPORT, trials)
    text = [
        "# Faults",
        "Each trial hits one stage of a small run and runs it again with `dvc repro`; the result is compared with that "
        "of a run that nothing hit: models and data byte by byte, reports but for their measurements. "
        "Made by `python -m tests.faults`; every trial is in [faults.json](faults.json).",
        table(trials),
        "The middle columns say how the run that was hit ended; a fault may come too late to do anything.",
    ]
    others = [
        f"- {FAULTS[f][0]}, {t['stage']}: {t['then']}" for f, of in trials.items() for t in of if t["then"] != "same"
    ]
    text += ["## Not the same result", "\n".join(others)] if others else []
    REPORT.with_suffix(".md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


@contextmanager
def own_disk(folder: Path) -> Iterator[bool]:
    """Whether the folder is now a disk of its own."""
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--stages", nargs="+", help="all by default")
    parser.add_argument("--times", type=int, default=1, help="of each fault on each stage")
    parser.add_argument("--sample", type=int, help="so many stages for each fault, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # its disk goes with it
    draw = random.Random(args.seed)
    trials = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        mounted = stack.enter_context(own_disk(folder))
        project = Project(folder, draw)
        wanted = args.stages or project.stages
        project.make(wanted)
        for fault in args.only:
            stages = [stage for stage in wanted if applies(fault, stage, project)]
            if fault in NEEDS_DISK and not mounted:
                continue
            trials[fault] = []
            for stage in draw.sample(stages, min(args.sample or len(stages), len(stages))) * args.times:
                trials[fault].append(trial(project, fault, stage))
                print(fault, trials[fault][-1], flush=True)
                write(trials)


if __name__ == "__main__":
    main()
