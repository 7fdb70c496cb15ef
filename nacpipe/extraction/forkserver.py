"""What the process imports from which decoding processes are forked (loader.py): all that they need, once.

A run that ends while one of them starts takes away the semaphores that it was sent; it then ends without a traceback.
"""

from __future__ import annotations

import sys
from types import TracebackType

import nacpipe.extraction.loader  # noqa: F401


def end_quietly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say nothing of what a starting process was to receive from one that is gone; of all else the traceback."""
    last = trace
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = "" if last is None else str(last.tb_frame.f_globals.get("__name__"))
    if not (isinstance(error, FileNotFoundError | EOFError | ConnectionError) and where.startswith("multiprocessing.")):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = end_quietly  # of this process, which nothing but loader.py names, and of its forks
