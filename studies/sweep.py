"""Sweeps over top-k, indexer size, warm-up length, ablation and seed as DVC experiments.

    python -m studies.sweep queue [topk] [indexer] [warmup] [ablation]    # dvc exp run --queue, once a point
    dvc exp run --run-all                                      # one after the other; or dvc queue start
    python -m studies.sweep report                          # DVC's experiments to reports/sweep.{json,md}
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

import dvc.api

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
    """The experiments that began at a commit: the rows of `dvc exp show`, by column."""
    return [row for row in dvc.api.exp_show(revs=commit) if row["typ"] != "baseline"]


def queue(groups: list[str], profile: str, topk: list[int], seeds: list[int]) -> None:
    points = [
        point for name, group in plan(base_point(profile), topk, seeds).items() if name in groups for point in group
    ]
    there = {row["Experiment"] for row in shown() if row["State"] != "Failed"}
    wanted = [point for point in dict.fromkeys(points) if point.name(profile) not in there]
    for point in wanted:
        command = point.command(profile)
        print(" ".join(command), flush=True)
        output_of(command)
    print(f"{len(wanted)} experiments queued, {len(set(points)) - len(wanted)} were there. Now: dvc exp run --run-all")


def stages_of(experiment: str) -> tuple[list[str], list[str]] | tuple[None, None]:
    """The stages that it ran, and those that it took from the cache, by DVC's own log; None where that is gone."""
    done = subprocess.run(["dvc", "queue", "logs", experiment], capture_output=True, encoding="utf-8")
    if done.returncode:
        return None, None
    ran = re.findall(r"^Running stage '([^']+)'", done.stdout, re.MULTILINE)
    reused = re.findall(r"^Stage '([^']+)' (?:is cached|didn't change)", done.stdout, re.MULTILINE)
    return ran, [stage for stage in reused if stage != "pretrain"]  # frozen: its result is in git


def written(experiment: dict, path: str) -> dict:
    """A JSON file of the experiment's commit."""
    return json.loads(output_of(["git", "show", f"{experiment['rev']}:{path}"]))


def read_experiment(experiment: dict, profile: str) -> dict | None:
    """One row of `shown` as a row of the sweep; None where it is another's, failed or has not run."""
    if experiment["profile"] != profile or experiment["State"] not in (None, "Success"):
        return None
    warmup_steps = "warmup.steps"  # by the file's name where the commit that it began at has another profile
    warmup_steps = experiment.get(f"profiles/{profile}.yaml:{warmup_steps}", experiment.get(warmup_steps))
    numbers = (*(experiment[k] for k in ("topk", "indexer.n_heads", "indexer.head_dim")), warmup_steps)
    point = Point(*map(int, numbers), seed=int(experiment["seed"]), ablation=experiment.get("ablation") or "none")
    if (name := experiment["Experiment"]) != point.name(profile):
        return None
    metrics = written(experiment, METRICS)
    rows = metrics.pop("rows")
    ran, reused = stages_of(name)
    device = written(experiment, TRAINED)["run"]["device"]
    row = {"name": name, **asdict(point), "metrics": metrics}
    return row | {"device": device, "ran": ran, "reused": reused, "rows": rows}


def collect(profile: str, commit: str = "HEAD") -> dict:
    """The sweep's experiments: DVC's list of them, and what they wrote, from the commit of each."""
    scale = ["params.yaml", f"profiles/{profile}.yaml"]
    if subprocess.run(["git", "diff", "--quiet", commit, "--", *scale]).returncode:
        raise SweepError(f"{' or '.join(scale)} differ from those of {commit}: check that commit out first")
    p = params.load(profile=profile)
    rows = [row for row in (read_experiment(e, profile) for e in shown(commit)) if row]
    began = output_of(["git", "rev-parse", "--short", commit]).strip()
    common = {}
    for name in ("tokens", "lookups", "family"):
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
    reports.add_argument("--from", dest="sources", type=Path, nargs="+", help="these files instead of the experiments")
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
