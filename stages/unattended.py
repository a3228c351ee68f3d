"""DVC where nobody watches: a job that is told to end leaves a checkpoint, and says that it has to go on.

    python -m stages.unattended [repro | exp run ...]    # arguments of dvc, without any: repro

SIGTERM (or SIGINT) reaches the stage at work and not DVC or the launcher around it. A training stage ends its step and
writes a checkpoint, any other ends at once. The exit code is then GO_ON: the same command again goes on from there, to
the same result. Any other code is DVC's. docs/unattended.md has it with Slurm and on machines that may be taken away.
"""

import os
import signal
import subprocess
import sys
import threading

GO_ON = 75  # EX_TEMPFAIL of sysexits.h


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as DVC and the launcher inherit it
    # torchrun hands signals on by itself, and kills 30 seconds later what has not ended.
    environment = os.environ | {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGHUP,SIGQUIT"}
    command = [sys.executable, "-m", "dvc", *(arguments or ["repro"])]
    dvc = subprocess.Popen(command, env=environment, start_new_session=True)
    asked = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: asked.set())
    while dvc.poll() is None:
        if asked.wait(1):
            os.killpg(dvc.pid, signal.SIGTERM)  # again and again: the next stage may be about to begin
            try:
                dvc.wait(1)
            except subprocess.TimeoutExpired:
                continue
    return GO_ON if asked.is_set() and dvc.returncode else dvc.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
