"""Which checkpoint a training goes on from: the newest one that is, bit for bit, what was written."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from transformers import TrainerCallback

SUMS = "sha256.json"
OF_OTHERS = "rng_state_[1-9]*"  # of other processes, which may still be writing them


def sums(checkpoint: Path) -> dict[str, str]:
    """The sha256 of each file, as hexadecimal digits."""
    found = {}
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and path.name != SUMS and not path.match(OF_OTHERS):
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


class Seal(TrainerCallback):
    """Writes into each checkpoint what its files were: a kill, a full disk or a bad one shows when it is read."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (checkpoint / SUMS).write_text(json.dumps(sums(checkpoint), indent=1), encoding="utf-8")


def intact(checkpoint: Path) -> bool:
    try:
        return json.loads((checkpoint / SUMS).read_text(encoding="utf-8")) == sums(checkpoint)
    except (OSError, ValueError):  # there is none, or another process has deleted it
        return False


def last_checkpoint(folder: Path) -> str | None:
    """The newest one that is whole. Those that are found on the way to it are deleted."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True):
        if intact(checkpoint):
            return str(checkpoint)
        if int(os.environ.get("RANK", 0)) == 0:  # the others pass over it
            shutil.rmtree(checkpoint, ignore_errors=True)
    return None
