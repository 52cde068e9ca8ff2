"""A line on stderr about work that takes more than a moment, so that no command is silent for long.

REGIONCLIP_QUIET=1 in the environment leaves these lines out: for scripts that take any line for an error.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator

PATIENCE = 2.0  # seconds without a word
QUIET = "REGIONCLIP_QUIET"


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Prints `what …` on stderr when the body takes longer than `PATIENCE`; of several processes, one does.

    Args:
        what: the work, such as "loading model.safetensors".
    """
    timer = after_a_while(f"{what} …")
    try:
        yield
    finally:
        timer.cancel()


def after_a_while(line: str) -> threading.Timer:
    """Returns a started timer that prints a line on stderr unless it is canceled within `PATIENCE`."""
    timer = threading.Timer(PATIENCE, _say, [line])
    timer.daemon = True
    timer.start()
    return timer


def _say(line: str) -> None:
    worker = multiprocessing.parent_process() is not None or os.environ.get("RANK", "0") != "0"
    if worker or os.environ.get(QUIET, "") not in ("", "0"):
        return
    # A stream that was closed while the timer ran is nobody's to read.
    with contextlib.suppress(ValueError, OSError):
        print(line, file=sys.stderr, flush=True)
