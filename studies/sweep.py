"""Sweeps over top-k, indexer size, warm-up length, ablation and seed as DVC experiments.

    python -m studies.sweep queue [topk] [indexer] [warmup] [ablation]    # dvc exp run --queue, once a point
    dvc exp run --run-all                                      # one after the other; or dvc queue start
    python -m studies.sweep report                          # dvc exp show --json to reports/sweep.{json,md}
    python -m studies.sweep report --from FILE [FILE ...]   # the page of such files, without the experiments

A point runs the stage `compare` and what it needs. `queue` leaves out points that are there or wait already, so a sweep
that was cut short goes on. Experiments are git refs that no clone has: the JSON file is what is committed. Sweeps of
several commits or machines are joined by `report --from`; each experiment keeps the commit that it began at.
"""

import argparse
import json
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

from stages import params
from studies.sweep_points import GROUPS, SEEDS, TOPK, Point, base_point, plan
from studies.sweep_report import write_report

OUT = Path("reports/sweep.json")
METRICS = "reports/compare.json"
TRAINED = "reports/train/sparse.json"


class SweepError(SystemExit):
    """str() is the one line to show."""


def output_of(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise SweepError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    return done.stdout


def shown(commit: str = "HEAD") -> list[dict]:
    """The experiments that began at a commit, by `dvc exp show`."""
    commits = json.loads(output_of(["dvc", "exp", "show", "--json", "--rev", commit]))
    return [experiment for commit in commits for experiment in commit["experiments"] or []]


def queue(groups: list[str], profile: str, topk: list[int], seeds: list[int]) -> None:
    points = [
        point for name, group in plan(base_point(profile), topk, seeds).items() if name in groups for point in group
    ]
    states = {e["name"]: (e.get("executor") or {}).get("state", "success") for e in shown()}
    there = {name for name, state in states.items() if state != "failed"}
    wanted = [point for point in dict.fromkeys(points) if point.name(profile) not in there]
    for point in wanted:
        command = point.command(profile)
        print(" ".join(command), flush=True)
        output_of(command)
    print(f"{len(wanted)} experiments queued, {len(set(points)) - len(wanted)} were there. Now: dvc exp run --run-all")


def stages_of(log: Path) -> tuple[list[str], list[str]]:
    """The stages that an experiment ran, and those that it took from the cache, by DVC's own log."""
    text = log.read_text(encoding="utf-8", errors="replace")
    ran = re.findall(r"^Running stage '([^']+)'", text, re.MULTILINE)
    reused = re.findall(r"^Stage '([^']+)' (?:is cached|didn't change)", text, re.MULTILINE)
    return ran, [stage for stage in reused if stage != "pretrain"]  # frozen: its result is in git


def read_experiment(experiment: dict, profile: str) -> dict | None:
    """One entry of `dvc exp show --json` as a row of the sweep; None where it is another's, failed or has not run."""
    revision, executor = experiment["revs"][0], experiment.get("executor") or {}
    data = revision["data"]
    if revision.get("error") or executor.get("state", "success") != "success" or not data:
        return None
    knobs = data["params"]["params.yaml"]["data"]
    scale = data["params"].get(f"profiles/{profile}.yaml", {}).get("data")
    if knobs["profile"] != profile or not scale or METRICS not in data["metrics"]:
        return None
    point = Point(
        knobs["topk"],
        **knobs["indexer"],
        warmup_steps=scale["warmup"]["steps"],
        seed=knobs["seed"],
        ablation=knobs.get("ablation", "none"),
    )
    if experiment["name"] != point.name(profile):
        return None
    row = {"name": experiment["name"], **asdict(point), "metrics": data["metrics"][METRICS]["data"]}
    row["device"] = data["metrics"][TRAINED]["data"]["run"]["device"]
    log = Path((executor.get("local") or {}).get("log") or "")
    row["ran"], row["reused"] = stages_of(log) if log.is_file() else (None, None)
    # DVC shows no lists; the file of the experiment's commit has them.
    row["rows"] = json.loads(output_of(["git", "show", f"{data['rev']}:{METRICS}"]))["rows"]
    return row


def collect(profile: str, commit: str = "HEAD") -> dict:
    """The sweep's experiments: `dvc exp show --json`, and each row's sums from the experiment's commit."""
    scale = ["params.yaml", f"profiles/{profile}.yaml"]
    if subprocess.run(["git", "diff", "--quiet", commit, "--", *scale]).returncode:
        raise SweepError(f"{' or '.join(scale)} differ from those of {commit}: check that commit out first")
    p = params.load(profile=profile)
    rows = [row for row in (read_experiment(e, profile) for e in shown(commit)) if row]
    began = output_of(["git", "rev-parse", "--short", commit]).strip()
    common = {}
    for name in ("tokens", "lookups"):
        found = {tuple(row["rows"].pop(name)) for row in rows}
        if len(found) > 1:
            raise SweepError(f"the experiments were not scored on the same held-out rows: {name} differ")
        common[name] = list(found.pop()) if found else []
    if (p.dense.steps, p.dense.batch_size) != (p.sparse.steps, p.sparse.batch_size):
        raise SweepError(f"profile {profile}: dense and sparse do not train on the same rows")
    return {
        "profile": profile,
        "base": asdict(base_point(profile)),
        "context": p.data.max_length,
        "hidden_size": json.loads(Path("models/base/config.json").read_text(encoding="utf-8"))["hidden_size"],
        "training": {"steps": p.sparse.steps, "warmup_batch": p.warmup.batch_size, "batch": p.sparse.batch_size},
        "rows": common,
        "experiments": in_order([row | {"commit": began} for row in rows]),
    }


def in_order(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: [row[k] for k in Point.__dataclass_fields__])


def join(sweeps: list[dict]) -> dict:
    """Sweeps of the same profile on the same held-out rows as one. An experiment that several have is the last's.

    Raises SweepError where they are not the same experiment but for the points.
    """
    joined = sweeps[0]
    for sweep in sweeps[1:]:
        for key in joined.keys() - {"experiments"}:
            if joined[key] != sweep[key]:
                raise SweepError(f"the sweeps cannot be joined: {key} is {joined[key]} and {sweep[key]}")
        rows = {row["name"]: row for row in joined["experiments"] + sweep["experiments"]}
        joined = joined | {"experiments": in_order(list(rows.values()))}
    return joined


def write(sweep: dict, path: Path) -> None:
    """JSON with an experiment a line."""
    head = json.dumps({key: value for key, value in sweep.items() if key != "experiments"}, indent=1)
    head = re.sub(r"\[[^\[\]]*\]", lambda match: " ".join(match[0].split()), head)
    rows = ",\n".join("  " + json.dumps(row) for row in sweep["experiments"])
    path.write_text(f'{head[:-2]},\n "experiments": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    queues = commands.add_parser("queue", help="queue the points that are not there yet")
    queues.add_argument("groups", nargs="*", choices=[*GROUPS, []], metavar=" ".join(GROUPS))
    queues.add_argument("--topk", type=int, nargs="+", default=TOPK, help="of the group topk")
    queues.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    reports = commands.add_parser("report", help="write reports/sweep.json, sweep.md and the figures")
    reports.add_argument("--from", dest="sources", type=Path, nargs="+", help="these files instead of dvc exp show")
    reports.add_argument("--rev", default="HEAD", help="the commit that the experiments began at")
    for command in (queues, reports):
        command.add_argument("--profile", default="sweep")
    args = parser.parse_args()
    if args.command == "queue":
        queue(args.groups or list(GROUPS), args.profile, args.topk, args.seeds)
        return
    if args.sources:
        sweep = join([json.loads(source.read_text(encoding="utf-8")) for source in args.sources])
    else:
        sweep = collect(args.profile, args.rev)
        if not sweep["experiments"]:
            raise SweepError(f"no experiment of the profile {args.profile} began at {args.rev}; --rev names another")
    write(sweep, OUT)
    write_report(sweep, OUT.parent)


if __name__ == "__main__":
    main()
