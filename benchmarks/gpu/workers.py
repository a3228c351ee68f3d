"""Cases in processes of their own: one that hangs, dies or spoils the device costs its own result and no other."""

import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

CASE_SECONDS = 90  # after which a case hangs
START_SECONDS = 120  # of a process, imports included
GRACE = 10  # seconds beyond the deadline for a case that has begun
PATIENCE = 5  # times as long on a CPU, which may be busy
LEAST = 5  # seconds for which no process is started


def run_round(parts: list[str], rehearse: bool, deadline: float, report) -> None:
    """Run parts side by side until all are done or the deadline, by time.monotonic(), has come."""
    with ThreadPoolExecutor(1 if rehearse else max(1, len(parts))) as threads:
        for done in [threads.submit(run_part, part, rehearse, deadline, report) for part in parts]:
            done.result()


def run_part(part: str, rehearse: bool, deadline: float, report) -> None:
    spawn, names, done = get_context("spawn"), None, 0
    while (names is None or done < len(names)) and deadline - time.monotonic() > LEAST:
        ours, theirs = spawn.Pipe(duplex=False)
        process = spawn.Process(target=work, args=(part, rehearse, done, deadline, theirs), daemon=True)
        process.start()
        theirs.close()
        problem = None
        try:
            while problem is None and (names is None or done < len(names)):
                limit = (START_SECONDS if names is None else CASE_SECONDS) * (PATIENCE if rehearse else 1)
                if not ours.poll(max(0, min(limit, deadline + GRACE - time.monotonic()))):
                    problem = "over its time"
                elif isinstance(message := ours.recv(), tuple):
                    report.put(part, *message)
                    done += 1
                elif message is None:  # without a device
                    return
                else:
                    machine, names = message
                    report.machine(machine)
        except EOFError:
            process.join(GRACE)
            if process.exitcode:
                problem = f"the process ended with {process.exitcode}"
        process.kill()
        process.join()
        if problem:
            report.put(part, names[done] if names else "start", {"failed": problem})
            done += 1
            if names is None:
                return
    if names and done < len(names):
        report.left_out(part, names[done:])


def work(part: str, rehearse: bool, first: int, deadline: float, pipe) -> None:
    """In the process: send the machine and the names of the cases, then each case's result from the first one on.

    It ends behind a case that has left the device unusable; a CUDA error stays with its process.
    """
    from benchmarks.gpu import cases  # imports torch and Triton

    machine = cases.machine(rehearse)
    if machine is None:
        pipe.send(None)
        return
    found = cases.of_part(part, rehearse)
    pipe.send([machine, list(found)])
    for name in list(found)[first:]:
        if time.monotonic() > deadline:
            return
        start = time.monotonic()
        try:
            result = found[name]()
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:300]
            result = {"failed": f"{type(error).__name__}: {text} ({at.filename.rsplit('/', 1)[-1]}:{at.lineno})"}
            del error
        pipe.send((name, result | {"seconds": round(time.monotonic() - start, 1)}))
        if "failed" in result and not cases.usable():
            return
