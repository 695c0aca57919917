"""A function over many items on all processors, results in the order of the items.

The processes are forks: whatever the function holds, a million records, is theirs without being copied or sent. Where
there is no fork, or one processor, the function runs here.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from threading import Thread
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_PROCESSES = 16  # more of them make rows faster than one process can gather them
_function: Callable[[Any], Any]  # of this process


def map_in_processes(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`map`, with every exception that the function raises.

    Raises:
        OSError: when a process was killed.
    """
    processors = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    processes = min(len(items), processors, MAX_PROCESSES)
    if processes < 2:
        yield from map(function, items)
        return
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, fork, _begin, (function,))
    try:
        yield from pool.map(_call, items)
    except BrokenProcessPool as error:
        raise OSError("a process that encodes rows was killed, most likely for want of memory") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(function: Callable[[Any], Any]) -> None:
    """Sets a process up; threads of the tokenizer are not inherited, and Ctrl-C is for the one that waits."""
    global _function
    _function = function
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # looking through what it inherited would copy it


def end_with_parent() -> None:
    """Has this process end when the one that started it does, however that ends: else it would wait for work for ever,
    with all its memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    Thread(target=end, daemon=True).start()


def _call(item: Any) -> Any:
    return _function(item)
