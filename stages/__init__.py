"""One short module a stage, named after it, and what they share.

Before anything else is imported, for tqdm reads its defaults once: in a log file, progress is a line a minute.
"""

import errno
import os
import signal
import sys

if not sys.stderr.isatty():
    for name, value in {
        "MININTERVAL": "60",  # seconds
        "MAXINTERVAL": "60",
        "DELAY": "60",  # what takes less says nothing
        "BAR_FORMAT": "{desc} {percentage:.0f} %, {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} to go, "
        "{rate_fmt}{postfix}",
    }.items():
        os.environ.setdefault(f"TQDM_{name}", value)
    from tqdm import tqdm

    def printer(file):
        """In the place of tqdm's own, which goes back to the head of the line."""
        stage = os.environ.get("DVC_STAGE", "")
        return lambda line: line and print(" ".join([*stage.split(), *line.split()]), file=file, flush=True)

    tqdm.status_printer = staticmethod(printer)

# DVC and the launcher inherit from stages/unattended.py that they ignore it; a stage does not.
if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

# What a machine that is too small says, each library in words of its own; torch has none for a disk.
SMALL = [os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOMEM)]
SMALL += ["PytorchStreamWriter", "inline_container.cc", "DefaultCPUAllocator"]


def in_a_line(kind: type[BaseException], error: BaseException, traceback) -> None:
    """In the place of Python's own: Ctrl-C, and a disk or a memory that is too small, are no faults of the code."""
    text, name = str(error).strip(), os.environ.get("DVC_STAGE", "this stage")
    if kind is KeyboardInterrupt:
        print(f"{name}: interrupted: run it again", file=sys.stderr)
    elif isinstance(error, MemoryError) or any(said in text for said in SMALL):
        why = text.splitlines()[0] if text else "no memory left"
        print(f"{name}: {kind.__name__}: {why}: run it again where there is room", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = in_a_line
